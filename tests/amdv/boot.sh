#!/bin/busybox sh
# The machine's first process: builds the root in the initramfs and moves into it.
# The rule: any failure ends this shell, so the kernel panics, QEMU ends, and run.py shows the console.
set -e
PATH=/bin
HERE=/run/amdv

load_modules() {
    while read -r module; do insmod "/modules/$module"; done </modules/order
}

mount_9p() { # tag, folder, options
    mount -t 9p -o "trans=virtio,version=9p2000.L,msize=524288,$3" "$1" "$2"
}

# The host's root is the lower layer, exported read-only; every write lands in memory and goes with the machine.
build_root() {
    mkdir -p /lower /upper /root
    mount_9p root /lower ro,cache=loose
    mount -t tmpfs -o mode=755 upper /upper
    mkdir /upper/changes /upper/work
    mount -t overlay -o lowerdir=/lower,upperdir=/upper/changes,workdir=/upper/work root /root
    mount -t tmpfs -o mode=755 run /root/run
}

mount_kernel_filesystems() {
    mount -t proc proc /root/proc
    mount -t sysfs sysfs /root/sys
    mount -t devtmpfs devtmpfs /root/dev
    mkdir -p /root/dev/pts /root/dev/shm
    mount -t devpts -o mode=620,ptmxmode=666 devpts /root/dev/pts
    mount -t tmpfs -o mode=1777 shm /root/dev/shm
    chmod 666 /root/dev/kvm /root/dev/net/tun # there is no udev to do it
    ln -s /proc/self/fd /root/dev/fd
    ln -s /proc/self/fd/0 /root/dev/stdin
    ln -s /proc/self/fd/1 /root/dev/stdout
    ln -s /proc/self/fd/2 /root/dev/stderr
}

# Not cached: what the command writes here must be on the host when the machine is cut off.
mount_shared_folder() {
    [ ! -s /shared-folder ] || mount_9p share "/root$(cat /shared-folder)" rw,cache=mmap
}

load_modules
build_root
mount_kernel_filesystems
mount_shared_folder
mkdir /root$HERE
cp -a /bin /finish.sh /command /root$HERE
exec switch_root /root $HERE/bin/sh $HERE/finish.sh
