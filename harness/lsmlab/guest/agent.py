"""lsmlab's agent in a guest: does what the harness asks and reads facts, in one process that is there already.

Under emulation a program costs 50 ms and more to start, so everything between a restored snapshot and the evidence is
done in here: canary, request, sentinel, log, facts, one question and one answer. It needs nothing but Python's own
library (3.9 or later), knows nothing of scenarios or verdicts, and never judges.

Protocol: JSON lines over one byte stream. A question is `{"id": ..., "do": OPERATION, ...}`, its answer
`{"id": ..., "answer": ...}` or `{"id": ..., "error": TEXT}`. No question waits for what another one does. Bytes are
base64.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import errno
import fcntl
import grp
import json
import os
import pwd
import queue
import select
import shutil
import signal
import socket
import stat
import struct
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

LOG = "/var/log/audit/audit.log"
CGROUPS = "/sys/fs/cgroup/system.slice"
PROFILES = "/sys/kernel/security/apparmor/profiles"
FEATURES = "/sys/kernel/security/apparmor/features"
APPARMOR_MODE = "/sys/module/apparmor/parameters/mode"
LSM = "/sys/kernel/security/lsm"
ENFORCE = "/sys/fs/selinux/enforce"
USERS, GROUPS, SHADOWED_GROUPS = "/etc/passwd", "/etc/group", "/etc/gshadow"
ACCOUNTS_LOCK = "/etc/.pwd.lock"
NAME_CACHES = (
    ("/run/nscd/socket", ["nscd", "--invalidate=group"]),
    ("/var/lib/sss/pipes/nss", ["sss_cache", "--groups"]),
)
"""What is there where a service runs that knows of groups what it has read before, and how it is told to forget."""
ACCESS, PROCESS_CLASS = "/sys/fs/selinux/access", "/sys/fs/selinux/class/process/index"
SYSTEMD = "/run/systemd/private"
MANAGER, MANAGES = "/org/freedesktop/systemd1", "org.freedesktop.systemd1"
SYSTEMD_SECONDS = 60
AUDIT_SECONDS = 20
ON_ITS_WAY_SECONDS = 2
"""How long a unit is waited for that is being started or stopped: systemd starts one anew after 0.1 s."""
VEHICLE = "/usr/lib/lsmlab/vehicle"
"""Where the program of a command run as a service is copied to; an audit rule of the image watches it."""
MOST_OUTPUT = 16 << 20
"""Bytes of output, and of errors, that are carried; who writes more is killed."""
MOST_HEAD = 1 << 16
"""Bytes of an HTTP answer's head."""
MOST_DIGITS = 15
"""Of a length in an HTTP answer."""
HEXADECIMAL = frozenset(b"0123456789abcdefABCDEF")
TOKEN = frozenset(b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
"""What the name of an HTTP field is made of: RFC 9110, 5.6.2."""
IDLE_THREADS = 2
"""How many threads wait for questions to come."""
REST_SECONDS = 0.03
"""A service is at rest when its processes sleep and have used no processor time for so long."""

_libc = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS, MS_BIND, MS_REC, MS_PRIVATE = 0x20000, 0x1000, 0x4000, 0x40000
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 24, 38, 47, 4
IN_MODIFY, IN_MOVE_SELF, IN_CLOEXEC, IN_NONBLOCK = 0x2, 0x800, 0o2000000, 0o4000
PROC_USER_INIT_INO = 0xEFFFFFFD
NETLINK_AUDIT, AUDIT_GET, AUDIT_USER, NLM_F_REQUEST, NLM_F_ACK, NLMSG_ERROR = 9, 1000, 1005, 1, 4, 2
AVD_FLAGS_PERMISSIVE = 1
GONE = {errno.ENOENT, errno.ENOTDIR, errno.ESRCH, errno.ENODEV}
"""What a file of /proc or of a cgroup says once its process or group has ended."""


class Refused(Exception):  # noqa: N818 - an answer, not a fault
    """Cannot be done; the text is for people."""


# Files and facts


def text_of(path: str) -> str:
    """What a small file holds, without the newline at its end. Raises OSError."""
    with open(path, "rb", buffering=0) as file:
        data = bytearray()
        while chunk := file.read(1 << 16):
            data += chunk
    return data.rstrip(b"\n\0").decode("utf-8", "backslashreplace")


def text_if_any(path: str) -> str:
    """The same; empty where its process or group has ended."""
    try:
        return text_of(path)
    except OSError as error:
        if error.errno in GONE:
            return ""
        raise


def mode() -> dict[str, Any]:
    """What the kernel says of its frameworks. What it does not say is an error, and never "no framework"."""
    lsm = text_of(LSM).split(",")
    if not all(lsm):
        raise Refused(f"{LSM} holds {','.join(lsm)!r}; expected a list of names")
    enforcing = profiles = whole = None
    if "selinux" in lsm:
        word = text_of(ENFORCE)
        if word not in {"0", "1"}:
            raise Refused(f"{ENFORCE} holds {word!r}; expected 0 or 1")
        enforcing = word == "1"
    if "apparmor" in lsm:
        profiles = {}
        for line in filter(None, text_of(PROFILES).split("\n")):
            name, found, state = line.rpartition(" (")
            if not (name and found and state.endswith(")")):
                raise Refused(f"{PROFILES} has the line {line!r}; expected NAME (MODE)")
            profiles[name] = state[:-1]
        whole = text_of(APPARMOR_MODE)
    return {"lsm": lsm, "selinux_enforcing": enforcing, "profiles": profiles, "apparmor_mode": whole}


def apparmor_features(folder: str = FEATURES) -> str:
    """What the kernel's AppArmor is able to, in the form that libapparmor reads: profiles are compiled for it."""
    found = ""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            inner = apparmor_features(entry.path) if entry.is_dir() else text_of(entry.path)
            found += f"{entry.name} {{{inner}\n}}\n"
    return found


def permissive(unit: str) -> bool:
    """Whether SELinux only logs what a process of the unit does, whatever the mode: it is in a permissive domain, or
    whether it is cannot be learned. It is asked once the unit has come to rest: before, it may be about to exec."""
    at_rest(unit)
    try:
        domains = {text_if_any(f"/proc/{pid}/attr/current") for pid in pids(unit)}
        return any(_is_permissive(domain) for domain in domains)
    except OSError:
        return True


def _is_permissive(domain: str) -> bool:
    """Raises OSError, and Refused for an answer that is none."""
    if not domain:  # of a process that has ended
        return False
    question = os.open(ACCESS, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.write(question, f"{domain} {domain} {text_of(PROCESS_CLASS)}".encode())
        answer = os.read(question, 1 << 12).split()  # security/selinux/selinuxfs.c, sel_write_access
    finally:
        os.close(question)
    if len(answer) != 6:
        raise Refused(f"{ACCESS} answers {answer!r} for {domain}; expected six numbers")
    return bool(int(answer[5], 16) & AVD_FLAGS_PERMISSIVE)


class _Audit:
    """The kernel's audit subsystem: include/uapi/linux/audit.h. Its socket stays open: to make and to close one takes
    longer than to ask."""

    def __init__(self) -> None:
        self._in_use = threading.Lock()
        self._link: socket.socket | None = None
        self._number = 0

    def ask(self, kind: int, data: bytes = b"") -> bytes:
        """One message, and the body of its answer. Raises Refused and OSError."""
        deadline = time.monotonic() + AUDIT_SECONDS
        if not self._in_use.acquire(timeout=AUDIT_SECONDS):
            raise Refused(f"the kernel's audit subsystem has not answered another question for {AUDIT_SECONDS} s")
        try:
            found, answer = self._exchange(kind, data, deadline)
        except OSError:
            if self._link is not None:
                self._link.close()  # with all that was queued
                self._link = None
            raise
        finally:
            self._in_use.release()
        if found == NLMSG_ERROR:
            code = -struct.unpack_from("=i", answer, 16)[0]
            if code:
                raise Refused(f"the kernel's audit subsystem: {os.strerror(code)}")
        elif found != kind:
            raise Refused(f"the kernel's audit subsystem answers with message type {found}")
        return answer[16:]

    def _exchange(self, kind: int, data: bytes, deadline: float) -> tuple[int, bytes]:
        if self._link is None:
            self._link = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_AUDIT)
        self._number += 1
        flags = NLM_F_REQUEST | (NLM_F_ACK if kind == AUDIT_USER else 0)
        self._link.send(struct.pack("=IHHII", 16 + len(data), kind, flags, self._number, 0) + data)
        while True:
            self._link.settimeout(max(0.001, deadline - time.monotonic()))
            answer, sender = self._link.recvfrom(1 << 16)
            # Any process of root's may send to this socket; the kernel is number 0. And an answer may be late
            if sender[0] == 0 and len(answer) >= 16:
                found, _, number = struct.unpack_from("=HHI", answer, 4)
                if number == self._number:
                    return found, answer


_audit = _Audit()


def _log_file() -> os.stat_result:
    try:
        return os.stat(LOG)
    except OSError as error:
        raise Refused(f"{LOG}: {error.strerror}") from None


def audit_state() -> dict[str, Any]:
    """struct audit_status, and the log's identity and size."""
    names = ("mask", "enabled", "failure", "pid", "rate_limit", "backlog_limit", "lost", "backlog")
    status = dict(zip(names, struct.unpack_from("=8I", _audit.ask(AUDIT_GET))))
    log = _log_file()
    return {
        "enabled": status["enabled"],
        "daemon_pid": status["pid"],
        "lost": status["lost"],
        "backlog": status["backlog"],
        "log": f"{log.st_dev}:{log.st_ino}",
        "size": log.st_size,
    }


def sentinel(word: str) -> None:
    """Send `word` through the audit queue: a record of type USER."""
    _audit.ask(AUDIT_USER, word.encode() + b"\0")


class _Watch:
    """Waits until a file is written, for one at a time. Its inotify stays open: to close one takes the kernel 7 ms."""

    def __init__(self) -> None:
        self.in_use = threading.Lock()
        self._inotify = -1
        self._file = -1
        self._poller = select.poll()

    def on(self, path: str) -> None:
        if self._inotify < 0:
            self._inotify = _libc.inotify_init1(IN_CLOEXEC | IN_NONBLOCK)
            if self._inotify >= 0:
                self._poller.register(self._inotify, select.POLLIN)
        if self._inotify >= 0:
            self._file = _libc.inotify_add_watch(self._inotify, path.encode(), IN_MODIFY | IN_MOVE_SELF)
        if self._inotify < 0 or self._file < 0:
            raise Refused(f"{path} cannot be watched: {os.strerror(ctypes.get_errno())}")

    def moved(self, seconds: float) -> bool | None:
        """Whether the file is moved away, as soon as something happened; None where nothing does."""
        if seconds <= 0 or not self._poller.poll(seconds * 1000):
            return None
        events = struct.iter_unpack("=iIII", os.read(self._inotify, 1 << 12))  # a file's own carry no name
        return any(file == self._file and mask & IN_MOVE_SELF for file, mask, _, _ in events)


_log = _Watch()


def read_log(offset: int, word: str, seconds: float, most: int) -> tuple[bytes, bool]:
    """The log from byte `offset` on, at most `most` bytes, as soon as it holds `word`; and whether it does.

    Not waited for in a log that is moved away: what comes then goes to another file.
    """
    deadline = time.monotonic() + seconds
    wanted, found = word.encode(), bytearray()
    moved: bool | None = False
    if not _log.in_use.acquire(timeout=seconds):
        return b"", False
    try:
        _log.on(LOG)
        with open(LOG, "rb", buffering=0) as log:
            log.seek(offset)
            while len(found) < most:
                chunk = log.read(min(1 << 16, most - len(found)))
                if chunk:
                    start = max(0, len(found) - len(wanted))
                    found += chunk
                    if found.find(wanted, start) >= 0:
                        return bytes(found), True
                    continue
                if moved is not False:
                    break
                moved = _log.moved(deadline - time.monotonic())
    finally:
        _log.in_use.release()
    return bytes(found), False


# Services


def _cgroup(unit: str) -> str:
    plain = f"{CGROUPS}/{unit}"
    if os.path.isdir(plain):
        return plain
    if not os.path.isdir(CGROUPS):
        raise Refused(f"{CGROUPS} is not there: which processes a unit has is not known")
    if "@" in unit:  # an instance lies in the slice of its template
        for entry in os.scandir(CGROUPS):
            if entry.name.endswith(".slice") and os.path.isdir(f"{entry.path}/{unit}"):
                return f"{entry.path}/{unit}"
    return plain


def pids(unit: str) -> list[int]:
    """The processes of a unit, those of its sub-groups included."""
    found, folders = [], [_cgroup(unit)]
    for folder in folders:
        found += [int(pid) for pid in text_if_any(f"{folder}/cgroup.procs").split()]
        with contextlib.suppress(FileNotFoundError):
            if os.stat(folder).st_nlink != 2:  # 2: no folder in it (fs/kernfs/inode.c), as in most groups
                folders += [entry.path for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
    return found


# D-Bus: https://dbus.freedesktop.org/doc/dbus-specification.html#message-protocol-messages
BUS_CALL, BUS_RETURN, BUS_ERROR, BUS_SIGNAL = 1, 2, 3, 4
FIELD_PATH, FIELD_INTERFACE, FIELD_MEMBER, FIELD_ERROR, FIELD_REPLY, FIELD_SIGNATURE = 1, 2, 3, 4, 5, 8


def _packed(text: str, kind: str) -> bytes:
    """A text as D-Bus carries it: `s` and `o` with a length of four bytes, `g` with one of one byte."""
    raw = text.encode()
    return struct.pack("<B" if kind == "g" else "<I", len(raw)) + raw + b"\0"


def _method_call(number: int, path: str, interface: str, member: str, *texts: str) -> bytes:
    """The call of a method, as message `number`; its arguments are texts."""
    head, body = b"", b""
    for code, kind, text in (
        (FIELD_PATH, "o", path), (FIELD_INTERFACE, "s", interface), (FIELD_MEMBER, "s", member),
        (FIELD_SIGNATURE, "g", "s" * len(texts)),
    ):  # fmt: skip
        head += bytes(-len(head) % 8) + bytes((code, 1, ord(kind), 0)) + _packed(text, kind)
    for text in texts:
        body += bytes(-len(body) % 4) + _packed(text, "s")
    start = struct.pack("<cBBBIII", b"l", BUS_CALL, 0, 1, len(body), number, len(head))
    return start + head + bytes(-len(head) % 8) + body


def _value(data: bytes, at: int, kind: str) -> tuple[Any, int]:
    """The value of type `kind` at byte `at`, aligned, and its end. Raises ValueError, IndexError, struct.error."""
    if kind == "y":
        return data[at], at + 1
    if kind == "g":
        end = at + 1 + data[at]
        return data[at + 1 : end].decode(), end + 1
    if kind == "v":
        inner, at = _value(data, at, "g")
        return _value(data, at, inner)
    at += -at % 4
    number = struct.unpack_from("<I", data, at)[0]
    if kind == "u":
        return number, at + 4
    end = at + 4 + number
    if kind not in {"s", "o"} or data[end]:
        raise ValueError(f"a value of type {kind!r}")
    return data[at + 4 : end].decode(), end + 1


def _message(stream: Any) -> tuple[int, bytes, bytes]:
    """The next message of D-Bus in a stream: its type, its header, its body."""

    def exactly(size: int) -> bytes:
        data: bytes = stream.read(size)
        if len(data) < size:
            raise Refused("systemd ends the conversation")
        return data

    start = exactly(16)
    order, kind, _, _, size, _, length = struct.unpack("<cBBBIII", start)
    if order != b"l" or max(size, length) > MOST_OUTPUT:
        raise Refused(f"systemd answers {start!r}; expected a message of D-Bus")
    return kind, start + exactly(length + -length % 8)[:length], exactly(size)


def _fields(head: bytes) -> dict[int, Any]:
    """The fields of a message's header. Raises as `_value`."""
    fields, at = {}, 16
    while at < len(head):
        code, at = _value(head, at + -at % 8, "y")
        fields[code], at = _value(head, at, "v")
    return fields


def _error(head: bytes, body: bytes) -> str:
    return f"{_fields(head).get(FIELD_ERROR)}: {_value(body, 0, 's')[0] if body else ''}"


@contextlib.contextmanager
def _systemd(seconds: float, late: str) -> Iterator[tuple[socket.socket, Any]]:
    """A conversation with systemd: what is sent to, and what is read from. Raises Refused, with `late` after `seconds`.

    Over its own socket, as `systemctl` has one: to start that takes longer than all else that is done around an
    attempt.
    """
    with _Deadline(socket.AF_UNIX, socket.SOCK_STREAM) as link, link.makefile("rb") as stream:
        link.moment = time.monotonic() + seconds
        try:
            link.settimeout(seconds)
            link.connect(SYSTEMD)
            link.sendall(b"\0AUTH EXTERNAL " + str(os.geteuid()).encode().hex().encode() + b"\r\nBEGIN\r\n")
            said = stream.readline(1 << 10)  # a short question that comes with this is left lying until another comes
            if not said.startswith(b"OK "):
                raise Refused(f"systemd does not talk to the agent: {said!r}")
            yield link, stream
        except (TimeoutError, socket.timeout):  # noqa: UP041 - not the same before Python 3.10
            raise Refused(f"{late} within {seconds} s") from None
        except (ValueError, IndexError, struct.error) as error:
            raise Refused(f"systemd answers nonsense: {error}") from None
        except OSError as error:
            raise Refused(f"{SYSTEMD}: {error.strerror or error}") from None


def _properties(unit: str, wanted: list[tuple[str, str]]) -> list[Any]:
    """What systemd says of a unit: the properties `wanted`, of which each is an interface and a name."""
    name = "".join(c if c.isascii() and c.isalnum() and (n or c.isalpha()) else f"_{ord(c):02x}"
                   for n, c in enumerate(unit))  # fmt: skip
    properties = "org.freedesktop.DBus.Properties"
    found: dict[int, Any] = {}
    with _systemd(SYSTEMD_SECONDS, "systemd does not answer") as (link, stream):
        asked = (
            _method_call(number, f"{MANAGER}/unit/{name}", properties, "Get", f"{MANAGES}.{interface}", one)
            for number, (interface, one) in enumerate(wanted, 1)
        )
        link.sendall(b"".join(asked))
        while len(found) < len(wanted):
            kind, head, body = _message(stream)
            if kind == BUS_ERROR:
                raise Refused(f"systemd, of {unit}: {_error(head, body)}")
            if kind == BUS_RETURN and isinstance(number := _fields(head).get(FIELD_REPLY), int):
                found[number] = _value(body, 0, "v")[0]
    return [found[number] for number in range(1, len(wanted) + 1)]


def start_unit(unit: str, seconds: float) -> str:
    """Start a unit and wait until that is done, as `systemctl start` does. Empty where it was, or else why not."""
    job, results = None, {}
    with _systemd(seconds, f"{unit} is not started") as (link, stream):
        link.sendall(_method_call(1, MANAGER, f"{MANAGES}.Manager", "StartUnit", unit, "replace"))
        while job not in results:
            kind, head, body = _message(stream)
            if kind == BUS_ERROR:
                return _error(head, body)
            if kind == BUS_RETURN:
                job = _value(body, 0, "o")[0]
            elif kind == BUS_SIGNAL and b"\0JobRemoved\0" in head:  # its number, the job, its unit, its result
                ended, at = _value(body, 4, "o")
                results[ended] = _value(body, _value(body, at, "s")[1], "s")[0]
    return "" if results[job] in {"done", "skipped"} else f"systemd's job ended: {results[job]}"


def service(unit: str) -> dict[str, Any]:
    """What systemd says of a unit."""
    wanted = {"active": ("Unit", "ActiveState"), "sub": ("Unit", "SubState")}
    if unit.endswith(".service"):  # a group of units has neither
        wanted |= {"result": ("Service", "Result"), "main_pid": ("Service", "MainPID")}
    return {"result": "success", "main_pid": 0, **dict(zip(wanted, _properties(unit, list(wanted.values()))))}


def _label_of(process: str) -> str:
    try:
        return text_of(f"{process}/attr/current")
    except OSError as error:
        if error.errno == errno.EINVAL:  # no framework gives labels
            return ""
        raise


def _process(pid: int, main: int) -> dict[str, Any]:
    folder = f"/proc/{pid}"
    lines = (line.partition(":") for line in text_of(f"{folder}/status").split("\n"))
    status = {name: value.strip(" \t") for name, _, value in lines}
    return {
        "pid": pid,
        "ppid": int(status["PPid"]),
        "name": status["Name"],
        "main": pid == main,
        "exe": os.readlink(f"{folder}/exe"),
        "label": _label_of(folder),
        "uids": [int(n) for n in status["Uid"].split()],
        "gids": [int(n) for n in status["Gid"].split()],
        "groups": [int(n) for n in status["Groups"].split()],
        "cap_permitted": int(status["CapPrm"], 16),
        "cap_effective": int(status["CapEff"], 16),
        "cap_bounding": int(status["CapBnd"], 16),
        "no_new_privs": status["NoNewPrivs"] == "1",
        "seccomp": int(status["Seccomp"]),
        "initial_userns": os.stat(f"{folder}/ns/user").st_ino == PROC_USER_INIT_INO,
    }


def _at_last(unit: str) -> dict[str, Any]:
    """The state of a unit that is on its way to another, such as one whose main process has ended, a moment later."""
    deadline = time.monotonic() + ON_ITS_WAY_SECONDS
    while True:
        state = service(unit)
        if state["active"] not in {"activating", "deactivating", "reloading"} or time.monotonic() > deadline:
            return state
        time.sleep(REST_SECONDS)


def subject(unit: str, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """A unit's state and processes. `known`: its state from before, which holds while its main process lives."""
    there = pids(unit)
    if known is not None and known["main_pid"] in there:
        state = known
    else:
        state, there = _at_last(unit), pids(unit)
    processes = []
    for pid in there:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            processes.append(_process(pid, state["main_pid"]))
    return {"service": state, "processes": processes}


def at_rest(unit: str, seconds: float = 15) -> bool:
    """Wait until all processes of a unit sleep: forked, exec'd, done with changing their user. False: they do not."""

    def look() -> list[tuple[Any, ...]] | None:
        seen: list[tuple[Any, ...]] = []
        for pid in pids(unit):
            line = text_if_any(f"/proc/{pid}/stat")
            fields = line.rpartition(") ")[2].split()
            if not fields or fields[0] not in "SI":
                return None
            seen.append((pid, fields[11], fields[12], text_if_any(f"/proc/{pid}/schedstat").split(" ")[0]))
        return seen

    deadline = time.monotonic() + seconds
    before: list[tuple[Any, ...]] | None = None
    while time.monotonic() < deadline:
        now = look()
        if now is not None and now == before:
            return True
        before = now
        time.sleep(REST_SECONDS)
    return False


# Objects


def _mount_of(path: str) -> tuple[bool, str]:
    """Whether the mount that `path` lies on is read-only, and its device's name without /dev/."""
    there = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        about = dict(line.partition(":\t")[::2] for line in text_of(f"/proc/self/fdinfo/{there}").split("\n"))
    finally:
        os.close(there)
    for line in text_of("/proc/self/mountinfo").split("\n"):
        mount, _, disk = (part.split(" ") for part in line.partition(" - "))
        if mount[0] == about["mnt_id"]:
            return "ro" in mount[5].split(",") + disk[2].split(","), disk[1].rpartition("/dev/")[2]
    raise Refused(f"{path}: its mount {about['mnt_id']} is not in /proc/self/mountinfo")


def _acl(path: str) -> list[str]:
    """The entries of a POSIX ACL, where there are extended ones: linux/posix_acl_xattr.h."""
    try:
        data = os.getxattr(path, "system.posix_acl_access")
    except OSError as error:
        if error.errno in {errno.ENODATA, errno.ENOTSUP}:
            return []
        raise
    kinds = {1: "user", 2: "user", 4: "group", 8: "group", 16: "mask", 32: "other"}
    entries = []
    for tag, rights, number in struct.iter_unpack("<HHI", data[4:]):
        name = str(number) if tag in {2, 8} else ""
        bits = "".join(letter if rights & bit else "-" for letter, bit in (("r", 4), ("w", 2), ("x", 1)))
        entries.append(f"{kinds[tag]}:{name}:{bits}")
    return entries


def _named(find: Callable[[int], Any], number: int) -> str:
    try:
        return str(find(number)[0])
    except KeyError:
        return "UNKNOWN"


def look_at(path: str) -> dict[str, Any]:
    """An object: where it really is, its label, and stat(2) and ACL of every component on the way to it."""
    nothing = {"path": path, "exists": False, "real": "", "label": "", "read_only": False, "device": "", "chain": []}
    real = os.path.realpath(path)
    try:
        there = os.lstat(real)
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}:
            return nothing
        raise
    if stat.S_ISLNK(there.st_mode):  # a loop of links
        return nothing
    chain = []
    parts = [part for part in real.split("/") if part]
    for count in range(len(parts) + 1):
        here = "/" + "/".join(parts[:count])
        found = os.lstat(here)
        chain.append(
            {
                "path": here,
                "mode": found.st_mode,
                "uid": found.st_uid,
                "gid": found.st_gid,
                "user": _named(pwd.getpwuid, found.st_uid),
                "group": _named(grp.getgrgid, found.st_gid),
                "dev": f"{found.st_dev:x}",
                "ino": found.st_ino,
                "acl": _acl(here),
            }
        )
    read_only, device = _mount_of(real)
    return {**nothing, "exists": True, "real": real, "label": _label(real), "read_only": read_only,
            "device": device, "chain": chain}  # fmt: skip


def _label(path: str) -> str:
    if not os.path.exists(ENFORCE):
        return ""
    try:
        return os.getxattr(path, "security.selinux").rstrip(b"\0").decode("utf-8", "backslashreplace")
    except OSError:
        return "?"


# Commands


def _end_session(session: int) -> None:
    """Kill every process of a session, those in groups of their own included."""
    for _ in range(20):  # again, for what was forked meanwhile
        there = False
        for entry in filter(str.isdigit, os.listdir("/proc")):
            fields = text_if_any(f"/proc/{entry}/stat").rpartition(") ")[2].split(" ")
            if len(fields) > 3 and fields[3] == str(session) and fields[0] not in "ZX":
                there = True
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(entry), signal.SIGKILL)
        if not there:
            return


def _drain(descriptor: int, into: bytearray) -> bool:
    """Read what is there, a bit beyond MOST_OUTPUT in all at the most. False at the end of the stream."""
    while len(into) <= MOST_OUTPUT:
        try:
            chunk = os.read(descriptor, 1 << 16)
        except BlockingIOError:
            break
        if not chunk:
            return False
        into += chunk
    return True


def _collect(process: subprocess.Popen[bytes], seconds: float, *, whole: bool = False) -> dict[str, Any]:
    """Wait for a program, at most `seconds`; what it wrote, and how it ended.

    Its children are not waited for, but with `whole` until none of them can write any more, or the time is up.
    """
    start = time.monotonic()
    assert process.stdout is not None
    assert process.stderr is not None
    pipes = (process.stdout.fileno(), process.stderr.fileno())
    kept = {pipe: bytearray() for pipe in pipes}
    ended = -1
    try:
        ended = os.pidfd_open(process.pid)
        poller = select.poll()
        poller.register(ended, select.POLLIN)
        for pipe in pipes:
            os.set_blocking(pipe, False)
            poller.register(pipe, select.POLLIN)
        going_on = set(pipes)
        while True:
            left = start + seconds - time.monotonic()
            ready = {descriptor for descriptor, _ in poller.poll(max(0.0, left) * 1000)}
            for pipe in list(going_on) if ended in ready else going_on & ready:
                if not _drain(pipe, kept[pipe]):
                    poller.unregister(pipe)
                    going_on.discard(pipe)
            if ended in ready:
                process.wait()
                poller.unregister(ended)
            over = process.returncode is not None and not (whole and going_on)
            too_much = any(len(data) > MOST_OUTPUT for data in kept.values())
            if over or too_much or left <= 0:
                break
        timed_out = process.returncode is None and not too_much
        cut_short = process.returncode is not None and not over
    finally:
        if process.returncode is None:
            _end_session(process.pid)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
        if ended >= 0:
            os.close(ended)
        process.stdout.close()
        process.stderr.close()
    code = None if timed_out else process.returncode
    out, err = (base64.b64encode(kept[pipe][:MOST_OUTPUT]).decode() for pipe in pipes)
    return {
        "exit_code": code if code is not None and code >= 0 else None,
        "signal": -code if code is not None and code < 0 else None,
        "out": out,
        "err": err,
        "timed_out": timed_out,
        "too_much": too_much,
        "seconds": time.monotonic() - start,
        **({"cut_short": cut_short} if whole else {}),
    }


def _not_started(argv: list[str], error: OSError) -> dict[str, Any]:
    """As a shell says it: 126 for a program that may not be run, 127 for one that is not there."""
    code = 127 if error.errno == errno.ENOENT else 126
    words = f"{argv[0]}: {error.strerror}".encode()
    return {"exit_code": code, "signal": None, "out": "", "err": base64.b64encode(words).decode(), "timed_out": False,
            "too_much": False, "seconds": 0.0}  # fmt: skip


def run(argv: list[str], stdin: str = "", timeout: float = 60) -> dict[str, Any]:
    """Run a program as root and wait for it."""
    with contextlib.ExitStack() as held:
        source: Any = subprocess.DEVNULL
        if stdin:
            source = held.enter_context(os.fdopen(os.memfd_create("stdin"), "w+b"))
            source.write(base64.b64decode(stdin))
            source.seek(0)
        try:
            process = subprocess.Popen(
                argv, stdin=source, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
            )
        except OSError as error:
            return _not_started(argv, error)
        return _collect(process, timeout)


def _call(name: str, *arguments: Any) -> None:
    """A function of libc that answers 0; numbers are unsigned long, as mount(2) and prctl(2) take them."""
    wide = (ctypes.c_ulong(one) if isinstance(one, int) else one for one in arguments)
    if getattr(_libc, name)(*wide) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _set(path: str, text: str) -> None:
    there = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(there, text.encode())
    finally:
        os.close(there)


def _drop(capabilities: list[int]) -> None:
    for number in capabilities:
        _call("prctl", PR_CAPBSET_DROP, number, 0, 0, 0)


def _keep_capabilities(most: int) -> None:
    """Have no capability beyond `most`, and none that is inheritable: capset(2), version 3."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; then the upper halves
    _call("capget", header, sets)
    for half in (0, 1):
        effective, permitted, inheritable = range(3 * half, 3 * half + 3)
        sets[permitted] &= most >> 32 * half & 0xFFFFFFFF
        sets[effective], sets[inheritable] = sets[permitted], 0
    _call("capset", header, sets)


def _becoming(who: dict[str, Any], program: str) -> list[tuple[str, Callable[[], Any]]]:
    """The steps from the agent's child to a process with a service's rights, `program` mounted over the service's."""
    uid, gid, bounding = who["uid"], who["gid"], who["cap_bounding"]
    if not (0 <= uid < 0xFFFFFFFF and 0 <= gid < 0xFFFFFFFF):  # -1 is "as it is" for setresuid(2)
        raise Refused(f"the service cannot be acted for: uid {uid}, gid {gid}")
    last = int(text_of("/proc/sys/kernel/cap_last_cap"))
    dropped = [number for number in range(last + 1) if not bounding >> number & 1]
    steps: list[tuple[str, Callable[[], Any]]] = [
        ("the audit user id", lambda: _set("/proc/self/loginuid", str(who["auid"]))),
        ("its place for the OOM killer", lambda: _set("/proc/self/oom_score_adj", "0")),  # the agent's own is spared
        ("a mount namespace", lambda: _call("unshare", CLONE_NEWNS)),
        ("private mounts", lambda: _call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)),
        (
            f"mounting over {who['exe']}",
            lambda: _call("mount", program.encode(), who["exe"].encode(), None, MS_BIND, None),
        ),
        ("ambient capabilities", lambda: _call("prctl", PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)),
        ("the bounding set", lambda: _drop(dropped)),
        ("groups", lambda: os.setgroups(who["groups"])),
        ("the group id", lambda: os.setresgid(gid, gid, gid)),
        ("the user id", lambda: os.setresuid(uid, uid, uid)),
        ("capabilities", lambda: _keep_capabilities(0 if uid else bounding)),
    ]
    if who["no_new_privs"]:
        steps.append(("no_new_privs", lambda: _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)))
    return steps


def run_as(argv: list[str], who: dict[str, Any], timeout: float, *, whole: bool = False) -> dict[str, Any]:
    """Run a command as a service: its uid, groups, capabilities, and its domain or profile by the automatic transition.
    `whole`: see `_collect`.

    The command's program is copied, given the label of the service's program and mounted over it in a private mount
    namespace: to the kernel it is the service's program, so what is measured is what the service may do.
    """
    program = shutil.which(argv[0])
    if program is None:
        raise Refused(f"{argv[0]}: no such program in the guest")
    exe = who["exe"]
    with open(program, "rb") as source, open(VEHICLE, "wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    os.chmod(VEHICLE, 0o755)
    if os.path.exists(ENFORCE):
        os.setxattr(VEHICLE, "security.selinux", os.getxattr(exe, "security.selinux"))
    steps = _becoming(who, VEHICLE)
    reading, writing = os.pipe()

    def become() -> None:  # a step that fails is told, and raises: nothing is executed
        for step, do in steps:
            try:
                do()
            except BaseException as error:
                os.write(writing, f"{step}: {error}".encode())
                raise

    process, refused = None, None
    with os.fdopen(reading, "rb") as report:
        try:
            process = subprocess.Popen(
                argv, executable=exe, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                start_new_session=True, preexec_fn=become, cwd="/",  # noqa: PLW1509 - no module does this
            )  # fmt: skip
        except OSError as error:
            refused = error
        except subprocess.SubprocessError:
            pass
        finally:
            os.close(writing)
        if process is not None:
            return _collect(process, timeout, whole=whole)
        if refused is not None:
            return _not_started(argv, refused)
        raise Refused(f"the service cannot be acted for: {report.read().decode('utf-8', 'replace')}")


# A visitor


class _Deadline(socket.socket):
    """A socket whose reads end at one moment, however many there are: a server that drips bytes is not waited for."""

    moment = 0.0

    def recv_into(self, *arguments: Any) -> int:
        left = self.moment - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.settimeout(left)
        return super().recv_into(*arguments)


class _Answer:
    """An HTTP answer (RFC 9112). http.client takes a tenth of an emulated attempt to read one.

    Where its length is in doubt, all that comes is its body: what is not read, no canary is found in.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._left = MOST_HEAD
        self.lines = bytearray()
        """All that is no body: heads, the lines between chunks, the trailer; at most MOST_HEAD of it."""

    def _line(self, place: str) -> bytes:
        line: bytes = self._stream.readline(self._left)
        self._left -= len(line)
        self.lines += line[: MOST_HEAD - len(self.lines)]
        if not line.endswith(b"\n"):
            raise ValueError(
                f"the answer's {place} is too long" if self._left <= 0 else f"the answer ended in its {place}"
            )
        return line.rstrip(b"\r\n")

    def _fields(self, place: str) -> dict[bytes, bytes]:
        """Lines of a name and a value, up to one that is empty: by the names in small letters, the first of each.

        A line that is none, such as the second of a value over two lines, leaves the length in doubt.
        """
        fields: dict[bytes, bytes] = {}
        while line := self._line(place):
            name, colon, value = line.partition(b":")
            if colon and name and set(name) <= TOKEN:
                fields.setdefault(name.lower(), value.strip())
            else:
                fields[b"content-length"] = b"in doubt"
        return fields

    def head(self) -> tuple[int, dict[bytes, bytes]]:
        """Its status, and its fields. Raises ValueError and OSError."""
        while True:
            line = self._line("head")
            version, status = (*line.split(), b"", b"")[:2]
            if not (version.startswith(b"HTTP/1.") and status.isdigit() and len(status) == 3 and status >= b"100"):
                raise ValueError(f"the answer begins with {line[:60]!r}; expected HTTP/1.1 and a status")
            fields = self._fields("head")
            if status == b"101" or not status.startswith(b"1"):  # another 1xx: the answer itself is to come
                return int(status), fields

    def body(self, fields: dict[bytes, bytes], into: bytearray) -> None:
        """Read its body, at most MOST_OUTPUT and a bit. Raises ValueError where it ends early, and OSError."""
        if fields.get(b"transfer-encoding", b"").lower() == b"chunked":
            self._chunks(into)
            return
        length = fields.get(b"content-length", b"")
        known = length.isdigit() and len(length) <= MOST_DIGITS  # else all that comes is its body
        self._read(int(length) if known else None, into)

    def _chunks(self, into: bytearray) -> None:
        while len(into) <= MOST_OUTPUT:
            self._left = MOST_HEAD
            digits = self._line("chunks").partition(b";")[0].strip()
            if not (0 < len(digits) <= MOST_DIGITS and set(digits) <= HEXADECIMAL):
                raise ValueError(f"a chunk of the answer has {digits[:60]!r} bytes")
            size = int(digits, 16)
            if not size:
                with contextlib.suppress(ValueError):  # all of it is there
                    self._fields("trailer")
                return
            self._read(size, into)
            if len(into) <= MOST_OUTPUT and (line := self._line("chunks")):
                raise ValueError(f"a chunk of the answer goes on with {line[:60]!r}")

    def _read(self, left: int | None, into: bytearray) -> None:
        """`left` bytes, or all there are."""
        while left != 0 and len(into) <= MOST_OUTPUT:
            chunk = self._stream.read1(1 << 16 if left is None else min(left, 1 << 16))
            into += chunk
            if left is not None:
                left -= len(chunk)
            if not chunk:
                break
        if left and len(into) <= MOST_OUTPUT:
            raise ValueError(f"the answer ended {left} bytes early")


def visit(method: str, port: int, path: str, timeout: float, body: str | None = None) -> dict[str, Any]:
    """A visitor's HTTP request to this machine, its path sent as it is written. Redirections are not followed."""
    start = time.monotonic()
    found: dict[str, Any] = {"status": None, "err": "", "timed_out": False, "cut_short": False}
    host = "127.0.0.1" if port == 80 else f"127.0.0.1:{port}"
    sent = b"" if body is None else body.encode()
    length = () if body is None else (f"Content-Length: {len(sent)}",)
    lines = (f"{method} {path} HTTP/1.1", f"Host: {host}", "User-Agent: lsmlab", "Connection: close", *length, "", "")
    received, answer = bytearray(), None
    with contextlib.ExitStack() as held:
        try:
            link = held.enter_context(_Deadline(socket.AF_INET, socket.SOCK_STREAM))
            link.moment = start + timeout
            link.settimeout(timeout)
            link.connect(("127.0.0.1", port))
            link.sendall("\r\n".join(lines).encode() + sent)
            answer = _Answer(held.enter_context(link.makefile("rb")))
            found["status"], fields = answer.head()
            found["cut_short"] = True
            if method != "HEAD" and found["status"] not in {101, 204, 304}:
                answer.body(fields, received)
            found["cut_short"] = False
        except (TimeoutError, socket.timeout):  # noqa: UP041 - not the same before Python 3.10
            found["timed_out"] = True
        except (OSError, ValueError) as error:
            words = getattr(error, "strerror", None) or str(error) or type(error).__name__
            found["err"] = base64.b64encode(words.encode("utf-8", "backslashreplace")).decode()
    head = b"" if answer is None else bytes(answer.lines)
    return {**found, "head": base64.b64encode(head).decode(), "out": base64.b64encode(received[:MOST_OUTPUT]).decode(),
            "too_much": len(received) > MOST_OUTPUT, "seconds": time.monotonic() - start}  # fmt: skip


def exchange(path: str, data: str, timeout: float) -> dict[str, Any]:
    """Send bytes to a Unix socket, and read what comes until its other end is closed: a container engine's HTTP."""
    start = time.monotonic()
    timed_out = False
    received, buffer = bytearray(), bytearray(1 << 16)
    with _Deadline(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        link.moment = start + timeout
        link.settimeout(timeout)
        try:
            link.connect(path)
            link.sendall(base64.b64decode(data))
            while len(received) <= MOST_OUTPUT:
                count = link.recv_into(buffer)
                if not count:
                    break
                received += buffer[:count]
        except (TimeoutError, socket.timeout):  # noqa: UP041 - not the same before Python 3.10
            timed_out = True
    return {
        "exit_code": None,
        "signal": None,
        "out": base64.b64encode(received[:MOST_OUTPUT]).decode(),
        "err": "",
        "timed_out": timed_out,
        "too_much": len(received) > MOST_OUTPUT,
        "seconds": time.monotonic() - start,
    }


# Operations


def write(path: str, data: str, mode: int | None = None, owner: str | None = None) -> None:
    """Make a file hold `data`, in place where it exists; make its folder where there is none."""
    os.makedirs(os.path.dirname(path) or "/", exist_ok=True)
    with open(path, "wb", buffering=0) as file:
        left = memoryview(base64.b64decode(data))
        while left:
            left = left[file.write(left) :]
    if owner is not None:
        user, _, group = owner.partition(":")
        try:
            numbers = pwd.getpwnam(user).pw_uid, grp.getgrnam(group).gr_gid
        except KeyError as error:
            raise Refused(f"{path}: the owner {owner}: {error.args[0]}") from None
        os.chown(path, *numbers)
    if mode is not None:
        os.chmod(path, mode)


def join(user: str, group: str) -> None:
    """Make a user a member of a group, as usermod does: in /etc/group, and in /etc/gshadow where that has the group.

    Both in the machine's own files. usermod takes an emulated guest twenty times as long.
    """
    lock = os.open(ACCOUNTS_LOCK, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as lckpwdf(3)
        if not any(line.startswith(f"{user}:") for line in text_of(USERS).split("\n")):
            raise Refused(f"{USERS} has no user {user!r}")
        if not _add_member(GROUPS, user, group):
            raise Refused(f"{GROUPS} has no group {group!r}")
        with contextlib.suppress(FileNotFoundError):
            _add_member(SHADOWED_GROUPS, user, group)
    except BlockingIOError:
        raise Refused(f"{ACCOUNTS_LOCK}: another program changes users or groups at this moment") from None
    finally:
        os.close(lock)
    for there, forget in NAME_CACHES:
        if os.path.exists(there) and run(forget)["exit_code"] != 0:
            raise Refused(f"{forget[0]} does not forget what it knew of {group}")


def _add_member(path: str, user: str, group: str) -> bool:
    """Whether the file has the group; the user is a member of it then. Its inode, mode and label are kept."""
    start, member = f"{group}:".encode(), user.encode()
    with open(path, "rb") as file:
        lines = file.read().split(b"\n")
    for number, line in enumerate(lines):
        if line.startswith(start):
            members = line.rpartition(b":")[2]
            if member not in members.split(b","):
                lines[number] = line + (b"," if members else b"") + member
                with open(path, "r+b") as file:
                    file.write(b"\n".join(lines))  # never shorter than it was
            return True
    return False


def plant(file: str, line: str) -> bool:
    """Append a line to a regular file that is there, links followed; it keeps its inode, mode and label."""
    words = line.encode() + b"\n"
    if not os.path.isfile(file):
        return False
    try:
        target = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    except OSError:  # a read-only mount, an immutable file
        return False
    try:
        return os.write(target, words) == len(words)
    except OSError:
        return False
    finally:
        os.close(target)


def facts(unit: str, object: str | None) -> dict[str, Any]:  # noqa: A002 - the domain's word
    """All that holds before an attempt, as far as the kernel tells."""
    return {"subject": subject(unit), "object": None if object is None else look_at(object), "mode": mode()}


def open_window(unit: str, object: str | None, word: str, seconds: float) -> dict[str, Any]:  # noqa: A002
    """Let the service come to rest and the audit queue drain, and read the facts before the attempts to come."""
    resting = at_rest(unit)
    size = _log_file().st_size
    found = facts(unit, object)
    # Records of what came before may still be in the queue: the window begins behind a sentinel that has come through
    sentinel(word)
    drained = read_log(size, word, seconds, 64 << 20)[1]
    return {**found, "resting": resting, "drained": drained, "audit": audit_state()}


def close_window(
    unit: str, offset: int, word: str, seconds: float, most: int, known: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Send a sentinel, read the log up to it, and the facts after it."""
    problem = ""
    log = b""
    try:
        sentinel(word)
        log = read_log(offset, word, seconds, most)[0]
    except (Refused, OSError) as error:
        problem = str(error) or repr(error)
    return {
        "log": log.decode("utf-8", "backslashreplace"),
        "problem": problem,
        "subject": subject(unit, known),
        "mode": mode(),
        "audit": audit_state(),
    }


def attempt(
    close: dict[str, Any],
    canary: dict[str, str] | None = None,
    effect: list[str] | None = None,
    request: dict[str, Any] | None = None,
    command: dict[str, Any] | None = None,
    engine: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One attempt from the canary to the evidence: one of `request` (see `visit`), `command` (`run_as`), and `engine`
    (`exchange`)."""
    planted = plant(**canary) if canary is not None else None
    before = run(effect) if effect else None
    if request is not None:
        result = visit(**request)
    elif command is not None:
        result = run_as(**command, whole=True)
    elif engine is not None:
        result = exchange(**engine)
    else:
        raise Refused("an attempt needs a request, a command or an engine")
    after = run(effect) if effect else None
    return {
        "planted": planted,
        "effect_before": before,
        "effect_after": after,
        "result": result,
        "closed": close_window(**close),
    }


def offer(path: str, who: dict[str, Any], timeout: float) -> None:
    """Run commands as a service for a shell of this guest, for as long as it runs: see `run_as`.

    On a Unix socket: an argument list in JSON on one line, then what `run_as` returns, or a text where it is refused.
    """
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen()

    def answer() -> None:
        while True:
            with (
                server.accept()[0] as asking,
                asking.makefile("rwb") as stream,
                contextlib.suppress(OSError, ValueError),
            ):
                argv = json.loads(stream.readline())
                try:
                    reply: Any = run_as(argv, who, timeout)
                except Refused as error:
                    reply = str(error)
                stream.write(json.dumps(reply).encode())

    threading.Thread(target=answer, daemon=True).start()


def ping() -> None:
    """Answer."""


def clock(seconds: float) -> None:
    """Set the clock, which a saved state carries along; in seconds since 1970."""
    time.clock_settime(time.CLOCK_REALTIME, seconds)


class _Labels:
    """What `restorecon -RF` does, by the library that it is made of, and with the policy's labels read in beforehand:
    the program takes an emulated guest a sixth of a second, most of it to read them."""

    RESTORECON = 0x01 | 0x04 | 0x08 | 0x40
    """selinux/restorecon.h: no digest of before is believed, the whole context, what is below, links resolved."""
    READ_FROM = "/etc/selinux"

    def __init__(self) -> None:
        self._one_by_one = threading.Lock()
        self._library: Any = None
        self._read: list[tuple[str, int, int]] = []

    def give(self, paths: list[str]) -> bool:
        """Whether all could be given theirs; with no paths, they are read in where that is to be done."""
        with self._one_by_one:
            try:
                self._read_in()
            except (OSError, AttributeError):  # no such library, or an old one
                return False
            return all(self._library.selinux_restorecon(os.fsencode(path), self.RESTORECON) == 0 for path in paths)

    def _read_in(self) -> None:
        """Read the labels in where they are not those that were read. Raises OSError and AttributeError."""
        if self._library is None:
            library = ctypes.CDLL("libselinux.so.1", use_errno=True)
            library.selabel_open.restype = ctypes.c_void_p
            library.selinux_restorecon_set_sehandle.argtypes = [ctypes.c_void_p]
            self._library = library
        there = self._there()
        if there != self._read:
            handle = self._library.selabel_open(0, None, 0)
            if handle is None:
                raise OSError(ctypes.get_errno(), "selabel_open")
            self._library.selinux_restorecon_set_sehandle(handle)  # libselinux closes the one before, or loses it
            self._read = there

    def _there(self) -> list[tuple[str, int, int]]:
        """The files that say what is labelled how, and when each was changed."""
        found = []
        for policy in sorted(os.listdir(self.READ_FROM)):
            folder = f"{self.READ_FROM}/{policy}/contexts/files"
            for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
                seen = os.stat(f"{folder}/{name}")
                found.append((f"{policy}/{name}", seen.st_ino, seen.st_ctime_ns))
        return found


_labels = _Labels()


def relabel(paths: list[str]) -> None:
    """Give files and folders the labels that the policy has for their paths; nothing to do without SELinux."""
    if not os.path.exists(ENFORCE) or _labels.give(paths) or not paths:
        return
    done = run(["restorecon", "-RF", "--", *paths])  # in a domain of its own, which may more than ours
    if done["exit_code"] != 0:
        raise Refused(f"restorecon: {base64.b64decode(done['err']).decode('utf-8', 'replace').strip()}")


OPERATIONS: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        ping, offer, run, visit, write, relabel, join, clock, pids, start_unit, audit_state, mode, permissive,
        apparmor_features, open_window, close_window, plant, attempt, exchange,
    )
}  # fmt: skip


# The stream


def _lines(descriptor: int) -> Iterator[bytearray]:
    kept = bytearray()
    while True:
        chunk = os.read(descriptor, 1 << 16)
        kept += chunk
        if b"\n" in chunk:
            *lines, kept = kept.split(b"\n")
            yield from lines
        if not chunk:
            if not stat.S_ISCHR(os.fstat(descriptor).st_mode):
                return
            time.sleep(0.1)  # a port whose other side is not there reads as empty


def _reply(question: dict[str, Any]) -> bytes:
    """The answer to one question, as a line. What was asked may fail in any way: that is an answer too."""
    number, name = question.pop("id", None), question.pop("do", None)
    if not isinstance(name, str) or name not in OPERATIONS:
        return json.dumps({"id": number, "error": f"unknown operation {name!r}"}).encode()
    try:
        return json.dumps({"id": number, "answer": OPERATIONS[name](**question)}).encode()
    except Refused as error:
        words = str(error)
    except OSError as error:
        words = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except Exception:  # noqa: BLE001 - told to who asked, with the place
        words = traceback.format_exc(limit=-3)
    return json.dumps({"id": number, "error": words}).encode()


class _Answering:
    """Answers questions on a descriptor, side by side. A thread that has answered waits for another question: to start
    one makes the kernel record a fork, and auditd write it, and after a restore all that is translated anew."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._writing = threading.Lock()
        self._questions: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._idle = 0
        self._counting = threading.Lock()

    def answer(self, question: dict[str, Any]) -> None:
        """Have a thread answer."""
        with self._counting:
            waits = self._idle > 0
            self._idle -= waits
        if not waits:
            try:
                threading.Thread(target=self._work, daemon=True).start()
            except RuntimeError:  # the machine has no thread left
                self._write(_reply(question))
                return
        self._questions.put(question)

    def _work(self) -> None:
        stays = True
        while stays:
            reply = _reply(self._questions.get())
            with self._counting:  # before it is written: the next question may come at once
                stays = self._idle < IDLE_THREADS
                self._idle += stays
            self._write(reply)

    def _write(self, reply: bytes) -> None:
        with self._writing, contextlib.suppress(OSError):  # nobody is there to be told
            for part in (b"\n", reply, b"\n"):  # a newline first: what a restored snapshot cut short ends there
                left = memoryview(part)
                while left:
                    left = left[os.write(self._target, left) :]


def serve(source: int, target: int) -> None:
    """Answer questions from one descriptor on another until the first ends, which a port never does."""
    answering = _Answering(target)
    for line in _lines(source):
        try:
            question = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(question, dict):
            answering.answer(question)
