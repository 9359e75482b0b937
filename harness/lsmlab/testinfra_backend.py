"""A testinfra backend over our channel: `lsmlab://selinux-enforcing@debian-13` is that lab's guest in that arm.

The arm stands where others have a user, and must be there: testinfra drops whatever it does not know from a query
(testinfra.backend.parse_hostspec), so that `?arm=selinux-enforcing` would silently test another arm.
"""
# ruff: noqa: PLC0415 - what a guest needs is imported with the first guest: most pytest runs have none

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import testinfra.backend
from testinfra.backend import base

from lsmlab.errors import DefinitionError
from lsmlab.terms import CONTROL, Arm

if TYPE_CHECKING:
    from lsmlab.bench import Bench
    from lsmlab.channel.base import Channel

SCHEME = "lsmlab"
COMMAND_SECONDS = 300.0
"""How long a command may take, unless its caller says `host.run(..., timeout=seconds)`."""

_bench_of: Callable[[str], Bench] | None = None
_running: dict[str, Channel] = {}
_resources = contextlib.ExitStack()


def register(bench_of: Callable[[str], Bench]) -> None:
    """Make testinfra know `lsmlab://`; `bench_of` gives the bench of a lab's name."""
    global _bench_of  # noqa: PLW0603 - testinfra makes the backends, and hands them nothing of ours
    _bench_of = bench_of
    testinfra.backend.BACKENDS[SCHEME] = f"{__name__}.{LsmlabBackend.__name__}"


def close_all() -> None:
    """Stop every guest. A later use starts a new one."""
    _running.clear()
    _resources.close()


def host_spec(lab: str, arm: Arm) -> str:
    """What testinfra calls a guest: `lsmlab://ARM@LAB`."""
    return f"{SCHEME}://{arm}@{lab}"


def parse_host(name: str) -> tuple[str, Arm]:
    """Lab and arm of `ARM@LAB`. Raises DefinitionError."""
    arm, _, lab = name.rpartition("@")
    if not lab or arm not in list(Arm):
        raise DefinitionError(
            f"{SCHEME}://{name}: expected {SCHEME}://ARM@LAB, such as {host_spec('debian-13', CONTROL)}; "
            + (f"{arm!r} is no arm" if arm else "no arm is given"),
            hint=f"Arms: {', '.join(Arm)}.",
        )
    return lab, Arm(arm)


def channel_of(name: str) -> Channel:
    """The way into the guest `ARM@LAB`: started and brought into the arm on first use, then the same one.

    Raises DefinitionError, MachineError, FrameworkError and ChannelError.
    """
    if name not in _running:
        from lsmlab import definition, prepare
        from lsmlab.framework import FRAMEWORKS
        from lsmlab.framework.base import PolicyUnderTest

        lab, arm = parse_host(name)
        if _bench_of is None:
            raise DefinitionError(f"{SCHEME}://{name}: there is no lab outside of a pytest run")
        bench = _bench_of(lab)
        if arm not in bench.lab.arms:
            raise definition.unknown_name(f"arm of lab {lab}", arm, list(bench.lab.arms))
        with contextlib.ExitStack() as starting:
            machine = starting.enter_context(bench.guest(arm.kernel, f"host {arm}", kept_open=True))
            prepare.mark(machine.channel, arm)
            FRAMEWORKS[arm.framework].enter(machine.channel, arm, None, PolicyUnderTest())
            _resources.push(starting.pop_all())
        _running[name] = machine.channel
    return _running[name]


class LsmlabBackend(base.BaseBackend):  # type: ignore[misc]  # testinfra carries no types
    """Runs testinfra's commands as root in a guest. Holds no guest: testinfra keeps backends for ever."""

    NAME = SCHEME

    @classmethod
    def get_hosts(cls, host: str, **_: Any) -> list[str]:
        """The one host of a host spec. Raises DefinitionError; starts nothing."""
        parse_host(host)
        return [host]

    def get_encoding(self) -> str:
        """UTF-8, as the guests write it."""
        return "utf-8"

    def run(self, command: str, *args: str, **kwargs: Any) -> base.CommandResult:
        """See `testinfra.host.Host.run`; takes `timeout=` in seconds. A signal gives 128 and its number, as in a shell.

        Raises what `channel_of` and `Channel.run` raise; a command that fails is a result.
        """
        line = self.get_command(command, *args)
        timeout = float(kwargs.get("timeout", COMMAND_SECONDS))
        done = channel_of(self.hostname).run(["/bin/sh", "-c", line], timeout=timeout)
        status = done.exit_code if done.exit_code is not None else 128 + (done.signal or 0)
        return self.result(status, self.encode(line), done.stdout, done.stderr)
