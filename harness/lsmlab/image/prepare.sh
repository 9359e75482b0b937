# Turns a root tree from mmdebstrap into a lab's disk. Runs on the host, in namespaces of its own, as root there.
# Nothing outside WORK is written. Arguments: WORK OVERLAY DISK_MIB PYTHON
set -eu
umask 022 # the image's files must not take their modes from whoever builds it
work=$1 overlay=$2 disk_mib=$3 python=$4
PATH=$PATH:/usr/sbin:/sbin
cd "$work"
mkdir tree
tar -C tree --exclude='./dev/*' -xf tree.tar
rm tree.tar

cp -R "$overlay" overlay
chmod -R u=rwX,go=rX overlay
cp -R --no-preserve=ownership overlay/. tree/
chmod 0640 tree/etc/audit/rules.d/audit.rules
# Records as the kernel gives them: to add what their numbers mean takes auditd longer than to write them
sed -i 's/^log_format *=.*/log_format = RAW/' tree/etc/audit/auditd.conf
grep -q '^log_format = RAW$' tree/etc/audit/auditd.conf || { echo "auditd.conf has no log_format" >&2; exit 1; }
printf '%s\n' "$(head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n')" > tree/etc/machine-id
mkdir -p tree/etc/systemd/system/multi-user.target.wants
ln -s ../lsmlab-agent.service tree/etc/systemd/system/multi-user.target.wants/
: > tree/usr/lib/lsmlab/vehicle # what the audit rule on commands run as a service watches
while read -r unit; do ln -sf /dev/null "tree/etc/systemd/system/$unit"; done < masked_units
while read -r unit; do
    find tree/etc/systemd/system tree/usr/lib/systemd/system -type l -path "*.wants/$unit" -delete
done < disabled_units
rm -f tree/etc/resolv.conf tree/etc/update-motd.d/*

if [ -d tree/var/lib/nginx ]; then # what its first start makes anywhere: a policy need not allow that a second time
    for name in body fastcgi proxy scgi uwsgi; do
        chroot tree install -d -m 0700 -o www-data "/var/lib/nginx/$name"
    done
fi

mv tree/boot/vmlinuz-* vmlinuz
mv tree/boot/initrd.img-* initrd
ls tree/usr/lib/modules > kernel
chroot tree dpkg-query --show --showformat '${Package}\t${Version}\n' > packages

: > tree/dev/null # a plain file: device nodes need privileges that an ordinary user has not, and the guest makes its own
if [ -d elsewhere/apparmor ]; then # of its folders each takes the place of the distribution's, of the profiles all
    find tree/etc/apparmor.d -mindepth 1 -maxdepth 1 ! -type d -delete
    rm -rf tree/etc/apparmor.d/disable tree/etc/apparmor.d/force-complain
    (cd elsewhere/apparmor && find . -mindepth 1 -maxdepth 1 -type d) |
        while read -r name; do rm -rf "tree/etc/apparmor.d/$name"; done
    chmod -R u=rwX,go=rX elsewhere/apparmor
    cp -R --no-preserve=ownership elsewhere/apparmor/. tree/etc/apparmor.d/
fi
if [ -d elsewhere/selinux ]; then # the distribution's modules go with its policy
    rm -rf tree/etc/selinux/default tree/var/lib/selinux/default
    chmod -R u=rwX,go=rX elsewhere/selinux
    cp -R --no-preserve=ownership elsewhere/selinux tree/etc/selinux/default
    contexts=etc/selinux/default/contexts/files
    find tree/$contexts -name '*.bin' -delete # of another libselinux
    # What systemd 254 and later start services by: to a policy that is older, a program like any, with a domain of its own
    if ! grep -q systemd-executor tree/$contexts/file_contexts; then
        printf '(/usr)?/lib/systemd/systemd-executor\t--\t%s\n' "$(chroot tree matchpathcon -n /usr/lib/systemd/systemd)" \
            >> tree/$contexts/file_contexts
    fi
    for name in file_contexts file_contexts.homedirs file_contexts.local; do
        [ ! -f "tree/$contexts/$name" ] || chroot tree sefcontext_compile "/$contexts/$name"
    done
fi
if [ -d tree/etc/selinux/default ]; then
    sed -i 's/^SELINUX=.*/SELINUX=enforcing/' tree/etc/selinux/config
    # The policy without dontaudit rules: the same decisions, and none of them silent. Both are dumped for the proof.
    policy=$(cd tree && ls -v etc/selinux/default/policy/policy.* | tail -n 1)
    mkdir -p tree/usr/lib/lsmlab
    cp "tree/$policy" tree/usr/lib/lsmlab/policy.shipped
    dump() {
        chroot tree checkpolicy -M -b -C -o "/usr/lib/lsmlab/$1.cil" "/usr/lib/lsmlab/policy.$1" > checkpolicy.log 2>&1 ||
            { cat checkpolicy.log >&2; exit 1; }
        mv "tree/usr/lib/lsmlab/$1.cil" .
    }
    dump shipped
    if [ -d elsewhere/selinux ]; then # there are no modules to build it from: it is compiled again from its own dump
        "$python" -P -c 'import sys; from lsmlab.image import policy; sys.stdout.write(policy.decisions(sys.stdin.read()))' \
            < shipped.cil > policy.cil
        cp policy.cil tree/
        chroot tree secilc --policyvers "${policy##*.}" --output "/$policy" --filecontext /dev/null \
            /policy.cil > secilc.log 2>&1 || { cat secilc.log >&2; exit 1; }
        rm tree/policy.cil
    else
        chroot tree semodule --disable_dontaudit --build --noreload 2> semodule.log || { cat semodule.log >&2; exit 1; }
    fi
    cp "tree/$policy" tree/usr/lib/lsmlab/policy.audited
    dump audited
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
[ ! -f policy.cil ] || cp policy.cil tree/usr/lib/lsmlab/ # what modules are compiled with
# The root tree, less what no policy tool needs, to compile policies in with the distribution's own tools
tar -C tree --exclude=./usr/lib/modules --exclude=./boot --exclude=./usr/share/perl --exclude=./var/cache \
    --exclude='libLLVM*' --exclude=./usr/lib/postgresql -cf policy-tree.tar .
rm -rf tree
