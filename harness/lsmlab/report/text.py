"""What a person reads of outcomes: on a terminal (rich), and as plain text in a test's failure.

Colours have one meaning each: green is as wanted, red is not (a breach, broken work, another verdict than expected),
yellow is unclear or an error. Each is also said in words, and a red result is in capitals: nothing rests on colour.
All text is put into `Text` objects, which read no markup, and goes through `clean`: a guest chooses much of it.
"""

from __future__ import annotations

import re
import shlex
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from lsmlab.attempt import Observation
from lsmlab.container.spec import ImageRecord
from lsmlab.evidence import Denial
from lsmlab.facts import ModeFacts, ObjectFacts, Process
from lsmlab.outcome import ArmRecord, AttemptRecord, Outcome
from lsmlab.report.tables import Block, Shown, bullets, duration, facts
from lsmlab.terminal import clean
from lsmlab.terms import ENFORCING_ARM, Arm, AttemptKind, Result, Verdict

__all__ = [
    "clean",
    "duration",
    "failure_text",
    "outcome_detail",
    "outcome_summary",
    "outcomes_table",
    "run_summary",
]

GOOD, BAD, ODD = "green", "red", "yellow"
SHOWN_RECORDS = 4
"""Of one list in a summary; `lsmlab show` has all."""
SHOWN_LINES = 10
"""Of an attempt's output."""

_MATTERS = re.compile(
    r"\{ [^}]* \}|\bpermissive=\d|\b[st]context=\S+|\btclass=\S+"
    r"|\b(?:apparmor|profile|operation|name|path|denied_mask|capname)=\S+"
)
"""In a record of the kernel: who, what, on which object, and whether it was refused."""


def outcome_summary(outcome: Outcome, number: int | None = None) -> RenderableType:
    """What `lsmlab run` prints of one outcome: the claim, the experiment, and the kernel's own record."""
    parts: list[RenderableType] = [*_heading(outcome, number), Text(_claim(outcome)), Text()]
    if outcome.attempts:
        parts += [Block(_Matrix(outcome)), Text()]
    for title, texts in (*_proof(outcome), *_trouble(outcome)):
        parts += [Text(title, style="bold"), *(Block(_record(t), 4) for t in texts), Text()]
    if not outcome.as_expected:
        parts += [Text(f"To look further: lsmlab show {number or outcome.id}"), Text()]
    return Group(*parts)


def outcome_detail(outcome: Outcome, number: int | None = None) -> RenderableType:
    """What `lsmlab show N` prints: everything that was recorded, except the whole of outputs and logs."""
    env = outcome.environment
    about = facts(
        ("expected", f"{outcome.expected}: {outcome.because.strip()}"),
        ("falsified", Text("\n").join(_falsified(outcome))),
        ("recorded", outcome.recorded),
        ("outcome", outcome.id + (f" (number {number})" if number is not None else "")),
        ("scenario", f"sha256 {outcome.scenario_digest}"),
        ("technique", outcome.technique),
        ("lsmlab", env.lsmlab),
        ("image", f"sha256 {env.image}" if env.image else ""),
        ("containers", "\n".join(_image(one) for one in outcome.images)),
        ("kernel", env.kernel),
        ("packages", "\n".join(f"{name} {version}" for name, version in sorted(env.packages.items()))),
        ("policy from elsewhere", "\n".join(f"{name}: {policy}" for name, policy in sorted(env.policies.items()))),
        ("machine", env.machine or f"{env.qemu}, accelerator {env.accelerator}, {env.memory_mib} MiB"),
        ("isolation", env.isolation if env.machine else ""),
        ("names of lab", env.names),
    )
    arms = [part for arm in outcome.arms for part in _arm_detail(arm)]
    return Block(Group(outcome_summary(outcome, number), about, Text(), *arms))


def _image(found: ImageRecord) -> str:
    """What a container was made of: what was asked for, which packages that was, and the digests."""
    versions = "".join(f"\n{name} {version}" for name, version in sorted(found.packages.items()))
    return f"{found.image}{versions}" + "".join(f"\nsha256 {digest}" for digest in found.sha256)


def falsification_summary(outcome: Outcome) -> RenderableType:
    """What `lsmlab run --falsify` prints of one outcome: whether it could have come out otherwise."""
    found = outcome.falsification
    assert found is not None
    word, style = ("falsifiable", GOOD) if found.falsifiable else ("PROVES NOTHING", BAD)
    if found.verdict is Verdict.ERROR:
        word, style = "not falsified, an error", ODD
    head = Text.assemble((f"{word}: ", f"bold {style}"), _where(outcome))
    other = Text(f"With another denial expected, the verdict is {found.misled}.")
    return Group(head, Block(Group(*_falsified(outcome), other)), Text())


def _falsified(outcome: Outcome) -> Iterator[Text]:
    found = outcome.falsification
    if found is None:
        return
    yield Text(f"With this in the policy, the verdict is {found.verdict} ({_line(found.reason)}):")
    for rule in _some(list(found.rules), SHOWN_LINES) or ["(no rule could be made of the denials)"]:
        yield Text(f"  {_line(rule)}")


def outcomes_table(rows: Sequence[tuple[int, Outcome]]) -> RenderableType:
    """What `lsmlab show` prints without an argument: one line an outcome."""
    if not rows:
        return Text("No outcome is recorded yet; `lsmlab run` records them.")
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("no.", justify="right", no_wrap=True)
    table.add_column("when (UTC)", no_wrap=True)
    # The verdict wraps at its comma first, not a name in its middle.
    table.add_column("scenario", overflow="fold", no_wrap=all(len(o.scenario) <= 20 for _, o in rows))
    for name in ("lab", "framework", "verdict"):
        table.add_column(name, overflow="fold")
    for number, outcome in rows:
        when = outcome.recorded[:16].replace("T", " ")
        plain = (str(number), when, outcome.scenario, outcome.lab, outcome.framework.display)
        verdict = outcome.verdict + ("" if outcome.as_expected else f", expected {outcome.expected}")
        table.add_row(*(Text(_line(t)) for t in plain), Text(verdict, style=_verdict_style(outcome)))
    return Block(table)


def run_summary(outcomes: Sequence[Outcome], seconds: float) -> str:
    """The last line of a run: `5 outcomes: 3 as expected (3 CONTAINED), 1 not (1 INCONCLUSIVE), 1 error in 41 s`."""
    expected = [o for o in outcomes if o.as_expected]
    errors = [o for o in outcomes if not o.as_expected and o.verdict is Verdict.ERROR]
    others = [o for o in outcomes if not o.as_expected and o.verdict is not Verdict.ERROR]
    parts = [
        f"{len(found)} {word} ({_tally(found)})"
        for found, word in ((expected, "as expected"), (others, "not"))
        if found
    ]
    if errors:
        parts.append(f"{len(errors)} error{'s' if len(errors) > 1 else ''}")
    tried = [o.falsification for o in outcomes if o.falsification is not None]
    if tried:
        good, broken = sum(f.falsifiable for f in tried), sum(f.verdict is Verdict.ERROR for f in tried)
        idle = len(tried) - good - broken
        parts.append(f"{good} falsifiable" + (f", {idle} PROVE NOTHING" if idle else ""))
        parts += [f"{broken} not falsified by an error"] if broken else []
    count = f"{len(outcomes)} outcome{'' if len(outcomes) == 1 else 's'}"
    return f"{count}{': ' if parts else ''}{', '.join(parts)} in {duration(seconds)}"


def _tally(outcomes: Iterable[Outcome]) -> str:
    return ", ".join(f"{n} {verdict}" for verdict, n in Counter(o.verdict.value for o in outcomes).most_common())


def failure_text(outcome: Outcome) -> str:
    """Plain text for a failed test: the expectation, what was found, the evidence, and how to look further."""
    lines = [f"{_where(outcome)}: expected {outcome.expected}, found {outcome.verdict}", "", _claim(outcome)]
    if outcome.verdict is Verdict.ERROR:
        lines.append("The experiment broke: nothing is said about the policy.")
    lines += [
        "",
        f"Expected {outcome.expected} because:",
        *_wrapped(outcome.because),
        "",
        "Found (> is not as wanted):",
    ]
    width = max([len(a) for a, _ in outcome.attempts] or [0])
    for arm in outcome.arms:
        for seen in arm.attempts:
            mark = " " if _style(arm, seen) == GOOD else ">"
            what = f"{arm.arm:<18}  {seen.kind:<6}  {_line(seen.attempt):<{width}}  {seen.result:<7}"
            lines.append(f"  {mark} {what}  {_line(seen.reason)}")
        if not arm.attempts:
            lines.append(f"  > {arm.arm:<18}  no attempt was made")
    for title, texts in (*_proof(outcome), *_trouble(outcome)):
        lines += ["", title, *(textwrap.indent(clean(t), "    ") for t in texts)]
    lines += [
        "",
        "To look further:",
        f"    lsmlab show {outcome.id:<24}everything that was recorded",
        "    pytest --lsmlab-shell-on-failure    a shell in the guest, as the failed attempt left it",
    ]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(clean(text), 100, initial_indent="    ", subsequent_indent="    ") or [
        "    (no reason is given)"
    ]


def _line(text: str) -> str:
    """`text` cleaned, on one line."""
    return clean(text).replace("\n", " ")


def _record(text: str) -> Text:
    """A record of the kernel (or other text), with the fields that matter in bold."""
    shown = Text(clean(text))
    if "msg=audit(" in text:
        shown.highlight_regex(_MATTERS, "bold")
    return shown


def _where(outcome: Outcome) -> str:
    return _line(f"{outcome.scenario} on {outcome.lab} under {outcome.framework.display}")


def _heading(outcome: Outcome, number: int | None) -> list[Text]:
    agreement = ", as expected" if outcome.as_expected else f", NOT as expected (expected {outcome.expected})"
    first = Text.assemble(
        (outcome.verdict + agreement, f"bold {_verdict_style(outcome)}"), ": ", (_line(outcome.title), "bold")
    )
    lines = [first, Text(_where(outcome) + (f", outcome {number}" if number is not None else ""), style="dim")]
    if outcome.environment.machine:
        isolation = _line(outcome.environment.isolation)
        lines.append(Text(f"The control is the weaker one, the service unconfined. Attempts kept apart {isolation}."))
    if outcome.environment.names:
        lines.append(Text(f"Names and expectations of lab {_line(outcome.environment.names)}."))
    return lines


def _verdict_style(outcome: Outcome) -> str:
    if outcome.as_expected:
        return GOOD
    return ODD if outcome.verdict in {Verdict.ERROR, Verdict.INCONCLUSIVE} else BAD


def _claim(outcome: Outcome) -> str:
    """The verdict's reason, without the record that the evidence shows in full."""
    head, _, record = outcome.reason.partition(": type=")
    shown = (text for _, texts in (*_proof(outcome), *_trouble(outcome)) for text in texts)
    return clean(head if record and any(f"type={record}" in text for text in shown) else outcome.reason)


def _made(arm: ArmRecord | None, attempt: str) -> AttemptRecord | None:
    return next((a for a in arm.attempts if a.attempt == attempt), None) if arm else None


@dataclass(frozen=True, slots=True)
class _Matrix:
    """Arms against attempts: the experiment at a glance. Attacks come first; the first layout that fits is taken."""

    outcome: Outcome

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        layouts = [self.table(down, gap) for down in (False, True) for gap in (" ", "\n")]
        unbounded = options.update(width=1 << 16)
        fits = (t for t in layouts if Measurement.get(console, unbounded, t).maximum <= options.max_width)
        yield next(fits, layouts[-1])

    def table(self, down: bool, gap: str) -> Table:
        """`down`: a row for each attempt, else one for each arm. `gap` stands between a word and its comment."""
        attempts = sorted(self.outcome.attempts, key=lambda item: item[1] is not AttemptKind.ATTACK)
        between = gap if down else "\n"
        heads = [Text(f"{_line(name)}{between}({kind})") for name, kind in attempts]
        arms = [Text(arm.arm) for arm in self.outcome.arms]
        cells = [[_cell(arm, _made(arm, name), gap) for name, _ in attempts] for arm in self.outcome.arms]
        table = Table("attempt" if down else "arm", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for head in arms if down else heads:
            table.add_column(head, overflow="fold")
        for first, row in zip(heads, zip(*cells, strict=True), strict=True) if down else zip(arms, cells, strict=True):
            table.add_row(first, *row)
        return table


def _cell(arm: ArmRecord, seen: AttemptRecord | None, gap: str) -> Text:
    if seen is None:
        return Text("not made", style=ODD)
    word = _result(arm, seen)
    unsure = seen.result in {Result.UNCLEAR, Result.FAILED}  # the reason is a sentence, and is told with the rest
    return word if unsure else Text(f"{word.plain}{gap}({_short(seen)})", style=word.style)


def _result(arm: ArmRecord, seen: AttemptRecord) -> Text:
    style = _style(arm, seen)
    return Text(seen.result.upper() if style == BAD else seen.result.value, style=style)


def _short(seen: AttemptRecord) -> str:
    """`the canary was read, HTTP 200` -> `canary read`."""
    text = _line(seen.reason).partition(", HTTP ")[0].partition(" (")[0]
    return textwrap.shorten(text.removeprefix("the ").replace(" was ", " ", 1), 40, placeholder=" ...")


def _style(arm: ArmRecord, seen: AttemptRecord) -> str:
    """Whether an attempt went as a policy's author wants it."""
    if seen.result in {Result.UNCLEAR, Result.FAILED}:
        return ODD
    allowed = seen.result is Result.ALLOWED
    if seen.kind is AttemptKind.BENIGN:
        return GOOD if allowed else BAD
    if allowed:
        return BAD if arm.arm.enforcing else GOOD
    accounted = seen.attribution is not None and seen.attribution.denial is not None
    return GOOD if accounted else ODD


def _proof(outcome: Outcome) -> Iterator[tuple[str, list[str]]]:
    """Why DAC permits the first attack, and what the kernel recorded of each where MAC decides."""
    attacks = [name for name, kind in outcome.attempts if kind is AttemptKind.ATTACK]
    for name in attacks[:1]:
        seen = _made(outcome.control, name)
        if seen is not None and seen.dac is not None:
            it = "it" if len(attacks) == 1 else _line(name)
            if seen.dac.permitted:
                title = f"DAC permits {it}:"
            elif seen.result is Result.ALLOWED:  # by a set-user-id program, or a helper that runs as somebody else
                title = f"DAC forbids {it} to the worker, and yet it was done (by another process?):"
            else:
                title = f"DAC forbids {it}:"
            yield title, [seen.dac.rule]
    if outcome.verdict in {Verdict.DAC_BLOCKED, Verdict.CONTROL_BLOCKED}:
        return  # nothing is shown about MAC, so no denial is owed
    enforcing = outcome.arm(ENFORCING_ARM[outcome.framework])
    for name in attacks:
        seen = _made(enforcing, name)
        if seen is not None and seen.result in {Result.ALLOWED, Result.BLOCKED}:
            yield _mac(outcome, seen, "it" if len(attacks) == 1 else _line(name))


def _mac(outcome: Outcome, seen: AttemptRecord, it: str) -> tuple[str, list[str]]:
    framework = outcome.framework.display
    if seen.result is Result.ALLOWED:
        found = [d.headline for d in seen.denials]
        return f"{framework} does not block {it}:", _some(found) or ["(the kernel recorded no denial of the subject)"]
    if seen.attribution is not None and seen.attribution.denial is not None:
        return f"{framework} blocks {it}:", [seen.attribution.denial.headline]
    misses = [m.replace(": type=", ":\ntype=", 1) for m in (seen.attribution.misses if seen.attribution else ())]
    none = ["(the kernel recorded no denial meanwhile)"]
    return f"No denial of {framework} accounts for the block of {_line(seen.attempt)}; found:", _some(misses) or none


def _some(texts: list[str], shown: int = SHOWN_RECORDS) -> list[str]:
    more = len(texts) - shown
    return [*texts[:shown], *([f"... and {more} more"] if more > 0 else [])]


def _trouble(outcome: Outcome) -> Iterator[tuple[str, list[str]]]:
    """What else a policy's author has to know: denied benign work, a service that is down, errors."""
    by_place: dict[tuple[Arm, str], list[str]] = {}
    for place, name, denial in outcome.unexpected:
        by_place.setdefault((place, name), []).append(denial.headline)
    for (place, name), records in by_place.items():
        yield f"Unexpected denial in benign work ({place}, {_line(name)}):", _some(records)
    for arm in outcome.arms:
        if not arm.service_active:
            found = [d.headline for d in arm.setup_denials]
            yield f"The service did not start in {arm.arm}:", _some(found) or ["(with no denial of its domain)"]
        if arm.error and arm.error not in outcome.reason:
            yield f"Error in {arm.arm}:", [arm.error]
        for seen in arm.attempts:
            unsure = seen.result in {Result.UNCLEAR, Result.FAILED}
            if unsure and seen.reason not in outcome.reason:
                yield f"{_line(seen.attempt)} is {seen.result} in {arm.arm}:", [seen.reason]


def _arm_detail(arm: ArmRecord) -> Iterator[RenderableType]:
    yield Rule(Text(arm.arm, style="bold"), align="left", style="dim")
    yield facts(
        ("kernel", arm.command_line),
        ("LSMs", ", ".join(arm.lsm)),
        ("took", duration(arm.seconds)),
        ("service", _start_of(arm)),
        ("before", bullets(_switched(seen) for seen in arm.switched)),
        ("denied", _records(arm.setup_denials)),
        ("error", Text(clean(arm.error), style=ODD)),
    )
    yield Text()
    for seen in arm.attempts:
        yield Text.assemble((f"{_line(seen.attempt)} ({seen.kind}): ", "bold"), _result(arm, seen))
        yield from (Block(_attempt_detail(seen), 2), Text())


def _start_of(arm: ArmRecord) -> str:
    if arm.started_in is not None:
        return f"started in {arm.started_in}"
    return "" if arm.service_active else "did not start"


def _switched(seen: AttemptRecord) -> Text:
    return Text(clean(f"with the enforcing arm's processes: {_line(seen.attempt)} is {seen.result}: {seen.reason}"))


def _attempt_detail(seen: AttemptRecord) -> Table:
    pairs: list[tuple[str, Shown]] = [("because", seen.reason)]
    look = seen.observation
    if look is not None:
        pairs += _observed(look)
    if seen.dac is not None:
        pairs.append(("DAC", bullets(Text(clean(step.rule)) for step in seen.dac.steps)))
    pairs.append(("denials", _records(seen.denials)))
    if seen.attribution is not None:
        cause = seen.attribution.denial
        event = (
            f"the denial of event {':'.join(map(str, cause.event))}" if cause else "no denial accounts for the block"
        )
        pairs += [("cause", event), ("no cause", bullets(_record(miss) for miss in seen.attribution.misses))]
    if look is not None:
        pairs += [
            ("output", "\n".join(_some(clean(look.output).splitlines(), SHOWN_LINES))),
            ("errors", "\n".join(_some(clean(look.errors).splitlines(), SHOWN_LINES))),
            ("withheld", f"{look.withheld} bytes, which stayed on the machine" if look.withheld else ""),
        ]
    return facts(*pairs)


def _observed(look: Observation) -> list[tuple[str, Shown]]:
    status = "no exit status" if look.exit_code is None else f"exit status {look.exit_code}"
    ending = [
        status if look.signal is None else f"signal {look.signal}",
        *([f"HTTP {look.http_status}"] if look.http_status is not None else []),
        *(["cut short"] if look.cut_short else []),
        *(["timed out"] if look.timed_out else []),
        f"after {look.seconds:.2f} s",
    ]
    before, after = look.subject_before.processes, look.subject_after.processes
    modes = dict.fromkeys((_mode(look.mode_before), _mode(look.mode_after)))
    return [
        ("command", shlex.join(look.command)),
        ("ended", ", ".join(ending)),
        ("subject", "\n".join(_process(p) for p in before) or "no process"),
        ("afterwards", "" if after == before else "\n".join(_process(p) for p in after) or "no process"),
        ("object", _object(look.object) if look.object is not None else ""),
        ("mode", " before, ".join(modes) + (" after" if len(modes) > 1 else ", before and after")),
        ("evidence", f"{look.source.name}: {look.source.state} ({look.source.detail})"),
    ]


def _object(target: ObjectFacts) -> str:
    label = "no label" if target.label == "?" else target.label
    found = f"inode {target.ino} on {target.device}, {label}" if target.exists else "absent"
    return f"{target.path}: {found}{', on a read-only mount' if target.read_only else ''}"


def _mode(mode: ModeFacts) -> str:
    if mode.selinux_enforcing is not None:
        return "SELinux enforcing" if mode.selinux_enforcing else "SELinux permissive"
    if mode.profiles is not None:
        return "AppArmor with profiles: " + ", ".join(f"{n} {m}" for m, n in Counter(mode.profiles.values()).items())
    return "no MAC framework"


def _process(process: Process) -> str:
    uids, gids = ("/".join(map(str, n if len(set(n)) > 1 else n[:1])) for n in (process.uids, process.gids))
    groups = ",".join(str(g) for g in process.groups) or "none"
    caps = f", capabilities {process.cap_effective:#x}" if process.cap_effective else ""
    main = ", main" if process.main else ""
    label = process.label or "no label"
    return f"{process.name} (pid {process.pid}{main}): {label}; uid {uids}, gid {gids}, groups {groups}{caps}"


def _records(denials: Sequence[Denial]) -> Table | None:
    """The raw records, each once: denials of one event share its SYSCALL and PATH."""
    return bullets(_record(line) for line in dict.fromkeys(line for denial in denials for line in denial.raw))
