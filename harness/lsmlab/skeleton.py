"""A new scenario from the package's template: a folder that runs as it is, with a comment for each key."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator, Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from lsmlab import discovery, scenario
from lsmlab.errors import DefinitionError, HostError
from lsmlab.lab import Identifier

TEMPLATE = "scenario"
_VARIABLE = re.compile(r"@([a-z_]+)@")
"""`@name@`; AppArmor's own `@{PROC}` is none."""


def render(text: str, values: Mapping[str, str], source: str) -> str:
    """`text` with every `@variable@` replaced. Raises DefinitionError, with file and line, for an unknown one."""
    for number, line in enumerate(text.splitlines(), 1):
        for found in _VARIABLE.finditer(line):
            if found[1] not in values:
                raise DefinitionError(
                    f"{source}:{number}: {found[0]}: unknown template variable",
                    hint=f"Known: {', '.join(f'@{name}@' for name in sorted(values))}.",
                )
    return _VARIABLE.sub(lambda found: values[found[1]], text)


def templates(root: Traversable, values: Mapping[str, str]) -> dict[str, str]:
    """Every file of the template folder `root`, rendered, by its name. Raises DefinitionError where there is none."""
    files = sorted((f for f in root.iterdir() if f.is_file()), key=lambda f: f.name) if root.is_dir() else []
    if not files:
        raise DefinitionError(f"{root}: no template is there", hint="Install lsmlab anew: its package lacks files.")
    return {f.name: render(f.read_text("utf-8"), values, str(f)) for f in files}


def create(name: str, at: Path | None = None, root: Traversable | None = None) -> Path:
    """Make the folder `name` with a working scenario, below `at` (./scenarios by default); the folder.

    Nothing is overwritten. Raises DefinitionError for a name that is no id, or that a scenario has already; HostError
    where the folder cannot be made.
    """
    _need_free_id(name)
    parent = at if at is not None else Path("scenarios")
    files = templates(root or resources.files("lsmlab") / "templates" / TEMPLATE, {"name": name})
    folder = parent / name
    with _made(folder):
        for file, text in files.items():
            (folder / file).write_text(text, "utf-8")
    return folder


def _need_free_id(name: str) -> None:
    try:
        TypeAdapter(Identifier).validate_python(name)
    except ValidationError as error:
        near = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._")[:64]
        hint = f"Call it {near!r}?" if near else "Such as nginx-reads-a-key."
        raise DefinitionError(
            f"{name!r} is no id: expected 1 to 64 small letters, digits, '.', '_' and '-', a letter or digit first",
            hint=hint,
        ) from error
    there = discovery.scenarios().get(name)
    if there is not None:
        raise DefinitionError(
            f"a scenario is called {name!r} already: {there}",
            hint=f"Take another name. A variant of it says `extends: {name}`; see docs/scenarios.md.",
        )


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make `folder`, which must not be there; where what follows fails, nothing is left of it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
    except FileExistsError as error:
        what = folder if folder.parent.is_dir() else folder.parent
        raise DefinitionError(
            f"{what}: is there already; nothing was changed", hint="Take another name, or another folder with --at."
        ) from error
    except OSError as error:
        raise _cannot(folder, error) from error
    try:
        yield
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise _cannot(folder, error) from error


def _cannot(folder: Path, error: OSError) -> HostError:
    return HostError(
        f"{folder}: cannot be made: {error.strerror or error}", hint="Name a folder that can be written with --at."
    )


def next_steps(folder: Path, name: str) -> tuple[str, str]:
    """The commands that check and run the scenario, from where we are."""
    found = discovery.scenarios().get(name)
    at_hand = found is not None and found.resolve() == (folder / scenario.FILE_NAME).resolve()
    whom = name if at_hand else str(folder)
    return f"lsmlab check {whom}", f"lsmlab run {whom}"
