"""Looking around in a guest: `shell`, `rewind`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from lsmlab import discovery, shell
from lsmlab.bench import open_bench
from lsmlab.channel.base import CommandResult
from lsmlab.cli.base import (
    AccelOption,
    QuietOption,
    accelerator_of,
    app,
    arm_of,
    lab_names,
    need_arm,
    progress_shown,
    scenario_names,
)
from lsmlab.errors import DefinitionError
from lsmlab.host import need_linux
from lsmlab.store import Store
from lsmlab.terms import ENFORCING_ARM, Arm


@app.command("shell")
def shell_command(
    lab: Annotated[str, typer.Argument(metavar="LAB", autocompletion=lab_names)] = discovery.DEFAULT_LAB,
    command: Annotated[list[str] | None, typer.Argument(metavar="[-- COMMAND...]", help="Run this instead.")] = None,
    arm: Annotated[str, typer.Option("--arm", "-a", help="The arm to be in.")] = Arm.DAC.value,
    scenario: Annotated[
        str | None,
        typer.Option("--scenario", "-s", help="Set the guest up for this scenario.", autocompletion=scenario_names),
    ] = None,
    accel: AccelOption = "auto",
    quiet: QuietOption = False,
) -> None:
    """Open a root shell in a fresh guest of one arm; it is thrown away afterwards.

    Examples:

        lsmlab shell debian-13 --arm selinux-enforcing

        lsmlab shell debian-13 --arm apparmor-enforce --scenario nginx-reads-shadow

        lsmlab shell debian-12 --arm selinux-permissive -- id -Z
    """
    need_linux()
    accelerator_of(accel)
    machine, where = discovery.load_lab(lab), arm_of(arm)
    need_arm(machine.arms, where, f"lab {lab}")
    setup = discovery.load_scenarios([scenario])[0] if scenario else None
    if setup is not None:
        machine = machine.with_packages(setup.packages)
    if not command:
        shell.need_terminal()
    with progress_shown(quiet) as progress, open_bench(machine, progress, accelerator=accelerator_of(accel)) as bench:
        if not command:
            shell.open_on_arm(bench, where, setup)
            return
        result = shell.run_on_arm(bench, where, command, setup)
    _pass_on(result)


def _pass_on(result: CommandResult | None) -> None:
    """End as a guest's command did, with its output; None: there was a shell instead."""
    if result is None:
        return
    sys.stdout.buffer.write(result.stdout)
    sys.stdout.flush()
    sys.stderr.buffer.write(result.stderr)
    raise typer.Exit(result.exit_code if result.exit_code is not None else 128 + (result.signal or 0))


@app.command("rewind")
def rewind_command(
    outcome: Annotated[str, typer.Argument(metavar="OUTCOME", help="Its number or id; `lsmlab show` lists them.")],
    command: Annotated[list[str] | None, typer.Argument(metavar="[-- COMMAND...]", help="Run this instead.")] = None,
    arm: Annotated[
        str | None, typer.Option("--arm", "-a", help="The arm to be in; by default the enforcing one.")
    ] = None,
    attempt: Annotated[
        str | None, typer.Option("--attempt", help="The attempt to stand before; by default the first attack.")
    ] = None,
    scenario: Annotated[
        str | None, typer.Option("--scenario", "-s", help="Where the scenario lies, if it is not below ./scenarios.")
    ] = None,
    accel: AccelOption = "auto",
    quiet: QuietOption = False,
) -> None:
    """Open a root shell in the state just before an outcome's attack, with the attack's command at the prompt.

    Press Enter to make the attack, or look around first. The guest is thrown away afterwards.

    Examples:

        lsmlab rewind 12

        lsmlab rewind 12 --arm dac

        lsmlab rewind 12 --arm selinux-enforcing -- ls -Z /etc/shadow
    """
    need_linux()
    accelerator_of(accel)
    number, kept = Store().get(outcome)
    where = arm_of(arm) if arm else ENFORCING_ARM[kept.framework]
    if kept.environment.machine:
        raise DefinitionError(f"outcome {number} is of {kept.lab}, a machine that stays: nothing of it can be rewound")
    need_arm([record.arm for record in kept.arms], where, f"outcome {number}")
    found = discovery.load_scenarios([scenario or kept.scenario])[0]
    spec = shell.attempt_of(found, attempt) if attempt else found.attacks[0]
    if not command:
        shell.need_terminal()
    machine = discovery.load_lab(kept.lab).with_packages(found.packages)
    with progress_shown(quiet) as progress, open_bench(machine, progress, accelerator=accelerator_of(accel)) as bench:
        if found.digest() != kept.scenario_digest:
            progress.note(f"The scenario {found.id} has changed since outcome {number}: this is how it is now.")
        record = kept.arm(where)
        started_in = record.started_in if record is not None else None
        result = shell.open_before_attempt(bench, found, where, spec, command or (), started_in=started_in)
    _pass_on(result)
