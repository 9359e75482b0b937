"""What a compromised guest may send, at random: no parser raises, takes long, or is led to say what was not recorded.

The channel's own end is tested in tests/contract/test_hostile_guest.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from builders import (
    AUID,
    HTTPD,
    SAMPLES,
    WORD,
    apparmor,
    audit_state,
    avc,
    exec_record,
    http_attempt,
    mode,
    observation,
    path_record,
    run_attempt,
    run_observation,
    sample,
    scenario,
    subject,
    syscall,
    target,
    untrusted,
    user_record,
    visited,
    wire,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from lsmlab import evidence, facts, run
from lsmlab.attempt import Closed, Made, Opening, read_window
from lsmlab.channel import agent
from lsmlab.channel.agent import AgentChannel, command_result
from lsmlab.channel.base import CommandResult
from lsmlab.definition import Strict
from lsmlab.errors import ChannelError
from lsmlab.terminal import clean
from lsmlab.terms import Arm, Framework, Result, SourceState, Verdict, arms_of
from lsmlab.verdict import JudgedArm, conclude, own_denials

SENTINEL = "lsmlab-66e129c970dae5cb"
HEAD = "type=AVC msg=audit(1.0:1): "
READ_IT: dict[str, Any] = {"output": f"lsmlab-{WORD}:!:::::::", "http_status": 200}

# What a guest may write

JUNK = st.one_of(
    st.text(max_size=200),
    st.binary(max_size=200).map(lambda b: b.decode("utf-8", "backslashreplace")),
    st.text(st.sampled_from("\x1d\n\r\x00 =\"'{}():avcdeniedtype²٣½\u2028"), max_size=80),
)
PIECES = st.sampled_from(
    [
        "a", "=", '"', "'", " ", "\\", "{", "}", "avc: ", "avc: denied ", "avc: denied { ", "avc: denied { read } for ",
        "permissions=", "avc=denied ", "type=AVC msg=audit(1.0:1): ", "node=x ", "auid=", "9", "²", "-", 'a="', "a='",
        'apparmor="DENIED" ', "msg='", "\x1d", "audit(", "0.", "4142", "_", "é", "pid=1 ", " (enforce)", ":", "_r:",
    ]
)  # fmt: skip
LOGS = sorted(path.name for path in SAMPLES.glob("*.log"))
TYPES = st.sampled_from(["AVC", "USER_AVC", "SYSCALL", "PATH", "APPARMOR_DENIED", "USER_CMD", "MAC_STATUS", "USER"])


@st.composite
def mutated(draw: st.DrawFn, text: str) -> str:
    """`text` with a few pieces taken out, put in or doubled."""
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(text)))
        end = min(len(text), at + draw(st.integers(0, 60)))
        text = text[:at] + draw(st.one_of(PIECES, JUNK, st.just(text[at:end] * 2))) + text[end:]
    return text


MUTATED = st.sampled_from(LOGS).flatmap(lambda name: mutated(sample(name)))
RECORDS = st.builds("type={} msg=audit(1.{}:{}): {}".format, TYPES, st.integers(0), st.integers(0), JUNK)
HOSTILE = st.one_of(
    JUNK,
    MUTATED,
    st.lists(PIECES, max_size=40).map("".join),
    st.lists(PIECES, max_size=40).map(lambda pieces: HEAD + "".join(pieces)),
    st.lists(RECORDS, max_size=6).map("\n".join),
)
WINDOWS = st.lists(
    st.one_of(
        HOSTILE,
        st.sampled_from(
            [
                avc(), avc(permissive=1), avc(serial=148), syscall(), syscall(success="yes"), exec_record(),
                path_record(b"/etc/shadow", 589), apparmor(), apparmor(kind="ALLOWED"),
                exec_record().replace(str(AUID), "²"), syscall(auid=-1).replace("auid=-1", "auid=" + "9" * 5000),
            ]
        ),
    ),
    max_size=8,
).map("\n".join)  # fmt: skip


# Never raises


@given(HOSTILE)
def test_what_is_read_of_a_log_is_of_that_log(text: str) -> None:
    records = evidence.parse(text)
    found = evidence.denials(records)
    lines = {line.partition(evidence.ENRICHMENT)[0] for line in text.split("\n")}
    assert {r.raw for r in records} <= lines
    assert all(set(d.raw) <= lines for d in found)
    assert all(r in records for r in (*evidence.mode_changes(records), *evidence.refused_calls(records)))
    assert not any(d.effective and d.logged_only for d in found)


@given(WINDOWS, st.sampled_from(Arm), st.booleans(), st.booleans())
def test_a_judgement_is_made_of_any_log(log: str, arm: Arm, as_command: bool, read: bool) -> None:
    spec = run_attempt() if as_command else http_attempt()
    seen = run_observation(arm, log) if as_command else observation(arm, log)
    if read:
        seen = seen.model_copy(update={"output": READ_IT["output"], "http_status": None if as_command else 200})
    record = run.judge_attempt(scenario(), spec, arm, seen, "debian-13")
    assert (record.result is Result.BLOCKED) <= (not read)
    assert {d.framework for d in record.denials} <= set(Framework)
    records = evidence.parse(log)
    told = evidence.mode_changes(records) or evidence.audit_changes(records)
    profiles = seen.mode_before.profiles or {}
    hidden = arm.framework is Framework.APPARMOR and any(
        d.logged_only and profiles.get(d.subject) == "enforce" for d in evidence.denials(records)
    )
    assert (record.result is Result.FAILED) is bool(told or hidden), (
        "another mode, other auditing, and a profile in enforce that only logged are all that a log can tell against it"
    )


@pytest.mark.parametrize("auid", ["²", "½", "9" * 5000, "-", "", "0x1"])
def test_an_audit_user_id_that_is_none_is_nobodys(auid: str) -> None:
    line = exec_record().replace(f"auid={AUID}", f"auid={auid}")
    seen = run_observation(Arm.SELINUX_ENFORCING, line)
    assert run.judge_attempt(scenario(), run_attempt(), Arm.SELINUX_ENFORCING, seen, "x").result is Result.UNCLEAR


# Never takes long


def seconds(work: Callable[[], object]) -> float:
    """Processor time, so that a busy machine does not matter."""
    start = time.process_time()
    work()
    return time.process_time() - start


def grows_with_its_input(work: Callable[[int], object], size: int) -> None:
    """Four times as much must not take ten times as long; with the square it takes sixteen times."""
    for _ in range(3):
        small, large = seconds(lambda: work(size)), seconds(lambda: work(4 * size))
        if large < 10 * max(small, 0.005):
            return
    pytest.fail(f"{size} in {small:.3f} s, {4 * size} in {large:.3f} s")


@given(
    st.sampled_from(["", HEAD, f"{HEAD}avc:  denied  {{ read }} for ", f"{HEAD}x='"]),
    st.lists(PIECES, min_size=1, max_size=3),
)
@settings(max_examples=60)
def test_a_line_is_read_in_a_time_in_proportion(beginning: str, pieces: list[str]) -> None:
    unit = "".join(pieces)
    grows_with_its_input(lambda n: evidence.parse(beginning + unit * (n // len(unit))), 6000)


LONG: dict[str, Callable[[int], str]] = {
    "a word": lambda n: HEAD + "a" * n,
    "an open brace": lambda n: HEAD + "avc: denied { " * n,
    "one event of denials": lambda n: "\n".join([avc()] * (n // 20)),
    "one event of calls": lambda n: "\n".join([syscall(), avc()] * (n // 40)),
    "one event of paths": lambda n: "\n".join([avc(), path_record(b"x", 1)] * (n // 40)),
    "a line of processes": lambda n: "\n".join(
        syscall(serial=k, ppid=482 + k, pid=483 + k, success="yes", key='"lsmlab-fork"') for k in range(n // 20, 0, -1)
    ),
    "many children": lambda n: "\n".join(
        syscall(serial=k, ppid=482, pid=483 + k, success="yes", key='"lsmlab-fork"') for k in range(n // 20)
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", list(LONG))
def test_a_window_is_judged_in_a_time_in_proportion(what: str) -> None:
    def work(size: int) -> None:
        seen = observation(Arm.SELINUX_ENFORCING, LONG[what](size))
        run.judge_attempt(scenario(), http_attempt(), Arm.SELINUX_ENFORCING, seen, "debian-13")

    grows_with_its_input(work, 6000)


def test_a_long_line_of_processes_is_one_family() -> None:
    lines = [syscall(serial=k, ppid=481 + k, pid=482 + k, key='"lsmlab-fork"') for k in range(2000, 0, -1)]
    seen = observation(Arm.SELINUX_ENFORCING, *lines, avc(serial=5000, pid=2482), avc(serial=5001, pid=2483))
    assert [d.pid for d in own_denials(seen)] == [2482]


def test_a_flood_of_records_in_one_event_hides_no_success() -> None:
    flood = [avc(), *[path_record(b"x", 1)] * 500, syscall(success="yes")]
    (found,) = evidence.denials(evidence.parse("\n".join(flood)))
    assert not found.effective
    assert found.syscall_success is True
    assert len(found.raw) == evidence.EVENT_RECORDS
    assert found.headline == avc()


# Never a containment that nobody recorded


def verdict_of(enforcing: str, framework: Framework = Framework.SELINUX, control: str = "") -> tuple[Verdict, Result]:
    """What is concluded where the attack succeeds without enforcement, and with it meets a 403 and this log."""
    arms = {}
    for arm in arms_of(framework):
        seen = observation(arm, enforcing) if arm.enforcing else observation(arm, control, **READ_IT)
        arms[arm] = JudgedArm(
            arm=arm, attempts=(run.judge_attempt(scenario(), http_attempt(), arm, seen, "debian-13"),)
        )
    return conclude(framework, arms).verdict, arms[arms_of(framework)[-1]].attempts[0].result


def test_the_real_record_contains() -> None:
    for framework, record in ((Framework.SELINUX, avc()), (Framework.APPARMOR, apparmor())):
        assert verdict_of(record, framework) == (Verdict.CONTAINED, Result.BLOCKED)


def says_so(line: str, framework: Framework) -> bool:
    """Whether a line can be the kernel's refusal at all, by another way than the parser's."""
    if not re.match(r"(node=\S+ )?type=(AVC|APPARMOR_DENIED|APPARMOR_ALLOWED|APPARMOR_KILL) msg=audit\(", line):
        return False
    line = line.partition("\x1d")[0]
    selinux = ("avc:", "denied", ":httpd_t", ":shadow_t", "tclass=", "file", "permissive=", "0", "589", "vda", "48")
    if framework is Framework.SELINUX:
        return all(word in line for word in selinux)
    return ("DENIED" in line or "KILLED" in line) and all(w in line for w in ("apparmor=", "profile=", "name=", "48"))


NEAR = st.one_of(
    st.sampled_from([avc(), avc("open"), apparmor(), syscall(), path_record(b"/etc/shadow", 589)]),
    st.sampled_from([avc(), avc("open"), apparmor()]).flatmap(mutated),
    st.builds(
        avc,
        st.sampled_from(["read", "write"]),
        verb=st.sampled_from(["denied", "granted"]),
        permissive=st.integers(0, 1),
        pid=st.sampled_from([1, 481, 482]),
        ino=st.sampled_from([1, 589]),
        source=st.sampled_from([HTTPD, "system_u:system_r:init_t:s0"]),
    ),
    st.sampled_from(["USER_AVC", "USER_CMD", "EXECVE"]).map(lambda kind: avc().replace("type=AVC", f"type={kind}")),
)
SAYING = st.sampled_from(["DENIED", "ALLOWED", "STATUS", "KILLED"]).map(lambda kind: apparmor(kind=kind))


@given(st.lists(st.one_of(NEAR, SAYING, HOSTILE), max_size=6), st.sampled_from(Framework))
@settings(max_examples=200)
def test_no_containment_without_the_kernels_refusal(lines: list[str], framework: Framework) -> None:
    verdict, _ = verdict_of("\n".join(lines), framework)
    if verdict is Verdict.CONTAINED:
        assert any(says_so(line, framework) for line in "\n".join(lines).split("\n"))


@given(WINDOWS)
def test_nothing_in_a_log_makes_a_breach_a_containment(log: str) -> None:
    arms = {
        arm: JudgedArm(
            arm=arm,
            attempts=(run.judge_attempt(scenario(), http_attempt(), arm, observation(arm, log, **READ_IT), "x"),),
        )
        for arm in arms_of(Framework.SELINUX)
    }
    assert conclude(Framework.SELINUX, arms).verdict in {Verdict.NOT_CONTAINED, Verdict.ERROR, Verdict.INCONCLUSIVE}


# What a service writes stays inside its field

FORGED = st.one_of(
    st.sampled_from(
        [
            avc(), apparmor(), exec_record(), syscall(success="yes"), "\n" + avc(), "\n" + sample("mode-changes.log"),
            f'" {avc()}', f"' {avc()}", '" permissive=1 scontext=a:b_r:evil_t:s0 "', "\x1d" + avc(), "\r" + avc(),
            "avc: denied { read } for ", '"\nnode=x ' + apparmor(), 'apparmor="STATUS" error=0', "success=yes", "4142",
        ]
    ).map(str.encode),
    st.binary(max_size=40),
    HOSTILE.map(lambda text: text.encode("utf-8", "surrogatepass")),
).map(lambda words: words.replace(b"\0", b""))  # fmt: skip
CHOSEN = ("comm", "exe", "name", "cwd", "proctitle", "a0")
"""What a service may call itself, its programs, files and arguments."""


def event(words: Sequence[bytes], *, denied: bool) -> str:
    """A refused call as the kernel records it, with what a service chose in every place where it may."""
    comm, exe, name, cwd, title, argument = map(untrusted, words)
    call = syscall().replace('comm="nginx"', f"comm={comm}").replace('exe="/usr/sbin/nginx"', f"exe={exe}")
    stamp = "msg=audit(1795509852.188:147):"
    avc_record = avc().replace('comm="nginx"', f"comm={comm}").replace('name="shadow"', f"name={name}")
    return "\n".join(
        [
            *([avc_record] if denied else []),
            call,
            f"type=EXECVE {stamp} argc=1 a0={argument}",
            f"type=CWD {stamp} cwd={cwd}",
            path_record(b"", 589).replace('name=""', f"name={name}"),
            f"type=PROCTITLE {stamp} proctitle={title}",
        ]
    )


@given(st.lists(FORGED, min_size=6, max_size=6), st.booleans())
def test_what_a_service_writes_forges_no_field_and_no_record(words: list[bytes], denied: bool) -> None:
    plain, hostile = (evidence.parse(event(chosen, denied=denied)) for chosen in ([b"x"] * 6, words))
    assert [(r.type, r.event) for r in hostile] == [(r.type, r.event) for r in plain]
    for one, other in zip(hostile, plain, strict=True):
        assert set(one.fields) == set(other.fields)
        assert {k: v for k, v in one.fields.items() if k not in CHOSEN} == {
            k: v for k, v in other.fields.items() if k not in CHOSEN
        }
    assert evidence.mode_changes(hostile) == ()
    assert len(evidence.refused_calls(hostile)) == 1
    found = [d.model_dump(exclude={"comm", "name", "paths", "raw"}) for d in evidence.denials(hostile)]
    assert found == [d.model_dump(exclude={"comm", "name", "paths", "raw"}) for d in evidence.denials(plain)]
    assert len(found) == denied


@given(st.lists(FORGED, min_size=6, max_size=6))
def test_what_a_service_writes_contains_nothing(words: list[bytes]) -> None:
    for framework in Framework:
        assert verdict_of(event(words, denied=False), framework) == (Verdict.UNATTRIBUTED, Result.BLOCKED)


@given(FORGED, FORGED)
def test_what_a_service_writes_hides_no_denial_of_apparmor(profile: bytes, name: bytes) -> None:
    (found,) = evidence.denials(evidence.parse(apparmor(profile=profile, name=name)))
    assert (found.effective, found.permissions, found.operation, found.pid) == (True, ("r",), "open", 482)


# What the agent answers

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.just(10**400)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=12), inner, max_size=4)),
    max_leaves=12,
)
CLOSED: dict[str, Any] = {
    "log": f"{avc()}\n{user_record(SENTINEL)}\n", "problem": "", "subject": wire(subject()),
    "mode": wire(mode(Arm.SELINUX_ENFORCING)), "audit": audit_state(size=90000),
}  # fmt: skip
ANSWERS: list[tuple[type[Strict], dict[str, Any]]] = [
    (Closed, CLOSED),
    (Made, {"planted": True, "effect_before": None, "effect_after": None, "result": visited(403), "closed": CLOSED}),
    (
        Opening,
        {
            "subject": wire(subject()), "object": wire(target()), "mode": wire(mode(Arm.APPARMOR_ENFORCE)),
            "audit": audit_state(), "resting": True, "drained": True,
        },
    ),
]  # fmt: skip


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every container below `node`, with each of its keys."""
    pairs = list(node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ())
    for key, value in pairs:
        yield node, key
        yield from places(value)


@st.composite
def answers(draw: st.DrawFn) -> tuple[type[Strict], Any]:
    """A model, and an answer that is nearly right for it, or anything."""
    model, good = draw(st.sampled_from(ANSWERS))
    answer = json.loads(json.dumps(good))
    for _ in range(draw(st.integers(0, 3))):
        node, key = draw(st.sampled_from(list(places(answer))))
        if isinstance(node, dict) and draw(st.booleans()):
            node[draw(st.text(max_size=300))] = draw(JSON)
        else:
            node[key] = draw(JSON)
    return model, draw(st.sampled_from([answer] * 9 + [draw(JSON)]))


@given(answers())
@settings(max_examples=200)
def test_an_answer_is_what_it_must_be_or_nonsense(given_answer: tuple[type[Strict], Any]) -> None:
    model, answer = given_answer
    found: Strict | ChannelError
    try:
        found = facts.read(model, answer)
    except ChannelError as error:
        found = error
    if isinstance(found, ChannelError):
        assert found.message.startswith("the agent answered nonsense: ")
        assert len(found.message) < 2000
        assert str(found) == clean(str(found))
    else:
        assert isinstance(found, model)
        assert isinstance(json.loads(found.model_dump_json()), dict), "the store can keep it"


@given(
    st.one_of(HOSTILE, WINDOWS.map(lambda text: f"{text}\n{user_record(SENTINEL)}\n"), st.just(SENTINEL * 3)),
    st.fixed_dictionaries(
        {},
        optional={
            "enabled": st.integers(0, 2),
            "daemon_pid": st.sampled_from([0, 344, 345]),
            "lost": st.sampled_from([0, 1, (1 << 63) - 1]),
            "log": st.sampled_from(["65024:1183", "65024:1184", ""]),
            "size": st.sampled_from([0, 85219, 85220, (1 << 63) - 1]),
        },
    ),
    st.sampled_from(["", "", "it broke"]),
)
def test_a_window_is_whole_or_unavailable(log: str, changes: dict[str, Any], problem: str) -> None:
    opened = facts.AuditState(**audit_state())
    now = facts.AuditState(**audit_state(**changes))
    closed = Closed(log=log, problem=problem, subject=subject(), mode=mode(Arm.SELINUX_ENFORCING), audit=now)
    reading, lines = read_window(closed, opened, SENTINEL)
    same = (now.daemon_pid, now.lost, now.log) == (opened.daemon_pid, opened.lost, opened.log)
    whole = not problem and same and now.enabled and now.size >= opened.size and SENTINEL in log
    assert (reading.state is not SourceState.UNAVAILABLE) is bool(whole)
    if whole:
        assert log.startswith(lines)
        assert SENTINEL not in lines
        assert lines == "" or log[len(lines)] == "\n"
        assert (reading.state is SourceState.EMPTY) is (evidence.parse(lines) == ())
    else:
        assert reading.detail


# The channel's reader


@given(st.lists(st.one_of(st.binary(max_size=30), st.sampled_from([b"\n", b"x" * 21, b"\n\n", b"ready\n"]))), st.data())
def test_however_the_bytes_come_the_lines_are_the_same(parts: list[bytes], data: st.DataObject) -> None:
    stream, most = b"".join(parts), 20
    heard, skipped = list[bytes](), list[str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agent, "ANSWER_BYTES", most)
        lines = agent._Lines(lambda line: heard.append(bytes(line)), skipped.append, skipped.append)
        while stream:
            cut = data.draw(st.integers(1, len(stream)))
            lines.data_received(stream[:cut])
            stream = stream[cut:]
            assert len(lines._line) <= most
    *ended, rest = b"".join(parts).split(b"\n")
    assert heard == [line for line in ended if 0 < len(line) <= most]
    assert len(skipped) == sum(len(line) > most for line in [*ended, rest])


@contextlib.contextmanager
def waiting(number: int) -> Iterator[tuple[AgentChannel, asyncio.Future[Any]]]:
    """A channel where the answer to question `number` is waited for."""
    ours, theirs = socket.socketpair()
    loop = asyncio.new_event_loop()
    with ours, theirs, contextlib.closing(loop):
        channel = AgentChannel(ours, "peer")
        channel._pending[number] = future = loop.create_future()
        yield channel, future


IDS = st.one_of(st.just(7), st.sampled_from([7.0, "7", [7], True, None, 8, -7]), JSON)
LINES = st.one_of(
    st.binary(max_size=60),
    JSON.map(lambda value: json.dumps(value).encode()),
    st.builds(lambda number, answer: json.dumps({"id": number, "answer": answer}).encode(), IDS, JSON),
    st.builds(lambda number, answer: json.dumps({"answer": answer, "id": number}).encode("utf-16"), IDS, JSON),
)


@given(st.lists(LINES, max_size=5))
def test_only_an_answer_to_the_question_is_heard(lines: list[bytes]) -> None:
    meant = []
    for line in lines:
        with contextlib.suppress(ValueError):
            said = json.loads(line.decode())
            if isinstance(said, dict) and type(said.get("id")) is int and said["id"] == 7:
                meant.append(json.dumps(said))
    with waiting(7) as (channel, future):
        for line in lines:
            channel._hear(bytearray(line))
        assert [json.dumps(future.result())] == meant[:1] if future.done() else not meant


DONE: dict[str, Any] = {
    "exit_code": 0, "signal": None, "out": "b3V0", "err": "", "timed_out": False, "too_much": False, "seconds": 0.5,
}  # fmt: skip


@given(st.one_of(JSON, st.dictionaries(st.sampled_from(sorted(DONE)), JSON, max_size=3).map(lambda more: DONE | more)))
def test_a_result_is_one_or_nonsense(answer: Any) -> None:
    found: CommandResult | ChannelError
    try:
        found = command_result(answer, ("x",), "peer")
    except ChannelError as error:
        found = error
    if isinstance(found, ChannelError):
        assert len(str(found)) < 1000
    else:
        assert found.exit_code is None or found.signal is None
        assert found.ok is (answer["exit_code"] == 0)


@given(st.one_of(st.text(max_size=3000), JSON, st.text(st.characters(categories=["Cc", "Cf", "Cs", "Zl"]))))
def test_the_agents_words_are_fit_for_a_terminal(words: Any) -> None:
    said = agent._printable(words)
    assert all(c.isprintable() or c == "\n" for c in said)
    assert said == clean(said)
