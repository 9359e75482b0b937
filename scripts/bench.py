"""How fast lsmlab is on this machine: every figure of docs/performance.md, measured in one run.

Prints a table and writes bench.json. Times in seconds, memory in MiB, medians over repeated runs with their spread.
The keys at the top of bench.json are ratios of figures taken in this one run; raw figures are under `raw`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import paramiko
import testinfra

from lsmlab import attempt, discovery, host, paths, prepare, run
from lsmlab.bench import Bench, open_bench
from lsmlab.lab import Lab
from lsmlab.machine import states
from lsmlab.machine.hardware import Boot
from lsmlab.machine.qemu import QEMU, QemuMachine
from lsmlab.progress import Silent
from lsmlab.report import tables
from lsmlab.scenario import Scenario, Step
from lsmlab.terms import Arm, AttemptKind, Kernel

FLAGSHIP = "nginx-reads-shadow"
PARTS = ("floor", "flagship", "usual", "line", "boot", "cold")
COUNTS = (1, 5, 10, 20)
REPO = Path(__file__).resolve().parents[1]
GOALS = {
    "attempt_over_floor": "<= 1.3", "fresh_over_warm": ">= 15", "flagship_over_floor": "<= 10",
    "scenario_cost_ratio": "<= 1.5", "harness_peak_mb": "< 150", "guest_peak_mb": "",
}  # fmt: skip


def say(text: str) -> None:
    """Progress, on standard error."""
    sys.stderr.write(f"bench: {text}\n")


def timed(function: Callable[[], Any]) -> float:
    """The seconds that `function` takes."""
    start = time.monotonic()
    function()
    return time.monotonic() - start


class Figures:
    """What was measured, by name: a list of seconds each, in the order measured."""

    def __init__(self) -> None:
        self.raw: dict[str, Any] = {}

    def median(self, name: str) -> float | None:
        """The median of a figure, or None where it was not measured."""
        found = self.raw.get(name)
        return statistics.median(found) if found else None

    def ratio(self, above: str, below: str) -> float | None:
        """The quotient of two medians, or None where one was not measured."""
        over, under = self.median(above), self.median(below)
        return None if over is None or not under else round(over / under, 2)


def arms_of(scenario: Scenario, lab: Lab) -> list[Arm]:
    """The arms that a run of `scenario` has, each once: of all that the lab has, those that it is about."""
    return list(dict.fromkeys(arm for case in run.cases([scenario], lab) for arm in case.arms))


# (a) and (b): the floor, and one attempt of ours


def measure_attempts(figures: Figures, lab: Lab, scenario: Scenario, times: int) -> None:
    """Restore and action in a guest that runs, by turns: bare, and as lsmlab does it with all its evidence."""
    arm, spec = Arm.SELINUX_ENFORCING, scenario.attacks[0]
    names = ("restore", "agent_answer", "action_curl", "action_agent", "floor", "floor_agent", "attempt")
    found: dict[str, list[float]] = {name: [] for name in names}
    assert spec.http is not None
    request: dict[str, Any] = {"method": "GET", "port": spec.http.port, "path": spec.http.path, "timeout": 30}
    curl = ["curl", "--silent", "--path-as-is", "--output", "/dev/null", attempt.url_of(spec)]
    with open_bench(lab, Silent(), guests=1) as bench, bench.guest(arm.kernel, "bench") as machine:
        plan = prepare.plan_of(scenario, lab)
        prepare.bring_into(machine.channel, arm, plan, bench.image)
        opened = attempt.open_window(machine.channel, plan.unit, plan.object_path)
        machine.snapshot(run.READY)

        def restored_and_up() -> tuple[float, float]:
            return timed(lambda: machine.restore(run.READY)), timed(lambda: machine.channel.ask("ping"))

        def attempt_of_ours() -> None:
            machine.restore(run.READY)
            seen = attempt.make(machine.channel, spec, plan.unit, opened)
            judged = run.judge_attempt(scenario, spec, arm, seen, bench.lab.id)
            if judged.attribution is None or judged.attribution.denial is None:
                raise SystemExit(f"bench: the attempt that is measured was not blocked: {judged.reason}")

        for _ in range(times):
            restore, answer = restored_and_up()
            action = timed(lambda: machine.channel.run(curl).check())
            found["restore"].append(restore)
            found["agent_answer"].append(answer)
            found["action_curl"].append(action)
            found["floor"].append(restore + answer + action)
            found["attempt"].append(timed(attempt_of_ours))
            restore, answer = restored_and_up()
            action = timed(lambda: machine.channel.ask("visit", **request))
            found["action_agent"].append(action)
            found["floor_agent"].append(restore + answer + action)
    figures.raw |= found


# (c), (e), (f), (g): the command, as a person runs it


def tree_of(root: int) -> Iterator[int]:
    """`root` and the processes below it."""
    yield root
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{root}/task").iterdir():
            for child in (thread / "children").read_text("ascii").split():
                yield from tree_of(int(child))


def peak_mib(pid: int) -> tuple[str, float]:
    """A process's name and the most memory that it had, shared libraries included."""
    with contextlib.suppress(OSError):
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text("utf-8").splitlines())
        return fields["Name"].strip(), int(fields.get("VmHWM", "0 kB").split()[0]) / 1024
    return "", 0.0


def lsmlab(*arguments: str, state: Path, cache: Path | None = None) -> tuple[float, float, float]:
    """Run the command; seconds, and the peak memory of the command and of its largest guest. Ends where it fails."""
    own = {"XDG_STATE_HOME": str(state), **({"XDG_CACHE_HOME": str(cache)} if cache else {})}
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "lsmlab.cli", *arguments, "--quiet"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=state, env={**os.environ, **own},
    )  # fmt: skip
    harness = guest = 0.0
    ended = threading.Event()

    def watch() -> None:
        nonlocal harness, guest
        while not ended.wait(0.25):
            for pid in tree_of(process.pid):
                name, peak = peak_mib(pid)
                if name.startswith("qemu-system"):
                    guest = max(guest, peak)
                elif pid == process.pid:
                    harness = max(harness, peak)

    watcher = threading.Thread(target=watch)
    watcher.start()
    said, _ = process.communicate()
    seconds = time.monotonic() - start
    ended.set()
    watcher.join()
    if process.returncode != 0:
        raise SystemExit(f"bench: lsmlab {' '.join(arguments)}: exit status {process.returncode}\n{said}")
    return seconds, harness, guest


def measure_flagship(figures: Figures, lab: Lab, work: Path, times: int) -> None:
    """The flagship under both frameworks, from saved guests; and memory meanwhile."""
    lsmlab("run", FLAGSHIP, "--lab", lab.id, state=work)  # saved guests are there, and verified
    runs = [lsmlab("run", FLAGSHIP, "--lab", lab.id, state=work) for _ in range(times)]
    figures.raw["flagship"] = [seconds for seconds, _, _ in runs]
    figures.raw["harness_mib"] = [harness for _, harness, _ in runs]
    figures.raw["guest_mib"] = [guest for _, _, guest in runs]


def measure_line(figures: Figures, lab: Lab, scenario: Scenario, work: Path, counts: Sequence[int]) -> None:
    """Wall time of 1, 5, 10, 20 scenarios with one attack and one benign attempt each, and the line through them."""
    folder = work / "many" / "scenarios"
    source = REPO / "scenarios" / FLAGSHIP / "scenario.yaml"
    benign = [a.id for a in scenario.benign][1:]
    text = source.read_text("utf-8")
    for name in benign:  # cut the second benign attempt out
        start = text.index(f"  - id: {name}\n")
        text = text[:start] + text[text.index("\nexpected:", start) + 1 :]
    for number in range(max(counts)):
        own = folder / f"copy-{number:02}"
        shutil.copytree(source.parent, own)
        (own / "scenario.yaml").write_text(text.replace(f"id: {FLAGSHIP}\n", f"id: copy-{number:02}\n", 1), "utf-8")
    points = []
    for count in counts:
        say(f"{count} scenarios")
        names = [str(folder / f"copy-{number:02}") for number in range(count)]
        points.append((count, lsmlab("run", *names, "--lab", lab.id, state=work)[0]))
    fit = statistics.linear_regression([c for c, _ in points], [s for _, s in points])
    worst = max(abs(s - (fit.slope * c + fit.intercept)) / s for c, s in points)
    figures.raw["line"] = {
        "seconds": dict(points), "slope": fit.slope, "intercept": fit.intercept, "worst_deviation": worst,
        "attempts": len(scenario.attacks + scenario.benign[:1]) * len(arms_of(scenario, lab)),
    }  # fmt: skip


def measure_cold(figures: Figures, lab: Lab, work: Path) -> None:
    """The same from an empty cache: packages fetched, image built, three boots."""
    with tempfile.TemporaryDirectory(dir=paths.make(paths.cache())) as cache:
        figures.raw["cold"] = [lsmlab("run", FLAGSHIP, "--lab", lab.id, state=work, cache=Path(cache))[0]]


# (d): the usual way


class FreshGuest:
    """A guest booted for one arm and reached over SSH through a forwarded port, as test suites do it."""

    def __init__(self, bench: Bench, disk: Path, kernel: Kernel, key: Path, work: Path) -> None:
        self._port = _free_port()
        overlay = work / f"usual-{kernel}-{self._port}.qcow2"
        make = [host.need("qemu-img"), "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(disk), str(overlay)]
        host.run(make, what="making a disk")
        self._process = subprocess.Popen(
            host.dying_with_us([
                host.need(QEMU), *bench.hardware.arguments(),
                "-drive", f"file={overlay},if=virtio,format=qcow2,cache=unsafe",
                "-netdev", f"user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{self._port}-:22",
                "-device", "virtio-net-pci,netdev=net,romfile=",
                "-kernel", str(bench.image.kernel), "-initrd", str(bench.image.initrd),
                "-append", states.command_line(bench.lab, bench.image, kernel, "kvm"),  # none for emulation's sake
            ]),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._key = key

    def wait(self, seconds: float = 300) -> Any:
        """testinfra's host, as soon as SSH answers."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                with paramiko.SSHClient() as client:
                    client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
                    client.connect(
                        "127.0.0.1", self._port, "root", key_filename=str(self._key), timeout=5, banner_timeout=60,
                        auth_timeout=60, look_for_keys=False, allow_agent=False,
                    )  # fmt: skip
                break
            except (OSError, paramiko.SSHException, EOFError):
                if time.monotonic() > deadline:
                    raise SystemExit("bench: the guest of the usual way never answered over SSH") from None
                time.sleep(1)
        config = self._key.with_name("ssh_config")
        config.write_text("Host *\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n", "utf-8")
        return testinfra.get_host(
            f"paramiko://root@127.0.0.1:{self._port}", ssh_identity_file=str(self._key), ssh_config=str(config)
        )

    def stop(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def prepare_usual(bench: Bench, work: Path) -> tuple[Path, Path]:
    """A disk whose guests answer over SSH, and the key. Not part of what is measured."""
    key = paramiko.ECDSAKey.generate()
    path = work / "key"
    key.write_private_key_file(str(path))
    disk = work / "usual.qcow2"
    boot = Boot(bench.image.kernel, bench.image.initrd, bench.command_line(Kernel.SELINUX))
    machine = QemuMachine.start(
        "usual", bench.hardware, bench.image.disk, boot=boot, scratch=work, keep_overlay=disk, timeout=300
    )
    try:
        channel = machine.channel
        channel.run(["mkdir", "-m", "0700", "-p", "/root/.ssh"]).check()
        channel.write_file("/root/.ssh/authorized_keys", f"{key.get_name()} {key.get_base64()}\n".encode(), mode=0o600)
        channel.write_file("/etc/systemd/network/all.network", b"[Match]\nName=en* eth*\n[Network]\nDHCP=yes\n")
        channel.write_file("/etc/ssh/sshd_config.d/root.conf", b"PermitRootLogin prohibit-password\nUseDNS no\n")
        channel.run(["systemctl", "unmask", "ssh.service"]).check()
        channel.run(["systemctl", "enable", "ssh.service", "systemd-networkd.service"]).check()
        channel.ask("relabel", within=60, paths=["/root", "/etc/ssh", "/etc/systemd"])
        channel.run(["sync"]).check()
        machine.monitor("system_powerdown")
        channel.run(["sh", "-c", "sync; echo 1 > /proc/sys/kernel/sysrq; echo u > /proc/sysrq-trigger; sync"])
        time.sleep(2)
    finally:
        machine.stop()
    return disk, path


def usual_step(machine: Any, step: Step, arm: Arm) -> None:
    """One step of the set-up, by the commands that one would type."""
    if step.run is not None:
        machine.check_output(" ".join(step.run))
    elif step.join is not None:
        machine.check_output("usermod --append --groups %s %s", step.join.group, step.join.user)
    elif step.write is not None:
        machine.check_output("mkdir -p %s", str(Path(step.write.path).parent))
        machine.check_output("printf %%s %s > %s", step.write.data().decode(), step.write.path)
        if arm.kernel is Kernel.SELINUX:
            machine.check_output("restorecon -RF %s", str(Path(step.write.path).parent))


def usual_arm(bench: Bench, scenario: Scenario, arm: Arm, disk: Path, key: Path, work: Path) -> None:
    """One arm the usual way: boot, wait for SSH, set up by commands, look with testinfra."""
    guest = FreshGuest(bench, disk, arm.kernel, key, work)
    try:
        machine = guest.wait()
        folder = REPO / "scenarios" / FLAGSHIP
        for step in scenario.setup:
            usual_step(machine, step, arm)
        if arm is Arm.SELINUX_PERMISSIVE:
            machine.check_output("setenforce 0")
        if arm.kernel is Kernel.APPARMOR:
            profile = (folder / "nginx.apparmor").read_text("utf-8")
            machine.check_output("printf %%s %s > /etc/apparmor.d/nginx", profile)
            complain = "--Complain" if arm is Arm.APPARMOR_COMPLAIN else ""
            machine.check_output(f"apparmor_parser --replace {complain} /etc/apparmor.d/nginx")
        machine.check_output("systemctl restart nginx")
        assert machine.service("nginx").is_running
        assert machine.service("auditd").is_running
        assert machine.file("/etc/shadow").exists
        if arm.kernel is Kernel.SELINUX:
            assert machine.check_output("getenforce") == ("Enforcing" if arm.enforcing else "Permissive")
        for spec in scenario.attempts:
            status = machine.check_output(
                "curl --silent --path-as-is --output /dev/null --write-out '%%{http_code}' %s", attempt.url_of(spec)
            )
            refused = arm.enforcing and spec.kind is AttemptKind.ATTACK
            assert status == ("403" if refused else "200"), (arm, spec.id, status)
            if refused:
                time.sleep(1)  # audit is asynchronous
                assert machine.check_output("grep -c DENIED /var/log/audit/audit.log || grep -c denied "
                                            "/var/log/audit/audit.log") != "0"  # fmt: skip
    finally:
        guest.stop()


def measure_usual(figures: Figures, lab: Lab, scenario: Scenario, work: Path, times: int) -> None:
    """The flagship the usual way, arm after arm."""
    with open_bench(lab, Silent()) as bench:
        disk, key = prepare_usual(bench, work)

        def arm_after_arm() -> None:  # as pytest does
            for arm in arms_of(scenario, lab):
                usual_arm(bench, scenario, arm, disk, key, work)

        figures.raw["usual"] = [timed(arm_after_arm) for _ in range(times)]


def measure_boot(figures: Figures, lab: Lab) -> None:
    """What a boot's time is spent on, as systemd-analyze says in a guest from the saved state."""
    with open_bench(lab, Silent()) as bench, bench.guest(Kernel.SELINUX, "bench boot") as machine:
        said = machine.channel.run(["systemd-analyze", "time"]).check().out.strip().splitlines()[0]
        blame = machine.channel.run(["systemd-analyze", "blame", "--no-pager"]).check().out.strip().splitlines()
        figures.raw["boot"] = {"time": said, "slowest": [line.strip() for line in blame[:8]]}


# The report


def summary(figures: Figures, processors: int) -> dict[str, Any]:
    """The ratios, each from figures of this one run; None where a part was left out."""
    floor, line = figures.median("floor"), figures.raw.get("line")
    scenario_ratio = None
    if floor and line:
        scenario_ratio = round(line["slope"] / (line["attempts"] * floor / processors), 2)
    harness, guest = (max(figures.raw.get(name) or [0]) for name in ("harness_mib", "guest_mib"))
    return {
        "attempt_over_floor": figures.ratio("attempt", "floor"),
        "fresh_over_warm": figures.ratio("usual", "flagship"),
        "flagship_over_floor": figures.ratio("flagship", "floor"),
        "scenario_cost_ratio": scenario_ratio,
        "harness_peak_mb": round(harness) or None,
        "guest_peak_mb": round(guest) or None,
    }


def report(figures: Figures, ratios: dict[str, Any]) -> str:
    """The tables."""
    rows: list[tuple[str, ...]] = []
    labels = {
        "restore": "restore (loadvm)", "agent_answer": "the agent answers", "action_curl": "the request with curl",
        "action_agent": "the request by the agent", "floor": "(a) floor: restore, answer, curl",
        "floor_agent": "    the same, the agent's request", "attempt": "(b) our attempt, with its evidence",
        "flagship": "(c) flagship, warm, both frameworks", "usual": "(d) flagship, the usual way",
        "cold": "(g) flagship from an empty cache",
    }  # fmt: skip
    for name, label in labels.items():
        found = figures.raw.get(name)
        if found:
            spread = f"{min(found):.2f} - {max(found):.2f}"
            rows.append((label, f"{statistics.median(found):.2f}", spread, str(len(found))))
    parts = [tables.plain(("figure", "median, s", "spread, s", "runs"), rows)]
    line = figures.raw.get("line")
    if line:
        points = ", ".join(f"{count}: {seconds:.1f} s" for count, seconds in line["seconds"].items())
        parts.append(
            f"(e) {points}\n    each further scenario: {line['slope']:.2f} s ({line['attempts']} attempts); "
            f"farthest from the line: {line['worst_deviation']:.0%}"
        )
    if "boot" in figures.raw:
        parts.append(
            "boot: " + figures.raw["boot"]["time"] + "".join(f"\n    {u}" for u in figures.raw["boot"]["slowest"])
        )
    rows = [(name, "-" if value is None else str(value), GOALS[name]) for name, value in ratios.items()]
    parts.append(tables.plain(("ratio", "here", "goal"), rows))
    return "\n\n".join(parts)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lab", default=discovery.DEFAULT_LAB)
    parser.add_argument("--only", action="append", choices=PARTS, help="measure this part; may be given again")
    parser.add_argument("--skip", action="append", choices=PARTS, default=[], help="leave this part out")
    parser.add_argument("--times", type=int, default=5, help="how often short parts are repeated (default: 5)")
    parser.add_argument("--json", type=Path, default=Path("bench.json"), metavar="FILE")
    options = parser.parse_args()
    wanted = [part for part in options.only or PARTS if part not in options.skip]
    lab = discovery.load_lab(options.lab)
    scenario = discovery.load_scenarios([FLAGSHIP])[0]
    figures, processors = Figures(), len(os.sched_getaffinity(0))
    start = time.monotonic()
    about = {"processors": processors, "machine": platform.machine(), "qemu": host.version(QEMU, "--version"),
             "lab": lab.id, "seconds": 0}  # fmt: skip

    def write() -> dict[str, Any]:
        """What was measured so far, into the file: the next part may be interrupted."""
        ratios = summary(figures, processors)
        about["seconds"] = round(time.monotonic() - start)
        text = json.dumps({**ratios, "about": about, "raw": figures.raw}, indent=1)
        options.json.write_text(f"{text}\n", "utf-8")
        return ratios

    logging.getLogger("paramiko").setLevel(logging.CRITICAL)  # it prints every knock at a guest that still boots
    with tempfile.TemporaryDirectory(prefix="bench-", dir=paths.make(paths.cache())) as folder:
        work = Path(folder)
        steps: dict[str, Callable[[], None]] = {
            "flagship": lambda: measure_flagship(figures, lab, work, options.times),
            "floor": lambda: measure_attempts(figures, lab, scenario, options.times * 2),
            "line": lambda: measure_line(figures, lab, scenario, work, COUNTS),
            "usual": lambda: measure_usual(figures, lab, scenario, work, 1),
            "boot": lambda: measure_boot(figures, lab),
            "cold": lambda: measure_cold(figures, lab, work),
        }
        for name, step in steps.items():
            if name in wanted:
                say(f"measuring: {name}")
                step()
                write()
    print(report(figures, write()))
    say(f"written: {options.json}")


if __name__ == "__main__":
    main()
