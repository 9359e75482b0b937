"""pytest as a user runs it, over real guests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.lsmlab_vm

REPO = Path(__file__).resolve().parents[2]
USER_TEST = """
def test_shadow_is_for_its_group(host):
    assert host.file("/etc/shadow").mode == 0o640

def test_denials_are_recorded(host):
    assert host.service("auditd").is_running

def test_selinux_decides(host):
    assert host.check_output("getenforce") == "Enforcing"
"""


def run_pytest(folder: Path, *arguments: str) -> str:
    """What pytest prints. A run that does not pass fails with all of it."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--require=vm", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_a_scenario_is_a_test_for_each_framework() -> None:
    printed = run_pytest(REPO, "scenarios/nginx-reads-shadow", "--lab", "debian-13")
    assert "2 passed" in printed, printed


def test_a_users_own_tests_look_at_a_guest(tmp_path: Path) -> None:
    (tmp_path / "test_guest.py").write_text(USER_TEST)
    printed = run_pytest(tmp_path, "-v", "--lab", "debian-13", "--lsmlab-arm", "selinux-enforcing")
    assert "3 passed" in printed, printed
    assert "test_selinux_decides[lsmlab://selinux-enforcing@debian-13] PASSED" in printed, printed
