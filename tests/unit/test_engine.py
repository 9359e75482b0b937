"""The engine over made-up guests: what one broken part does to the rest, what is shared, and how it all ends."""

from __future__ import annotations

import errno
import itertools
import json
import random
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from builders import (
    HTTPD,
    LSM,
    apparmor,
    audit_state,
    avc,
    outcome,
    process,
    scenario,
    subject,
    syscall,
    target,
    user_record,
    visited,
    wire,
)

from fakes import Answer, FakeBench, ScriptedChannel, ScriptedMachine, said
from lsmlab import discovery, run
from lsmlab.cli.experiment import exit_code
from lsmlab.errors import ChannelError, DefinitionError, FrameworkError, MachineError
from lsmlab.lab import Lab
from lsmlab.machine import qemu
from lsmlab.outcome import ArmRecord, AttemptRecord, Outcome
from lsmlab.progress import Silent
from lsmlab.run import READY, SET_UP, SWITCHED
from lsmlab.scenario import Scenario
from lsmlab.terms import Arm, Framework, Kernel, Result, Verdict, arms_of

SELINUX, APPARMOR = Framework.SELINUX, Framework.APPARMOR
PERMISSIVE, ENFORCING = Arm.SELINUX_PERMISSIVE, Arm.SELINUX_ENFORCING
ARMS = {
    Kernel.NONE: [Arm.DAC],
    Kernel.SELINUX: [PERMISSIVE, ENFORCING],
    Kernel.APPARMOR: [Arm.APPARMOR_COMPLAIN, Arm.APPARMOR_ENFORCE],
}
PROFILE = Path(__file__).resolve().parents[2] / "scenarios" / "nginx-reads-shadow" / "nginx.apparmor"
RECORDS = {
    Kernel.SELINUX: f"{avc()}\n{syscall()}\n",
    Kernel.APPARMOR: f"{apparmor()}\n{syscall(stamp='1795509850.164', serial=216, subject='nginx')}\n",
}
"""Of the refused read, under each framework."""
START_DENIAL = f"{avc('bind', tclass='tcp_socket')}\n{syscall(number=49)}\n"
"""Of a start that SELinux refuses."""


Trouble = Callable[["Nginx", str, Any], Any]
"""Told of each line that a guest is about to do, with its words or arguments. It may raise, or give another answer."""


class Troubled(ScriptedChannel):
    """A scripted channel that is told of trouble first."""

    def __init__(self, nginx: Nginx, answers: Sequence[tuple[str, Answer]], asked: Mapping[str, Any]) -> None:
        super().__init__(answers, asked)
        self._nginx = nginx

    def _answer(self, line: str, words: tuple[str, ...]) -> Any:
        found = self._nginx.trouble(self._nginx, line, words)
        return super()._answer(line, words) if found is None else found

    def ask(self, operation: str, *, within: float = 30, **arguments: Any) -> Any:
        """See `Channel.ask`."""
        found = self._nginx.trouble(self._nginx, f"ask {operation}", arguments)
        return super().ask(operation, within=within, **arguments) if found is None else found


class Nginx:
    """A guest with nginx in it, by script: DAC lets it read /etc/shadow, the enforcing frameworks do not.

    What it remembers is its machine's state: a restore brings it back.
    """

    def __init__(self, kernel: Kernel, trouble: Trouble = lambda *_: None) -> None:
        self._kernel = kernel
        self.trouble = trouble
        self.state: dict[str, Any] = {
            "arm": "", "enforcing": kernel is Kernel.SELINUX, "profiles": {}, "running": True, "planted": [], "log": "",
        }  # fmt: skip
        own: list[tuple[str, Answer]] = [
            (r"write /run/lsmlab-arm", lambda words: self._now(arm=words[2].strip())),
            (r"write /sys/fs/selinux/enforce", lambda words: self._now(enforcing=words[2] == "1")),
            (r"apparmor_parser --replace ", self._load),
            (r"apparmor_parser --names ", said("nginx\n")),
            (r"systemctl stop nginx.service$", lambda _: self._now(running=False)),
            (r"systemctl show .*ExecStart", said("{ path=/usr/sbin/nginx ; argv[]=nginx ; }\n")),
            (r"usermod ", said()),
        ]
        questions: dict[str, Any] = {
            "clock": None,
            "permissive": False,
            "relabel": None,
            "start_unit": lambda **_: self._now(running=True) and "",
            "pids": lambda **_: [481, 482] if self.state["running"] else [],
            "audit_state": audit_state(),
            "mode": self._mode,
            "open_window": self._open_window,
            "close_window": self._close_window,
            "attempt": self._attempt,
        }
        self.machine = ScriptedMachine(Troubled(self, own, questions), self.state)

    def _now(self, **changes: Any) -> Any:
        self.state.update(changes)
        return said()

    def _load(self, argv: tuple[str, ...]) -> Any:
        loaded = "complain" if "--Complain" in argv else "enforce"
        return self._now(profiles={"nginx": loaded}, enforcing=loaded == "enforce")

    def _mode(self) -> dict[str, Any]:
        framework = None if self._kernel is Kernel.NONE else Framework(self._kernel.value)
        return {
            "lsm": list(LSM[framework]),
            "selinux_enforcing": self.state["enforcing"] if framework is SELINUX else None,
            "profiles": self.state["profiles"] if framework is APPARMOR else None,
            "apparmor_mode": "enforce" if framework is APPARMOR else None,
        }

    def _subject(self) -> dict[str, Any]:
        if not self.state["running"]:
            return {**wire(subject(active="failed")), "processes": []}
        profile = f"nginx ({self.state['profiles'].get('nginx')})"
        label = {Kernel.NONE: "", Kernel.SELINUX: HTTPD, Kernel.APPARMOR: profile}[self._kernel]
        return wire(subject(process(481, main=True, label=label), process(482, label=label)))

    def _open_window(self, **_: Any) -> dict[str, Any]:
        return {
            "subject": self._subject(), "object": wire(target()), "mode": self._mode(), "audit": audit_state(),
            "resting": True, "drained": True,
        }  # fmt: skip

    def _close_window(self, word: str, **_: Any) -> dict[str, Any]:
        log = f"{self.state['log']}{user_record(word)}\n"
        return {
            "log": log, "problem": "", "subject": self._subject(), "mode": self._mode(),
            "audit": audit_state(size=audit_state()["size"] + len(log)),
        }  # fmt: skip

    def _attempt(self, close: Any, canary: Any, effect: Any, request: Any, keep: Any = None) -> dict[str, Any]:
        assert effect is None
        assert (keep is not None) is self.machine.stays
        self.state["planted"].append(canary["line"])
        attack = request["path"].endswith("/etc/shadow")
        refused = attack and self.state["enforcing"]
        logged = f"{avc(permissive=1)}\n" if attack and self._kernel is Kernel.SELINUX else ""
        self.state["log"] = RECORDS[self._kernel] if refused else logged
        result = visited(403, "<h1>403 Forbidden</h1>") if refused else visited(200, "\n".join(self.state["planted"]))
        return {
            "planted": True, "effect_before": None, "effect_after": None,
            "result": result if self.state["running"] else visited(None, err="Connection refused"),
            "closed": self._close_window(**close),
        }  # fmt: skip


SET_UP_STEPS = [
    {"run": ["usermod", "--append", "--groups", "shadow", "www-data"]},
    {"write": {"path": "/srv/www/logo.svg", "content": "<svg/>"}},
    {"write": {"path": "/srv/www/other.svg", "content": "<svg/>"}},
]
BENIGN = {
    "id": "front-page",
    "kind": "benign",
    "http": {"path": "/"},
    "canary": {"file": "/var/www/html/index.html", "line": "<p>{canary}</p>"},
    "allowed_if": {"status": 200, "output": "<p>{canary}</p>"},
    "blocked_if": [{"status": 403}],
}


def flagship(name: str = "nginx-reads-shadow", **changes: Any) -> Scenario:
    """The attack and a benign attempt, after a set-up."""
    attack = scenario().attempts[0].model_dump(by_alias=True)
    base: dict[str, Any] = {
        "id": name, "setup": SET_UP_STEPS, "apparmor": {"profiles": [PROFILE]}, "attempts": [attack, BENIGN],
    }  # fmt: skip
    return scenario(**{**base, **changes})


@pytest.fixture(scope="module")
def lab() -> Lab:
    return discovery.load_lab("debian-13")


BenchOf = Callable[..., FakeBench]
MakeGuest = Callable[[Kernel, str], ScriptedMachine]


@pytest.fixture
def bench_of(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> BenchOf:
    """Makes a bench of made-up guests, which die as real ones do when the engine says so."""

    def make(make_guest: MakeGuest | None = None, *, guests: int = 4, **more: Any) -> FakeBench:
        bench = FakeBench(lab, make_guest or (lambda kernel, _: Nginx(kernel).machine), guests=guests, **more)
        monkeypatch.setattr(qemu, "stop_all", bench.stop_all)
        return bench

    return make


class Guests:
    """Makes guests and keeps them by kernel. `trouble` is of one kernel's guests, or of one of them: `which`."""

    def __init__(
        self, trouble: Trouble = lambda *_: None, kernel: Kernel = Kernel.SELINUX, which: int | None = None
    ) -> None:
        self._trouble, self._kernel, self._which = trouble, kernel, which
        self.by_kernel: dict[Kernel, list[ScriptedMachine]] = {kernel: [] for kernel in Kernel}

    def __call__(self, kernel: Kernel, task: str) -> ScriptedMachine:
        made = self.by_kernel[kernel]
        troubled = kernel is self._kernel and self._which in {None, len(made)}
        made.append((Nginx(kernel, self._trouble) if troubled else Nginx(kernel)).machine)
        return made[-1]

    @property
    def selinux(self) -> list[ScriptedMachine]:
        """The guests with SELinux."""
        return self.by_kernel[Kernel.SELINUX]

    def lines(self, kernel: Kernel = Kernel.SELINUX) -> list[list[str]]:
        """All that was done in each guest of a kernel."""
        return [machine.channel.lines for machine in self.by_kernel[kernel]]


NOT_STARTED = "systemd's job ended: failed"


def at(pattern: str, answer: Any, arm: Arm | None = None) -> Trouble:
    """At a line, in an arm: `answer`, which is raised where it is an exception, and called where it is a function."""

    def trouble(nginx: Nginx, line: str, detail: Any) -> Any:
        if re.match(pattern, line) is None or arm not in {None, nginx.state["arm"]}:
            return None
        if isinstance(answer, Exception):
            raise answer
        return answer(nginx, detail) if callable(answer) else answer

    return trouble


def dies(pattern: str, arm: Arm | None = None) -> Trouble:
    """Its QEMU ends at a line, in an arm."""

    def end(nginx: Nginx, _: Any) -> Any:
        nginx.machine.running = False
        raise ChannelError("QEMU ended")

    return at(pattern, end, arm)


def outcomes(bench: FakeBench, scenarios: Sequence[Scenario]) -> list[Outcome]:
    return list(run.run(bench.as_bench, run.cases(scenarios, bench.lab)))


def attempts(arm: ArmRecord | None) -> dict[str, AttemptRecord]:
    assert arm is not None
    return {a.attempt: a for a in arm.attempts}


def error_of(found: Outcome, arm: Arm) -> str:
    record = found.arm(arm)
    assert record is not None
    return record.error


def whole(found: Outcome, arm: Arm) -> bool:
    """True where nothing is missing from an arm's record, and all is as it should be."""
    results = {name: a.result for name, a in attempts(found.arm(arm)).items()}
    attack = Result.BLOCKED if arm.enforcing else Result.ALLOWED
    return not error_of(found, arm) and results == {"read-shadow": attack, "front-page": Result.ALLOWED}


def test_a_machine_that_stays_has_a_window_for_each_attempt_and_keeps_what_leaks(bench_of: BenchOf) -> None:
    """Its log goes on: another attempt's denial has to lie before the window. And it is told what may leave it."""
    guests = Guests()

    def make(kernel: Kernel, task: str) -> ScriptedMachine:
        machine = guests(kernel, task)
        machine.stays = True
        return machine

    bench = bench_of(make)
    (found,) = run.run(bench.as_bench, run.cases([flagship()], bench.lab, [APPARMOR], unconfined=True))
    assert [arm.arm for arm in found.arms] == [Arm.APPARMOR_UNCONFINED, Arm.APPARMOR_ENFORCE]
    assert found.verdict is Verdict.CONTAINED, found.reason
    assert "where the service is not confined" in found.reason
    (machine,) = guests.by_kernel[Kernel.APPARMOR]
    done = [line for line in machine.channel.lines if line in {"ask open_window", "ask attempt", f"restore {READY}"}]
    restored = [f"restore {READY}", "ask open_window", "ask attempt"]
    assert done == ["ask open_window", "ask attempt", *restored] * 2
    for asked in machine.channel.asked_for("attempt"):
        assert len(asked["keep"]["texts"][0]) == 16 and asked["keep"]["texts"][0] in asked["canary"]["line"]


def test_a_guest_s_window_is_opened_once_an_arm_and_nothing_is_withheld(bench_of: BenchOf) -> None:
    guests = Guests()
    outcomes(bench_of(guests), [flagship()])
    (machine,) = guests.selinux
    assert machine.channel.lines.count("ask open_window") == 2
    assert not any("keep" in asked for asked in machine.channel.asked_for("attempt"))


def arm_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("arm")]


# Outcomes


def test_the_whole_chain(bench_of: BenchOf) -> None:
    bench = bench_of()
    selinux, other = outcomes(bench, [flagship()])
    assert (selinux.framework, other.framework) == (SELINUX, APPARMOR)
    for found in (selinux, other):
        assert (found.verdict, found.as_expected) == (Verdict.CONTAINED, True), found.reason
        assert tuple(a.arm for a in found.arms) == arms_of(found.framework)
        assert found.environment == bench.environment
        assert (found.lab, found.scenario_digest) == ("debian-13", flagship().digest())
        for arm in found.arms:
            assert (arm.error, arm.service_active, arm.setup_denials) == ("", True, ())
            assert "audit=1" in arm.command_line
            assert f"security={arm.arm.kernel}" in arm.command_line
            assert arm.lsm == LSM[arm.arm.framework]
            assert list(attempts(arm)) == ["read-shadow", "front-page"]
            shadow = attempts(arm)["read-shadow"]
            assert shadow.result is (Result.BLOCKED if arm.arm.enforcing else Result.ALLOWED)
            assert shadow.dac is not None
            assert shadow.dac.permitted
            assert attempts(arm)["front-page"].result is Result.ALLOWED
    assert selinux.id != other.id
    assert bench.alive == 0


# What the arms of a kernel share


def test_the_arms_of_a_kernel_share_a_guest_and_its_set_up(bench_of: BenchOf) -> None:
    guests = Guests()
    bench = bench_of(guests)
    outcomes(bench, [flagship()])
    assert sorted(bench.started) == sorted((k, f"nginx-reads-shadow {k}") for k in Kernel)
    into_arm = ["ask clock", "write /run/lsmlab-arm"]
    tried = ["ask open_window", "snapshot ready", "ask attempt", "restore ready", "ask attempt"]
    switched = ["ask open_window", "snapshot switched", "ask attempt", "restore switched", "ask attempt"]
    steps = ["usermod --append --groups shadow www-data", "write /srv/www/logo.svg", "write /srv/www/other.svg"]
    set_up = [*into_arm, "ask pids", *steps, "ask relabel", "ask pids", "systemctl stop nginx.service"]
    start = ["ask audit_state", "ask start_unit"]
    mode, settled = ["write /sys/fs/selinux/enforce", "ask mode"], "ask permissive"
    ready = [*mode, *start, settled, "ask open_window", "snapshot ready"]
    permissive = [*into_arm, *mode, settled, *switched]
    assert guests.lines(Kernel.NONE) == [[*set_up, *start, *tried]]
    enforcing = ["restore ready", "ask attempt", "restore ready", "ask attempt"]
    assert guests.lines(Kernel.SELINUX) == [[*set_up, *ready, *permissive, *enforcing]]
    (in_apparmor,) = guests.lines(Kernel.APPARMOR)
    assert len([line for line in in_apparmor if line in steps]) == len(steps)
    loads = [line for line in in_apparmor if line.startswith("apparmor_parser --replace")]
    assert [("--Complain" in line) for line in loads] == [False, True]
    assert in_apparmor.count("ask start_unit") == 1
    assert in_apparmor.index("ask start_unit") < in_apparmor.index(loads[1])


def test_a_logging_arm_goes_on_with_the_processes_of_the_enforcing_one(bench_of: BenchOf) -> None:
    for found in outcomes(bench_of(), [flagship()]):
        assert [arm.started_in for arm in found.arms] == [None, found.arms[2].arm, None]
        assert found.verdict is Verdict.CONTAINED, found.reason


def test_a_weaker_control_and_the_enforcing_arm_have_a_start_each_in_one_guest(bench_of: BenchOf, lab: Lab) -> None:
    guests = Guests()
    (found,) = run.run(bench_of(guests).as_bench, run.cases([flagship()], lab, [APPARMOR], unconfined=True))
    assert [arm.started_in for arm in found.arms] == [None, None]
    (machine,) = guests.by_kernel[Kernel.APPARMOR]
    turns = [f"snapshot {READY}", f"restore {READY}"]
    assert machine.turns == [f"snapshot {SET_UP}", *turns, f"restore {SET_UP}", *turns]
    assert machine.channel.lines.count("ask start_unit") == 2


@pytest.mark.parametrize("lacking", ["read-shadow", "front-page"])
def test_a_logging_arm_that_lacks_something_starts_the_service_itself(bench_of: BenchOf, lacking: str) -> None:
    """In the enforcing mode the service may have been denied at its start what an attempt needs."""

    def trouble(nginx: Nginx, line: str, detail: Any) -> Any:
        if line == "ask start_unit":
            nginx.state["denied"] = nginx.state["enforcing"]
        if line != "ask attempt" or nginx.state["enforcing"] or not nginx.state["denied"]:
            return None
        attack = detail["request"]["path"].endswith("/etc/shadow")
        if attack is not (lacking == "read-shadow"):
            return None
        return {**nginx._attempt(**detail), "result": visited(500, "")}

    guests = Guests(trouble)
    selinux, other = outcomes(bench_of(guests), [flagship()])
    assert selinux.verdict is Verdict.CONTAINED, selinux.reason
    assert [arm.started_in for arm in selinux.arms] == [None, None, None]
    assert whole(selinux, PERMISSIVE)
    permissive = selinux.arm(PERMISSIVE)
    assert permissive is not None
    before = {a.attempt: a.result for a in permissive.switched}
    assert before == {"read-shadow": Result.ALLOWED, "front-page": Result.ALLOWED, lacking: Result.UNCLEAR}
    first, second = guests.lines()
    assert first.count("ask start_unit") == second.count("ask start_unit") == 1
    assert "ask relabel" in second, "it has a set-up of its own"
    assert [arm.started_in for arm in other.arms] == [None, Arm.APPARMOR_ENFORCE, None]


def lacks(nginx: Nginx, arguments: Any) -> Any:
    return {**nginx._attempt(**arguments), "result": visited(500, "")}


def test_what_a_logging_arm_lacks_with_a_start_of_its_own_is_in_its_record(bench_of: BenchOf) -> None:
    guests = Guests(at("ask attempt", lacks, PERMISSIVE))
    selinux, _ = outcomes(bench_of(guests), [flagship()])
    assert [a.result for a in attempts(selinux.arm(PERMISSIVE)).values()] == [Result.UNCLEAR] * 2
    assert selinux.verdict is Verdict.INCONCLUSIVE
    assert len(guests.selinux) == 2


def test_a_logging_arm_whose_own_guest_breaks_is_an_error(bench_of: BenchOf) -> None:
    def trouble(nginx: Nginx, line: str, detail: Any) -> Any:
        if line == "ask start_unit" and not nginx.state["enforcing"]:
            raise ChannelError("fell silent")
        return at("ask attempt", lacks, PERMISSIVE)(nginx, line, detail)

    selinux, _ = outcomes(bench_of(Guests(trouble)), [flagship()])
    record = selinux.arm(PERMISSIVE)
    assert record is not None
    assert (record.error, record.attempts, record.started_in) == ("fell silent", (), None)
    assert [a.result for a in record.switched] == [Result.UNCLEAR] * 2
    assert selinux.verdict is Verdict.ERROR


def test_a_logging_arm_does_not_go_on_from_a_service_that_has_died(bench_of: BenchOf) -> None:
    """One that the kernel kills once it has started: no attempt can be made as it, and none where only the mode is
    another."""

    def trouble(nginx: Nginx, line: str, _: Any) -> Any:
        if line == "ask attempt" and nginx.state["enforcing"]:
            raise ChannelError("the service has no process whose rights a command could be given")
        return None

    guests = Guests(trouble)
    selinux, _ = outcomes(bench_of(guests), [flagship()])
    assert whole(selinux, PERMISSIVE)
    record = selinux.arm(PERMISSIVE)
    assert record is not None
    assert (record.started_in, record.switched) == (None, ())
    assert len(guests.selinux) == 2
    assert selinux.verdict is Verdict.ERROR


def test_each_arm_is_entered_under_its_own_name(bench_of: BenchOf) -> None:
    entered: list[tuple[str, Any]] = []

    def trouble(nginx: Nginx, line: str, words: Any) -> None:
        if line.startswith(("write /run/lsmlab-arm", "write /sys/fs/selinux/enforce")):
            entered.append((nginx.state["arm"], words[2].strip()))

    outcomes(bench_of(Guests(trouble)), [flagship()])
    # Each with what it was before: from the set-up on it is the first arm's
    assert entered == [("", ENFORCING), (ENFORCING, "1"), (ENFORCING, PERMISSIVE), (PERMISSIVE, "0")]


def test_an_arm_knows_nothing_of_the_one_before_it(bench_of: BenchOf) -> None:
    guests = Guests()
    for found in outcomes(bench_of(guests), [flagship()]):
        for arm in found.arms:
            page = attempts(arm)["front-page"].observation
            assert page is not None
            # Every canary that was planted in this guest's memory is shown: its own, and no other attempt's or arm's
            assert page.output == f"<p>{page.canary}</p>"
    assert [m.turns for m in guests.by_kernel[Kernel.NONE]] == [[f"snapshot {READY}", f"restore {READY}"]]
    switched = [f"snapshot {SWITCHED}", f"restore {SWITCHED}"]
    for kernel in (Kernel.SELINUX, Kernel.APPARMOR):
        (machine,) = guests.by_kernel[kernel]
        assert machine.turns == [f"snapshot {READY}", *switched, f"restore {READY}", f"restore {READY}"]
        assert not machine.running


def test_the_enforcing_arm_starts_from_a_service_that_is_stopped(bench_of: BenchOf) -> None:
    found: list[bool] = []
    trouble = at("write /sys/fs/selinux/enforce", lambda nginx, _: found.append(nginx.state["running"]))
    outcomes(bench_of(Guests(trouble)), [flagship()])
    assert found == [False, True], "and the logging arm from one that runs"


def test_a_single_attempt_needs_no_restore_but_behind_the_other_arm(bench_of: BenchOf) -> None:
    guests = Guests()
    outcomes(bench_of(guests), [flagship(attempts=[scenario().attempts[0].model_dump(by_alias=True)])])
    assert guests.by_kernel[Kernel.NONE][0].turns == [f"snapshot {READY}"]
    assert guests.selinux[0].turns == [f"snapshot {READY}", f"restore {READY}"], "nothing begins at the switched one"


def test_the_control_is_run_once_for_both_frameworks(bench_of: BenchOf) -> None:
    bench = bench_of()
    selinux, other = outcomes(bench, [flagship()])
    assert sorted(kernel for kernel, _ in bench.started) == sorted(Kernel)
    assert selinux.arm(Arm.DAC) == other.arm(Arm.DAC)


def test_one_framework_needs_two_guests(bench_of: BenchOf, lab: Lab) -> None:
    bench = bench_of()
    (found,) = run.run(bench.as_bench, run.cases([flagship()], lab, [SELINUX]))
    assert found.framework is SELINUX
    assert sorted(k for k, _ in bench.started) == sorted([Kernel.NONE, Kernel.SELINUX])


def test_each_scenario_has_guests_of_its_own(bench_of: BenchOf) -> None:
    bench = bench_of(guests=1)
    outcomes(bench, [flagship("one"), flagship("two")])
    # Scenario by scenario, so that outcomes come early; the control, which is the shortest, last
    order = [Kernel.SELINUX, Kernel.APPARMOR, Kernel.NONE]
    assert bench.started == [(k, f"{name} {k}") for name in ("one", "two") for k in order]


def test_what_is_told_of_a_guests_progress(bench_of: BenchOf) -> None:
    told: list[tuple[str, str]] = []

    class Told(Silent):
        def step(self, task: str, text: str) -> None:
            told.append((task, text))

        def done(self, task: str) -> None:
            told.append((task, "done"))

    outcomes(bench_of(progress=Told()), [flagship()])
    assert [text for task, text in told if task == "nginx-reads-shadow selinux"] == [
        "set-up: policy, files, users",
        f"{ENFORCING}: mode, service",
        *(f"{PERMISSIVE}: {text}" for text in ("mode", "attack read-shadow", "benign front-page")),
        *(f"{ENFORCING}: {text}" for text in ("attack read-shadow", "benign front-page")),
        "done",
    ]  # fmt: skip


@pytest.mark.parametrize("guests", [1, 3, 8])
def test_outcomes_come_in_the_order_asked_for(bench_of: BenchOf, guests: int) -> None:
    pause = random.Random(guests)

    def make(kernel: Kernel, _: str) -> ScriptedMachine:
        time.sleep(pause.uniform(0, 0.03))
        return Nginx(kernel).machine

    names = ["zebra", "ape", "mule", "bee"]
    found = outcomes(bench_of(make, guests=guests), [flagship(n) for n in names])
    assert [(o.scenario, o.framework) for o in found] == list(itertools.product(names, (SELINUX, APPARMOR)))
    assert all(o.verdict is Verdict.CONTAINED for o in found)


@pytest.mark.parametrize("guests", [1, 2, 3])
def test_as_many_guests_at_once_as_the_bench_has_places(bench_of: BenchOf, guests: int) -> None:
    together = threading.Barrier(guests)
    most: list[int] = []

    def make(kernel: Kernel, _: str) -> ScriptedMachine:
        most.append(bench.alive + 1)
        machine = Nginx(kernel).machine
        if len(most) <= guests:  # the first ones wait for each other
            together.wait(20)
        return machine

    bench = bench_of(make, guests=guests)
    outcomes(bench, [flagship(n) for n in ("one", "two", "three")])
    assert len(most) == 3 * len(Kernel)
    assert max(most) <= guests


def test_an_outcome_comes_before_the_last_arm_has_ended(bench_of: BenchOf) -> None:
    release = threading.Event()

    def make(kernel: Kernel, task: str) -> ScriptedMachine:
        if task.startswith("late"):
            assert release.wait(20)
        return Nginx(kernel).machine

    bench = bench_of(make)
    found = run.run(bench.as_bench, run.cases([flagship("early"), flagship("late")], bench.lab))
    assert [next(found).scenario, next(found).scenario] == ["early", "early"]
    release.set()
    assert [o.scenario for o in found] == ["late", "late"]
    assert arm_threads() == []


# A guest that is not there, or whose set-up fails: no arm


@pytest.mark.parametrize(
    "error",
    [
        MachineError("it did not come up", hint="See its console."),
        FrameworkError("no"),
        OSError(errno.ENOSPC, "No space left on device", "/cache/scratch/x.qcow2"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_arms_whose_guest_does_not_come_up_are_errors_and_the_others_go_on(bench_of: BenchOf, error: Exception) -> None:
    def make(kernel: Kernel, _: str) -> ScriptedMachine:
        if kernel is Kernel.SELINUX:
            raise error
        return Nginx(kernel).machine

    bench = bench_of(make)
    selinux, other = outcomes(bench, [flagship()])
    assert selinux.verdict is Verdict.ERROR
    assert str(error).splitlines()[0] in selinux.reason
    for arm in (PERMISSIVE, ENFORCING):
        record = selinux.arm(arm)
        assert record is not None
        assert (record.error, record.attempts) == (str(error), ())
        assert "security=selinux" in record.command_line
    assert [k for k, _ in bench.started].count(Kernel.SELINUX) == 1, "the bench itself tries again where it may help"
    assert attempts(selinux.arm(Arm.DAC))["read-shadow"].result is Result.ALLOWED
    assert other.verdict is Verdict.CONTAINED


def test_a_broken_control_is_an_error_for_both_frameworks(bench_of: BenchOf) -> None:
    def make(kernel: Kernel, _: str) -> ScriptedMachine:
        if kernel is Kernel.NONE:
            raise MachineError("the control did not come up")
        return Nginx(kernel).machine

    for found in outcomes(bench_of(make), [flagship()]):
        assert found.verdict is Verdict.ERROR
        assert "the control did not come up" in found.reason


BROKEN_SET_UP: dict[str, tuple[str, Any, str]] = {
    "command": ("usermod ", said(err="no such user", code=6), "setup, step 1: in the guest: usermod"),
    "write": ("write /srv/www/other.svg", ChannelError("no space"), "setup, step 3: no space"),
    "labels": ("ask relabel", ChannelError("restorecon: broken"), "setup, step 3: restorecon: broken"),
    "clock": ("ask clock", ChannelError("clock: not permitted"), "clock: not permitted"),
    "prompt": ("write /run/lsmlab-arm", ChannelError("read-only"), "read-only"),
    "service": ("systemctl stop", said(err="it hangs", code=1), "in the guest: systemctl stop nginx.service"),
    "processes": ("ask pids", ChannelError("pids: broken"), "pids: broken"),
}


@pytest.mark.parametrize("case", list(BROKEN_SET_UP))
def test_a_set_up_that_fails_is_the_error_of_both_arms(bench_of: BenchOf, case: str) -> None:
    pattern, answer, words = BROKEN_SET_UP[case]
    guests = Guests(at(pattern, answer))
    bench = bench_of(guests)
    selinux, other = outcomes(bench, [flagship()])
    assert (selinux.verdict, other.verdict) == (Verdict.ERROR, Verdict.CONTAINED)
    for arm in (PERMISSIVE, ENFORCING):
        assert error_of(selinux, arm).startswith(words)
        assert attempts(selinux.arm(arm)) == {}
    assert words in selinux.reason
    assert len(guests.selinux) == 1, "a set-up that fails would fail again"
    assert guests.selinux[0].turns == []
    assert bench.alive == 0


def test_a_policy_that_does_not_load_is_the_error_of_both_arms(bench_of: BenchOf) -> None:
    guests = Guests(at("setsebool ", said(err="Boolean x is not defined", code=255)))
    selinux, _ = outcomes(bench_of(guests), [flagship(selinux={"booleans": {"x": True}})])
    for arm in (PERMISSIVE, ENFORCING):
        assert error_of(selinux, arm) == "setsebool x: Boolean x is not defined"


def test_a_set_up_that_cannot_be_kept_is_the_error_of_both_arms(
    bench_of: BenchOf, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot(_: object, name: str) -> None:
        raise MachineError(f"snapshot {name}: no space")

    monkeypatch.setattr(ScriptedMachine, "snapshot", snapshot)
    (found,) = run.run(bench_of().as_bench, run.cases([flagship()], lab, [APPARMOR], unconfined=True))
    assert [arm.error for arm in found.arms] == ["snapshot set-up: no space"] * 2
    selinux, _ = outcomes(bench_of(), [flagship()])
    assert [arm.error for arm in selinux.arms] == ["snapshot ready: no space"] * 3, (
        "no other arm starts from its set-up"
    )


# An arm that breaks


BROKEN_ARM: dict[str, tuple[str, Any, str]] = {
    "clock": ("ask clock", ChannelError("clock: not permitted"), "clock: not permitted"),
    "mode not entered": ("write /sys/fs/selinux/enforce", ChannelError("not permitted"), "not permitted"),
    "mode not kept": (
        "ask mode",
        {"lsm": ["selinux"], "selinux_enforcing": None, "profiles": None, "apparmor_mode": None},
        "/sys/fs/selinux/enforce: 1 was written, and the mode is None",
    ),
    "mode is nonsense": ("ask mode", {"lsm": "selinux"}, "the agent answered nonsense: lsm: "),
    "auditing is nonsense": ("ask audit_state", audit_state(size="big"), "the agent answered nonsense: size: "),
    "auditing": ("ask audit_state", ChannelError("no audit subsystem"), "no audit subsystem"),
    "cache not flushed": ("write /sys/fs/selinux/commit", ChannelError("no space"), "no space"),
    "window": ("ask open_window", ChannelError("fell silent"), "fell silent"),
    "window is nonsense": ("ask open_window", {}, "the agent answered nonsense: subject: Field required"),
    "disk": ("ask open_window", OSError(errno.ENOSPC, "No space left on device"), "[Errno 28] No space left on device"),
}


NOT_ON_THE_WAY = {
    PERMISSIVE: ("auditing", "auditing is nonsense", "cache not flushed"),  # it does not start the service
    ENFORCING: ("clock", "cache not flushed"),  # its clock is the set-up's
}


@pytest.mark.parametrize(
    ("case", "arm"),
    [(case, arm) for case in BROKEN_ARM for arm in (PERMISSIVE, ENFORCING) if case not in NOT_ON_THE_WAY[arm]],
)
def test_what_breaks_on_the_way_into_an_arm_is_that_arms_error_alone(bench_of: BenchOf, case: str, arm: Arm) -> None:
    pattern, answer, words = BROKEN_ARM[case]
    clocks: list[str] = []  # the clock is set first of all: in the set-up, and behind the enforcing arm in the other

    def trouble(nginx: Nginx, line: str, detail: Any) -> Any:
        if line == "ask clock":
            clocks.append(line)
        in_turn = len(clocks) == (1 if arm is ENFORCING else 2)
        return at(pattern, answer)(nginx, line, detail) if in_turn else None

    guests = Guests(trouble)
    bench = bench_of(guests)
    selinux, other = outcomes(bench, [flagship()])
    assert (selinux.verdict, other.verdict) == (Verdict.ERROR, Verdict.CONTAINED)
    words = words.replace("1 was", f"{int(arm.enforcing)} was")
    assert error_of(selinux, arm).startswith(words)
    assert attempts(selinux.arm(arm)) == {}
    (healthy,) = {PERMISSIVE, ENFORCING} - {arm}
    assert whole(selinux, healthy)
    assert len(guests.selinux) == (2 if arm is ENFORCING else 1), "who cannot go on starts the service itself"
    assert bench.alive == 0


@pytest.mark.parametrize("case", list(BROKEN_ARM))
def test_what_breaks_on_the_way_from_the_set_up_is_that_arms_error_alone(bench_of: BenchOf, case: str) -> None:
    """With steps behind the start each arm has a start of its own, in one guest."""
    pattern, answer, words = BROKEN_ARM[case]
    clocks: list[str] = []

    def trouble(nginx: Nginx, line: str, detail: Any) -> Any:
        if line == "ask clock":
            clocks.append(line)
        return at(pattern, answer)(nginx, line, detail) if len(clocks) == 2 else None

    guests = Guests(trouble)
    selinux, _ = outcomes(bench_of(guests), [flagship(after_start=[{"run": ["usermod", "late"]}])])
    assert error_of(selinux, PERMISSIVE).startswith(words.replace("1 was", "0 was"))
    assert attempts(selinux.arm(PERMISSIVE)) == {}
    assert whole(selinux, ENFORCING)
    (machine,) = guests.selinux
    assert machine.turns.count(f"restore {SET_UP}") == 1


def test_an_arm_that_cannot_be_restored_is_that_arms_error_alone(
    bench_of: BenchOf, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore = ScriptedMachine.restore

    def broken(machine: ScriptedMachine, name: str) -> None:
        if name == SET_UP:
            raise MachineError("restore set-up: broken")
        restore(machine, name)

    monkeypatch.setattr(ScriptedMachine, "restore", broken)
    (found,) = run.run(bench_of().as_bench, run.cases([flagship()], lab, [APPARMOR], unconfined=True))
    assert whole(found, Arm.APPARMOR_UNCONFINED)
    assert error_of(found, Arm.APPARMOR_ENFORCE) == "restore set-up: broken"


def test_the_seconds_of_an_arm_are_its_own(bench_of: BenchOf) -> None:
    slow = at("ask open_window", lambda *_: time.sleep(0.5), ENFORCING)
    selinux, _ = outcomes(bench_of(Guests(slow)), [flagship()])
    first, second = (selinux.arm(arm) for arm in (ENFORCING, PERMISSIVE))
    assert first is not None
    assert second is not None
    assert 0.5 <= first.seconds < 20
    assert second.seconds < 0.5


# An attempt that breaks


@pytest.mark.parametrize("arm", [PERMISSIVE, ENFORCING])
def test_a_channel_error_in_one_attempt_fails_that_attempt_only(bench_of: BenchOf, arm: Arm) -> None:
    def fall_silent(_: Nginx, arguments: Any) -> Any:
        if arguments["request"]["path"].endswith("/etc/shadow"):
            raise ChannelError("the agent fell silent")

    guests = Guests(at("ask attempt", fall_silent, arm))
    selinux, other = outcomes(bench_of(guests), [flagship()])
    found = attempts(selinux.arm(arm))
    assert (found["read-shadow"].result, found["read-shadow"].reason) == (Result.FAILED, "the agent fell silent")
    assert found["read-shadow"].observation is None
    assert found["front-page"].result is Result.ALLOWED
    assert error_of(selinux, arm) == ""
    (healthy,) = {PERMISSIVE, ENFORCING} - {arm}
    assert whole(selinux, healthy)
    assert len(guests.selinux) == (2 if arm is ENFORCING else 1), "what failed is an error, and is not tried again"
    assert selinux.verdict is Verdict.ERROR
    assert "the agent fell silent" in selinux.reason
    assert other.verdict is Verdict.CONTAINED


def test_a_restore_that_fails_fails_the_attempt_that_needs_it(
    bench_of: BenchOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore = ScriptedMachine.restore

    def broken(machine: ScriptedMachine, name: str) -> None:
        if name == READY:
            raise MachineError("restore ready: broken")
        restore(machine, name)

    monkeypatch.setattr(ScriptedMachine, "restore", broken)
    selinux, _ = outcomes(bench_of(), [flagship()])
    lost = (Result.FAILED, "restore ready: broken")
    found = attempts(selinux.arm(PERMISSIVE))  # which starts the service itself, where the enforcing arm failed
    assert found["read-shadow"].result is Result.ALLOWED
    assert (found["front-page"].result, found["front-page"].reason) == lost
    assert {(a.result, a.reason) for a in attempts(selinux.arm(ENFORCING)).values()} == {lost}


def test_a_logging_arm_that_cannot_begin_where_it_is_to_go_on_is_an_error(
    bench_of: BenchOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = ScriptedMachine.snapshot

    def broken(machine: ScriptedMachine, name: str) -> None:
        if name == SWITCHED:
            raise MachineError("snapshot switched: no space")
        snapshot(machine, name)

    monkeypatch.setattr(ScriptedMachine, "snapshot", broken)
    selinux, _ = outcomes(bench_of(), [flagship()])
    assert whole(selinux, ENFORCING)
    assert error_of(selinux, PERMISSIVE) == "snapshot switched: no space"


NONSENSE: list[Any] = [[], "nonsense", 0, {}, {"planted": True}, {"verdict": "CONTAINED"}, {"result": visited(403)}]


@pytest.mark.parametrize("answer", NONSENSE, ids=json.dumps)
def test_an_attempt_that_is_answered_with_nonsense_is_no_block(bench_of: BenchOf, answer: Any) -> None:
    selinux, other = outcomes(bench_of(Guests(at("ask attempt", answer))), [flagship()])
    assert (selinux.verdict, other.verdict) == (Verdict.ERROR, Verdict.CONTAINED)
    for arm in (PERMISSIVE, ENFORCING):
        for found in attempts(selinux.arm(arm)).values():
            assert found.result is Result.FAILED
            assert found.reason.startswith("the agent answered nonsense: ")


# A guest that dies


@pytest.mark.parametrize(
    "pattern", ["write /sys/fs/selinux/enforce", "ask start_unit", "ask open_window", "ask attempt"]
)
def test_a_guest_that_dies_in_its_first_arm_is_replaced_for_the_other(bench_of: BenchOf, pattern: str) -> None:
    guests = Guests(dies(pattern, ENFORCING), which=0)
    bench = bench_of(guests)
    selinux, other = outcomes(bench, [flagship()])
    assert (selinux.verdict, other.verdict) == (Verdict.ERROR, Verdict.CONTAINED)
    broken = selinux.arm(ENFORCING)
    assert broken is not None
    assert broken.error == "QEMU ended" or [a.reason for a in broken.attempts] == ["QEMU ended"]
    assert whole(selinux, PERMISSIVE)
    first, second = guests.selinux
    assert "systemctl stop nginx.service" in first.channel.lines
    assert second.channel.lines[:3] == ["ask clock", "write /run/lsmlab-arm", "ask pids"], "it has a set-up of its own"
    assert second.turns == [f"snapshot {READY}", f"restore {READY}"], "one arm is left: its set-up is not kept"
    assert second.channel.written["/run/lsmlab-arm"] == b"selinux-permissive\n"
    assert bench.alive == 0


def test_a_guest_that_dies_in_the_logging_arm_is_replaced_for_the_enforcing_one(bench_of: BenchOf) -> None:
    guests = Guests(dies("ask attempt", PERMISSIVE))
    selinux, _ = outcomes(bench_of(guests), [flagship()])
    assert whole(selinux, ENFORCING)
    assert [a.reason for a in attempts(selinux.arm(PERMISSIVE)).values()] == ["QEMU ended"]
    assert len(guests.selinux) == 2
    assert [machine.turns for machine in guests.selinux] == [
        [f"snapshot {READY}", f"snapshot {SWITCHED}"], [f"snapshot {READY}", f"restore {READY}"],
    ]  # fmt: skip


def test_guests_that_die_in_every_arm_are_replaced_once(bench_of: BenchOf) -> None:
    guests = Guests(dies("ask open_window"))
    bench = bench_of(guests)
    selinux, other = outcomes(bench, [flagship()])
    assert [error_of(selinux, arm) for arm in (PERMISSIVE, ENFORCING)] == ["QEMU ended"] * 2
    assert len(guests.selinux) == run.GUESTS_A_BOOT == 2
    assert (selinux.verdict, other.verdict) == (Verdict.ERROR, Verdict.CONTAINED)
    assert bench.alive == 0


def test_arms_for_which_no_guest_is_left_are_errors(bench_of: BenchOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "GUESTS_A_BOOT", 1)
    guests = Guests(dies("ask open_window"))
    selinux, _ = outcomes(bench_of(guests), [flagship()])
    assert error_of(selinux, ENFORCING) == "QEMU ended"
    assert "no guest was left for it" in error_of(selinux, PERMISSIVE)
    record = selinux.arm(PERMISSIVE)
    assert record is not None
    assert "security=selinux" in record.command_line
    assert len(guests.selinux) == 1


@pytest.mark.parametrize("pattern", ["usermod", "ask relabel", "ask pids", "ask clock"])
def test_a_guest_that_dies_in_its_set_up_is_not_replaced(bench_of: BenchOf, pattern: str) -> None:
    guests = Guests(dies(pattern))
    selinux, other = outcomes(bench_of(guests), [flagship()])
    for arm in (PERMISSIVE, ENFORCING):
        assert error_of(selinux, arm).endswith("QEMU ended")
    assert len(guests.selinux) == 1, "what the set-up did to it, it would do again"
    assert (selinux.verdict, other.verdict) == (Verdict.ERROR, Verdict.CONTAINED)


def test_a_replacement_that_does_not_come_up_is_the_error_of_the_arms_that_are_left(bench_of: BenchOf) -> None:
    guests = Guests(dies("ask open_window"))

    def make(kernel: Kernel, task: str) -> ScriptedMachine:
        if guests.by_kernel[kernel] and kernel is Kernel.SELINUX:
            raise MachineError("the second did not come up")
        return guests(kernel, task)

    selinux, _ = outcomes(bench_of(make), [flagship()])
    found = [error_of(selinux, arm) for arm in (ENFORCING, PERMISSIVE)]
    assert found == ["QEMU ended", "the second did not come up"]


def test_a_guest_that_dies_in_an_attempt_is_an_error_not_a_verdict_on_less(bench_of: BenchOf) -> None:
    guests = Guests(dies("ask attempt", ENFORCING))
    selinux, _ = outcomes(bench_of(guests), [flagship()])
    assert list(attempts(selinux.arm(ENFORCING))) == ["read-shadow"]
    assert selinux.verdict is Verdict.ERROR


def test_a_guest_that_dies_after_its_last_attempt_is_replaced(bench_of: BenchOf) -> None:
    def die_late(nginx: Nginx, arguments: Any) -> None:
        if arguments["request"]["path"] == "/":
            nginx.machine.running = False

    guests = Guests(at("ask attempt", die_late, PERMISSIVE), which=0)
    selinux, _ = outcomes(bench_of(guests), [flagship()])
    assert selinux.verdict is Verdict.CONTAINED, selinux.reason
    assert [machine.channel.lines.count("ask attempt") for machine in guests.selinux] == [2, 4], (
        "a logging arm without the enforcing one that it went on from counts for nothing"
    )
    guests = Guests(at("ask attempt", die_late, ENFORCING), which=0)
    selinux, _ = outcomes(bench_of(guests), [flagship()])
    assert selinux.verdict is Verdict.CONTAINED, selinux.reason
    assert len(guests.selinux) == 1, "no arm is left"


def test_what_was_proved_stays_where_a_guest_does_not_end_well(
    bench_of: BenchOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(ScriptedMachine, "stop", stop)
    for found in outcomes(bench_of(), [flagship()]):
        assert found.verdict is Verdict.CONTAINED, found.reason


# The service


def test_a_service_that_does_not_start_is_in_the_record(bench_of: BenchOf) -> None:
    failed = at("ask start_unit", NOT_STARTED, ENFORCING)
    selinux, _ = outcomes(bench_of(Guests(failed)), [flagship()])
    record = selinux.arm(ENFORCING)
    assert record is not None
    assert (record.service_active, record.setup_denials, record.error) == (False, (), "")
    assert whole(selinux, PERMISSIVE)
    assert selinux.verdict is Verdict.INCONCLUSIVE


def refuse_start(nginx: Nginx, log: str) -> Any:
    nginx.state["log"] = log
    return NOT_STARTED


def test_a_service_that_is_denied_its_start(bench_of: BenchOf) -> None:
    other = "".join(
        f"{line}\n"
        for line in (
            avc(source="system_u:system_r:other_t:s0", serial=150),
            avc(permissive=1, serial=151),
            avc("bind", serial=152),
            syscall(success="yes", serial=152),
        )
    )
    failed = at("ask start_unit", lambda nginx, _: refuse_start(nginx, other + START_DENIAL), ENFORCING)
    selinux, _ = outcomes(bench_of(Guests(failed)), [flagship()])
    record = selinux.arm(ENFORCING)
    assert record is not None
    assert not record.service_active
    # Effective ones of the subject alone: not another domain's, not what was only logged, not what succeeded after all
    assert [(d.tclass, d.permissions, d.subject_domain) for d in record.setup_denials] == [
        ("tcp_socket", ("bind",), "httpd_t")
    ]
    assert selinux.verdict is Verdict.OVERBLOCKED


def test_the_window_of_a_start_begins_before_it(bench_of: BenchOf) -> None:
    guests = Guests(at("ask start_unit", NOT_STARTED))
    outcomes(bench_of(guests), [flagship()])
    assert len(guests.selinux) == 2, "a service that did not start is no start for another arm"
    for machine in guests.selinux:
        lines = machine.channel.lines
        assert lines.index("ask audit_state") < lines.index("ask close_window") < lines.index("ask open_window")
        (asked,) = machine.channel.asked_for("close_window")
        assert (asked["unit"], asked["offset"]) == ("nginx.service", audit_state()["size"])


def test_why_a_service_does_not_start_has_to_be_known(bench_of: BenchOf) -> None:
    def trouble(nginx: Nginx, line: str, _: Any) -> Any:
        if line == "ask start_unit":
            return NOT_STARTED
        if line == "ask close_window":
            return {**nginx._close_window("word"), "audit": audit_state(lost=7)}
        return None

    selinux, _ = outcomes(bench_of(Guests(trouble)), [flagship()])
    for arm in (PERMISSIVE, ENFORCING):
        assert error_of(selinux, arm) == (
            "nginx.service does not start (systemd's job ended: failed), and what it was denied is not known: "
            "audit log unavailable: "
            "7 records were lost by the kernel"
        )
    assert selinux.verdict is Verdict.ERROR


def test_a_service_that_the_set_up_stopped_stays_stopped(bench_of: BenchOf) -> None:
    guests = Guests()
    steps = [{"run": ["systemctl", "stop", "nginx.service"]}]
    after = [{"run": ["usermod", "late"]}]
    selinux, _ = outcomes(bench_of(guests), [flagship(setup=steps, after_start=after)])
    for arm in (PERMISSIVE, ENFORCING):
        record = selinux.arm(arm)
        assert record is not None
        assert not record.service_active
    (lines,) = guests.lines()  # there are steps behind the start: so each arm has one
    assert lines.count("systemctl stop nginx.service") == 1
    assert not [line for line in lines if line.startswith(("systemctl start", "usermod"))]


def test_a_service_that_did_not_run_is_started(bench_of: BenchOf) -> None:
    def stopped(nginx: Nginx, line: str, _: Any) -> None:
        if line == "ask pids":
            nginx.state["running"] = False

    guests = Guests(stopped)
    selinux, _ = outcomes(bench_of(guests), [flagship()])
    assert selinux.verdict is Verdict.CONTAINED, selinux.reason
    (lines,) = guests.lines()
    assert "systemctl stop nginx.service" not in lines
    assert lines.count("ask start_unit") == 1


def test_steps_after_the_start_are_done_in_each_arm(bench_of: BenchOf) -> None:
    guests = Guests()
    outcomes(bench_of(guests), [flagship(after_start=[{"run": ["usermod", "late"]}])])
    (lines,) = guests.lines()
    where = [n for n, line in enumerate(lines) if line == "usermod late"]
    assert [lines[n - 1] for n in where] == ["ask start_unit"] * 2
    # What was logged once is logged again: in permissive mode only where the cache is flushed
    flushed = [lines[n + 2] == "write /sys/fs/selinux/commit_pending_bools" for n in where]
    assert ([lines[n + 1] for n in where], flushed) == (["ask permissive"] * 2, [False, True])


def test_a_step_after_the_start_that_fails_is_named(bench_of: BenchOf) -> None:
    failing = at("usermod late", said(err="no", code=1), PERMISSIVE)
    after = [{"run": ["usermod", "early"]}, {"run": ["usermod", "late"]}]
    selinux, _ = outcomes(bench_of(Guests(failing)), [flagship(after_start=after)])
    assert error_of(selinux, PERMISSIVE).startswith("after_start, step 2: in the guest: usermod late: exit status 1")
    assert whole(selinux, ENFORCING)


# The end


def test_an_interrupt_in_the_consumer_stops_the_pool(bench_of: BenchOf) -> None:
    def make(kernel: Kernel, task: str) -> ScriptedMachine:
        if task.startswith("late"):
            assert bench.stopped.wait(20), "nobody stopped the guests"
            raise MachineError("QEMU ended: killed")
        return Nginx(kernel).machine

    bench = bench_of(make, guests=3)
    scenarios = [flagship("early"), *(flagship(f"late-{n}") for n in range(5))]

    def consume() -> None:
        for found in run.run(bench.as_bench, run.cases(scenarios, bench.lab)):
            assert found.scenario == "early"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consume()
    assert bench.stopped.is_set()
    assert arm_threads() == []
    assert bench.alive == 0
    assert len(bench.started) <= 3 + 3, "arms that had not begun began after the interrupt"


def test_an_interrupt_while_the_engine_waits_stops_the_pool(bench_of: BenchOf, monkeypatch: pytest.MonkeyPatch) -> None:
    def conclude(*_: object) -> Outcome:
        raise KeyboardInterrupt  # where a signal would hit: inside the generator

    monkeypatch.setattr(run, "conclude", conclude)
    bench = bench_of(guests=1)
    with pytest.raises(KeyboardInterrupt):
        outcomes(bench, [flagship(f"s{n}") for n in range(10)])
    assert bench.stopped.is_set()
    assert arm_threads() == []
    assert bench.alive == 0


def test_an_arm_that_waits_when_the_interrupt_comes_does_no_work(bench_of: BenchOf) -> None:
    worked: list[str] = []

    def make(kernel: Kernel, task: str) -> ScriptedMachine:
        if task.startswith("late"):
            assert bench.stopped.wait(20)  # it waited for another's boot, which was killed: now it is its turn
            return Nginx(kernel, lambda _, line, __: worked.append(line)).machine
        return Nginx(kernel).machine

    bench = bench_of(make)
    found = run.run(bench.as_bench, run.cases([flagship("early"), flagship("late")], bench.lab))
    next(found)
    next(found)
    deadline = time.monotonic() + 10
    while not any(task.startswith("late") for _, task in bench.started):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    found.close()  # type: ignore[attr-defined]
    assert arm_threads() == []
    assert worked == []


def test_a_guest_that_an_interrupt_ended_is_not_replaced(bench_of: BenchOf) -> None:
    reached = threading.Event()

    def hang(nginx: Nginx, _: Any) -> Any:
        reached.set()
        assert bench.stopped.wait(20)
        raise ChannelError("QEMU ended: killed")

    def make(kernel: Kernel, task: str) -> ScriptedMachine:
        late = task.startswith("late")
        return Nginx(kernel, at("ask attempt", hang) if late else lambda *_: None).machine

    bench = bench_of(make, guests=1)
    found = run.run(bench.as_bench, run.cases([flagship("early"), flagship("late")], bench.lab))
    next(found)
    next(found)
    assert reached.wait(10)
    found.close()  # type: ignore[attr-defined]
    assert arm_threads() == []
    assert bench.made == len(Kernel) + 1
    assert bench.alive == 0


# Cases


def test_cases_are_what_scenario_and_lab_share(lab: Lab) -> None:
    both = flagship()
    (only,) = [both.model_copy(update={"expected": {APPARMOR: both.expected[APPARMOR]}})]
    assert [(c.scenario, c.framework) for c in run.cases([both, only], lab)] == [
        (both, SELINUX), (both, APPARMOR), (only, APPARMOR),
    ]  # fmt: skip
    assert [c.framework for c in run.cases([both, only], lab, [SELINUX])] == [SELINUX]
    assert run.cases([only], lab, [SELINUX]) == ()
    assert run.cases([], lab) == ()
    assert [c.framework for c in run.cases([both], lab, [APPARMOR, SELINUX, APPARMOR])] == [SELINUX, APPARMOR]


def test_a_framework_that_the_lab_lacks(lab: Lab) -> None:
    half = lab.model_copy(update={"frameworks": (SELINUX,)})
    assert [c.framework for c in run.cases([flagship()], half)] == [SELINUX]
    with pytest.raises(DefinitionError, match="lab debian-13 has no AppArmor; it has: selinux"):
        run.cases([flagship()], half, [APPARMOR])


def test_a_service_that_the_lab_lacks(lab: Lab) -> None:
    wrong = scenario(subject={"service": "ngin", "selinux": "httpd_t", "apparmor": "nginx"})
    with pytest.raises(DefinitionError) as caught:
        run.cases([flagship(), wrong], lab)
    assert "unknown service of lab debian-13 'ngin'" in str(caught.value)
    assert "Did you mean 'nginx'?" in str(caught.value)


# Exit codes

FINE = outcome(1)
ERROR = outcome(2, verdict=Verdict.ERROR)
WRONG = outcome(3, verdict=Verdict.NOT_CONTAINED)
MEANT = outcome(4, verdict=Verdict.DAC_BLOCKED, expected=Verdict.DAC_BLOCKED)
UNCLEAR = outcome(5, verdict=Verdict.INCONCLUSIVE)


@pytest.mark.parametrize(
    ("kept", "code"),
    [
        ([], 5),
        ([FINE], 0),
        ([FINE, MEANT], 0),
        ([WRONG], 1),
        ([UNCLEAR], 1),
        ([ERROR], 3),
        ([FINE, ERROR], 3),
        ([ERROR, FINE], 3),
        ([WRONG, FINE], 1),
        ([WRONG, ERROR], 1),
        ([ERROR, WRONG], 1),
        ([ERROR, UNCLEAR, FINE], 1),
    ],
    ids=lambda value: "+".join(o.verdict for o in value) or "nothing" if isinstance(value, list) else None,
)
def test_the_exit_code_of_mixed_results(kept: list[Outcome], code: int) -> None:
    assert exit_code(kept) == code


@pytest.mark.parametrize("verdict", [v for v in Verdict if v not in {Verdict.CONTAINED, Verdict.ERROR}])
def test_every_other_verdict_is_a_mismatch_unless_expected(verdict: Verdict) -> None:
    assert exit_code([outcome(verdict=verdict)]) == 1
    assert exit_code([outcome(verdict=verdict, expected=verdict)]) == 0
