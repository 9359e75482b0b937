"""Experiments and their outcomes: `run`, `try`, `show`."""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from lsmlab import discovery, run, trial
from lsmlab import falsify as falsification
from lsmlab.admission import host_of
from lsmlab.bench import open_bench
from lsmlab.cli.base import (
    AS_EXPECTED,
    EPILOG,
    ERROR,
    NOT_AS_EXPECTED,
    NOTHING,
    AccelOption,
    GuestsOption,
    ImageOption,
    JsonOption,
    LabOption,
    QuietOption,
    ScenariosArgument,
    accelerator_of,
    app,
    arm_of,
    console,
    frameworks_of,
    image_of,
    known,
    lab_names,
    need_arm,
    progress_shown,
    say,
    see_json_target,
    service_names,
    write_json,
)
from lsmlab.errors import DefinitionError
from lsmlab.host import need_linux
from lsmlab.lab import Lab
from lsmlab.outcome import Outcome, Report
from lsmlab.progress import Progress
from lsmlab.report import text, trials
from lsmlab.scenario import Scenario
from lsmlab.store import Store
from lsmlab.terms import Framework, Verdict


@app.command("run", epilog=EPILOG)
def run_command(
    scenarios: ScenariosArgument = None,
    lab: Annotated[
        str,
        typer.Option(
            "--lab",
            "-l",
            autocompletion=lab_names,
            help="The kind of machine, see `lsmlab labs`; or one that is there: ssh:HOST, vagrant:NAME.",
        ),
    ] = discovery.DEFAULT_LAB,
    framework: Annotated[
        list[str] | None, typer.Option("--framework", "-f", help="selinux or apparmor; may be given twice.")
    ] = None,
    json_file: JsonOption = None,
    accel: AccelOption = "auto",
    guests: GuestsOption = None,
    image: ImageOption = None,
    falsify: Annotated[
        bool, typer.Option("--falsify", help="See whether each CONTAINED could have come out otherwise.")
    ] = False,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Let a machine that is there be changed; all is undone afterwards.")
    ] = False,
    names: Annotated[
        str | None,
        typer.Option("--names", metavar="LAB", help="The lab whose names and expectations hold there."),
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Run scenarios and say what DAC permits and MAC blocks.

    Nothing named: every scenario below ./scenarios, or lsmlab's own where there are none. Every outcome is kept:
    `lsmlab show` lists them. On a machine that is there already (ssh:HOST, spelled as for `doctor --ssh`) the control
    is the same service unconfined, and only scenarios run whose changes are known to be undone.

    Examples:

        lsmlab run nginx-reads-shadow

        lsmlab run --lab debian-12 --framework selinux --json out.json

        lsmlab run path/to/my-scenario

        lsmlab run nginx-reads-shadow --falsify

        lsmlab run nginx-reads-shadow --lab fedora-44

        lsmlab run nginx-reads-shadow --lab ssh:admin@web1.example.org --allow-changes

        lsmlab run container-reads-host-shadow --lab ssh:localhost --allow-changes
    """
    need_linux()
    see_json_target(json_file)
    accelerator_of(accel)
    found, limits = discovery.load_scenarios(scenarios or ()), frameworks_of(framework)
    host = host_of(lab)
    if host is None and (allow_changes or names):
        raise DefinitionError("--allow-changes and --names are for a machine that is there already: `--lab ssh:HOST`")
    if host is not None and (falsify or image):
        raise DefinitionError("--falsify and --image are for guests that are thrown away, not for --lab ssh:HOST")
    experiment = (
        _on_guests(lab, found, limits, image, accelerator=accelerator_of(accel), guests=guests, falsify=falsify)
        if host is None
        else functools.partial(_outcomes_there, host, found, limits, names, allow_changes)
    )
    screen, start, outcomes = console(), time.monotonic(), list[Outcome]()
    store = Store()
    store.count()  # a store that cannot be used is said now, not after the run
    try:
        with progress_shown(quiet) as progress, contextlib.closing(experiment(progress)) as found_out:
            for outcome in found_out:
                if outcome.falsification is not None:
                    outcomes[[o.id for o in outcomes].index(outcome.id)] = outcome
                    store.update(outcome)
                    shown = text.falsification_summary(outcome)
                else:
                    outcomes.append(outcome)  # first: where the store is full, --json still has it
                    shown = text.outcome_summary(outcome, store.add(outcome))
                if str(json_file) != "-":
                    with progress.paused():
                        screen.print(shown)
    finally:
        if outcomes:
            write_json(Report(outcomes=tuple(outcomes)).to_json(), json_file)
    if str(json_file) != "-":
        screen.print(text.run_summary(outcomes, time.monotonic() - start), markup=False)
    raise typer.Exit(exit_code(outcomes))


Experiment = Callable[[Progress], Generator[Outcome, None, None]]


def _on_guests(
    lab: str,
    found: Sequence[Scenario],
    frameworks: Sequence[Framework] | None,
    image: Path | None,
    *,
    accelerator: str,
    guests: int | None,
    falsify: bool,
) -> Experiment:
    """The experiment in guests of a lab; what is left out of `found` is said."""
    machine = discovery.load_lab(lab)
    file = image_of(machine, image)
    taken = run.chosen(found, machine)
    wanted = _need_some(run.cases(taken, machine, frameworks))

    def experiment(progress: Progress) -> Generator[Outcome, None, None]:
        if words := run.left_out(machine, len(found) - len(taken)):
            say(words)
        return _outcomes(machine, wanted, progress, accelerator=accelerator, guests=guests, falsify=falsify, image=file)

    return experiment


def _need_some(wanted: tuple[run.Case, ...]) -> tuple[run.Case, ...]:
    if not wanted:
        say("nothing to run: no scenario has an expectation for the frameworks asked for")
        raise typer.Exit(NOTHING)
    return wanted


def _outcomes_there(
    host: str,
    scenarios: Sequence[Scenario],
    frameworks: Sequence[Framework] | None,
    names: str | None,
    allow_changes: bool,
    progress: Progress,
) -> Generator[Outcome, None, None]:
    """The outcome of each case on a machine that is there already, which is left as it was."""
    from lsmlab import ssh_lab  # noqa: PLC0415 - paramiko takes longer to load than most commands run

    with ssh_lab.reached(host) as found:
        lab = ssh_lab.lab_for(found, names)
        progress.note(f"Names and expectations of lab {ssh_lab.names_of(found, lab)}")
        wanted = _need_some(run.cases(scenarios, lab, frameworks, unconfined=True))
        planned = ssh_lab.changes(found, lab, wanted)
        if not allow_changes:
            raise ssh_lab.need_leave(host, planned)
        bench = ssh_lab.SshBench(host, found, lab, planned, progress)
        progress.note(f"Lab {bench.name}, {found.system}; all changes are undone")
        try:
            yield from run.run(bench, wanted)
        except BaseException:  # an interruption too, and it says nothing of this
            if bench.not_undone is not None:
                say(str(bench.not_undone))
            raise
    if bench.not_undone is not None:
        raise bench.not_undone


def _outcomes(
    lab: Lab,
    wanted: Sequence[run.Case],
    progress: Progress,
    *,
    accelerator: str,
    guests: int | None,
    falsify: bool,
    image: Path | None,
) -> Generator[Outcome, None, None]:
    """The outcome of each case, on the lab's image, or on one with the packages that it needs besides.

    With `falsify`, those that are CONTAINED come once more, with their falsification.
    """
    for machine, cases in run.by_image(lab, wanted):
        with open_bench(machine, progress, accelerator=accelerator, guests=guests, file=image) as bench:
            more = ", ".join(p for p in machine.disk.packages if p not in lab.disk.packages)
            progress.note(f"Lab {lab.id}{more and f' with {more}'}, {bench.acceleration.sentence()}")
            progress.note(f"Guests at once: {bench.budget.guests} ({bench.budget.reason})")
            contained = []
            for case, outcome in zip(cases, run.run(bench, cases), strict=True):
                yield outcome
                if outcome.verdict is Verdict.CONTAINED:
                    contained.append((case, outcome))
            if falsify:
                yield from falsification.run(bench, contained)


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """The exit code of mixed results: a proved mismatch goes before an error, and that before success."""
    if not outcomes:
        return NOTHING
    wrong = [o for o in outcomes if not o.as_expected]
    tried = [o.falsification for o in outcomes if o.falsification is not None]
    idle = any(not f.falsifiable and f.verdict is not Verdict.ERROR for f in tried)
    if idle or any(o.verdict is not Verdict.ERROR for o in wrong):
        return NOT_AS_EXPECTED
    return ERROR if wrong or any(f.verdict is Verdict.ERROR for f in tried) else AS_EXPECTED


@app.command("try")
def try_command(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="What the service is to do.")],
    as_service: Annotated[
        str, typer.Option("--as", help="The service whose rights it gets.", autocompletion=service_names)
    ],
    lab: LabOption = discovery.DEFAULT_LAB,
    group: Annotated[list[str] | None, typer.Option("--group", "-g", help="Add the service to this group.")] = None,
    root: Annotated[bool, typer.Option("--root", help="Let the service run as uid 0.")] = False,
    profile: Annotated[Path | None, typer.Option("--profile", help="AppArmor profile to load for it.")] = None,
    access: Annotated[str, typer.Option("--access", help="What DAC is asked: read, write or execute.")] = "read",
    arm: Annotated[list[str] | None, typer.Option("--arm", "-a", help="Only this arm; may be given again.")] = None,
    json_file: JsonOption = None,
    accel: AccelOption = "auto",
    guests: GuestsOption = None,
    quiet: QuietOption = False,
) -> None:
    """Run any command as any service of the lab, in every arm, and say who refuses what.

    The command gets the uid, groups, capabilities and the domain or profile of the service's own worker. Its program
    itself is let in, as code that already runs inside the service; what it does then is judged.

    Examples:

        lsmlab try --as nginx -- cat /etc/shadow

        lsmlab try --as nginx --group shadow -- cat /etc/shadow

        lsmlab try --as nginx --root --access write -- touch /etc/cron.d/persist
    """
    need_linux()
    see_json_target(json_file)
    known("access", access, ["read", "write", "execute"])
    if profile is not None and not profile.is_file():
        raise DefinitionError(f"--profile {profile}: no such file")
    machine = discovery.load_lab(lab)
    machine.service(as_service)
    arms = [arm_of(a) for a in arm] if arm else [a for a in machine.arms if not a.unconfined]
    for wanted in arms:
        need_arm(machine.arms, wanted, f"lab {lab}")
    question = trial.Question(as_service, tuple(command), tuple(group or ()), root, profile, access)
    with (
        progress_shown(quiet) as progress,
        open_bench(machine, progress, accelerator=accelerator_of(accel), guests=guests) as bench,
    ):
        answers = trial.ask(bench, question, arms)
    if json_file is not None:
        body = ",".join(a.model_dump_json() for a in answers)
        write_json(f'{{"schema": 1, "command": {json.dumps(command)}, "arms": [{body}]}}\n', json_file)
    if str(json_file) != "-":
        console().print(trials.trial_table(question, machine, answers))
    raise typer.Exit(ERROR if any(a.result == "error" for a in answers) else AS_EXPECTED)


@app.command("show")
def show_command(
    outcome: Annotated[
        str | None, typer.Argument(metavar="[OUTCOME]", help="Its number or id; none: list the newest.")
    ] = None,
    json_file: JsonOption = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="How many to list.")] = 20,
) -> None:
    """Show a kept outcome in full, or list the newest.

    Examples:

        lsmlab show

        lsmlab show 12

        lsmlab show 12 --json -
    """
    see_json_target(json_file)
    store = Store()
    if outcome is None:
        rows = store.recent(limit)
        if json_file is not None:
            write_json(Report(outcomes=tuple(o for _, o in rows)).to_json(), json_file)
        elif not rows:
            say("no outcome is kept yet: `lsmlab run` makes one")
        else:
            console().print(text.outcomes_table(rows))
        return
    number, found = store.get(outcome)
    if json_file is not None:
        write_json(Report(outcomes=(found,)).to_json(), json_file)
        return
    console().print(text.outcome_detail(found, number))
