"""The architecture, enforced: imports go one way, and only the command line prints or exits."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from lsmlab.guest import agent, canaries, engine, undo
from lsmlab.machine.ssh import PARTS as PARTS_OVER_SSH

HARNESS = Path(__file__).resolve().parents[2] / "harness"
PACKAGE = "lsmlab"

LAYERS: tuple[frozenset[str], ...] = tuple(
    frozenset(row.split())
    for row in (
        # the words, and what stands on nothing
        "lsmlab terms terminal progress portal",
        "errors",
        # what runs in a guest: it imports nothing else of ours, and here it is a text
        "guest.agent",
        "guest.files",
        "guest.kernel guest.engine",
        "guest.undo",
        "guest.canaries",
        # files, folders and programs of the host
        "definition paths host",
        "cache",
        "download",
        # what people write
        "lab",
        "container container.spec container.context",
        "scenario",
        "discovery",
        "schema selection skeleton",
        # what was read on a guest
        "facts",
        "evidence dac",
        # guests
        "channel channel.base",
        "channel.agent channel.ssh_host",
        "channel.ssh_login",
        "channel.ssh",
        "container.install container.transport",
        "container.kept",
        "container.engine",
        "container.delivery",
        # their disks, of which some are made in a guest
        "machine machine.base machine.hardware",
        "machine.qemu",
        "machine.accel",
        "image image.policy image.probe image.qcow2 image.seed image.signed image.step",
        "image.debian image.cloud image.profile",
        "image.container",
        "image.build",
        "image.archive",
        "machine.states",
        "admission",
        "machine.ssh",
        "framework.base",
        "framework.dac framework.selinux framework.apparmor",
        "framework",
        # one attempt, and what it proves
        "attempt",
        "verdict",
        "outcome",
        "proofs store",
        # what joins them
        "inventory",
        "bench",
        "prepare",
        "run trial shell",
        "ssh_lab",
        "falsify",
        "catalogue",
        "check.findings",
        "check.definitions check.policies",
        "check",
        "doctor",
        "survey",
        # what people read
        "report report.tables",
        "report.progress report.text",
        "report.trials report.checks report.pages",
        "report.comparison",
        # the front doors
        "testinfra_backend",
        "pytest_plugin cli.base",
        "cli.experiment cli.guests cli.library cli.machine",
        "cli",
        "cli.__main__",
    )
)
"""A module imports from rows above its own only. A new module gets a place; an import that does not fit gets another
home."""

PLACE = {module: number for number, row in enumerate(LAYERS) for module in row}

ENDS = frozenset({"exit", "quit", "sys.exit", "os._exit", "os.abort", "SystemExit", "typer.Exit", "typer.Abort"})
PRINTS = frozenset({"print", "rich.print", "typer.echo", "typer.secho", "os.system"})
STREAMS = ("sys.stdout.", "sys.stderr.", "sys.__stdout__.", "sys.__stderr__.")
EXCEPTIONS = {
    # The terminal is the guest's then: what is said around that has to be said in between
    ("shell", "sys.stderr.write"),
}


def sources(root: Path) -> dict[str, Path]:
    """Every module below `root`/lsmlab by its name without the package's; the package itself is `lsmlab`."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root / PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name or PACKAGE] = path
    return found


def imports(path: Path, known: Mapping[str, Path]) -> Iterator[tuple[int, str]]:
    """Line and name of each module of ours that `path` imports: at the top, in functions, for types."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import: its layer cannot be seen"
            module = node.module or ""
            names = [full if _short(full := f"{module}.{a.name}") in known else module for a in node.names]
        else:
            continue
        yield from ((node.lineno, _short(name)) for name in names if name.partition(".")[0] == PACKAGE)


def _short(name: str) -> str:
    return name.removeprefix(f"{PACKAGE}.")


def backwards(root: Path, place: Mapping[str, int]) -> list[str]:
    """Every import that does not go to a row above: file, line, module and what it imports."""
    known = sources(root)
    return [
        f"{path.relative_to(root)}:{line}: {module} imports {target}, which does not stand above it"
        for module, path in known.items()
        for line, target in imports(path, known)
        if target != module and not place[target] < place[module]
    ]


def test_every_module_has_one_place() -> None:
    assert sum(len(row) for row in LAYERS) == len(PLACE), "a module stands in two rows"
    found = set(sources(HARNESS))
    assert not found - set(PLACE), "modules without a place in LAYERS"
    assert not set(PLACE) - found, "places in LAYERS of modules that are not there"


def test_imports_go_one_way() -> None:
    wrong = backwards(HARNESS, PLACE)
    assert not wrong, "\n".join(wrong)


def test_the_engine_has_imports_to_check() -> None:
    known = sources(HARNESS)
    assert len(list(imports(known["run"], known))) > 10
    assert "run" in {name for _, name in imports(known["pytest_plugin"], known)}, "imports in functions are seen"


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("import lsmlab.high\n", True),
        ("from lsmlab import high\n", True),
        ("from lsmlab.high import thing\n", True),
        ("def f():\n    from lsmlab.high import thing\n", True),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lsmlab import high\n", True),
        ("from lsmlab import same\n", True),
        ("import lsmlab\nfrom lsmlab import __version__\nimport high\n", False),
    ],
)
def test_an_import_that_goes_back_is_told(tmp_path: Path, text: str, wrong: bool) -> None:
    folder = tmp_path / PACKAGE
    folder.mkdir()
    for name in ("__init__", "same", "high"):
        (folder / f"{name}.py").write_text("")
    (folder / "low.py").write_text(text)
    found = backwards(tmp_path, {"lsmlab": 0, "low": 1, "same": 1, "high": 2})
    assert len(found) == wrong, found
    assert all(line.startswith("lsmlab/low.py:") and "low imports " in line for line in found)


# The agent in the guest


GUEST = HARNESS / PACKAGE / "guest"
PARTS = ("agent", *PARTS_OVER_SSH)


@pytest.mark.parametrize("part", PARTS)
def test_what_runs_in_a_guest_needs_nothing_but_pythons_own_library(part: str) -> None:
    needed = set()
    for node in ast.walk(ast.parse((GUEST / f"{part}.py").read_text("utf-8"), feature_version=(3, 9))):
        if isinstance(node, ast.Import):
            needed |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            before = [f"lsmlab.guest.{name}" for name in PARTS[: PARTS.index(part)]]
            if node.module == "lsmlab.guest":  # the loader has made these already: see channel/ssh.py
                assert {f"lsmlab.guest.{alias.name}" for alias in node.names} <= set(before)
            elif node.module not in before:
                needed.add((node.module or "").partition(".")[0])
    assert {"os", "typing"} & needed, "nothing was looked at"
    assert not needed - sys.stdlib_module_names


def test_what_runs_in_a_guest_is_a_text_to_the_harness() -> None:
    assert {path.stem for path in GUEST.glob("*.py")} == set(PARTS)
    known = sources(HARNESS)
    assert not [
        (module, name)
        for module, path in known.items()
        for _, name in imports(path, known)
        if name.startswith("guest.") and not module.startswith("guest.")
    ]


def questions(path: Path) -> Iterator[tuple[int, str, set[str]]]:
    """Line, operation and names of the arguments of each question to the agent; those of a ** are not seen."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        match node:
            case ast.Call(func=ast.Attribute(attr="ask"), args=[ast.Constant(value=str(operation))], keywords=keywords):
                yield node.lineno, operation, {k.arg for k in keywords if k.arg is not None}


def test_what_the_agent_is_asked_it_knows() -> None:
    known = undo.OPERATIONS | engine.OPERATIONS | canaries.OPERATIONS | agent.OPERATIONS
    asked = set()
    for path in [*sources(HARNESS).values(), *sorted((HARNESS.parent / "scripts").glob("*.py"))]:
        for line, operation, names in questions(path):
            where = f"{path}:{line}: {operation}"
            assert operation in known, where
            taken = inspect.signature(known[operation]).parameters
            assert names - {"within"} <= set(taken), where
            asked.add(operation)
    assert asked == set(known), "operations that nobody asks for"


def speech(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of whatever prints to the process's own output, or ends the process."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            writes = name.startswith(STREAMS) and name.rpartition(".")[2] in {"write", "writelines"}
            if name in ENDS | PRINTS or writes:
                yield node.lineno, name
        elif isinstance(node, ast.Raise) and node.exc is not None and ast.unparse(node.exc) in ENDS:
            yield node.lineno, ast.unparse(node.exc)


def test_only_the_command_line_prints_or_exits() -> None:
    found = {
        (module, name): f"{path.relative_to(HARNESS)}:{line}: {name}"
        for module, path in sources(HARNESS).items()
        for line, name in speech(ast.parse(path.read_text("utf-8")))
    }
    looked_for = {("cli.machine", "print"), ("cli", "sys.exit"), ("cli.base", "typer.Exit")}
    assert looked_for <= set(found), "nothing was looked at"
    others = {(module, name): where for (module, name), where in found.items() if module.partition(".")[0] != "cli"}
    wrong = [where for place, where in others.items() if place not in EXCEPTIONS]
    assert not wrong, "\n".join(wrong)
    assert set(found) >= EXCEPTIONS, "an exception that is needed no more"


def test_no_command_waits_for_libraries_that_few_need() -> None:
    """They take as long to load as all the rest."""
    slow = ("cryptography", "docker", "paramiko", "pycdlib", "requests")
    look = f"import sys, lsmlab.cli; print([name for name in {slow} if name in sys.modules])"
    said = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True).stdout
    assert said == "[]\n"
