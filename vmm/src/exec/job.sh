# shellcheck shell=sh disable=SC2154 # minivmm writes the two variables in front of this
# Written by minivmm --exec. The guest's /bin/sh runs it as process 1, and no other program has to exist: what is missing is
# done without. Below, `command` is set to the command, and `mark` to what frames minivmm finds in the output.
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
export PATH HOME
unset init_args
exec </dev/null
{ : >&2; } 2>/dev/null || exec 2>/dev/null

mounted() {
    while read -r _ place _; do
        [ "$place" != "$1" ] || return 0
    done </proc/mounts
    return 1
} 2>/dev/null

provide() { mounted "$2" || { mkdir -p "$2"; mount -t "$1" "$1" "$2"; }; } 2>/dev/null

provide proc /proc
provide sysfs /sys
provide devtmpfs /dev
provide devpts /dev/pts
provide tmpfs /dev/shm
provide tmpfs /run
provide tmpfs /tmp
for link in fd: stdin:/0 stdout:/1 stderr:/2; do
    ln -s "/proc/self/fd${link#*:}" "/dev/${link%:*}"
done 2>/dev/null
{ ip link set lo up || ifconfig lo up; } 2>/dev/null

writable() {
    while read -r device _ _ options _; do
        case $device,$options in /dev/*,rw | /dev/*,rw,*) return 0 ;; esac
    done </proc/mounts
    return 1
} 2>/dev/null

# Brings what was written to the disks, and makes every file system read-only. The kernel does the latter some time after it was
# told to.
settle() {
    writable || return
    sync
    echo u >/proc/sysrq-trigger || return
    tries=300
    sleep 0.1 || tries=100000
    while writable && [ "$tries" -gt 0 ]; do
        tries=$((tries - 1))
        sleep 0.1
    done
} 2>/dev/null

job() {
    echo "${mark}begin;"
    /bin/sh -c "$command"
    status=$?
    settle
    echo "${mark}end $status;"
}

# Through a pipe, since a program formats its output for people where that is a terminal.
if [ ! -c /dev/ttyS1 ]; then
    echo 'minivmm: /dev/ttyS1 does not exist: --exec needs a kernel with two 8250 serial ports' >&2
elif cat </dev/null 2>/dev/null; then
    job | cat >/dev/ttyS1
else
    job >/dev/ttyS1
fi

# Not reached once the status is out: minivmm ends the machine then.
settle
{ echo b >/proc/sysrq-trigger; reboot -f; poweroff -f; } 2>/dev/null
exit 1
