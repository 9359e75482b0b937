"""This machine: `labs`, `images`, `doctor`; which looks at another one as well."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from lsmlab import cache, discovery, doctor, inventory, paths, proofs
from lsmlab.admission import host_of
from lsmlab.cli.base import (
    AS_EXPECTED,
    EPILOG,
    ERROR,
    NOT_AS_EXPECTED,
    AccelOption,
    ImageOption,
    JsonOption,
    QuietOption,
    accelerator_of,
    app,
    console,
    image_of,
    images_app,
    lab_names,
    need_writable,
    progress_shown,
    say,
    see_json_target,
    terminal_width,
    write_json,
)
from lsmlab.errors import DefinitionError
from lsmlab.host import need_linux
from lsmlab.image import archive, build
from lsmlab.lab import Lab
from lsmlab.report import tables, trials
from lsmlab.store import Store


@app.command("labs")
def labs_command(json_file: JsonOption = None) -> None:
    """List the labs: kinds of machine, their frameworks, whether this machine can run them, and whether it has.

    "seen" is when an outcome in the store was last as expected. "real image" is for labs whose distribution publishes
    one: when the flagship last was as expected on it, by the record of scheduled runs that comes with lsmlab. The
    programs, memory and key that each lab needs are in --json, there or not; what is missing is in the table as well.
    """
    see_json_target(json_file)
    store = Store(paths.state() / "outcomes.sqlite")
    proven = store.proven() if store.path.exists() else {}
    on_real_images = proofs.read().labs
    rows: list[dict[str, Any]] = []
    for name in discovery.labs().ids:
        machine = discovery.load_lab(name)
        image = build.find(machine)
        needs = doctor.needs(machine)
        rows.append(
            {
                "id": machine.id, "title": machine.title, "frameworks": [f.value for f in machine.frameworks],
                "services": sorted(machine.services), "memory_mib": machine.memory_mib,
                "engine": machine.engine.kind if machine.engine else None,
                "image": f"built {image.built[:10]}" if image else "not built",
                "needs": list(needs), "lacks": [what for what, there in needs.items() if not there],
                "seen": proven.get(machine.id), "real_image": _proved(on_real_images, machine),
            }
        )  # fmt: skip
    if json_file is not None:
        write_json(json.dumps({"schema": 1, "labs": rows}, indent=1) + "\n", json_file)
        return
    table = [
        (
            r["id"], r["title"], ", ".join(r["frameworks"]),
            f"lacks {', '.join(r['lacks'])}" if r["lacks"] else f"ready, {r['image']}",
            (r["seen"] or "never")[:10], (r["real_image"] or "-")[:10],
        )
        for r in rows
    ]  # fmt: skip
    print(tables.plain(("lab", "machine", "frameworks", "here", "seen", "real image"), table, terminal_width()))


def _proved(ledger: Mapping[str, proofs.Proof | None], lab: Lab) -> str | None:
    """When a lab was last proved on its real image, or never; None where its image is built here."""
    if lab.cloud_image is None:
        return None
    proof = ledger.get(lab.id)
    return proof.date if proof else "never"


@images_app.callback(invoke_without_command=True)
def images_command(context: typer.Context, json_file: JsonOption = None) -> None:
    """List built images and saved guests."""
    if context.invoked_subcommand is None:
        images_list(json_file)


@images_app.command("list")
def images_list(json_file: JsonOption = None) -> None:
    """List built images and saved guests: size, age, last use, whether a run would take them, whether one does now.

    Compiled policies that stand alike are one line: the oldest's age, the latest use. With --json each is there.
    """
    need_linux()
    see_json_target(json_file)
    entries = inventory.entries()
    if json_file is not None:
        rows = [{**e.as_json(), "folder": str(e.folder)} for e in entries]
        write_json(json.dumps({"schema": 1, "images": rows}, indent=1) + "\n", json_file)
        return
    if not entries:
        say("nothing is built yet: `lsmlab images build debian-13`, or any run, builds what it needs")
        return
    total = inventory.total(entries)
    table = [
        (
            like[0].kind, like[0].name if len(like) == 1 else f"{len(like)} of them",
            f"{sum(e.size for e in like) >> 20} MiB", inventory.since(min(e.made for e in like)),
            f"{inventory.since(max(e.used for e in like))} ago", like[0].standing(),
        )
        for like in inventory.listed(entries)
    ]  # fmt: skip
    print(tables.plain(("kind", "name", "size", "age", "used", "status"), table, terminal_width()))
    print(f"\n{total}")


@images_app.command("build")
def images_build(
    labs: Annotated[list[str], typer.Argument(metavar="LAB...", autocompletion=lab_names)],
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Build anew, with today's packages.")] = False,
    image: ImageOption = None,
    accel: AccelOption = "auto",
    quiet: QuietOption = False,
) -> None:
    """Build the images of labs, or download and prepare them, where they are not there yet.

    Examples:

        lsmlab images build debian-13 debian-12

        lsmlab images build fedora-44 --image Fedora-Cloud-Base-Generic-44-1.7.x86_64.qcow2
    """
    need_linux()
    machines = [discovery.load_lab(name) for name in labs]
    if image is not None and len(machines) > 1:
        raise DefinitionError(f"--image {image}: of which lab? Name one")
    file, accelerator = image_of(machines[0], image), accelerator_of(accel)
    with progress_shown(quiet) as progress, contextlib.ExitStack() as uses:
        limit = inventory.Limit(progress)
        cache.sweep()
        built = [
            build.ensure(machine, progress, rebuild=rebuild, uses=uses, accelerator=accelerator, file=file)
            for machine in machines
        ]
        limit.keep()
    for made in built:
        print(f"{made.lab}  {made.digest[:16]}  {made.folder}")


@images_app.command("export")
def images_export(
    lab: Annotated[str, typer.Argument(metavar="LAB", autocompletion=lab_names)],
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="By default LAB.image.tar.gz in the current folder.")
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Write a lab's image to one file, for machines that cannot build it; it is built first where there is none.

    Prints the file's SHA-256 as sha256sum does. Example:

        lsmlab images export debian-13 debian-13.image.tar.gz
    """
    need_linux()
    machine = discovery.load_lab(lab)
    target = file or archive.default_name(machine)
    need_writable(target, str(target))
    with progress_shown(quiet) as progress:
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
    need_linux()
    if sha256 and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise DefinitionError(
            f"--sha256 {sha256}: expected 64 hexadecimal digits", hint="`sha256sum FILE` prints them."
        )
    with progress_shown(quiet) as progress:
        limit = inventory.Limit(progress)
        cache.sweep()
        found = archive.read(source, progress, sha256=sha256)
        limit.keep()
    print(f"{found.image.lab}  {found.image.digest[:16]}  {found.image.folder}")
    say(f"{'it was here already' if found.there else 'imported'}: `lsmlab run --lab {found.image.lab}` takes it")


@images_app.command("prune")
def images_prune(
    everything: Annotated[bool, typer.Option("--all", help="Also what is current.")] = False,
) -> None:
    """Delete what no run would use any more. What a run uses at this moment is kept."""
    need_linux()
    pruned = inventory.prune(everything=everything)
    for entry in pruned.removed:
        print(f"removed {entry.kind} {entry.name} ({entry.mib} MiB)")
    if pruned.leftovers:
        print(f"removed what killed runs left ({pruned.leftovers >> 20} MiB)")
    for entry, why in pruned.kept:
        print(f"kept {entry.kind} {entry.name}: {why}")
    for error in pruned.failed:
        say(str(error))
    say(f"{pruned.freed >> 20} MiB freed")
    if pruned.failed:
        raise typer.Exit(NOT_AS_EXPECTED)


@app.command("doctor", epilog=EPILOG)
def doctor_command(
    lab: Annotated[
        str | None,
        typer.Option(
            "--lab",
            "-l",
            help=f"The lab to be ready for, {discovery.DEFAULT_LAB} by default; with --ssh, the one whose services are "
            "looked at, by default every lab's.",
            autocompletion=lab_names,
        ),
    ] = None,
    ssh: Annotated[
        str | None,
        typer.Option(
            "--ssh", metavar="HOST", help="Look at this machine, over SSH: alias, [USER@]HOST[:PORT], vagrant:NAME."
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Say what this machine has and lacks for running a lab, and what to do; or another one for being a lab.

    Nothing is changed. With --json it is a report to send along with a fault: it names lab, lsmlab, system and QEMU.

    Over SSH your own ~/.ssh/config, known_hosts and keys count, and nothing is asked; the agent is root on that
    machine, by sudo if need be, for as long as the look takes.

    Examples:

        lsmlab doctor --lab debian-12

        lsmlab doctor --ssh admin@web1.example.org --json -

        lsmlab doctor --ssh vagrant:default
    """
    see_json_target(json_file)
    if ssh is None:
        machine = discovery.load_lab(lab or discovery.DEFAULT_LAB)
        about = doctor.circumstances(machine)
        findings, ready = doctor.examine(machine), "lsmlab can run here"
    else:
        need_linux()
        labs = [discovery.load_lab(name) for name in ([lab] if lab else discovery.labs().ids)]
        about = doctor.circumstances(None)
        findings = _surveyed(ssh, {service.unit for one in labs for service in one.services.values()})
        ready = f"{ssh} lacks nothing that a lab needs"
    if json_file is not None:
        rows = [
            {"what": f.what, "ok": f.ok, "needed": f.needed, "found": f.found, "advice": f.advice} for f in findings
        ]
        write_json(json.dumps({"schema": 1, **about, "ssh": ssh, "findings": rows}, indent=1) + "\n", json_file)
    else:
        of = f"lab {about['lab']}" if ssh is None else f"{ssh} over SSH"
        console().print(trials.findings_table(findings, ready, f"{of}, lsmlab {about['lsmlab']}, {about['date']}"))
    raise typer.Exit(ERROR if any(f.needed and not f.ok for f in findings) else AS_EXPECTED)


def _surveyed(name: str, units: set[str]) -> list[doctor.Finding]:
    from lsmlab import survey  # noqa: PLC0415 - paramiko takes longer to load than most commands run
    from lsmlab.channel.ssh import open_ssh  # noqa: PLC0415 - same
    from lsmlab.container import kept  # noqa: PLC0415 - with it

    with contextlib.closing(open_ssh(name, kept.PARTS)) as channel:
        return survey.examine(channel, channel.login, units)


@app.command("undo")
def undo_command(
    host: Annotated[str, typer.Argument(metavar="HOST", help="As for `doctor --ssh`: alias, [USER@]HOST[:PORT], ...")],
    force: Annotated[
        bool, typer.Option("--force", help="Put back also what somebody else has changed since that run.")
    ] = False,
) -> None:
    """Put back what a run on a machine over SSH has changed and could not undo: it was killed, or the connection broke.

    A journal on that machine says what was. Nothing of it is left once all is verified to be as it was.

    Examples:

        lsmlab undo admin@web1.example.org

        lsmlab undo vagrant:default
    """
    need_linux()
    from lsmlab import ssh_lab  # noqa: PLC0415 - paramiko takes longer to load than most commands run

    done = ssh_lab.undo(host_of(host) or host, force=force)
    if done is None:
        say(f"{host}: nothing to undo: no journal is there")
        return
    for line in done:
        print(f"put back: {line}")
    say(f"{host}: all is as it was before the run, verified")
