"""Prints the content of a disk as libvhdi reads it.

    read_with_libvhdi.py IMAGE [PARENT [GRANDPARENT ...]]

The parents are given by hand, since libvhdi looks for none. It replays no log, and reads VHDs that have parents wrongly.
"""
import sys

import pyvhdi

CHUNK = 1 << 20


def main():
    files = []
    for path in sys.argv[1:]:
        file = pyvhdi.file()
        file.open(path)
        files.append(file)
    for child, parent in zip(files, files[1:]):
        child.set_parent(parent)
    left = files[0].get_media_size()
    while left:
        data = files[0].read_buffer(min(left, CHUNK))
        if not data:
            sys.exit(f"{sys.argv[1]} ends {left} bytes early")
        sys.stdout.buffer.write(data)
        left -= len(data)


main()
