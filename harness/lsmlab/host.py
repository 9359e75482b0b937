"""Programs of this machine: finding them, running them, and having them die with us."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Sequence

from lsmlab.errors import HostError

PACKAGES = {
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-img": "qemu-utils",
    "mmdebstrap": "mmdebstrap",
    "mke2fs": "e2fsprogs",
    "debugfs": "e2fsprogs",
    "unshare": "util-linux",
    "setpriv": "util-linux",
    "newuidmap": "uidmap",
    "gpg": "gpg",
}
"""The Debian package that brings each program we use."""


def find(program: str) -> str | None:
    """The path of `program`, looked for on PATH and in the system's own folders; None where it is not there."""
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def need(program: str) -> str:
    """The path of `program`. Raises HostError that says what to install."""
    found = find(program)
    if found is None:
        package = PACKAGES.get(program, program)
        raise HostError(
            f"{program} is not installed on this machine",
            hint=f"Run `make setup`, or: apt-get install {package}. `lsmlab doctor` shows all that is missing.",
        )
    return found


def version(program: str, *arguments: str) -> str:
    """The first line that `program` prints of its own version, or `missing`. Never raises."""
    found = find(program)
    if found is None:
        return "missing"
    try:
        done = subprocess.run(
            [found, *arguments], capture_output=True, text=True, errors="replace", timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not run: {error}"
    return (done.stdout or done.stderr).strip().partition("\n")[0]


_running: set[subprocess.Popen[bytes]] = set()


def stop_all() -> None:
    """Kill every program that `run` started and still waits for: for Ctrl-C. Never raises."""
    for process in list(_running):
        _kill(process)


def dying_with_us(argv: Sequence[str]) -> list[str]:
    """`argv`, killed by the kernel when the thread that starts it ends (setpriv --pdeathsig, prctl(2))."""
    # We may die before setpriv has asked for the signal: then the shell finds another parent, and starts nothing
    guard = 'if [ "$PPID" = "$0" ]; then exec "$@"; fi'
    return [need("setpriv"), "--pdeathsig", "KILL", "--", "sh", "-c", guard, str(os.getpid()), *argv]


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


def run(argv: Sequence[str], *, what: str, stdin: bytes = b"", timeout: float = 600) -> bytes:
    """Run a program of this machine; its standard output. `timeout` in seconds.

    Raises HostError with `what`, the command and its last words. The program and its children end with us, and when
    the wait is interrupted.
    """
    process = subprocess.Popen(
        list(argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    _running.add(process)
    try:
        out, err = process.communicate(stdin, timeout=timeout)
    except subprocess.TimeoutExpired:
        _kill(process)
        raise HostError(f"{what}: not done after {timeout:.0f} s: {shlex.join(argv)[:300]}") from None
    except BaseException:
        _kill(process)
        raise
    finally:
        _running.discard(process)
    if process.returncode:
        words = "\n".join((err or out).decode("utf-8", "replace").strip().splitlines()[-15:])
        raise HostError(f"{what} failed ({process.returncode}): {shlex.join(argv)[:300]}\n{words}")
    return out


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
