# Reads facts and never changes anything. Put before the other scripts by the harness.
# Each section starts with a line of its own that holds a nonce nobody in the guest knows beforehand.
# A program costs 10 ms and more under emulation: what the shell can read by itself, it reads by itself.
say() { printf '\n@@%s %s\n' "$nonce" "$1"; }

show() { # FILE: its first line, if it can be read
    line=
    if [ -e "$1" ]; then IFS= read -r line < "$1"; fi
    printf '%s\n' "$line"
}

mode_facts() {
    say lsm; show /sys/kernel/security/lsm
    say enforce; show /sys/fs/selinux/enforce
    say profiles; if [ -e /sys/kernel/security/apparmor/profiles ]; then cat /sys/kernel/security/apparmor/profiles; fi
}

audit_facts() {
    say auditctl; auditctl -s 2>&1
    say log; stat -c '%d:%i %s' /var/log/audit/audit.log 2>&1
}

process_facts() { # UNIT
    say service
    service=$(systemctl show --property=ActiveState,SubState,MainPID,Result "$1")
    printf '%s\n' "$service"
    main=${service##*MainPID=}
    main=${main%%
*}
    say processes
    procs=/sys/fs/cgroup/system.slice/$1/cgroup.procs
    if [ -e "$procs" ]; then
        while read -r pid; do
            links=$(readlink "/proc/$pid/exe" "/proc/$pid/ns/user") || continue
            printf 'pid\t%s\n' "$pid"
            if [ "$pid" = "$main" ]; then printf 'main\t1\n'; fi
            printf 'exe\t%s\nuserns\t%s\n' "${links%
*}" "${links##*
}"
            label=
            IFS= read -r label 2>/dev/null < "/proc/$pid/attr/current"
            printf 'label\t%s\n' "$label"
            while IFS= read -r line; do
                case $line in
                    Name:*|PPid:*|Uid:*|Gid:*|Groups:*|Cap*|NoNewPrivs:*|Seccomp:*) printf 'status\t%s\n' "$line" ;;
                esac
            done < "/proc/$pid/status"
        done < "$procs"
    fi
    say rootns; readlink /proc/1/ns/user
}

object_facts() { # PATH
    say object
    real=$(realpath -e -- "$1" 2>&1) || { printf 'missing\t%s\n' "$real"; return; }
    printf 'real\t%s\nmount\t%s\n' "$real" "$(findmnt --nofsroot -n -o OPTIONS,SOURCE -T "$real")"
    part=$real
    set --
    while :; do
        set -- "$part" "$@"
        [ "$part" = / ] && break
        part=${part%/*}
        [ -n "$part" ] || part=/
    done
    if [ -e /sys/fs/selinux/enforce ]; then printf 'label\t%s\n' "$(stat -c %C -- "$real")"; fi
    stat --printf 'path\t%n\nstat\t%f %u %g %D %i %U %G\n' -- "$@"
    getfacl --skip-base --absolute-names --numeric -- "$@" 2>/dev/null |
        sed -n 's/^# file: /aclfile\t/p; s/^[a-z]*:.*/acl\t&/p'
}
