"""The pytest front door over a fake engine: what is collected, what passes, what is shared, skipped and kept."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import lsmlab.bench
import lsmlab.host
import lsmlab.image.build
import lsmlab.report
import lsmlab.run
from lsmlab import discovery, pytest_plugin, testinfra_backend
from lsmlab.channel.base import CommandResult
from lsmlab.errors import HostError, LsmlabError
from lsmlab.lab import Lab
from lsmlab.outcome import ArmRecord, AttemptRecord, Environment, Outcome
from lsmlab.progress import Progress
from lsmlab.run import Case
from lsmlab.store import Store
from lsmlab.terms import Arm, AttemptKind, Framework, Kernel, Result, Verdict, arms_of

pytest_plugins = ["pytester"]

REPO = Path(__file__).resolve().parents[2]
ID = "nginx-reads-shadow"
FILE = f"scenarios/{ID}/scenario.yaml"
SELINUX, APPARMOR = f"{FILE}::{ID}[debian-13-selinux]", f"{FILE}::{ID}[debian-13-apparmor]"
ENVIRONMENT = Environment(
    lsmlab="0", image="0" * 64, kernel="6.12", packages={}, qemu="QEMU 10", accelerator="tcg", memory_mib=768
)


def outcome(case: Case, number: int, verdict: Verdict) -> Outcome:
    result = Result.BLOCKED if verdict is Verdict.CONTAINED else Result.ALLOWED
    attack = AttemptRecord(attempt="read-shadow", kind=AttemptKind.ATTACK, result=result, reason="seen")
    return Outcome(
        id=f"{number:012x}",
        recorded="2025-01-01T00:00:00+00:00",
        scenario=case.scenario.id,
        scenario_digest="0" * 64,
        title=case.scenario.title,
        technique=case.scenario.technique,
        lab="debian-13",
        framework=case.framework,
        verdict=verdict,
        expected=case.scenario.expected[case.framework].verdict,
        because="of the policy",
        reason="it was seen",
        environment=ENVIRONMENT,
        arms=tuple(ArmRecord(arm=arm, attempts=(attack,)) for arm in arms_of(case.framework)),
    )


@dataclass(slots=True)
class FakeGuest:
    """A channel and a machine in one: says what the tests look for, and SELinux obeys."""

    commands: list[tuple[str, ...]] = field(default_factory=list)
    enforcing: bool = False

    @property
    def channel(self) -> FakeGuest:
        return self

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float = 60) -> CommandResult:
        self.commands.append(tuple(argv))
        mode = b"Enforcing\n" if self.enforcing else b"Permissive\n"
        answer = mode if argv[-1] == "getenforce" else b""
        if argv[-1] == "kill -9 $$":
            return CommandResult(tuple(argv), None, 9, b"", b"", 0.0)
        return CommandResult(tuple(argv), 3 if argv[-1] == "exit 3" else 0, None, answer, b"a word\n", 0.0)

    def write_file(self, path: str, data: bytes, *, mode: int | None = None, owner: str | None = None) -> None:
        self.commands.append(("write", path, data.decode()))
        if path == "/sys/fs/selinux/enforce":
            self.enforcing = data == b"1"

    def ask(self, operation: str, *, within: float = 30, **arguments: Any) -> Any:
        self.commands.append(("ask", operation))
        if operation == "mode":
            return {"lsm": ["selinux"], "selinux_enforcing": self.enforcing, "profiles": None}
        assert operation == "clock"
        return None


@dataclass(slots=True)
class Engine:
    """Stands for run.py and bench.py, and writes down how they were used."""

    verdicts: dict[Framework, Verdict] = field(default_factory=dict)
    error: LsmlabError | None = None
    bench_error: LsmlabError | None = None
    runs: list[list[str]] = field(default_factory=list)
    opened: list[tuple[str, str, int | None]] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    guests: list[tuple[Kernel, FakeGuest]] = field(default_factory=list)
    stopped: int = 0

    def run(self, bench: Any, wanted: Sequence[Case]) -> Iterator[Outcome]:
        self.runs.append([f"{c.scenario.id} {c.framework}" for c in wanted])
        if self.error is not None:
            raise self.error
        bench.progress.step("an arm", "doing something")
        for number, case in enumerate(wanted):
            yield outcome(case, 16 * len(self.runs) + number, self.verdicts.get(case.framework, Verdict.CONTAINED))

    @contextlib.contextmanager
    def open_bench(
        self, lab: Lab, progress: Progress, *, accelerator: str = "auto", guests: int | None = None
    ) -> Iterator[Any]:
        self.opened.append((lab.id, accelerator, guests))
        if self.bench_error is not None:
            raise self.bench_error
        yield types.SimpleNamespace(lab=lab, progress=progress, guest=self.guest)
        self.closed.append(lab.id)

    @contextlib.contextmanager
    def guest(self, kernel: Kernel, task: str, *, kept_open: bool = False) -> Iterator[FakeGuest]:
        assert kept_open, "a guest that a test session keeps takes no place of an experiment's"
        guest = FakeGuest()
        self.guests.append((kernel, guest))
        yield guest
        self.stopped += 1


@pytest.fixture
def engine(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The fake engine, in a project with the flagship scenario, on a machine that has every program."""
    fake = Engine()
    monkeypatch.setenv("LSMLAB_HOME", str(pytester.path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(lsmlab.run, "run", fake.run)
    monkeypatch.setattr(lsmlab.bench, "open_bench", fake.open_bench)
    monkeypatch.setattr(lsmlab.host, "find", lambda program: f"/usr/bin/{program}")
    monkeypatch.setattr(lsmlab.image.build, "find", lambda _: None)
    own: dict[str, Any] = {"_bench_of": None, "_running": {}, "_resources": contextlib.ExitStack()}
    for name, value in own.items():  # the session that runs this test keeps its own
        monkeypatch.setattr(testinfra_backend, name, value)
    text = types.SimpleNamespace(
        failure_text=lambda o: f"{o.framework}: expected {o.expected}, found {o.verdict}\nmore"
    )
    monkeypatch.setattr(lsmlab.report, "text", text, raising=False)
    shutil.copytree(REPO / "scenarios" / ID, pytester.path / "scenarios" / ID)
    return fake


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    quick = ("-p", "no:cacheprovider", "-p", "no:hypothesispytest")  # hypothesis would be imported again in each run
    return pytester.runpytest_inprocess(*quick, "-ra", *arguments)


def ids(result: pytest.RunResult) -> list[str]:
    return [line for line in result.outlines if "::" in line]


@pytest.mark.usefixtures("engine")
def test_one_item_for_each_framework_with_a_stable_id(pytester: pytest.Pytester) -> None:
    assert ids(run(pytester, "--collect-only", "-q")) == [SELINUX, APPARMOR]


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize(
    "text", ["kind: kubernetes/scenario\n", "steps: [one]\n", "", "{{ jinja }}\n", "kind: lsmlab/lab\n", "\x00\xff"]
)
def test_other_peoples_scenario_files_are_left_alone(pytester: pytest.Pytester, text: str) -> None:
    other = pytester.path / "molecule" / "scenario.yaml"
    other.parent.mkdir()
    other.write_text(text)
    result = run(pytester, "--collect-only", "-q", "molecule")
    assert result.ret == pytest.ExitCode.NO_TESTS_COLLECTED
    result.assert_outcomes()


def test_expected_verdicts_pass_and_the_control_arm_is_shared(pytester: pytest.Pytester, engine: Engine) -> None:
    result = run(pytester, "scenarios", "--lsmlab-guests", "2", "--lsmlab-accel", "tcg")
    result.assert_outcomes(passed=2)
    assert engine.runs == [[f"{ID} selinux", f"{ID} apparmor"]]
    assert (engine.opened, engine.closed) == ([("debian-13", "tcg", 2)], ["debian-13"])
    assert [(o.framework, o.verdict) for _, o in reversed(Store().recent())] == [
        (Framework.SELINUX, Verdict.CONTAINED),
        (Framework.APPARMOR, Verdict.CONTAINED),
    ]
    assert Store().path.is_relative_to(pytester.path)


@pytest.mark.parametrize(
    ("arguments", "items", "cases"),
    [
        (["--lsmlab-framework", "apparmor"], 1, ["apparmor"]),
        (["--lsmlab-framework", "apparmor", "--lsmlab-framework", "selinux"], 2, ["selinux", "apparmor"]),
        (["-k", "selinux"], 1, ["selinux"]),
        (["--deselect", SELINUX], 1, ["apparmor"]),
    ],
)
def test_what_is_not_selected_is_not_run(
    pytester: pytest.Pytester, engine: Engine, arguments: list[str], items: int, cases: list[str]
) -> None:
    assert run(pytester, *arguments, "scenarios").parseoutcomes()["passed"] == items
    assert engine.runs == [[f"{ID} {c}" for c in cases]]


def test_one_item_by_its_id(pytester: pytest.Pytester, engine: Engine) -> None:
    run(pytester, APPARMOR).assert_outcomes(passed=1)
    assert engine.runs == [[f"{ID} apparmor"]]


def test_the_vm_marker_selects_scenarios(pytester: pytest.Pytester, engine: Engine) -> None:
    run(pytester, "--strict-markers", "-m", "not lsmlab_vm").assert_outcomes(deselected=2)
    assert engine.opened == []


def test_a_worker_of_xdist_runs_its_own_items_only(pytester: pytest.Pytester, engine: Engine) -> None:
    pytester.makeconftest("def pytest_configure(config): config.workerinput = {}")
    run(pytester, "scenarios")
    assert engine.runs == [[f"{ID} selinux"], [f"{ID} apparmor"]]


def test_pytest_may_lack_its_terminal(pytester: pytest.Pytester, engine: Engine) -> None:
    assert pytester.inline_run("-p", "no:terminal", "-p", "no:hypothesispytest", "scenarios").ret == 0
    assert len(engine.runs) == 1


def test_a_mismatch_fails_with_the_report_alone(pytester: pytest.Pytester, engine: Engine) -> None:
    engine.verdicts[Framework.SELINUX] = Verdict.NOT_CONTAINED
    result = run(pytester, "scenarios")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        [
            "*_ nginx-reads-shadow?debian-13-selinux? _*",
            "selinux: expected CONTAINED, found NOT_CONTAINED",
            "more",
            f"FAILED {SELINUX.replace('[', '?').replace(']', '?')} - Failed: selinux: expected CONTAINED*",
        ]
    )
    result.stdout.no_fnmatch_line("*pytest_plugin.py*")
    assert Store().count() == 2


def test_an_error_is_a_failure(pytester: pytest.Pytester, engine: Engine) -> None:
    engine.verdicts[Framework.APPARMOR] = Verdict.ERROR
    result = run(pytester, "scenarios", "--lsmlab-framework", "apparmor")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["apparmor: expected CONTAINED, found ERROR"])


def test_a_verdict_that_the_file_expects_passes_whatever_it_is(pytester: pytest.Pytester, engine: Engine) -> None:
    path = pytester.path / FILE
    path.write_text(path.read_text().replace("verdict: CONTAINED", "verdict: NOT_CONTAINED"))
    engine.verdicts = dict.fromkeys(Framework, Verdict.NOT_CONTAINED)
    run(pytester, "scenarios").assert_outcomes(passed=2)


def test_junit_names_outcome_and_verdict(pytester: pytest.Pytester, engine: Engine) -> None:
    engine.verdicts[Framework.SELINUX] = Verdict.NOT_CONTAINED
    run(pytester, "scenarios", "--junitxml=junit.xml")
    xml = (pytester.path / "junit.xml").read_text()
    for name, value in (("outcome", f"{16:012x}"), ("verdict", "CONTAINED"), ("verdict", "NOT_CONTAINED")):
        assert f'<property name="lsmlab_{name}" value="{value}"' in xml
    assert "selinux: expected CONTAINED, found NOT_CONTAINED" in xml


def test_an_error_of_ours_has_no_traceback(pytester: pytest.Pytester, engine: Engine) -> None:
    engine.error = HostError("12 MiB of memory are available", hint="Free some memory.")
    result = run(pytester, "scenarios")
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["12 MiB of memory are available", "  Free some memory."])
    result.stdout.no_fnmatch_line("*pytest_plugin.py*")
    assert Store().count() == 0


def test_a_bench_that_cannot_be_opened_is_not_tried_again(pytester: pytest.Pytester, engine: Engine) -> None:
    engine.bench_error = HostError("no space left")
    result = run(pytester, "scenarios")
    result.assert_outcomes(failed=2)
    assert engine.opened == [("debian-13", "auto", None)]
    assert engine.runs == []


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("title:", "titel:", f"*{FILE}:3: titel: unknown key; did you mean 'title'?"),
        ("subject: #", "subject: [", f"*{FILE}:*: not valid YAML*"),
        ("service: nginx", "service: ngnix", "*unknown service of lab debian-13 'ngnix'*"),
        ("from: site.conf", "from: gone.conf", f"*{FILE}:*: no such file: */gone.conf"),
    ],
)
def test_a_broken_scenario_is_a_collection_error(pytester: pytest.Pytester, old: str, new: str, fault: str) -> None:
    path = pytester.path / FILE
    path.write_text(path.read_text().replace(old, new))
    result = run(pytester, "scenarios")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([fault])
    result.stdout.no_fnmatch_line("*Traceback*")
    result.stdout.no_fnmatch_line("*pytest_plugin.py*")


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lab", "debian-31"], "*unknown lab 'debian-31'*"),
        (["--lsmlab-lab", "debian-31"], "*unknown lab 'debian-31'*"),
        (["--lsmlab-arm", "selinux"], "*invalid choice: 'selinux'*"),
        (["--lsmlab-guests", "0"], "*expected a number from 1 on, found '0'*"),
        (["--lsmlab-framework", "smack"], "*invalid choice: 'smack'*"),
        (["--require", "kvm"], "*invalid choice: 'kvm'*"),
    ],
)
def test_wrong_options_are_usage_errors(pytester: pytest.Pytester, arguments: list[str], message: str) -> None:
    result = run(pytester, *arguments, "scenarios")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([message])


def test_another_lab(pytester: pytest.Pytester, engine: Engine) -> None:
    result = run(pytester, "scenarios", "--lab", "debian-12", "-v")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["*::nginx-reads-shadow?debian-12-selinux? PASSED*"])
    assert engine.opened == [("debian-12", "auto", None)]


@pytest.mark.parametrize("options", [(), ("-q",)])
def test_scenarios_of_another_lab_are_said_to_be_left_out(
    pytester: pytest.Pytester, engine: Engine, options: tuple[str, ...]
) -> None:
    result = run(pytester, "scenarios", *options)
    assert "left out" not in result.stdout.str()
    other = "container-reads-host-shadow"
    shutil.copytree(REPO / "scenarios" / other, pytester.path / "scenarios" / other)
    result = run(pytester, "scenarios", *options)
    result.assert_outcomes(passed=2)
    words = "lab debian-13: 1 scenario is about containers or services that it has not: left out"
    assert result.outlines.count(words) == 1
    result = run(pytester, f"scenarios/{other}", *options)
    assert (result.ret, result.outlines.count(words)) == (pytest.ExitCode.NO_TESTS_COLLECTED, 1)


def _lacking(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    monkeypatch.setattr(lsmlab.host, "find", lambda program: None if program in missing else f"/usr/bin/{program}")


VM_TEST = """
import pytest

@pytest.fixture
def guest():
    raise AssertionError("a guest was started")

@pytest.mark.lsmlab_vm
def test_vm(guest): pass

def test_plain(): pass
"""


@pytest.mark.usefixtures("engine")
def test_without_qemu_what_needs_a_guest_is_skipped_with_the_reason(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    _lacking(monkeypatch, "qemu-system-x86_64")
    pytester.makepyfile(VM_TEST)
    result = run(pytester)
    result.assert_outcomes(skipped=3, passed=1)
    advice = lsmlab.host.to_install("qemu-system-x86_64")
    result.stdout.fnmatch_lines([f"SKIPPED*no guest can boot*qemu-system-x86_64 not found ({advice}*"])


def test_without_qemu_and_with_require_what_needs_a_guest_fails(
    pytester: pytest.Pytester, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    _lacking(monkeypatch, "qemu-system-x86_64")
    pytester.makepyfile(VM_TEST)
    result = run(pytester, "--require=vm")
    result.assert_outcomes(errors=3, passed=1)
    result.stdout.fnmatch_lines(["*--require=vm: no guest can boot*qemu-system-x86_64 not found*"])
    result.stdout.no_fnmatch_line("*pytest_plugin.py*")
    assert engine.opened == []


@pytest.mark.parametrize(("built", "outcomes"), [(True, {"passed": 2}), (False, {"skipped": 2})])
def test_what_builds_images_is_needed_only_where_none_is_built(
    pytester: pytest.Pytester,
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    built: bool,
    outcomes: dict[str, int],
) -> None:
    _lacking(monkeypatch, "mmdebstrap")
    monkeypatch.setattr(lsmlab.image.build, "find", lambda _: object() if built else None)
    run(pytester, "scenarios").assert_outcomes(**outcomes)
    assert bool(engine.opened) is built


def test_progress_is_lines_only_for_those_who_look(pytester: pytest.Pytester, engine: Engine) -> None:
    run(pytester, "scenarios", "-v").stdout.no_fnmatch_line("*doing something*")
    run(pytester, "scenarios", "-s").stdout.no_fnmatch_line("*doing something*")
    run(pytester, "scenarios", "-v", "-s").stdout.fnmatch_lines(["an arm: doing something"])


class FakeShell:
    def __init__(self, error: LsmlabError | None = None) -> None:
        self.error = error
        self.opened: list[tuple[str, Arm, str]] = []

    def open_on_attempt(self, bench: Any, scenario: Any, arm: Arm, attempt_id: str) -> None:
        self.opened.append((scenario.id, arm, attempt_id))
        sys.stdout.write("root@guest#\n")
        if self.error is not None:
            raise self.error


def test_a_shell_on_failure(pytester: pytest.Pytester, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    shell = FakeShell()
    monkeypatch.setattr(lsmlab, "shell", shell, raising=False)
    engine.verdicts[Framework.SELINUX] = Verdict.NOT_CONTAINED
    result = run(pytester, "scenarios", "--lsmlab-shell-on-failure")
    result.assert_outcomes(failed=1, passed=1)
    assert shell.opened == [(ID, Arm.SELINUX_ENFORCING, "read-shadow")]
    result.stdout.fnmatch_lines(["*root@guest#"])  # on the terminal, not in "Captured stdout"
    result.stdout.no_fnmatch_line("*Captured stdout*")


def test_a_shell_that_does_not_open_hides_no_mismatch(
    pytester: pytest.Pytester, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lsmlab, "shell", FakeShell(HostError("not a terminal")), raising=False)
    engine.verdicts[Framework.SELINUX] = Verdict.NOT_CONTAINED
    result = run(pytester, SELINUX, "--lsmlab-shell-on-failure")
    result.stdout.fnmatch_lines(
        ["selinux: expected CONTAINED, found NOT_CONTAINED", "more", "No shell: not a terminal"]
    )


def test_the_attack_to_look_at_is_the_one_not_as_wanted() -> None:
    case = Case(discovery.load_scenario_file(REPO / FILE), Framework.SELINUX)
    seen = outcome(case, 1, Verdict.NOT_CONTAINED)
    first, second = (
        AttemptRecord(attempt=name, kind=AttemptKind.ATTACK, result=result, reason="seen")
        for name, result in (("one", Result.BLOCKED), ("two", Result.ALLOWED))
    )
    arm = ArmRecord(arm=Arm.SELINUX_ENFORCING, attempts=(first, second))
    found = seen.model_copy(update={"arms": (arm,)})
    assert pytest_plugin._to_look_at(found, case) == "two"
    wanted = found.model_copy(update={"expected": Verdict.NOT_CONTAINED})
    assert pytest_plugin._to_look_at(wanted, case) == "one"
    broken = found.model_copy(update={"arms": (ArmRecord(arm=Arm.SELINUX_ENFORCING, error="no guest"),)})
    assert pytest_plugin._to_look_at(broken, case) == "read-shadow"


USER_TEST = """
def test_mode(host):
    assert host.check_output("getenforce") == "Enforcing"
    assert host.run("exit %s", "3").rc == 3
    assert host.run("kill -9 $$").rc == 137
    assert host.run("true").stderr == "a word\\n"

def test_again(host):
    assert host.run("true").succeeded
"""


def test_testinfras_host_is_a_guest_in_the_arm(pytester: pytest.Pytester, engine: Engine) -> None:
    pytester.makepyfile(USER_TEST)
    result = run(pytester, "--lab", "debian-13", "--lsmlab-arm", "selinux-enforcing", "-v")
    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines(["*::test_mode?lsmlab://selinux-enforcing@debian-13? PASSED*"])
    assert engine.opened == [("debian-13", "auto", None)]
    ((kernel, guest),) = engine.guests
    assert kernel is Kernel.SELINUX
    assert guest.commands[:5] == [
        ("ask", "clock"),
        ("write", "/run/lsmlab-arm", "selinux-enforcing\n"),
        ("write", "/sys/fs/selinux/enforce", "1"),
        ("ask", "mode"),
        ("/bin/sh", "-c", "getenforce"),
    ]
    assert (engine.stopped, engine.closed) == (1, ["debian-13"])


def test_each_host_spec_has_a_guest_of_its_own(pytester: pytest.Pytester, engine: Engine) -> None:
    specs = "lsmlab://dac@debian-13,lsmlab://selinux-enforcing@debian-13"
    pytester.makepyfile("def test_it(host): assert host.run('true').rc == 0")
    run(pytester, f"--hosts={specs}", "-k", "test_it").assert_outcomes(passed=2, deselected=2)
    assert sorted(kernel for kernel, _ in engine.guests) == [Kernel.NONE, Kernel.SELINUX]
    assert engine.opened == [("debian-13", "auto", None)]
    assert engine.stopped == 2


@pytest.mark.parametrize(
    ("arguments", "host"),
    [
        ([], "local"),
        (["--lab", "debian-12"], "lsmlab://dac@debian-12"),
        (["--lsmlab-arm", "apparmor-enforce"], "lsmlab://apparmor-enforce@debian-13"),
        (["--lab", "debian-12", "--hosts=local://"], "local"),
    ],
)
@pytest.mark.usefixtures("engine")
def test_who_asks_for_no_lab_keeps_testinfras_own_host(
    pytester: pytest.Pytester, arguments: list[str], host: str
) -> None:
    pytester.makepyfile("def test_it(host): pass")
    assert any(f"::test_it[{host}]" in i for i in ids(run(pytester, "--collect-only", "-q", *arguments)))


@pytest.mark.parametrize("spec", ["debian-13", "debian-13?arm=selinux-enforcing", "selinux@debian-13", "dac@"])
def test_a_host_spec_without_its_arm_is_refused(pytester: pytest.Pytester, engine: Engine, spec: str) -> None:
    pytester.makepyfile("def test_it(host): pass")
    result = run(pytester, f"--hosts=lsmlab://{spec}", "-k", "test_it")
    result.assert_outcomes(errors=1, deselected=2)
    result.stdout.fnmatch_lines(["*expected lsmlab://ARM@LAB, such as lsmlab://dac@debian-13; *"])
    assert engine.opened == []


def test_loading_the_plugin_imports_nothing_heavy() -> None:
    heavy = ["pydantic", "qemu", "ruamel.yaml", "rich", "paramiko", "docker", "sqlite3", "asyncio"]
    code = f"import sys, lsmlab.pytest_plugin; print(*(m for m in {heavy} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
