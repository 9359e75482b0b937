# Makes a distribution's cloud image a lab's disk: runs in a guest of it, as root, once, when its packages are there.
# What it reads lies in /run/lsmlab: the lists masked, disabled, enabled. What it leaves there is fetched: vmlinuz, initrd,
# cmdline, kernel, packages, and with SELinux shipped.cil.gz and audited.cil.gz. Argument: whether the lab has SELinux.
set -eu
umask 022
selinux=$1
cd /run/lsmlab

chmod 0640 /etc/audit/rules.d/audit.rules
sed -i 's/^log_format *=.*/log_format = RAW/' /etc/audit/auditd.conf # see prepare.sh
grep -q '^log_format = RAW$' /etc/audit/auditd.conf || { echo "auditd.conf has no log_format" >&2; exit 1; }
find /etc/audit/rules.d -name '*.rules' ! -name audit.rules -delete # such as one that has nothing audited
: > /usr/lib/lsmlab/vehicle # what the audit rule on commands run as a service watches
mkdir -p /etc/cloud
touch /etc/cloud/cloud-init.disabled # it has done its work
systemctl daemon-reload
while read -r unit; do systemctl enable --quiet "$unit"; done < enabled
systemctl enable --quiet audit-rules.service 2> /dev/null || true # where the rules have a unit of their own
while read -r unit; do systemctl disable --quiet "$unit" 2> /dev/null || true; done < disabled
while read -r unit; do ln -sfn /dev/null "/etc/systemd/system/$unit"; done < masked

if [ "$selinux" = yes ]; then
    type=$(sed -n 's/^SELINUXTYPE=//p' /etc/selinux/config)
    sed -i 's/^SELINUX=.*/SELINUX=enforcing/' /etc/selinux/config
    # The policy without dontaudit rules: the same decisions, and none of them silent. Both are dumped for the proof.
    newest() { ls -v /etc/selinux/"$type"/policy/policy.* | tail -n 1; }
    cp "$(newest)" policy.shipped
    semodule --disable_dontaudit --build --noreload
    cp "$(newest)" policy.audited
    for name in shipped audited; do
        checkpolicy -M -b -C -o $name.cil policy.$name > checkpolicy.log 2>&1 || { cat checkpolicy.log >&2; exit 1; }
        gzip -1 $name.cil
        rm policy.$name
    done
    contexts=/etc/selinux/$type/contexts/files/file_contexts
    # A file that nobody writes: in a kernel with SELinux those that are made get labels, whatever the others have; and
    # what has none reads as unlabeled_t there
    if python3 -I -c 'import os, sys; sys.exit(b":unlabeled_t:" in os.getxattr("/usr/bin/env", "security.selinux"))' \
        2> /dev/null; then
        restorecon -F -R /etc /usr/lib/lsmlab /var/www /root /home /boot
    else
        setfiles -F "$contexts" / # an image whose distribution has another framework by default
    fi
fi

release=$(uname -r)
printf '%s\n' "$release" > kernel
cat /proc/cmdline > cmdline
first() { for file; do if [ -s "$file" ]; then echo "$file"; return; fi; done; echo "no kernel of $release: $*" >&2; exit 1; }
cp "$(first "/boot/vmlinuz-$release" "/usr/lib/modules/$release/vmlinuz")" vmlinuz
cp "$(first "/boot/initrd.img-$release" "/boot/initramfs-$release.img" "/boot/initrd-$release")" initrd
if command -v dpkg-query > /dev/null; then
    dpkg-query --show --showformat '${Package}\t${Version}\n' > packages
else
    rpm --query --all --queryformat '%{NAME}\t%{VERSION}-%{RELEASE}\n' > packages
fi
sync
fstrim / 2> /dev/null || true # blocks that are free need not be kept; a file system that cannot say so keeps them
