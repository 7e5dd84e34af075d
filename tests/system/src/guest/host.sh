#!/bin/sh
# The only process of a host that runs machines on its KVM: a daemon with a disk, then one machine after the other, each of
# which moves from process to process while it works. The kernel's command line says `moves=N` and of each machine
# `machine=CPUS,KERNEL,END`. What happens is told in lines that begin with `GUEST:`; what a machine's console shows comes in
# lines that begin with `MACHINE:`.
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
mkfifo /tmp/typed

fail() {
    echo "GUEST: what the programs said:"
    tail -n 20 /tmp/*.log
    dmesg | tail -n 20
    echo "GUEST: FAIL $*"
    poweroff -f
}

for module in $(cat /modules/order); do
    insmod "/modules/$module.ko" || fail "no module $module"
done
[ -c /dev/kvm ] || fail "no /dev/kvm"
moves=2 machines=
for word in $(cat /proc/cmdline); do
    case $word in
        moves=*) eval "$word" ;;
        machine=*) machines="$machines ${word#machine=}" ;;
    esac
done

# Waits until a command succeeds.
until_true() {
    tries=0
    until "$@"; do
        tries=$((tries + 1))
        [ $tries -lt 600 ] || fail "not within a minute: $*"
        usleep 100000
    done
}

# How often the machine's console shows something.
shown() { grep -c "$1" /tmp/console; }
shows_more_than() { [ "$(shown "$1")" -gt "$2" ]; }
shows_or_ended() { [ "$(shown "$1")" -gt 0 ] || ! kill -0 "$now" 2>/dev/null; }

# Waits until the console shows so many more of what it shows all the time.
beats() {
    until_true shows_more_than 'GUEST: part 0 round' $(($(shown 'GUEST: part 0 round') + $1))
}

# It goes on from the start when the file is emptied for the next machine.
: >/tmp/console
tail -f /tmp/console | sed 's/^/MACHINE: /' &

blockctl image create /tmp/disk.vhdx --size 64M >/tmp/create.log 2>&1 || fail "no image"
blockd --state-dir /tmp/state --api /tmp/blockd.api --disk root,image=/tmp/disk.vhdx,socket=/tmp/root.sock,queues=2 \
    >/tmp/blockd.log 2>&1 &
until_true [ -S /tmp/root.sock ]

# Starts a process for the machine under number $1; the other arguments are its own.
process() {
    number=$1
    shift
    kvm-shim "$@" --api "/tmp/vm$number.api" --state-dir "/tmp/vm$number" --console stdio \
        --disk "socket=/tmp/root.sock,serial=root,queues=$cpus" <>/tmp/typed >>/tmp/console 2>>"/tmp/vm$number.log" &
}

move() {
    process $((count + 1)) receive --listen "unix:/tmp/door$count"
    next=$!
    until_true [ -S "/tmp/door$count" ]
    # A busy host may never be fast enough for the machine: it has to stand still then.
    kvm-shim --json send --api "/tmp/vm$count.api" --to "unix:/tmp/door$count" --downtime 1s --timeout 20s \
        --on-timeout force >/tmp/sent 2>/tmp/send.log ||
        fail "not sent: $(cat /tmp/send.log)"
    wait "$now" || fail "the source ended with $?"
    now=$next count=$((count + 1))
    echo "GUEST: moved $(cat /tmp/sent)"
}

run() {
    cpus=$1 kernel=$2 end=$3
    echo "GUEST: machine cpus=$cpus kernel=$kernel end=$end at $(cut -d' ' -f1 /proc/uptime)"
    : >/tmp/console
    process "$count" run --memory 192M --cpus "$cpus" --kernel "/$kernel" --initrd /machine.cpio \
        --cmdline "console=ttyS0 loglevel=5 panic=-1 reboot=k pci=off job=blocks rounds=100000 mib=4 end=$end"
    now=$!
    until_true shows_or_ended 'GUEST: disk'
    beats 2
    i=0
    while [ $i -lt "$moves" ]; do
        move
        beats 3
        i=$((i + 1))
    done
    echo stop >/tmp/typed
    wait "$now" || fail "the machine's process ended with $?"
    count=$((count + 1))
    # Time to show the last lines.
    sleep 1
    grep -q 'GUEST: PASS' /tmp/console || fail "the machine did not pass"
    echo "GUEST: machine done at $(cut -d' ' -f1 /proc/uptime)"
}

count=0
for machine in $machines; do
    IFS=, read -r cpus kernel end <<END
$machine
END
    run "$cpus" "$kernel" "$end"
done
echo "GUEST: PASS"
poweroff -f
