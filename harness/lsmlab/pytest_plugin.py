"""The pytest front door: scenario files become tests, testinfra's `host` becomes a guest. Thin: run.py does the work.

pytest loads this module in every run of everybody who has lsmlab installed, so nothing heavy is imported at its top.
"""
# ruff: noqa: PLC0415 - imports inside functions are the point, see above

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

from lsmlab import host
from lsmlab.errors import LsmlabError
from lsmlab.terminal import clean
from lsmlab.terms import CONTROL, ENFORCING_ARM, Arm, AttemptKind, Framework, Result, Verdict

if TYPE_CHECKING:
    from _pytest._code.code import TerminalRepr

    from lsmlab.bench import Bench
    from lsmlab.lab import Lab
    from lsmlab.outcome import Outcome
    from lsmlab.progress import Progress
    from lsmlab.run import Case

FILE_NAME = "scenario.yaml"
"""scenario.FILE_NAME, compared with the name of every file of every project: not worth importing pydantic for."""
GUEST_PROGRAMS = ("qemu-system-x86_64", "qemu-img", "setpriv", "unshare")
IMAGE_PROGRAMS = ("mmdebstrap", "mke2fs", "debugfs")
TESTINFRA = "testinfra.backend"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add lsmlab's options."""
    group = parser.getgroup("lsmlab", "lsmlab: Mandatory Access Control, tested in real guests")
    group.addoption(
        "--lsmlab-lab", "--lab", dest="lsmlab_lab", metavar="NAME",
        help="the lab that scenarios run on, and the machine behind testinfra's `host`",
    )  # fmt: skip
    group.addoption(
        "--lsmlab-framework", dest="lsmlab_frameworks", action="append", choices=[f.value for f in Framework],
        help="only this framework (may be given twice; default: all that the lab has)",
    )  # fmt: skip
    group.addoption(
        "--lsmlab-accel", dest="lsmlab_accel", choices=["auto", "kvm", "tcg"], default="auto",
        help="what QEMU runs guests with (default: auto)",
    )  # fmt: skip
    group.addoption(
        "--lsmlab-guests", dest="lsmlab_guests", type=_at_least_one, metavar="N",
        help="how many guests may run at once (default: what processors and memory allow)",
    )  # fmt: skip
    group.addoption(
        "--lsmlab-arm", dest="lsmlab_arm", choices=[a.value for a in Arm],
        help=f"the arm that testinfra's `host` is in (default: {CONTROL})",
    )  # fmt: skip
    group.addoption(
        "--lsmlab-shell-on-failure", dest="lsmlab_shell", action="store_true",
        help="after a mismatch, repeat the attempt and give the terminal a root shell in its guest",
    )  # fmt: skip
    group.addoption(
        "--require", dest="lsmlab_require", choices=["vm"],
        help="vm: where no guest can boot, tests that need one fail; they are skipped otherwise",
    )  # fmt: skip


def _at_least_one(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1 on, found {text!r}")
    return int(text)


def pytest_configure(config: pytest.Config) -> None:
    """Begin the session. Boots and builds nothing. A lab or arm asked for that is not there is a usage error."""
    config.addinivalue_line("markers", "lsmlab_vm: boots real guests (skipped with the reason where none can boot)")
    session = config.stash[SESSION] = LabSession(config)
    config.add_cleanup(session.close)
    asked_for = config.option.lsmlab_lab is not None or config.option.lsmlab_arm is not None
    arm = Arm(config.option.lsmlab_arm or CONTROL)
    if asked_for:
        try:
            session.check_arm(arm)
        except LsmlabError as error:
            raise pytest.UsageError(str(error)) from None
    if TESTINFRA in sys.modules:  # its plugin imports it; who does without it does not wait for it here
        from lsmlab import testinfra_backend

        testinfra_backend.register(session.bench)
        config.add_cleanup(testinfra_backend.close_all)  # cleanups run last in, first out: guests before benches
        if asked_for and getattr(config.option, "hosts", "") is None:
            config.option.hosts = testinfra_backend.host_spec(session.lab.id, arm)


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Collect a scenario of ours; a scenario.yaml of another kind is somebody else's."""
    if file_path.name != FILE_NAME:
        return None
    from lsmlab import definition, scenario

    if definition.peek_kind(file_path) != scenario.KIND:
        return None
    return ScenarioFile.from_parent(parent, path=file_path)


def pytest_report_collectionfinish(config: pytest.Config) -> str | list[str]:
    """Say which scenarios are no tests here, and why: what is not run has not passed.

    Not said under pytest-xdist: its own process, which has the terminal, collects nothing.
    """
    session = config.stash[SESSION]
    if not session.left_out:
        return []
    from lsmlab import run

    return run.left_out(session.lab, session.left_out)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a guest where none can boot, with the reason; fail it under --require=vm."""
    if item.get_closest_marker("lsmlab_vm") is None:
        return
    lack = _lack(item.config.stash[SESSION])
    if not lack:
        return
    reason = f"no guest can boot on this machine: {lack}"
    if item.config.option.lsmlab_require == "vm":
        pytest.fail(f"--require=vm: {reason}", pytrace=False)
    pytest.skip(reason)


def _lack(session: LabSession) -> str:
    """What keeps guests from booting here, and what to do; or an empty text."""
    try:
        host.need_linux()
    except LsmlabError as error:
        return f"{error.message}. {error.hint}"
    missing = missing_programs()
    if missing and session.image_is_built:
        missing = missing_programs(build_image=False)
    return f"{', '.join(missing)} not found ({host.to_install(*missing)})" if missing else ""


def missing_programs(*, build_image: bool = True) -> list[str]:
    """The programs that booting a guest needs and this machine lacks; those that build its image only if it must be."""
    needed = [*GUEST_PROGRAMS, *(IMAGE_PROGRAMS if build_image else ())]
    if build_image and os.geteuid() != 0:
        needed.append("newuidmap")
    return [program for program in needed if host.find(program) is None]


class ScenarioFile(pytest.File):
    """One scenario file: one item for each framework that the scenario speaks of and the lab has.

    None where it does not belong to the lab, which is said when all are collected; see `Scenario.belongs_to`.
    """

    def collect(self) -> Iterator[ScenarioItem]:
        """Raises CollectError with the definition's faults, each with its file and line."""
        from lsmlab import discovery, run

        asked_for = self.config.option.lsmlab_frameworks
        try:
            lab = self.config.stash[SESSION].lab
            scenario = discovery.load_scenario_file(self.path)
            if not scenario.belongs_to(lab):
                self.config.stash[SESSION].left_out += 1
                return
            cases = run.cases([scenario], lab, [Framework(f) for f in asked_for] if asked_for else None)
        except LsmlabError as error:
            raise self.CollectError(str(error)) from None
        for case in cases:
            yield ScenarioItem.from_parent(self, name=f"{scenario.id}[{lab.id}-{case.framework}]", case=case)


class ScenarioItem(pytest.Item):
    """One scenario under one framework. It passes where the verdict is the expected one."""

    def __init__(self, *, case: Case, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.case = case
        self.add_marker("lsmlab_vm")

    def runtest(self) -> None:
        """Fails with the report of what is not as expected. Raises LsmlabError where nothing could be run at all."""
        session = self.config.stash[SESSION]
        outcome = session.outcome(self)
        self.user_properties += [("lsmlab_outcome", outcome.id), ("lsmlab_verdict", outcome.verdict.value)]
        if outcome.as_expected:
            return
        from lsmlab.report import text

        words = text.failure_text(outcome)
        if self.config.option.lsmlab_shell:
            words += self._shell(session, outcome)
        pytest.fail(words, pytrace=False)

    def _shell(self, session: LabSession, outcome: Outcome) -> str:
        """Give the terminal a root shell in the guest. What kept it from opening, or an empty text."""
        from lsmlab import shell

        if session.is_worker:
            return "\nNo shell: the processes of pytest-xdist have no terminal. Leave out -n."
        cancel_timeout = getattr(self.ihook, "pytest_timeout_cancel_timer", None)
        if cancel_timeout is not None:  # pytest-timeout would end the shell
            cancel_timeout(item=self)
        capture = self.config.pluginmanager.getplugin("capturemanager")
        if capture is not None:
            capture.suspend_global_capture(in_=True)
        try:
            arm = ENFORCING_ARM[outcome.framework]
            bench = session.bench(outcome.lab, self.case.scenario.packages)
            shell.open_on_attempt(bench, self.case.scenario, arm, _to_look_at(outcome, self.case))
        except LsmlabError as error:
            return f"\nNo shell: {error}"
        finally:
            if capture is not None:
                capture.resume_global_capture()
        return ""

    def repr_failure(
        self,
        excinfo: pytest.ExceptionInfo[BaseException],
        style: Literal["long", "short", "line", "no", "native", "value", "auto"] | None = None,
    ) -> str | TerminalRepr:
        """Our own errors say enough: the text alone. A traceback for what nobody foresaw."""
        if isinstance(excinfo.value, LsmlabError):
            return excinfo.getrepr(style="value", chain=False)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int, str]:
        """See `pytest.Item.reportinfo`."""
        return self.path, 0, self.name


def _to_look_at(outcome: Outcome, case: Case) -> str:
    """The first attack whose result in the enforcing arm is not as wanted, or else the first attack."""
    wanted = Result.ALLOWED if outcome.expected is Verdict.NOT_CONTAINED else Result.BLOCKED
    record = outcome.arm(ENFORCING_ARM[outcome.framework])
    attacks = [a for a in (record.attempts if record else ()) if a.kind is AttemptKind.ATTACK]
    return next((a.attempt for a in attacks if a.result is not wanted), case.scenario.attacks[0].id)


class Lines:
    """Progress as lines of pytest's own terminal."""

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self._terminal = terminal
        self._lock = threading.Lock()

    def step(self, task: str, text: str) -> None:
        """See `Progress.step`."""
        self.note(f"{task}: {text}")

    def done(self, task: str) -> None:
        """See `Progress.done`."""

    def note(self, text: str) -> None:
        """See `Progress.note`."""
        with self._lock:
            self._terminal.write_line(clean(text))

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """See `Progress.paused`."""
        return contextlib.nullcontext()


class LabSession:
    """What one pytest run keeps: a bench for each lab that was used, and each outcome."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._resources = contextlib.ExitStack()
        self._benches: dict[tuple[str, ...], Bench | LsmlabError] = {}
        self._outcomes: dict[tuple[Path, Framework], Outcome] = {}
        self.left_out = 0
        """How many scenarios were collected that do not belong to the lab."""

    @property
    def is_worker(self) -> bool:
        """True in a process of pytest-xdist that runs a share of the items."""
        return hasattr(self._config, "workerinput")

    @cached_property
    def lab(self) -> Lab:
        """The lab that was asked for, or the default one. Raises DefinitionError."""
        from lsmlab import discovery

        return discovery.load_lab(self._config.option.lsmlab_lab or discovery.DEFAULT_LAB)

    def check_arm(self, arm: Arm) -> None:
        """Raises DefinitionError where the lab is not there, or has no such arm."""
        from lsmlab import definition

        if arm not in self.lab.arms:
            raise definition.unknown_name(f"arm of lab {self.lab.id}", arm, list(self.lab.arms))

    @property
    def image_is_built(self) -> bool:
        """True where the lab's image lies in the cache: a guest then needs QEMU alone."""
        from lsmlab.image import build

        try:
            return build.find(self.lab) is not None
        except LsmlabError:
            return False

    def bench(self, name: str, packages: tuple[str, ...] = ()) -> Bench:
        """The bench of the lab called `name`, with more packages, opened on first use.

        Raises LsmlabError: the same one every time.
        """
        key = (name, *packages)
        if key not in self._benches:
            try:
                host.need_linux()
                from lsmlab import bench, discovery

                opened = bench.open_bench(
                    discovery.load_lab(name).with_packages(packages),
                    self._progress(),
                    accelerator=self._config.option.lsmlab_accel,
                    guests=self._config.option.lsmlab_guests,
                )
                self._benches[key] = self._resources.enter_context(opened)
            except LsmlabError as error:
                self._benches[key] = error  # building an image takes minutes: it is not tried for every test
        found = self._benches[key]
        if isinstance(found, LsmlabError):
            raise found
        return found

    def _progress(self) -> Progress:
        from lsmlab.progress import Silent

        terminal = self._config.pluginmanager.getplugin("terminalreporter")
        wanted = self._config.getoption("verbose", 0) > 0 and self._config.getoption("capture", "") == "no"
        return Lines(terminal) if terminal is not None and wanted else Silent()

    def outcome(self, item: ScenarioItem) -> Outcome:
        """The outcome of `item`, run on first use together with the file's other items: they share the control arm.

        Every outcome is kept in the store. Raises LsmlabError where nothing could be run.
        """
        key = (item.path, item.case.framework)
        if key not in self._outcomes:
            from lsmlab import run
            from lsmlab.store import Store

            bench = self.bench(self.lab.id, item.case.scenario.packages)
            for outcome in run.run(bench, self._together(item)):
                Store().add(outcome)
                self._outcomes[item.path, outcome.framework] = outcome
        return self._outcomes[key]

    def _together(self, item: ScenarioItem) -> list[Case]:
        """The cases to run with that of `item`. Under pytest-xdist none: another process may have those items."""
        alone = {item.case.framework: item.case}
        if self.is_worker:
            return list(alone.values())
        selected = [i for i in item.session.items if isinstance(i, ScenarioItem) and i.path == item.path]
        return list(({i.case.framework: i.case for i in selected} | alone).values())

    def close(self) -> None:
        """Close every bench."""
        self._benches.clear()
        self._resources.close()


SESSION = pytest.StashKey[LabSession]()
