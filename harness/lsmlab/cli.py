"""The command line: parse, call, print, exit. Results go to standard output, everything else to standard error."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from lsmlab import (
    __version__,
    cache,
    catalogue,
    check,
    discovery,
    doctor,
    inventory,
    paths,
    run,
    schema,
    selection,
    shell,
    skeleton,
    trial,
)
from lsmlab import falsify as falsification
from lsmlab.bench import open_bench
from lsmlab.channel.base import CommandResult
from lsmlab.errors import DefinitionError, LsmlabError
from lsmlab.image import archive, build
from lsmlab.lab import Lab
from lsmlab.machine import qemu
from lsmlab.outcome import Outcome, Report
from lsmlab.progress import Progress, Silent
from lsmlab.report import checks, comparison, pages, tables, text, trials
from lsmlab.report.progress import LiveProgress
from lsmlab.store import Store
from lsmlab.terminal import clean, clean_json
from lsmlab.terms import ENFORCING_ARM, Arm, Framework, Verdict

AS_EXPECTED, NOT_AS_EXPECTED, INTERRUPTED, ERROR, USAGE, NOTHING = range(6)
"""Exit codes, pytest's. Mixed results: a proved mismatch (1) outranks an error (3)."""

STRAYS = 5
"""How many of the scenarios that are not here are named."""

EPILOG = (
    "Exit codes are pytest's: 0 all as expected, 1 not as expected, 2 interrupted, 3 error, 4 wrong usage, "
    "5 nothing to run. Where results are mixed, 1 goes before 3, and 3 before 0."
)

app = typer.Typer(
    name="lsmlab",
    help="A lab and test harness for SELinux and AppArmor: proves on real machines that DAC permits an attack and MAC "
    "blocks it, by the kernel's own record.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
images_app = typer.Typer(
    help="Built images and saved guests: list, build, export, import, prune.", rich_markup_mode="markdown"
)
app.add_typer(images_app, name="images")
new_app = typer.Typer(help="Make something new to work on.", rich_markup_mode="markdown", no_args_is_help=True)
app.add_typer(new_app, name="new")

_ClickException: Any = typer.BadParameter.__mro__[2]
"""click's ClickException, from wherever this typer takes its click."""


def _lab_names(incomplete: str) -> list[str]:
    return _complete(incomplete, lambda: discovery.labs().ids)


def _scenario_names(incomplete: str) -> list[str]:
    return _complete(incomplete, lambda: discovery.scenarios().ids)


def _service_names(incomplete: str) -> list[str]:
    return _complete(incomplete, lambda: sorted(discovery.load_lab().services))


def _values(kind: str) -> Any:
    """Completion for what scenarios have of one kind: tags, techniques, services and so on."""

    def known(incomplete: str) -> list[str]:
        return _complete(
            incomplete, lambda: selection.values(discovery.load_scenarios(discovery.scenarios().ids))[kind]
        )

    return known


def _schema_kinds(incomplete: str) -> list[str]:
    return _complete(incomplete, lambda: list(schema.MODELS))


def _complete(incomplete: str, names: Any) -> list[str]:
    with contextlib.suppress(LsmlabError):
        return [n for n in names() if n.startswith(incomplete)]
    return []


ScenariosArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SCENARIO|PATH]...", help="Scenarios, by name, folder or file.", autocompletion=_scenario_names
    ),
]
LabOption = Annotated[
    str, typer.Option("--lab", "-l", help="The kind of machine; see `lsmlab labs`.", autocompletion=_lab_names)
]
AccelOption = Annotated[str, typer.Option("--accel", help="auto, kvm or tcg. auto: KVM where it proves itself.")]
GuestsOption = Annotated[
    int | None, typer.Option("--guests", min=1, max=64, help="How many guests at once; by default as many as fit.")
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", metavar="FILE|-", help="Write the results as JSON; - is standard output.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on standard error.")]


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Progress]:
    if quiet:
        yield Silent()
        return
    with LiveProgress() as live:
        yield live


def _console() -> Console:
    return Console(highlight=False, soft_wrap=False)


def _json_target(target: Path | None) -> None:
    """See before the run that the file can be written: a run's results are not lost to a typing error."""
    if target is not None and str(target) != "-":
        _need_writable(target, f"--json {target}")


def _need_writable(target: Path, what: str) -> None:
    if not target.parent.is_dir() or target.is_dir() or not os.access(target.parent, os.W_OK):
        raise DefinitionError(f"{what}: cannot be written there", hint="Name a file in a folder that exists.")


def _write_json(content: str, target: Path | None) -> None:
    if target is None:
        return
    if str(target) == "-":
        sys.stdout.write(clean_json(content))
        return
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        draft.write_text(content, "utf-8")
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


def _accelerator(value: str) -> str:
    if value not in {"auto", "kvm", "tcg"}:
        raise DefinitionError(f"--accel {value}: expected auto, kvm or tcg")
    return value


def _frameworks(names: Sequence[str] | None) -> list[Framework] | None:
    return [Framework(_known("framework", n, [f.value for f in Framework])) for n in names] if names else None


def _arm(name: str) -> Arm:
    return Arm(_known("arm", name, [a.value for a in Arm]))


def _known(what: str, name: str, known: list[str]) -> str:
    if name not in known:
        from lsmlab.definition import unknown_name  # noqa: PLC0415

        raise unknown_name(what, name, known)
    return name


@app.command("run", epilog=EPILOG)
def run_command(
    scenarios: ScenariosArgument = None,
    lab: LabOption = discovery.DEFAULT_LAB,
    framework: Annotated[
        list[str] | None, typer.Option("--framework", "-f", help="selinux or apparmor; may be given twice.")
    ] = None,
    json_file: JsonOption = None,
    accel: AccelOption = "auto",
    guests: GuestsOption = None,
    falsify: Annotated[
        bool, typer.Option("--falsify", help="See whether each CONTAINED could have come out otherwise.")
    ] = False,
    quiet: QuietOption = False,
) -> None:
    """Run scenarios and say what DAC permits and MAC blocks.

    Nothing named: every scenario below ./scenarios, or lsmlab's own where there are none. Every outcome is kept:
    `lsmlab show` lists them.

    Examples:

        lsmlab run nginx-reads-shadow

        lsmlab run --lab debian-12 --framework selinux --json out.json

        lsmlab run path/to/my-scenario

        lsmlab run nginx-reads-shadow --falsify
    """
    _json_target(json_file)
    _accelerator(accel)
    machine = discovery.load_lab(lab)
    wanted = run.cases(discovery.load_scenarios(scenarios or ()), machine, _frameworks(framework))
    if not wanted:
        _say("nothing to run: no scenario has an expectation for the frameworks asked for")
        raise typer.Exit(NOTHING)
    console, start, outcomes = _console(), time.monotonic(), list[Outcome]()
    store = Store()
    store.count()  # a store that cannot be used is said now, not after the run
    try:
        with _progress(quiet) as progress:
            for outcome in _outcomes(
                machine, wanted, progress, accelerator=_accelerator(accel), guests=guests, falsify=falsify
            ):
                if outcome.falsification is not None:
                    outcomes[[o.id for o in outcomes].index(outcome.id)] = outcome
                    store.update(outcome)
                    shown = text.falsification_summary(outcome)
                else:
                    outcomes.append(outcome)  # first: where the store is full, --json still has it
                    shown = text.outcome_summary(outcome, store.add(outcome))
                if str(json_file) != "-":
                    with progress.paused():
                        console.print(shown)
    finally:
        if outcomes:
            _write_json(Report(outcomes=tuple(outcomes)).to_json(), json_file)
    if str(json_file) != "-":
        console.print(text.run_summary(outcomes, time.monotonic() - start), markup=False)
    raise typer.Exit(exit_code(outcomes))


def _outcomes(
    lab: Lab, wanted: Sequence[run.Case], progress: Progress, *, accelerator: str, guests: int | None, falsify: bool
) -> Iterator[Outcome]:
    """The outcome of each case, on the lab's image, or on one with the packages that it needs besides.

    With `falsify`, those that are CONTAINED come once more, with their falsification.
    """
    for machine, cases in run.by_image(lab, wanted):
        with open_bench(machine, progress, accelerator=accelerator, guests=guests) as bench:
            more = ", ".join(p for p in machine.image.packages if p not in lab.image.packages)
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


@app.command("scenarios", epilog=EPILOG)
def scenarios_command(
    framework: Annotated[
        list[str] | None,
        typer.Option("--framework", "-f", help="Which expect something of it.", autocompletion=_values("framework")),
    ] = None,
    technique: Annotated[
        list[str] | None,
        typer.Option(
            "--technique", help="ATT&CK technique; T1003 takes T1003.008 too.", autocompletion=_values("technique")
        ),
    ] = None,
    service: Annotated[
        list[str] | None,
        typer.Option("--service", help="In which this service acts.", autocompletion=_values("service")),
    ] = None,
    difficulty: Annotated[
        list[str] | None,
        typer.Option("--difficulty", help="beginner, intermediate or advanced.", autocompletion=_values("difficulty")),
    ] = None,
    tag: Annotated[
        list[str] | None, typer.Option("--tag", "-t", help="With this tag.", autocompletion=_values("tag"))
    ] = None,
    verdict: Annotated[
        list[str] | None,
        typer.Option("--verdict", help="Of which this is expected.", autocompletion=_values("verdict")),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """List the scenarios: lsmlab's own and those below ./scenarios.

    Options narrow the list: of each kind that is given, one has to fit. With --framework, --verdict is about that one.

    Examples:

        lsmlab scenarios --tag web --difficulty beginner

        lsmlab scenarios --framework apparmor --verdict NOT_CONTAINED

        lsmlab scenarios --technique T1003 --technique T1552 --json -
    """
    _json_target(json_file)
    there = discovery.load_scenarios(discovery.scenarios().ids)
    wanted = selection.read(
        there, framework=framework, technique=technique, service=service, difficulty=difficulty, tag=tag,
        verdict=verdict,
    )  # fmt: skip
    found = [s for s in there if wanted.takes(s)]
    if json_file is not None:
        rows = [
            {
                "id": s.id, "title": s.title, "story": s.story.strip(), "technique": s.technique, "tags": list(s.tags),
                "service": s.subject.name, "difficulty": s.difficulty,
                "expected": {f: e.verdict for f, e in s.expected.items()},
                "labs": {f: {n: o.verdict for n, o in e.labs.items()} for f, e in s.expected.items() if e.labs},
            }
            for s in found
        ]  # fmt: skip
        _write_json(json.dumps({"schema": 1, "scenarios": rows}, indent=1) + "\n", json_file)
    elif found:
        table = [
            (
                s.id, s.difficulty, s.subject.name, s.technique,
                *(selection.verdict_words(s, f) for f in Framework), s.title,
            )
            for s in found
        ]  # fmt: skip
        heads = ("scenario", "difficulty", "service", "technique", *(f.display for f in Framework), "what happens")
        print(tables.plain(heads, table))
    if not found:
        _say(f"no scenario fits: there are {len(there)}, and none meets all of these conditions")
        raise typer.Exit(NOTHING)


@new_app.command("scenario", epilog=EPILOG)
def new_scenario_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its id, and the name of its folder.")],
    at: Annotated[
        Path | None, typer.Option("--at", metavar="FOLDER", help="Make it below this folder, not below ./scenarios.")
    ] = None,
) -> None:
    """Make a scenario that runs as it is, with a comment for each key.

    Nothing is overwritten.

    Examples:

        lsmlab new scenario nginx-reads-my-key

        lsmlab new scenario nginx-reads-my-key --at tests/policy
    """
    folder = skeleton.create(name, at)
    check_it, run_it = skeleton.next_steps(folder, name)
    print(f"{folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}")
    print(f"It works as it is. Next:\n  {check_it}\n  {run_it}")


@app.command("check", epilog=EPILOG)
def check_command(
    scenarios: ScenariosArgument = None,
    lab: Annotated[
        list[str] | None,
        typer.Option(
            "--lab", "-l", help="Whose tools compile the policies; may be given again.", autocompletion=_lab_names
        ),
    ] = None,
    compiling: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Compile SELinux modules and AppArmor profiles.")
    ] = True,
    json_file: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    """Find what is wrong with scenarios, labs and policies, without booting a guest.

    Nothing named: every scenario below ./scenarios, or lsmlab's own where there are none. Labs are checked each time.
    Policies are compiled with the tools of the lab's image. 4: there are faults; 3: none was found, and something could
    not be compiled, for instance since the image is not built; 0: everything is in order.

    Examples:

        lsmlab check

        lsmlab check nginx-reads-shadow --lab debian-13 --lab debian-12

        lsmlab check path/to/my-scenario --no-compile
    """
    _json_target(json_file)
    with _progress(quiet) as progress:
        found = check.check(scenarios or (), lab or [discovery.DEFAULT_LAB], progress, compiling=compiling)
    if json_file is not None:
        _write_json(json.dumps(found.as_json(), indent=1) + "\n", json_file)
    if str(json_file) != "-":
        print(checks.findings_text(found))
    raise typer.Exit(USAGE if found.faulty else ERROR if found.incomplete else AS_EXPECTED)


@app.command("schema")
def schema_command(
    kind: Annotated[
        str, typer.Argument(metavar="[scenario|lab]", help="Of which file.", autocompletion=_schema_kinds)
    ] = "scenario",
) -> None:
    """Print the JSON Schema of scenario or lab files, for editors.

    Example:

        lsmlab schema scenario > scenario.schema.json
    """
    print(json.dumps(schema.of(_known("schema", kind, list(schema.MODELS))), indent=1))


@app.command("catalogue", epilog=EPILOG)
def catalogue_command(
    outcomes: Annotated[
        list[Path] | None,
        typer.Option(
            "--outcomes", metavar="FILE", help="Of `lsmlab run --json`; may be given again. Default: the store."
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where the pages are written.")] = Path("docs"),
) -> None:
    """Write catalogue.md and comparison.md: the scenarios, and what was seen of them. Never what is only expected.

    Examples:

        lsmlab catalogue

        lsmlab catalogue --outcomes debian-13.json --outcomes debian-12.json --out docs
    """
    if not out.is_dir() or not os.access(out, os.W_OK):
        raise DefinitionError(f"--out {out}: no folder that can be written", hint="Make it, or name another.")
    kept = [o for file in outcomes for o in Report.read(file).outcomes] if outcomes else Store().newest()
    found = catalogue.collect(kept)
    for name, page in (
        ("catalogue.md", pages.catalogue_page(found, out)), ("comparison.md", comparison.comparison_page(found, out)),
    ):  # fmt: skip
        _write_json(page, out / name)
        print(out / name)
    if found.strays:
        named = f"{', '.join(found.strays[:STRAYS])}{', ...' if len(found.strays) > STRAYS else ''}"
        _say(f"outcomes of {len(found.strays)} scenarios that are not here were left out: {named}")


@app.command("labs")
def labs_command(json_file: JsonOption = None) -> None:
    """List the labs: kinds of machine, their frameworks, whether this machine can run them, and whether it has.

    "seen" is when an outcome in the store was last as expected.
    """
    _json_target(json_file)
    store = Store(paths.state() / "outcomes.sqlite")
    proven = store.proven() if store.path.exists() else {}
    rows: list[dict[str, Any]] = []
    for name in discovery.labs().ids:
        machine = discovery.load_lab(name)
        image = build.find(machine)
        rows.append(
            {
                "id": machine.id, "title": machine.title, "frameworks": [f.value for f in machine.frameworks],
                "services": sorted(machine.services), "memory_mib": machine.memory_mib,
                "image": f"built {image.built[:10]}" if image else "not built",
                "lacks": doctor.lacking(machine), "seen": proven.get(machine.id),
            }
        )  # fmt: skip
    if json_file is not None:
        _write_json(json.dumps({"schema": 1, "labs": rows}, indent=1) + "\n", json_file)
        return
    table = [
        (
            r["id"], r["title"], ", ".join(r["frameworks"]), f"{r['memory_mib']} MiB", r["image"],
            f"lacks {', '.join(r['lacks'])}" if r["lacks"] else "ready", r["seen"][:10] if r["seen"] else "never",
        )
        for r in rows
    ]  # fmt: skip
    print(tables.plain(("lab", "machine", "frameworks", "memory", "image", "here", "seen"), table))


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
    _json_target(json_file)
    store = Store()
    if outcome is None:
        rows = store.recent(limit)
        if json_file is not None:
            _write_json(Report(outcomes=tuple(o for _, o in rows)).to_json(), json_file)
        elif not rows:
            _say("no outcome is kept yet: `lsmlab run` makes one")
        else:
            _console().print(text.outcomes_table(rows))
        return
    number, found = store.get(outcome)
    if json_file is not None:
        _write_json(Report(outcomes=(found,)).to_json(), json_file)
        return
    _console().print(text.outcome_detail(found, number))


@app.command("shell")
def shell_command(
    lab: Annotated[str, typer.Argument(metavar="LAB", autocompletion=_lab_names)] = discovery.DEFAULT_LAB,
    command: Annotated[list[str] | None, typer.Argument(metavar="[-- COMMAND...]", help="Run this instead.")] = None,
    arm: Annotated[str, typer.Option("--arm", "-a", help="The arm to be in.")] = Arm.DAC.value,
    scenario: Annotated[
        str | None,
        typer.Option("--scenario", "-s", help="Set the guest up for this scenario.", autocompletion=_scenario_names),
    ] = None,
    accel: AccelOption = "auto",
    quiet: QuietOption = False,
) -> None:
    """Open a root shell in a fresh guest of one arm; it is thrown away afterwards.

    Examples:

        lsmlab shell debian-13 --arm selinux-enforcing

        lsmlab shell debian-13 --arm apparmor-enforce --scenario nginx-reads-shadow

        lsmlab shell debian-12 --arm selinux-permissive -- id -Z
    """
    _accelerator(accel)
    machine, where = discovery.load_lab(lab), _arm(arm)
    _need_arm(machine.arms, where, f"lab {lab}")
    setup = discovery.load_scenarios([scenario])[0] if scenario else None
    if setup is not None:
        machine = machine.with_packages(setup.packages)
    if not command:
        shell.need_terminal()
    with _progress(quiet) as progress, open_bench(machine, progress, accelerator=_accelerator(accel)) as bench:
        if not command:
            shell.open_on_arm(bench, where, setup)
            return
        result = shell.run_on_arm(bench, where, command, setup)
    _pass_on(result)


def _pass_on(result: CommandResult | None) -> None:
    """End as a guest's command did, with its output; None: there was a shell instead."""
    if result is None:
        return
    sys.stdout.buffer.write(result.stdout)
    sys.stdout.flush()
    sys.stderr.buffer.write(result.stderr)
    raise typer.Exit(result.exit_code if result.exit_code is not None else 128 + (result.signal or 0))


@app.command("rewind")
def rewind_command(
    outcome: Annotated[str, typer.Argument(metavar="OUTCOME", help="Its number or id; `lsmlab show` lists them.")],
    command: Annotated[list[str] | None, typer.Argument(metavar="[-- COMMAND...]", help="Run this instead.")] = None,
    arm: Annotated[
        str | None, typer.Option("--arm", "-a", help="The arm to be in; by default the enforcing one.")
    ] = None,
    attempt: Annotated[
        str | None, typer.Option("--attempt", help="The attempt to stand before; by default the first attack.")
    ] = None,
    scenario: Annotated[
        str | None, typer.Option("--scenario", "-s", help="Where the scenario lies, if it is not below ./scenarios.")
    ] = None,
    accel: AccelOption = "auto",
    quiet: QuietOption = False,
) -> None:
    """Open a root shell in the state just before an outcome's attack, with the attack's command at the prompt.

    Press Enter to make the attack, or look around first. The guest is thrown away afterwards.

    Examples:

        lsmlab rewind 12

        lsmlab rewind 12 --arm dac

        lsmlab rewind 12 --arm selinux-enforcing -- ls -Z /etc/shadow
    """
    _accelerator(accel)
    number, kept = Store().get(outcome)
    where = _arm(arm) if arm else ENFORCING_ARM[kept.framework]
    _need_arm([record.arm for record in kept.arms], where, f"outcome {number}")
    found = discovery.load_scenarios([scenario or kept.scenario])[0]
    spec = shell.attempt_of(found, attempt) if attempt else found.attacks[0]
    if not command:
        shell.need_terminal()
    machine = discovery.load_lab(kept.lab).with_packages(found.packages)
    with _progress(quiet) as progress, open_bench(machine, progress, accelerator=_accelerator(accel)) as bench:
        if found.digest() != kept.scenario_digest:
            progress.note(f"The scenario {found.id} has changed since outcome {number}: this is how it is now.")
        result = shell.open_before_attempt(bench, found, where, spec, command or ())
    _pass_on(result)


def _need_arm(arms: Sequence[Arm], wanted: Arm, whose: str) -> None:
    if wanted not in arms:
        raise DefinitionError(f"{whose} has no arm {wanted}; it has: {', '.join(arms)}")


@app.command("try")
def try_command(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="What the service is to do.")],
    as_service: Annotated[
        str, typer.Option("--as", help="The service whose rights it gets.", autocompletion=_service_names)
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
    _json_target(json_file)
    _known("access", access, ["read", "write", "execute"])
    if profile is not None and not profile.is_file():
        raise DefinitionError(f"--profile {profile}: no such file")
    machine = discovery.load_lab(lab)
    machine.service(as_service)
    arms = [_arm(a) for a in arm] if arm else [a for a in machine.arms if not a.unconfined]
    for wanted in arms:
        _need_arm(machine.arms, wanted, f"lab {lab}")
    question = trial.Question(as_service, tuple(command), tuple(group or ()), root, profile, access)
    with (
        _progress(quiet) as progress,
        open_bench(machine, progress, accelerator=_accelerator(accel), guests=guests) as bench,
    ):
        answers = trial.ask(bench, question, arms)
    if json_file is not None:
        body = ",".join(a.model_dump_json() for a in answers)
        _write_json(f'{{"schema": 1, "command": {json.dumps(command)}, "arms": [{body}]}}\n', json_file)
    if str(json_file) != "-":
        _console().print(trials.trial_table(question, machine, answers))
    raise typer.Exit(ERROR if any(a.result == "error" for a in answers) else AS_EXPECTED)


@images_app.callback(invoke_without_command=True)
def images_command(context: typer.Context, json_file: JsonOption = None) -> None:
    """List built images and saved guests."""
    if context.invoked_subcommand is None:
        images_list(json_file)


@images_app.command("list")
def images_list(json_file: JsonOption = None) -> None:
    """List built images and saved guests: size, age, last use, whether a run would take them, whether one does now."""
    _json_target(json_file)
    entries = inventory.entries()
    if json_file is not None:
        rows = [{**e.as_json(), "folder": str(e.folder)} for e in entries]
        _write_json(json.dumps({"schema": 1, "images": rows}, indent=1) + "\n", json_file)
        return
    if not entries:
        _say("nothing is built yet: `lsmlab images build debian-13`, or any run, builds what it needs")
        return
    table = [
        (e.kind, e.name, f"{e.mib} MiB", inventory.since(e.made), f"{inventory.since(e.used)} ago", e.standing())
        for e in entries
    ]
    print(tables.plain(("kind", "name", "size", "age", "used", "status"), table))


@images_app.command("build")
def images_build(
    labs: Annotated[list[str], typer.Argument(metavar="LAB...", autocompletion=_lab_names)],
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Build anew, with today's packages.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Build the images of labs, where they are not built yet.

    Example:

        lsmlab images build debian-13 debian-12
    """
    machines = [discovery.load_lab(name) for name in labs]
    with _progress(quiet) as progress, contextlib.ExitStack() as uses:
        limit = inventory.Limit(progress)
        cache.sweep()
        built = [build.ensure(machine, progress, rebuild=rebuild, uses=uses) for machine in machines]
        limit.keep()
    for image in built:
        print(f"{image.lab}  {image.digest[:16]}  {image.folder}")


@images_app.command("export")
def images_export(
    lab: Annotated[str, typer.Argument(metavar="LAB", autocompletion=_lab_names)],
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="By default LAB.image.tar.gz in the current folder.")
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Write a lab's image to one file, for machines that cannot build it; it is built first where there is none.

    Prints the file's SHA-256 as sha256sum does. Example:

        lsmlab images export debian-13 debian-13.image.tar.gz
    """
    machine = discovery.load_lab(lab)
    target = file or archive.default_name(machine)
    _need_writable(target, str(target))
    with _progress(quiet) as progress:
        written = archive.write(machine, target, progress)
    print(f"{written.sha256}  {written.path}")


@images_app.command("import")
def images_import(
    source: Annotated[str, typer.Argument(metavar="FILE|URL", help="What `lsmlab images export` wrote.")],
    sha256: Annotated[str, typer.Option("--sha256", metavar="HEX", help="Refuse a file with another digest.")] = "",
    quiet: QuietOption = False,
) -> None:
    """Take a lab's image from a file, here or behind an http(s) address; a broken download goes on where it stopped.

    What is in an image runs in guests, and on this machine where policies are compiled: take it from somebody you
    trust, with the digest that `export` printed. Examples:

        lsmlab images import debian-13.image.tar.gz

        lsmlab images import https://example.org/debian-13.image.tar.gz --sha256 9f2b...
    """
    if sha256 and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise DefinitionError(
            f"--sha256 {sha256}: expected 64 hexadecimal digits", hint="`sha256sum FILE` prints them."
        )
    with _progress(quiet) as progress:
        limit = inventory.Limit(progress)
        cache.sweep()
        found = archive.read(source, progress, sha256=sha256)
        limit.keep()
    print(f"{found.image.lab}  {found.image.digest[:16]}  {found.image.folder}")
    _say(f"{'it was here already' if found.there else 'imported'}: `lsmlab run --lab {found.image.lab}` takes it")


@images_app.command("prune")
def images_prune(
    everything: Annotated[bool, typer.Option("--all", help="Also what is current.")] = False,
) -> None:
    """Delete what no run would use any more. What a run uses at this moment is kept."""
    pruned = inventory.prune(everything=everything)
    for entry in pruned.removed:
        print(f"removed {entry.kind} {entry.name} ({entry.mib} MiB)")
    if pruned.leftovers:
        print(f"removed what killed runs left ({pruned.leftovers >> 20} MiB)")
    for entry, why in pruned.kept:
        print(f"kept {entry.kind} {entry.name}: {why}")
    for error in pruned.failed:
        _say(str(error))
    _say(f"{pruned.freed >> 20} MiB freed")
    if pruned.failed:
        raise typer.Exit(NOT_AS_EXPECTED)


@app.command("doctor")
def doctor_command(lab: LabOption = discovery.DEFAULT_LAB, json_file: JsonOption = None) -> None:
    """Say what this machine has and lacks for running a lab, and what to do."""
    _json_target(json_file)
    findings = doctor.examine(discovery.load_lab(lab))
    if json_file is not None:
        rows = [
            {"what": f.what, "ok": f.ok, "needed": f.needed, "found": f.found, "advice": f.advice} for f in findings
        ]
        _write_json(json.dumps({"schema": 1, "findings": rows}, indent=1) + "\n", json_file)
    else:
        _console().print(trials.findings_table(findings))
    raise typer.Exit(ERROR if any(f.needed and not f.ok for f in findings) else AS_EXPECTED)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"lsmlab {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of the whole program."""


def _say(words: str) -> None:
    print(f"lsmlab: {clean(words)}", file=sys.stderr)


class Interrupted(BaseException):  # no KeyboardInterrupt, which typer makes an exit code of
    """The program was asked to stop."""


def _interrupt(number: int, _frame: object) -> NoReturn:
    signal.signal(number, lambda *_: os._exit(INTERRUPTED))  # asked twice: at once; the kernel ends what we started
    raise Interrupted


def main() -> NoReturn:
    """The program. Ends the process with an exit code of `EPILOG`."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an ASCII console shows a guest's text all the same
    try:
        code = app(standalone_mode=False) or AS_EXPECTED
        sys.stdout.flush()  # a reader that went away is noticed here, and not when the interpreter ends
    except (Exception, Interrupted, KeyboardInterrupt) as error:  # noqa: BLE001 - explained, or raised again
        code = _explained(error)
    finally:
        qemu.stop_all()
    sys.exit(code)


def _explained(error: BaseException) -> int:
    """Say what happened, in one message, and give the exit code; what nobody foresaw keeps its traceback."""
    if isinstance(error, (Interrupted, KeyboardInterrupt, typer.Abort)):
        _say("interrupted; outcomes recorded so far are kept")
        return INTERRUPTED
    if isinstance(error, typer.Exit):
        return error.exit_code
    if isinstance(error, _ClickException):
        error.show()
        return USAGE
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader went away: nothing to flush to
        return ERROR
    if isinstance(error, LsmlabError):
        _say(str(error))
        return USAGE if isinstance(error, DefinitionError) else ERROR
    if isinstance(error, OSError):
        _say(f"{error.filename or 'this machine'}: {error.strerror or error}")
        return ERROR
    print(clean("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    _say("this is a defect of lsmlab; please report it with the lines above")
    return ERROR


if __name__ == "__main__":
    main()
