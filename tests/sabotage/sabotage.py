"""How an experiment is sabotaged: one arm of it, at one moment, by a change that is then proved to have taken effect.

Nothing of the harness is replaced. Between it and the guest stands a channel that runs the sabotage's own commands at
the moments that a `Sabotage` names; all else goes through untouched.
"""

from __future__ import annotations

import base64
import contextlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, cast

from lsmlab import discovery, run
from lsmlab.bench import Bench
from lsmlab.channel.base import Channel, CommandResult
from lsmlab.errors import ChannelError
from lsmlab.machine.qemu import QemuMachine
from lsmlab.outcome import ArmRecord, AttemptRecord, Outcome
from lsmlab.scenario import Scenario, Step
from lsmlab.terms import CONTROL, ENFORCING_ARM, LOGGING_ARM, Arm, Framework, Kernel, Verdict

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
LIBRARY = REPO / "scenarios"
MINE = HERE / "scenarios"
BOTH = tuple(Framework)
FLAGSHIP = "nginx-reads-shadow"


class Role(Enum):
    """Which arm is sabotaged. The others are the twin's."""

    CONTROL = "control"
    LOGGING = "logging"
    ENFORCING = "enforcing"

    def arm(self, framework: Framework) -> Arm:
        """The arm that has this role under `framework`."""
        if self is Role.CONTROL:
            return CONTROL
        return (LOGGING_ARM if self is Role.LOGGING else ENFORCING_ARM)[framework]


@dataclass
class Trace:
    """What a sabotaged arm, or its unsabotaged twin, was like."""

    record: ArmRecord = field(default_factory=lambda: ArmRecord(arm=CONTROL))
    said: dict[str, str] = field(default_factory=dict)
    """What each proof's command printed right after the attack, by the sabotage's id."""
    kernel: Kernel | None = None
    """What its guest was booted with; None: it never came to an arm."""
    ended: bool = False
    """QEMU, or the connection to it, had ended when the attack had been asked for."""
    snapshots: str = ""
    """What QEMU said of its snapshots after the attack."""

    @property
    def attack(self) -> AttemptRecord:
        """The arm's attack, or one that says why there is none."""
        found = next(iter(self.record.attempts), None)
        assert found is not None, f"no attack was made: {self.record.error}"
        return found

    @property
    def log(self) -> str:
        """The audit log in the attack's window."""
        seen = self.attack.observation
        return seen.log if seen else ""


Enter = Callable[[Arm], Trace]
"""Told of each arm that the guest is brought into; the arm's trace."""
Proof = Callable[[Trace], bool]
Change = Callable[[Scenario, Path], Scenario]
Host = Callable[[QemuMachine], None]


@dataclass(frozen=True, kw_only=True)
class Sabotage:
    """One thing that is broken in an experiment that contains, and what is right to say of it."""

    id: str
    breaks: str
    """What is broken, in words."""
    verdict: Verdict
    reason: str
    """A regular expression that the outcome's reason matches."""
    shows: str | Proof
    """That it took effect: a regular expression on what `proof` printed, or a look at the trace. Not so of the twin."""
    proof: str = ""
    """A shell command in the guest, run right after the attack."""
    role: Role = Role.ENFORCING
    frameworks: tuple[Framework, ...] = BOTH
    base: str = FLAGSHIP
    lab: str = discovery.DEFAULT_LAB
    change: Change | None = None
    """Another scenario; files that it needs are written into the folder."""
    setup: str = ""
    """Shell: the last step of the set-up, before the service is started in the mode under test."""
    before_window: str = ""
    """Shell: the service runs; no window is open."""
    before: str = ""
    """Shell: the window is open, the canary planted; the attack comes next."""
    after: str = ""
    """Shell: the attack was made; the window is still open."""
    host: Host | None = None
    """On the host: before the attack is asked for."""
    host_after: Host | None = None
    kernel: Kernel | None = None
    """The guest's kernel, instead of the arm's own."""
    within: float | None = None
    """Seconds after which the channel gives the guest up, where it is to be waited for in vain."""

    def took_effect(self, trace: Trace) -> bool:
        """Whether the sabotage is seen in `trace`."""
        if callable(self.shows):
            return self.shows(trace)
        return re.search(self.shows, trace.said.get(self.id, ""), re.MULTILINE) is not None


NOTHING = Sabotage(id="nothing", breaks="nothing", verdict=Verdict.CONTAINED, reason="", shows=lambda _: False)
"""What the unsabotaged twin is run with."""
HOOKS = """
if [ -e /run/sabotage ]; then eval "$2"; else : > /run/sabotage; eval "$1"; fi
shift 2
[ $# = 0 ] || exec "$@"
"""
MARK = "--lsmlab-proof-"


def _proofs(commands: Mapping[str, str]) -> str:
    return "\n".join(f"echo {MARK}{name}\n({command}) 2>&1" for name, command in commands.items() if command)


class SabotagedChannel:
    """The guest's own channel, with the sabotage's commands in between."""

    def __init__(self, machine: QemuMachine, sabotage: Sabotage, proofs: Mapping[str, str], enter: Enter) -> None:
        self._machine = machine
        self._inner: Channel = machine.channel
        self._sabotage = sabotage
        self._proofs = proofs
        self._enter = enter
        self._trace = Trace()
        self._asked = 0

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float = 60) -> CommandResult:
        """See `Channel.run`."""
        return self._inner.run(argv, stdin=stdin, timeout=timeout)

    def write_file(self, path: str, data: bytes, *, mode: int | None = None, owner: str | None = None) -> None:
        """See `Channel.write_file`."""
        if path == "/run/lsmlab-arm":
            self._trace = self._enter(Arm(data.decode().strip()))
        self._inner.write_file(path, data, mode=mode, owner=owner)

    def ask(self, operation: str, *, within: float = 30, **arguments: Any) -> Any:
        """See `Channel.ask`; the first attempt after a window was opened is the attack."""
        if operation == "open_window":
            self._asked = 0
            if self._sabotage.before_window:
                self._inner.run(["sh", "-c", self._sabotage.before_window], timeout=100)
        if operation != "attempt":
            return self._inner.ask(operation, within=within, **arguments)
        self._asked += 1
        within = self._sabotage.within or within
        if self._asked > 1:
            return self._inner.ask(operation, within=within, **arguments)
        return self._attack(within, arguments)

    def _attack(self, within: float, arguments: dict[str, Any]) -> Any:
        sabotage = self._sabotage
        if sabotage.host:
            sabotage.host(self._machine)
        script = f"{sabotage.after}\n{_proofs(self._proofs)}"
        arguments["effect"] = ["sh", "-c", HOOKS, "sh", sabotage.before, script, *(arguments["effect"] or ())]
        try:
            answer = self._inner.ask("attempt", within=within, **arguments)
        except ChannelError:
            self._look()
            raise
        self._keep(base64.b64decode(answer["effect_after"]["out"]).decode("utf-8", "backslashreplace"))
        if sabotage.host_after:
            sabotage.host_after(self._machine)
            self._trace.snapshots = self._machine.monitor("human-monitor-command", **{"command-line": "info snapshots"})
        return answer

    def _look(self) -> None:
        deadline = time.monotonic() + 5
        while self._machine.running and time.monotonic() < deadline:
            time.sleep(0.05)
        self._trace.ended = not self._machine.running

    def _keep(self, out: str) -> None:
        for part in out.split(MARK)[1:]:
            name, _, words = part.partition("\n")
            self._trace.said[name] = words


class SabotagedMachine:
    """A guest whose channel is a sabotaged one."""

    def __init__(self, machine: QemuMachine, channel: SabotagedChannel) -> None:
        self._machine = machine
        self.channel = channel

    def __getattr__(self, name: str) -> Any:
        return getattr(self._machine, name)


class SabotagedBench:
    """A bench whose guests are sabotaged ones."""

    def __init__(self, bench: Bench, sabotage: Sabotage, proofs: Mapping[str, str], traces: dict[Arm, Trace]) -> None:
        self._bench = bench
        self._sabotage = sabotage
        self._proofs = proofs
        self._traces = traces

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bench, name)

    @contextlib.contextmanager
    def guest(self, kernel: Kernel, task: str) -> Iterator[SabotagedMachine]:
        """See `Bench.guest`."""
        kernel = self._sabotage.kernel or kernel

        def enter(arm: Arm) -> Trace:
            return self._traces.setdefault(arm, Trace(kernel=kernel))

        with self._bench.guest(kernel, task) as machine:
            yield SabotagedMachine(machine, SabotagedChannel(machine, self._sabotage, self._proofs, enter))


def run_arms(
    bench: Bench, scenario: Scenario, arms: Sequence[Arm], sabotage: Sabotage, proofs: Mapping[str, str]
) -> dict[Arm, Trace]:
    """The arms of one kernel, run as every experiment's are; with what the sabotage and its proofs left."""
    traces: dict[Arm, Trace] = {}
    between = cast(Bench, SabotagedBench(bench, sabotage, proofs, traces))
    for arm, record in run.run_boot(between, scenario, arms).items():
        traces.setdefault(arm, Trace()).record = record
    return traces


class Suite:
    """The experiments behind the cases: each arm is run once, whoever asks for it, as soon as there is a guest."""

    def __init__(
        self,
        benches: Mapping[str, Bench],
        pools: Mapping[str, ThreadPoolExecutor],
        folder: Path,
        cases: Sequence[Sabotage],
    ) -> None:
        self._benches = benches
        self._pools = pools
        self._folder = folder
        self._cases = cases
        self._twins: dict[tuple[str, str, Kernel], Future[dict[Arm, Trace]]] = {}
        self._sabotaged: dict[tuple[str, Arm], Future[dict[Arm, Trace]]] = {}
        self._scenarios = {s.id: s for s in discovery.load_scenarios([str(LIBRARY), str(MINE)], REPO)}

    def begin(self, case: Sabotage, framework: Framework) -> None:
        """Have the case's arm run, and those of its twin."""
        for arm in (CONTROL, ENFORCING_ARM[framework]):
            self._twin(case, arm.kernel)
        arm = case.role.arm(framework)
        if (case.id, arm) not in self._sabotaged:
            self._sabotaged[case.id, arm] = self._pools[case.lab].submit(self._run, case, arm)

    def _run(self, case: Sabotage, arm: Arm) -> dict[Arm, Trace]:
        folder = self._folder / f"{case.id}-{arm}"
        folder.mkdir()
        scenario = self._scenarios[case.base]
        if case.setup:
            step = Step(run=("sh", "-c", case.setup))
            scenario = scenario.model_copy(update={"setup": (*scenario.setup, step)})
        if case.change:
            scenario = case.change(scenario, folder)
        scenario = scenario.model_copy(update={"id": case.id})
        return run_arms(self._benches[case.lab], scenario, (arm,), case, {case.id: case.proof})

    def _twin(self, case: Sabotage, kernel: Kernel) -> Future[dict[Arm, Trace]]:
        key = (case.lab, case.base, kernel)
        if key not in self._twins:
            arms = [a for a in (CONTROL, *LOGGING_ARM.values(), *ENFORCING_ARM.values()) if a.kernel is kernel]
            proofs = {c.id: c.proof for c in self._cases if (c.lab, c.base) == (case.lab, case.base)}
            bench, scenario = self._benches[case.lab], self._scenarios[case.base]
            self._twins[key] = self._pools[case.lab].submit(run_arms, bench, scenario, arms, NOTHING, proofs)
        return self._twins[key]

    def twin(self, case: Sabotage, framework: Framework) -> dict[Arm, Trace]:
        """The arms of the unsabotaged experiment."""
        own = self._twin(case, ENFORCING_ARM[framework].kernel).result()
        return {**self._twin(case, CONTROL.kernel).result(), **own}

    def sabotaged(self, case: Sabotage, framework: Framework) -> Trace:
        """The sabotaged arm."""
        arm = case.role.arm(framework)
        return self._sabotaged[case.id, arm].result()[arm]

    def outcome(self, case: Sabotage, framework: Framework, arms: Mapping[Arm, Trace]) -> Outcome:
        """What is concluded from `arms`."""
        records = {arm: trace.record for arm, trace in arms.items()}
        return run.conclude(self._benches[case.lab], run.Case(self._scenarios[case.base], framework), records)
