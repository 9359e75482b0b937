"""Containers without a guest: the SDK's way over the agent, hostile engines, options of an arm, a scenario's words."""

from __future__ import annotations

import base64
import io
import json
import re
import socketserver
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from builders import audit_state, exec_record, mode, run_observation, scenario, subject, user_record, wire
from docker.constants import DEFAULT_DOCKER_API_VERSION
from hypothesis import given
from hypothesis import strategies as st

from fake_engine import AgentChannel, Answer, FakeEngine, frame
from fakes import IMAGE as IMAGE_OF_NONE
from fakes import said
from lsmlab import attempt, discovery, facts, prepare, run, verdict
from lsmlab.channel.base import CommandResult
from lsmlab.container import engine, install, transport
from lsmlab.container.engine import Engine, Running, demultiplexed, options
from lsmlab.container.spec import Container
from lsmlab.errors import DefinitionError, EngineError, FrameworkError
from lsmlab.guest import agent
from lsmlab.scenario import Scenario
from lsmlab.terms import Arm, Framework, SourceState

pytestmark = pytest.mark.container

REPO = Path(__file__).resolve().parents[2]
SELINUX, APPARMOR = Framework.SELINUX, Framework.APPARMOR
ENFORCE = Arm.APPARMOR_ENFORCE
UNCONFINED = Arm.APPARMOR_UNCONFINED
Answered = CommandResult | Exception | Callable[[tuple[str, ...]], CommandResult]


VERSION: Answer = (200, {"ApiVersion": "1.45", "Version": "26.1.5"})
INFO: Answer = (200, {"SecurityOptions": ["name=apparmor", "name=seccomp,profile=builtin"]})
RUNS: Answer = (200, {"Id": "c1", "State": {"Running": True}, "Config": {"Tty": False}})
ENDED: Answer = (200, {"Id": "c1", "State": {"Running": False, "ExitCode": 3}, "Config": {"Tty": False}})


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeEngine]:
    server = FakeEngine(
        tmp_path / "engine.sock",
        {
            "GET /version": VERSION, "GET /info": INFO, "POST /containers/create": (201, {"Id": "c1"}),
            "POST /containers/c1/start": (204, b""), "GET /containers/c1/json": RUNS,
            "POST /containers/c1/exec": (201, {"Id": "e1"}),
        },
    )  # fmt: skip
    yield server
    server.close()


def connected(fake: FakeEngine) -> Engine:
    return Engine(AgentChannel(), fake.path)


def started(fake: FakeEngine, arm: Arm = ENFORCE, **container: Any) -> Running:
    given = Container.model_validate(container, strict=False)
    return connected(fake).start(given, arm, name="subject", unconfined=arm.unconfined, group=install.SLICE)


@pytest.fixture
def reached(fake: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """The engine is where a guest has it."""
    monkeypatch.setattr(install, "SOCKET", fake.path)
    monkeypatch.setattr(engine, "Engine", lambda channel, **more: Engine(channel, fake.path, **more))
    return fake


# The engine


def test_a_container_is_made_as_its_scenario_says(fake: FakeEngine) -> None:
    running = started(
        fake, run=["httpd", "-f"], binds=["/etc:/hostetc:ro"], cap_add=["SYS_ADMIN"], user="1000:1000", pid="host",
        security_opt=["seccomp=unconfined", "systempaths=unconfined", "apparmor=mine", "label=type:spc_t"],
    )  # fmt: skip
    assert (running.id, running.name) == ("c1", "subject")
    made = fake.sent("POST /containers/create")
    assert (made["Image"], made["Cmd"], made["User"]) == ("lsmlab", ["httpd", "-f"], "1000:1000")
    host = made["HostConfig"]
    assert host["Binds"] == ["/usr/lib/lsmlab/vehicle:/bin/busybox:ro", "/etc:/hostetc:ro"]
    assert host["SecurityOpt"] == ["seccomp=unconfined", "apparmor=mine"], "not SELinux's, in an arm of AppArmor"
    assert (host["MaskedPaths"], host["ReadonlyPaths"]) == ([], []), "what systempaths=unconfined stands for"
    assert (host["CapAdd"], host["PidMode"], host["NetworkMode"]) == (["SYS_ADMIN"], "host", "none")
    assert (host["CgroupParent"], host["Runtime"]) == ("system-lsmlab.slice", "lsmlab")
    assert not made.get("Env"), "nothing of this machine, such as its proxies, goes into a container"


def test_without_options_the_engine_decides(fake: FakeEngine) -> None:
    started(fake)
    host = fake.sent("POST /containers/create")["HostConfig"]
    assert "MaskedPaths" not in host and "PidMode" not in host
    assert not host.get("SecurityOpt") and not host.get("Privileged") and not host.get("CapAdd")


@pytest.mark.parametrize(
    ("framework", "unconfined", "wanted"),
    [
        (APPARMOR, False, ["seccomp=unconfined", "apparmor=mine"]),
        (APPARMOR, True, ["seccomp=unconfined", "apparmor=unconfined"]),
        (SELINUX, False, ["seccomp=unconfined", "label=type:a_t", "label=level:s0:c1,c2"]),
        (SELINUX, True, ["seccomp=unconfined", "label=disable"]),
    ],
)
def test_an_arm_has_its_frameworks_options_or_the_controls(
    framework: Framework, unconfined: bool, wanted: list[str]
) -> None:
    words = ("seccomp=unconfined", "systempaths=unconfined", "apparmor=mine", "label=type:a_t", "label=level:s0:c1,c2")
    assert options(Container(security_opt=words), framework, unconfined=unconfined) == wanted


def test_the_control_drops_the_mac_and_nothing_else(fake: FakeEngine) -> None:
    bodies = []
    for arm in (ENFORCE, UNCONFINED):
        started(fake, arm, binds=["/etc:/hostetc:ro"], cap_add=["SYS_PTRACE"], security_opt=["seccomp=unconfined"])
        bodies.append(fake.asked[-3][1])
    assert bodies[0]["HostConfig"].pop("SecurityOpt") == ["seccomp=unconfined"]
    assert bodies[1]["HostConfig"].pop("SecurityOpt") == ["seccomp=unconfined", "apparmor=unconfined"]
    assert bodies[0] == bodies[1]


def test_a_command_runs_in_a_container(fake: FakeEngine) -> None:
    running = started(fake)
    number, request = running.prepare(("cat", "/hostetc/shadow"))
    assert fake.sent("POST /containers/c1/exec")["Cmd"] == ["cat", "/hostetc/shadow"]
    fake.routes["POST /exec/e1/start"] = (200, frame(1, b"a\xff") + frame(2, b"no\n") + frame(1, b"b"))
    fake.routes["GET /exec/e1/json"] = (200, {"ExitCode": 1})
    answer = agent.exchange(fake.path, base64.b64encode(request).decode(), 10)
    found = running.output(transport.carried(answer, "x"))
    assert (found.out, found.err, running.exit_code(number)) == (b"a\xffb", b"no\n", 1)
    assert fake.sent("POST /exec/e1/start") == {"Tty": False, "Detach": False}


@pytest.mark.parametrize("code", [None, -1, 256, "0", True])
def test_a_command_without_an_exit_status_has_not_ended(fake: FakeEngine, code: Any) -> None:
    running = started(fake)
    fake.routes["GET /exec/e1/json"] = (200, {"ExitCode": code})
    with pytest.raises(EngineError, match="has not ended"):
        running.exit_code("e1")


# What is wrong with an engine, or with a container


def test_an_engine_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"no container engine answers on /.*: .*No such file") as caught:
        Engine(AgentChannel(), str(tmp_path / "none.sock"))
    assert "systemctl status docker" in caught.value.hint


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ({"ApiVersion": "1.40"}, "too old: it speaks API 1.40, and 1.41 is needed"),
        ({"ApiVersion": "0.99"}, "too old"),
        ({"ApiVersion": "soon"}, "is no container engine: API version 'soon'"),
        ({"ApiVersion": 1.45}, "is no container engine"),
        ({"Version": "26"}, "is no container engine: API version None"),
        ([], "is no container engine"),
        (b"<html>nginx</html>", "the container engine: "),
    ],
)
def test_what_answers_is_too_old_or_no_engine(fake: FakeEngine, version: Any, words: str) -> None:
    fake.routes["GET /version"] = (200, version)
    with pytest.raises(EngineError, match=re.escape(words)):
        connected(fake)


@pytest.mark.parametrize(("said", "spoken"), [("1.41", "1.41"), ("1.9999", "ours"), ("2.0", "ours")])
def test_the_older_of_both_versions_is_spoken(fake: FakeEngine, said: str, spoken: str) -> None:
    fake.routes["GET /version"] = (200, {"ApiVersion": said})
    wanted = DEFAULT_DOCKER_API_VERSION if spoken == "ours" else spoken
    assert connected(fake)._client.api_version == wanted


def test_a_host_without_the_framework_is_an_error_and_no_control(fake: FakeEngine) -> None:
    connected(fake).need(APPARMOR)
    with pytest.raises(FrameworkError, match="does not confine by SELinux: its host's kernel lacks it"):
        connected(fake).need(SELINUX)
    fake.routes["GET /info"] = (200, {"SecurityOptions": None})
    with pytest.raises(FrameworkError, match="does not confine by AppArmor"):
        connected(fake).need(APPARMOR)


def test_a_container_that_ends_at_once_shows_its_last_words(fake: FakeEngine) -> None:
    fake.routes["GET /containers/c1/json"] = ENDED
    fake.routes["GET /containers/c1/logs"] = (200, frame(1, b"reading config\n") + frame(2, b"no config\n"))
    with pytest.raises(EngineError) as caught:
        started(fake)
    assert caught.value.message == (
        "the container subject ended at once, with exit status 3\n  subject: reading config\n  subject: no config"
    )


def test_the_engines_own_words_are_said(fake: FakeEngine) -> None:
    fake.routes["POST /containers/c1/start"] = (500, {"message": "error mounting /etc: permission denied"})
    with pytest.raises(EngineError, match="the container engine: error mounting /etc: permission denied"):
        started(fake)
    fake.routes["POST /containers/c1/start"] = (204, b"")
    running = started(fake)
    fake.routes["POST /containers/c1/exec"] = (409, {"message": "container c1 is not running"})
    fake.routes["GET /containers/c1/logs"] = (200, frame(2, b"killed\n"))
    with pytest.raises(EngineError, match=r"container c1 is not running\n  subject: killed"):
        running.prepare(("true",))


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "without an answer"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "no whole HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort", "no whole HTTP"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nshort", "no whole HTTP"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "no whole HTTP"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n100000000000000AA", "no whole HTTP"),
        (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n", "no whole HTTP"),
        (b"HTTP/1.1 9x9 OK\r\n\r\n", "no whole HTTP"),
    ],
)
def test_an_answer_that_is_not_whole_is_an_error(raw: bytes, words: str) -> None:
    with pytest.raises(EngineError, match=words):
        transport.read_response(raw, "GET /info")


@given(st.binary(max_size=300))
def test_no_bytes_of_an_engine_are_more_than_an_error_or_an_answer(raw: bytes) -> None:
    for data in (raw, b"HTTP/1.1 200 OK\r\n" + raw, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + raw):
        found: requests.Response | EngineError
        try:
            found = transport.read_response(data, "GET /")
        except EngineError as error:
            found = error
        assert isinstance(found, requests.Response) or found.message.startswith("GET /: ")


@pytest.mark.parametrize(
    "answer", [None, [], {}, {"out": "%", "timed_out": False, "too_much": False}, {"out": 1}, {"out": ""}]
)
def test_an_agent_that_answers_nonsense_is_an_error(answer: Any) -> None:
    with pytest.raises(EngineError, match="nonsense"):
        transport.carried(answer, "GET /")


@pytest.mark.parametrize(("key", "words"), [("timed_out", "no answer in time"), ("too_much", "a longer answer")])
def test_an_answer_that_was_cut_is_an_error(key: str, words: str) -> None:
    answer = {"out": "", "timed_out": False, "too_much": False} | {key: True}
    with pytest.raises(EngineError, match=words):
        transport.carried(answer, "GET /")


@given(st.lists(st.tuples(st.sampled_from([1, 2]), st.binary(max_size=40))))
def test_two_streams_come_apart_as_they_went_in(pieces: list[tuple[int, bytes]]) -> None:
    found = demultiplexed(b"".join(frame(stream, data) for stream, data in pieces))
    assert found.out == b"".join(data for stream, data in pieces if stream == 1)
    assert found.err == b"".join(data for stream, data in pieces if stream == 2)


@pytest.mark.parametrize("data", [b"\x01\0\0", frame(1, b"abc")[:-1], frame(3, b"x"), frame(0, b""), b"plain text"])
def test_output_that_is_not_whole_is_an_error(data: bytes) -> None:
    with pytest.raises(EngineError, match="the output of the command in the container"):
        demultiplexed(data)


def test_a_request_goes_as_it_is_and_its_connection_is_its_own() -> None:
    asked = requests.Request("POST", "http://engine:1/v1.41/x?a=b%20c", data=b"\r\n\x00", headers={"X-A": "b"})
    raw = transport.message(requests.Session().prepare_request(asked))
    head, _, body = raw.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    assert (first, body) == ("POST /v1.41/x?a=b%20c HTTP/1.1", b"\r\n\x00")
    assert {"Host: engine", "Connection: close", "Content-Length: 3", "X-A: b"} <= set(lines)
    assert sum(line.lower().startswith(("connection:", "host:", "content-length:")) for line in lines) == 3
    asked.data = iter([b"piece"])
    with pytest.raises(EngineError, match="in pieces"):
        transport.message(requests.Session().prepare_request(asked))


# The agent's side


def test_the_agent_waits_for_an_engine_no_longer_than_it_is_told(tmp_path: Path) -> None:
    class Silent(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(b"HTTP/1.1 200 OK\r\n")
            self.request.recv(1 << 16)
            self.request.recv(1)

    with socketserver.ThreadingUnixStreamServer(str(tmp_path / "s"), Silent) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = agent.exchange(str(tmp_path / "s"), base64.b64encode(b"GET").decode(), 0.3)
        server.shutdown()
    assert found["timed_out"] and not found["too_much"] and 0.2 < found["seconds"] < 5
    assert base64.b64decode(found["out"]) == b"HTTP/1.1 200 OK\r\n"


def test_the_agent_carries_only_so_much_of_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "MOST_OUTPUT", 1000)

    class Flood(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(10)
            try:
                while True:
                    self.request.sendall(b"x" * 4096)
            except OSError:
                pass

    with socketserver.ThreadingUnixStreamServer(str(tmp_path / "s"), Flood) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = agent.exchange(str(tmp_path / "s"), base64.b64encode(b"GET").decode(), 30)
        server.shutdown()
    assert found["too_much"] and len(base64.b64decode(found["out"])) == 1000


# What is put into a guest


def test_the_image_is_the_same_each_time_and_has_one_program() -> None:
    assert install.image_tar() == install.image_tar()
    with tarfile.open(fileobj=io.BytesIO(install.image_tar())) as tar:
        members = {m.name: m for m in tar.getmembers()}
        text = tar.extractfile("etc/passwd")
        assert text is not None and text.read().startswith(b"root:x:0:0:")
    assert {m.linkname for n, m in members.items() if n.startswith("bin/") and m.issym()} == {"busybox"}
    assert members["bin/busybox"].isreg() and members["bin/busybox"].size == 0, "the one that is mounted over it"
    assert members["tmp"].mode == 0o1777
    assert len(install.image_tar()) < 1 << 16


def test_the_runtime_marks_a_process_or_does_not_run_it(tmp_path: Path) -> None:
    words = install.RUNTIME_SCRIPT
    assert "/proc/self/loginuid || exit 1" in words
    assert words.rstrip().endswith('exec /usr/sbin/runc "$@"')
    assert install.AUID_PATH.startswith("/etc/docker/")


def coming_up(fake: FakeEngine, *, selinux: bool, starts: bool = True) -> AgentChannel:
    ended = said(code=0) if starts else said(err="Job for docker.service failed.", code=1)
    answers: list[tuple[str, Answered]] = [
        (r"cp |chmod |chcon |sync$", said()), (r"systemctl start docker.service$", ended),
        (r"test -e /sys/fs/selinux/enforce$", said(code=0 if selinux else 1)),
        (r"journalctl --unit docker.service ", said("failed to load listeners\n")),
    ]  # fmt: skip
    return AgentChannel(answers, {"relabel": None})


@pytest.mark.parametrize("selinux", [True, False])
def test_an_engine_finds_its_settings_when_it_starts(reached: FakeEngine, selinux: bool) -> None:
    reached.routes |= {"POST /images/create": (200, b"{}"), "GET /images/lsmlab/json": (200, {"Id": "i"})}
    channel = coming_up(reached, selinux=selinux)
    engine.bring_up(channel, ("docker.service", "docker.socket"))
    assert json.loads(channel.written["/etc/docker/daemon.json"])["selinux-enabled"] is True
    assert channel.rights[install.RUNTIME_PATH] == (0o755, None)
    start = channel.lines.index("systemctl start docker.service")
    assert {"cp /bin/busybox /usr/lib/lsmlab/vehicle", "ask relabel"} <= set(channel.lines[:start])
    labelled = [line for line in channel.lines if line.startswith("chcon")]
    assert labelled == (["chcon --type container_file_t /usr/lib/lsmlab/vehicle"] if selinux else [])
    assert reached.sent("POST /images/create") == install.image_tar()


def test_an_engine_that_does_not_start_shows_its_log(reached: FakeEngine) -> None:
    with pytest.raises(EngineError) as caught:
        engine.bring_up(coming_up(reached, selinux=False, starts=False), ("docker.service",))
    assert caught.value.message == (
        "the container engine does not start: Job for docker.service failed.\nfailed to load listeners\n"
    )
    reached.routes["POST /images/create"] = (500, {"message": "no space left on device"})
    with pytest.raises(EngineError, match="no space left on device"):
        engine.bring_up(coming_up(reached, selinux=False), ("docker.service",))


# A scenario's words


@pytest.mark.parametrize(
    ("container", "words"),
    [
        ({"binds": ["etc:/x"]}, "binds.0"),
        ({"binds": ["/etc"]}, "binds.0"),
        ({"binds": ["/etc:/x:rshared"]}, "binds.0"),
        ({"cap_add": ["CAP SYS"]}, "cap_add.0"),
        ({"security_opt": ["seccomp=/a.json"]}, "security_opt.0"),
        ({"security_opt": ["label=disable"]}, "security_opt.0"),
        ({"security_opt": ["label=level:c1"]}, "security_opt.0"),
        ({"network": "bridge"}, "network"),
        ({"pid": "container:x"}, "pid"),
        ({"user": "root"}, "user"),
        ({"run": []}, "run"),
        ({"image": "debian"}, "image"),
    ],
)
def test_a_containers_slips_are_told(container: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=rf"\n{re.escape(words)}"):
        Container.model_validate(container, strict=False)


def contained(**changes: Any) -> Scenario:
    base = {
        "control": "unconfined",
        "subject": {"container": {}, "selinux": "container_t", "apparmor": "docker-default"},
    }
    return scenario(**{**base, "attempts": ATTEMPTS, **changes})


ATTEMPTS = [
    {
        "id": "read-shadow", "kind": "attack", "run": ["cat", "/x"],
        "canary": {"file": "/etc/shadow", "line": "{canary}"}, "allowed_if": {"output": "{canary}"},
    },
]  # fmt: skip
HTTP = [
    {**{k: v for k, v in ATTEMPTS[0].items() if k != "run"}, "http": {"path": "/"}, "blocked_if": [{"status": 403}]}
]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"control": "dac"}, "needs `control: unconfined`"),
        ({"subject": {"container": {}, "service": "nginx", "selinux": "a_t", "apparmor": "b"}}, "expected one of"),
        ({"subject": {"service": "nginx", "beside": [{}], "selinux": "a_t", "apparmor": "b"}}, "`beside`"),
        ({"attempts": HTTP}, "no visitor reaches a container without `network: host`"),
    ],
)
def test_what_does_not_go_with_a_container(changes: dict[str, Any], words: str) -> None:
    assert contained().subject.name == "container"
    with pytest.raises(ValueError, match=re.escape(words)):
        contained(**changes)


@pytest.mark.parametrize(
    ("container", "selinux", "apparmor"),
    [
        ({}, True, True),
        ({"privileged": True}, False, False),
        ({"privileged": True, "security_opt": ("label=type:container_t", "apparmor=docker-default")}, False, False),
        ({"pid": "host"}, False, True),
        ({"pid": "host", "security_opt": ("label=type:container_t",)}, True, True),
        ({"pid": "host", "security_opt": ("label=type:spc_t",)}, False, True),
        ({"security_opt": ("label=type:spc_t",)}, False, True),
        ({"security_opt": ("label=level:s0:c1,c2",)}, True, True),
    ],
)
def test_who_is_its_own_control(container: dict[str, Any], selinux: bool, apparmor: bool) -> None:
    found = Container(**container)
    assert (found.confined_by(SELINUX), found.confined_by(APPARMOR)) == (selinux, apparmor)


def test_containers_are_run_where_an_engine_is() -> None:
    about, service = contained(), scenario()
    with_engine, without = discovery.load_lab("docker-debian-13", REPO), discovery.load_lab("debian-13", REPO)
    assert run.chosen([about, service], with_engine) == (about,)
    assert run.chosen([about, service], without) == (service,)
    assert prepare.plan_of(about, with_engine).unit == install.SLICE
    with pytest.raises(DefinitionError, match="lab debian-13 has no container engine") as caught:
        run.cases(run.chosen([about], without), without)
    assert "docker-debian-13" in caught.value.hint


def test_a_labs_engine_is_in_its_image_and_does_not_run_from_boot() -> None:
    with_engine, without = discovery.load_lab("docker-debian-13", REPO), discovery.load_lab("debian-13", REPO)
    assert with_engine.image is not None and without.image is not None
    assert set(with_engine.image.packages) - set(without.image.packages) == {"busybox-static", "docker.io"}
    more = set(with_engine.image.disabled_units) - set(without.image.disabled_units)
    assert more == {"docker.service", "docker.socket", "containerd.service"}
    assert with_engine.completed() == with_engine
    assert without.completed() is without


# An arm, and an attempt


def plan(**container: Any) -> prepare.Plan:
    about = contained(subject={"container": container, "selinux": "container_t", "apparmor": "docker-default"})
    return prepare.plan_of(about, discovery.load_lab("docker-debian-13", REPO))


def in_arm(profiles: dict[str, str]) -> AgentChannel:
    """A guest under AppArmor, in which nobody's container runs."""
    state = {"lsm": ["apparmor"], "selinux_enforcing": None, "profiles": profiles, "apparmor_mode": "enforce"}
    return AgentChannel(asked={"clock": None, "pids": [], "mode": lambda: state})


def test_a_container_is_started_in_the_arms_mode_and_is_the_subject(reached: FakeEngine) -> None:
    channel = in_arm({"docker-default": "enforce"})
    found = prepare.bring_into(channel, ENFORCE, plan(), IMAGE_OF_NONE)
    assert found.service_active and found.container is not None
    assert (found.container.id, found.container.name) == ("c1", "subject")
    assert channel.lines.count("ask pids") == 2 and not [line for line in channel.lines if line.startswith("systemctl")]
    assert "/sys/kernel/security/apparmor/.remove" not in channel.written, "the profile is the policy under test"


def test_in_the_control_the_engines_profile_is_gone_as_well(reached: FakeEngine) -> None:
    loaded = {"docker-default": "enforce", "other": "enforce"}
    channel = in_arm(loaded)

    def removed(words: tuple[str, ...]) -> CommandResult:
        loaded.pop(words[2])
        return said()

    channel._answers.append((r"write .*/\.remove", removed))
    prepare.bring_into(channel, UNCONFINED, plan(), IMAGE_OF_NONE)
    assert loaded == {"other": "enforce"}
    made = reached.sent("POST /containers/create")
    assert made["HostConfig"]["SecurityOpt"] == ["apparmor=unconfined"]
    with pytest.raises(FrameworkError, match="docker-default was removed, and the kernel still has it"):
        prepare.bring_into(in_arm({"docker-default": "enforce"}), UNCONFINED, plan(), IMAGE_OF_NONE)


def test_a_kernel_without_the_framework_starts_no_container(reached: FakeEngine) -> None:
    reached.routes["GET /info"] = (200, {"SecurityOptions": ["name=seccomp"]})
    with pytest.raises(FrameworkError, match="does not confine by AppArmor"):
        prepare.bring_into(in_arm({}), ENFORCE, plan(), IMAGE_OF_NONE)
    assert "POST /containers/create" not in [line for line, _ in reached.asked]


def test_the_containers_beside_it_are_there_first_and_confined(reached: FakeEngine) -> None:
    beside = [{"binds": ["/srv/a:/data:Z"]}]
    subject = {"container": {}, "beside": beside, "selinux": "container_t", "apparmor": "docker-default"}
    about = prepare.plan_of(contained(subject=subject), discovery.load_lab("docker-debian-13", REPO))
    prepare.bring_into(in_arm({}), UNCONFINED, about, IMAGE_OF_NONE)
    first, second = [body["HostConfig"] for line, body in reached.asked if line == "POST /containers/create"]
    assert (first["Binds"][1:], first.get("SecurityOpt") or []) == (["/srv/a:/data:Z"], [])
    assert "CgroupParent" not in first, "its processes are not the subject's"
    assert second["CgroupParent"] == install.SLICE
    assert second["SecurityOpt"] == ["apparmor=unconfined"]


def answered(fake: FakeEngine, **result: Any) -> Callable[..., dict[str, Any]]:
    """The agent's `attempt`: what the engine says to the request comes through the real `exchange`."""

    def answer(**asked: Any) -> dict[str, Any]:
        assert "command" not in asked and "request" not in asked
        assert asked["engine"]["timeout"] == 15 + attempt.ENGINE_SECONDS
        found = agent.exchange(**asked["engine"]) | result
        log = f"{exec_record(subject='docker-default')}\n{user_record(asked['close']['word'])}\n"
        closed = {"log": log, "problem": "", "subject": wire(subject()), "mode": wire(mode(ENFORCE)),
                  "audit": audit_state(size=len(log))}  # fmt: skip
        return {"planted": True, "effect_before": None, "effect_after": None, "result": found, "closed": closed}

    return answer


def made_in(fake: FakeEngine, **result: Any) -> attempt.Observation:
    running = started(fake)
    channel = AgentChannel(asked={"attempt": answered(fake, **result)})
    opened = attempt.Opened(
        subject=subject(), object=None, mode=mode(ENFORCE), audit=facts.AuditState(**audit_state(size=0))
    )
    seen = attempt.make(channel, contained().attempts[0], install.SLICE, opened, running)
    assert channel.written == {install.AUID_PATH: f"{seen.auid}\n".encode()}, "before the engine is asked for anything"
    return seen


def test_an_attempt_is_made_in_the_container(reached: FakeEngine) -> None:
    reached.routes["POST /exec/e1/start"] = (200, frame(1, b"some\xff") + frame(2, b"cat: no\n"))
    reached.routes["GET /exec/e1/json"] = (200, {"ExitCode": 1})
    seen = made_in(reached)
    assert (seen.command, seen.exit_code, seen.signal) == (("cat", "/x"), 1, None)
    assert (seen.output, seen.errors) == ("some\\xff", "cat: no\n")
    assert seen.auid is not None and 0x40000000 <= seen.auid < 0x60000000
    assert seen.source.state is SourceState.FETCHED


def test_an_attempt_that_takes_too_long_has_no_exit_status(reached: FakeEngine) -> None:
    reached.routes["POST /exec/e1/start"] = (200, frame(1, b"half"))
    seen = made_in(reached, timed_out=True)
    assert (seen.timed_out, seen.exit_code, seen.output) == (True, None, "")


def test_an_engine_that_runs_no_command_is_an_error_and_no_block(reached: FakeEngine) -> None:
    reached.routes["POST /exec/e1/start"] = (409, {"message": "container c1 is paused: permission denied"})
    with pytest.raises(EngineError, match=r"the container subject runs no command: .*is paused"):
        made_in(reached)


# Whose denials they are


def test_what_it_took_to_enter_a_container_is_not_the_containers_doing() -> None:
    inside = "system_u:system_r:container_t:s0:c1,c2"
    exec_ = exec_record(subject=inside)
    stamp = re.search(r"msg=\S+", exec_)
    assert stamp is not None

    def denied(subject: str, permission: str) -> str:
        return (
            f'type=AVC {stamp[0]} avc:  denied  {{ {permission} }} for  pid=700 comm="runc:[2:INIT]" '
            f"scontext={subject} tcontext={inside} tclass=process permissive=0"
        )

    dockerd = "system_u:system_r:dockerd_t:s0"
    lines = [denied(dockerd, "siginh"), denied(inside, "execmem"), exec_]
    seen = run_observation(Arm.SELINUX_ENFORCING, *lines)
    assert [d.permissions for d in verdict.own_denials(seen)] == [("execmem",)]
    refused = run_observation(
        Arm.SELINUX_ENFORCING, denied(dockerd, "transition"), exec_record(subject=dockerd, success="no")
    )
    assert [d.permissions for d in verdict.own_denials(refused)] == [("transition",)]
