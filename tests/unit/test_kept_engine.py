"""A container engine on a machine that is kept, without one: what it is asked, what is told of it, what is undone."""

from __future__ import annotations

import base64
import json
import os
import signal
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from builders import AUID, audit_state, exec_record, mode, run_attempt, subject, user_record, wire
from test_containers import APPARMOR, ENFORCE, SELINUX

from fake_engine import FakeEngine, frame
from fakes import ScriptedChannel
from lsmlab import attempt, facts
from lsmlab.channel.base import Channel
from lsmlab.container import install, kept
from lsmlab.container.engine import Engine
from lsmlab.container.spec import Container
from lsmlab.errors import ChannelError, EngineError, FrameworkError
from lsmlab.guest import agent, canaries, engine, kernel, undo
from lsmlab.guest.agent import Refused
from lsmlab.guest.files import Problems

pytestmark = pytest.mark.container

WORD = "0123456789abcdef" * 2
OURS, THEIRS, EXEC = "a1" * 32, "b2" * 32, "e3" * 32
LEAKED = "root:$y$j9T$secret:20000:0:99999:7:::"
SYSTEMCTL = """#!/bin/sh
echo LoadState=loaded
echo MainPID=$(cat "$LSMLAB_TEST/pid")
echo ExecMainStartTimestampMonotonic=1
"""


class There:
    """An engine that has one container of somebody else's, its settings, and a process that takes its signals."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = folder / "docker" / "daemon.json"
        self.containers: dict[str, dict[str, Any]] = {THEIRS: {"label": "", "name": "shop"}}
        self.images: set[str] = {"theirs"}
        self.runtimes: set[str] = {"runc"}
        self.reloads = 0
        self.read_again = True
        self.fake = FakeEngine(folder / "engine.sock", {})
        self.fake.routes = _Routes(self)
        (folder / "pid").write_text(str(os.getpid()))

    @property
    def about(self) -> dict[str, Any]:
        return {"socket": self.fake.path, "settings": str(self.settings), "runtime": "lsmlab", "image": "lsmlab",
                "word": WORD}  # fmt: skip

    def reload(self, *_: Any) -> None:
        self.reloads += 1
        if not self.read_again:
            return
        found = json.loads(self.settings.read_text()) if self.settings.exists() else {}
        if "runtimes" in found:  # as dockerd does: what is not said stays as it was
            self.runtimes = {"runc", *found["runtimes"]}

    def answer(self, line: str, body: Any) -> tuple[int, Any]:
        method, path = line.split(" ")
        first, *rest = path.strip("/").split("/")
        about = {
            "Runtimes": {name: {} for name in self.runtimes}, "SecurityOptions": ["name=apparmor"], "Name": "secret",
            "CgroupDriver": "systemd", "CgroupVersion": "2", "DockerRootDir": "/var/lib/docker",
        }  # fmt: skip
        known: dict[str, Any] = {
            "/version": {"ApiVersion": "1.45", "Version": "26.1.5", "KernelVersion": "secret"},
            "/info": about,
            "/events": b'{"timeNano": 5000000000}\n',
            "/containers/json": [{"Id": n} for n, one in self.containers.items() if one["label"] == WORD],
            f"/exec/{EXEC}/json": {"ExitCode": 0, "ContainerID": OURS, "secret": 1},
        }
        if path in known:
            return 200, known[path]
        if path == "/images/create":
            self.images.add("lsmlab")
            return 200, {"status": "x"}
        return (self._image if first == "images" else self._container)(method, rest, body)

    def _image(self, method: str, path: list[str], _: Any) -> tuple[int, Any]:
        name = path[0].partition(":")[0]
        if name not in self.images:
            return 404, {"message": "no such image"}
        if method == "DELETE":
            self.images.discard(name)
        return 200, {"Id": "sha256:1", "Author": "secret"}

    def _container(self, method: str, path: list[str], body: Any) -> tuple[int, Any]:
        if path == ["create"]:
            self.containers[OURS] = {"label": (body.get("Labels") or {}).get(engine.LABEL), "body": body}
            return 201, {"Id": OURS, "Warnings": ["secret"]}
        if path[0] not in self.containers:
            return 404, {"message": "no such container"}
        if method == "DELETE":
            del self.containers[path[0]]
            return 204, b""
        if path[-1] == "exec":
            return 201, {"Id": EXEC}
        state = {"Running": True, "Pid": 7, "StartedAt": "noon", "ExitCode": 0, "Error": "secret"}
        return 200, {"Id": path[0], "State": state, "Config": {"Tty": False, "Env": ["secret"]}}


class _Routes(dict[str, Any]):
    def __init__(self, there: There) -> None:
        super().__init__()
        self.there = there

    def get(self, line: str, _: Any = None) -> Any:
        return lambda body: self.there.answer(line, body)


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[There]:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "systemctl").write_text(SYSTEMCTL)
    (programs / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("LSMLAB_TEST", str(tmp_path))
    monkeypatch.setattr(engine, "RELOAD_SECONDS", 1.0)
    monkeypatch.setattr(agent, "ENFORCE", str(tmp_path / "none"))
    made = There(tmp_path)
    before = signal.signal(signal.SIGHUP, made.reload)
    yield made
    signal.signal(signal.SIGHUP, before)
    made.fake.close()


@pytest.fixture
def no_frameworks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose kernel has none, and no audit rules: this one's are nothing to a test."""
    monkeypatch.setattr(kernel, "SELINUX", str(tmp_path / "no"))
    monkeypatch.setattr(kernel, "APPARMOR", str(tmp_path / "no"))
    monkeypatch.setattr(kernel, "audit_rules", list)


def set_up(there: There) -> None:
    script = {"path": str(there.folder / "runtime"), "script": "#!/bin/sh\n"}
    engine.set_up(there.about, script, "/bin/sh", str(there.folder / "vehicle"))


# What a run has of it, and the way back


@pytest.mark.parametrize(
    "settings", [None, {}, {"debug": True}, {"runtimes": {"nvidia": {"path": "/usr/bin/nvidia"}}, "labels": ["a"]}]
)
def test_the_engine_knows_the_runtime_for_the_run_alone(there: There, settings: dict[str, Any] | None) -> None:
    others = set((settings or {}).get("runtimes", {}))
    if settings is not None:
        there.settings.parent.mkdir()
        there.settings.write_text(json.dumps(settings))
        there.settings.chmod(0o600)
        there.runtimes |= others
        there.settings.with_name("daemon.json.lsmlab-new").write_text("of a run that was killed")
    was = engine.look(there.about)
    assert was == {"containers": {}, "image": False, "runtime": False}
    set_up(there)
    merged = json.loads(there.settings.read_text())
    assert merged["runtimes"].pop("lsmlab") == {"path": str(there.folder / "runtime")}
    assert merged == {**(settings or {}), "runtimes": (settings or {}).get("runtimes", {})}
    assert there.settings.stat().st_mode & 0o777 == (0o644 if settings is None else 0o600)
    assert there.runtimes == {"runc", "lsmlab", *others}
    assert os.access(there.folder / "runtime", os.X_OK) and (there.folder / "vehicle").stat().st_size > 1000
    there.containers[OURS] = {"label": WORD}
    there.images.add("lsmlab")
    problems = Problems()
    now = engine.look(there.about)
    assert engine.differences(was, now) == [
        f"container {OURS[:12]}: another", "the engine's image: another", "the engine's runtime: another",
    ]  # fmt: skip
    done = engine.put_back(there.about, was, now, problems)
    assert (problems.words, len(done)) == ([], 3)
    assert engine.differences(was, engine.look(there.about)) == []
    assert there.runtimes == {"runc", *others}, "also where the settings name no runtime at all"
    assert there.containers.keys() == {THEIRS} and there.images == {"theirs"}
    assert not [line for line, _ in there.fake.asked if THEIRS in line], "nobody else's container is looked into"


def test_an_engine_that_does_not_obey_is_said(there: There) -> None:
    there.read_again = False
    with pytest.raises(Refused, match=r"was told to read .*daemon.json again, and does not know the runtime lsmlab"):
        set_up(there)
    there.runtimes.add("lsmlab")
    problems = Problems()
    was = {"containers": {}, "image": False, "runtime": False}
    assert engine.put_back(there.about, was, engine.look(there.about), problems) == []
    assert "still knows the runtime lsmlab" in problems.words[0]


def test_an_engine_that_does_not_run_is_not_started_to_undo(there: There) -> None:
    (there.folder / "pid").write_text("0")
    with pytest.raises(Refused, match=r"docker\.service does not run.*systemctl start"):
        engine.look(there.about)
    state = engine.engine_state(there.fake.path, str(there.settings), "lsmlab", "lsmlab")
    assert state["installed"] and not state["pid"]
    assert there.fake.asked == [], "a socket that is asked would start it"


def test_settings_that_are_no_object_are_left_alone(there: There) -> None:
    there.settings.parent.mkdir()
    there.settings.write_text("[]")
    with pytest.raises(Refused, match="is no JSON object"):
        set_up(there)
    assert there.settings.read_text() == "[]"


@pytest.mark.parametrize("named", ["image", "runtime"])
def test_what_somebody_called_as_we_do_meanwhile_is_not_taken(
    there: There, no_frameworks: None, tmp_path: Path, named: str
) -> None:
    there.settings.parent.mkdir()
    {"image": there.images, "runtime": there.runtimes}[named].add("lsmlab")
    journal = undo.Journal(str(tmp_path / "journal"))
    with pytest.raises(agent.Refused, match="has an image or a runtime called lsmlab already"):
        journal.begin("x", [str(there.settings.parent)], [], (), there.about)
    assert "lsmlab" in {"image": there.images, "runtime": there.runtimes}[named]


def test_the_journal_undoes_the_engine_also_after_a_kill(there: There, no_frameworks: None, tmp_path: Path) -> None:
    there.settings.parent.mkdir()
    there.settings.write_text('{"debug": true}')
    os.utime(there.settings, ns=(1, 10**18))
    journal = undo.Journal(str(tmp_path / "journal"))
    journal.begin("x", [str(there.settings.parent)], [], (), there.about)
    assert journal.engine_word == WORD
    set_up(there)
    journal.mark("set-up")
    there.containers[OURS] = {"label": WORD}
    assert journal.restore("set-up") == [f"container {OURS[:12]}"]
    assert there.runtimes == {"runc", "lsmlab"}, "what was there at the mark stays"
    there.containers[OURS] = {"label": WORD}
    there.images.add("lsmlab")
    journal._drop()
    again = undo.Journal(str(tmp_path / "journal"))
    assert again.take_up()
    done = again.end()
    assert {"image lsmlab", "runtime lsmlab", f"container {OURS[:12]}", str(there.settings)} <= set(done)
    assert there.containers.keys() == {THEIRS} and there.images == {"theirs"} and there.runtimes == {"runc"}
    assert (there.settings.read_text(), there.settings.stat().st_mtime_ns) == ('{"debug": true}', 10**18)
    assert not (tmp_path / "journal").exists() and again.engine_word == ""


def test_what_the_engine_still_has_keeps_the_journal(there: There, no_frameworks: None, tmp_path: Path) -> None:
    there.settings.parent.mkdir()
    journal = undo.Journal(str(tmp_path / "journal"))
    journal.begin("x", [str(there.settings.parent)], [], (), there.about)
    (there.settings.parent / "x").write_text("x")
    (there.folder / "pid").write_text("0")
    with pytest.raises(Refused, match=r"docker\.service does not run"):
        journal.end()
    assert not (there.settings.parent / "x").exists(), "the files are put back all the same"
    assert journal.status() is not None
    (there.folder / "pid").write_text(str(os.getpid()))
    journal.end()
    assert journal.status() is None


# What is told of it


class OnAKeptMachine(ScriptedChannel):
    """A channel to the operations of a machine that is kept, in this process."""

    def ask(self, operation: str, *, within: float = 30, **arguments: Any) -> Any:
        try:
            return json.loads(json.dumps(canaries.OPERATIONS[operation](**arguments)))
        except (OSError, Refused) as error:
            raise ChannelError(f"web1: {operation}: {error}") from error


@pytest.fixture
def channel(there: There, monkeypatch: pytest.MonkeyPatch) -> Channel:
    monkeypatch.setattr(undo, "engine_word", lambda: WORD)
    monkeypatch.setattr(canaries, "_ours", set())
    return OnAKeptMachine()


def raw(method: str, path: str, body: bytes = b"") -> str:
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    return base64.b64encode(head.encode() + body).decode()


def told(there: There, method: str, path: str, body: bytes = b"") -> str:
    return base64.b64decode(canaries.exchange(there.fake.path, raw(method, path, body), 10)["out"]).decode()


def test_the_sdk_makes_a_container_there_that_can_be_found_again(there: There, channel: Channel) -> None:
    reached = Engine(channel, there.fake.path, vehicle="/there/vehicle")
    reached.load_image()
    running = reached.start(Container(), ENFORCE, name="subject", unconfined=False, group=install.SLICE)
    assert running.id == OURS
    body = there.containers[OURS]["body"]
    assert body["Labels"] == {engine.LABEL: WORD}
    assert body["HostConfig"]["Binds"] == ["/there/vehicle:/bin/busybox:ro"]
    assert running.last_words() == "", "a container's log does not leave the machine"
    number, _ = running.prepare(("cat", "/x"))
    assert (number, running.exit_code(number)) == (EXEC, 0)


def test_of_the_engine_s_answers_only_what_is_needed_comes(there: There, channel: Channel) -> None:
    told(there, "POST", "/v1.45/containers/create?name=subject", b"{}")
    told(there, "POST", f"/v1.45/containers/{OURS}/exec", b"{}")
    answers = [
        told(there, "GET", "/version"), told(there, "GET", "/v1.45/info"),
        told(there, "GET", f"/containers/{OURS}/json"), told(there, "GET", f"/exec/{EXEC}/json"),
        told(there, "GET", "/images/lsmlab/json"),
    ]  # fmt: skip
    assert not [answer for answer in answers if "secret" in answer]
    assert '"SecurityOptions": ["name=apparmor"]' in answers[1]
    assert '"State": {"Running": true, "ExitCode": 0}, "Config": {"Tty": false}' in answers[2]
    assert "no such image" in told(there, "GET", "/images/lsmlab/json") or "lsmlab" in there.images


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", f"/containers/{THEIRS}/json"), ("POST", f"/containers/{THEIRS}/exec"), ("GET", f"/exec/{THEIRS}/json"),
        ("GET", f"/v1.45/containers/{OURS}/logs"), ("GET", f"/containers/{OURS}/archive"), ("GET", "/containers/json"),
        ("POST", f"/containers/{OURS}/attach"), ("POST", f"/exec/{EXEC}/start"), ("DELETE", f"/containers/{THEIRS}"),
        ("POST", f"/containers/{THEIRS}/stop"), ("GET", "/images/json"), ("GET", "/events"),
        ("POST", "/volumes/create"),
        ("GET", f"/containers/{OURS}/../{THEIRS}/json"),
    ],
)  # fmt: skip
def test_nothing_else_is_asked(there: There, channel: Channel, method: str, path: str) -> None:
    canaries._ours.update({OURS, EXEC})
    with pytest.raises(Refused, match=r"is none of lsmlab's|is not asked on a machine that is kept"):
        told(there, method, path)
    assert there.fake.asked == []


def test_before_the_journal_nothing_is_made(there: There, channel: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(undo, "engine_word", lambda: "")
    assert "1.45" in told(there, "GET", "/version")
    for path in ("/containers/create", "/images/create"):
        with pytest.raises(Refused, match="before the journal is written"):
            told(there, "POST", path, b"{}")


def test_an_undoing_waits_for_the_container_that_is_being_made(
    there: There, channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    begun = threading.Event()
    real = there.answer

    def slowly(line: str, body: Any) -> tuple[int, Any]:
        begun.set()
        time.sleep(0.3)
        order.append("made")
        return real(line, body)

    monkeypatch.setattr(there, "answer", slowly)
    asking = threading.Thread(target=told, args=(there, "POST", "/containers/create?name=x", b"{}"))
    asking.start()
    assert begun.wait(10)
    with undo.turn():
        order.append("undone")
    asking.join(10)
    assert order == ["made", "undone"]


def exec_attempt(there: There, monkeypatch: pytest.MonkeyPatch, answer: Any) -> dict[str, Any]:
    """An attempt in a container, whose engine answers with `answer` to the request that runs the command."""
    canaries._ours.update({OURS, EXEC})
    closed = {"log": "", "subject": {"processes": []}}
    monkeypatch.setattr(agent, "close_window", lambda **_: closed)
    monkeypatch.setattr(agent, "pids", lambda _: [])
    monkeypatch.setattr(undo, "remember", lambda _: None)
    monkeypatch.setattr(there, "answer", lambda *_: answer)
    keep = {"texts": ["lsmlab-word:"], "patterns": ["Permission denied"], "auid": 7}
    request = {"path": there.fake.path, "data": raw("POST", f"/v1.45/exec/{EXEC}/start"), "timeout": 5}
    return canaries.attempt(close={"unit": "x", "word": "y"}, keep=keep, engine=request)["result"]  # type: ignore[no-any-return]


def test_of_a_command_s_output_only_foreseen_words_leave(
    there: There, channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err = f"{LEAKED}lsmlab-word:!::\n", f"cat: {LEAKED}: Permission denied\n"
    half = len(out) // 2
    pieces = frame(1, out[:half].encode()) + frame(2, err.encode()) + frame(1, out[half:].encode())
    result = exec_attempt(there, monkeypatch, (200, pieces))
    assert base64.b64decode(result["out"]).decode() == "lsmlab-word:"
    assert base64.b64decode(result["err"]).decode() == "Permission denied"
    assert result["withheld"] == len(out) + len(err) - len("lsmlab-word:Permission denied")
    assert "secret" not in json.dumps(result) and base64.b64encode(LEAKED.encode())[:16].decode() not in str(result)


def test_an_attempt_in_a_container_there_from_its_request_to_what_is_kept(
    there: There, channel: OnAKeptMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = Engine(channel, there.fake.path)
    running = reached.start(Container(), ENFORCE, name="subject", unconfined=False, group=install.SLICE)
    remembered: list[int] = []
    monkeypatch.setattr(install, "SOCKET", there.fake.path)
    monkeypatch.setattr(undo, "remember", remembered.append)
    monkeypatch.setattr(agent, "pids", lambda _: [])
    monkeypatch.setattr(agent, "plant", lambda **_: True)
    answer = there.answer

    def answered(line: str, body: Any) -> tuple[int, Any]:
        leaks = line == f"POST /exec/{EXEC}/start"
        return (200, frame(1, LEAKED.encode()) + frame(2, b"Permission denied")) if leaks else answer(line, body)

    def closed(word: str, **_: Any) -> dict[str, Any]:
        own = exec_record(subject="docker-default").replace(f"auid={AUID}", f"auid={remembered[0]}")
        log = f"{own}\n{user_record(word)}\n"
        return {"log": log, "problem": "", "subject": wire(subject()), "mode": wire(mode(ENFORCE)),
                "audit": audit_state(size=len(log))}  # fmt: skip

    monkeypatch.setattr(there, "answer", answered)
    monkeypatch.setattr(agent, "close_window", closed)
    opened = attempt.Opened(
        subject=subject(), object=None, mode=mode(ENFORCE), audit=facts.AuditState(**audit_state(size=0))
    )
    seen = attempt.make(channel, run_attempt(), install.SLICE, opened, running, withhold=True)
    assert (seen.output, seen.errors, seen.exit_code) == ("", "Permission denied", 0)
    assert seen.withheld == len(LEAKED) and remembered == [seen.auid]
    assert f"auid={seen.auid}" in seen.log, "of the log what bears the attempt's mark"
    assert "secret" not in seen.model_dump_json()


@pytest.mark.parametrize(
    "pieces",
    [
        frame(1, LEAKED.encode())[:-3], frame(3, LEAKED.encode()), LEAKED.encode(), frame(1, b"x") + b"\1",
        struct.pack(">BxxxI", 1, 1 << 30) + LEAKED.encode(),
    ],
)  # fmt: skip
def test_an_output_that_is_not_whole_leaves_nothing(
    there: There, channel: Channel, monkeypatch: pytest.MonkeyPatch, pieces: bytes
) -> None:
    with pytest.raises(Refused, match="is not whole") as caught:
        exec_attempt(there, monkeypatch, (200, pieces))
    assert "secret" not in str(caught.value)


def test_a_command_that_takes_too_long_or_says_too_much_leaves_nothing(
    there: There, channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {"out": base64.b64encode(LEAKED.encode()).decode(), "err": "", "timed_out": True, "too_much": False}
    for end in ({"timed_out": True, "too_much": False}, {"timed_out": False, "too_much": True}):
        monkeypatch.setattr(agent, "exchange", lambda *_, end=end, **__: said | end)
        assert exec_attempt(there, monkeypatch, None)["out"] == ""
        told_of_it = canaries.exchange(there.fake.path, raw("GET", "/version"), 1)
        assert told_of_it["out"] == ""


def test_a_command_that_the_engine_does_not_run_is_told_with_its_reason(
    there: There, channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Refused, match="the container runs no command: exec failed: no such file"):
        exec_attempt(there, monkeypatch, (400, {"message": "exec failed: no such file"}))


# Whether it will do


GOOD: dict[str, Any] = {
    "installed": True, "pid": 7, "runc": "/usr/bin/runc", "busybox": "/bin/busybox", "program": "dockerd",
    "options": ["-H", "--containerd"], "api": "1.45", "version": "26.1.5",
    "security": ["name=apparmor", "name=seccomp,profile=builtin", "name=cgroupns"], "cgroups": "systemd 2",
    "data": "/var/lib/docker", "knows_runtime": False, "has_image": False, "settings_problem": "",
    "settings_unread": False,
}  # fmt: skip
WILL_NOT_DO: list[tuple[dict[str, Any], str, str]] = [
    ({"installed": False, "pid": 0}, "there is no Docker Engine", "docker.io"),
    ({"pid": 0}, "does not run", "systemctl start"),
    ({"program": "podman"}, "no dockerd", "Install"),
    ({"api": "1.40"}, "too old: it speaks API 1.40, and 1.41 is needed", "20.10"),
    ({"api": "x"}, "is no Docker Engine", "Install"),
    ({"security": ["name=rootless", "name=apparmor"]}, "is rootless", "root's"),
    ({"security": ["name=userns", "name=apparmor"]}, "userns-remap", "docker-debian-13"),
    ({"cgroups": "cgroupfs 2"}, "cgroup driver and version are 'cgroupfs 2'", "native.cgroupdriver=systemd"),
    ({"cgroups": "systemd 1"}, "'systemd 1'", "cgroup v2"),
    ({"data": "/data/docker"}, "has its data in '/data/docker'", "guest"),
    ({"options": ["--config-file"]}, "started with --config-file", "daemon.json"),
    ({"options": ["--max-concurrent-downloads"]}, "goes back to its default", "daemon.json"),
    ({"options": ["--add-runtime"]}, "started with --add-runtime", "daemon.json"),
    ({"settings_problem": "is no JSON object"}, "daemon.json is no JSON object", "runtime"),
    ({"settings_unread": True}, "was changed since Docker Engine has read it", "systemctl reload docker"),
    ({"knows_runtime": True}, "has a runtime 'lsmlab' already", "replaced"),
    ({"has_image": True}, "has an image 'lsmlab' already", "docker rmi lsmlab"),
    ({"runc": ""}, "no runc", "containerd.io"),
    ({"busybox": ""}, "no static BusyBox", "busybox-static"),
]


@pytest.mark.parametrize(("changed", "why", "hint"), WILL_NOT_DO)
def test_an_engine_that_will_not_do_is_told_why_and_what_to_do(changed: dict[str, Any], why: str, hint: str) -> None:
    found = kept.look(ScriptedChannel((), {"engine_state": GOOD | changed}))
    with pytest.raises(EngineError) as caught:
        kept.need(found, "web1", [APPARMOR])
    assert why in caught.value.message and caught.value.message.startswith("web1: ")
    assert hint in caught.value.hint


def test_an_engine_without_the_framework_is_told_and_one_with_it_will_do() -> None:
    found = kept.look(ScriptedChannel((), {"engine_state": GOOD}))
    kept.need(found, "web1", [APPARMOR])
    with pytest.raises(FrameworkError, match="does not confine by SELinux there") as caught:
        kept.need(found, "web1", [APPARMOR, SELINUX])
    assert '"selinux-enabled": true' in caught.value.hint
    wanted = kept.for_journal(found)
    assert "exec /usr/bin/runc" in wanted["runtime"]["script"] and wanted["program"] == "/bin/busybox"
    assert len(wanted["about"]["word"]) == 32 != kept.for_journal(found)["about"]["word"]


def test_the_state_of_an_engine_is_read(there: There, monkeypatch: pytest.MonkeyPatch) -> None:
    def state() -> dict[str, Any]:
        return engine.engine_state(there.fake.path, str(there.settings), "lsmlab", "lsmlab")

    found = kept.EngineFacts.model_validate_json(json.dumps(state()))
    assert (found.pid, found.api, found.cgroups, found.settings_unread) == (os.getpid(), "1.45", "systemd 2", False)
    assert not found.has_image and not found.knows_runtime and found.settings_problem == ""
    there.settings.parent.mkdir()
    there.settings.write_text("{}")
    assert state()["settings_unread"], "written after the start, and not read again since"
    os.utime(there.settings, (1, 1))
    assert not state()["settings_unread"]
    monkeypatch.setattr(engine, "_last_reload", lambda *_: 1e12)
    there.settings.write_text("{")
    assert (state()["settings_problem"], state()["settings_unread"]) == ("cannot be read: it is no JSON", False)


def test_a_program_is_static_where_it_names_no_linker(tmp_path: Path) -> None:
    def program(*kinds: int) -> str:
        head = bytearray(64)
        head[:6] = b"\x7fELF\2\1"
        struct.pack_into("<Q", head, 32, 64)
        struct.pack_into("<HH", head, 54, 56, len(kinds))
        path = tmp_path / f"program-{'-'.join(map(str, kinds))}"
        path.write_bytes(bytes(head) + b"".join(struct.pack("<I52x", kind) for kind in kinds))
        return str(path)

    assert engine._is_static(program(1, 6))
    assert not engine._is_static(program(6, 3, 1))
    assert not engine._is_static("/no/such/file")
    (tmp_path / "script").write_text("#!/bin/sh\n")
    assert not engine._is_static(str(tmp_path / "script"))
    assert not engine._is_static(os.path.realpath("/bin/sh"))
