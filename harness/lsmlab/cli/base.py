"""What the commands share: the program they belong to, their options, and how they print."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lsmlab import __version__, discovery, schema, selection
from lsmlab.definition import unknown_name
from lsmlab.errors import DefinitionError, LsmlabError
from lsmlab.lab import Lab
from lsmlab.progress import Progress, Silent
from lsmlab.report.progress import LiveProgress
from lsmlab.terminal import clean, clean_json
from lsmlab.terms import Arm, Framework

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
images_app = typer.Typer(
    help="Built images and saved guests: list, build, export, import, prune.", rich_markup_mode="markdown"
)
app.add_typer(images_app, name="images")
new_app = typer.Typer(help="Make something new to work on.", rich_markup_mode="markdown", no_args_is_help=True)
app.add_typer(new_app, name="new")


def lab_names(incomplete: str) -> list[str]:
    """Completion."""
    return _complete(incomplete, lambda: discovery.labs().ids)


def scenario_names(incomplete: str) -> list[str]:
    """Completion."""
    return _complete(incomplete, lambda: discovery.scenarios().ids)


def service_names(incomplete: str) -> list[str]:
    """Completion."""
    return _complete(incomplete, lambda: sorted(discovery.load_lab().services))


def values_of(kind: str) -> Callable[[str], list[str]]:
    """Completion for what scenarios have of one kind: tags, techniques, services and so on."""

    def names(incomplete: str) -> list[str]:
        return _complete(
            incomplete, lambda: selection.values(discovery.load_scenarios(discovery.scenarios().ids))[kind]
        )

    return names


def schema_kinds(incomplete: str) -> list[str]:
    """Completion."""
    return _complete(incomplete, lambda: list(schema.MODELS))


def _complete(incomplete: str, names: Callable[[], Sequence[str]]) -> list[str]:
    with contextlib.suppress(LsmlabError):
        return [n for n in names() if n.startswith(incomplete)]
    return []


ScenariosArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SCENARIO|PATH]...", help="Scenarios, by name, folder or file.", autocompletion=scenario_names
    ),
]
LabOption = Annotated[
    str, typer.Option("--lab", "-l", help="The kind of machine; see `lsmlab labs`.", autocompletion=lab_names)
]
AccelOption = Annotated[str, typer.Option("--accel", help="auto, kvm or tcg. auto: KVM where it proves itself.")]
GuestsOption = Annotated[
    int | None, typer.Option("--guests", min=1, max=64, help="How many guests at once; by default as many as fit.")
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", metavar="FILE|-", help="Write the results as JSON; - is standard output.")
]
ImageOption = Annotated[
    Path | None,
    typer.Option(
        "--image",
        metavar="FILE",
        help="The distribution's image of a cloud lab, where it is here already; verified.",
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on standard error.")]


@contextlib.contextmanager
def progress_shown(quiet: bool) -> Iterator[Progress]:
    """Progress on standard error while the block lasts."""
    if quiet:
        yield Silent()
        return
    with LiveProgress() as live:
        yield live


def console() -> Console:
    """What tables are printed with, on standard output."""
    return Console(highlight=False, soft_wrap=False)


def terminal_width() -> int | None:
    """How wide a table may be; None in a pipe, where each row stays one line."""
    return console().width if sys.stdout.isatty() else None


def see_json_target(target: Path | None) -> None:
    """See before the run that the file can be written: a run's results are not lost to a typing error."""
    if target is not None and str(target) != "-":
        need_no_option("--json", target, "FILE, or - for standard output")
        need_writable(target, f"--json {target}")


def need_no_option(option: str, value: Path, expected: str) -> None:
    """See that what comes behind `option` is not another option. Raises DefinitionError."""
    if str(value).startswith("-"):
        raise DefinitionError(
            f"{option} {value}: expected {expected}",
            hint="A name that begins with - is given with its whole path.",
        )


def need_writable(target: Path, what: str) -> None:
    """See that the file can be written. Raises DefinitionError that calls it `what`."""
    if not target.parent.is_dir() or target.is_dir() or not os.access(target.parent, os.W_OK):
        raise DefinitionError(f"{what}: cannot be written there", hint="Name a file in a folder that exists.")


def write_json(content: str, target: Path | None) -> None:
    """Write a document to a file, whole or not at all, or to standard output for `-`; nowhere for None."""
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


def image_of(lab: Lab, file: Path | None) -> Path | None:
    """`--image`: for a lab whose image is downloaded. Raises DefinitionError."""
    if file is not None and lab.cloud_image is None:
        raise DefinitionError(f"--image {file}: lab {lab.id} is built from packages, and takes no image")
    if file is not None and not file.is_file():
        raise DefinitionError(f"--image {file}: no such file")
    return file


def accelerator_of(value: str) -> str:
    """`--accel`. Raises DefinitionError, as the next ones do."""
    if value not in {"auto", "kvm", "tcg"}:
        raise DefinitionError(f"--accel {value}: expected auto, kvm or tcg")
    return value


def frameworks_of(names: Sequence[str] | None) -> list[Framework] | None:
    """`--framework`; None where none is given."""
    return [Framework(known("framework", n, [f.value for f in Framework])) for n in names] if names else None


def arm_of(name: str) -> Arm:
    """`--arm`."""
    return Arm(known("arm", name, [a.value for a in Arm]))


def known(what: str, name: str, names: list[str]) -> str:
    """`name`, which is one of `names`."""
    if name not in names:
        raise unknown_name(what, name, names)
    return name


def need_arm(arms: Sequence[Arm], wanted: Arm, whose: str) -> None:
    """See that the lab, or the outcome, has the arm."""
    if wanted not in arms:
        raise DefinitionError(f"{whose} has no arm {wanted}; it has: {', '.join(arms)}")


def say(words: str) -> None:
    """One line, or a few, for people."""
    print(f"lsmlab: {clean(words)}", file=sys.stderr)


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
