"""A lab of a machine that is there already, over SSH: what it is, whether it will do, undoing by its journal.

Nothing of it is changed without leave; what is changed is undone when a scenario's arms have run.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from lsmlab import __version__, admission, discovery, facts, prepare
from lsmlab.admission import SCHEME, VAGRANT, Changes
from lsmlab.bench import Budget
from lsmlab.channel.ssh import SshChannel, open_ssh
from lsmlab.container import kept
from lsmlab.definition import digest_of
from lsmlab.errors import ChannelError, DefinitionError, LsmlabError, MachineError, SetupError
from lsmlab.lab import Engine, Lab
from lsmlab.machine.ssh import PARTS, UNDO_SECONDS, SshMachine, undo_hint
from lsmlab.outcome import Environment
from lsmlab.progress import Progress
from lsmlab.run import Case
from lsmlab.terminal import clean
from lsmlab.terms import Framework, Kernel

RULES_LOCKED = 2
"""audit_enabled: no rule may be added before the next boot."""
PANICS = "failure 2"
"""As `auditctl -s` says it."""
ENGINE = Engine(kind="docker", packages=("docker.io",), units=("docker.service",))
"""Whether one is there is asked where a scenario needs it."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a machine is, as it says itself. Looked at, and nothing changed."""

    channel: SshChannel
    release: Mapping[str, str]
    kernel: str
    command_line: str
    frameworks: tuple[Framework, ...]

    @property
    def system(self) -> str:
        """Its distribution, for people."""
        return self.release.get("PRETTY_NAME", "an unknown system")


@contextlib.contextmanager
def reached(host: str) -> Iterator[Found]:
    """Log in, and see that the machine will do for a lab. Raises ChannelError, MachineError, DefinitionError."""
    with contextlib.closing(open_ssh(host, PARTS)) as channel:
        left = _journal(channel)
        if left:
            raise MachineError(f"{host}: the journal of another run is there: {left}", hint=undo_hint(host))
        frameworks = _frameworks(channel)
        _see_auditing(channel)
        lines = (line.partition("=") for line in channel.run(["cat", "/etc/os-release"]).out.splitlines())
        release = {key: clean(value.strip("\"'"))[:200] for key, _, value in lines}
        kernel = clean(channel.run(["uname", "-r"]).check().out.strip())[:200]
        booted = clean(channel.run(["cat", "/proc/cmdline"]).check().out.strip())
        yield Found(channel, release, kernel, booted, frameworks)


def _journal(channel: SshChannel) -> str:
    """Whose journal is there, in words; empty where there is none."""
    answer = channel.ask("journal")
    if answer is None:
        return ""
    return (
        clean(f"{answer.get('who')}, since {answer.get('begun')}"[:300]) if isinstance(answer, dict) else "unreadable"
    )


def _frameworks(channel: SshChannel) -> tuple[Framework, ...]:
    mode = facts.read(facts.ModeFacts, channel.ask("mode"))
    found = []
    if mode.selinux_enforcing:
        found.append(Framework.SELINUX)
    elif mode.selinux_enforcing is False:
        raise MachineError(
            f"{channel.name}: SELinux is permissive there, so it would refuse nothing",
            hint="`setenforce 1` there, if that is wanted: lsmlab changes the mode of no whole machine.",
        )
    if mode.profiles is not None:
        if mode.apparmor_mode != "enforce":
            raise MachineError(
                f"{channel.name}: AppArmor as a whole is in mode {mode.apparmor_mode} there",
                hint="`echo enforce > /sys/module/apparmor/parameters/mode` there, if that is wanted.",
            )
        found.append(Framework.APPARMOR)
    if not found:
        raise MachineError(
            f"{channel.name}: neither SELinux nor AppArmor is on there (the kernel has: {','.join(mode.lsm)})",
            hint="Boot it with one: `security=apparmor` or `security=selinux` on the kernel's command line.",
        )
    return tuple(found)


def _see_auditing(channel: SshChannel) -> None:
    advice = f"`lsmlab doctor --ssh {channel.name}` says what it lacks."
    try:
        state = facts.read(facts.AuditState, channel.ask("audit_state"))
    except ChannelError as error:
        if channel.fault:
            raise
        raise MachineError(f"{error.message}: without an audit log there is no evidence", hint=advice) from None
    if not state.enabled or not state.daemon_pid:
        what = "auditing is off" if not state.enabled else "no auditd takes the kernel's records"
        raise MachineError(
            f"{channel.name}: {what} there, and the audit log is the evidence",
            hint=f"Install auditd (Fedora: audit), and `systemctl enable --now auditd`. {advice}",
        )
    if state.enabled == RULES_LOCKED:
        raise MachineError(
            f"{channel.name}: the audit rules are locked there until the next boot (auditctl -e 2)",
            hint="Evidence needs rules on refused calls: take `-e 2` out of /etc/audit/rules.d, and boot it.",
        )
    for option in ("-l", "-s"):
        answer = channel.run(["auditctl", option])
        if not answer.ok:
            raise MachineError(f"{channel.name}: `auditctl {option}` fails there", hint=advice)
    if PANICS in answer.out.splitlines():
        raise MachineError(
            f"{channel.name}: it panics where an audit record is lost (auditctl: {PANICS})",
            hint="A run makes many records: `auditctl -f 1` there, if that is wanted.",
        )


def lab_for(found: Found, names: str | None) -> Lab:
    """The lab that says what services are called there: `names`, the one whose os-release fits, or the nearest release
    of that distribution. `names_of` says which.

    Its frameworks are those of the machine. Raises DefinitionError.
    """
    labs = [discovery.load_lab(name) for name in ([names] if names else discovery.labs().ids)]
    chosen = labs[0] if names else _nearest(labs, found.release)
    if chosen is None:
        known = ", ".join(lab.id for lab in labs)
        raise DefinitionError(
            f"{found.channel.name}: no lab is for {found.system}: what its services are called is not known",
            hint=f"Say whose names hold there, with `--names LAB`; there are: {known}.",
        )
    return chosen.model_copy(update={"frameworks": found.frameworks, "engine": ENGINE})


def names_of(found: Found, lab: Lab) -> str:
    """Whose names and expectations a run uses there, in words; where `lab` is of another release, they say so."""
    if fits(lab, found.release):
        return lab.id
    return f"{lab.id}, whose names and expectations were not written for {found.system}"


def fits(lab: Lab, release: Mapping[str, str]) -> bool:
    """Whether a machine with this os-release is what `lab` is a lab of; 10.1 is a 10."""
    wanted = lab.os_release.items()
    return bool(wanted) and all(f"{release.get(key)}.".startswith(f"{value}.") for key, value in wanted)


def _nearest(labs: Sequence[Lab], release: Mapping[str, str]) -> Lab | None:
    """The lab that fits; else of the same distribution's the newest that is not newer, else the oldest."""
    fitting = next((lab for lab in labs if fits(lab, release)), None)
    distribution = release.get("ID", "")
    akin = [lab for lab in labs if distribution and lab.os_release.get("ID") == distribution]
    if fitting is not None or not akin:
        return fitting
    own = _version(release)
    older = [lab for lab in akin if not own or _version(lab.os_release) <= own]  # without a number: not out yet
    if older:
        return max(older, key=lambda lab: _version(lab.os_release))
    return min(akin, key=lambda lab: _version(lab.os_release))


def _version(release: Mapping[str, str]) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", release.get("VERSION_ID", "")))


def changes(found: Found, lab: Lab, cases: Iterable[Case]) -> Changes:
    """What `cases` change there, all together. Raises DefinitionError where that could not be undone, or what is
    attacked is not there, and EngineError and FrameworkError where its container engine will not do."""
    every, contained = [], set[Framework]()
    for case in cases:
        plan = prepare.plan_of(case.scenario, lab, kept=True)
        unit, steps = plan.unit, (*plan.setup, *plan.after_start)
        planned = admission.changes_of(case.scenario, case.framework, unit, "", steps)  # before anything is asked
        if plan.container is not None:
            contained.add(case.framework)
            every.append(planned)
            continue
        try:
            program = prepare.program_of(found.channel, unit)
        except SetupError as error:
            raise DefinitionError(
                f"{found.channel.name}: {error.message}",
                hint=f"Install there what scenario {case.scenario.id} attacks, {case.scenario.subject.name}.",
            ) from None
        every.append(admission.changes_of(case.scenario, case.framework, unit, program, steps))
    together = admission.all_of(every)
    if contained:
        _see_what_is_given(found, together)
        kept.need(kept.look(found.channel), found.channel.name, contained)
    return together


def _see_what_is_given(found: Found, planned: Changes) -> None:
    """Raises DefinitionError where the engine would make a folder, or a container could write below one to read."""
    listed = found.channel.run(["cat", "/proc/self/mountinfo"]).check().out.splitlines()
    mounted = [line.split(" ")[4] for line in listed]
    for path in planned.given:
        real = found.channel.run(["readlink", "--canonicalize-existing", path])
        if not real.ok:
            raise DefinitionError(f"{found.channel.name}: a container is given {path}, and it is not there")
        below = next((one for one in mounted if one.startswith(f"{real.out.strip()}/")), None)
        if below is not None:
            raise DefinitionError(
                f"{found.channel.name}: a container is given {path} to read, and could write to {below}, which is "
                "mounted below it",
                hint="Run it in a guest that is thrown away: `--lab docker-debian-13`.",
            )


def need_leave(host: str, planned: Changes) -> DefinitionError:
    """The error of who did not allow `planned`."""
    listed = "\n".join(f"    - {word}" for word in planned.words)
    return DefinitionError(
        f"{host} would be changed, and undone afterwards; say `--allow-changes` to allow this:\n{listed}\n"
        "    - audit rules are put before its own\n"
        f"  Kept in /var/lib/lsmlab meanwhile, and put back: {', '.join(planned.trees)}.\n"
        "  What anybody else changes there until the run's end is lost. Not undone: what the machine logs of it.",
    )


class SshBench:
    """A lab of one machine that stays. See `Workbench`. One experiment at a time."""

    def __init__(self, host: str, found: Found, lab: Lab, planned: Changes, progress: Progress) -> None:
        self.name = host if host.startswith(VAGRANT) else f"{SCHEME}{host}"
        self.lab = lab
        self.image = None
        self.progress = progress
        self.budget = Budget(1, "one machine")
        self._host = host
        self._found = found
        self._planned = planned
        self._lock = threading.Lock()
        self._closed = False
        self._machine: SshMachine | None = None
        self._problem = ""
        self._undone = False

    @property
    def environment(self) -> Environment:
        """See `Workbench.environment`. Whether all was undone is known once the machine's block has ended."""
        isolation = "by undo, verified" if self._undone else "unknown: nothing was undone yet"
        login = self._found.channel.login
        return Environment(
            lsmlab=__version__,
            lab_digest=digest_of(self.lab.model_dump_json()),
            image="",
            kernel=self._found.kernel,
            packages={},
            qemu="",
            accelerator="",
            memory_mib=0,
            machine=clean(f"{login.user} at {login.address} port {login.port}: {self._found.system}"),
            isolation=f"by undo, NOT verified: {self._problem}" if self._problem else isolation,
            names=names_of(self._found, self.lab),
        )

    def command_line(self, kernel: Kernel) -> str:
        """See `Workbench.command_line`."""
        return self._found.command_line

    @contextlib.contextmanager
    def guest(self, kernel: Kernel, task: str) -> Iterator[SshMachine]:
        """See `Workbench.guest`: the machine, its journal written; at the end of the block all is undone."""
        machine = SshMachine(self._found.channel)
        with self._lock:
            if (error := self.not_undone) is not None:
                raise error
            if self._closed:
                raise MachineError("no experiment is begun: the run was interrupted")
            self._machine = machine
            self._undone = False
        self.progress.step(task, "writing down what is, to be put back")
        try:
            machine.begin(self._planned)  # inside: where its answer is lost, there may be a journal all the same
            yield machine
        finally:
            self.progress.step(task, "undoing all changes, and verifying that")
            self._problem = "the undoing was cut short"
            machine.stop()
            self._problem, self._undone = machine.problem, not machine.problem

    def close(self) -> None:
        """See `Workbench.close`: what runs is undone next."""
        with self._lock:
            self._closed = True
            if self._machine is not None:
                self._machine.interrupt()

    @property
    def not_undone(self) -> MachineError | None:
        """The error of a machine that is not known to be as it was; None where it is."""
        if not self._problem:
            return None
        return MachineError(
            f"{self._host} may still be changed, after a reboot too, since not all was undone: {self._problem}",
            hint=undo_hint(self._host),
        )


def undo(host: str, *, force: bool = False) -> Sequence[str] | None:
    """Undo what a killed run has left on a machine; what was put back, or None where there is no journal.

    `force`: also where that takes away what somebody else has changed since.

    Raises ChannelError, MachineError.
    """
    with contextlib.closing(open_ssh(host, PARTS)) as channel:
        try:
            answer = channel.ask("undo", within=UNDO_SECONDS, force=force)
        except LsmlabError as error:
            hint = "Keep a copy of that; `--force` puts all back as it was before the run." if not force else error.hint
            raise MachineError(error.message, hint=hint if "by somebody else" in error.message else "") from None
    if answer is None:
        return None
    if not isinstance(answer, list) or not all(isinstance(line, str) for line in answer):
        raise ChannelError(f"{host}: the agent answered nonsense: what it put back is no list")
    return [clean(line)[:300] for line in answer]
