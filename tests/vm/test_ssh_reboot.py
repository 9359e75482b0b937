"""A machine that reboots while it is the lab: no verdict, a plain word on what it may still be, all undone later.

It shuts down by its own `systemctl reboot`, or is reset without a word to its kernel; QEMU ends then, and the same disk
is booted once more. What was and what is, is compared as in test_ssh_lab.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import gone_within, lsmlab, outcomes, start
from ssh_relay import reached, relayed
from test_ssh_lab import DECOY, FLAGSHIP, PLAIN, differing, environment, look, nowhere, wait_for

from lsmlab.bench import Bench
from lsmlab.errors import LsmlabError
from lsmlab.machine import states
from lsmlab.machine.hardware import Boot
from lsmlab.machine.qemu import QemuMachine
from lsmlab.terms import Framework, Kernel

pytestmark = [pytest.mark.lsmlab_vm, pytest.mark.ssh, pytest.mark.slow, pytest.mark.timeout(1500)]

ATTACK = ["curl", "--silent", "--path-as-is", "http://127.0.0.1/static../etc/shadow"]


@contextlib.contextmanager
def booted(bench: Bench, kernel: Kernel, folder: Path, disk: Path | None = None) -> Iterator[QemuMachine]:
    """A machine that was switched on, on `disk`, which an earlier one has left in `folder`; None: on a new one."""
    image = bench.image
    machine = QemuMachine.start(
        "reboots", bench.hardware, disk or image.disk, below=image.disk if disk else None,
        boot=Boot(image.kernel, image.initrd, bench.command_line(kernel)), scratch=folder,
        keep_overlay=None if disk else folder / "disk.qcow2", timeout=states.BOOT_SECONDS["tcg"],
    )  # fmt: skip
    try:
        states.settle(machine.channel, kernel)
        yield machine
    finally:
        machine.stop()


def reboot(machine: QemuMachine, *, sudden: bool) -> None:
    with contextlib.suppress(LsmlabError):  # QEMU may end before its answer
        if sudden:
            machine.monitor("system_reset")
        else:
            machine.channel.run(["systemctl", "reboot"])
    gone_within({machine.pid}, 200)


def see_what_is_said(process: subprocess.Popen[str], host: str, found: Path) -> str:
    said = process.communicate(timeout=200)[1]
    assert process.returncode == 3, said
    assert f"{host} may still be changed, after a reboot too, since not all was undone" in said
    assert f"`lsmlab undo {host}` puts back what was" in said
    (outcome,) = outcomes(found.read_text()).values()
    assert (outcome["verdict"], outcome["as_expected"]) == ("ERROR", False)
    assert outcome["environment"]["isolation"].startswith("by undo, NOT verified")
    control, enforcing = outcome["arms"]
    assert next((a["attempt"], a["result"]) for a in control["attempts"]) == ("read-shadow", "allowed")
    unseen = [a for arm in (control, enforcing) for a in arm["attempts"] if a["result"] == "failed"]
    assert unseen or enforcing["error"]
    return said


@pytest.mark.parametrize(("framework", "sudden"), [(Framework.APPARMOR, False), (Framework.SELINUX, True)])
def test_a_reboot_in_a_run_is_an_error_and_undone_later(
    bench: Bench, framework: Framework, sudden: bool, tmp_path: Path
) -> None:
    home, disks = tmp_path / "home", tmp_path / "disks"
    for folder in (home, disks):
        folder.mkdir()
    kernel, env, found = Kernel(framework.value), environment(home), home / "out.json"
    with booted(bench, kernel, disks) as machine, reached(machine, home) as port:
        machine.channel.run(["sh", "-c", PLAIN], timeout=120).check()
        before = look(machine.channel)
        host = f"vagrant@127.0.0.1:{port}"
        asked = ("run", FLAGSHIP, "--lab", f"ssh:{host}", "--allow-changes")
        process = start(*asked, "--json", str(found), env=env)
        said = wait_for(process, ": benign front-page")
        reboot(machine, sudden=sudden)
        said += see_what_is_said(process, host, found)
    with booted(bench, kernel, disks, disks / "disk.qcow2") as machine, relayed(machine, port):
        changed = differing(before, look(machine.channel))
        assert "/var/lib/lsmlab" in changed
        if not sudden:  # else what was written in the last seconds may be lost
            assert {"/etc/group", "/srv/www/logo.svg"} <= changed.keys()
            assert DECOY in machine.channel.run(ATTACK).out, "SECURITY.md: the service came up as the scenario made it"
        refused = lsmlab(*asked, env=env, code=3).stderr
        assert "the journal of another run is there" in refused and f"lsmlab undo {host}" in refused
        done = lsmlab("undo", host, env=env)
        assert "put back: " in done.stdout
        assert differing(before, look(machine.channel)) == {}
        assert DECOY not in machine.channel.run(ATTACK).out
        assert "nothing to undo" in lsmlab("undo", host, env=env).stderr
    nowhere(home, said, refused, done.stdout, done.stderr)
