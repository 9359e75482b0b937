# Closes an attempt's window: a sentinel through the audit queue, the log up to it, facts after it.
# Arguments: NONCE UNIT OFFSET SENTINEL WAIT_SECONDS MOST_BYTES
set -u
nonce=$1 unit=$2 offset=$3 sentinel=$4 wait=$5 most=$6
log=/var/log/audit/audit.log
say sentinel; auditctl -m "$sentinel" 2>&1 && echo sent
# tail wakes on the log's own change event and stops when grep has found the sentinel
timeout "$wait" sh -c 'tail -c "+$1" -f "$2" | grep -q -m 1 -F -- "$3"' wait "$((offset + 1))" "$log" "$sentinel" && echo seen
say window; tail -c "+$((offset + 1))" "$log" 2>&1 | head -c "$most"
mode_facts
process_facts "$unit"
audit_facts
say end
