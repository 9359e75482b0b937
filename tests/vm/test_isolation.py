"""Nothing that an attempt does is seen by the next: whatever it changes, the restored guest is as it was."""

from __future__ import annotations

import time

import pytest

from lsmlab import attempt, discovery, prepare, run
from lsmlab.bench import Bench
from lsmlab.channel.base import Channel
from lsmlab.scenario import Scenario
from lsmlab.terms import Arm, Kernel, Result

pytestmark = pytest.mark.lsmlab_vm

TRACES = {
    "files": "find /etc /root /tmp /srv /var/www /usr/local -xdev -printf '%p %i %m %u %s %C@\\n' | sort | sha256sum",
    "content": "cat /etc/shadow /etc/passwd /var/www/html/index.html | sha256sum",
    # udevd ends its workers when they have been idle for a while
    "processes": "ps --ppid 2 -p 2 --deselect -o pid=,comm= | grep -v -e sh$ -e ps$ -e grep$ -e udev-worker",
    "mounts": "cat /proc/mounts",
    "modules": "cut -d' ' -f1 /proc/modules | sort",
    "sysctl": "cat /proc/sys/kernel/yama/ptrace_scope /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/hostname",
    "mode": "cat /sys/fs/selinux/enforce 2>/dev/null; cat /sys/kernel/security/apparmor/profiles 2>/dev/null",
    "policy": "cat /sys/fs/selinux/status 2>/dev/null | od -An -tx4 | head -n 2; "
    "ls /sys/kernel/security/apparmor/policy/profiles 2>/dev/null",
    "booleans": "grep . /sys/fs/selinux/booleans/httpd_* 2>/dev/null | sha256sum",
    # every program that is started leaves a record, those that look as well: the log's size is no trace
    "log": "stat -c %i /var/log/audit/audit.log; head -c 2000 /var/log/audit/audit.log | sha256sum",
    "audit": "auditctl -l; auditctl -s | grep -v -e backlog -e pid",
    "units": "systemctl is-active nginx auditd dbus",
    "year": "date +%Y",
}
"""What a guest is known by. Each is a shell command whose output says it."""

DAMAGE = {
    "files": "touch /tmp/left /etc/left; rm -f /etc/motd; chmod 0777 /etc/shadow; ln -s /etc/shadow /srv/link",
    "content": "echo 'x:y:z' >> /etc/shadow; echo gone > /var/www/html/index.html",
    "processes": "setsid -f sleep 1000",
    "mounts": "mount -t tmpfs none /mnt",
    "modules": "modprobe dummy",
    "sysctl": "echo 3 > /proc/sys/kernel/yama/ptrace_scope; echo 1 > /proc/sys/net/ipv4/ip_forward; hostname other",
    "mode": "[ ! -e /sys/fs/selinux/enforce ] || setenforce 0; [ ! -d /sys/kernel/security/apparmor ] || "
    "apparmor_parser --remove /etc/apparmor.d/nginx.apparmor",
    "policy": "[ ! -e /sys/fs/selinux/enforce ] || load_policy; [ ! -d /sys/kernel/security/apparmor ] || "
    "echo 'profile left { }' | apparmor_parser --add",
    "booleans": "[ ! -e /sys/fs/selinux/enforce ] || setsebool httpd_can_network_connect on",
    "log": "truncate -s 0 /var/log/audit/audit.log; mv /var/log/audit/audit.log /var/log/audit/moved",
    "audit": "auditctl -D; auditctl -e 0",
    "units": "systemctl stop nginx",
    "year": "date --set=2001-02-03",
}
"""For each trace, what changes it."""

ONLY_SELINUX = {"booleans"}
ONLY_WITH_A_FRAMEWORK = {"mode", "policy"}


def traces(channel: Channel) -> dict[str, str]:
    return {name: channel.run(["sh", "-c", command]).out for name, command in TRACES.items()}


@pytest.fixture(scope="module")
def flagship() -> Scenario:
    return discovery.load_scenarios(["nginx-reads-shadow"])[0]


@pytest.mark.parametrize("arm", [Arm.DAC, Arm.SELINUX_ENFORCING, Arm.APPARMOR_ENFORCE])
def test_a_restored_guest_is_as_it_was(bench: Bench, flagship: Scenario, arm: Arm) -> None:
    plan = prepare.plan_of(flagship, bench.lab)
    with bench.guest(arm.kernel, f"isolation {arm}") as machine:
        channel = machine.channel
        prepare.bring_into(channel, arm, plan, bench.image)
        attempt.open_window(channel, plan.unit, plan.object_path)
        machine.snapshot(run.READY)
        machine.restore(run.READY)
        before = traces(channel)
        assert all(before[name] for name in ("files", "processes", "log", "units", "year")), "nothing was looked at"

        for command in DAMAGE.values():
            channel.run(["sh", "-c", command])
        changed = {name for name, seen in traces(channel).items() if seen != before[name]}
        expected = set(TRACES)
        expected -= ONLY_SELINUX if arm is not Arm.SELINUX_ENFORCING else set()
        expected -= ONLY_WITH_A_FRAMEWORK if arm is Arm.DAC else set()
        assert changed == expected, "damage that was not done proves nothing"

        machine.restore(run.READY)
        assert traces(channel) == before


def test_attempts_after_a_restore_are_told_apart(bench: Bench, flagship: Scenario) -> None:
    """A restore repeats serials, process ids and random numbers: what identifies an attempt is the host's."""
    arm, spec = Arm.SELINUX_ENFORCING, flagship.attacks[0]
    plan = prepare.plan_of(flagship, bench.lab)
    with bench.guest(arm.kernel, f"isolation {arm}") as machine:
        prepare.bring_into(machine.channel, arm, plan, bench.image)
        opened = attempt.open_window(machine.channel, plan.unit, plan.object_path)
        machine.snapshot(run.READY)
        seen = []
        for _ in range(3):
            machine.restore(run.READY)
            seen.append(attempt.make(machine.channel, spec, plan.unit, opened))
        judged = [run.judge_attempt(flagship, spec, arm, s, "debian-13") for s in seen]
    assert [j.result for j in judged] == [Result.BLOCKED] * 3
    assert all(j.attribution and j.attribution.denial for j in judged)
    assert len({s.canary for s in seen}) == 3, "each attempt has a canary of its own"
    lengths = {len(s.log) for s in seen}
    assert all(s.log.count("type=AVC") == seen[0].log.count("type=AVC") for s in seen), (
        "one attempt's record in another's"
    )
    assert max(lengths) - min(lengths) < 200, "the window of one attempt grew by another's records"


@pytest.mark.parametrize(
    ("logging", "enforcing", "logged", "refused"),
    [
        (Arm.SELINUX_PERMISSIVE, Arm.SELINUX_ENFORCING, "permissive=1", "permissive=0"),
        (Arm.APPARMOR_COMPLAIN, Arm.APPARMOR_ENFORCE, 'apparmor="ALLOWED"', 'apparmor="DENIED"'),
    ],
)
def test_a_logging_arm_has_the_enforcing_arms_processes_and_nothing_of_its_attempts(
    bench: Bench, flagship: Scenario, logging: Arm, enforcing: Arm, logged: str, refused: str
) -> None:
    """It goes on from the snapshot that the enforcing arm's attempts start from; only the mode is switched."""
    records = run.run_boot(bench, flagship, (logging, enforcing))
    assert [records[arm].error for arm in (logging, enforcing)] == ["", ""]
    assert (records[logging].started_in, records[enforcing].started_in) == (enforcing, None)
    assert [a.result for a in records[logging].attempts] == [Result.ALLOWED] * len(flagship.attempts)
    seen = {arm: [a.observation for a in record.attempts if a.observation] for arm, record in records.items()}
    processes = {arm: [(p.pid, p.domain) for p in looks[0].subject_before.processes] for arm, looks in seen.items()}
    assert processes[logging] == processes[enforcing]
    assert refused in seen[enforcing][0].log and not any(logged in look.log for look in seen[enforcing])
    assert logged in seen[logging][0].log, "nothing was logged of what was allowed: a decision was cached"
    assert not any(refused in look.log for look in seen[logging])


def test_a_restore_sets_the_clock_back(bench: Bench) -> None:
    """A guest that goes by a clock which runs on would have every timer end at once."""
    clock = ["python3", "-c", "import time; print(time.monotonic())"]
    with bench.guest(Kernel.SELINUX, "isolation clock") as machine:
        machine.snapshot("then")
        then = float(machine.channel.run(clock).check().out)
        time.sleep(5)
        late = float(machine.channel.run(clock).check().out)
        machine.restore("then")
        again = float(machine.channel.run(clock).check().out)
    assert late - then > 4.5
    assert again - then < (late - then) / 2


def test_a_saved_guest_holds_what_it_uses_and_little_besides(bench: Bench) -> None:
    """What its boot has used and given back is cleared before: else it is saved, and read at each restore."""
    with bench.guest(Kernel.NONE, "isolation memory") as machine:
        said = machine.channel.run(["grep", "^MemFree:", "/proc/meminfo"]).check().out
    used_mib = bench.lab.memory_mib - (int(said.split()[1]) >> 10)
    saved_mib = (bench.state(Kernel.NONE, "isolation memory").folder / "ram").stat().st_size >> 20
    assert saved_mib < used_mib
