#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Runs inside the lab: COUNT guests at once under Debian's own QEMU with -accel kvm, BATCHES times.
# Usage: guests.sh COUNT BATCHES KERNEL INITRD. Prints one line for each batch, fails on a lost guest.
set -u
count=$1 batches=$2 kernel=$3 initrd=$4
failed=0
for batch in $(seq "$batches"); do
    read -r begin _ < /proc/uptime
    for i in $(seq "$count"); do
        timeout 1000 qemu-system-x86_64 -M microvm,rtc=on -accel kvm -cpu host -m 128 -smp 1 \
            -nodefaults -no-user-config -display none -no-reboot -serial stdio \
            -kernel "$kernel" -initrd "$initrd" \
            -append "console=ttyS0 reboot=t panic=-1 quiet rdinit=/init" \
            < /dev/null > "/tmp/guest$i" 2>&1 &
    done
    wait
    read -r end _ < /proc/uptime
    good=$(grep -l '^MARK done' /tmp/guest* | wc -l)
    echo "batch $batch: $good of $count guests, $(echo "$end $begin" | awk '{printf "%.0f", $1 - $2}') s"
    if [ "$good" -ne "$count" ]; then
        failed=1
        for i in $(seq "$count"); do
            grep -q '^MARK done' "/tmp/guest$i" || { echo "--- guest $i ended with:"; tail -n 12 "/tmp/guest$i"; }
        done
    fi
    rm -f /tmp/guest*
done
dmesg | grep -E '\] *(BUG|Oops|WARNING|rcu: INFO|watchdog: BUG)' && echo "(from the lab's kernel log)"
exit $failed
