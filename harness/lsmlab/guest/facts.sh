# Reads facts and never changes anything. Sourced into the other scripts by the harness.
# Each section starts with a line of its own that holds a nonce nobody in the guest knows beforehand.
say() { printf '\n@@%s %s\n' "$nonce" "$1"; }

mode_facts() {
    say lsm; cat /sys/kernel/security/lsm
    say enforce; if [ -e /sys/fs/selinux/enforce ]; then cat /sys/fs/selinux/enforce; fi
    say profiles; if [ -e /sys/kernel/security/apparmor/profiles ]; then cat /sys/kernel/security/apparmor/profiles; fi
}

audit_facts() {
    say auditctl; auditctl -s 2>&1
    say log; stat -c '%d:%i %s' /var/log/audit/audit.log 2>&1
}

process_facts() { # UNIT
    say processes
    main=$(systemctl show --property=MainPID --value "$1")
    for file in /sys/fs/cgroup/system.slice/"$1"/cgroup.procs; do
        [ -e "$file" ] || continue
        while read -r pid; do
            [ -d "/proc/$pid" ] || continue
            printf 'pid\t%s\n' "$pid"
            [ "$pid" = "$main" ] && printf 'main\t1\n'
            printf 'exe\t%s\n' "$(readlink "/proc/$pid/exe")"
            printf 'label\t%s\n' "$(tr -d '\0' < "/proc/$pid/attr/current" 2>/dev/null)"
            printf 'userns\t%s\n' "$(readlink "/proc/$pid/ns/user")"
            while read -r line; do
                case $line in
                    Name:*|PPid:*|Uid:*|Gid:*|Groups:*|CapEff:*|CapBnd:*|CapPrm:*|CapAmb:*|NoNewPrivs:*|Seccomp:*) printf 'status\t%s\n' "$line" ;;
                esac
            done < "/proc/$pid/status"
        done < "$file"
    done
    say rootns; readlink /proc/1/ns/user
    say service; systemctl show --property=ActiveState,SubState,MainPID,Result "$1"
}

object_facts() { # PATH
    say object
    real=$(realpath -e -- "$1" 2>&1) || { printf 'missing\t%s\n' "$real"; return; }
    printf 'real\t%s\n' "$real"
    printf 'label\t%s\n' "$(stat -c %C -- "$real" 2>/dev/null)"
    printf 'mount\t%s\n' "$(findmnt -n -o OPTIONS,SOURCE -T "$real")"
    part=$real
    set --
    while :; do
        set -- "$part" "$@"
        [ "$part" = / ] && break
        part=${part%/*}
        [ -n "$part" ] || part=/
    done
    for part in "$@"; do
        printf 'path\t%s\n' "$part"
        printf 'stat\t%s\n' "$(stat -c '%f %u %g %D %i %U %G' -- "$part")"
        getfacl --omit-header --absolute-names --numeric -- "$part" 2>/dev/null | while read -r line; do
            case $line in *:*) printf 'acl\t%s\n' "$line" ;; esac
        done
    done
}
