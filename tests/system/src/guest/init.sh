#!/bin/sh
# The only process of the guest: does the job that the kernel's command line names, then switches the machine off.
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
# A module's parameters stand on the command line as MODULE.PARAMETER; only what is built in finds them there by itself.
parameters() {
    for word in $(cat /proc/cmdline); do
        case $word in
            "$1".*) echo "${word#*.}" ;;
        esac
    done
}
for module in $(cat /modules/order); do
    # Not quoted: there may be several.
    insmod "/modules/$module.ko" $(parameters "$module") || echo "GUEST: no module $module"
done
job=none rounds=4 mib=4 end=poweroff
for word in $(cat /proc/cmdline); do
    case $word in
        job=* | rounds=* | mib=* | end=*) eval "$word" ;;
    esac
done
tries=0
while [ ! -b /dev/vda ] && [ $tries -lt 50 ]; do
    usleep 100000
    tries=$((tries + 1))
done
queue=/sys/block/vda/queue
echo "GUEST: disk sectors=$(cat /sys/block/vda/size) block=$(cat $queue/logical_block_size)" \
    "cache=$(cat $queue/write_cache | tr ' ' '-') discard=$(cat $queue/discard_max_bytes)" \
    "zeroes=$(cat $queue/write_zeroes_max_bytes) queues=$(ls /sys/block/vda/mq | wc -l) cpus=$(nproc)" \
    "serial=$(cat /sys/block/vda/serial)"

# The disk may get another size at any time.
(
    size=$(cat /sys/block/vda/size)
    while usleep 100000; do
        now=$(cat /sys/block/vda/size)
        [ "$now" = "$size" ] || echo "GUEST: resized sectors=$now"
        size=$now
    done
) &

# Whoever runs the guest may type a line: the job then ends with the round that it is in.
(read -r line </dev/ttyS0 && : >/tmp/stop) &

# Rounds of files with checksums; some are removed again and their space is trimmed.
files() {
    mkfs.ext4 -q -F /dev/vda && mount -t ext4 -o discard /dev/vda /mnt || return 1
    echo "GUEST: file system made"
    round=0
    while [ ! -e /tmp/stop ] && [ $round -lt "$rounds" ]; do
        round=$((round + 1))
        dd if=/dev/urandom of=/mnt/new bs=64k count=$((mib * 16)) 2>/dev/null || return 1
        sum=$(sha256sum </mnt/new)
        cp /mnt/new "/mnt/slot$((round % 3))" && mv /mnt/new "/mnt/last$((round % 2))" || return 1
        echo "${sum%% *}  /mnt/slot$((round % 3))" >"/tmp/sum.slot$((round % 3))"
        echo "${sum%% *}  /mnt/last$((round % 2))" >"/tmp/sum.last$((round % 2))"
        sync
        [ $((round % 4)) = 0 ] && fstrim /mnt
        echo "GUEST: round $round"
    done
    umount /mnt || return 1
    echo 3 >/proc/sys/vm/drop_caches
    mount -t ext4 -o ro /dev/vda /mnt || return 1
    cat /tmp/sum.* | sha256sum -c >/tmp/verdict 2>&1 || { cat /tmp/verdict; return 1; }
    echo "GUEST: $(grep -c OK /tmp/verdict) files hold what was written"
    umount /mnt
    e2fsck -fn /dev/vda || return 1
    echo 3 >/proc/sys/vm/drop_caches
    sum=$(sha256sum </dev/vda)
    echo "GUEST: device ${sum%% *}"
}

# Writes blocks with checksums all the time without a file system, several at once; then checks them all.
blocks() {
    for part in 0 1; do
        (
            n=0
            while [ ! -e /tmp/stop ] && [ $n -lt "$rounds" ]; do
                n=$((n + 1))
                at=$((part * mib + n % mib))
                dd if=/dev/urandom of=/tmp/part$part bs=64k count=16 2>/dev/null
                dd if=/tmp/part$part of=/dev/vda bs=64k count=16 seek=$((at * 16)) conv=notrunc oflag=direct \
                    2>/dev/null || { echo "GUEST: write failed"; : >/tmp/failed; exit 1; }
                sha256sum </tmp/part$part >/tmp/sum.$at
                echo "GUEST: part $part round $n"
            done
        ) &
        eval "pid$part=\$!"
    done
    wait "$pid0" "$pid1"
    [ -e /tmp/failed ] && return 1
    checked=0
    for file in /tmp/sum.*; do
        at=${file#/tmp/sum.}
        sum=$(dd if=/dev/vda bs=64k count=16 skip=$((at * 16)) iflag=direct 2>/dev/null | sha256sum)
        [ "$sum" = "$(cat "$file")" ] || { echo "GUEST: block $at differs"; return 1; }
        checked=$((checked + 1))
    done
    echo "GUEST: $checked blocks hold what was written"
    sum=$(sha256sum </dev/vda)
    echo "GUEST: device ${sum%% *}"
}

case $job in
    files | blocks) if $job; then echo "GUEST: PASS"; else echo "GUEST: FAIL"; fi ;;
    *) echo "GUEST: no such job: $job" ;;
esac
dmesg | grep -E 'I/O error|not a head|hung task|EXT4-fs (error|warning)|virtio_blk.*(reset|fail)' | tail -n 5
echo "GUEST: end after $(cut -d' ' -f1 /proc/uptime) s"
"$end" -f
