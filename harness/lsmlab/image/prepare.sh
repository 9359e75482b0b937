# Turns a root tree from mmdebstrap into a lab's disk. Runs on the host, in namespaces of its own, as root there.
# Nothing outside WORK is written. Arguments: WORK OVERLAY DISK_MIB
set -eu
umask 022 # the image's files must not take their modes from whoever builds it
work=$1 overlay=$2 disk_mib=$3
PATH=$PATH:/usr/sbin:/sbin
cd "$work"
mkdir tree
tar -C tree --exclude='./dev/*' -xf tree.tar
rm tree.tar

cp -R "$overlay" overlay
chmod -R u=rwX,go=rX overlay
cp -R --no-preserve=ownership overlay/. tree/
chmod 0640 tree/etc/audit/rules.d/audit.rules
printf '%s\n' "$(head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n')" > tree/etc/machine-id
mkdir -p tree/etc/systemd/system/multi-user.target.wants
ln -s ../lsmlab-agent.service tree/etc/systemd/system/multi-user.target.wants/
: > tree/usr/lib/lsmlab/vehicle # what the audit rule on commands run as a service watches
while read -r unit; do ln -sf /dev/null "tree/etc/systemd/system/$unit"; done < masked_units
while read -r unit; do find tree/etc/systemd/system -type l -path "*.wants/$unit" -delete; done < disabled_units
rm -f tree/etc/resolv.conf tree/etc/update-motd.d/*

mv tree/boot/vmlinuz-* vmlinuz
mv tree/boot/initrd.img-* initrd
ls tree/usr/lib/modules > kernel
chroot tree dpkg-query --show --showformat '${Package}\t${Version}\n' > packages

: > tree/dev/null # a plain file: device nodes need privileges that an ordinary user has not, and the guest makes its own
if [ -d tree/etc/selinux/default ]; then
    sed -i 's/^SELINUX=.*/SELINUX=enforcing/' tree/etc/selinux/config
    # The policy without dontaudit rules: the same decisions, and none of them silent. Both are dumped for the proof.
    policy=$(cd tree && ls -v etc/selinux/default/policy/policy.* | tail -n 1)
    mkdir -p tree/usr/lib/lsmlab
    cp "tree/$policy" tree/usr/lib/lsmlab/policy.shipped
    chroot tree semodule --disable_dontaudit --build --noreload 2> semodule.log || { cat semodule.log >&2; exit 1; }
    cp "tree/$policy" tree/usr/lib/lsmlab/policy.audited
    for name in shipped audited; do
        chroot tree checkpolicy -M -b -C -o /usr/lib/lsmlab/$name.cil /usr/lib/lsmlab/policy.$name > checkpolicy.log 2>&1 ||
            { cat checkpolicy.log >&2; exit 1; }
        mv tree/usr/lib/lsmlab/$name.cil .
    done
    rm tree/usr/lib/lsmlab/policy.audited
    # Labels by the image's own file_contexts; they are written into the finished disk, which needs no privilege.
    printf 'ea_set / security.selinux %s\n' "$(chroot tree matchpathcon -n /)" > labels
    (cd tree && find . -mindepth 1 -xdev -path ./dev/null -o -printf '/%P\n') > paths
    tr '\n' '\0' < paths | chroot tree xargs -0 matchpathcon > contexts
    [ "$(wc -l < paths)" = "$(wc -l < contexts)" ] || { echo "not every file of the image was given a label" >&2; exit 1; }
    awk -F "\t" '$2 != "<<none>>" { printf "ea_set \"%s\" security.selinux %s\n", $1, $2 }' contexts >> labels
fi

rm tree/dev/null
mke2fs -q -t ext4 -O ^has_journal -L root -d tree disk.raw "${disk_mib}M"
if [ -s labels ]; then
    debugfs -w -f labels disk.raw > debugfs.log 2>&1
    if grep -v '^debugfs' debugfs.log | grep -q .; then grep -v '^debugfs' debugfs.log | head -n 5 >&2; exit 1; fi
fi
# The root tree, less what no policy tool needs, to compile policies in with the distribution's own tools
tar -C tree --exclude=./usr/lib/modules --exclude=./boot --exclude=./usr/share/perl --exclude=./var/cache \
    --exclude='libLLVM*' --exclude=./usr/lib/postgresql -cf policy-tree.tar .
rm -rf tree
