"""A machine over SSH as a lab, as far as no guest is needed: whether it will do, whose names hold, what is undone."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from entries import Notes

from fakes import Answer, ScriptedChannel, said
from lsmlab import admission, discovery, run, ssh_lab
from lsmlab.channel.ssh import SshChannel, open_ssh
from lsmlab.cli import experiment
from lsmlab.errors import ChannelError, DefinitionError, LsmlabError, MachineError
from lsmlab.machine.ssh import PARTS, SshMachine, audit_rules
from lsmlab.progress import Silent
from lsmlab.terms import Framework, Kernel, Verdict
from ssh_server import SshHome, ssh_home

FLAGSHIP = discovery.load_scenarios(["nginx-reads-shadow"])[0]
SELINUX: dict[str, Any] = {"lsm": ["selinux"], "selinux_enforcing": True, "profiles": None, "apparmor_mode": None}
APPARMOR: dict[str, Any] = {"lsm": ["apparmor"], "selinux_enforcing": None, "profiles": {}, "apparmor_mode": "enforce"}
AUDIT = {"enabled": 1, "daemon_pid": 7, "lost": 0, "backlog": 0, "log": "1:2", "size": 3}
TRIXIE = 'PRETTY_NAME="Debian GNU/Linux 13 (trixie)"\nID=debian\nVERSION_ID="13"\n'


class Machine(ScriptedChannel):
    """What a machine answers that will do, but for what a test says otherwise; and whether it is still there."""

    def __init__(self, *answers: tuple[str, Answer], **asked: Any) -> None:
        usual: dict[str, Any] = {"journal": None, "mode": SELINUX, "audit_state": AUDIT}
        commands: list[tuple[str, Answer]] = [
            *answers, ("cat /etc/os-release", said(TRIXIE)), ("uname -r", said("6.12\n")),
            ("cat /proc/cmdline", said("quiet\n")), ("auditctl -l", said("No rules\n")),
            ("auditctl -s", said("enabled 1\nfailure 1\npid 7\n")),
            ("systemctl show", said("{ path=/usr/sbin/nginx ; argv[]=x }\n")),
        ]  # fmt: skip
        super().__init__(commands, usual | asked)
        self.name = "web1"
        self.login = SimpleNamespace(user="root", address="192.0.2.1", port=22)
        self.fault = ""
        self.closed = False

    def close(self) -> None:
        self.closed = True

    @property
    def as_ssh(self) -> SshChannel:
        return cast("SshChannel", self)


@pytest.fixture
def reach(monkeypatch: pytest.MonkeyPatch) -> Callable[[Machine], ssh_lab.Found]:
    """Reaches a machine of a test's own."""

    def reached(machine: Machine) -> ssh_lab.Found:
        monkeypatch.setattr(ssh_lab, "open_ssh", lambda *_: machine)
        with ssh_lab.reached("web1") as found:
            return found

    return reached


Reach = Callable[[Machine], ssh_lab.Found]


@pytest.mark.parametrize(("mode", "framework"), [(SELINUX, Framework.SELINUX), (APPARMOR, Framework.APPARMOR)])
def test_a_machine_that_will_do_is_looked_at_and_no_more(
    reach: Reach, mode: dict[str, Any], framework: Framework
) -> None:
    machine = Machine(mode=mode)
    found = reach(machine)
    assert (found.frameworks, found.kernel, found.command_line) == ((framework,), "6.12", "quiet")
    assert found.system == "Debian GNU/Linux 13 (trixie)"
    assert {line.partition(" ")[2] for line in machine.lines if line.startswith("ask ")} == {
        "journal", "mode", "audit_state"
    }  # fmt: skip
    assert machine.written == {} and machine.closed


WILL_NOT_DO: list[tuple[dict[str, Any], str, str]] = [
    ({"journal": {"who": "anna", "begun": "noon"}}, "the journal of another run is there: anna, since noon",
     "`lsmlab undo web1`"),
    ({"mode": SELINUX | {"selinux_enforcing": False}}, "SELinux is permissive there", "setenforce 1"),
    ({"mode": APPARMOR | {"apparmor_mode": "complain"}}, "AppArmor as a whole is in mode complain", "parameters/mode"),
    ({"mode": {"lsm": ["yama"], "selinux_enforcing": None, "profiles": None}},
     "neither SELinux nor AppArmor is on there", "kernel's command line"),
    ({"audit_state": AUDIT | {"enabled": 0}}, "auditing is off there", "auditd"),
    ({"audit_state": AUDIT | {"daemon_pid": 0}}, "no auditd takes the kernel's records there", "auditd"),
    ({"audit_state": AUDIT | {"enabled": 2}}, "locked there until the next boot", "-e 2"),
    ({"audit_state": ChannelError("web1: audit.log: No such file")}, "without an audit log there is no evidence",
     "lsmlab doctor --ssh web1"),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "why", "hint"), WILL_NOT_DO)
def test_a_machine_that_will_not_do_is_told_why_and_what_to_do(
    reach: Reach, asked: dict[str, Any], why: str, hint: str
) -> None:
    machine = Machine(**asked)
    with pytest.raises(MachineError) as caught:
        reach(machine)
    assert why in caught.value.message
    assert hint in caught.value.hint
    assert machine.written == {} and machine.closed


def test_a_machine_that_would_panic_or_says_nothing_of_its_rules_is_refused(reach: Reach) -> None:
    for option, answer, why in (
        ("-s", said("enabled 1\nfailure 2\npid 7\n"), "it panics where an audit record is lost"),
        ("-s", said(code=1), "`auditctl -s` fails there"), ("-l", said(code=1), "`auditctl -l` fails there"),
    ):  # fmt: skip
        machine = Machine((f"auditctl {option}", answer))
        with pytest.raises(MachineError, match=why):
            reach(machine)
        assert machine.written == {} and machine.closed


@pytest.mark.parametrize("answer", [1, "x", [], {"who": ["a"] * 1000}, {"\x1b": 1}])
def test_a_journal_that_is_nonsense_is_never_taken_for_none(reach: Reach, answer: Any) -> None:
    with pytest.raises(MachineError, match="the journal of another run is there") as caught:
        reach(Machine(journal=answer))
    assert len(str(caught.value)) < 600


def test_the_names_of_services_are_the_fitting_lab_s(reach: Reach) -> None:
    assert ssh_lab.lab_for(reach(Machine()), None).id == "debian-13"
    lab = ssh_lab.lab_for(
        reach(Machine(("cat /etc/os-release", said("ID=debian\nVERSION_ID=12\n")), mode=APPARMOR)), None
    )
    assert (lab.id, lab.frameworks) == ("debian-12", (Framework.APPARMOR,))
    for said_there, wanted in (
        ("ID=fedora\nVERSION_ID=44\n", "fedora-44"), ('ID="almalinux"\nVERSION_ID="10.1"\n', "almalinux-10"),
        ('ID=ubuntu\nVERSION_ID="24.04"\n', "ubuntu-24.04"),
        ('ID="opensuse-leap"\nVERSION_ID="16.0"\n', "opensuse-16.0"),
    ):  # fmt: skip
        assert ssh_lab.lab_for(reach(Machine(("cat /etc/os-release", said(said_there)))), None).id == wanted
    strange = Machine(("cat /etc/os-release", said('ID=gentoo\nPRETTY_NAME="Gen\x1btoo"\n')))
    with pytest.raises(DefinitionError, match="no lab is for Gen") as caught:
        ssh_lab.lab_for(reach(strange), None)
    assert "--names LAB" in caught.value.hint and ", debian-12, debian-13, " in caught.value.hint
    assert ssh_lab.lab_for(reach(strange), "debian-12").id == "debian-12"
    for unknown in (said(code=1), said("VERSION_ID=13\n"), said("ID=\nVERSION_ID=13\n")):
        with pytest.raises(DefinitionError, match="no lab is for an unknown system"):
            ssh_lab.lab_for(reach(Machine(("cat /etc/os-release", unknown))), None)


@pytest.mark.parametrize(
    ("release", "wanted"),
    [
        ("ID=fedora\nVERSION_ID=43", "fedora-44"),  # all of its labs are newer
        ("ID=debian\nVERSION_ID=14", "debian-13"),
        ("ID=debian\nVERSION_ID=130", "debian-13"),
        ("ID=debian\nVERSION_ID=9", "debian-12"),
        ('ID=ubuntu\nVERSION_ID="24.10"', "ubuntu-24.04"),
        ('ID=ubuntu\nVERSION_ID="26.10"', "ubuntu-26.04"),
        ("ID=almalinux\nVERSION_ID=9.6", "almalinux-10"),
        ("ID=debian", "debian-13"),  # testing has no number
    ],
)
def test_without_a_lab_of_the_release_the_nearest_is_taken_and_said(reach: Reach, release: str, wanted: str) -> None:
    found = reach(Machine(("cat /etc/os-release", said(f"{release}\nPRETTY_NAME='This One'\n"))))
    lab = ssh_lab.lab_for(found, None)
    words = f"{wanted}, whose names and expectations were not written for This One"
    assert (lab.id, ssh_lab.names_of(found, lab)) == (wanted, words)
    bench = ssh_lab.SshBench("web1", found, lab, CHANGES, Silent())
    assert bench.environment.names == words


def test_a_lab_that_says_nothing_of_machines_is_nobodys_nearest() -> None:
    lab = discovery.load_lab("debian-13").model_copy(update={"os_release": {}})
    assert [ssh_lab._nearest([lab], release) for release in ({}, {"ID": ""}, {"ID": "debian"})] == [None] * 3


def test_the_lab_that_fits_or_was_asked_for_is_named_in_the_outcome(reach: Reach) -> None:
    found = reach(Machine())
    bench = ssh_lab.SshBench("web1", found, ssh_lab.lab_for(found, None), CHANGES, Silent())
    assert bench.environment.names == "debian-13"
    asked_for = ssh_lab.names_of(found, ssh_lab.lab_for(found, "debian-12"))
    assert asked_for == "debian-12, whose names and expectations were not written for Debian GNU/Linux 13 (trixie)"


def test_whose_names_hold_is_said_before_leave_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    release = said("ID=debian\nVERSION_ID=14\nPRETTY_NAME='Debian 14'\n")
    there = Machine(("cat /etc/os-release", release))
    monkeypatch.setattr(ssh_lab, "open_ssh", lambda *_: there)
    progress = Notes()
    with pytest.raises(DefinitionError, match="--allow-changes"):
        next(experiment._outcomes_there("web1", [FLAGSHIP], None, None, False, progress))
    (note,) = progress.notes
    assert "of lab debian-13, whose names and expectations were not written for Debian 14" in note


def test_the_weaker_control_is_what_every_case_is_compared_with(reach: Reach) -> None:
    lab = ssh_lab.lab_for(reach(Machine()), None)
    (case,) = run.cases([FLAGSHIP], lab, unconfined=True)
    assert [arm.value for arm in case.arms] == ["selinux-unconfined", "selinux-enforcing"]
    with pytest.raises(DefinitionError, match="has no AppArmor; it has: selinux"):
        run.cases([FLAGSHIP], lab, [Framework.APPARMOR], unconfined=True)


def test_without_leave_it_says_exactly_what_would_be_changed(reach: Reach) -> None:
    found = reach(Machine())
    lab = ssh_lab.lab_for(found, None)
    planned = ssh_lab.changes(found, lab, run.cases([FLAGSHIP], lab, unconfined=True))
    words = str(ssh_lab.need_leave("web1", planned))
    for word in (*planned.words, *planned.trees, "--allow-changes", "audit rules"):
        assert word in words
    assert "/usr/sbin/nginx is labelled bin_t" in words


def test_a_service_that_is_not_there_is_said(reach: Reach) -> None:
    found = reach(Machine(("systemctl show", said("\n"))))
    lab = ssh_lab.lab_for(found, None)
    with pytest.raises(DefinitionError, match=r"web1: nginx\.service: systemd knows no program") as caught:
        ssh_lab.changes(found, lab, run.cases([FLAGSHIP], lab, unconfined=True))
    assert "Install there" in caught.value.hint


@pytest.mark.parametrize(
    ("there", "mounts", "problem"),
    [
        (True, "/ /proc /etcetera", None),
        (False, "/", "a container is given /etc, and it is not there"),
        (True, "/ /etc/ssl", "is given /etc to read, and could write to /etc/ssl, which is mounted below it"),
    ],
)
def test_what_a_container_is_given_has_to_be_there_with_nothing_mounted_below(
    reach: Reach, there: bool, mounts: str, problem: str | None
) -> None:
    lines = "".join(f"30 1 254:0 / {mount} rw - ext4 /dev/vda rw\n" for mount in mounts.split())
    found = reach(
        Machine(
            ("cat /proc/self/mountinfo", said(lines)),
            ("readlink --canonicalize-existing /etc", said("/etc\n" if there else "", code=int(not there))),
        )
    )
    planned = dataclasses.replace(CHANGES, given=("/etc",))
    if problem is None:
        ssh_lab._see_what_is_given(found, planned)
        return
    with pytest.raises(DefinitionError, match=problem):
        ssh_lab._see_what_is_given(found, planned)


# The machine


CHANGES = admission.Changes(("/etc",), ("nginx.service",), (), ("httpd_t",), ("x",))


def undoing(**asked: Any) -> Machine:
    usual = dict.fromkeys(("subjects", "begin", "mark", "restore", "end", "undo"))
    return Machine(**(usual | asked))


def test_it_is_undone_once_and_asked_nothing_afterwards() -> None:
    there = undoing()
    machine = SshMachine(there.as_ssh)
    machine.begin(CHANGES)
    machine.snapshot("ready")
    machine.restore("ready")
    standing = [(machine.running, machine.stays)]
    machine.stop()
    machine.stop()
    standing.append((machine.running, machine.stays))
    assert (standing, machine.problem) == ([(True, True), (False, True)], "")
    assert [name for name, _ in there.questions] == ["subjects", "begin", "mark", "restore", "end"]
    with pytest.raises(LsmlabError, match="interrupted"):
        machine.channel.run(["true"])
    with pytest.raises(MachineError, match="interrupted"):
        machine.restore("ready")


def test_an_interrupted_run_asks_nothing_but_to_undo() -> None:
    there = undoing()
    machine = SshMachine(there.as_ssh)
    machine.begin(CHANGES)
    machine.interrupt()
    with pytest.raises(ChannelError, match="interrupted"):
        machine.channel.ask("mode")
    for turn in (machine.snapshot, machine.restore):
        with pytest.raises(MachineError, match="interrupted"):
            turn("x")
    machine.stop()
    assert [name for name, _ in there.questions][-1] == "end"


def test_what_cannot_be_undone_is_kept_for_whoever_asks(reach: Reach) -> None:
    there = undoing(end=ChannelError("web1: end: not as it was: /etc/x: another digest"))
    found = reach(there)
    lab = ssh_lab.lab_for(found, None)
    bench = ssh_lab.SshBench("web1", found, lab, CHANGES, Silent())
    with bench.guest(Kernel.SELINUX, "x"):
        pass
    error = bench.not_undone
    assert error is not None and "/etc/x: another digest" in error.message
    assert error.message.startswith("web1 may still be changed, after a reboot too, since not all was undone: ")
    assert "`lsmlab undo web1`" in error.hint
    assert bench.environment.isolation.startswith("by undo, NOT verified: ")
    with pytest.raises(MachineError, match="not all was undone"), bench.guest(Kernel.SELINUX, "y"):
        pytest.fail("a second experiment on a machine that is not as it was")


def test_a_begin_whose_answer_is_lost_is_undone_all_the_same(reach: Reach, monkeypatch: pytest.MonkeyPatch) -> None:
    again = undoing()

    def lost(**_: Any) -> None:
        there.fault = "the connection was lost"
        raise ChannelError("web1: begin: the connection was lost")

    there = undoing(begin=lost)
    found = reach(there)
    monkeypatch.setattr("lsmlab.machine.ssh.open_ssh", lambda *_: again)
    bench = ssh_lab.SshBench("web1", found, ssh_lab.lab_for(found, None), CHANGES, Silent())
    assert bench.environment.isolation.startswith("unknown")
    with pytest.raises(MachineError, match="connection was lost"), bench.guest(Kernel.SELINUX, "x"):
        pytest.fail("nothing was begun")
    assert [name for name, _ in again.questions] == ["undo"]
    assert (bench.not_undone, bench.environment.isolation) == (None, "by undo, verified")


def test_a_run_whose_machine_goes_away_is_an_error_and_says_how_to_undo(
    reach: Reach, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(**_: Any) -> None:
        there.fault = "the connection was lost"
        raise ChannelError("web1: begin: the connection was lost")

    def gone(*_: object) -> None:
        raise ChannelError("web1: connecting to 192.0.2.1 port 22: Connection refused")

    there = undoing(begin=lost)
    found = reach(there)
    monkeypatch.setattr("lsmlab.machine.ssh.open_ssh", gone)
    lab = ssh_lab.lab_for(found, None)
    bench = ssh_lab.SshBench("web1", found, lab, CHANGES, Silent())
    (outcome,) = run.run(bench, run.cases([FLAGSHIP], lab, unconfined=True))
    assert (outcome.verdict, outcome.reason.count("the connection was lost")) == (Verdict.ERROR, 1), outcome.reason
    assert outcome.environment.isolation.startswith("by undo, NOT verified: web1: connecting to")
    assert "web1 may still be changed, after a reboot too" in str(bench.not_undone)
    assert "`lsmlab undo web1`" in str(bench.not_undone)


def test_how_attempts_were_kept_apart_is_unknown_until_all_is_undone(reach: Reach) -> None:
    found = reach(undoing())
    bench = ssh_lab.SshBench("web1", found, ssh_lab.lab_for(found, None), CHANGES, Silent())
    for _ in range(2):
        with bench.guest(Kernel.SELINUX, "x"):
            assert bench.environment.isolation.startswith("unknown")
        assert bench.environment.isolation == "by undo, verified"


@pytest.mark.parametrize("raised", [KeyboardInterrupt, MachineError("x"), GeneratorExit])
def test_an_undoing_that_failed_is_said_with_its_hint_whatever_ends_the_run(
    raised: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = undoing(end=ChannelError("web1: end: not as it was: /etc/x: another digest"))

    def running(bench: ssh_lab.SshBench, _: object) -> Iterator[Any]:
        with bench.guest(Kernel.SELINUX, "x"):
            yield "an outcome"
            raise raised

    monkeypatch.setattr(ssh_lab, "open_ssh", lambda *_: there)
    monkeypatch.setattr(run, "run", running)
    outcomes = experiment._outcomes_there("web1", [FLAGSHIP], None, None, True, Silent())
    next(outcomes)
    if raised is GeneratorExit:
        outcomes.close()
    else:
        with pytest.raises(raised if isinstance(raised, type) else type(raised)):
            next(outcomes)
    said_to_the_user = capsys.readouterr().err
    assert "not all was undone: web1: end: not as it was: /etc/x" in said_to_the_user
    assert "`lsmlab undo web1`" in said_to_the_user


def test_a_machine_that_goes_away_is_reached_once_more_to_undo(monkeypatch: pytest.MonkeyPatch) -> None:
    there, again = undoing(), undoing()
    machine = SshMachine(there.as_ssh)
    machine.begin(CHANGES)
    there.fault = "the connection was lost"
    assert not machine.running
    monkeypatch.setattr("lsmlab.machine.ssh.open_ssh", lambda *_: again)
    machine.stop()
    ((asked, arguments),) = again.questions
    begun = next(more for name, more in there.questions if name == "begin")
    assert (machine.problem, asked, arguments, again.closed) == ("", "undo", {"who": begun["who"]}, True)


def test_a_machine_that_stays_away_is_a_problem_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    there = undoing()
    machine = SshMachine(there.as_ssh)
    machine.begin(CHANGES)
    there.fault = "the connection was lost"

    def gone(host: str, parts: object) -> None:
        raise ChannelError("web1: connecting to 192.0.2.1 port 22: no answer within 15 s")

    monkeypatch.setattr("lsmlab.machine.ssh.open_ssh", gone)
    machine.stop()
    assert "no answer within 15 s" in machine.problem


def test_the_rules_of_our_images_are_those_of_a_run_there() -> None:
    rules = audit_rules()
    assert len(rules) == 6
    assert all(rule[0] == "always,exit" for rule in rules)
    assert "path=/var/lib/lsmlab/vehicle" in rules[0] and "key=lsmlab-subject" in rules[0]
    assert "key=lsmlab-fork" in rules[-1]


# Over a real connection


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SshHome]:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    with ssh_home(tmp_path) as home:
        if os.geteuid() != 0:
            home.sudo_that_obeys()
        yield home


def test_the_programs_arrive_and_know_their_operations(home: SshHome) -> None:
    channel = open_ssh("machine", PARTS)
    try:
        assert channel.ask("journal") is None
        with pytest.raises(ChannelError, match="nothing was begun"):
            channel.ask("mark", name="x")
        with pytest.raises(ChannelError, match="what a visitor is answered is withheld"):
            channel.ask("visit", method="GET", port=80, path="/", timeout=1)
        assert channel.ask("clock", seconds=0) is None
        assert channel.run(["date", "+%Y"]).out.strip() > "2000"
    finally:
        channel.close()
    assert home.server.commands


def test_where_no_journal_is_there_is_nothing_to_undo(home: SshHome) -> None:
    assert not Path("/var/lib/lsmlab").exists(), "this machine is somebody's lab"
    assert ssh_lab.undo("machine") is None
    assert not Path("/var/lib/lsmlab").exists()


@pytest.mark.parametrize("answer", [1, "x", {}, [1], [["x"]]])
def test_an_undoing_that_is_nonsense_is_an_error(answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh_lab, "open_ssh", lambda *_: Machine(undo=answer))
    with pytest.raises(ChannelError, match="nonsense"):
        ssh_lab.undo("web1")


def test_a_close_of_the_bench_interrupts_what_runs(reach: Reach) -> None:
    found = reach(undoing())
    bench = ssh_lab.SshBench("web1", found, ssh_lab.lab_for(found, None), CHANGES, Silent())
    with bench.guest(Kernel.SELINUX, "x") as machine:
        thread = threading.Thread(target=bench.close)
        thread.start()
        thread.join()
        assert not machine.running
    with pytest.raises(MachineError, match="was interrupted"), bench.guest(Kernel.SELINUX, "y"):
        pytest.fail("a machine of a bench that is closed")
