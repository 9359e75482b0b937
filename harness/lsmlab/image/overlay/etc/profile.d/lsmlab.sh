# The prompt says which experiment this shell is in.
if [ "$(id -u)" = 0 ] && [ -n "${BASH_VERSION:-}" ]; then
    PS1='\[\033[1m\]$(cat /run/lsmlab-arm 2>/dev/null || echo lsmlab)\[\033[0m\]:\w# '
fi
