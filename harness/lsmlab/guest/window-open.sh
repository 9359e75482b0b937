# Opens an attempt's window: facts before it, the position in the audit log, the canary planted.
# Arguments: NONCE UNIT OBJECT [CANARY_FILE CANARY_LINE]
set -u
nonce=$1 unit=$2 object=$3
mode_facts
process_facts "$unit"
if [ $# -ge 5 ]; then
    say canary
    if [ -f "$4" ] && printf '%s\n' "$5" >> "$4"; then echo planted; else echo "not planted: $4"; fi
fi
object_facts "$object"
audit_facts
say end
