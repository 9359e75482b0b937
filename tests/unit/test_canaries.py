"""What may leave a machine that is kept: canaries and foreseen words of an output, a log's own events; no more."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lsmlab import attempt, discovery
from lsmlab.guest import agent, canaries, undo

WORD = "0123456789abcdef"
LEAKED = "root:$y$j9T$secret:20000:0:99999:7:::"
KEEP = {"texts": [WORD, f"lsmlab-{WORD}:"], "patterns": [attempt.REFUSALS]}


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def ended(out: str = "", err: str = "") -> dict[str, Any]:
    return {"exit_code": 0, "signal": None, "out": b64(out), "err": b64(err), "timed_out": False, "too_much": False}


def told(out: str, err: str = "") -> tuple[str, str, int]:
    found = canaries._reduced(ended(out, err), KEEP)
    return *(base64.b64decode(found[key]).decode() for key in ("out", "err")), found["withheld"]


def test_a_canary_comes_and_its_line_does_not() -> None:
    line = f"{LEAKED}lsmlab-{WORD}:!:20000:0:99999:7:::\n"
    assert told(f"{LEAKED}\n{line}") == (f"lsmlab-{WORD}:", "", len(f"{LEAKED}\n{line}") - len(f"lsmlab-{WORD}:"))


def test_nothing_foreseen_is_nothing_at_all() -> None:
    assert told(LEAKED, LEAKED) == ("", "", 2 * len(LEAKED))


def test_the_kernel_s_own_words_come_and_nothing_with_them() -> None:
    assert told("", "Connection refused") == ("", "Connection refused", 0)
    assert told("", f"Connection refused{LEAKED}") == ("", "", len(f"Connection refused{LEAKED}"))


def test_a_refusal_comes_without_what_stands_around_it() -> None:
    words = f"cat: {LEAKED}: Permission denied\n"
    assert told("", words) == ("", "Permission denied", len(words) - len("Permission denied"))


def test_what_a_verdict_looks_for_is_what_is_asked_for() -> None:
    scenario = discovery.load_scenarios(["nginx-reads-shadow"])[0]
    attack = scenario.attacks[0]
    assert attempt._foreseen(attack, WORD) == {"texts": [WORD, f"lsmlab-{WORD}:"], "patterns": [attempt.REFUSALS]}


@given(st.text(alphabet="ab\n:", max_size=200), st.booleans())
def test_only_words_that_were_asked_for_ever_come(around: str, there: bool) -> None:
    out = around + (WORD if there else "") + around
    kept, withheld = canaries.told(out.encode(), KEEP["texts"], KEEP["patterns"])
    assert kept == (WORD.encode() if there else b"")
    assert len(kept) + withheld == len(out)


# The log


def record(kind: str, serial: int, rest: str) -> str:
    return f"type={kind} msg=audit(1764360000.000:{serial}): {rest}"


OWN = (
    record("AVC", 1, "avc:  denied  { read } for  pid=101 comm=nginx scontext=u:r:httpd_t:s0"),
    record("SYSCALL", 1, "arch=c000003e syscall=257 success=no ppid=100 pid=101 auid=4294967295"),
    record("PROCTITLE", 1, "proctitle=6E67696E78"),
)
CHILD = (
    record("SYSCALL", 2, 'syscall=56 success=yes ppid=101 pid=900 auid=4294967295 key="lsmlab-fork"'),
    record("SYSCALL", 3, "syscall=59 success=no ppid=900 pid=901 auid=4294967295"),
)
THEIRS = (
    record("SYSCALL", 4, "syscall=257 success=no ppid=1 pid=500 auid=1000 key=its-own"),
    record("PATH", 4, 'name="/home/anna/diary"'),
    record("USER_CMD", 5, "pid=501 uid=1000 auid=1000 msg='cmd=\"private\"'"),
    record("AVC", 6, "avc:  denied  { read } for  pid=777 comm=other scontext=u:r:other_t:s0"),
    record("USER_START", 7, "pid=1010 uid=0 auid=4294967295"),
)
TELLING = (
    record("MAC_STATUS", 8, "enforcing=0 old_enforcing=1 auid=1000"),
    record("SYSCALL", 8, "syscall=1 success=yes ppid=1 pid=600 auid=1000"),
    record("CONFIG_CHANGE", 9, "auid=1000 op=remove_rule"),
    record("AVC", 10, 'apparmor="STATUS" operation="profile_replace" name="x" pid=601'),
)
END = record("USER", 11, "pid=700 uid=0 msg='lsmlab-the-end'")


def own(*lines: str, auid: int | None = None, subjects: tuple[str, ...] = ()) -> list[str]:
    log = "".join(f"{line}\n" for line in lines)
    return canaries.own_events(log, {100, 101}, auid, subjects, "lsmlab-the-end").splitlines()


def test_own_events_come_whole_with_those_of_descendants_and_others_stay() -> None:
    assert own(*OWN, *THEIRS, *CHILD, *TELLING, END) == [*OWN[:2], *CHILD, *TELLING, END]


@pytest.mark.parametrize("node", ["", "node=web1 "])
def test_command_lines_of_own_events_stay_as_well(node: str) -> None:
    secrets = [f"{node}{record(kind, 1, 'a0=616263')}" for kind in ("PROCTITLE", "EXECVE")]
    near = record("EXECVEX", 1, "x")
    assert own(*OWN, *secrets, near, END) == [*OWN[:2], near, END]


@pytest.mark.parametrize("line", THEIRS)
def test_another_s_record_stays(line: str) -> None:
    assert own(line, END) == [END]


def test_a_command_s_records_are_known_by_its_audit_user_id_and_nobody_s_are_not() -> None:
    mine = record("SYSCALL", 20, "pid=5000 ppid=4999 auid=1073741999 key=lsmlab-subject")
    assert own(mine, *THEIRS, END, auid=1073741999) == [mine, END]
    assert own(record("SYSCALL", 21, "pid=1 ppid=0 auid=4294967295"), END, auid=4294967295) == [END]


def test_a_service_that_did_not_start_is_known_by_its_domain_alone() -> None:
    gone = record("AVC", 30, "avc:  denied  { name_bind } for  pid=8000 scontext=u:r:httpd_t:s0 tcontext=u:r:x_t:s0")
    profile = record("AVC", 31, 'apparmor="DENIED" operation="open" profile="nginx" pid=8001')
    near = record("AVC", 32, 'apparmor="DENIED" operation="open" profile="nginx-other" pid=8002')
    assert own(gone, profile, near, END, subjects=("httpd_t", "nginx")) == [gone, profile, END]
    user = record("SYSCALL", 33, "pid=8003 subj=u:r:httpd_t:s0-s0:c0.c1023 key=x")
    bare = record("SYSCALL", 34, "pid=8004 subj=u:r:httpd_t")
    others = (
        record("AVC", 35, "avc:  denied  { signal } for  pid=9 scontext=u:r:other_t:s0 tcontext=u:r:httpd_t:s0"),
        record("AVC", 36, "avc:  denied  { read } for  pid=9 scontext=u:r:my_httpd_t:s0 tcontext=u:r:x_t:s0"),
        record("AVC", 37, "avc:  denied  { read } for  pid=9 scontext=u:r:httpd_t_x:s0 tcontext=u:r:x_t:s0"),
        record("AVC", 38, 'apparmor="DENIED" operation="signal" profile="other" pid=9 peer="nginx"'),
        record("AVC", 39, 'apparmor="DENIED" operation="open" old-profile="nginx" pid=9'),
    )
    assert own(user, bare, *others, END, subjects=("httpd_t", "nginx")) == [user, bare, END]


def test_an_own_event_counts_whatever_the_order_and_a_piece_of_a_line_is_dropped() -> None:
    assert own("auid=100 pid=101 no record", OWN[1], OWN[0], "", END) == [OWN[1], OWN[0], END]


# The operations


def test_an_attempt_tells_what_is_foreseen_and_the_log_s_own_events(monkeypatch: pytest.MonkeyPatch) -> None:
    remembered: list[int] = []
    made = {
        "planted": True, "effect_before": None, "effect_after": None,
        "result": ended(f"{LEAKED}\nlsmlab-{WORD}:\n"),
        "closed": {"log": "\n".join((*OWN, *THEIRS, END)), "subject": {"processes": [{"pid": 101}]}},
    }  # fmt: skip
    monkeypatch.setattr(agent, "attempt", lambda **_: made)
    monkeypatch.setattr(agent, "pids", lambda _: [100])
    monkeypatch.setattr(undo, "remember", remembered.append)
    close = {"unit": "nginx.service", "word": "lsmlab-the-end"}
    found = canaries.attempt(close=close, keep=KEEP, command={"who": {"auid": 7}})
    assert base64.b64decode(found["result"]["out"]).decode() == f"lsmlab-{WORD}:"
    assert found["closed"]["log"].splitlines() == [*OWN[:2], END]
    assert remembered == [7]
    assert LEAKED not in str(found) and "diary" not in str(found)


def test_what_could_tell_more_is_refused() -> None:
    with pytest.raises(agent.Refused, match="no effect"):
        canaries.attempt(close={"unit": "x", "word": "y"}, keep=KEEP, effect=["cat", "/etc/shadow"])
    with pytest.raises(agent.Refused, match="withheld"):
        canaries.OPERATIONS["visit"](method="GET", port=80, path="/", timeout=1)
