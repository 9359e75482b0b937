"""An image on a machine that could not have built it: no root, no sudo, no apt, of the host's programs only QEMU's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import environment, lsmlab

from lsmlab import host
from standin import served

pytestmark = [pytest.mark.lsmlab_vm, pytest.mark.slow]

REPO = Path(__file__).resolve().parents[2]
PROGRAMS = ("qemu-system-x86_64", "qemu-img", "setpriv", "sh")
UID = 61185

OPEN = """
set -eu
for closed in $CLOSED; do # a folder of root's own: others are shown what they need of it, and no more
    stash=$(mktemp -d)
    mount --rbind "$closed" "$stash"
    mount -t tmpfs -o mode=755 none "$closed"
    for shown in $SHOWN; do
        case $shown in "$closed"/*) ;; *) continue ;; esac
        mkdir -p "$shown"
        mount --rbind "$stash/${shown#"$closed"/}" "$shown"
    done
done
exec setpriv --reuid "$UID_WANTED" --regid "$UID_WANTED" --clear-groups --no-new-privs --bounding-set=-all -- "$@"
"""
"""Others may enter what is shown, in a mount namespace that ends with the program."""


@pytest.fixture
def home() -> Iterator[Path]:
    """A home of the ordinary user's, which others than its owner may not enter."""
    folder = Path(tempfile.mkdtemp(prefix="lsmlab-home-"))
    if os.geteuid() == 0:
        os.chown(folder, UID, UID)
    yield folder
    shutil.rmtree(folder)


def ordinary(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """lsmlab as a user without rights, who finds QEMU, setpriv and a shell and no other program."""
    programs = home / "programs"
    if not programs.exists():
        programs.mkdir()
        for name in PROGRAMS:
            (programs / name).symlink_to(host.need(name))
    argv = [sys.executable, "-m", "lsmlab.cli", *arguments]
    env = {"PATH": str(programs), "HOME": str(home), "LANG": "C.UTF-8"}
    if os.geteuid() == 0:
        shown = [Path(sys.base_prefix), Path(sys.prefix), REPO]
        closed = {above for path in shown for above in path.parents if not above.stat().st_mode & 0o001}
        outermost = [str(path) for path in closed if not closed & set(path.parents)]
        told = {"CLOSED": " ".join(outermost), "SHOWN": " ".join(map(str, shown)), "UID_WANTED": str(UID)}
        become = ["unshare", "--mount", "sh", "-c", OPEN, "open", "env", "-i", *(f"{k}={v}" for k, v in env.items())]
        return subprocess.run(
            [*become, *argv], cwd="/", env={**os.environ, **told}, capture_output=True, text=True, check=False
        )
    return subprocess.run(argv, cwd="/", env=env, capture_output=True, text=True, check=False)


def test_an_ordinary_user_without_tools_runs_the_flagship_from_an_exported_image(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "debian-13.image.tar.gz"
    digest, _, name = lsmlab("images", "export", "debian-13", str(file), env=environment(tmp_path)).stdout.partition(
        "  "
    )
    assert name == f"{file}\n"
    file = Path(shutil.move(file, home))
    file.chmod(0o644)

    cannot = ordinary(home, "images", "build", "debian-13")
    assert cannot.returncode == 3
    assert "mmdebstrap is not installed" in cannot.stderr
    assert "`lsmlab images import FILE` here" in cannot.stderr
    wrong = ordinary(home, "images", "import", str(file), "--sha256", "0" * 64)
    assert (wrong.returncode, digest in wrong.stderr) == (3, True), wrong.stderr

    with served(home) as address:
        imported = ordinary(home, "images", "import", f"{address}/{file.name}", "--sha256", digest)
    assert (imported.returncode, imported.stdout.split()[0]) == (0, "debian-13"), imported.stderr
    doctor = ordinary(home, "doctor")
    assert (doctor.returncode, "Ready: lsmlab can run here." in doctor.stdout) == (0, True), doctor.stdout
    run = ordinary(home, "run", "nginx-reads-shadow", "--json", "-")
    assert run.returncode == 0, run.stderr
    outcomes = json.loads(run.stdout)["outcomes"]
    assert [(o["framework"], o["verdict"]) for o in outcomes] == [
        (name, "CONTAINED") for name in ("selinux", "apparmor")
    ]
    owners = {path.stat().st_uid for path in (home / ".cache").rglob("*")}
    assert owners == {UID if os.geteuid() == 0 else os.geteuid()}
