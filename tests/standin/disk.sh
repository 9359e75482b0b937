# Makes a root tree into a disk as distributions make their cloud images: partitions, a boot loader of its own, no agent
# of ours, root locked. Runs on the host, in namespaces of its own, as root there; nothing outside WORK is written.
# Arguments: WORK SHAPE (ext4, or btrfs with subvolumes and BLS entries) DISK_MIB FRAMEWORK
set -eu
umask 022
work=$1 shape=$2 disk_mib=$3 framework=$4
PATH=$PATH:/usr/sbin:/sbin
cd "$work"
mkdir top
case $shape in
    ext4) tree=top boot=/boot flags= ;;
    btrfs) tree=top/root boot=/root/boot flags="rootflags=subvol=root"; mkdir top/root top/home ;;
esac
tar -C $tree --exclude='./dev/*' -xf tree.tar
: > $tree/dev/null
printf 'uninitialized\n' > $tree/etc/machine-id
printf 'nameserver 10.0.2.3\n' > $tree/etc/resolv.conf
rm -f $tree/etc/ssh/ssh_host_*
sed -i 's/^root:[^:]*/root:!*/' $tree/etc/shadow
ln -s /lib/systemd/system/systemd-networkd.service $tree/etc/systemd/system/multi-user.target.wants/
if [ "$framework" = selinux ]; then sed -i 's/^SELINUX=.*/SELINUX=permissive/' $tree/etc/selinux/config; fi

release=$(ls $tree/usr/lib/modules)
uuid=$(cat /proc/sys/kernel/random/uuid)
arguments="root=UUID=$uuid ro $flags console=ttyS0 security=$framework"
printf 'UUID=%s / %s %s 0 1\n' "$uuid" "$shape" "${flags#rootflags=}${flags:+,}defaults" > $tree/etc/fstab
mkdir -p $tree/boot/grub/i386-pc $tree/boot/loader/entries
cp $tree/usr/lib/grub/i386-pc/*.mod $tree/boot/grub/i386-pc/
printf 'title Linux\nversion %s\nlinux /boot/vmlinuz-%s\ninitrd /boot/initrd.img-%s\noptions %s\n' \
    "$release" "$release" "$release" "$arguments" > "$tree/boot/loader/entries/linux-$release.conf"
# Debian's GRUB reads no BLS entries, such as the one above: its menu says the same
cat > $tree/boot/grub/grub.cfg << GRUB
set timeout=0
menuentry Linux {
    linux $boot/vmlinuz-$release $arguments
    initrd $boot/initrd.img-$release
}
GRUB

# The tree's own tools: this machine need not have them
mkdir $tree/mnt/here
mount --bind . $tree/mnt/here
mount --bind /proc $tree/proc
chroot $tree grub-mkimage -O i386-pc -o /mnt/here/core.img -p "(hd0,gpt2)$boot/grub" \
    biosdisk part_gpt ext2 btrfs normal linux configfile
cp $tree/usr/lib/grub/i386-pc/boot.img .
truncate -s "${disk_mib}M" disk.raw
printf '%s\n' 'label: gpt' 'start=2048,size=2048,type=21686148-6449-6E6F-744E-656564454649' 'start=4096,type=L' |
    chroot $tree sfdisk -q /mnt/here/disk.raw
size=$((disk_mib - 3))
if [ "$shape" = btrfs ]; then
    mkdir tools
    tar -C tools --exclude='./dev/*' -xf tree.tar
fi
umount $tree/proc $tree/mnt/here
rmdir $tree/mnt/here
rm $tree/dev/null
if [ "$shape" = ext4 ]; then
    mke2fs -q -t ext4 -U "$uuid" -d top fs.raw "${size}M"
else
    truncate -s "${size}M" fs.raw
    mkdir tools/mnt/here
    mount --bind . tools/mnt/here
    mount --bind /proc tools/proc
    chroot tools mkfs.btrfs -q -U "$uuid" --rootdir /mnt/here/top --subvol rw:root --subvol rw:home /mnt/here/fs.raw
    umount tools/proc tools/mnt/here
    rm -rf tools
fi
rm -rf top
