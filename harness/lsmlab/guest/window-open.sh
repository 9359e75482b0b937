# Opens the window of the attempts to come: the facts before them, and the position in the audit log.
# Arguments: NONCE UNIT OBJECT SENTINEL WAIT_SECONDS
set -u
nonce=$1 unit=$2 object=$3 sentinel=$4 wait=$5
log=/var/log/audit/audit.log

ids() { # the pids, users and domains of the service's processes
    while read -r pid; do
        while IFS= read -r line; do
            case $line in Pid:*|Uid:*|Groups:*) printf '%s\n' "$line" ;; esac
        done < "/proc/$pid/status"
        IFS= read -r line < "/proc/$pid/attr/current"
        printf '%s\n' "$line"
    done < "/sys/fs/cgroup/system.slice/$unit/cgroup.procs" 2>/dev/null
}

# A service that has just started still forks its workers and gives up root: wait until that has come to rest
before= same=0 tries=0
while [ "$same" -lt 3 ] && [ "$tries" -lt 60 ]; do
    now=$(ids)
    if [ "$now" = "$before" ]; then same=$((same + 1)); else same=0; fi
    before=$now tries=$((tries + 1))
    [ "$same" -ge 3 ] || sleep 0.1
done
say rest; [ "$same" -ge 3 ] && echo steady
process_facts "$unit"
object_facts "$object"
mode_facts
# Records of what came before may still be in the queue: the window begins behind a sentinel that has come through it
size=$(stat -c %s "$log" 2>/dev/null || echo 0)
auditctl -m "$sentinel" > /dev/null 2>&1
say drained
timeout "$wait" sh -c 'tail -c "+$1" -f "$2" | grep -q -m 1 -F -- "$3"' wait "$((size + 1))" "$log" "$sentinel" && echo seen
audit_facts
say end
