"""The real Vagrant, in folders of the test's own: no box is fetched, no hypervisor needed, nothing of the user's used.

In the place of VirtualBox is a program that knows one answer: the machine runs, and its port 22 is forwarded. libvirt's
plugin is Vagrant's own and asks no daemon as long as no machine was made.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parents[1]
PLUGINS = ("libvirt", "virtualbox")
"""The providers that the Vagrantfile speaks of."""
VBOXMANAGE = """#!/bin/sh
case "$*" in
  --version) echo 7.0.20r163906 ;;
  "showvminfo "*) cat {info} ;;
  *) echo "VBoxManage $*: not for these tests" >&2; exit 1 ;;
esac
"""
INFO = 'name="{name}"\nVMState="running"\nForwarding(0)="ssh,tcp,127.0.0.1,{port},,22"\n'


@dataclass(frozen=True, slots=True)
class Vagrant:
    """Vagrant as a user has it who keeps all of it in `folder`."""

    folder: Path

    @property
    def env(self) -> dict[str, str]:
        """What has any `vagrant` of this PATH work in our folders."""
        return {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "HOME": str(self.folder), "LANG": "C.UTF-8",
            "VAGRANT_HOME": str(self.folder / "home"), "VAGRANT_DOTFILE_PATH": str(self.folder / "machines"),
            "VAGRANT_CHECKPOINT_DISABLE": "1",
        }  # fmt: skip

    def run(
        self, *arguments: str, cwd: Path = REPO, more: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """`vagrant ARGUMENTS...` in `cwd`, to its end, whatever that is."""
        return subprocess.run(
            ["vagrant", *arguments], cwd=cwd, env={**self.env, **(more or {})}, capture_output=True, text=True,
            timeout=300, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def machines(self, *folders: Path) -> dict[Path, dict[str, Any]]:
        """What Vagrant makes of the Vagrantfile in each folder: `vagrant_machines.rb` has the keys."""
        own = {"VAGRANT_VAGRANTFILE": "vagrant_machines.rb"}
        done = self.run("machines", *map(str, folders), cwd=REPO / "tests", more=own)
        assert done.returncode == 0, done.stdout + done.stderr
        return {Path(folder): found for folder, found in json.loads(done.stdout).items()}

    def up(self, name: str, port: int, key: Path) -> None:
        """Have Vagrant believe that VirtualBox runs its machine `name`: sshd at 127.0.0.1:`port` takes `key`."""
        made = self.folder / "machines" / "machines" / name / "virtualbox"
        made.mkdir(parents=True, exist_ok=True)
        (made / "id").write_text(f"{port:08x}-0000-4000-8000-000000000000")
        (made / "creator_uid").write_text(str(os.getuid()))
        shutil.copy(key, made / "private_key")
        (self.folder / "info").write_text(INFO.format(name=name, port=port))


def real_vagrant(folder: Path, config: pytest.Config) -> Vagrant:
    """The installed Vagrant, with both providers. Without one the test is skipped; it fails under --require-vagrant."""
    made = Vagrant(folder)
    (folder / "bin").mkdir(parents=True)
    program = folder / "bin" / "VBoxManage"
    program.write_text(VBOXMANAGE.format(info=shlex.quote(str(folder / "info"))))
    program.chmod(0o755)
    missing = _missing(made)
    if missing:
        reason = f"{missing} (apt-get install vagrant-libvirt)"
        if config.getoption("require_vagrant"):
            pytest.fail(f"--require-vagrant: {reason}", pytrace=False)
        pytest.skip(reason)
    return made


def _missing(vagrant: Vagrant) -> str:
    """What is missing of Vagrant, in words; an empty text where it is there."""
    if shutil.which("vagrant") is None:
        return "vagrant not found"
    listed = vagrant.run("plugin", "list", "--machine-readable").stdout
    return "" if "vagrant-libvirt" in listed else "vagrant has no plugin vagrant-libvirt"
