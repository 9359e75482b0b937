"""On a system that is no Linux: one clear answer of each command and of pytest; what reads files alone works on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from lsmlab import __version__, discovery, doctor
from lsmlab.cli.base import app

REPO = Path(__file__).resolve().parents[2]
FLAGSHIP = "nginx-reads-shadow"
ANYWHERE = {
    "--version": 0,
    "--help": 0,
    "run --help": 0,
    "images build --help": 0,
    "doctor": 3,
    "labs": 0,
    "scenarios": 0,
    "show": 0,
    "new scenario mine": 0,
    f"check {FLAGSHIP}": 3,
    "schema lab": 0,
    "catalogue --out .": 0,
}
"""What works on every system, with its exit code; policies that no image is there for are not compiled anywhere."""
REFUSED = (
    f"run {FLAGSHIP}", f"run {FLAGSHIP} --lab ssh:web1", "try --as nginx -- id", "shell debian-13", "rewind 1",
    "images", "images list", "images build fedora-44", "images export debian-13", "images import x.tar.gz",
    "images prune", "undo web1", "doctor --ssh web1",
)  # fmt: skip
SYSTEMS = {"Darwin": "macOS", "Windows": "Windows"}

AWAY = {
    "Darwin": ["os.sched_getaffinity", "os.memfd_create"],
    "Windows": [
        "os.sched_getaffinity", "os.memfd_create", "os.geteuid", "os.getuid", "os.killpg", "signal.SIGHUP",
        "signal.SIGKILL", "signal.SIGWINCH",
    ],
}  # fmt: skip
"""What Python lacks there."""
DRIVER = """
import contextlib, io, json, os, platform, shlex, signal, sys
import asyncio, rich.console, typer, paramiko, platformdirs, sqlite3, subprocess  # they know the systems themselves
system, away, calls = json.loads(sys.argv[1])
platform.system, platform.machine = lambda: system, lambda: "arm64"
for name in away:
    module, _, attribute = name.partition(".")
    delattr(sys.modules[module], attribute)
if system == "Windows":
    for name in ("fcntl", "termios", "tty", "pwd", "grp", "resource"):
        sys.modules[name] = None  # an import of it fails
from lsmlab.cli import main
found = {}
for call in calls:
    sys.argv = ["lsmlab", *shlex.split(call)]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            found[call] = [end.code, out.getvalue(), err.getvalue()]
print(json.dumps(found))
"""

Said = dict[str, tuple[int, str, str]]


@pytest.fixture(scope="module", params=list(SYSTEMS))
def there(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Said]:
    """What the system is called, and what each command says there."""
    folder = tmp_path_factory.mktemp("there")
    asked = json.dumps([request.param, AWAY[request.param], [*ANYWHERE, *REFUSED]])
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, asked], cwd=folder, capture_output=True, text=True, check=False, timeout=120,
        env={"HOME": str(folder), "PATH": "/usr/bin:/bin", "COLUMNS": "100", "PYTHONPATH": str(REPO / "harness")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return SYSTEMS[request.param], {call: tuple(said) for call, said in json.loads(done.stdout).items()}


def test_what_needs_linux_says_so_and_what_to_do(there: tuple[str, Said]) -> None:
    name, said = there
    for call in REFUSED:
        code, out, err = said[call]
        assert (code, out) == (3, ""), (call, err)
        assert err.startswith(f"lsmlab: lsmlab runs on Linux; this is {name}\n"), (call, err)
        assert "a Linux virtual machine" in err and "README, Hosts" in err
        assert ("WSL 2" in err) == (name == "Windows")


def test_what_reads_and_writes_files_works_everywhere(there: tuple[str, Said]) -> None:
    name, said = there
    for call, wanted in ANYWHERE.items():
        code, out, err = said[call]
        assert (code, "Traceback" in err) == (wanted, False), (call, err)
        assert out or call == "show", call
    assert said["--version"][1] == f"lsmlab {__version__}\n"
    assert "Usage: " in said["run --help"][1]
    assert f"lsmlab runs on Linux; this is {name}" in said["doctor"][1]
    assert "Not ready: system." in said["doctor"][1]
    assert said["labs"][1].count("lacks Linux") == len(discovery.labs().ids)


def commands(group: Any, path: str = "") -> Iterator[str]:
    """Every command, `images` itself too."""
    for name, command in group.commands.items():
        if not hasattr(command, "commands") or command.invoke_without_command:
            yield f"{path}{name}"
        if hasattr(command, "commands"):
            yield from commands(command, f"{path}{name} ")


def test_each_command_is_tried() -> None:
    known = list(commands(typer.main.get_command(app)))
    assert len(known) > 15
    tried = [*ANYWHERE, *REFUSED]
    assert [name for name in known if not any(f"{call} ".startswith(f"{name} ") for call in tried)] == []


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """This machine as a Mac."""
    monkeypatch.setenv("LSMLAB_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.delattr("os.sched_getaffinity")


@pytest.mark.usefixtures("mac")
def test_doctor_looks_no_further_there() -> None:
    lab = discovery.load_lab()
    (found,) = doctor.examine(lab)
    assert (found.what, found.ok, found.needed) == ("system", False, True)
    assert found.advice.startswith("Run it in a Linux virtual machine on this Mac")
    assert doctor.needs(lab) == {"Linux": False}


# pytest


VM_TEST = """
import pytest
@pytest.mark.lsmlab_vm
def test_vm(): pass
def test_plain(): pass
"""
pytest_plugins = ["pytester"]


@pytest.mark.usefixtures("mac")
@pytest.mark.parametrize(("arguments", "outcomes"), [([], {"skipped": 1}), (["--require=vm"], {"errors": 1})])
def test_pytest_says_it_as_well(pytester: pytest.Pytester, arguments: list[str], outcomes: dict[str, int]) -> None:
    pytester.makepyfile(VM_TEST)
    quick = ("-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-ra", "-k", "vm or plain", *arguments)
    result = pytester.runpytest_inprocess(*quick)
    result.assert_outcomes(passed=1, **outcomes)
    result.stdout.fnmatch_lines(["*no guest can boot on this machine: lsmlab runs on Linux; this is macOS. Run it in*"])
    result.stdout.no_fnmatch_line("*apt-get*")


@pytest.mark.usefixtures("mac")
def test_testinfras_host_is_refused_there(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_it(host): assert host.run('true')")
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-p", "no:hypothesispytest", "--lab", "debian-13")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*lsmlab runs on Linux; this is macOS*"])
    result.stdout.no_fnmatch_line("*AttributeError*")
