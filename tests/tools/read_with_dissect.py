"""Prints the content of a VHDX as dissect.hypervisor reads it.

    read_with_dissect.py IMAGE

It finds parents by itself, by their relative paths. It takes the bits of a bitmap from whole bytes, so what begins inside one is
cut short: eight sectors are read at a time, and parents must have no parents themselves. It replays no log.
"""
import pathlib
import sys

from dissect.hypervisor.disk.vhdx import VHDX

STEP = 8


def main():
    disk = VHDX(pathlib.Path(sys.argv[1]))
    sectors = disk.size // disk.sector_size
    for sector in range(0, sectors, STEP):
        count = min(STEP, sectors - sector)
        data = disk.read_sectors(sector, count)
        if len(data) != count * disk.sector_size:
            sys.exit(f"{len(data)} bytes were read for {count} sectors at {sector}")
        sys.stdout.buffer.write(data)


main()
