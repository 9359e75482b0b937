# Runs a command as the service: its uid, groups, capabilities, and its domain or profile by the automatic transition.
# The command's program is copied, given the label of the service's program and mounted over it in a private mount
# namespace: to the kernel it is the service's program, so what is measured is what the service may do.
# Arguments: AUID UID GID GROUPS CAPS NO_NEW_PRIVS SERVICE_EXE COMMAND [ARGUMENT...]
set -eu
auid=$1 uid=$2 gid=$3 groups=$4 caps=$5 nnp=$6 exe=$7
shift 7
program=$(command -v -- "$1") || { echo "lsmlab: $1: no such program in the guest" >&2; exit 97; }
case $program in /*) ;; *) echo "lsmlab: $1 is built into the shell, not a program" >&2; exit 97 ;; esac
name=$1
shift
mkdir -p /usr/lib/lsmlab
cp -L -- "$program" /usr/lib/lsmlab/vehicle
chmod 0755 /usr/lib/lsmlab/vehicle
if [ -e /sys/fs/selinux/enforce ]; then chcon --reference="$exe" /usr/lib/lsmlab/vehicle; fi
auditctl -a always,exit -F arch=b64 -F path=/usr/lib/lsmlab/vehicle -F perm=x -F key=lsmlab-subject >/dev/null
[ "$nnp" = 1 ] && nnp=--no-new-privs || nnp=
[ "$groups" = - ] && groups=--clear-groups || groups=--groups=$groups
[ -e /proc/self/loginuid ] && echo "$auid" > /proc/self/loginuid
export exe name uid gid groups caps nnp
exec unshare --mount --propagation private sh -euc '
    mount --bind /usr/lib/lsmlab/vehicle "$exe"
    exec setpriv --reuid="$uid" --regid="$gid" $groups --inh-caps=-all --ambient-caps=-all --bounding-set="$caps" $nnp -- \
        bash -c '\''exec -a "$0" "$@"'\'' "$name" "$exe" "$@"' run-as "$@"
