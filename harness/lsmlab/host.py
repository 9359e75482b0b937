"""Programs of this machine: finding them, running them, and having them die with us."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import secrets
import shlex
import shutil
import signal
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lsmlab.errors import HostError

INSTALLERS = {"debian": "apt-get install", "fedora": "dnf install", "suse": "zypper install", "arch": "pacman -S"}
"""By the ID of a distribution, or of one that it is like: os-release(5)."""
PACKAGES = {
    "qemu-system-x86_64": ("qemu-system-x86", "qemu-system-x86-core", "qemu-x86", "qemu-system-x86"),
    "qemu-img": ("qemu-utils", "qemu-img", "qemu-img", "qemu-img"),
    "mmdebstrap": ("mmdebstrap", "mmdebstrap", "", ""),
    "mke2fs": ("e2fsprogs", "e2fsprogs", "e2fsprogs", "e2fsprogs"),
    "debugfs": ("e2fsprogs", "e2fsprogs", "e2fsprogs", "e2fsprogs"),
    "unshare": ("util-linux", "util-linux", "util-linux", "util-linux"),
    "setpriv": ("util-linux", "util-linux", "util-linux", "util-linux"),
    "newuidmap": ("uidmap", "shadow-utils", "shadow", "shadow"),
    "gpg": ("gpg", "gnupg2", "gpg2", "gnupg"),
    "gpgv": ("gpgv", "gnupg2", "gpg2", "gnupg"),
    "skopeo": ("skopeo", "skopeo", "skopeo", "skopeo"),
    "debian-archive-keyring": ("debian-archive-keyring", "debian-keyring", "", "debian-archive-keyring"),
}
"""The package that brings each program we use, and the keys of Debian's archive, in the order of INSTALLERS; empty
where the distribution has none."""

OTHER_SYSTEMS = {
    "Darwin": ("macOS", "Run it in a Linux virtual machine on this Mac"),
    "Windows": ("Windows", "Run it in WSL 2 (`wsl --install`), or in a Linux virtual machine"),
}
"""What platform.system() says, what people call it, and what to do there."""

PASSING_UIDS = range(61184, 65520)
"""Ids of users that no account has: systemd's for services that come and go (https://systemd.io/UIDS-GIDS/)."""


def find(program: str) -> str | None:
    """The path of `program`, looked for on PATH and in the system's own folders; None where it is not there."""
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def need_linux() -> None:
    """See that this is Linux, which everything needs but what only reads and writes files.

    Raises HostError that says what to do.
    """
    system = platform.system()
    if system == "Linux":
        return
    name, advice = OTHER_SYSTEMS.get(system, (system or "another system", "Run it in a Linux virtual machine"))
    raise HostError(f"lsmlab runs on Linux; this is {name}", hint=f"{advice}. README, Hosts, says more.")


@dataclass(frozen=True, slots=True)
class System:
    """What a report says of this machine."""

    name: str
    """The distribution as it calls itself, or the system."""
    kernel: str
    processor: str


def system() -> System:
    """What this machine is, Linux or not."""
    name = os_release().get("PRETTY_NAME") or platform.system()
    return System(name, f"{platform.system()} {platform.release()}", platform.machine())


def os_release() -> dict[str, str]:
    """What /etc/os-release says; empty where there is none."""
    if platform.system() != "Linux":
        return {}
    try:
        return platform.freedesktop_os_release()
    except OSError:
        return {}


def to_install(*programs: str) -> str:
    """What to do to have `programs`: this distribution's command, or their names where no package of it is known."""
    said = os_release()
    ids = [said.get("ID", ""), *said.get("ID_LIKE", "").split()]
    # Red Hat's own and those built from it say that they are like Fedora, and have no qemu-system-x86_64
    family = "" if "rhel" in ids else next((name for name in ids if name in INSTALLERS), "")
    packages = {dict(zip(INSTALLERS, PACKAGES.get(p, ()), strict=False)).get(family, "") for p in programs}
    if "" in packages:
        return f"Install {', '.join(programs)} by this system's own means"
    return f"{INSTALLERS[family]} {' '.join(sorted(packages))}"


def need(program: str) -> str:
    """The path of `program`. Raises HostError that says what to install, or that this is no Linux."""
    need_linux()
    found = find(program)
    if found is None:
        raise HostError(
            f"{program} is not installed on this machine",
            hint=f"{to_install(program)}. `lsmlab doctor` shows all that is missing.",
        )
    return found


def environment() -> dict[str, str]:
    """A copy of our environment, for each program that is started.

    Ours may be changed by another thread while a program starts, as pytest's is at each test: execve(2), given the
    memory that it lay in, then fails with EFAULT.
    """
    return dict(os.environ)


def is_x86() -> bool:
    """Whether this machine's processor is of the guests' kind."""
    return platform.machine() in {"x86_64", "AMD64"}


def need_x86(what: str, *, hint: str = "Do it on such a machine.") -> None:
    """See that this machine can execute the programs of images. Raises HostError; `what` is not possible then."""
    if not is_x86():
        raise HostError(
            f"{what} takes an x86-64 machine, whose programs are executed; this one is {platform.machine()}", hint=hint
        )


def need_x86_to_make(lab: str) -> None:
    """See that the image of `lab` can be made on this processor. Raises HostError."""
    need_x86("making an image", hint=made_elsewhere(lab))


def made_elsewhere(lab: str) -> str:
    """What to do where the image of `lab` cannot be made."""
    return f"An image made elsewhere will do: `lsmlab images export {lab}` there, `lsmlab images import FILE` here."


def on_wsl() -> bool:
    """Whether this Linux runs in Windows."""
    return "microsoft" in platform.release().lower()


_versions: dict[tuple[object, ...], str] = {}
"""What programs have said of their version: of each file, as it was written then, it is asked once."""


def version(program: str, *arguments: str) -> str:
    """The first line that `program` prints of its own version, or `missing`. Never raises."""
    found = find(program)
    if found is None:
        return "missing"
    try:
        written = Path(found).stat().st_mtime_ns
    except OSError as error:
        return f"does not run: {error}"
    asked = (found, written, *arguments)
    if asked in _versions:
        return _versions[asked]
    try:
        done = subprocess.run(
            [found, *arguments], env=environment(), capture_output=True, text=True, errors="replace", timeout=20,
            check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not run: {error}"
    line = (done.stdout or done.stderr).strip().partition("\n")[0]
    if done.returncode == 0:
        _versions[asked] = line
    return line


_running: set[subprocess.Popen[bytes]] = set()
_stopping = threading.Event()


def stop_all() -> None:
    """Kill every program that `run` started and still waits for, and have it start no other, until `go_on`: for Ctrl-C.

    Never raises.
    """
    _stopping.set()
    for process in list(_running):
        _kill(process)


def go_on() -> None:
    """Have programs be started again, once all that was to be stopped has ended."""
    _stopping.clear()


def check_going_on(what: str) -> None:
    """Raise HostError, which says that `what` was interrupted, from `stop_all` on."""
    if _stopping.is_set():
        raise HostError(f"{what}: interrupted")


def dying_with_us(argv: Sequence[str], *, rights: Sequence[str] = ()) -> list[str]:
    """`argv`, killed by the kernel when the thread that starts it ends (setpriv --pdeathsig, prctl(2)).

    `rights` are more options of setpriv, such as those of `no_rights`. The signal is asked for behind a change of user.
    """
    # We may die before setpriv has asked for the signal: then the shell finds another parent, and starts nothing
    guard = 'if [ "$PPID" = "$0" ]; then exec "$@"; fi'
    return [need("setpriv"), *rights, "--pdeathsig", "KILL", "--", "sh", "-c", guard, str(os.getpid()), *argv]


def no_rights(program: str, device: Path | None = None) -> list[str]:
    """setpriv's options that have root start `program` as a user of its own: no account, no capabilities, and no group
    but the one that may open `device`.

    Empty, so that `program` runs as we do, for an ordinary user; and for a root that may become no other user, as in
    some containers, or where other users may not run `program` or open `device`.
    """
    if os.geteuid() != 0:
        return []
    groups = ["--clear-groups"]
    if device is not None and (gid := device.stat().st_gid) != 0:
        groups = ["--groups", str(gid)]
    options = ["--no-new-privs", *groups]
    if not _suffice(program, device, *options):
        return []
    uid = str(PASSING_UIDS[secrets.randbelow(len(PASSING_UIDS))])
    return ["--reuid", uid, "--regid", uid, *options]


@functools.cache
def _suffice(program: str, device: Path | None, *options: str) -> bool:
    uid = str(PASSING_UIDS[0])
    asked = ["-x", program, *(("-a", "-r", str(device), "-a", "-w", str(device)) if device else ())]
    argv = [need("setpriv"), "--reuid", uid, "--regid", uid, *options, "--", "test", *asked]
    return subprocess.run(argv, env=environment(), capture_output=True, check=False).returncode == 0


def in_namespace(argv: Sequence[str]) -> list[str]:
    """`argv` in PID and mount namespaces of its own that die with us: no process and no mount is left behind."""
    inner = [need("unshare"), "--pid", "--mount", "--fork", "--kill-child=KILL", "--mount-proc", *argv]
    if os.geteuid() != 0:
        inner[1:1] = ["--user", "--map-auto", "--map-root-user"]
    return dying_with_us(inner)


def need_namespaces() -> None:
    """See that `in_namespace` works here. Raises HostError that says what to do."""
    try:
        run(in_namespace(["true"]), what="making namespaces", timeout=10)
    except HostError as error:
        hint = "In a container or chroot, or where unprivileged user namespaces are off, build as root, or elsewhere."
        if os.geteuid() != 0:
            hint = f"See that /etc/subuid and /etc/subgid have a line for you. {hint}"
        raise HostError(error.message, hint=hint) from error


def run(argv: Sequence[str], *, what: str, stdin: bytes = b"", timeout: float = 600, cleaning: bool = False) -> bytes:
    """Run a program of this machine; its standard output. `timeout` in seconds.

    Raises HostError with `what`, the command and its last words. The program and its children end with us, and when
    the wait is interrupted. `cleaning`: it is what has to be done after an interruption as well.
    """
    if not cleaning:
        check_going_on(what)
    process = subprocess.Popen(
        list(argv),
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    _running.add(process)
    try:
        if not cleaning:
            check_going_on(what)  # it may have been asked between the first look and now
        out, err = process.communicate(stdin, timeout=timeout)
    except subprocess.TimeoutExpired:
        _kill(process)
        raise HostError(f"{what}: not done after {timeout:.0f} s: {_shown(argv)}") from None
    except BaseException:
        _kill(process)
        raise
    finally:
        _running.discard(process)
    if process.returncode:
        words = "\n".join((err or out).decode("utf-8", "replace").strip().splitlines()[-15:])
        raise HostError(f"{what} failed ({process.returncode}): {_shown(argv)}\n{words}")
    return out


def _shown(argv: Sequence[str]) -> str:
    """`argv` in one line, cut short: what the program itself said stands in the lines below."""
    return " ".join(shlex.join(argv).split())[:300]


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
