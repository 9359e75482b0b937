"""Scenarios: `scenarios`, `new`, `check`, `schema`, `catalogue`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from lsmlab import catalogue, check, discovery, schema, selection, skeleton
from lsmlab.cli.base import (
    AS_EXPECTED,
    EPILOG,
    ERROR,
    NOTHING,
    USAGE,
    JsonOption,
    QuietOption,
    ScenariosArgument,
    app,
    known,
    lab_names,
    need_no_option,
    new_app,
    progress_shown,
    say,
    schema_kinds,
    see_json_target,
    values_of,
    write_json,
)
from lsmlab.errors import DefinitionError
from lsmlab.outcome import Report
from lsmlab.report import checks, comparison, pages, tables
from lsmlab.store import Store
from lsmlab.terms import Framework

STRAYS = 5
"""How many of the scenarios that are not here are named."""


@app.command("scenarios", epilog=EPILOG)
def scenarios_command(
    framework: Annotated[
        list[str] | None,
        typer.Option("--framework", "-f", help="Which expect something of it.", autocompletion=values_of("framework")),
    ] = None,
    technique: Annotated[
        list[str] | None,
        typer.Option(
            "--technique", help="ATT&CK technique; T1003 takes T1003.008 too.", autocompletion=values_of("technique")
        ),
    ] = None,
    service: Annotated[
        list[str] | None,
        typer.Option("--service", help="In which this service acts.", autocompletion=values_of("service")),
    ] = None,
    difficulty: Annotated[
        list[str] | None,
        typer.Option(
            "--difficulty", help="beginner, intermediate or advanced.", autocompletion=values_of("difficulty")
        ),
    ] = None,
    tag: Annotated[
        list[str] | None, typer.Option("--tag", "-t", help="With this tag.", autocompletion=values_of("tag"))
    ] = None,
    verdict: Annotated[
        list[str] | None,
        typer.Option("--verdict", help="Of which this is expected.", autocompletion=values_of("verdict")),
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
    see_json_target(json_file)
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
        write_json(json.dumps({"schema": 1, "scenarios": rows}, indent=1) + "\n", json_file)
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
        say(f"no scenario fits: there are {len(there)}, and none meets all of these conditions")
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
    if at is not None:
        need_no_option("--at", at, "FOLDER")
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
            "--lab", "-l", help="Whose tools compile the policies; may be given again.", autocompletion=lab_names
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
    see_json_target(json_file)
    with progress_shown(quiet) as progress:
        found = check.check(scenarios or (), lab or [discovery.DEFAULT_LAB], progress, compiling=compiling)
    if json_file is not None:
        write_json(json.dumps(found.as_json(), indent=1) + "\n", json_file)
    if str(json_file) != "-":
        print(checks.findings_text(found))
    raise typer.Exit(USAGE if found.faulty else ERROR if found.incomplete else AS_EXPECTED)


@app.command("schema")
def schema_command(
    kind: Annotated[
        str, typer.Argument(metavar="[scenario|lab]", help="Of which file.", autocompletion=schema_kinds)
    ] = "scenario",
) -> None:
    """Print the JSON Schema of scenario or lab files, for editors.

    Example:

        lsmlab schema scenario > scenario.schema.json
    """
    print(json.dumps(schema.of(known("schema", kind, list(schema.MODELS))), indent=1))


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
        write_json(page, out / name)
        print(out / name)
    if found.strays:
        named = f"{', '.join(found.strays[:STRAYS])}{', ...' if len(found.strays) > STRAYS else ''}"
        say(f"outcomes of {len(found.strays)} scenarios that are not here were left out: {named}")
