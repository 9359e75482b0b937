"""One operation, tried once in one arm: opens the window, acts, closes the window, returns raw facts. Never judges."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence

from lsmlab import evidence, facts
from lsmlab.channel.base import Channel, CommandResult, run_script
from lsmlab.definition import Strict
from lsmlab.errors import ChannelError, CommandTimeoutError
from lsmlab.scenario import CANARY, Attempt, Canary, Effect
from lsmlab.terms import SourceState

SENTINEL_SECONDS = 20
"""How long the sentinel may take through the audit queue before the log counts as unavailable."""
WINDOW_BYTES = 8 << 20
"""A longer window is a flood: the log counts as unavailable, since its end was not read."""
KEPT_OUTPUT = 64 << 10
"""Characters of output that a record keeps; the judgement is made on all of it."""
AUDIT_LOG = "audit log"
CURL_TIMED_OUT = 28
"""curl(1), EXIT CODES: operation timeout."""

HTTP_STATUS = re.compile(r"http_code=(\d{3})\s*\Z")


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
    canary: str
    canary_planted: bool | None
    """None: the attempt plants none."""
    effect_before: bool | None
    effect_after: bool | None
    seconds: float
    subject_before: facts.SubjectFacts
    subject_after: facts.SubjectFacts
    object: facts.ObjectFacts
    mode_before: facts.ModeFacts
    mode_after: facts.ModeFacts
    source: facts.SourceReading
    log: str
    """The audit log's lines from the window's opening to the sentinel."""
    auid: int | None
    """The audit user id that marks every process of a `run` attempt; None for http."""


def fresh_word() -> str:
    """A random word of 16 letters and digits, made on the host: a restored guest repeats its own random numbers."""
    return secrets.token_hex(8)


def shortened(seen: Observation) -> Observation:
    """`seen` as it is kept: its output cut to `KEPT_OUTPUT`."""
    return seen.model_copy(update={"output": seen.output[:KEPT_OUTPUT], "errors": seen.errors[:KEPT_OUTPUT]})


class Opened(Strict):
    """The facts before an attempt, and where its window in the audit log begins."""

    subject: facts.SubjectFacts
    object: facts.ObjectFacts
    mode: facts.ModeFacts
    audit: facts.AuditState


def open_window(channel: Channel, unit: str, object_path: str) -> Opened:
    """Read the facts that hold before an attempt. Changes nothing in the guest.

    A snapshot taken right after this is the state that the facts describe, so every attempt that starts from the
    snapshot may use them. Raises ChannelError where the guest does not answer or answers nonsense.
    """
    nonce, sentinel = fresh_word(), f"lsmlab-{fresh_word()}"
    arguments = (nonce, unit, object_path, sentinel, str(SENTINEL_SECONDS))
    answer = run_script(channel, "window-open", *arguments, timeout=SENTINEL_SECONDS + 60)
    sections = facts.Sections(answer.check().out, nonce)
    if sections["drained"].strip() != "seen":
        raise ChannelError("the guest's audit queue does not come through to its log: auditd is stopped, or floods")
    if sections["rest"].strip() != "steady":
        raise ChannelError(f"the processes of {unit} do not come to rest")
    return Opened(
        subject=facts.subject_facts(sections),
        object=facts.object_facts(sections, object_path),
        mode=facts.mode_facts(sections),
        audit=facts.audit_state(sections),
    )


def make(channel: Channel, spec: Attempt, unit: str, opened: Opened) -> Observation:
    """Do `spec` once. Side effects are the attempt's own, the canary's line and an audit record.

    Raises ChannelError where the guest does not answer or answers nonsense.
    """
    word = fresh_word()
    planted = _plant(channel, spec.canary, word)
    effect_before = _effect(channel, spec.allowed_if.effect)
    auid = 0x40000000 | secrets.randbits(29) if spec.run else None
    argv, result = _act(channel, spec, opened.subject, auid)
    effect_after = _effect(channel, spec.allowed_if.effect)
    after, sentinel = close_window(channel, unit, opened.audit.size)
    source, log = read_window(after, opened.audit, sentinel)
    status = HTTP_STATUS.search(result.err) if spec.http and result else None
    return Observation(
        attempt=spec.id,
        command=argv,
        exit_code=result.exit_code if result else None,
        signal=result.signal if result else None,
        timed_out=result is None or (spec.http is not None and result.exit_code == CURL_TIMED_OUT),
        output=result.out if result else "",
        errors=result.err if result else "",
        http_status=int(status[1]) if status and status[1] != "000" else None,
        canary=word,
        canary_planted=planted,
        effect_before=effect_before,
        effect_after=effect_after,
        seconds=round(result.seconds, 3) if result else float(spec.timeout),
        subject_before=opened.subject,
        subject_after=facts.subject_facts(after),
        object=opened.object,
        mode_before=opened.mode,
        mode_after=facts.mode_facts(after),
        source=source,
        log=log,
        auid=auid,
    )


def close_window(channel: Channel, unit: str, offset: int) -> tuple[facts.Sections, str]:
    """Send a sentinel through the audit queue and read the log from byte `offset` on, with the facts after it.

    Returns the sections and the sentinel. Raises ChannelError.
    """
    nonce, sentinel = fresh_word(), f"lsmlab-{fresh_word()}"
    arguments = (nonce, unit, str(offset), sentinel, str(SENTINEL_SECONDS), str(WINDOW_BYTES))
    answer = run_script(channel, "window-close", *arguments, timeout=SENTINEL_SECONDS + 60)
    return facts.Sections(answer.check().out, nonce), sentinel


def _plant(channel: Channel, canary: Canary | None, word: str) -> bool | None:
    """Append the canary's line in place, where the file is there; the file keeps its inode, mode and label."""
    if canary is None:
        return None
    line = canary.line.replace(CANARY, word)
    return channel.run(["sh", "-c", '[ -f "$1" ] && printf "%s\\n" "$2" >> "$1"', "plant", canary.file, line]).ok


def _effect(channel: Channel, effect: Effect | None) -> bool | None:
    if effect is None:
        return None
    return re.search(effect.output, channel.run(effect.run).out) is not None


def _act(
    channel: Channel, spec: Attempt, subject: facts.SubjectFacts, auid: int | None
) -> tuple[tuple[str, ...], CommandResult | None]:
    """The operation itself. A result of None: it did not end in time."""
    if spec.http is not None:
        argv = curl_command(spec)
        allowance = spec.timeout + 30  # curl keeps the limit itself; this one is for a guest that hangs
    else:
        assert spec.run is not None
        assert auid is not None
        argv, allowance = spec.run, spec.timeout
    try:
        if spec.http is not None:
            return argv, channel.run(argv, timeout=allowance)
        return argv, run_as(channel, argv, subject, auid or 0, allowance)
    except CommandTimeoutError:
        return argv, None


def curl_command(spec: Attempt) -> tuple[str, ...]:
    """The visitor's request, its path sent as it is written."""
    assert spec.http is not None
    request = spec.http
    return (
        "curl", "--silent", "--show-error", "--globoff", "--path-as-is", "--max-time", str(spec.timeout),
        "--request", request.method, "--write-out", "%{stderr}http_code=%{http_code}", f"http://127.0.0.1:{request.port}{request.path}",
    )  # fmt: skip


def run_as(
    channel: Channel, argv: Sequence[str], subject: facts.SubjectFacts, auid: int, timeout: float
) -> CommandResult:
    """Run `argv` as the service: the ids, groups, capabilities of its worker, and its domain or profile.

    Raises ChannelError where the service has no process to take them from.
    """
    if not subject.workers:
        raise ChannelError("the service has no process whose rights a command could be given")
    worker = subject.workers[0]
    main = next((p for p in subject.processes if p.main), worker)
    caps = capability_list(worker.cap_bounding)
    groups = ",".join(str(g) for g in worker.groups) or "-"
    arguments = (
        str(auid),
        str(worker.uids[1]),
        str(worker.gids[1]),
        groups,
        caps,
        str(int(worker.no_new_privs)),
        main.exe,
    )
    return run_script(channel, "run-as", *arguments, *argv, timeout=timeout)


def capability_list(mask: int) -> str:
    """setpriv's notation of a capability set: drop all, then add the numbered ones that `mask` holds."""
    return ",".join(["-all", *(f"+cap_{n}" for n in range(mask.bit_length()) if mask >> n & 1)])


def read_window(sections: facts.Sections, opened: facts.AuditState, sentinel: str) -> tuple[facts.SourceReading, str]:
    """The audit log between the window's opening and its sentinel, and how it was read. Never guesses: a rotated,
    truncated or flooded log, a daemon that is gone or changed, a lost record or a missing sentinel is unavailable."""
    problem = ""
    log = sections["window"]
    try:
        closed = facts.audit_state(sections)
    except ChannelError as error:
        return _reading(SourceState.UNAVAILABLE, error.message), ""
    before_sentinel, found, _ = log.partition(sentinel)
    if not opened.enabled or not closed.enabled:
        problem = "auditing is off (auditctl: enabled 0)"
    elif not opened.daemon_pid or opened.daemon_pid != closed.daemon_pid:
        problem = f"auditd stopped or changed: pid {opened.daemon_pid} before, {closed.daemon_pid} after"
    elif opened.log != closed.log:
        problem = "the log was rotated inside the window"
    elif closed.size < opened.size:
        problem = "the log was truncated inside the window"
    elif closed.lost != opened.lost:
        problem = f"{closed.lost - opened.lost} records were lost by the kernel"
    elif not found:
        problem = f"the sentinel did not come through the audit queue: {sections['sentinel'].strip()[:200]}"
    if problem:
        return _reading(SourceState.UNAVAILABLE, problem), log
    lines = before_sentinel.rpartition("\n")[0]  # the sentinel's own record is not the attempt's
    count = len(evidence.parse(lines))
    state = SourceState.FETCHED if count else SourceState.EMPTY
    return _reading(state, f"{count} records, none lost"), lines


def _reading(state: SourceState, detail: str) -> facts.SourceReading:
    return facts.SourceReading(name=AUDIT_LOG, state=state, detail=detail)
