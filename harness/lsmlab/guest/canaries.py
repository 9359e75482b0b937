"""What may leave a machine that is kept: canaries and words that a scenario foresaw, never what leaked beside them.

Runs there, beside the agent, and takes the place of its operations that answer with what a service gave away or with
the audit log. Of an output only those of the words asked for that are in it are told, and how many bytes are not; of
the log the events of the service's own processes, and those that say that a mode, a policy or auditing was changed.
"""

from __future__ import annotations

import base64
import errno
import os
import re
from collections.abc import Callable, Iterable
from typing import Any

from lsmlab.guest import agent, undo

FORK_KEY = 'key="lsmlab-fork"'
EVENT = re.compile(r"msg=audit\(([0-9.]+:[0-9]+)\)")
NUMBER = re.compile(r"\b(pid|ppid|spid|auid)=(\d+)")
TELLING = re.compile(r"^(?:node=\S+ )?type=(?:MAC_STATUS|MAC_POLICY_LOAD|MAC_CONFIG_CHANGE|CONFIG_CHANGE) ")
ARGUMENTS = re.compile(r"^(?:node=\S+ )?type=(?:PROCTITLE|EXECVE) ")
"""Command lines, in which there may be secrets: nothing is concluded from them."""
STATUS = 'apparmor="STATUS"'
ERRORS = frozenset(os.strerror(number).encode() for number in errno.errorcode)
"""The kernel's own words: a connection that is refused."""
NOBODY = (1 << 32) - 1
"""The audit user id of who has not logged in: of every service."""

_BY = r'(?<![\w-])(?:(?:scontext|subj)=[^\s:]+:[^\s:]+:{0}(?![^\s:])|profile="{0}")'

_subjects: list[str] = []


def told(data: bytes, texts: Iterable[str], patterns: Iterable[str]) -> tuple[bytes, int]:
    """Those of `texts` and the first match of each of `patterns` that are in `data`, a line each; how much is not.

    A pattern stands for a few words, never for whatever is there: whoever asks has seen to that.
    """
    text = data.decode("utf-8", "backslashreplace")
    found = [word for word in texts if word in text]
    found += [match[0] for pattern in patterns if (match := re.search(pattern, text))]
    lines = [word for word in dict.fromkeys(found) if not any(word != other and word in other for other in found)]
    kept = "\n".join(lines).encode("utf-8", "backslashreplace")
    return kept, max(0, len(data) - len(kept))


def _reduced(result: dict[str, Any], keep: dict[str, list[str]]) -> dict[str, Any]:
    withheld = 0
    for stream in ("out", "err"):
        data = base64.b64decode(result[stream])
        kept, less = (data, 0) if data in ERRORS else told(data, keep["texts"], keep["patterns"])
        result[stream] = base64.b64encode(kept).decode()
        withheld += less
    return {**result, "withheld": withheld}


def own_events(log: str, pids: Iterable[int], auid: int | None, subjects: Iterable[str], word: str) -> str:
    """The lines of a log that are the service's own, tell of a change, or end the window: events but for `ARGUMENTS`.

    Of `subjects`, what they do themselves, not what is done to them.
    """
    lines = log.split("\n")
    events = [match[1] if (match := EVENT.search(line)) else "" for line in lines]
    numbers = [[(name, int(value)) for name, value in NUMBER.findall(line)] for line in lines]
    family = set(pids)
    for line, found in zip(lines, numbers):  # a process is started before it starts others
        about = dict(found)
        if FORK_KEY in line and about.get("ppid") in family:
            family.add(about.get("pid", -1))
    names = [re.compile(_BY.format(re.escape(subject))) for subject in subjects]
    wanted = set()
    for line, event, found in zip(lines, events, numbers):
        own = any(
            (name != "auid" and value in family) or (name == "auid" and value == auid != NOBODY)
            for name, value in found
        )
        if own or TELLING.match(line) or STATUS in line or word in line or any(name.search(line) for name in names):
            wanted.add(event)
    wanted.discard("")
    told = (line for line, event in zip(lines, events) if event in wanted and not ARGUMENTS.match(line))
    return "".join(f"{line}\n" for line in told)


def _window(
    closed: dict[str, Any], word: str, pids: Iterable[int], auid: int | None = None, subjects: Iterable[str] = ()
) -> dict[str, Any]:
    pids = {*pids, *(process["pid"] for process in closed["subject"]["processes"])}
    return {**closed, "log": own_events(closed["log"], pids, auid, subjects, word)}


def subjects(names: list[str]) -> None:
    """The domains and profiles whose events in the log are told."""
    _subjects[:] = names


def close_window(unit: str, word: str, **more: Any) -> dict[str, Any]:
    """As the agent's, with the service's own events alone, or those of its domain: it may not have started."""
    return _window(agent.close_window(unit=unit, word=word, **more), word, (), None, _subjects)


def attempt(close: dict[str, Any], keep: dict[str, list[str]], **more: Any) -> dict[str, Any]:
    """As the agent's, with what `keep` names of the output alone."""
    if more.get("effect"):
        raise agent.Refused("on a machine that is kept, no effect is looked for")
    before = agent.pids(close["unit"])
    auid = None
    if more.get("command") is not None:
        auid = more["command"]["who"]["auid"]
        undo.remember(auid)
    made = agent.attempt(close=close, **more)
    closed = _window(made["closed"], close["word"], before, auid)
    return {**made, "result": _reduced(made["result"], keep), "closed": closed}


def visit(**_: Any) -> None:
    """Not here: what a visitor is answered is withheld."""
    raise agent.Refused("what a visitor is answered is withheld")


OPERATIONS: dict[str, Callable[..., Any]] = {f.__name__: f for f in (subjects, close_window, attempt, visit)}
