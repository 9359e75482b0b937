"""What a guest's agent answers, and the audit log's window: read exactly, or told to be unreadable, never guessed."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from builders import (
    HTTPD,
    LSM,
    audit_state,
    avc,
    encoded,
    ended,
    exec_record,
    http_attempt,
    mode,
    nobody,
    process,
    run_attempt,
    sample,
    subject,
    syscall,
    target,
    user_record,
    visited,
    wire,
)
from hypothesis import given
from hypothesis import strategies as st

from fakes import ScriptedChannel
from lsmlab import attempt, evidence, facts
from lsmlab.attempt import Closed, Made, Observation, Opened, Opening, read_window
from lsmlab.definition import Strict
from lsmlab.errors import ChannelError
from lsmlab.facts import AuditState, ModeFacts, ObjectFacts, SubjectFacts, domain_of
from lsmlab.guest import agent
from lsmlab.scenario import Attempt
from lsmlab.terms import Arm, Framework, SourceState

UNIT = "nginx.service"
SENTINEL = "lsmlab-66e129c970dae5cb"
OPENED = AuditState(**audit_state())
WINDOW = f"{avc()}\n{syscall()}"
EFFECT = {"run": ["cat", "/run/x"], "output": "^pwned$"}


def with_effect(**changes: Any) -> Attempt:
    """A request whose proof is what it changes."""
    return http_attempt(**{"canary": None, "allowed_if": {"effect": EFFECT}, **changes})


# What the agent answers


def opening(**changes: Any) -> dict[str, Any]:
    """To `open_window`."""
    base = {
        "subject": wire(subject()), "object": wire(target()), "mode": wire(mode(Arm.SELINUX_ENFORCING)),
        "audit": audit_state(), "resting": True, "drained": True,
    }  # fmt: skip
    return {**base, **changes}


def closed(log: str | None = None, *, sentinel: str = SENTINEL, **changes: Any) -> dict[str, Any]:
    """To `close_window`: the window of an attempt, ended by the sentinel's record. `audit` is changes of that."""
    log = f"{WINDOW}\n{user_record(sentinel)}\n" if log is None else log
    audit = changes.pop("audit", {})
    return {
        "log": log,
        "problem": "",
        "subject": wire(subject()),
        "mode": wire(mode(Arm.SELINUX_ENFORCING)),
        "audit": audit_state(**{"size": 85220 + len(log), **audit}),
        **changes,
    }


def made(result: Mapping[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """To `attempt`: a request that was refused."""
    base = {
        "planted": True, "effect_before": None, "effect_after": None, "result": result or visited(403),
        "closed": closed(),
    }  # fmt: skip
    return {**base, **changes}


class Guest(ScriptedChannel):
    """A guest whose agent answers as `opening` and `made` do, with what is given in place of theirs.

    `window` is the log's part before the sentinel. `attempt` may be an exception.
    """

    def __init__(
        self,
        result: Mapping[str, Any] | None = None,
        *,
        opening_with: Mapping[str, Any] | None = None,
        window: str = WINDOW + "\n",
        error: Exception | None = None,
        **changes: Any,
    ) -> None:
        def answer(**arguments: Any) -> dict[str, Any]:
            log = f"{window}{user_record(arguments['close']['word'])}\n"
            whole = {"closed": closed(log), **changes}
            if arguments["canary"] is None:
                whole.setdefault("planted", None)
            if arguments["effect"] is not None:
                whole = {"effect_before": ended("no\n"), "effect_after": ended("no\n"), **whole}
            return made(result, **whole)

        super().__init__(asked={"open_window": opening(**(opening_with or {})), "attempt": error or answer})


def open_window(guest: Guest) -> Opened:
    return attempt.open_window(guest, UNIT, "/etc/shadow")


def make(guest: Guest, spec: Attempt, opened: Opened | None = None) -> Observation:
    return attempt.make(guest, spec, UNIT, opened or open_window(guest))


def asked(guest: Guest) -> dict[str, Any]:
    """The arguments of the only attempt."""
    (arguments,) = guest.asked_for("attempt")
    return arguments


# Nonsense


SAMPLES: dict[str, tuple[type[Strict], dict[str, Any]]] = {
    "opening": (Opening, opening()),
    "closed": (Closed, closed()),
    "http": (Made, made()),
    "run": (Made, made(ended("out", "err"), effect_before=ended("no"), effect_after=ended("yes"))),
    "audit_state": (AuditState, audit_state()),
    "mode": (ModeFacts, wire(mode(Arm.APPARMOR_ENFORCE))),
}
"""Every record that is made of what a guest answers, and an answer of which it can be made."""

MAY_BE_NOTHING = frozenset(
    {
        "object",
        "planted",
        "effect_before",
        "effect_after",
        "exit_code",
        "signal",
        "status",
        "selinux_enforcing",
        "profiles",
        "apparmor_mode",
    }
)
MAY_BE_ABSENT = frozenset({"exit_code", "signal", "status", "apparmor_mode"})
"""A request has no exit status, a command no HTTP status; a mode that is not told is a wrong one."""
OTHERS: tuple[Any, ...] = (None, True, 0, 7, 1.5, "7", "true", "", "text", [], ["x"], {}, {"x": "y"})


def places(node: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to everything in an answer."""
    if at:
        yield at
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in pairs:
        yield from places(value, (*at, key))


def fits(value: Any, like: Any, name: Any) -> bool:
    """True where `value` is not nonsense in the place of `like`, as far as JSON's types tell."""
    if value is None:
        return name in MAY_BE_NOTHING
    if isinstance(like, float) and type(value) is int:
        return True
    if like is None:  # what it would be is not to be seen here
        return True
    if isinstance(like, list) and isinstance(value, list):
        return not value or not like or type(value[0]) is type(like[0])
    if name == "profiles" and isinstance(value, dict):
        return True
    if name in {"out", "err"}:
        return isinstance(value, str) and len(value) % 4 == 0
    return type(value) is type(like) and not isinstance(like, dict)


def replaced(answer: dict[str, Any], at: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(answer)
    node: Any = changed
    for key in at[:-1]:
        node = node[key]
    node[at[-1]] = value
    return changed


def without(answer: dict[str, Any], at: tuple[Any, ...]) -> dict[str, Any]:
    changed = copy.deepcopy(answer)
    node: Any = changed
    for key in at[:-1]:
        node = node[key]
    del node[at[-1]]
    return changed


def refusal(model: type[Strict], answer: Any) -> str:
    """Why `answer` is nonsense, or an empty text where it was taken."""
    try:
        facts.read(model, answer)
    except ChannelError as error:
        return error.message
    return ""


@pytest.mark.parametrize("name", list(SAMPLES))
def test_a_good_answer_is_a_record(name: str) -> None:
    model, answer = SAMPLES[name]
    found = facts.read(model, json.loads(json.dumps(answer)))
    assert isinstance(found, model)
    if model is not Made:  # whose outputs are decoded
        assert wire(found) == answer


@pytest.mark.parametrize("name", list(SAMPLES))
def test_another_type_anywhere_is_nonsense(name: str) -> None:
    model, answer = SAMPLES[name]
    tried = 0
    for at in places(answer):
        like = answer
        for key in at:
            like = like[key]
        for other in OTHERS:
            if fits(other, like, at[-1]):
                continue
            tried += 1
            said = refusal(model, replaced(answer, at, other))
            assert said.startswith(f"the agent answered nonsense: {at[0]}"), f"{at}: {other!r} for {like!r}: {said}"
    assert tried > 10 * len(answer)


@pytest.mark.parametrize("name", list(SAMPLES))
def test_a_key_that_is_missing_is_nonsense(name: str) -> None:
    model, answer = SAMPLES[name]
    keys = [at for at in places(answer) if isinstance(at[-1], str) and "profiles" not in at[:-1]]
    needed = [at for at in keys if at[-1] not in MAY_BE_ABSENT]
    assert needed
    for at in needed:
        with pytest.raises(ChannelError, match=r"nonsense: \S*" + re.escape(str(at[-1])) + ": Field required"):
            facts.read(model, without(answer, at))


@pytest.mark.parametrize("name", list(SAMPLES))
def test_a_key_that_nobody_knows_is_nonsense(name: str) -> None:
    model, answer = SAMPLES[name]
    inside = [at for at in [(), *places(answer)] if "profiles" not in at]
    tried = 0
    for at in inside:
        node: Any = answer
        for key in at:
            node = node[key]
        if isinstance(node, dict):
            tried += 1
            with pytest.raises(ChannelError, match=r"nonsense: \S*verdict: Extra inputs"):
                facts.read(model, replaced(answer, (*at, "verdict"), "CONTAINED"))
    assert tried


@pytest.mark.parametrize("answer", [None, True, 0, "", "text", [], [opening()], json.dumps(opening())], ids=str)
def test_an_answer_that_is_no_object_is_nonsense(answer: object) -> None:
    for model in (Opening, Closed, Made, AuditState, ModeFacts):
        with pytest.raises(ChannelError, match="the agent answered nonsense: "):
            facts.read(model, answer)


@pytest.mark.parametrize("uids", [[33], [33] * 3, [33] * 5, [33, 33, 33, "33"], [33, 33, 33, None]], ids=str)
def test_a_process_has_four_users(uids: list[Any]) -> None:
    for key in ("uids", "gids"):
        answer = replaced(opening(), ("subject", "processes", 1, key), uids)
        with pytest.raises(ChannelError, match=f"nonsense: subject.processes.1.{key}"):
            facts.read(Opening, answer)


@pytest.mark.parametrize(
    "text", ["!", "a", "ab", "abc", "ab=", "aGk=\n", "\naGk=", "aGk=aGk=", "aGk-", "é", "aG k="], ids=ascii
)
@pytest.mark.parametrize("where", ["out", "err"])
@pytest.mark.parametrize("part", ["result", "effect_before", "effect_after"])
def test_output_that_is_not_base64_is_nonsense(part: str, where: str, text: str) -> None:
    answer = made(**{part: {**ended(), where: text}})
    with pytest.raises(ChannelError, match=f"nonsense: {part}.{where}: Value error"):
        facts.read(Made, answer)


def test_text_that_is_no_unicode_is_nonsense() -> None:
    with pytest.raises(ChannelError, match="the agent answered nonsense"):
        facts.read(Closed, closed("\ud800"))


def test_output_that_is_no_utf_8_is_shown_with_escapes() -> None:
    found = facts.read(Made, made(ended(b"a\xffb\xc3\xa9\x00", b"\x80"))).result
    assert (found.out, found.err) == ("a\\xffbé\x00", "\\x80")


# What would be taken for an answer and is none


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), float("-inf"), -1.0, 10**400], ids=str)
def test_a_time_that_cannot_be_is_nonsense(seconds: float) -> None:
    # JSON has no such numbers, and the outcome that holds one cannot be read back from the store
    with pytest.raises(ChannelError):
        facts.read(Made, made(visited(seconds=seconds)))


@pytest.mark.parametrize(
    "at",
    [
        ("audit", "size"),
        ("audit", "lost"),
        ("audit", "daemon_pid"),
        ("subject", "service", "main_pid"),
        ("subject", "processes", 0, "pid"),
        ("subject", "processes", 0, "cap_bounding"),
        ("object", "chain", 0, "ino"),
    ],
    ids=lambda at: str(at[-1]),
)
@pytest.mark.parametrize("number", [-1, 1 << 64, 10**400], ids=["negative", "2**64", "10**400"])
def test_a_number_that_no_kernel_has_is_nonsense(at: tuple[Any, ...], number: int) -> None:
    with pytest.raises(ChannelError):
        facts.read(Opening, replaced(opening(), at, number))


def test_an_answer_as_deep_as_the_stack_is_nonsense() -> None:
    # Found by the channel, which listens on a short stack; read on a longer one
    deep: Any = []
    for _ in range(970):
        deep = [deep]

    def on_a_long_stack(frames: int) -> object:
        return on_a_long_stack(frames - 1) if frames else facts.read(AuditState, deep)

    with pytest.raises(ChannelError):
        on_a_long_stack(100)


@pytest.mark.parametrize("result", [ended(code=None), ended(code=0, signal=9)], ids=["neither", "both"])
def test_a_command_that_ended_in_no_way_or_two_is_nonsense(result: dict[str, Any]) -> None:
    with pytest.raises(ChannelError):
        make(Guest(result), run_attempt())


def test_the_canary_has_to_be_spoken_of() -> None:
    with pytest.raises(ChannelError):
        make(Guest(visited(403), planted=None), http_attempt())


@pytest.mark.parametrize("when", ["effect_before", "effect_after"])
@pytest.mark.parametrize(
    "answer",
    [None, ended(code=None, timed_out=True), ended("pwned", too_much=True), ended(code=None)],
    ids=["absent", "timed out", "too much", "no end"],
)
def test_an_effect_that_was_not_seen_to_be_absent_is_an_error(when: str, answer: dict[str, Any] | None) -> None:
    # Before the attempt it would stand for "the effect was not there", after it for "the action did nothing"
    changes: dict[str, Any] = {when: answer}
    with pytest.raises(ChannelError):
        make(Guest(**changes), with_effect())


# Facts


def test_mode_facts() -> None:
    answer = {"lsm": list(LSM[Framework.SELINUX]), "selinux_enforcing": False, "profiles": None}
    expected = ModeFacts(lsm=LSM[Framework.SELINUX], selinux_enforcing=False, profiles=None)
    assert facts.read(ModeFacts, answer) == expected


def test_mode_facts_of_apparmor() -> None:
    profiles = {"nginx": "enforce", "/usr/sbin/man": "complain", "my web server": "kill", "nginx//child": "unconfined"}
    answer = {"lsm": ["capability", "apparmor"], "selinux_enforcing": None, "profiles": profiles}
    assert facts.read(ModeFacts, answer).profiles == profiles
    assert facts.read(ModeFacts, {**answer, "profiles": {}}).profiles == {}


def test_subject_facts() -> None:
    found = facts.read(SubjectFacts, wire(subject()))
    assert found == subject(process(481, main=True), process(482))
    assert [p.pid for p in found.workers] == [482]
    assert [p.domain for p in found.processes] == ["httpd_t", "httpd_t"]


def test_a_service_that_is_down_has_no_processes() -> None:
    found = facts.read(SubjectFacts, wire(nobody()))
    assert (found.service.active, found.processes, found.workers) == ("failed", (), ())


def test_a_main_process_alone_is_its_worker() -> None:
    assert [p.pid for p in subject(process(481, main=True)).workers] == [481]


def test_object_facts() -> None:
    found = facts.read(ObjectFacts, wire(target()))
    assert (found.path, found.real, found.exists, found.ino) == ("/etc/shadow", "/etc/shadow", True, 589)
    assert [(e.path, e.permissions, e.acl) for e in found.chain] == [("/etc/shadow", "-rw-r-----", ())]
    assert facts.read(ObjectFacts, wire(target(exists=False))).ino is None


@pytest.mark.parametrize(
    ("label", "domain"),
    [
        ("system_u:system_r:httpd_t:s0", "httpd_t"),
        ("system_u:object_r:shadow_t:s0-s0:c0.c1023", "shadow_t"),
        ("nginx (enforce)", "nginx"),
        ("nginx (complain)", "nginx"),
        ("nginx//null-/bin/sh (complain)", "nginx//null-/bin/sh"),
        ("my (web) server (kill)", "my (web) server"),
        ("nginx (other)", "nginx (other)"),
        ("unconfined", "unconfined"),
        (":a:b:nginx (mixed)", ":a:b:nginx"),
        ("", ""),
    ],
)
def test_domain_of(label: str, domain: str) -> None:
    assert domain_of(label) == domain
    assert process(label=label).domain == domain


# The window


def window(log: str | None = None, **changes: Any) -> Closed:
    return facts.read(Closed, closed(log, **changes))


def test_the_window_ends_before_the_sentinels_record() -> None:
    reading, log = read_window(window(), OPENED, SENTINEL)
    assert (reading.name, reading.state, reading.detail) == ("audit log", SourceState.FETCHED, "2 records, none lost")
    assert log == WINDOW
    assert [r.type for r in evidence.parse(log)] == ["AVC", "SYSCALL"]


def test_records_after_the_sentinel_are_not_in_the_window() -> None:
    text = f"{WINDOW}\n{user_record(SENTINEL)}\n{avc(serial=999)}\n"
    assert read_window(window(text), OPENED, SENTINEL)[1] == WINDOW


def test_the_first_sentinel_ends_the_window() -> None:
    text = f"{WINDOW}\n{user_record(SENTINEL)}\n{avc(serial=999)}\n{user_record(SENTINEL)}\n"
    assert read_window(window(text), OPENED, SENTINEL)[1] == WINDOW


def test_a_window_that_was_read_while_the_sentinel_was_written() -> None:
    text = f"{WINDOW}\n{user_record(SENTINEL).partition(SENTINEL)[0]}{SENTINEL}"
    assert read_window(window(text), OPENED, SENTINEL)[1] == WINDOW


@pytest.mark.parametrize("noise", ["", "no record at all\n"])
def test_a_window_without_records_is_empty_not_unavailable(noise: str) -> None:
    reading, log = read_window(window(f"{noise}{user_record(SENTINEL)}\n"), OPENED, SENTINEL)
    assert (reading.state, reading.detail, log) == (SourceState.EMPTY, "0 records, none lost", noise.rstrip("\n"))


def test_the_captured_window_is_read() -> None:
    text = sample("selinux-enforcing.log")
    reading, log = read_window(window(text), OPENED, "END-x")
    assert reading.state is SourceState.FETCHED
    assert reading.detail == "10 records, none lost"
    assert log == text[: text.rindex("\ntype=USER ")]


UNTRUSTED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "off before": ({"enabled": 0}, {}, "auditing is off (auditctl: enabled 0)"),
    "off after": ({}, {"audit": {"enabled": 0}}, "auditing is off (auditctl: enabled 0)"),
    "auditd gone": ({}, {"audit": {"daemon_pid": 0}}, "auditd stopped or changed: pid 344 before, 0 after"),
    "auditd changed": ({}, {"audit": {"daemon_pid": 7}}, "auditd stopped or changed: pid 344 before, 7 after"),
    "no auditd": (
        {"daemon_pid": 0},
        {"audit": {"daemon_pid": 0}},
        "auditd stopped or changed: pid 0 before, 0 after",
    ),
    "rotated": ({}, {"audit": {"log": "65024:1184", "size": 99999}}, "the log was rotated inside the window"),
    "truncated": ({}, {"audit": {"size": 85219}}, "the log was truncated inside the window"),
    "lost": ({}, {"audit": {"lost": 3}}, "3 records were lost by the kernel"),
    "one lost": ({"lost": 2}, {"audit": {"lost": 3}}, "1 records were lost by the kernel"),
    "lost, and counted from 0": ({"lost": 3}, {"audit": {"lost": 0}}, "-3 records were lost by the kernel"),
    "no sentinel": ({}, {"log": f"{WINDOW}\n"}, "the sentinel did not come through the audit queue"),
    "nothing": ({}, {"log": ""}, "the sentinel did not come through the audit queue"),
    "another sentinel": (
        {},
        {"log": f"{WINDOW}\n{user_record('lsmlab-0000000000000000')}\n"},
        "the sentinel did not come through the audit queue",
    ),
    "problem": (
        {},
        {"problem": "the kernel's audit subsystem: Operation not permitted"},
        "the kernel's audit subsystem: Operation not permitted",
    ),
    "problem first": ({"enabled": 0}, {"problem": "it cannot be watched"}, "it cannot be watched"),
}


@pytest.mark.parametrize("case", list(UNTRUSTED))
def test_a_window_that_cannot_be_trusted_is_unavailable(case: str) -> None:
    opened, after, detail = UNTRUSTED[case]
    answer = window(**after)
    reading, log = read_window(answer, OPENED.model_copy(update=opened), SENTINEL)
    assert (reading.name, reading.state, reading.detail) == ("audit log", SourceState.UNAVAILABLE, detail)
    assert log == answer.log


@pytest.mark.parametrize("case", list(UNTRUSTED))
def test_an_attempt_in_such_a_window_says_so(case: str) -> None:
    opened, after, detail = UNTRUSTED[case]

    def answer(**arguments: Any) -> dict[str, Any]:
        return made(visited(), closed=closed(**{"sentinel": arguments["close"]["word"], **after}))

    guest = Guest(opening_with={"audit": audit_state(**opened)})
    guest._asked["attempt"] = answer
    seen = make(guest, http_attempt())
    assert (seen.source.state, seen.source.detail) == (SourceState.UNAVAILABLE, detail)


def test_a_locked_audit_configuration_is_on() -> None:
    reading, _ = read_window(window(audit={"enabled": 2}), OPENED.model_copy(update={"enabled": 2}), SENTINEL)
    assert reading.state is SourceState.FETCHED


def test_records_lost_before_the_window_do_not_matter() -> None:
    reading, _ = read_window(window(audit={"lost": 3}), OPENED.model_copy(update={"lost": 3}), SENTINEL)
    assert reading.state is SourceState.FETCHED


def test_records_with_a_node_are_counted() -> None:
    text = f"node=web1 {avc()}\nnode=web1 {user_record(SENTINEL)}\n"
    reading, _ = read_window(window(text), OPENED, SENTINEL)
    assert (reading.state, reading.detail) == (SourceState.FETCHED, "1 records, none lost")


@given(st.lists(st.sampled_from([avc(), syscall(), exec_record(), "", "noise"]), max_size=6), st.booleans())
def test_what_comes_before_the_sentinel_is_the_window(lines: list[str], after: bool) -> None:
    text = "".join(f"{line}\n" for line in [*lines, user_record(SENTINEL), *([avc(serial=9)] if after else [])])
    reading, log = read_window(window(text), OPENED, SENTINEL)
    assert log == "\n".join(lines)
    count = sum("type=" in line for line in lines)
    state = SourceState.FETCHED if count else SourceState.EMPTY
    assert (reading.state, reading.detail) == (state, f"{count} records, none lost")


def test_a_window_that_is_closed_alone() -> None:
    def answer(word: str, **_: Any) -> dict[str, Any]:
        return closed(f"{WINDOW}\n{user_record(word)}\n")

    channel = ScriptedChannel(asked={"close_window": answer})
    reading, log = attempt.close_window(channel, UNIT, OPENED)
    assert (reading.state, log) == (SourceState.FETCHED, WINDOW)
    (arguments,) = channel.asked_for("close_window")
    assert re.fullmatch(r"lsmlab-[0-9a-f]{16}", arguments.pop("word"))
    assert arguments == {
        "unit": UNIT, "offset": 85220, "seconds": attempt.SENTINEL_SECONDS, "most": attempt.WINDOW_BYTES,
    }  # fmt: skip


def test_a_window_that_is_closed_on_nonsense() -> None:
    with pytest.raises(ChannelError, match="the agent answered nonsense: problem: Field required"):
        attempt.close_window(ScriptedChannel(asked={"close_window": without(closed(), ("problem",))}), UNIT, OPENED)


# Opening


def test_a_window_is_opened_on_the_unit_and_the_object() -> None:
    guest = Guest()
    found = open_window(guest)
    (arguments,) = guest.asked_for("open_window")
    assert re.fullmatch(r"lsmlab-[0-9a-f]{16}", arguments.pop("word"))
    assert arguments == {"unit": UNIT, "object": "/etc/shadow", "seconds": attempt.SENTINEL_SECONDS}
    assert found == Opened(subject=subject(), object=target(), mode=mode(Arm.SELINUX_ENFORCING), audit=OPENED)
    assert guest.lines == ["ask open_window"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"drained": False}, "the guest's audit queue does not come through to its log"),
        ({"resting": False}, "the processes of nginx.service do not come to rest"),
    ],
)
def test_a_window_opens_only_on_a_machine_at_rest(changes: dict[str, bool], words: str) -> None:
    with pytest.raises(ChannelError, match=words):
        open_window(Guest(opening_with=changes))


def test_a_window_does_not_open_on_nonsense() -> None:
    with pytest.raises(ChannelError, match=r"the agent answered nonsense: audit\.lost: "):
        open_window(Guest(opening_with={"audit": audit_state(lost="many")}))


# What the agent is asked


def arguments_of(operation: str) -> set[str]:
    """What an operation of the agent takes."""
    return set(inspect.signature(agent.OPERATIONS[operation]).parameters)


def test_the_agent_takes_what_it_is_asked() -> None:
    # The two sides are written apart: a key that the other does not know is found in a guest only
    guest = Guest(ended(), effect_before=ended(), effect_after=ended())
    make(guest, http_attempt(http={"path": "/", "body": "x"}))
    make(guest, http_attempt())
    make(guest, run_attempt())
    make(guest, with_effect())
    assert {name for name, _ in guest.questions} == {"open_window", "attempt"}
    for name, arguments in guest.questions:
        assert set(arguments) <= arguments_of(name)
    for arguments in guest.asked_for("attempt"):
        assert set(arguments["close"]) == set(inspect.signature(agent.close_window).parameters)
        if arguments["canary"] is not None:
            assert set(arguments["canary"]) == set(inspect.signature(agent.plant).parameters)
        action = agent.visit if "request" in arguments else agent.run_as
        given_to_it = arguments.get("request") or arguments["command"]
        assert {*given_to_it, "body"} == {*inspect.signature(action).parameters, "body"} - {"whole"}
        assert ("request" in arguments) != ("command" in arguments)


def test_a_command_has_other_capabilities_than_the_worker_whose_place_it_takes() -> None:
    has = {"cap_effective": 6, "cap_bounding": 2, "initial_userns": False}
    user = process().model_copy(update={"uids": (0, 33, 33, 33), "gids": (0, 34, 34, 34), **has})
    found = attempt.acting_as(user)
    assert (found.uids, found.gids, found.cap_effective, found.initial_userns) == ((33,) * 4, (34,) * 4, 0, True)
    assert found.groups == user.groups
    root = process().model_copy(update={"uids": (0,) * 4, **has, "cap_effective": 0})
    assert attempt.acting_as(root).cap_effective == 2


def test_what_a_visitor_asks_for() -> None:
    guest = Guest()
    make(guest, http_attempt())
    assert asked(guest)["request"] == {"method": "GET", "port": 80, "path": "/static../etc/shadow", "timeout": 15}
    other = Guest()
    seen = make(other, http_attempt(http={"path": "/a{b,c}[1-3]?b=%2e%2e", "method": "PUT", "port": 8080}, timeout=3))
    assert asked(other)["request"] == {"method": "PUT", "port": 8080, "path": "/a{b,c}[1-3]?b=%2e%2e", "timeout": 3}
    assert seen.command == ("PUT", "http://127.0.0.1:8080/a{b,c}[1-3]?b=%2e%2e")


def test_the_window_of_an_attempt() -> None:
    guest = Guest()
    make(guest, http_attempt())
    close = asked(guest)["close"]
    assert re.fullmatch(r"lsmlab-[0-9a-f]{16}", close.pop("word"))
    assert close == {
        "unit": UNIT,
        "offset": OPENED.size,
        "seconds": attempt.SENTINEL_SECONDS,
        "most": attempt.WINDOW_BYTES,
        "known": {"active": "active", "sub": "running", "result": "success", "main_pid": 481},
    }


def test_the_canarys_word_is_in_the_line_that_is_planted() -> None:
    guest = Guest()
    seen = make(guest, http_attempt())
    assert re.fullmatch(r"[0-9a-f]{16}", seen.canary)
    assert asked(guest)["canary"] == {"file": "/etc/shadow", "line": f"lsmlab-{seen.canary}:!:::::::"}


def test_the_canarys_word_stands_wherever_the_line_has_it() -> None:
    guest = Guest()
    seen = make(guest, http_attempt(canary={"file": "/a b", "line": "{canary} and {canary} {other}"}))
    assert asked(guest)["canary"] == {"file": "/a b", "line": f"{seen.canary} and {seen.canary} {{other}}"}


@pytest.mark.parametrize("planted", [True, False])
def test_whether_the_canary_was_planted(planted: bool) -> None:
    assert make(Guest(planted=planted), http_attempt()).canary_planted is planted


def test_nothing_is_planted_where_nothing_is_to_be() -> None:
    guest = Guest()
    assert make(guest, with_effect()).canary_planted is None
    assert asked(guest)["canary"] is None


def test_every_attempt_has_words_of_its_own() -> None:
    guest = Guest()
    opened = open_window(guest)
    first, second = (make(guest, http_attempt(), opened) for _ in range(2))
    assert first.canary != second.canary
    questions = guest.asked_for("attempt")
    sentinels = [guest.asked_for("open_window")[0]["word"], *(q["close"]["word"] for q in questions)]
    assert len(set(sentinels)) == 3
    for seen, question in zip((first, second), questions, strict=True):
        assert json.dumps(question).count(seen.canary) == 1, "the word is told to nobody but who plants it"
        assert seen.canary not in question["close"]["word"]


class Patience(Guest):
    """Takes note of how long an attempt may take."""

    def ask(self, operation: str, *, within: float = 30, **arguments: Any) -> Any:
        self.within = within
        return super().ask(operation, within=within, **arguments)


@pytest.mark.parametrize("timeout", [1, 15, 300])
@pytest.mark.parametrize("spec", [http_attempt, run_attempt, with_effect])
def test_an_attempt_is_waited_for_as_long_as_its_parts_may_take(spec: Any, timeout: int) -> None:
    guest = Patience(ended())
    make(guest, spec(timeout=timeout))
    effects = 2 * inspect.signature(agent.run).parameters["timeout"].default
    assert guest.within >= timeout + effects + attempt.SENTINEL_SECONDS
    open_window(guest)
    assert guest.within > attempt.SENTINEL_SECONDS + inspect.signature(agent.at_rest).parameters["seconds"].default


# A request


def test_an_http_attempt_is_observed() -> None:
    seen = make(Guest(visited(403, "<h1>403 Forbidden</h1>")), http_attempt())
    assert (seen.attempt, seen.command) == ("read-shadow", ("GET", "http://127.0.0.1:80/static../etc/shadow"))
    assert (seen.http_status, seen.exit_code, seen.signal, seen.timed_out) == (403, None, None, False)
    assert (seen.output, seen.errors, seen.seconds, seen.auid) == ("<h1>403 Forbidden</h1>", "", 0.123, None)
    assert (seen.canary_planted, seen.effect_before, seen.effect_after) == (True, None, None)
    assert seen.log == WINDOW
    assert seen.source.state is SourceState.FETCHED
    assert seen.subject_before == seen.subject_after == subject(process(481, main=True), process(482))
    assert seen.object == target()
    assert seen.mode_before == seen.mode_after == mode(Arm.SELINUX_ENFORCING)


@pytest.mark.parametrize(
    ("result", "status", "timed_out"),
    [
        (visited(200), 200, False),
        (visited(None, err="Connection refused"), None, False),
        (visited(None, timed_out=True), None, True),
        (visited(200, "the beginning", timed_out=True), 200, True),
        (visited(None, out="HTTP/1.1 200 OK"), None, False),  # the answer's own text is no status
    ],
)
def test_the_status_of_a_request(result: dict[str, Any], status: int | None, timed_out: bool) -> None:
    seen = make(Guest(result), http_attempt())
    assert (seen.http_status, seen.timed_out) == (status, timed_out)


def test_why_there_was_no_answer() -> None:
    seen = make(Guest(visited(None, err="Connection refused")), http_attempt())
    assert (seen.output, seen.errors, seen.exit_code) == ("", "Connection refused", None)


# A command


def test_a_run_attempt_is_run_as_the_worker() -> None:
    worker = process(482).model_copy(
        update={
            "uids": (1, 33, 3, 4), "gids": (5, 34, 7, 8), "groups": (42, 33), "cap_bounding": 0b1011,
            "cap_permitted": 2, "cap_effective": 2, "no_new_privs": True, "exe": "/usr/sbin/worker",
        }
    )  # fmt: skip
    guest = Guest(
        ended("", "cat: /etc/shadow: Permission denied", code=1),
        opening_with={"subject": wire(subject(process(481, main=True), worker, process(483)))},
    )
    seen = make(guest, run_attempt(timeout=7))
    assert asked(guest)["command"] == {
        "argv": ["cat", "/etc/shadow"],
        "who": {
            "auid": seen.auid, "uid": 33, "gid": 34, "groups": [42, 33], "cap_bounding": 0b1011, "no_new_privs": True,
            "exe": "/usr/sbin/nginx",
        },
        "timeout": 7,
    }  # fmt: skip
    assert (seen.exit_code, seen.errors, seen.http_status) == (1, "cat: /etc/shadow: Permission denied", None)
    assert (seen.attempt, seen.command) == ("read-shadow", ("cat", "/etc/shadow"))
    assert seen.subject_before.workers[0] == worker


def test_a_main_process_alone_lends_its_rights() -> None:
    alone = process(481, main=True).model_copy(update={"exe": "/usr/sbin/alone"})
    guest = Guest(ended(), opening_with={"subject": wire(subject(alone))})
    make(guest, run_attempt())
    who = asked(guest)["command"]["who"]
    assert (who["uid"], who["gid"], who["groups"], who["exe"]) == (0, 0, [], "/usr/sbin/alone")


def test_workers_without_a_main_process_lend_their_own_program() -> None:
    guest = Guest(ended(), opening_with={"subject": wire(subject(process(482), process(483)))})
    make(guest, run_attempt())
    assert asked(guest)["command"]["who"]["exe"] == "/usr/sbin/nginx"


def test_the_audit_user_id_is_the_attempts_own() -> None:
    found = [make(Guest(ended()), run_attempt()).auid for _ in range(20)]
    assert len(set(found)) > 10
    # Not unset (-1), which is what daemons have, and far from the users of any machine; loginuid is unsigned
    assert all(auid is not None and 0x40000000 <= auid < 0x60000000 for auid in found)


def test_a_command_that_was_ended_by_a_signal() -> None:
    seen = make(Guest(ended(code=None, signal=9)), run_attempt())
    assert (seen.exit_code, seen.signal, seen.timed_out) == (None, 9, False)


def test_a_command_that_does_not_end_timed_out() -> None:
    result = ended("so far", code=None, timed_out=True, seconds=3.00049)
    seen = make(Guest(result), run_attempt(timeout=3))
    assert (seen.exit_code, seen.signal, seen.timed_out) == (None, None, True)
    assert (seen.output, seen.seconds) == ("so far", 3.0)


def test_a_service_without_processes_cannot_lend_its_rights() -> None:
    guest = Guest(ended(), opening_with={"subject": wire(nobody())})
    with pytest.raises(ChannelError, match="the service has no process whose rights a command could be given"):
        make(guest, run_attempt())
    assert guest.asked_for("attempt") == [], "nothing is planted or tried"


def test_a_visitor_needs_no_process() -> None:
    guest = Guest(visited(None, err="Connection refused"), opening_with={"subject": wire(nobody())})
    assert make(guest, http_attempt()).subject_before == nobody()


@pytest.mark.parametrize("spec", [run_attempt(), run_attempt(timeout=7)])
def test_a_command_by_hand_is_what_the_attempt_is(spec: Attempt) -> None:
    guest = Guest(ended())
    opened = open_window(guest)
    seen = make(guest, spec, opened)
    assert seen.auid is not None
    assert attempt.command_as(spec, opened.subject, seen.auid) == asked(guest)["command"]


# Planting alone


def test_a_canary_is_planted_alone() -> None:
    channel = ScriptedChannel(asked={"plant": True})
    first, second = (attempt.plant(channel, http_attempt()) for _ in range(2))
    assert re.fullmatch(r"lsmlab-[0-9a-f]{16}:!:::::::", first)
    assert first != second
    assert channel.asked_for("plant") == [{"file": "/etc/shadow", "line": line} for line in (first, second)]


def test_where_an_attempt_plants_none_nothing_is_asked() -> None:
    channel = ScriptedChannel()
    assert attempt.plant(channel, with_effect()) == ""
    assert channel.lines == []


@pytest.mark.parametrize("answer", [False, None, 1, "yes", {}], ids=str)
def test_a_canary_that_was_not_planted_is_an_error(answer: object) -> None:
    with pytest.raises(ChannelError, match="the canary could not be planted in /etc/shadow"):
        attempt.plant(ScriptedChannel(asked={"plant": answer}), http_attempt())


# Effects


@pytest.mark.parametrize(
    ("before", "after"),
    list(itertools.product([("no\n", False), ("", False), ("pwned", True)], [("pwned", True), ("not pwned", False)])),
)
def test_effects_before_and_after(before: tuple[str, bool], after: tuple[str, bool]) -> None:
    guest = Guest(effect_before=ended(before[0]), effect_after=ended(after[0], code=1))
    seen = make(guest, with_effect())
    assert asked(guest)["effect"] == ["cat", "/run/x"]
    assert (seen.effect_before, seen.effect_after) == (before[1], after[1])


def test_an_effect_is_looked_for_in_standard_output_alone() -> None:
    seen = make(Guest(effect_after=ended("", "pwned")), with_effect())
    assert (seen.effect_before, seen.effect_after) == (False, False)


def test_no_effect_is_looked_for_where_none_is_named() -> None:
    guest = Guest()
    seen = make(guest, http_attempt())
    assert asked(guest)["effect"] is None
    assert (seen.effect_before, seen.effect_after) == (None, None)


# Errors, and what is kept


def test_facts_after_the_attempt_are_those_of_its_end() -> None:
    later = subject(process(481, main=True), process(500, label="unconfined"))
    after = closed(subject=wire(later), mode=wire(mode(Arm.SELINUX_PERMISSIVE)))
    seen = make(Guest(closed=after), http_attempt())
    assert (seen.subject_before, seen.subject_after) == (subject(), later)
    assert (seen.mode_before, seen.mode_after) == (mode(Arm.SELINUX_ENFORCING), mode(Arm.SELINUX_PERMISSIVE))


@pytest.mark.parametrize("spec", [http_attempt, run_attempt])
def test_a_guest_that_does_not_answer_is_an_error(spec: Any) -> None:
    with pytest.raises(ChannelError, match="no answer"):
        make(Guest(error=ChannelError("no answer")), spec())


@pytest.mark.parametrize("result", [visited(200, "x", too_much=True), ended("x", too_much=True)], ids=["http", "run"])
def test_more_output_than_is_carried_is_an_error(result: dict[str, Any]) -> None:
    spec = http_attempt() if "status" in result else run_attempt()
    with pytest.raises(ChannelError, match="more output than the agent carries"):
        make(Guest(result), spec)


@pytest.mark.parametrize(
    "changes",
    [
        {"planted": "yes"},
        {"result": None},
        {"result": {}},
        {"result": {**visited(), "out": "!"}},
        {"result": {**visited(), "status": "200"}},
        {"result": {**visited(), "verdict": "blocked"}},
        {"effect_after": "pwned"},
        {"closed": None},
        {"closed": closed(audit={"size": "big"})},
    ],
    ids=str,
)
def test_nonsense_is_never_an_observation(changes: dict[str, Any]) -> None:
    guest = Guest(**{k: v for k, v in changes.items() if k != "result"})
    if "result" in changes:
        guest._asked["attempt"] = {**made(), "result": changes["result"]}
    with pytest.raises(ChannelError, match="the agent answered nonsense: "):
        make(guest, http_attempt())


def test_long_output_is_cut_in_the_record() -> None:
    seen = make(Guest(ended("x" * (attempt.KEPT_OUTPUT + 5), "y" * (attempt.KEPT_OUTPUT + 5))), run_attempt())
    kept = attempt.shortened(seen)
    assert (len(seen.output), len(seen.errors)) == (attempt.KEPT_OUTPUT + 5,) * 2
    assert (len(kept.output), len(kept.errors)) == (attempt.KEPT_OUTPUT,) * 2


def test_a_canary_behind_long_output_is_seen() -> None:
    guest = Guest()

    def answer(canary: Mapping[str, str], close: Mapping[str, Any], **_: Any) -> dict[str, Any]:
        log = closed(f"{user_record(close['word'])}\n")
        return made(visited(200, "x" * attempt.KEPT_OUTPUT + canary["line"]), closed=log)

    guest._asked["attempt"] = answer
    seen = make(guest, http_attempt())
    assert f"lsmlab-{seen.canary}:" in seen.output


def test_an_observation_comes_back_from_json() -> None:
    seen = make(Guest(ended(b"\xff\x00", b"\x80")), run_attempt())
    assert Observation.model_validate_json(seen.model_dump_json()) == seen
    assert encoded(b"\xff\x00") == "/wA="
    assert seen.subject_before.processes[1].label == HTTPD
