"""The engine over made-up guests: what one broken part does to the rest, what is shared, and how it all ends."""

from __future__ import annotations

import errno
import itertools
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from builders import HTTPD, INODE, SHADOW, apparmor, avc, outcome, scenario, syscall

from fakes import Answer, FakeBench, ScriptedChannel, ScriptedMachine, said
from lsmlab import discovery, run
from lsmlab.cli import exit_code
from lsmlab.errors import ChannelError, DefinitionError, FrameworkError, MachineError
from lsmlab.lab import Lab
from lsmlab.machine import qemu
from lsmlab.outcome import ArmRecord, AttemptRecord, Outcome
from lsmlab.scenario import Scenario
from lsmlab.terms import Arm, Framework, Kernel, Result, Verdict, arms_of

SELINUX, APPARMOR = Framework.SELINUX, Framework.APPARMOR
MASTER, WORKER = 481, 482
LSM = {
    Kernel.NONE: "lockdown,capability,yama",
    Kernel.SELINUX: "lockdown,capability,yama,selinux",
    Kernel.APPARMOR: "lockdown,capability,yama,apparmor",
}

RECORDS = {
    Kernel.SELINUX: f"{avc()}\n{syscall()}\n",
    Kernel.APPARMOR: f"{apparmor()}\n{syscall(stamp='1795509850.164', serial=216, subject='nginx')}\n",
}
"""Of the refused read, under each framework."""


OPENING = [("rest", "steady\n"), ("drained", "seen\n")]


class Nginx:
    """A guest with nginx in it, by script: DAC lets it read /etc/shadow, the enforcing frameworks do not.

    `answers` go before its own.
    """

    def __init__(self, kernel: Kernel, answers: Sequence[tuple[str, Answer]] = ()) -> None:
        self._kernel = kernel
        self._enforcing = False
        self._planted: dict[str, str] = {}
        self._log = ""
        own: list[tuple[str, Answer]] = [
            (r"window-open ", self._window_open),
            (r"window-close ", self._window_close),
            (r"plant ", self._plant),
            (r"curl ", self._curl),
            (r"setenforce ", self._setenforce),
            (r"cat /sys/fs/selinux/enforce", lambda _: said(f"{int(self._enforcing)}")),
            (r"stat -c %s /var/log/audit/audit.log", said("100\n")),
            (r"mark ", self._mark),
            (r"write |mkdir -p|systemctl (is-active --quiet|restart) nginx.service", said()),
            (r"sh -c ", said()),  # a switch of the kernel's: echo 1 > ...
        ]
        self.machine = ScriptedMachine(ScriptedChannel([*answers, *own]))

    def _mark(self, argv: tuple[str, ...]) -> Any:
        self._enforcing = Arm(argv[-1]).enforcing and self._kernel is Kernel.APPARMOR  # SELinux: setenforce says
        return said()

    def _setenforce(self, argv: tuple[str, ...]) -> Any:
        self._enforcing = argv[1] == "1"
        return said()

    def _plant(self, argv: tuple[str, ...]) -> Any:
        self._planted[argv[-2]] = argv[-1]
        return said()

    def _curl(self, argv: tuple[str, ...]) -> Any:
        attack = argv[-1].endswith("/etc/shadow")
        if attack and self._enforcing:
            self._log = RECORDS[self._kernel]
            return said("<h1>403 Forbidden</h1>", err="http_code=403")
        self._log = f"{avc(permissive=1)}\n" if attack and self._kernel is Kernel.SELINUX else ""
        return said("\n".join(self._planted.values()), err="http_code=200")

    def _window_open(self, argv: tuple[str, ...]) -> Any:
        nonce = argv[4]
        return said(
            self._sections(nonce, [*OPENING, *self._subject(), ("object", self._object()), *self._kernel_facts(100)])
        )

    def _window_close(self, argv: tuple[str, ...]) -> Any:
        nonce, sentinel = argv[4], argv[7]
        window = f"{self._log}type=USER msg=audit(9.9:999): text={sentinel}\n"
        sections = [("sentinel", "sent\nseen\n"), ("window", window), *self._kernel_facts(100 + len(window))]
        return said(self._sections(nonce, [*sections, *self._subject()]))

    @property
    def _profile(self) -> str:
        return f"nginx ({'enforce' if self._enforcing else 'complain'})"

    @staticmethod
    def _sections(nonce: str, sections: Sequence[tuple[str, str]]) -> str:
        return "".join(f"\n@@{nonce} {name}\n{body}" for name, body in [*sections, ("end", "")])

    def _kernel_facts(self, size: int) -> list[tuple[str, str]]:
        return [
            ("lsm", LSM[self._kernel] + "\n"),
            ("enforce", f"{int(self._enforcing)}\n" if self._kernel is Kernel.SELINUX else "\n"),
            ("profiles", f"{self._profile}\n" if self._kernel is Kernel.APPARMOR else ""),
            ("auditctl", "enabled 1\npid 300\nlost 0\nbacklog 0\n"),
            ("log", f"65024:77 {size}\n"),
        ]

    def _subject(self) -> list[tuple[str, str]]:
        label = {Kernel.NONE: "", Kernel.SELINUX: HTTPD, Kernel.APPARMOR: self._profile}[self._kernel]

        def process(pid: int, parent: int, uid: int, groups: str, caps: int, *, main: bool) -> str:
            status = {
                "Name": "nginx", "PPid": parent, "Uid": "\t".join([str(uid)] * 4), "Gid": "\t".join([str(uid)] * 4),
                "Groups": groups, "CapPrm": f"{caps:x}", "CapEff": f"{caps:x}", "CapBnd": "1ffffffffff",
                "NoNewPrivs": 0, "Seccomp": 0,
            }  # fmt: skip
            head = f"pid\t{pid}\n" + ("main\t1\n" if main else "")
            head += f"exe\t/usr/sbin/nginx\nuserns\tuser:[1]\nlabel\t{label}\n"
            return head + "".join(f"status\t{key}:\t{value}\n" for key, value in status.items())

        processes = process(MASTER, 1, 0, "", (1 << 41) - 1, main=True)
        processes += process(WORKER, MASTER, 33, "33 42", 0, main=False)
        return [
            ("service", f"ActiveState=active\nSubState=running\nMainPID={MASTER}\nResult=success\n"),
            ("processes", processes),
            ("rootns", "user:[1]\n"),
        ]

    @staticmethod
    def _object() -> str:
        chain = (("/", "41ed", 0, 2), ("/etc", "41ed", 0, 3), ("/etc/shadow", "81a0", 42, INODE))
        lines = [f"path\t{p}\nstat\t{mode} 0 {gid} fe00 {ino} root group\n" for p, mode, gid, ino in chain]
        return f"real\t/etc/shadow\nmount\trw,relatime /dev/vda\nlabel\t{SHADOW}\n" + "".join(lines)


BENIGN = {
    "id": "front-page",
    "kind": "benign",
    "http": {"path": "/"},
    "canary": {"file": "/var/www/html/index.html", "line": "<p>{canary}</p>"},
    "allowed_if": {"status": 200, "output": "<p>{canary}</p>"},
    "blocked_if": [{"status": 403}],
}


def flagship(name: str = "nginx-reads-shadow") -> Scenario:
    """The attack and a benign attempt."""
    return scenario(id=name, attempts=[scenario().attempts[0].model_dump(by_alias=True), BENIGN])


@pytest.fixture(scope="module")
def lab() -> Lab:
    return discovery.load_lab("debian-13")


@pytest.fixture
def bench_of(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeBench]:
    """Makes a bench of made-up guests, which die as real ones do when the engine says so."""

    def make(make_guest: Callable[[Kernel, str], ScriptedMachine] | None = None) -> FakeBench:
        bench = FakeBench(lab, make_guest or (lambda kernel, _: Nginx(kernel).machine))
        monkeypatch.setattr(qemu, "stop_all", bench.stop_all)
        return bench

    return make


BenchOf = Callable[..., FakeBench]


def outcomes(bench: FakeBench, scenarios: Sequence[Scenario], *, guests: int = 4) -> list[Outcome]:
    return list(run.run(bench.as_bench, run.cases(scenarios, bench.lab), guests=guests))


def attempts(arm: ArmRecord | None) -> dict[str, AttemptRecord]:
    assert arm is not None
    return {a.attempt: a for a in arm.attempts}


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
            assert arm.error == ""
            assert "audit=1" in arm.command_line
            assert list(attempts(arm)) == ["read-shadow", "front-page"]
            shadow = attempts(arm)["read-shadow"]
            assert shadow.result is (Result.BLOCKED if arm.arm.enforcing else Result.ALLOWED)
            assert shadow.dac is not None
            assert shadow.dac.permitted
            assert attempts(arm)["front-page"].result is Result.ALLOWED
    assert selinux.id != other.id
    assert bench.alive == 0


def test_each_attempt_but_the_first_starts_from_the_snapshot(bench_of: BenchOf) -> None:
    machines: list[ScriptedMachine] = []

    def make(kernel: Kernel, _: str) -> ScriptedMachine:
        machines.append(Nginx(kernel).machine)
        return machines[-1]

    outcomes(bench_of(make), [flagship()])
    assert [(m.snapshots, m.restored, m.running) for m in machines] == [([run.READY], 1, False)] * 5


def test_the_control_is_run_once_for_both_frameworks(bench_of: BenchOf) -> None:
    bench = bench_of()
    selinux, other = outcomes(bench, [flagship()])
    kernels = [kernel for kernel, _ in bench.started]
    assert sorted(kernels) == sorted([Kernel.NONE, *[Kernel.SELINUX] * 2, *[Kernel.APPARMOR] * 2])
    assert len({task for _, task in bench.started}) == 5
    assert selinux.arm(Arm.DAC) == other.arm(Arm.DAC)


def test_one_framework_needs_three_arms(bench_of: BenchOf, lab: Lab) -> None:
    bench = bench_of()
    (found,) = run.run(bench.as_bench, run.cases([flagship()], lab, [SELINUX]), guests=1)
    assert found.framework is SELINUX
    assert sorted(k for k, _ in bench.started) == sorted([Kernel.NONE, Kernel.SELINUX, Kernel.SELINUX])


@pytest.mark.parametrize("guests", [1, 3, 8])
def test_outcomes_come_in_the_order_asked_for(bench_of: BenchOf, guests: int) -> None:
    pause = random.Random(guests)

    def make(kernel: Kernel, _: str) -> ScriptedMachine:
        time.sleep(pause.uniform(0, 0.03))
        return Nginx(kernel).machine

    names = ["zebra", "ape", "mule", "bee"]
    found = outcomes(bench_of(make), [flagship(n) for n in names], guests=guests)
    assert [(o.scenario, o.framework) for o in found] == list(itertools.product(names, (SELINUX, APPARMOR)))
    assert all(o.verdict is Verdict.CONTAINED for o in found)


def test_an_outcome_comes_before_the_last_arm_has_ended(bench_of: BenchOf) -> None:
    release = threading.Event()

    def make(kernel: Kernel, task: str) -> ScriptedMachine:
        if task.startswith("late"):
            assert release.wait(20)
        return Nginx(kernel).machine

    bench = bench_of(make)
    found = run.run(bench.as_bench, run.cases([flagship("early"), flagship("late")], bench.lab), guests=4)
    assert [next(found).scenario, next(found).scenario] == ["early", "early"]
    release.set()
    assert [o.scenario for o in found] == ["late", "late"]
    assert arm_threads() == []


# What breaks


@pytest.mark.parametrize("error", [MachineError("it did not come up", hint="See its console."), FrameworkError("no")])
def test_an_arm_whose_guest_breaks_is_an_error_and_the_others_go_on(bench_of: BenchOf, error: Exception) -> None:
    def make(kernel: Kernel, _: str) -> ScriptedMachine:
        if kernel is Kernel.SELINUX:
            raise error
        return Nginx(kernel).machine

    selinux, other = outcomes(bench_of(make), [flagship()])
    assert selinux.verdict is Verdict.ERROR
    assert str(error).splitlines()[0] in selinux.reason
    for arm in (Arm.SELINUX_PERMISSIVE, Arm.SELINUX_ENFORCING):
        record = selinux.arm(arm)
        assert record is not None
        assert (record.error, record.attempts) == (str(error), ())
        assert "security=selinux" in record.command_line
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


def test_an_operating_system_error_in_an_arm_is_an_error_of_that_arm(bench_of: BenchOf) -> None:
    def make(kernel: Kernel, _: str) -> ScriptedMachine:
        if kernel is Kernel.SELINUX:
            raise OSError(errno.ENOSPC, "No space left on device", "/cache/scratch/x.qcow2")
        return Nginx(kernel).machine

    selinux, other = outcomes(bench_of(make), [flagship()])
    assert (selinux.verdict, other.verdict) == (Verdict.ERROR, Verdict.CONTAINED)
    assert "No space left" in selinux.reason


def with_answer(pattern: str, answer: Answer, where: Kernel = Kernel.SELINUX) -> Callable[..., ScriptedMachine]:
    def make(kernel: Kernel, _: str) -> ScriptedMachine:
        return Nginx(kernel, [(pattern, answer)] if kernel is where else []).machine

    return make


def test_a_channel_error_in_one_attempt_fails_that_attempt_only(bench_of: BenchOf) -> None:
    broken = with_answer(r"curl .*:80/static", ChannelError("the agent fell silent"))
    selinux, other = outcomes(bench_of(broken), [flagship()])
    found = attempts(selinux.arm(Arm.SELINUX_ENFORCING))
    assert (found["read-shadow"].result, found["read-shadow"].reason) == (Result.FAILED, "the agent fell silent")
    assert found["read-shadow"].observation is None
    assert found["front-page"].result is Result.ALLOWED
    assert selinux.verdict is Verdict.ERROR
    assert "the agent fell silent" in selinux.reason
    assert other.verdict is Verdict.CONTAINED


def test_a_guest_that_dies_in_an_attempt_is_an_error_not_a_verdict_on_less(bench_of: BenchOf) -> None:
    def make(kernel: Kernel, task: str) -> ScriptedMachine:
        def die(_: object) -> Any:
            machine.running = False
            raise ChannelError("QEMU ended")

        machine = Nginx(kernel, [(r"curl .*:80/static", die)] if task.endswith("enforcing") else []).machine
        return machine

    selinux, _ = outcomes(bench_of(make), [flagship()])
    record = selinux.arm(Arm.SELINUX_ENFORCING)
    assert list(attempts(record)) == ["read-shadow"]
    assert selinux.verdict is Verdict.ERROR


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (r"mark ", "date: broken"),
        (r"setenforce ", "setenforce"),
        (r"stat -c %s", "date: broken"),
        (r"window-open ", "date: broken"),
    ],
)
def test_what_breaks_on_the_way_into_an_arm_is_that_arms_error(bench_of: BenchOf, pattern: str, words: str) -> None:
    bench = bench_of(with_answer(pattern, said(err="date: broken", code=1)))
    selinux, other = outcomes(bench, [flagship()])
    assert (selinux.verdict, other.verdict) == (Verdict.ERROR, Verdict.CONTAINED)
    assert words in selinux.reason
    assert bench.alive == 0


@pytest.mark.parametrize("answer", ["", "nonsense", "\n@@other end\n"])
def test_a_guest_that_answers_nonsense_is_an_error(bench_of: BenchOf, answer: str) -> None:
    selinux, other = outcomes(bench_of(with_answer(r"window-close ", said(answer))), [flagship()])
    assert (selinux.verdict, other.verdict) == (Verdict.ERROR, Verdict.CONTAINED)


def test_a_guest_whose_log_size_is_no_number_is_an_error(bench_of: BenchOf) -> None:
    selinux, other = outcomes(bench_of(with_answer(r"stat -c %s", said("nonsense\n"))), [flagship()])
    assert (selinux.verdict, other.verdict) == (Verdict.ERROR, Verdict.CONTAINED)


def test_a_service_that_does_not_start_is_in_the_record(bench_of: BenchOf) -> None:
    stopped = with_answer(r"systemctl restart", said(err="Job failed", code=1))
    selinux, _ = outcomes(bench_of(stopped), [flagship()])
    record = selinux.arm(Arm.SELINUX_ENFORCING)
    assert record is not None
    assert not record.service_active


# The end


def test_an_interrupt_in_the_consumer_stops_the_pool(bench_of: BenchOf) -> None:
    def make(kernel: Kernel, task: str) -> ScriptedMachine:
        if task.startswith("late"):
            assert bench.stopped.wait(20), "nobody stopped the guests"
            raise MachineError("QEMU ended: killed")
        return Nginx(kernel).machine

    bench = bench_of(make)
    scenarios = [flagship("early"), *(flagship(f"late-{n}") for n in range(5))]

    def consume() -> None:
        for found in run.run(bench.as_bench, run.cases(scenarios, bench.lab), guests=3):
            assert found.scenario == "early"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consume()
    assert bench.stopped.is_set()
    assert arm_threads() == []
    assert bench.alive == 0
    assert len(bench.started) <= 5 + 3, "arms that had not begun began after the interrupt"


def test_an_interrupt_while_the_engine_waits_stops_the_pool(bench_of: BenchOf, monkeypatch: pytest.MonkeyPatch) -> None:
    def conclude(*_: object) -> Outcome:
        raise KeyboardInterrupt  # where a signal would hit: inside the generator

    monkeypatch.setattr(run, "conclude", conclude)
    bench = bench_of()
    with pytest.raises(KeyboardInterrupt):
        outcomes(bench, [flagship(f"s{n}") for n in range(10)], guests=1)
    assert bench.stopped.is_set()
    assert arm_threads() == []
    assert bench.alive == 0


def test_an_arm_that_waits_when_the_interrupt_comes_does_no_work(bench_of: BenchOf) -> None:
    worked: list[str] = []

    def work(argv: tuple[str, ...]) -> Any:
        worked.append(argv[-1])
        return said()

    def make(kernel: Kernel, task: str) -> ScriptedMachine:
        if task.startswith("late"):
            assert bench.stopped.wait(20)  # it waited for another's boot, which was killed: now it is its turn
            return Nginx(kernel, [(r"mark ", work)]).machine
        return Nginx(kernel).machine

    bench = bench_of(make)
    found = run.run(bench.as_bench, run.cases([flagship("early"), flagship("late")], bench.lab), guests=4)
    next(found)
    next(found)
    deadline = time.monotonic() + 10
    while not any(task.startswith("late") for _, task in bench.started):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    found.close()  # type: ignore[attr-defined]
    assert arm_threads() == []
    assert worked == []


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
