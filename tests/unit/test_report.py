"""What people read: each verdict says in words, without colour, what was shown; and nothing of a guest acts."""

from __future__ import annotations

import functools
import io
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from lsmlab import verdict
from lsmlab.outcome import ArmRecord, AttemptRecord, Outcome
from lsmlab.report import tables, text
from lsmlab.report.progress import LiveProgress
from lsmlab.terms import Arm, Framework, Result, Verdict
from lsmlab.verdict import Attribution

SAMPLES = Path(__file__).parent / "samples"
ENFORCING = Arm.SELINUX_ENFORCING
COMPLAINT = "type=AVC msg=audit(1.000:1): avc:  denied  { read } for  pid=1"


@functools.cache
def sample(framework: Framework = Framework.SELINUX) -> Outcome:
    """A real outcome: nginx-reads-shadow on debian-13, CONTAINED."""
    return Outcome.model_validate_json((SAMPLES / f"outcome-{framework}.json").read_text("utf-8"))


def with_arm(outcome: Outcome, arm: Arm, **changes: Any) -> Outcome:
    arms = tuple(a.model_copy(update=changes) if a.arm is arm else a for a in outcome.arms)
    return outcome.model_copy(update={"arms": arms})


def with_attempt(outcome: Outcome, arm: Arm, attempt: str, **changes: Any) -> Outcome:
    made = next(a for a in outcome.arms if a.arm is arm).attempts
    changed = tuple(a.model_copy(update=changes) if a.attempt == attempt else a for a in made)
    return with_arm(outcome, arm, attempts=changed)


def judged(outcome: Outcome) -> Outcome:
    """`outcome` with the verdict that its arms now prove."""
    found = verdict.conclude(outcome.framework, {a.arm: a for a in outcome.arms})
    return outcome.model_copy(update={"verdict": found.verdict, "reason": found.reason})


def attempt(outcome: Outcome, arm: Arm, name: str) -> AttemptRecord:
    return next(seen for a in outcome.arms if a.arm is arm for seen in a.attempts if seen.attempt == name)


def not_contained() -> Outcome:
    """As if httpd_t were permissive: the attack succeeds, and the kernel only logs it."""
    logged = attempt(sample(), Arm.SELINUX_PERMISSIVE, "read-shadow").denials
    proof = "the canary was read, HTTP 200"
    changes = {"result": Result.ALLOWED, "reason": proof, "denials": logged, "attribution": None}
    return judged(with_attempt(sample(), ENFORCING, "read-shadow", **changes))


def broken() -> Outcome:
    return judged(with_arm(sample(), ENFORCING, error="the guest died\n  Run `lsmlab doctor`.", attempts=()))


def render(part: RenderableType, width: int = 100, *, colour: bool = False, encoding: str = "utf-8") -> str:
    file = io.TextIOWrapper(raw := io.BytesIO(), encoding=encoding, newline="")
    console = Console(file=file, width=width, force_terminal=colour, color_system="standard" if colour else None)
    console.print(part)
    file.flush()
    return raw.getvalue().decode(encoding)


def words(shown: str) -> str:
    """What was shown, without its line breaks."""
    return " ".join(shown.split())


def rows(shown: str) -> dict[str, str]:
    """The lines of the matrix by their first word."""
    return {line.split()[0]: line for line in shown.splitlines() if re.match(r"(?:dac|selinux|apparmor)", line)}


def test_contained_shows_claim_experiment_and_the_kernels_record() -> None:
    shown = render(text.outcome_summary(sample(), 12))
    lines = shown.splitlines()
    assert lines[:3] == [
        "CONTAINED, as expected: nginx reads /etc/shadow",
        "nginx-reads-shadow on debian-13 under SELinux, outcome 12",
        "DAC permits read-shadow; SELinux denies httpd_t { read } on shadow",
    ]
    found = rows(shown)
    assert found["dac"].split("  ")[-1].strip() == "allowed (canary read)"
    assert re.fullmatch(r"selinux-enforcing +blocked \(HTTP 403\)( +allowed \(canary read\)){2}", found[ENFORCING])
    after = shown.partition("DAC permits it:\n")[2]
    assert after.startswith("    group bits: /etc/shadow is -rw-r----- root:shadow; uid 33 is in group shadow (42)")
    after = shown.partition("SELinux blocks it:\n")[2].partition("\n\n")[0]
    assert words(after) == words(sample().accounted[0][2].headline)
    assert "To look further" not in shown


def test_of_a_machine_that_stays_the_weaker_control_and_the_isolation_are_said() -> None:
    there = sample()
    assert "weaker" not in words(render(text.outcome_summary(there)))
    kept = there.environment.model_copy(
        update={"image": "", "machine": "root at web1 port 22: Debian", "isolation": "by undo, verified"}
    )
    there = there.model_copy(update={"environment": kept})
    assert "The control is the weaker one, the service unconfined." in words(render(text.outcome_summary(there)))
    detail = words(render(text.outcome_detail(there)))
    assert "root at web1 port 22: Debian" in detail and "by undo, verified" in detail
    assert "sha256 \n" not in detail
    assert "Names and expectations" not in detail
    near = there.model_copy(update={"environment": kept.model_copy(update={"names": "fedora-44, not written for it"})})
    for shown in (text.outcome_summary(near), text.outcome_detail(near)):
        assert "Names and expectations of lab fedora-44, not written for it." in words(render(shown))


def test_apparmors_record_is_whole() -> None:
    outcome = sample(Framework.APPARMOR)
    shown = render(text.outcome_summary(outcome))
    assert words(outcome.accounted[0][2].headline) in words(shown.partition("AppArmor blocks it:")[2])


def repeated(outcome: Outcome, *endings: str) -> Outcome:
    """`outcome` with every attempt made once for each ending of its name."""
    arms = []
    for arm in outcome.arms:
        made = (t.model_copy(update={"attempt": t.attempt + e}) for e in endings for t in arm.attempts)
        arms.append(arm.model_copy(update={"attempts": tuple(made)}))
    return outcome.model_copy(update={"arms": tuple(arms)})


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_every_width_holds_every_line(width: int) -> None:
    for outcome in (sample(), not_contained(), repeated(sample(), "", "-with-a-long-name", "-3")):
        for part in (text.outcome_summary(outcome), text.outcome_detail(outcome), text.outcomes_table([(1, outcome)])):
            assert max(map(len, render(part, width).splitlines())) <= width


def test_many_attempts_get_a_row_each() -> None:
    shown = render(text.outcome_summary(repeated(sample(), "", "-2")))
    assert re.search(r"^attempt +dac +selinux-permissive +selinux-enforcing$", shown, re.MULTILINE)
    assert re.search(r"^read-shadow-2 \(attack\) +allowed \(canary read\) .*blocked \(HTTP 403\)$", shown, re.MULTILINE)
    order = [line.split()[0] for line in shown.splitlines() if "(attack) " in line or "(benign) " in line]
    assert order[:3] == ["read-shadow", "read-shadow-2", "front-page"]
    assert "SELinux blocks read-shadow-2:" in shown


def test_a_breach_is_told_in_words() -> None:
    shown = render(text.outcome_summary(not_contained(), 7))
    assert shown.startswith("NOT_CONTAINED, NOT as expected (expected CONTAINED): nginx reads /etc/shadow\n")
    assert "\nread-shadow succeeds under SELinux (the canary was read, HTTP 200); the kernel only logged it\n" in shown
    assert "ALLOWED (canary read)" in rows(shown)[ENFORCING]
    assert "ALLOWED" not in rows(shown)["dac"] + rows(shown)["selinux-permissive"]
    below = shown.partition("SELinux does not block it:")[2]
    assert "permissive=1" in below
    assert words(shown).count("{ read } for") == 1
    assert "To look further: lsmlab show 7\n" in shown
    expected = not_contained().model_copy(update={"expected": Verdict.NOT_CONTAINED})
    assert render(text.outcome_summary(expected)).startswith("NOT_CONTAINED, as expected: ")


def test_an_error_has_its_text_and_its_hint_once() -> None:
    shown = render(text.outcome_summary(broken()))
    assert shown.startswith("ERROR, NOT as expected (expected CONTAINED)")
    assert shown.count("the guest died\n  Run `lsmlab doctor`.\n") == 1
    assert rows(shown)[ENFORCING].split()[1:] == ["not", "made"] * 3
    both = with_arm(broken(), Arm.SELINUX_PERMISSIVE, error="no memory", attempts=())
    assert "Error in selinux-permissive:\n    no memory\n" in render(text.outcome_summary(both))


def test_all_arms_broken() -> None:
    arms = tuple(ArmRecord(arm=a.arm, error="x1") for a in sample().arms)
    outcome = judged(sample().model_copy(update={"arms": arms}))
    shown = render(text.outcome_summary(outcome))
    assert "\ndac: x1\n" in shown
    assert "canary" not in shown
    assert "no attempt was made" in text.failure_text(outcome)


def test_unexpected_denials_are_listed() -> None:
    denials = attempt(sample(), ENFORCING, "read-shadow").denials
    outcome = judged(with_attempt(sample(), ENFORCING, "front-page", denials=denials * 6))
    assert outcome.verdict is Verdict.CONTAINED
    shown = render(text.outcome_summary(outcome))
    below = shown.partition("Unexpected denial in benign work (selinux-enforcing, front-page):\n")[2]
    assert below.count("{ read }") == text.SHOWN_RECORDS
    assert "    ... and 2 more\n" in below


def test_overblocked_work_and_a_service_that_is_down() -> None:
    denials = attempt(sample(), ENFORCING, "read-shadow").denials
    changes = {"result": Result.BLOCKED, "reason": "HTTP 403", "denials": denials}
    work = judged(with_attempt(sample(), ENFORCING, "front-page", **changes))
    assert work.verdict is Verdict.OVERBLOCKED
    shown = render(text.outcome_summary(work))
    assert "\nfront-page: the service's own work is denied (HTTP 403)\n" in shown
    assert "BLOCKED (HTTP 403)" in rows(shown)[ENFORCING]
    down = with_arm(sample(), ENFORCING, service_active=False, setup_denials=denials)
    below = render(text.outcome_summary(down)).partition("The service did not start in selinux-enforcing:\n")[2]
    assert below.startswith("    type=AVC ")


def test_where_the_service_was_started_is_told_in_detail() -> None:
    switched = with_arm(sample(), Arm.SELINUX_PERMISSIVE, started_in=ENFORCING)
    assert "service started in selinux-enforcing" in words(render(text.outcome_detail(switched)))
    assert "started in" not in words(render(text.outcome_detail(sample())))
    before = attempt(sample(), ENFORCING, "read-shadow")
    anew = with_arm(sample(), Arm.SELINUX_PERMISSIVE, switched=(before,))
    assert f"with the enforcing arm's processes: read-shadow is blocked: {before.reason}" in words(
        render(text.outcome_detail(anew))
    )


def test_a_block_without_its_denial_names_the_nearest() -> None:
    attribution = Attribution(denial=None, misses=(f"another process (pid 1): {COMPLAINT}",))
    outcome = judged(with_attempt(sample(), ENFORCING, "read-shadow", attribution=attribution))
    assert outcome.verdict is Verdict.UNATTRIBUTED
    shown = render(text.outcome_summary(outcome))
    assert f"    another process (pid 1):\n    {COMPLAINT}\n" in shown
    assert shown.count("type=AVC") == 1
    assert "SELinux blocks" not in shown


def test_an_unclear_attempt_beside_the_verdict_has_its_reason() -> None:
    changes = {"result": Result.UNCLEAR, "reason": "the service has no process"}
    outcome = with_attempt(sample(), ENFORCING, "front-page", **changes)
    shown = render(text.outcome_summary(outcome))
    assert "front-page is unclear in selinux-enforcing:\n    the service has no process\n" in shown
    assert re.search(r"blocked \(HTTP 403\) +unclear +allowed", rows(shown)[ENFORCING])


def test_colours_have_one_meaning_each() -> None:
    green, red, yellow = ("\x1b[32m", "\x1b[31m", "\x1b[33m")
    good = render(text.outcome_summary(sample()), colour=True)
    assert green in good
    assert red not in good
    assert yellow not in good
    assert f"{red}ALLOWED (canary read)" in render(text.outcome_summary(not_contained()), colour=True)
    assert f"{yellow}not made" in render(text.outcome_summary(broken()), colour=True)
    for field in ("{ read }", "permissive=0", "scontext=system_u:system_r:httpd_t:s0", "tclass=file"):
        assert f"\x1b[1m{field}\x1b[0m" in good


@pytest.mark.parametrize("outcome", [sample(), not_contained(), broken()], ids=["contained", "breach", "error"])
def test_without_colour_nothing_is_lost(outcome: Outcome) -> None:
    for part in (text.outcome_summary(outcome), text.outcome_detail(outcome), text.outcomes_table([(1, outcome)])):
        bare = render(part)
        assert "\x1b" not in bare
        assert re.sub(r"\x1b\[[\d;]*m| +$", "", render(part, colour=True), flags=re.MULTILINE) == bare


def test_a_console_without_box_drawing_gets_ascii() -> None:
    for part in (text.outcome_summary(sample()), text.outcome_detail(sample()), text.outcomes_table([(1, sample())])):
        assert render(part, encoding="ascii").isascii()  # and raises nothing


NASTY = "\x1b[2J\x1b]0;owned\x07[bold red]hello[/] :smile: \x9b31m\u202egnp.exe\r\udc80\x00"
HARMLESS = r"\x1b[2J\x1b]0;owned\x07[bold red]hello[/] :smile: \x9b31m\u202egnp.exe\r\udc80\x00"


def test_clean_shows_what_a_terminal_would_obey() -> None:
    assert text.clean(NASTY) == HARMLESS
    assert text.clean("one\n\ttwo äß日") == "one\n\ttwo äß日"


def test_nothing_of_a_guest_acts() -> None:
    seen = attempt(sample(), ENFORCING, "read-shadow")
    look, cause = seen.observation, seen.denials[0]
    assert look is not None
    process = look.subject_before.processes[0].model_copy(update={"name": NASTY, "label": NASTY})
    subject = look.subject_before.model_copy(update={"processes": (process,)})
    denial = cause.model_copy(update={"raw": (f"type=AVC msg=audit(1.0:1): {NASTY}", NASTY)})
    changes = {
        "reason": NASTY,
        "denials": (denial,),
        "attribution": Attribution(denial=denial, misses=(NASTY,)),
        "observation": look.model_copy(
            update={"output": NASTY * 3, "errors": NASTY, "command": (NASTY,), "subject_before": subject}
        ),
    }
    outcome = with_attempt(sample(), ENFORCING, "read-shadow", **changes)
    outcome = outcome.model_copy(update={"title": NASTY, "reason": NASTY, "because": NASTY, "scenario": NASTY})
    outcome = with_arm(outcome, Arm.DAC, error=NASTY, command_line=NASTY)
    parts = (text.outcome_summary(outcome), text.outcome_detail(outcome), text.outcomes_table([(1, outcome)]))
    for shown in (*(render(p, 4000) for p in parts), text.failure_text(outcome)):
        assert HARMLESS in shown
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]", shown)


def test_detail_has_everything_needed_to_repeat_and_to_doubt() -> None:
    outcome = sample()
    shown = words(render(text.outcome_detail(outcome, 3), 4000))
    env = outcome.environment
    facts = [outcome.id, outcome.recorded, outcome.scenario_digest, env.lsmlab, env.image, env.kernel, env.qemu]
    facts += [f"accelerator {env.accelerator}", f"{env.memory_mib} MiB", "technique T1003.008", "(number 3)"]
    facts += [f"{name} {version}" for name, version in env.packages.items()]
    for arm in outcome.arms:
        facts += [arm.command_line, ", ".join(arm.lsm), text.duration(arm.seconds)]
        for seen in arm.attempts:
            facts += [f"{seen.attempt} ({seen.kind}): {seen.result}", seen.reason]
            facts += [line for d in seen.denials for line in d.raw]
            facts += [step.rule for step in seen.dac.steps] if seen.dac else []
    facts += [
        "exit status 0, HTTP 403",
        "audit log: fetched",
        "audit log: empty",
        "SELinux enforcing, before and after",
    ]
    facts += ["system_u:system_r:httpd_t:s0; uid 33, gid 33, groups 33,42", "cause the denial of event"]
    assert [f for f in facts if words(f) not in shown] == []


def test_detail_shows_the_beginning_of_a_long_output_only() -> None:
    look = attempt(sample(), ENFORCING, "front-page").observation
    assert look is not None
    long = look.model_copy(update={"output": "".join(f"line {n}\n" for n in range(40))})
    shown = render(text.outcome_detail(with_attempt(sample(), ENFORCING, "front-page", observation=long)))
    assert "line 9\n" in shown
    assert "line 10\n" not in shown
    assert "... and 30 more\n" in shown


def test_outcomes_table() -> None:
    shown = render(text.outcomes_table([(12, not_contained()), (3, sample(Framework.APPARMOR))])).splitlines()
    assert shown[0].split() == ["no.", "when", "(UTC)", "scenario", "lab", "framework", "verdict"]
    assert shown[2].startswith(" 12  ")
    assert shown[2].endswith("SELinux    NOT_CONTAINED, expected CONTAINED")
    assert shown[3].endswith("AppArmor   CONTAINED")
    assert "No outcome" in render(text.outcomes_table([]))


def test_run_summary() -> None:
    good, bad, error = sample(), not_contained(), broken()
    expected = bad.model_copy(update={"expected": Verdict.NOT_CONTAINED})
    assert text.run_summary([good, good], 41.3) == "2 outcomes: 2 as expected (2 CONTAINED) in 41 s"
    assert text.run_summary([good, expected, good, bad, error], 125) == (
        "5 outcomes: 3 as expected (2 CONTAINED, 1 NOT_CONTAINED), 1 not (1 NOT_CONTAINED), 1 error in 2 min 05 s"
    )
    assert text.run_summary([error], 4.21) == "1 outcome: 1 error in 4.2 s"
    assert text.run_summary([], 0) == "0 outcomes in 0.0 s"


def test_failure_text_reads_like_a_failed_assertion() -> None:
    outcome = not_contained()
    shown = text.failure_text(outcome)
    assert shown.startswith("nginx-reads-shadow on debian-13 under SELinux: expected CONTAINED, found NOT_CONTAINED\n")
    marked = [line.split() for line in shown.splitlines() if line.startswith("  > ")]
    assert [line[1:5] for line in marked] == [["selinux-enforcing", "attack", "read-shadow", "allowed"]]
    assert "sesearch -A -s httpd_t" in shown
    assert attempt(outcome, ENFORCING, "read-shadow").denials[0].headline in shown
    assert f"lsmlab show {outcome.id}" in shown
    assert "--lsmlab-shell-on-failure" in shown
    assert "nothing is said about the policy" not in shown
    assert "nothing is said about the policy" in text.failure_text(broken())


def test_plain_and_markdown_tables() -> None:
    found = [("debian-13", "007", "1e5"), ("a|b\nc", "\x1b[1m", 3)]
    assert tables.plain(["lab", "id", "digest"], found[:1]).splitlines() == [
        "lab        id    digest",
        "---------  ----  --------",
        "debian-13  007   1e5",
    ]
    assert r"| a\|b<br>c | \x1b[1m | 3" in tables.markdown(["lab", "id", "digest"], found)
    assert tables.plain(["lab"], []).startswith("lab")


def test_a_table_is_folded_between_words_where_it_is_too_wide() -> None:
    found = [("debian-13", "Debian 13 (trixie)", "-"), ("b", "", "never")]
    heads = ("lab", "machine", "real image")
    whole = tables.plain(heads, found)
    assert max(map(len, whole.splitlines())) == 43
    assert tables.plain(heads, found, 43) == whole
    assert tables.plain(heads, found, 42).splitlines() == [
        "lab        machine    real image",
        "---------  ---------  ------------",
        "debian-13  Debian 13  -",
        "           (trixie)",
        "b                     never",
    ]
    narrow = tables.plain(heads, found, 29)
    assert max(map(len, narrow.splitlines())) == 29
    assert tables.plain(heads, found, 1) == narrow, "a word was broken"
    assert tables.plain(heads, [], 5).startswith("lab")


class Clock:
    """A clock that a test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_progress_is_one_plain_line_a_step_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as CI does
    stream, clock = io.StringIO(), Clock()
    with LiveProgress(stream, clock) as progress:
        progress.step("x selinux-enforcing", "starting the guest")
        clock.now += 12.34
        progress.note("Built [bold]\x1b[31m.")
        with progress.paused():
            stream.write("a result\n")
        progress.done("x selinux-enforcing")
        progress.done("never begun")
        shown = stream.getvalue()
        stream.close()
        progress.note("which nobody can read, and which ends no experiment")
    assert shown.splitlines() == [
        "[   0.0s] x selinux-enforcing: starting the guest",
        r"[  12.3s] Built [bold]\x1b[31m.",
        "a result",
    ]


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_is_live_and_leaves_notes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with LiveProgress(stream) as progress:
        threads = [threading.Thread(target=progress.step, args=(f"arm {n}", "starting")) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        progress.note("a note [bold]")
        with progress.paused():
            stream.write("a result\n")
        progress.done("arm 3")
    shown = stream.getvalue()
    assert "arm 7" in shown
    assert "total" in shown
    assert "a note [bold]" in shown
    assert shown.index("a note") < shown.index("a result")
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 2, "the cursor comes back"
