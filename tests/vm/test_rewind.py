"""`lsmlab rewind` as a person uses it: a prompt with the attack's command on it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import pexpect
import pytest
from command import REPO, environment, lsmlab

pytestmark = pytest.mark.lsmlab_vm

SCENARIOS = ("nginx-reads-shadow", "nginx-reads-shadow-wide-profile", "tests/vm/scenarios/run-as-service")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment whose store has these scenarios' outcomes."""
    env = environment(tmp_path_factory.mktemp("rewind"))
    lsmlab("run", *SCENARIOS, env=env, code=None)
    return env


def number_of(env: dict[str, str], scenario: str, framework: str, verdict: str) -> str:
    shown = lsmlab("show", env=env).stdout
    row = next(line for line in shown.splitlines() if f" {scenario} " in line and framework in line)
    assert verdict in row
    return row.split()[0]


@contextlib.contextmanager
def rewound(env: dict[str, str], *arguments: str) -> Iterator[pexpect.spawn[str]]:
    """The command in a terminal of its own, and ended with the block; it must have left with 0 by then."""
    child = pexpect.spawn(
        sys.executable, ["-m", "lsmlab.cli", "rewind", "--quiet", *arguments],
        cwd=str(REPO), env=env, encoding="utf-8", timeout=240, dimensions=(40, 200),
    )  # fmt: skip
    try:
        yield child
        child.send("exit\r")
        child.expect(pexpect.EOF)
    finally:
        child.close(force=True)
    assert child.exitstatus == 0


@pytest.mark.parametrize(
    ("scenario", "framework", "verdict", "arm", "answer"),
    [
        ("nginx-reads-shadow", "SELinux", "CONTAINED", "selinux-enforcing", "403 Forbidden"),
        ("nginx-reads-shadow", "AppArmor", "CONTAINED", "dac", "200 OK"),
        ("nginx-reads-shadow-wide-profile", "AppArmor", "NOT_CONTAINED", "apparmor-enforce", "200 OK"),
    ],
)
def test_enter_makes_the_attack(
    kept: dict[str, str], scenario: str, framework: str, verdict: str, arm: str, answer: str
) -> None:
    with rewound(kept, number_of(kept, scenario, framework, verdict), "--arm", arm) as child:
        child.expect_exact("Planted in /etc/shadow: lsmlab-")
        canary = child.read(16)
        child.expect_exact(f"{arm}\x1b[0m:~# ")
        child.expect_exact("curl --include --path-as-is --globoff http://")  # no line of 80 is broken before that
        child.send("\r")
        child.expect_exact(answer)
        if answer == "200 OK":
            child.expect_exact(canary)


def test_a_command_attempt_is_made_as_the_service(kept: dict[str, str]) -> None:
    number = number_of(kept, "run-as-service", "SELinux", "")
    arguments = ("--arm", "selinux-enforcing", "--scenario", SCENARIOS[2])
    with rewound(kept, number, *arguments) as child:
        child.expect_exact("# attack cat ")
        child.send("\x15attack cat /proc/self/attr/current\r")
        child.expect_exact("system_u:system_r:httpd_t:s0")


def test_a_command_instead_of_a_shell(kept: dict[str, str]) -> None:
    number = number_of(kept, "nginx-reads-shadow", "SELinux", "CONTAINED")
    done = lsmlab("rewind", number, "-q", "--", "getenforce", env=kept)
    assert done.stdout == "Enforcing\n"
    wrong = lsmlab("rewind", number, "-q", "--attempt", "read-shadw", "--", "true", env=kept, code=4)
    assert "unknown attempt" in wrong.stderr and "'read-shadow'" in wrong.stderr
