"""What may leave a machine that is kept: canaries and words that a scenario foresaw, never what leaked beside them.

Runs there, beside the agent, and takes the place of its operations that answer with what a service gave away or with
the audit log. Of an output only those of the words asked for that are in it are told, and how many bytes are not; of
the log the events of the service's own processes, and those that say that a mode, a policy or auditing was changed.
A container engine is asked what is in `ASKED` alone, of containers that were made through here.
"""

from __future__ import annotations

import base64
import errno
import json
import os
import re
import urllib.parse
from collections.abc import Callable, Iterable
from typing import Any

from lsmlab.guest import agent, engine, undo

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

ASKED = {
    "GET /version": ("ApiVersion",),
    "GET /info": ("SecurityOptions",),
    "POST /images/create": (),
    "GET /images/lsmlab/json": ("Id",),
    "POST /containers/create": ("Id",),
    "POST /containers/ID/start": (),
    "GET /containers/ID/json": ("State.Running", "State.ExitCode", "Config.Tty"),
    "POST /containers/ID/exec": ("Id",),
    "GET /exec/ID/json": ("ExitCode",),
}
"""What a container engine may be asked, and what of its answer is told: these keys. No container's log is among it."""
LOOKS = frozenset({"GET /version", "GET /info"})
"""They change nothing, and are asked before a journal is written."""
EXEC = re.compile(r"POST /exec/ID/start")
NUMBERED = re.compile(r"/(containers|exec)/([0-9a-f]{12,64})/")
VERSION = re.compile(r"^/v[0-9]{1,3}\.[0-9]{1,3}(?=/)")

_subjects: list[str] = []
_ours: set[str] = set()
"""The ids of the containers, and of the commands in them, that were made through here."""


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
    for stream in {"out", "err", "head"} & result.keys():
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


def attempt(close: dict[str, Any], keep: dict[str, Any], **more: Any) -> dict[str, Any]:
    """As the agent's, with what `keep` names of the output alone."""
    if more.get("effect"):
        raise agent.Refused("on a machine that is kept, no effect is looked for")
    before = agent.pids(close["unit"])
    auid = None
    if more.get("command") is not None:
        auid = more["command"]["who"]["auid"]
        undo.remember(auid)
    inside = more.get("engine")
    if inside is not None:
        _see(base64.b64decode(inside["data"]), EXEC)
        auid = keep["auid"]
        undo.remember(auid)
    made = agent.attempt(close=close, **more)
    if inside is not None:
        made["result"] = _written(made["result"])
    closed = _window(made["closed"], close["word"], before, auid)
    return {**made, "result": _reduced(made["result"], keep), "closed": closed}


def _written(result: dict[str, Any]) -> dict[str, Any]:
    """What a command in a container wrote, from the engine's answer; of one that is cut short nothing."""
    if result["timed_out"] or result["too_much"]:
        return {**result, "out": ""}
    status, body = engine.response(base64.b64decode(result["out"]))
    if status >= 300:
        raise agent.Refused(f"the container runs no command: {engine.message_of(body)}")
    out, err = (base64.b64encode(stream).decode() for stream in engine.streams(body))
    return {**result, "out": out, "err": err}


def _see(request: bytes, *others: re.Pattern[str]) -> tuple[str, str, bytes]:
    """Method and way of a request, without numbers; its target; its body. Refused where it is not one of ASKED or
    `others`, or is about somebody else's."""
    head, _, body = request.partition(b"\r\n\r\n")
    method, target, _ = head.split(b"\r\n")[0].decode("latin-1").split(" ")
    path = VERSION.sub("", target.partition("?")[0])
    number = NUMBERED.match(path)
    if number is not None and number[2] not in _ours:
        raise agent.Refused(f"{path[:200]}: is none of lsmlab's")
    what = method + " " + NUMBERED.sub(r"/\1/ID/", path)
    if what not in ASKED and not any(other.fullmatch(what) for other in others):
        raise agent.Refused(f"{what[:200]}: is not asked on a machine that is kept")
    if what not in LOOKS and not undo.engine_word():
        raise agent.Refused(f"{what}: before the journal is written")
    return what, target, body


def _named(target: str, body: bytes) -> bytes:
    """The request for a container, with the journal's word on it: by that it is found and removed."""
    word = undo.engine_word()
    path, _, query = target.partition("?")
    words = dict(urllib.parse.parse_qsl(query))
    words["name"] = f"lsmlab-{word[:8]}-{words.get('name', 'container')}"
    wanted = json.loads(body)
    wanted["Labels"] = {engine.LABEL: word}
    data = json.dumps(wanted).encode()
    lines = (
        f"POST {path}?{urllib.parse.urlencode(words)} HTTP/1.1", "Host: engine", "Connection: close",
        "Content-Type: application/json", f"Content-Length: {len(data)}", "", "",
    )  # fmt: skip
    return "\r\n".join(lines).encode() + data


def _kept(found: Any, keys: Iterable[str]) -> Any:
    """Those keys of an answer; a dot stands between one and the next below it."""
    kept: dict[str, Any] = {}
    for key in keys:
        first, _, below = key.partition(".")
        if isinstance(found, dict) and first in found:
            one = _kept(found[first], [below]) if below else found[first]
            kept[first] = {**kept[first], **one} if below and first in kept else one
    return kept


def exchange(path: str, data: str, timeout: float) -> dict[str, Any]:
    """As the agent's, for what is in `ASKED`; of the answer its keys, or why the engine has refused.

    An undoing waits for it: a container that is made meanwhile would be left.
    """
    with undo.turn():
        return _exchange(path, data, timeout)


def _exchange(path: str, data: str, timeout: float) -> dict[str, Any]:
    request = base64.b64decode(data)
    what, target, body = _see(request)
    if what == "POST /containers/create":
        request = _named(target, body)
    result = agent.exchange(path, base64.b64encode(request).decode(), timeout)
    if result["timed_out"] or result["too_much"]:
        return {**result, "out": ""}
    status, body = engine.response(base64.b64decode(result["out"]))
    told = b""
    if status >= 300:
        told = json.dumps({"message": engine.message_of(body)}).encode()
    elif ASKED[what]:
        kept = _kept(json.loads(body), ASKED[what])
        if what.startswith("POST ") and re.fullmatch("[0-9a-f]{12,64}", str(kept.get("Id"))):
            _ours.add(kept["Id"])
        told = json.dumps(kept).encode()
    lines = (f"HTTP/1.1 {status} -", "Content-Type: application/json", f"Content-Length: {len(told)}", "", "")
    return {**result, "out": base64.b64encode("\r\n".join(lines).encode() + told).decode()}


def visit(**_: Any) -> None:
    """Not here: what a visitor is answered is withheld."""
    raise agent.Refused("what a visitor is answered is withheld")


OPERATIONS: dict[str, Callable[..., Any]] = {f.__name__: f for f in (subjects, close_window, attempt, exchange, visit)}
