"""A container engine on a machine that is kept: what it is, what a run has of it, and the way back.

Runs there, beside the agent: see undo.py. It speaks to the engine's socket itself, since Docker's own command may be
missing. Of its containers only those that bear the journal's word are looked at; the engine is never restarted.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import os
import shutil
import signal
import socket
import stat
import struct
import subprocess
import time
import urllib.parse
from collections.abc import Callable
from typing import Any

from lsmlab.guest import agent
from lsmlab.guest.agent import Refused
from lsmlab.guest.files import Problems

SECONDS = 120.0
"""How long the engine may take for one answer."""
RELOAD_SECONDS = 30.0
UNIT = "docker.service"
LABEL = "lsmlab.journal"
"""Of a container of ours; its value is the journal's word."""
BUSYBOX = ("/bin/busybox", "/usr/bin/busybox", "/sbin/busybox", "/usr/sbin/busybox")
PT_INTERP = 3
"""A program header that names a dynamic linker: elf(5)."""
FRAME = struct.Struct(">BxxxI")
"""Before each piece of a container's output: 1 or 2 for which stream, and its length."""

About = dict[str, Any]
"""What a journal says of the engine: `socket`, `settings` (its file), `runtime`, `image` and `word`."""
State = dict[str, Any]
"""What of ours the engine has: `containers` by id, `image`, `runtime`."""


class _Link(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("engine", timeout=SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def ask(path: str, method: str, target: str, accepted: tuple[int, ...] = (), **query: Any) -> Any:
    """One answer of the engine, of JSON; None where its status is one of `accepted`. Raises Refused."""
    words = {name: one if isinstance(one, str) else json.dumps(one) for name, one in query.items()}
    with contextlib.closing(_Link(path)) as link:
        try:
            link.request(method, f"{target}?{urllib.parse.urlencode(words)}" if words else target)
            answer = link.getresponse()
            data = answer.read()
            if answer.status in accepted:
                return None
            found = [json.loads(line) for line in data.splitlines()] if data.strip() else [None]
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Refused(f"the container engine: {method} {target}: {error}") from None
    if answer.status >= 300:
        raise Refused(f"the container engine: {method} {target}: {message_of(data)}")
    return found if target == "/events" else found[0]


def message_of(data: bytes) -> str:
    """What the engine says of a request that it refused."""
    try:
        said = json.loads(data)["message"]
    except (ValueError, KeyError, TypeError):
        said = "no reason is given"
    return str(said)[:500]


# Whether it will do


def engine_state(socket: str, settings: str, runtime: str, image: str) -> dict[str, Any]:
    """What it takes to say whether the engine will do. Changes nothing: an engine that does not run is not asked."""
    shown = _unit("LoadState", "MainPID", "ExecMainStartTimestampMonotonic")
    pid = int(shown.get("MainPID") or 0)
    found: dict[str, Any] = {
        "installed": shown.get("LoadState") == "loaded", "pid": pid, "runc": shutil.which("runc") or "",
        "busybox": next((path for path in BUSYBOX if _is_static(path)), ""),
    }  # fmt: skip
    if not pid:
        return found
    version, info = ask(socket, "GET", "/version"), ask(socket, "GET", "/info")
    started = time.time() - time.clock_gettime(time.CLOCK_MONOTONIC)
    started += int(shown.get("ExecMainStartTimestampMonotonic") or 0) / 1e6
    problem, changed = "", 0.0
    try:
        changed = os.stat(settings).st_mtime
        if not isinstance(_read(settings), dict):
            problem = "is no JSON object"
    except FileNotFoundError:  # all is as the engine has it
        pass
    except (OSError, ValueError) as error:
        problem = f"cannot be read: {getattr(error, 'strerror', None) or 'it is no JSON'}"
    with open(f"/proc/{pid}/cmdline", "rb") as source:
        words = source.read().decode("utf-8", "backslashreplace").split("\0")
    return {
        **found,
        "program": os.path.basename(words[0]),
        "options": [word.partition("=")[0] for word in words if word.startswith("-")],
        "api": str(version.get("ApiVersion")),
        "version": str(version.get("Version")),
        "security": [str(one) for one in info.get("SecurityOptions") or []],
        "cgroups": f"{info.get('CgroupDriver')} {info.get('CgroupVersion')}",
        "data": str(info.get("DockerRootDir")),
        "knows_runtime": runtime in (info.get("Runtimes") or {}),
        "has_image": _has_image(socket, image),
        "settings_problem": problem,
        "settings_unread": changed > started and changed > _last_reload(socket, started),
    }


def _unit(*properties: str) -> dict[str, str]:
    asked = ["systemctl", "show", f"--property={','.join(properties)}", UNIT]
    done = subprocess.run(asked, capture_output=True, stdin=subprocess.DEVNULL, timeout=60, check=False)
    return dict(line.partition("=")[::2] for line in done.stdout.decode("utf-8", "replace").split("\n") if line)


def _last_reload(path: str, since: float) -> float:
    """When the engine last read its settings again, as far as it remembers; 0 where it does not."""
    events = ask(
        path, "GET", "/events", since=f"{since:.0f}", until=f"{time.time():.9f}",
        filters={"type": ["daemon"], "event": ["reload"]},
    )  # fmt: skip
    return max((event["timeNano"] / 1e9 for event in events if event), default=0.0)


def _is_static(path: str) -> bool:
    """Whether a program runs without the machine's libraries: in a container there are none."""
    try:
        with open(path, "rb") as source:
            head = source.read(1 << 12)
        if head[:6] != b"\x7fELF\2\1":
            return False
        table, size, count = (*struct.unpack_from("<Q", head, 32), *struct.unpack_from("<HH", head, 54))
        return all(struct.unpack_from("<I", head, table + n * size)[0] != PT_INTERP for n in range(count))
    except (OSError, struct.error):
        return False


def _has_image(path: str, image: str) -> bool:
    return ask(path, "GET", f"/images/{image}/json", (404,)) is not None


# What a run has of it


def set_up(about: About, runtime: dict[str, str], program: str, vehicle: str) -> None:
    """Put the program of all containers in its place, and have the engine know the runtime. The journal is written."""
    with open(program, "rb") as source, open(vehicle, "wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    os.chmod(vehicle, 0o755)
    agent.write(runtime["path"], base64.b64encode(runtime["script"].encode()).decode(), mode=0o755)
    agent.relabel([runtime["path"]])
    if os.path.exists(agent.ENFORCE):  # as every file of a container's tree is labelled
        done = agent.run(["chcon", "--type", "container_file_t", vehicle])
        if done["exit_code"] != 0:
            raise Refused("SELinux's policy has no container_file_t: install its part for containers")
    _know(about, runtime["path"])
    _reload(about, known=True)


def _read(settings: str) -> Any:
    with open(settings, encoding="utf-8") as source:
        return json.load(source)


def _know(about: About, runtime: str) -> None:
    """Have the engine's settings name our runtime, or where it is empty no longer, and the others as they do.

    What they do not say at all, the engine would keep as it was: so they name an empty set rather than none.
    """
    settings = about["settings"]
    there = os.path.exists(settings)
    found = _read(settings) if there else {}
    if not isinstance(found, dict):
        raise Refused(f"{settings}: is no JSON object")
    others = {name: one for name, one in (found.get("runtimes") or {}).items() if name != about["runtime"]}
    found["runtimes"] = {**others, **({about["runtime"]: {"path": runtime}} if runtime else {})}
    os.makedirs(os.path.dirname(settings), exist_ok=True)
    draft = f"{settings}.lsmlab-new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(draft)  # of a run that was killed
    fresh = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fresh, "w", encoding="utf-8") as target:  # by a rename: an engine that starts finds it whole
        json.dump(found, target, indent=4)
        target.flush()
        os.fsync(target.fileno())
    if there:
        was = os.stat(settings)
        os.chown(draft, was.st_uid, was.st_gid)
        os.chmod(draft, stat.S_IMODE(was.st_mode))
    else:
        os.chmod(draft, 0o644)
    os.rename(draft, settings)
    agent.relabel([settings])


def _reload(about: About, *, known: bool) -> None:
    """Have the engine read its settings again, and wait until it knows our runtime, or knows it no longer."""
    os.kill(_pid(), signal.SIGHUP)
    deadline = time.monotonic() + RELOAD_SECONDS
    while (about["runtime"] in (ask(about["socket"], "GET", "/info").get("Runtimes") or {})) is not known:
        if time.monotonic() > deadline:
            does = "does not know" if known else "still knows"
            raise Refused(
                f"the container engine was told to read {about['settings']} again, and {does} the runtime "
                f"{about['runtime']}: `journalctl --unit {UNIT}` there may say why"
            )
        time.sleep(0.1)


def _pid() -> int:
    pid = int(_unit("MainPID").get("MainPID") or 0)
    if not pid:
        raise Refused(f"{UNIT} does not run: what it has of lsmlab is known to it alone; `systemctl start {UNIT}`")
    return pid


def look(about: About) -> State:
    """What of ours the engine has. Raises Refused where it does not run: it is not started for this."""
    _pid()
    path = about["socket"]
    listed = ask(path, "GET", "/containers/json", all="1", filters={"label": [f"{LABEL}={about['word']}"]})
    containers = {}
    for one in listed:
        said = (ask(path, "GET", f"/containers/{one['Id']}/json", (404,)) or {}).get("State") or {}
        containers[one["Id"]] = [said.get("Running"), said.get("Pid"), said.get("StartedAt")]
    return {
        "containers": containers,
        "image": _has_image(path, about["image"]),
        "runtime": about["runtime"] in (ask(path, "GET", "/info").get("Runtimes") or {}),
    }


def remove_containers(about: About, was: State, now: State, problems: Problems) -> list[str]:
    """Remove the containers of ours that were not there; what was removed."""
    done = []
    for number in now["containers"].keys() - was["containers"].keys():
        with problems.going_on(f"container {number[:12]}"):
            ask(about["socket"], "DELETE", f"/containers/{number}", (404,), force="1", v="1")
            done.append(f"container {number[:12]}")
    return done


def put_back(about: About, was: State, now: State, problems: Problems) -> list[str]:
    """Have the engine hold nothing of ours that it did not hold. Before the files: our runtime ends our containers."""
    done = remove_containers(about, was, now, problems)
    if now["image"] and not was["image"]:
        with problems.going_on(f"image {about['image']}"):
            ask(about["socket"], "DELETE", f"/images/{about['image']}:latest", (404,))
            done.append(f"image {about['image']}")
    if now["runtime"] and not was["runtime"]:
        with problems.going_on(f"runtime {about['runtime']}"):
            _know(about, "")
            _reload(about, known=False)
            done.append(f"runtime {about['runtime']}")
    return done


def differences(was: State, now: State) -> list[str]:
    """What the engine has of ours otherwise than it had, in words."""
    before, after = was["containers"], now["containers"]
    words = [
        f"container {n[:12]}: another" for n in sorted(before.keys() | after.keys()) if before.get(n) != after.get(n)
    ]
    return words + [f"the engine's {what}: another" for what in ("image", "runtime") if was[what] != now[what]]


# Its answers to others


def response(data: bytes) -> tuple[int, bytes]:
    """Status and body of an HTTP answer. Raises Refused where it is none, or not whole."""

    class Received:
        def makefile(self, *_: Any) -> io.BytesIO:
            return io.BytesIO(data)

    source = http.client.HTTPResponse(Received())  # type: ignore[arg-type] # all that it asks of a socket
    try:
        source.begin()
        body = source.read()
    except (http.client.HTTPException, ValueError, OSError):
        raise Refused("the container engine's answer is no whole HTTP") from None
    if source.length:
        raise Refused("the container engine's answer ended early")
    return source.status, body


def streams(data: bytes) -> tuple[bytes, bytes]:
    """A command's two outputs, which come in one. Raises Refused where they are not whole."""
    found = {1: bytearray(), 2: bytearray()}
    at = 0
    while at < len(data):
        if len(data) - at < FRAME.size:
            raise Refused("the output of the command in the container is not whole")
        stream, length = FRAME.unpack_from(data, at)
        at += FRAME.size
        if stream not in found or length > len(data) - at:
            raise Refused("the output of the command in the container is not whole")
        found[stream] += data[at : at + length]
        at += length
    return bytes(found[1]), bytes(found[2])


OPERATIONS: dict[str, Callable[..., Any]] = {f.__name__: f for f in (engine_state,)}
