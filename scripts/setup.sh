#!/usr/bin/env bash
# Installs what lsmlab needs on this machine, and makes .venv.
# Safe to run again: a second run installs nothing, and needs no network.
#
#   --tests             also what tests alone use; where that cannot be installed, it is said, and set-up goes on
#
#   PYTHON              the Python that .venv is made from (default: python3)
#   LSMLAB_SETUP_ROOT   for the tests: where sbin and the keyring are looked for (default: the root of this machine)
#
# Progress goes to standard error. Exit 0: ready. Exit 1: not ready, and the last lines say what to do.
set -eu

ROOT=${LSMLAB_SETUP_ROOT:-}
PYTHON=${PYTHON:-python3}
KEYRING=$ROOT/usr/share/keyrings/debian-archive-keyring.gpg
STAMP=.venv/.stamp
WITHOUT=.venv/.without
TESTS=
case "$*" in
  '') ;;
  --tests) TESTS=yes ;;
  *)
    echo "usage: scripts/setup.sh [--tests]" >&2
    exit 1
    ;;
esac

# mke2fs and debugfs live in sbin, which is not on an ordinary user's PATH on Debian.
PATH=$PATH:$ROOT/usr/sbin:$ROOT/sbin

unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."
HERE=$(pwd -P)
LOG=
UPDATED=
trap 'if [ -n "$LOG" ]; then rm -f "$LOG"; fi' EXIT

say() { printf 'set-up: %s\n' "$*" >&2; }

stop() {
  say "$@"
  exit 1
}

# Runs a command without input. Its output is shown only when it fails.
quietly() {
  [ -n "$LOG" ] || LOG=$(mktemp)
  "$@" >"$LOG" 2>&1 </dev/null && return
  local status=$?
  say "failed with exit status $status: $*"
  tail -n 20 "$LOG" | sed 's/^/    /' >&2
  return 1
}

is_root() { [ "$(id -u)" = 0 ]; }

# Prints the state of .venv: "fresh"; "old", when pyproject.toml is newer; or "absent", which includes half made,
# broken by an upgrade of Python, and copied from another folder (its scripts would run that folder).
venv_state() {
  local probe='import importlib.util as u, sys; sys.exit(u.find_spec("lsmlab") is None)'
  if [ ! -f "$STAMP" ] || [ "$(cat "$STAMP")" != "$HERE" ] || ! .venv/bin/python -I -c "$probe" 2>/dev/null; then
    echo absent
  elif [ pyproject.toml -nt "$STAMP" ]; then
    echo old
  else
    echo fresh
  fi
}

require_python() {
  local version probe='import sys; print("%d.%d.%d" % sys.version_info[:3]); sys.exit(sys.version_info < (3, 11))'
  type -P "$PYTHON" >/dev/null || stop "no $PYTHON. Install Python 3.11 or later (or set PYTHON), and run this again."
  version=$("$PYTHON" -c "$probe") ||
    stop "$PYTHON is version ${version:-unknown}. Install Python 3.11 or later (or set PYTHON), and run this again."
}

# Debian's name: python3-venv for python3, python3.12-venv for python3.12.
venv_package() {
  case ${PYTHON##*/} in
    python3*) echo "${PYTHON##*/}-venv" ;;
    *) echo python3-venv ;;
  esac
}

# Prints one line for each thing that is missing: what, Debian's package, Fedora's package.
# gpg is for mmdebstrap, which finds with it the keyring that belongs to a mirror.
missing() {
  local command debian fedora
  while read -r command debian fedora; do
    type -P "$command" >/dev/null || echo "$command $debian $fedora"
  done <<'TABLE'
qemu-system-x86_64 qemu-system-x86 qemu-system-x86-core
qemu-img qemu-utils qemu-img
mmdebstrap mmdebstrap mmdebstrap
gpg gpg gnupg2
gpgv gpgv gnupg2
mount mount util-linux
mke2fs e2fsprogs e2fsprogs
debugfs e2fsprogs e2fsprogs
unshare util-linux util-linux
setpriv util-linux util-linux
TABLE
  # Root owns every uid already; others get a range of them from newuidmap.
  is_root || type -P newuidmap >/dev/null || echo "newuidmap uidmap shadow-utils"
  [ -f "$KEYRING" ] || echo "$KEYRING debian-archive-keyring debian-keyring"
  # Debian splits venv from Python. A finished .venv needs it no more.
  [ "$VENV" != absent ] || "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || echo "ensurepip $(venv_package) python3"
}

# Prints what tests alone use and this machine lacks, as `missing` does; nothing once it could not be installed.
# The package of Vagrant's libvirt provider brings Vagrant itself: a Vagrant that is there is left as it is.
missing_for_tests() {
  [ -n "$TESTS" ] || return 0
  local command debian fedora without
  without=" $(cat "$WITHOUT" 2>/dev/null | paste -sd' ') "
  while read -r command debian fedora; do
    type -P "$command" >/dev/null || [[ $without == *" $command "* ]] || echo "$command $debian $fedora"
  done <<'TABLE'
gpg-agent gpg-agent gnupg2
vagrant vagrant-libvirt vagrant-libvirt
skopeo skopeo skopeo
docker-registry docker-registry docker-distribution
TABLE
}

# Prints one column of the lines of `missing`, each name once, on one line.
column() { printf '%s\n' "$2" | cut -d' ' -f"$1" | sort -u | paste -sd' '; }

show_missing() {
  say "${2:-missing on this machine:}"
  local what package
  while read -r what package _; do
    printf '    %-52s package %s\n' "$what" "$package" >&2
  done <<<"$1"
}

# Stops, naming the packages, because this script cannot install them itself.
stop_for_packages() {
  say "$1 Install these packages, and run this again:"
  printf '    Debian, Ubuntu: %s\n' "$(column 2 "$2")" >&2
  printf '    Fedora:         %s\n' "$(column 3 "$2")" >&2
  exit 1
}

# Asks for the password here, when there is a terminal to ask at: the output of the commands that follow is kept back.
may_sudo() {
  type -P sudo >/dev/null || return 1
  sudo -n true 2>/dev/null && return
  [ -t 0 ] && [ -t 2 ] && sudo -v
}

# Sets APT to the command that changes this machine's packages. Returns 1, with the reason in WHY, where there is none.
find_apt() {
  # A machine that has just been started may be upgrading itself and hold the lock: wait for it.
  APT=(env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300)
  WHY="there is no apt-get here."
  type -P apt-get >/dev/null || return 1
  say "apt-get needs root to install these packages; nothing else here does"
  WHY="you are not root, and cannot become root with sudo."
  is_root && return
  may_sudo || return 1
  APT=(sudo "${APT[@]}")
}

# Once is enough.
update_lists() {
  [ -z "$UPDATED" ] || return 0
  quietly "${APT[@]}" update && UPDATED=yes
}

# Installs the packages of the lines of `missing`.
install() {
  local packages
  read -ra packages <<<"$(column 2 "$1")"
  say "installing: ${packages[*]}"
  quietly "${APT[@]}" install --yes --no-install-recommends "${packages[@]}"
}

install_packages() {
  find_apt || stop_for_packages "$WHY" "$1"
  update_lists || stop "apt-get could not read the package lists. Fix that, and run this again."
  install "$1" || stop "apt-get could not install the packages. Fix that, and run this again."
}

# Tests start a registry of their own, on a port of 127.0.0.1: the package's service, which listens to all, is not to run.
mask_registry() {
  [ -d "$ROOT/run/systemd/system" ] || return 0
  local become=()
  is_root || become=(sudo)
  quietly "${become[@]}" systemctl mask docker-registry.service
}

# Goes on in any case, with each of them. What could not be installed is not tried again in this .venv: the tests say
# what they lack.
install_for_tests() {
  local line without=
  show_missing "$1" "missing on this machine, and used by tests alone:"
  if find_apt && WHY="apt-get could not install that." && update_lists; then
    while read -r line; do
      { [[ $line != docker-registry* ]] || mask_registry; } && install "$line" || without+=$line$'\n'
    done <<<"$1"
  else
    without=$1
  fi
  [ -n "$without" ] || return 0
  say "$WHY Going on without: these tests are skipped."
  column 1 "${without%$'\n'}" >>"$WITHOUT"
}

# Makes .venv when absent, and installs lsmlab and its libraries into it. The stamp is put there last, so that a run cut
# short is done again from the start; its time is from before, so that a change of pyproject.toml meanwhile is not lost.
make_venv() {
  if [ "$VENV" = absent ]; then
    say "making .venv"
    quietly "$PYTHON" -m venv --clear .venv || stop "could not make .venv with $PYTHON."
  fi
  rm -f "$STAMP"
  echo "$HERE" >"$STAMP.part"
  say "installing lsmlab and its libraries into .venv (the first time takes a minute or two)"
  quietly .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input --editable '.[dev]' ||
    stop "pip could not install the libraries. Fix that, and run this again."
  # pip compiles what it copies into .venv, and lsmlab stays where it is: each command would take 0.15 s more to start
  # wherever PYTHONDONTWRITEBYTECODE is set
  .venv/bin/python -m compileall -q harness/lsmlab >/dev/null 2>&1 || true
  mv "$STAMP.part" "$STAMP"
}

VENV=$(venv_state)
[ "$VENV" != absent ] || require_python
MISSING=$(missing)
EXTRA=$(missing_for_tests)
if [ "$VENV" = fresh ] && [ -z "$MISSING$EXTRA" ]; then
  say "nothing to do"
  exit 0
fi
if [ -n "$MISSING" ]; then
  show_missing "$MISSING"
  install_packages "$MISSING"
  hash -r
  MISSING=$(missing)
  if [ -n "$MISSING" ]; then
    show_missing "$MISSING"
    stop_for_packages "apt-get succeeded, and yet these are missing." "$MISSING"
  fi
fi
[ "$VENV" = fresh ] || make_venv
[ -z "$EXTRA" ] || install_for_tests "$EXTRA"
say "ready"
