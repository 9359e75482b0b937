"""The command line: parse, call, print, exit. Results go to standard output, everything else to standard error."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from lsmlab import __version__, cache, discovery, doctor, inventory, run, shell, trial
from lsmlab.bench import open_bench
from lsmlab.errors import DefinitionError, LsmlabError
from lsmlab.image import build
from lsmlab.machine import qemu
from lsmlab.outcome import Outcome, Report
from lsmlab.progress import Progress, Silent
from lsmlab.report import tables, text, trials
from lsmlab.report.progress import LiveProgress
from lsmlab.store import Store
from lsmlab.terms import Arm, Framework, Verdict

AS_EXPECTED, NOT_AS_EXPECTED, INTERRUPTED, ERROR, USAGE, NOTHING = range(6)
"""Exit codes, pytest's. Mixed results: a proved mismatch (1) outranks an error (3)."""

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
images_app = typer.Typer(help="Built images and saved guests: list, build, prune.", rich_markup_mode="markdown")
app.add_typer(images_app, name="images")

_ClickException: Any = typer.BadParameter.__mro__[2]
"""click's ClickException, from wherever this typer takes its click."""


def _lab_names(incomplete: str) -> list[str]:
    return _complete(incomplete, lambda: discovery.labs().ids)


def _scenario_names(incomplete: str) -> list[str]:
    return _complete(incomplete, lambda: discovery.scenarios().ids)


def _service_names(incomplete: str) -> list[str]:
    return _complete(incomplete, lambda: sorted(discovery.load_lab().services))


def _complete(incomplete: str, names: Any) -> list[str]:
    with contextlib.suppress(LsmlabError):
        return [n for n in names() if n.startswith(incomplete)]
    return []


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
    if target is None or str(target) == "-":
        return
    if not target.parent.is_dir() or target.is_dir() or not os.access(target.parent, os.W_OK):
        raise DefinitionError(f"--json {target}: cannot be written there", hint="Name a file in a folder that exists.")


def _write_json(content: str, target: Path | None) -> None:
    if target is None:
        return
    if str(target) == "-":
        sys.stdout.write(content)
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
    scenarios: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SCENARIO|PATH]...", help="Scenarios, by name, folder or file.", autocompletion=_scenario_names
        ),
    ] = None,
    lab: LabOption = discovery.DEFAULT_LAB,
    framework: Annotated[
        list[str] | None, typer.Option("--framework", "-f", help="selinux or apparmor; may be given twice.")
    ] = None,
    json_file: JsonOption = None,
    accel: AccelOption = "auto",
    guests: GuestsOption = None,
    quiet: QuietOption = False,
) -> None:
    """Run scenarios and say what DAC permits and MAC blocks.

    Nothing named: every scenario below ./scenarios, or lsmlab's own where there are none. Every outcome is kept:
    `lsmlab show` lists them.

    Examples:

        lsmlab run nginx-reads-shadow

        lsmlab run --lab debian-12 --framework selinux --json out.json

        lsmlab run path/to/my-scenario
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
        with _progress(quiet) as progress, open_bench(machine, progress, accelerator=_accelerator(accel)) as bench:
            progress.note(f"Lab {machine.id}, {bench.acceleration.sentence()}")
            for outcome in run.run(bench, wanted, guests=guests):
                outcomes.append(outcome)  # first: where the store is full, --json still has it
                number = store.add(outcome)
                if str(json_file) != "-":
                    with progress.paused():
                        console.print(text.outcome_summary(outcome, number))
    finally:
        if outcomes:
            _write_json(Report(outcomes=tuple(outcomes)).to_json(), json_file)
    if str(json_file) != "-":
        console.print(text.run_summary(outcomes, time.monotonic() - start), markup=False)
    raise typer.Exit(exit_code(outcomes))


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """The exit code of mixed results: a proved mismatch goes before an error, and that before success."""
    if not outcomes:
        return NOTHING
    wrong = [o for o in outcomes if not o.as_expected]
    if any(o.verdict is not Verdict.ERROR for o in wrong):
        return NOT_AS_EXPECTED
    return ERROR if wrong else AS_EXPECTED


@app.command("scenarios")
def scenarios_command(json_file: JsonOption = None) -> None:
    """List the scenarios: lsmlab's own and those below ./scenarios."""
    _json_target(json_file)
    found = [discovery.load_scenarios([name])[0] for name in discovery.scenarios().ids]
    if json_file is not None:
        rows = [
            {
                "id": s.id, "title": s.title, "story": s.story.strip(), "technique": s.technique, "tags": list(s.tags),
                "service": s.subject.service, "expected": {f: e.verdict for f, e in s.expected.items()},
            }
            for s in found
        ]  # fmt: skip
        _write_json(json.dumps({"schema": 1, "scenarios": rows}, indent=1) + "\n", json_file)
        return
    table = [
        (s.id, s.technique, *(s.expected[f].verdict if f in s.expected else "-" for f in Framework), s.title)
        for s in found
    ]
    print(tables.plain(("scenario", "technique", "SELinux", "AppArmor", "what happens"), table))


@app.command("labs")
def labs_command(json_file: JsonOption = None) -> None:
    """List the labs: kinds of machine, their frameworks, and whether their image is built."""
    _json_target(json_file)
    rows: list[dict[str, Any]] = []
    for name in discovery.labs().ids:
        machine = discovery.load_lab(name)
        image = build.find(machine)
        rows.append(
            {
                "id": machine.id, "title": machine.title, "frameworks": [f.value for f in machine.frameworks],
                "services": sorted(machine.services), "memory_mib": machine.memory_mib,
                "image": f"built {image.built[:10]}" if image else "not built",
            }
        )  # fmt: skip
    if json_file is not None:
        _write_json(json.dumps({"schema": 1, "labs": rows}, indent=1) + "\n", json_file)
        return
    table = [(r["id"], r["title"], ", ".join(r["frameworks"]), ", ".join(r["services"]), r["image"]) for r in rows]
    print(tables.plain(("lab", "machine", "frameworks", "services", "image"), table))


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
    _need_arm(machine.arms, where, lab)
    setup = discovery.load_scenarios([scenario])[0] if scenario else None
    if not command:
        shell.need_terminal()
    with _progress(quiet) as progress, open_bench(machine, progress, accelerator=_accelerator(accel)) as bench:
        if not command:
            shell.open_on_arm(bench, where, setup)
            return
        result = shell.run_on_arm(bench, where, command, setup)
    sys.stdout.buffer.write(result.stdout)
    sys.stdout.flush()
    sys.stderr.buffer.write(result.stderr)
    raise typer.Exit(result.exit_code if result.exit_code is not None else 128 + (result.signal or 0))


def _need_arm(arms: Sequence[Arm], wanted: Arm, lab: str) -> None:
    if wanted not in arms:
        raise DefinitionError(f"lab {lab} has no arm {wanted}; it has: {', '.join(arms)}")


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
    arms = [_arm(a) for a in arm] if arm else list(machine.arms)
    for wanted in arms:
        _need_arm(machine.arms, wanted, lab)
    question = trial.Question(as_service, tuple(command), tuple(group or ()), root, profile, access)
    with _progress(quiet) as progress, open_bench(machine, progress, accelerator=_accelerator(accel)) as bench:
        answers = trial.ask(bench, question, arms, guests=guests)
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
    """List built images and saved guests, with sizes, ages, and whether a run would still use them."""
    _json_target(json_file)
    entries = inventory.entries()
    if json_file is not None:
        rows = [{**e.as_json(), "folder": str(e.folder)} for e in entries]
        _write_json(json.dumps({"schema": 1, "images": rows}, indent=1) + "\n", json_file)
        return
    if not entries:
        _say("nothing is built yet: `lsmlab images build debian-13`, or any run, builds what it needs")
        return
    table = [(e.kind, e.name, f"{e.mib} MiB", e.age(), e.status) for e in entries]
    print(tables.plain(("kind", "name", "size", "age", "status"), table))


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
    cache.sweep()
    with _progress(quiet) as progress, cache.in_use():
        built = [build.ensure(machine, progress, rebuild=rebuild) for machine in machines]
    for image in built:
        print(f"{image.lab}  {image.digest[:16]}  {image.folder}")


@images_app.command("prune")
def images_prune(
    everything: Annotated[bool, typer.Option("--all", help="Also what is current.")] = False,
) -> None:
    """Delete what no run would use any more; a run in progress is not disturbed."""
    removed = inventory.prune(everything=everything)
    for entry in removed:
        print(f"removed {entry.kind} {entry.name} ({entry.mib} MiB)")
    _say(f"{sum(e.mib for e in removed)} MiB freed")


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
    print(f"lsmlab: {words}", file=sys.stderr)


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
    traceback.print_exception(error)
    _say("this is a defect of lsmlab; please report it with the lines above")
    return ERROR


if __name__ == "__main__":
    main()
