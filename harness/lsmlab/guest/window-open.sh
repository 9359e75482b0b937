# Opens the window of the attempts to come: the facts before them, and the position in the audit log.
# Arguments: NONCE UNIT OBJECT
set -u
nonce=$1
process_facts "$2"
object_facts "$3"
mode_facts
audit_facts
say end
