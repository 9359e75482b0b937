# Runs a command as the service: its uid, groups, capabilities, and its domain or profile by the automatic transition.
# The command's program is copied, given the label of the service's program and mounted over it in a private mount
# namespace: to the kernel it is the service's program, so what is measured is what the service may do.
# Arguments: AUID UID GID GROUPS CAPS NO_NEW_PRIVS SERVICE_EXE COMMAND [ARGUMENT...]
set -u
give_up() { echo "lsmlab: $1" >&2; exit 97; }
auid=$1 uid=$2 gid=$3 groups=$4 caps=$5 nnp=$6 exe=$7
shift 7
program=$(command -v -- "$1") || give_up "$1: no such program in the guest"
case $program in /*) ;; *) give_up "$1 is built into the shell, not a program" ;; esac
name=$1
shift
own=/usr/lib/lsmlab
mkdir -p "$own" && cp -L -- "$program" "$own/vehicle" && cp -L /bin/mount "$own/mount" && chmod 0755 "$own"/* ||
    give_up "the command's program cannot be copied in the guest"
if [ -e /sys/fs/selinux/enforce ]; then
    # mount(8) as shipped would enter mount_t, which may not mount over a service's program; this copy stays where it is
    chcon --reference="$exe" "$own/vehicle" && chcon -t bin_t "$own/mount" || give_up "its label cannot be set"
fi
# -A: before the rules on refused calls, so that a refused exec bears this key too
auditctl -A always,exit -F arch=b64 -F path="$own/vehicle" -F perm=x -F key=lsmlab-subject > /dev/null ||
    give_up "its exec cannot be watched"
[ "$nnp" = 1 ] && nnp=--no-new-privs || nnp=
[ "$groups" = - ] && groups=--clear-groups || groups=--groups=$groups
echo "$auid" > /proc/self/loginuid || give_up "the audit user id cannot be set"
export own exe name uid gid groups caps nnp
exec unshare --mount --propagation private sh -uc '
    "$own/mount" --bind "$own/vehicle" "$exe" || { echo "lsmlab: $exe cannot be mounted over" >&2; exit 97; }
    exec setpriv --reuid="$uid" --regid="$gid" $groups --inh-caps=-all --ambient-caps=-all --bounding-set="$caps" $nnp -- \
        bash -c '\''exec -a "$0" "$@"'\'' "$name" "$exe" "$@"' run-as "$@"
