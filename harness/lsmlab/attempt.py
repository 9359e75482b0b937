"""One operation, tried once in one arm: opens the window, acts, closes the window, returns raw facts. Never judges."""

from __future__ import annotations

import base64
import re
import secrets
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field

from lsmlab import evidence, facts
from lsmlab.channel.base import Channel
from lsmlab.container import install
from lsmlab.definition import Strict
from lsmlab.errors import ChannelError
from lsmlab.scenario import CANARY, Attempt, Effect
from lsmlab.terms import SourceState

if TYPE_CHECKING:
    from lsmlab.container.engine import Running

SENTINEL_SECONDS = 20
"""How long the sentinel may take through the audit queue before the log counts as unavailable."""
WINDOW_BYTES = 8 << 20
"""A longer window is a flood: the log counts as unavailable, since its end was not read."""
KEPT_OUTPUT = 64 << 10
"""Characters of output that a record keeps; the judgement is made on all of it."""
ENGINE_SECONDS = 45
"""What a container engine may take besides, to start a command: one second under emulation, ten on a busy machine."""
AUDIT_LOG = "audit log"
REFUSALS = "Permission denied|Operation not permitted"
"""strerror(3) of EACCES and EPERM in the C locale, which the guests use."""


class Observation(Strict):
    """What one attempt showed. Times in seconds."""

    attempt: str
    command: tuple[str, ...]
    exit_code: int | None
    signal: int | None
    timed_out: bool
    output: str
    errors: str
    http_status: int | None
    """None: not an http attempt, or no answer came."""
    head: str = ""
    """What an answer says besides its body: its status line, its fields, what lies between its chunks."""
    cut_short: bool = False
    """An answer was not read to its end, or a command's children may go on writing: `output` lacks the rest."""
    canary: str
    canary_planted: bool | None
    """None: the attempt plants none."""
    effect_before: bool | None
    effect_after: bool | None
    seconds: float
    subject_before: facts.SubjectFacts
    subject_after: facts.SubjectFacts
    object: facts.ObjectFacts | None
    """None: the object has no path."""
    mode_before: facts.ModeFacts
    mode_after: facts.ModeFacts
    source: facts.SourceReading
    log: str
    """The audit log's lines from the window's opening to the sentinel."""
    withheld: int = 0
    """Bytes of output and errors that stayed on the machine: of one that is kept, only canaries come."""
    auid: int | None
    """The audit user id that marks every process of a `run` attempt; None for http."""


def fresh_word() -> str:
    """A random word of 16 letters and digits, made on the host: a restored guest repeats its own random numbers."""
    return secrets.token_hex(8)


def shortened(seen: Observation) -> Observation:
    """`seen` as it is kept: its output cut to `KEPT_OUTPUT`."""
    return seen.model_copy(update={name: getattr(seen, name)[:KEPT_OUTPUT] for name in ("output", "errors", "head")})


class Opened(Strict):
    """The facts before an attempt, and where its window in the audit log begins."""

    subject: facts.SubjectFacts
    object: facts.ObjectFacts | None
    mode: facts.ModeFacts
    audit: facts.AuditState


class Opening(Opened):
    """The agent's answer to `open_window`."""

    resting: bool
    drained: bool


class Closed(Strict):
    """The agent's answer to `close_window`: the log from the window's opening on, and the facts after it."""

    log: str
    problem: str
    subject: facts.SubjectFacts
    mode: facts.ModeFacts
    audit: facts.AuditState


def _text(value: object) -> object:
    return base64.b64decode(value, validate=True).decode("utf-8", "backslashreplace") if type(value) is str else value


Text = Annotated[str, BeforeValidator(_text)]
"""Base64 in the agent's answer; bytes that are not UTF-8 become backslash escapes."""


class Ended(Strict):
    """How a command or a request ended, as the agent says it. `status` is an answer's HTTP status; `head` and
    `cut_short` are as in `Observation`."""

    exit_code: int | None = None
    signal: int | None = None
    status: int | None = None
    cut_short: bool = False
    head: Text = ""
    out: Text
    err: Text
    timed_out: bool
    too_much: bool
    seconds: float = Field(ge=0, le=1e6, allow_inf_nan=False)
    withheld: int = Field(default=0, ge=0)

    def check(self, what: str, *, command: bool) -> Ended:
        """Itself, where it can be what it says. Raises ChannelError."""
        if self.too_much:
            raise ChannelError(f"{what}: more output than the agent carries")
        ends = [end for end in (self.exit_code, self.signal) if end is not None]
        if command and len(ends) != (0 if self.timed_out else 1):
            raise ChannelError(
                f"{what}: the agent answered nonsense: exit status {self.exit_code}, signal {self.signal}"
            )
        return self


class Made(Strict):
    """The agent's answer to `attempt`."""

    planted: bool | None
    effect_before: Ended | None
    effect_after: Ended | None
    result: Ended
    closed: Closed


def open_window(channel: Channel, unit: str, object_path: str | None) -> Opened:
    """Let the service come to rest and the audit queue drain, and read the facts that hold before an attempt.

    A snapshot taken right after this is the state that the facts describe, so every attempt that starts from the
    snapshot may use them. Raises ChannelError where the guest does not answer or answers nonsense.
    """
    answer = channel.ask(
        "open_window", within=SENTINEL_SECONDS + 60,
        unit=unit, object=object_path, word=_sentinel(), seconds=SENTINEL_SECONDS,
    )  # fmt: skip
    opening = facts.read(Opening, answer)
    if (opening.object is None) != (object_path is None):
        raise ChannelError(f"the agent answered nonsense: what it found of {object_path} is {opening.object}")
    if not opening.drained:
        raise ChannelError("the guest's audit queue does not come through to its log: auditd is stopped, or floods")
    if not opening.resting:
        raise ChannelError(f"the processes of {unit} do not come to rest")
    return Opened(**{name: getattr(opening, name) for name in Opened.model_fields})


def close_window(channel: Channel, unit: str, opened: facts.AuditState) -> tuple[facts.SourceReading, str]:
    """Send a sentinel through the audit queue, and read the log from the window's opening up to it."""
    sentinel = _sentinel()
    answer = channel.ask("close_window", within=SENTINEL_SECONDS + 60, **_closing(unit, opened, sentinel))
    return read_window(facts.read(Closed, answer), opened, sentinel)


def make(
    channel: Channel,
    spec: Attempt,
    unit: str,
    opened: Opened,
    container: Running | None = None,
    *,
    withhold: bool = False,
) -> Observation:
    """Do `spec` once, a command in `container` where there is one. Side effects are the attempt's own, the canary's
    line and an audit record.

    `withhold`: of the output only what the verdict is made of is to leave the machine (guest/canaries.py does it).
    Raises ChannelError where the guest does not answer or answers nonsense, and EngineError.
    """
    word, sentinel = fresh_word(), _sentinel()
    auid = fresh_auid() if spec.run else None
    inside = _Inside(channel, container, spec, auid) if container is not None and auid is not None else None
    effect = spec.allowed_if.effect
    closing = _closing(unit, opened.audit, sentinel) | {"known": opened.subject.service.model_dump()}
    answer = channel.ask(
        "attempt",
        within=spec.timeout + SENTINEL_SECONDS + 120,
        canary=_canary(spec, word),
        effect=list(effect.run) if effect else None,
        **(inside.action if inside else _action(spec, opened.subject, auid)),
        close=closing,
        **({"keep": _foreseen(spec, word) | ({"auid": auid} if inside else {})} if withhold else {}),
    )
    made = facts.read(Made, answer)
    if inside is not None:
        ended = inside.ended_there(made.result) if withhold else inside.ended(made.result, answer["result"])
        made = made.model_copy(update={"result": ended})
    made.result.check(spec.id, command=spec.run is not None)
    if (made.planted is None) != (spec.canary is None):
        raise ChannelError(f"{spec.id}: the agent does not say whether it planted the canary")
    source, log = read_window(made.closed, opened.audit, sentinel)
    return Observation(
        attempt=spec.id,
        command=spec.run or ("GET" if spec.http is None else spec.http.method, url_of(spec)),
        exit_code=made.result.exit_code,
        signal=made.result.signal,
        timed_out=made.result.timed_out,
        output=made.result.out,
        errors=made.result.err,
        http_status=made.result.status,
        cut_short=made.result.cut_short,
        head=made.result.head,
        canary=word,
        canary_planted=made.planted,
        effect_before=_shows(effect, made.effect_before),
        effect_after=_shows(effect, made.effect_after),
        seconds=round(made.result.seconds, 3),
        subject_before=opened.subject,
        subject_after=made.closed.subject,
        object=opened.object,
        mode_before=opened.mode,
        mode_after=made.closed.mode,
        source=source,
        log=log,
        auid=auid,
        withheld=made.result.withheld,
    )


def _foreseen(spec: Attempt, word: str) -> dict[str, Any]:
    """The words of an output that a verdict looks for: texts as they are, and patterns."""
    proof = spec.allowed_if.output
    texts = [word] + ([] if proof is None else [proof.replace(CANARY, word)])
    return {"texts": texts, "patterns": [REFUSALS, *(b.output for b in spec.blocked_if if b.output is not None)]}


class _Inside:
    """A command that the engine runs in a container: ready to be run, and then how it ended."""

    def __init__(self, channel: Channel, container: Running, spec: Attempt, auid: int) -> None:
        assert spec.run is not None
        channel.write_file(install.AUID_PATH, f"{auid}\n".encode())
        self._container, self._spec = container, spec
        self._number, request = container.prepare(spec.run)
        data = base64.b64encode(request).decode()
        self.action = {"engine": {"path": install.SOCKET, "data": data, "timeout": spec.timeout + ENGINE_SECONDS}}

    def ended(self, exchange: Ended, answer: Any) -> Ended:
        """From the engine's answer, `answer` with its bytes as they came. Raises EngineError."""
        from lsmlab.container import transport  # noqa: PLC0415 - its library takes a moment, and few commands need it

        if exchange.timed_out:  # what came is in the engine's frames, and the command goes on in its container
            return exchange.model_copy(update={"out": "", "cut_short": True})
        written = self._container.output(transport.carried(answer, self._spec.id))
        out, err = (stream.decode("utf-8", "backslashreplace") for stream in (written.out, written.err))
        code = self._container.exit_code(self._number)
        return exchange.model_copy(update={"out": out, "err": err, "exit_code": code})

    def ended_there(self, exchange: Ended) -> Ended:
        """The same where the machine has told already what the command wrote, as far as it may. Raises EngineError."""
        if exchange.timed_out:
            return exchange.model_copy(update={"cut_short": True})
        return exchange.model_copy(update={"exit_code": self._container.exit_code(self._number)})


def plant(channel: Channel, spec: Attempt) -> str:
    """Plant the attempt's canary, where it has one, and no more; the line."""
    canary = _canary(spec, fresh_word())
    if canary is None:
        return ""
    if channel.ask("plant", file=canary["file"], line=canary["line"]) is not True:
        raise ChannelError(f"the canary could not be planted in {canary['file']}")
    return canary["line"]


def _canary(spec: Attempt, word: str) -> dict[str, str] | None:
    return {"file": spec.canary.file, "line": spec.canary.line.replace(CANARY, word)} if spec.canary else None


def fresh_auid() -> int:
    """A random audit user id, far from those of people."""
    return 0x40000000 | secrets.randbits(29)


def _sentinel() -> str:
    return f"lsmlab-{fresh_word()}"


def _closing(unit: str, opened: facts.AuditState, sentinel: str) -> dict[str, Any]:
    return {
        "unit": unit, "offset": opened.size, "word": sentinel, "seconds": SENTINEL_SECONDS, "most": WINDOW_BYTES,
    }  # fmt: skip


def _action(spec: Attempt, subject: facts.SubjectFacts, auid: int | None) -> dict[str, Any]:
    """The operation itself, as the agent takes it. Raises ChannelError."""
    if spec.http is not None:
        return {
            "request": {
                "method": spec.http.method, "port": spec.http.port, "path": spec.http.path, "timeout": spec.timeout,
                **({} if spec.http.body is None else {"body": spec.http.body}),
            }
        }  # fmt: skip
    assert auid is not None
    return {"command": command_as(spec, subject, auid)}


def command_as(spec: Attempt, subject: facts.SubjectFacts, auid: int) -> dict[str, Any]:
    """The arguments of the agent's `run_as`. Raises ChannelError where there is no process to act as."""
    assert spec.run is not None
    if not subject.workers:
        raise ChannelError("the service has no process whose rights a command could be given")
    worker = subject.workers[0]
    main = next((p for p in subject.processes if p.main), worker)
    who = {
        "auid": auid, "uid": worker.uids[1], "gid": worker.gids[1], "groups": list(worker.groups),
        "cap_bounding": worker.cap_bounding, "no_new_privs": worker.no_new_privs, "exe": main.exe,
    }  # fmt: skip
    return {"argv": list(spec.run), "who": who, "timeout": spec.timeout}


def acting_as(worker: facts.Process) -> facts.Process:
    """What a command has that the agent's `run_as` runs in the place of `worker`: as an ordinary user no capability, as
    root all of the bounding set, and the agent's user namespace."""
    uid, gid = worker.uids[1], worker.gids[1]
    return worker.model_copy(
        update={
            "uids": (uid,) * 4, "gids": (gid,) * 4, "cap_effective": 0 if uid else worker.cap_bounding,
            "initial_userns": True,
        }
    )  # fmt: skip


def url_of(spec: Attempt) -> str:
    """The address that an http attempt asks for, its path as it is sent; empty for others."""
    return f"http://127.0.0.1:{spec.http.port}{spec.http.path}" if spec.http is not None else ""


def _shows(effect: Effect | None, seen: Ended | None) -> bool | None:
    """Whether the effect was there. Raises ChannelError where its command did not come to an end of its own."""
    if effect is None:
        return None
    what = f"the effect's command, {effect.run[0]}"
    if seen is None or seen.timed_out:
        raise ChannelError(f"{what}: not done in time")
    return re.search(effect.output, seen.check(what, command=True).out) is not None


def read_window(closed: Closed, opened: facts.AuditState, sentinel: str) -> tuple[facts.SourceReading, str]:
    """The audit log between the window's opening and its sentinel, and how it was read. Never guesses: a rotated,
    truncated or flooded log, a daemon that is gone or changed, a lost record or a missing sentinel is unavailable."""
    problem, now, log = closed.problem, closed.audit, closed.log
    before_sentinel, found, _ = log.partition(sentinel)
    if problem:
        pass
    elif not opened.enabled or not now.enabled:
        problem = "auditing is off (auditctl: enabled 0)"
    elif not opened.daemon_pid or opened.daemon_pid != now.daemon_pid:
        problem = f"auditd stopped or changed: pid {opened.daemon_pid} before, {now.daemon_pid} after"
    elif opened.log != now.log:
        problem = "the log was rotated inside the window"
    elif now.size < opened.size:
        problem = "the log was truncated inside the window"
    elif now.lost != opened.lost:
        problem = f"{now.lost - opened.lost} records were lost by the kernel"
    elif not found:
        problem = "the sentinel did not come through the audit queue"
    if problem:
        return _reading(SourceState.UNAVAILABLE, problem), log
    lines = before_sentinel.rpartition("\n")[0]  # the sentinel's own record is not the attempt's
    count = len(evidence.parse(lines))
    state = SourceState.FETCHED if count else SourceState.EMPTY
    return _reading(state, f"{count} records, none lost"), lines


def _reading(state: SourceState, detail: str) -> facts.SourceReading:
    return facts.SourceReading(name=AUDIT_LOG, state=state, detail=detail)
