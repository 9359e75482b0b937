"""The command as a person calls it, in a process of its own. No guests: where one would boot, a stub stands."""

from __future__ import annotations

import concurrent.futures
import contextlib
import datetime
import json
import os
import platform
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pexpect
import pytest
from builders import outcome
from test_signed import needs_gpg

from lsmlab import __version__, cache, discovery, proofs
from lsmlab.host import to_install
from lsmlab.image import build, debian
from lsmlab.outcome import ArmRecord
from lsmlab.store import Store
from lsmlab.terms import Arm, Framework
from ssh_server import ssh_home

REPO = Path(__file__).resolve().parents[2]
FLAGSHIP = "nginx-reads-shadow"
SCENARIO = (REPO / "scenarios" / FLAGSHIP / "scenario.yaml").read_text("utf-8")
REAL = (
    "apt-config", "apt-get", "awk", "bash", "cat", "dpkg", "env", "head", "mount", "newuidmap", "qemu-img", "rm",
    "setpriv", "sh", "sleep", "true", "unshare",
)  # fmt: skip
"""What a made-up machine has of this one; each test adds its stubs."""
QEMU = "qemu-system-x86_64"
needs_space = pytest.mark.skipif(
    shutil.disk_usage("/tmp").free >> 20 < debian.NEEDED_MIB,  # noqa: S108 - where pytest makes its folders
    reason=f"a build is refused below {debian.NEEDED_MIB} MiB free: its later steps cannot be reached",
)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk for the test")


@dataclass(slots=True)
class Host:
    """A machine of few programs, with an empty LSMLAB_HOME, and the lsmlab of this source tree."""

    path: Path
    wrapper: tuple[str, ...] = ()
    """What lsmlab is started through."""
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        return self.path / "home"

    @property
    def work(self) -> Path:
        return self.path / "work"

    @property
    def cache(self) -> Path:
        return self.home / "cache"

    @property
    def store(self) -> Path:
        return self.home / "state" / "outcomes.sqlite"

    def leftovers(self) -> list[str]:
        scratch = self.cache / "scratch"
        return sorted(p.name for p in scratch.iterdir()) if scratch.is_dir() else []

    def stub(self, name: str, body: str) -> None:
        """A program that writes down that it was called, and does `body`."""
        file = self.path / "bin" / name
        file.unlink(missing_ok=True)
        file.write_text(f'#!/bin/sh\necho "$*" >> "{self.path}/called-{name}"\n{body}\n')
        file.chmod(0o755)

    def called(self, name: str) -> bool:
        return (self.path / f"called-{name}").exists()

    @property
    def all_environment(self) -> dict[str, str]:
        return {
            "PATH": str(self.path / "bin"), "HOME": str(self.path), "LSMLAB_HOME": str(self.home), "COLUMNS": "100",
            "LANG": "C.UTF-8", **self.environment,
        }  # fmt: skip

    def on_terminal(self, width: int, *arguments: str) -> str:
        """What a terminal of this width shows of a call that ends with 0."""
        environment: Any = {**self.all_environment, "COLUMNS": str(width)}
        argv = [*self.wrapper, sys.executable, "-m", "lsmlab.cli", *arguments]
        child = pexpect.spawn(
            argv[0], argv[1:], cwd=str(self.work), env=environment, encoding="utf-8", dimensions=(24, width), timeout=60
        )
        shown = child.read()
        child.close()
        assert child.exitstatus == 0, shown
        return str(shown)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.wrapper, sys.executable, "-m", "lsmlab.cli", *arguments],
            cwd=self.work,
            env=self.all_environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def lsmlab(self, *arguments: str) -> Ended:
        with self.start(*arguments) as process:
            out, err = process.communicate(timeout=60)
        return Ended(process.returncode, out, err)

    def side_by_side(self, calls: Sequence[Sequence[str]]) -> list[Ended]:
        started = [self.start(*arguments) for arguments in calls]
        found = []
        for process in started:
            with process:
                out, err = process.communicate(timeout=60)
            found.append(Ended(process.returncode, out, err))
        return found


@dataclass(frozen=True, slots=True)
class Ended:
    """What one call printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """Standard error without the steps."""
        return "".join(line for line in self.err.splitlines(keepends=True) if not line.startswith("["))

    def refused(self, code: int) -> str:
        """The one clear error: nothing on standard output, no traceback, and this exit code."""
        assert (self.code, self.out) == (code, ""), f"{self.code}\n{self.out}\n{self.err}"
        assert "Traceback" not in self.err, self.err
        assert self.complaint.count("lsmlab: ") <= 1, self.err
        return self.complaint


def made_up(folder: Path) -> Host:
    """A machine of this sort in an empty `folder`."""
    for name in ("bin", "work"):
        (folder / name).mkdir()
    for name in REAL:
        real = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        if real:
            (folder / "bin" / name).symlink_to(real)
    machine = Host(folder, environment={"LSMLAB_MIRROR": "http://mirror.invalid/debian"})
    machine.stub("mmdebstrap", 'echo "E: boom" >&2; exit 1')
    machine.stub(QEMU, 'echo "QEMU emulator version 0.0 (a stub)"')
    return machine


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return made_up(tmp_path)


@pytest.fixture
def imaged(host: Host, monkeypatch: pytest.MonkeyPatch) -> Host:
    """A machine whose cache has an image of the default lab, as far as its manifest tells."""
    monkeypatch.setenv("LSMLAB_HOME", str(host.home))
    with cache.scratch("image") as work:
        for name in debian.FILES:
            (work / name).write_bytes(name.encode() * 100)
        about = {
            "lab": "debian-13",
            "kernel_release": "6.12-made-up",
            "packages": {"nginx": "1"},
            "built": "2026-11-24",
            "root_arguments": "root=/dev/vda rw",
        }
        cache.publish(work, build.folder_of(discovery.load_lab(), "a"), debian.FILES, about)
    host.stub("qemu-img", '[ "$1" = create ] || exit 1; for file; do :; done; : > "$file"')
    return host


# What it says of itself


def test_the_version(host: Host) -> None:
    assert host.lsmlab("--version") == Ended(0, f"lsmlab {__version__}\n", "")
    assert not host.home.exists()


def test_no_command_at_all_shows_the_help(host: Host) -> None:
    found = host.lsmlab()
    assert found.code in {0, 4}
    shown = found.out + found.err
    commands = "run scenarios labs show shell rewind try images doctor new check schema catalogue"
    for command in commands.split():
        assert re.search(rf"^\W*{command} ", shown, re.MULTILINE), shown


HELP = {
    "": "Exit codes are pytest's",
    "run": f"lsmlab run {FLAGSHIP}",
    "try": "lsmlab try --as nginx -- cat /etc/shadow",
    "show": "lsmlab show 12",
    "shell": "lsmlab shell debian-13 --arm",
    "rewind": "lsmlab rewind 12 --arm selinux-enforcing -- ls -Z /etc/shadow",
    "images build": "lsmlab images build debian-13",
    "images export": "lsmlab images export debian-13 debian-13.image.tar.gz",
    "images import": "lsmlab images import debian-13.image.tar.gz",
    "undo": "lsmlab undo admin@web1.example.org",
    "doctor": "lsmlab doctor --ssh admin@web1.example.org",
    "scenarios": "lsmlab scenarios --framework apparmor --verdict NOT_CONTAINED",
    "new scenario": "lsmlab new scenario nginx-reads-my-key",
    "check": "lsmlab check nginx-reads-shadow --lab debian-13 --lab debian-12",
    "schema": "lsmlab schema scenario > scenario.schema.json",
    "catalogue": "lsmlab catalogue --outcomes debian-13.json",
}


def test_the_help_of_every_command_has_examples_where_it_takes_arguments(host: Host) -> None:
    for command, found in zip(HELP, host.side_by_side([[*c.split(), "--help"] for c in HELP]), strict=True):
        out = found.out
        assert (found.code, found.err) == (0, ""), command
        assert HELP[command] in out, out
        assert "Usage: " in out
        assert max(len(line) for line in out.splitlines()) <= 100, out
        assert not command or re.search(r"Examples?:", out), out
    assert not host.home.exists()


# Wrong usage: 4, and nothing was made


WRONG_USAGE: list[tuple[list[str], list[str]]] = [
    (["run", "nginx-read-shadow"], ["unknown scenario 'nginx-read-shadow'", f"Did you mean '{FLAGSHIP}'?"]),
    (["run", "qqqq"], ["unknown scenario 'qqqq'", "Known: ", FLAGSHIP]),
    (["run", "--lab", "debian13"], ["unknown lab 'debian13'", "Did you mean 'debian-13'?"]),
    (["run", "-f", "selinx"], ["unknown framework 'selinx'", "Did you mean 'selinux'?"]),
    (["shell", "--accel", "hvf"], ["--accel hvf: expected auto, kvm or tcg"]),
    (["run", "--guests", "0"], ["'--guests'", "greater than or equal to 1"]),
    (["shell", "debian-13", "--arm", "selinux-enforce"], ["unknown arm 'selinux-enforce'", "'selinux-enforcing'?"]),
    (["rewind"], ["OUTCOME"]),
    (["rewind", "12", "--accel", "hvf"], ["--accel hvf: expected auto, kvm or tcg"]),
    (["rewind", "12", "--guests", "2"], ["No such option"]),
    (["try", "--as", "ngin", "--", "id"], ["'ngin'", "Did you mean 'nginx'?"]),
    (["try", "--as", "nginx", "--arm", "dacc", "--", "id"], ["unknown arm 'dacc'", "Did you mean 'dac'?"]),
    (["try", "--as", "nginx", "--access", "raed", "--", "id"], ["'raed'", "Did you mean 'read'?"]),
    (["try", "--as", "nginx", "--profile", "none.aa", "--", "id"], ["--profile none.aa: no such file"]),
    (["try", "--as", "nginx"], ["COMMAND"]),
    (["try", "--", "id"], ["--as"]),
    (["run", "--jsn", "x"], ["No such option", "--json"]),
    (["images", "build", "debian-14"], ["unknown lab 'debian-14'", "Did you mean 'debian-1"]),
    (["images", "build"], ["LAB"]),
    (["images", "build", "debian-13", "--image", "x"], ["lab debian-13 is built from packages, and takes no image"]),
    (["images", "build", "fedora-44", "--image", "no.qcow2"], ["--image no.qcow2: no such file"]),
    (["images", "build", "fedora-44", "debian-13", "--image", "x"], ["--image x: of which lab?"]),
    (["run", "--lab", "debian-12", "--image", "x"], ["--image x: lab debian-12 is built from packages"]),
    (["images", "export", "debian14"], ["unknown lab 'debian14'"]),
    (["images", "export", "debian-13", "no/out.tar.gz"], ["no/out.tar.gz: cannot be written there"]),
    (["images", "import", "x.tar.gz", "--sha256", "abc"], ["--sha256 abc: expected 64 hexadecimal digits"]),
    (["images", "import"], ["FILE|URL"]),
    (["doctor", "--lab", "qqqq"], ["unknown lab 'qqqq'", "debian-13"]),
    (["run", "--names", "debian-13"], ["for a machine that is there already", "--lab ssh:HOST"]),
    (["run", "--allow-changes"], ["for a machine that is there already"]),
    (["run", "--lab", "ssh:web1", "--falsify"], ["guests that are thrown away"]),
    (["undo", "web1:ssh"], ["'web1:ssh': no name of a machine"]),
    (["undo"], ["HOST"]),
    (["doctor", "--ssh", "web1:ssh"], ["--ssh 'web1:ssh': no name of a machine", "[USER@]HOST[:PORT]"]),
    (["doctor", "--ssh", "vagrant:a b"], ["'a b' is no name of a machine of Vagrant"]),
    (["doctor", "--ssh", "web1", "--lab", "qqqq"], ["unknown lab 'qqqq'", "debian-13"]),
    (["doctor", "--ssh"], ["--ssh"]),
    (["shwo"], ["No such command 'shwo'", "'show'"]),
    (["run", "--json", "no/such/folder/out.json"], ["--json no/such/folder/out.json: cannot be written there"]),
    (["try", "--as", "nginx", "--json", "no/out.json", "--", "id"], ["--json no/out.json: cannot be written"]),
    (["run", "--json", "--quiet"], ["--json --quiet: expected FILE, or - for standard output"]),
    (["new", "scenario", "mine", "--at", "--json"], ["--at --json: expected FOLDER", "with its whole path"]),
    (["new", "scenario"], ["NAME"]),
    (["new", "scenario", "My First"], ["'My First' is no id", "Call it 'my-first'?"]),
    (["new", "scenario", FLAGSHIP], [f"a scenario is called '{FLAGSHIP}' already"]),
    (["new", "lab", "x"], ["No such command 'lab'"]),
    (["check", "nginx-read-shadow"], ["unknown scenario 'nginx-read-shadow'", f"Did you mean '{FLAGSHIP}'?"]),
    (["check", "--lab", "debian13"], ["unknown lab 'debian13'", "Did you mean 'debian-13'?"]),
    (["check", "--json", "no/out.json"], ["--json no/out.json: cannot be written"]),
    (["schema", "scenaro"], ["unknown schema 'scenaro'", "Did you mean 'scenario'?"]),
    (["scenarios", "--tag", "wed"], ["unknown tag 'wed'", "Did you mean 'web'?"]),
    (["scenarios", "--difficulty", "easy"], ["unknown difficulty 'easy'", "beginner, intermediate, advanced"]),
    (["catalogue"], ["--out docs: no folder that can be written"]),
    (["catalogue", "--out", ".", "--outcomes", "absent.json"], ["absent.json: cannot be read"]),
]


@pytest.fixture(scope="module")
def misused(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[concurrent.futures.Future[tuple[Host, Ended]]]]:
    """Every wrong usage, each on a machine of its own, side by side: they are many."""

    def call(arguments: list[str]) -> tuple[Host, Ended]:
        machine = made_up(tmp_path_factory.mktemp("misused"))
        return machine, machine.lsmlab(*arguments)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        yield [pool.submit(call, arguments) for arguments, _ in WRONG_USAGE]


@pytest.mark.parametrize("number", range(len(WRONG_USAGE)), ids=["_".join(a) for a, _ in WRONG_USAGE])
def test_wrong_usage(misused: list[concurrent.futures.Future[tuple[Host, Ended]]], number: int) -> None:
    machine, ended = misused[number].result()
    complaint = ended.refused(4)
    for word in WRONG_USAGE[number][1]:
        assert word in complaint, complaint
    assert not machine.home.exists()
    assert not machine.called("mmdebstrap")


def test_a_wrong_accelerator_is_said_before_anything_is_made(host: Host) -> None:
    assert "--accel hvf: expected auto, kvm or tcg" in host.lsmlab("run", "--accel", "hvf").refused(4)
    assert not host.home.exists()


def test_json_of_a_list_into_a_folder_that_is_not_there(host: Host) -> None:
    calls = [[command, "--json", "no/out.json"] for command in ("scenarios", "labs", "show", "images", "doctor")]
    for found in host.side_by_side(calls):
        assert "--json no/out.json: cannot be written" in found.refused(4)


def test_json_into_a_folder_itself(host: Host) -> None:
    assert "cannot be written there" in host.lsmlab("run", "--json", str(host.work)).refused(4)


def test_a_folder_without_scenarios(host: Host) -> None:
    (host.work / "empty").mkdir()
    complaint = host.lsmlab("run", "empty").refused(4)
    assert "empty: no scenario.yaml with `kind: lsmlab/scenario` in it" in complaint
    assert "lsmlab scenarios" in complaint


def own_scenario(host: Host, text: str, name: str = "mine") -> Path:
    file = host.work / "scenarios" / name / "scenario.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    shutil.copy(REPO / "scenarios" / FLAGSHIP / "site.conf", file.parent)
    shutil.copy(REPO / "scenarios" / FLAGSHIP / "nginx.apparmor", file.parent)
    return file


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("technique: T1003.008", "technik: T1003.008", "technik: unknown key; did you mean 'technique'?"),
        ("story: >", "story: [", "not valid YAML"),
        ("service: nginx", "service: 3", "subject.service: expected a string, found a number (3)"),
        ("kind: attack", "kind: atack", "expected 'attack' or 'benign', found a text ('atack')"),
    ],
)
def test_a_broken_scenario_file(host: Host, old: str, new: str, words: str) -> None:
    text = SCENARIO.replace(f"id: {FLAGSHIP}", "id: mine")
    file = own_scenario(host, text.replace(old, new, 1))
    complaint = host.lsmlab("run", "mine").refused(4)
    assert re.search(re.escape(str(file)) + r":\d+: ", complaint), complaint
    assert words in complaint
    if "valid YAML" not in words:
        line = next(n for n, content in enumerate(file.read_text().splitlines(), 1) if new in content)
        assert f"{file}:{line}: " in complaint, complaint


def test_a_scenario_for_a_service_that_the_lab_lacks(host: Host) -> None:
    own_scenario(host, SCENARIO.replace(f"id: {FLAGSHIP}", "id: mine").replace("service: nginx", "service: apache"))
    assert "unknown service of lab debian-13 'apache'" in host.lsmlab("run", "mine").refused(4)
    assert not host.home.exists()


def test_nothing_to_run(host: Host) -> None:
    text = SCENARIO.replace(f"id: {FLAGSHIP}", "id: mine")
    own_scenario(host, text[: text.index("  apparmor:\n    verdict:")])
    assert "nothing to run" in host.lsmlab("run", "mine", "-f", "apparmor").refused(5)


# Places that cannot be used


WRITERS = (["run"], ["show"], ["images", "prune"], ["images", "build", "debian-13"])
"""Commands that make something in LSMLAB_HOME."""


def test_a_home_that_cannot_be_made(host: Host) -> None:
    host.home.write_text("a file of somebody's")
    for found in host.side_by_side(WRITERS):
        complaint = found.refused(3)
        assert f"{host.home}/" in complaint
        assert "cannot be made: Not a directory" in complaint
        assert "Set LSMLAB_HOME to a folder that can be written" in complaint
    assert host.home.read_text() == "a file of somebody's"


def on_a_disk(host: Host, options: str) -> None:
    """Have LSMLAB_HOME on a small disk of its own, gone with the process."""
    host.home.mkdir()
    mount = f'mount -t tmpfs -o {options} lsmlab-test "$0" && exec "$@"'
    host.wrapper = ("unshare", "--mount", "sh", "-c", mount, str(host.home))


@needs_root
def test_too_little_space_for_an_image(host: Host) -> None:
    on_a_disk(host, "size=64m")
    complaint = host.lsmlab("images", "build", "debian-13").refused(3)
    assert re.search(r"6[0-4] MiB free; building an image takes up to \d+ MiB", complaint)
    assert "LSMLAB_HOME" in complaint
    assert not host.called("mmdebstrap")


@needs_root
def test_a_home_that_can_only_be_read(host: Host) -> None:
    on_a_disk(host, "ro")
    for found in host.side_by_side(WRITERS):
        complaint = found.refused(3)
        assert str(host.home) in complaint
        assert "cannot be" in complaint
        assert "LSMLAB_HOME" in complaint


# Rewinding to what is not there


@pytest.fixture
def kept(host: Host) -> Host:
    """A machine that keeps two outcomes: 1, with one arm of SELinux, and 2, with two of AppArmor."""
    host.store.parent.mkdir(parents=True)
    apparmor = (ArmRecord(arm=Arm.DAC), ArmRecord(arm=Arm.APPARMOR_ENFORCE))
    store = Store(host.store)
    numbers = [store.add(outcome(1)), store.add(outcome(2, framework=Framework.APPARMOR, arms=apparmor))]
    assert numbers == [1, 2]
    return host


REWINDS: list[tuple[str, int, list[str]]] = [
    ("12 -- id", 4, ["no outcome is called '12'", "`lsmlab show` lists the newest"]),
    ("00000000 -- id", 4, ["more than one outcome is called '00000000'"]),
    ("1 --arm dacc -- id", 4, ["unknown arm 'dacc'", "Did you mean 'dac'?"]),
    ("1 --arm dac -- id", 4, ["outcome 1 has no arm dac; it has: selinux-enforcing"]),
    ("2 --arm selinux-enforcing", 4, ["outcome 2 has no arm selinux-enforcing; it has: dac, apparmor-enforce"]),
    (
        "1 --scenario nginx-read-shadow -- id",
        4,
        ["unknown scenario 'nginx-read-shadow'", f"Did you mean '{FLAGSHIP}'?"],
    ),
    ("1", 3, ["a shell needs a terminal"]),
    ("000000000002 --arm dac", 3, ["a shell needs a terminal"]),
]


def test_a_rewind_that_cannot_be(kept: Host) -> None:
    ended = kept.side_by_side([["rewind", *arguments.split()] for arguments, _, _ in REWINDS])
    for (arguments, code, words), found in zip(REWINDS, ended, strict=True):
        complaint = found.refused(code)
        for word in words:
            assert word in complaint, (arguments, complaint)
    assert not kept.called(QEMU)
    assert not kept.called("mmdebstrap")
    assert not kept.cache.exists(), "nothing is made ready for a guest"


def test_a_rewind_where_nothing_is_kept(host: Host) -> None:
    assert "no outcome is called 'latest'" in host.lsmlab("rewind", "latest").refused(4)


# Programs that are missing or fail


def test_qemu_is_missing(imaged: Host) -> None:
    (imaged.path / "bin" / QEMU).unlink()
    found = imaged.lsmlab("run", FLAGSHIP)
    assert found.code == 3, found.err
    assert f"{QEMU} is not installed on this machine" in found.out + found.err
    assert "qemu-system-x86" in found.out + found.err
    assert "Traceback" not in found.err
    assert imaged.leftovers() == []


@needs_space
def test_qemu_is_missed_before_an_image_is_built(host: Host) -> None:
    (host.path / "bin" / QEMU).unlink()
    assert f"{QEMU} is not installed on this machine" in host.lsmlab("run", FLAGSHIP).refused(3)
    assert not host.called("mmdebstrap")


def test_doctor_says_what_is_missing_and_what_to_do(host: Host) -> None:
    for name in (QEMU, "mmdebstrap"):
        (host.path / "bin" / name).unlink()
    found = host.lsmlab("doctor")
    assert (found.code, found.err) == (3, "")
    advice = re.escape(to_install(QEMU))
    assert re.search(rf"MISSING +{QEMU} +missing: runs the guests *\n +{advice} *\n", found.out)
    assert to_install("mmdebstrap") in found.out
    assert re.search(rf"Not ready: .*{QEMU}, .*mmdebstrap", found.out)
    rows = json.loads(host.lsmlab("doctor", "--json", "-").out)["findings"]
    assert {r["what"] for r in rows if r["needed"] and not r["ok"]} >= {QEMU, "mmdebstrap"}
    assert not host.home.exists(), "doctor looks and changes nothing"


def test_doctors_report_says_what_it_is_of(imaged: Host) -> None:
    found, as_json = imaged.side_by_side([["doctor"], ["doctor", "--lab", "debian-13", "--json", "-"]])
    report = json.loads(as_json.out)
    (folder,) = (imaged.cache / "images").iterdir()
    digest = cache.file_digest(folder / "disk.qcow2")
    assert {k: report[k] for k in ("schema", "lab", "lsmlab", "image", "ssh")} == {
        "schema": 1, "lab": "debian-13", "lsmlab": __version__, "image": digest, "ssh": None,
    }  # fmt: skip
    assert report["qemu"] == "QEMU emulator version 0.0 (a stub)"
    assert report["host"] == {
        "system": platform.freedesktop_os_release()["PRETTY_NAME"],
        "kernel": f"Linux {platform.release()}",
        "processor": platform.machine(),
    }
    assert abs(datetime.datetime.fromisoformat(report["date"]).timestamp() - time.time()) < 600
    assert found.out.startswith(f"lab debian-13, lsmlab {__version__}, {report['date'][:10]}T"), found.out
    for words in (report["host"]["system"], report["host"]["kernel"], report["qemu"], f"SHA-256 {digest[:16]}..."):
        assert words in re.sub(r"\s+", " ", found.out)


def test_a_machine_that_cannot_fetch_what_it_has_to_build_is_not_ready(host: Host) -> None:
    del host.environment["LSMLAB_MIRROR"]
    host.stub("apt-get", "exit 0")
    host.environment["https_proxy"] = "http://127.0.0.1:1"  # nobody there: nothing is asked of the Internet
    packages, cloud = host.side_by_side([["doctor"], ["doctor", "--lab", "fedora-44"]])
    assert (packages.code, cloud.code) == (3, 3)
    assert re.search(r"^Not ready: .*Debian packages", packages.out, re.MULTILINE), packages.out
    assert re.search(r"^Not ready: .*download", cloud.out, re.MULTILINE), cloud.out


def test_doctor_looks_at_a_machine_over_ssh(host: Host) -> None:
    with ssh_home(host.path) as machine:
        machine.sudo_that_obeys()
        found, as_json = host.side_by_side(
            [["doctor", "--ssh", "machine"], ["doctor", "--ssh", "machine", "--json", "-"]]
        )
    assert found.err == "", found.err
    assert found.out.startswith(f"machine over SSH, lsmlab {__version__}, ")
    report = json.loads(as_json.out)
    assert (report["ssh"], report["lab"], report["lsmlab"]) == ("machine", None, __version__)
    assert re.search(r"^ok +SSH +tester at 127\.0\.0\.1 port ", found.out, re.MULTILINE), found.out
    assert re.search(r"^ok +Python +Python 3\.", found.out, re.MULTILINE), found.out
    rows = json.loads(as_json.out)["findings"]
    lacking = [r["what"] for r in rows if r["needed"] and not r["ok"]]
    end = f"Not ready: {', '.join(lacking)}." if lacking else "Ready: machine lacks nothing that a lab needs."
    assert found.out.endswith(f"{end}\n")
    assert found.code == as_json.code == (3 if lacking else 0)
    assert [r["what"] for r in rows][:4] == ["SSH", "system", "root", "Python"]
    assert not host.home.exists()
    assert not host.called(QEMU)


def test_doctor_does_not_know_the_machine(host: Host) -> None:
    with ssh_home(host.path) as machine:
        machine.known_hosts.unlink()
        complaint = host.lsmlab("doctor", "--ssh", "machine").refused(3)
        assert machine.server.host_key.fingerprint in complaint
        assert "paramiko" not in complaint
        assert not machine.known_hosts.exists()


@needs_space
@pytest.mark.parametrize("command", [["images", "build", "debian-13"], ["run", FLAGSHIP]])
def test_mmdebstrap_fails(host: Host, command: list[str]) -> None:
    complaint = host.lsmlab(*command).refused(3)
    assert "E: boom" in complaint
    assert "installing the packages of debian-13 failed (1)" in complaint
    assert host.leftovers() == []
    assert not (host.cache / "images").exists()


@needs_space
def test_a_damaged_image_is_said_and_built_anew(imaged: Host) -> None:
    (folder,) = (imaged.cache / "images").iterdir()
    disk = folder / "disk.qcow2"
    disk.write_bytes(disk.read_bytes()[:-1] + b"!")
    found = imaged.lsmlab("run", FLAGSHIP)
    assert found.code == 3
    assert re.search(
        r"The cached image of debian-13 is damaged \(disk\.qcow2 is damaged: .*\): it is not used", found.err
    )
    assert "E: boom" in found.refused(3).replace("The cached", "")
    assert imaged.called("mmdebstrap")
    assert imaged.leftovers() == []


def test_a_damaged_image_is_listed_as_such_where_its_size_tells(imaged: Host) -> None:
    assert " current" in imaged.lsmlab("images").out
    (folder,) = (imaged.cache / "images").iterdir()
    (folder / "initrd").write_bytes(b"short")
    assert " damaged" in imaged.lsmlab("images").out
    assert "removed image debian-13" in imaged.lsmlab("images", "prune").out
    assert list((imaged.cache / "images").iterdir()) == []


@pytest.mark.parametrize("command", [["run", FLAGSHIP], ["try", "--as", "nginx", "--", "id"]], ids=lambda c: c[0])
def test_a_qemu_that_dies_is_an_error_of_every_arm(imaged: Host, command: list[str]) -> None:
    imaged.stub(
        QEMU, 'case "$*" in *--version*) echo "QEMU stub" ;; *) echo "boom: no such machine" >&2; exit 1 ;; esac'
    )
    found = imaged.lsmlab(*command, "--accel", "tcg", "--guests", "2")
    assert found.code == 3, found.err
    assert "boom: no such machine" in found.out
    assert "Traceback" not in found.err
    assert imaged.leftovers() == []


# Interruptions


def processes(mark: str) -> list[int]:
    """The processes of this machine that have `mark` in their command line."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit() and mark.encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


def wait_until(what: str, condition: object, seconds: float) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.02)


@dataclass(slots=True)
class Stuck:
    """A run that waits for a stub that never ends."""

    host: Host
    process: subprocess.Popen[str]
    mark: str

    def ended(self, seconds: float) -> Ended:
        out, err = self.process.communicate(timeout=seconds)
        return Ended(self.process.returncode, out, err)

    def stubs(self) -> list[int]:
        return processes(self.mark)


@contextlib.contextmanager
def stuck_in(host: Host, program: str, *command: str) -> Iterator[Stuck]:
    """Start lsmlab with a stub of `program` that sleeps, and wait until it does."""
    mark = f"86400.{os.getpid()}{time.monotonic_ns()}"
    host.stub(program, f'case "$*" in *--version*) echo "a stub" ;; *) exec sleep {mark} ;; esac')
    with host.start(*command) as process:
        stuck = Stuck(host, process, f"sleep\0{mark}")
        try:
            wait_until(f"the stub of {program} runs", stuck.stubs, 30)
            yield stuck
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            for pid in stuck.stubs():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@needs_space
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
def test_an_interrupt_while_an_image_is_built(host: Host, number: signal.Signals) -> None:
    with stuck_in(host, "mmdebstrap", "images", "build", "debian-13") as stuck:
        os.killpg(stuck.process.pid, number)
        found = stuck.ended(10)
        assert found.code == 2, found.err
        assert "image debian-13: installing" in found.err
        assert found.complaint.startswith("lsmlab: interrupted")
        assert "Traceback" not in found.err
        assert stuck.stubs() == []
    assert host.leftovers() == []
    assert not (host.cache / "images").exists()


@needs_space
@pytest.mark.parametrize(
    "sweeper",
    [
        ["images", "prune"],
        ["run", FLAGSHIP],
        pytest.param(
            ["images", "build", "debian-13"],
        ),
    ],
    ids="_".join,
)
def test_killed_while_an_image_is_built(host: Host, sweeper: list[str]) -> None:
    with stuck_in(host, "mmdebstrap", "images", "build", "debian-13") as stuck:
        os.kill(stuck.process.pid, signal.SIGKILL)
        assert stuck.ended(10).code == -signal.SIGKILL
        wait_until("the stub is gone", lambda: not stuck.stubs(), 2)
    (left,) = host.leftovers()
    host.stub("mmdebstrap", "exit 1")
    host.lsmlab(*sweeper)
    assert left not in host.leftovers()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_an_interrupt_while_a_guest_boots(imaged: Host, number: signal.Signals) -> None:
    command = ("run", FLAGSHIP, "--accel", "tcg", "--guests", "3")
    with stuck_in(imaged, QEMU, *command) as stuck:
        wait_until("three guests boot", lambda: len(stuck.stubs()) == 3, 30)
        os.killpg(stuck.process.pid, number)
        found = stuck.ended(10)
        assert found.code == 2, found.err
        assert found.complaint.endswith("lsmlab: interrupted; outcomes recorded so far are kept\n"), found.err
        assert "Traceback" not in found.err
        assert stuck.stubs() == []
    assert imaged.leftovers() == []


def test_an_interrupt_while_a_scenario_waits_for_the_boots_of_another(imaged: Host) -> None:
    two = (FLAGSHIP, f"{FLAGSHIP}-as-root")
    with stuck_in(imaged, QEMU, "run", *two, "--accel", "tcg", "--guests", "6") as stuck:
        wait_until("three guests boot, three wait for them", lambda: len(stuck.stubs()) == 3, 30)
        os.killpg(stuck.process.pid, signal.SIGINT)
        assert stuck.ended(4).code == 2
        assert stuck.stubs() == []


def test_killed_while_guests_boot(imaged: Host) -> None:
    with stuck_in(imaged, QEMU, "run", FLAGSHIP, "--accel", "tcg", "--guests", "3") as stuck:
        wait_until("three guests boot", lambda: len(stuck.stubs()) == 3, 30)
        os.kill(stuck.process.pid, signal.SIGKILL)
        wait_until("the guests are gone", lambda: not stuck.stubs(), 2)
        stuck.ended(10)
    assert imaged.leftovers() != []
    imaged.lsmlab("images", "prune")
    assert imaged.leftovers() == []


def test_an_interrupt_while_policies_are_checked(imaged: Host) -> None:
    with stuck_in(imaged, "unshare", "check", FLAGSHIP) as stuck:
        os.killpg(stuck.process.pid, signal.SIGINT)
        found = stuck.ended(10)
        assert (found.code, found.out) == (2, ""), found.err
        assert "Traceback" not in found.err
        assert stuck.stubs() == []
    assert imaged.leftovers() == []


# Listing and showing


def test_show_where_nothing_is_kept(host: Host) -> None:
    assert host.lsmlab("show") == Ended(0, "", "lsmlab: no outcome is kept yet: `lsmlab run` makes one\n")
    assert json.loads(host.lsmlab("show", "--json", "-").out) == {"schema": 1, "outcomes": []}


def test_show_an_outcome_that_is_not_there(host: Host) -> None:
    complaint = host.lsmlab("show", "12").refused(4)
    assert "no outcome is called '12'" in complaint
    assert "`lsmlab show` lists the newest" in complaint


@pytest.mark.parametrize("command", [["show"], ["run", FLAGSHIP]], ids="_".join)
def test_a_store_that_is_no_database(host: Host, command: list[str]) -> None:
    host.store.parent.mkdir(parents=True)
    host.store.write_text("somebody's notes, and not a database at all\n" * 100)
    before = host.store.read_bytes()
    complaint = host.lsmlab(*command).refused(3)
    assert f"{host.store}: file is not a database" in complaint
    assert "move it away" in complaint
    assert host.store.read_bytes() == before
    assert sorted(p.name for p in host.store.parent.iterdir()) == [host.store.name]
    assert not host.called("mmdebstrap")


def test_a_store_of_a_newer_lsmlab(host: Host) -> None:
    host.lsmlab("show")
    with contextlib.closing(sqlite3.connect(host.store)) as connection:
        connection.execute("PRAGMA user_version = 99")
    assert "Upgrade lsmlab" in host.lsmlab("show").refused(3)


def test_prune_on_nothing(host: Host) -> None:
    assert host.lsmlab("images", "prune") == Ended(0, "", "lsmlab: 0 MiB freed\n")


def test_pruning_while_a_run_uses_an_image(imaged: Host) -> None:
    (folder,) = (imaged.cache / "images").iterdir()
    with stuck_in(imaged, QEMU, "run", FLAGSHIP, "--accel", "tcg", "--guests", "1"):
        assert " current, in use" in imaged.lsmlab("images").out
        (row,) = json.loads(imaged.lsmlab("images", "--json", "-").out)["images"]
        assert (row["status"], row["in_use"], row["folder"]) == ("current", True, str(folder))
        found = imaged.lsmlab("images", "prune", "--all")
        assert found == Ended(0, f"kept image {folder.name}: in use\n", "lsmlab: 0 MiB freed\n")
    assert folder.exists()
    found = imaged.lsmlab("images", "prune", "--all")
    assert f"removed image {folder.name} (" in found.out
    assert not folder.exists()


@needs_root
def test_what_cannot_be_pruned_is_said(imaged: Host) -> None:
    (folder,) = (imaged.cache / "images").iterdir()
    mount = 'mount --bind "$0" "$0" && exec "$@"'
    imaged.wrapper = ("unshare", "--mount", "sh", "-c", mount, str(folder / "initrd"))
    found = imaged.lsmlab("images", "prune", "--all")
    assert (found.code, found.out) == (1, ""), found.err
    assert f"lsmlab: {folder}: cannot be removed: 0 MiB are left" in found.err
    assert found.err.endswith("lsmlab: 0 MiB freed\n")


@pytest.mark.parametrize("command", [["run", FLAGSHIP], ["images", "build", "debian-13"]], ids="_".join)
def test_a_limit_that_is_no_number(host: Host, command: list[str]) -> None:
    host.environment["LSMLAB_CACHE_LIMIT"] = "20G"
    complaint = host.lsmlab(*command).refused(4)
    assert "LSMLAB_CACHE_LIMIT=20G: expected a number of GiB" in complaint
    assert not (host.cache).exists()


def test_images_where_nothing_is_built(host: Host) -> None:
    found = host.lsmlab("images")
    assert (found.code, found.out) == (0, "")
    assert "nothing is built yet" in found.err
    assert json.loads(host.lsmlab("images", "--json", "-").out) == {"schema": 1, "images": []}
    assert not host.home.exists()


def test_the_scenarios_as_json(host: Host) -> None:
    found = host.lsmlab("scenarios", "--json", "-")
    assert (found.code, found.err) == (0, "")
    document = json.loads(found.out)
    rows = {r["id"]: r for r in document["scenarios"]}
    assert document["schema"] == 1
    assert rows[FLAGSHIP]["expected"] == {"selinux": "CONTAINED", "apparmor": "CONTAINED"}
    assert (rows[FLAGSHIP]["service"], rows[FLAGSHIP]["technique"]) == ("nginx", "T1003.008")
    assert list(rows) == sorted(rows)


def test_the_labs_as_json(host: Host) -> None:
    found = host.lsmlab("labs", "--json", "-")
    assert (found.code, found.err) == (0, "")
    rows = {r["id"]: r for r in json.loads(found.out)["labs"]}
    assert rows["debian-13"]["frameworks"] == ["selinux", "apparmor"]
    assert rows["debian-13"]["image"] == "not built"
    assert (rows["debian-13"]["seen"], rows["debian-13"]["lacks"]) == (None, ["gpg"])
    assert rows["debian-13"]["real_image"] is None
    assert not host.home.exists()


def test_a_lab_whose_image_is_there_lacks_no_tools_to_build_one(imaged: Host) -> None:
    (imaged.path / "bin" / "mmdebstrap").unlink()
    rows = {r["id"]: r["lacks"] for r in json.loads(imaged.lsmlab("labs", "--json", "-").out)["labs"]}
    assert (rows["debian-12"], rows["debian-13"]) == (["mmdebstrap", "gpg"], [])
    assert re.search(r"^debian-13 .* ready, built 2026-11-24 +never +-$", imaged.lsmlab("labs").out, re.MULTILINE)
    assert re.search(r"^debian-12 .* lacks mmdebstrap, gpg +never +-$", imaged.lsmlab("labs").out, re.MULTILINE)


CLOUD_LAB = """kind: lsmlab/lab
id: {name}
title: A cloud image
backend: qemu
memory_mib: 768
frameworks: [selinux]
kernel_arguments: {{none: selinux=0, selinux: enforcing=1}}
cloud_image:
  url: https://images.example.org/disk.qcow2
  sha256: f000000000000000000000000000000000000000000000000000000000000000
  installer: dnf
  packages: [python3]
  disk_mib: 4096
"""


def test_a_lab_that_was_never_proved_on_its_real_image(host: Host) -> None:
    (host.work / "labs").mkdir()
    for name in ("fedora-44", "mine"):
        (host.work / "labs" / f"{name}.yaml").write_text(CLOUD_LAB.format(name=name))
    rows = {r["id"]: r["real_image"] for r in json.loads(host.lsmlab("labs", "--json", "-").out)["labs"]}
    proof = proofs.read().labs["fedora-44"]
    assert (rows["fedora-44"], rows["mine"]) == (proof.date if proof else "never", "never")
    table = host.lsmlab("labs").out
    assert re.search(r"^fedora-44 .* never +(never|\d{4}-\d\d-\d\d)$", table, re.MULTILINE)
    assert re.search(r"^mine .* never +never$", table, re.MULTILINE)


@needs_gpg
def test_what_a_lab_needs_is_said_and_what_of_it_is_missing(host: Host) -> None:
    (host.path / "bin" / "mmdebstrap").unlink()
    (host.path / "bin" / "gpg").symlink_to(shutil.which("gpg") or "")
    rows = {r["id"]: r for r in json.loads(host.lsmlab("labs", "--json", "-").out)["labs"]}
    assert {QEMU, "qemu-img", "setpriv", "x86-64 processor", "mmdebstrap", "memory"} <= set(rows["debian-13"]["needs"])
    assert "mmdebstrap" in rows["debian-13"]["lacks"] and "setpriv" not in rows["debian-13"]["lacks"]
    assert "mmdebstrap" not in rows["fedora-44"]["needs"] and {"gpgv", "valid key"} <= set(rows["fedora-44"]["needs"])
    assert "KVM" in rows["almalinux-10"]["needs"]


@pytest.mark.parametrize("width", [80, 120])
def test_the_labs_fit_a_terminal_and_keep_each_line_in_a_pipe(host: Host, width: int) -> None:
    (host.work / "labs").mkdir()
    title = "a machine with a name that takes a line of its own, being longer than all of the others are"
    lab = f"kind: lsmlab/lab\nextends: debian-13\nid: opensuse-leap-16.0\ntitle: {title}\n"
    (host.work / "labs" / "opensuse-leap-16.0.yaml").write_text(lab)
    shown = host.on_terminal(width, "labs").splitlines()
    assert any("opensuse-leap-16.0" in line for line in shown)
    assert max(map(len, shown)) <= width
    assert title in host.lsmlab("labs").out


def test_json_into_a_file(host: Host) -> None:
    (host.work / "out.json").write_text("older")
    assert host.lsmlab("scenarios", "--json", "out.json") == Ended(0, "", "")
    assert json.loads((host.work / "out.json").read_text())["schema"] == 1
    assert [p.name for p in host.work.iterdir()] == ["out.json"]


def test_the_lists_are_aligned(host: Host) -> None:
    for command, first in (("scenarios", FLAGSHIP), ("labs", "debian-12")):
        found = host.lsmlab(command)
        assert (found.code, found.err) == (0, "")
        assert re.search(rf"^{first} ", found.out, re.MULTILINE), found.out


def test_scenarios_are_chosen(host: Host) -> None:
    table = host.lsmlab("scenarios", "--framework", "selinux", "--verdict", "not_contained")
    assert (table.code, table.err) == (0, "")
    ids = [line.split()[0] for line in table.out.splitlines()[2:]]
    rows = json.loads(host.lsmlab("scenarios", "-f", "selinux", "--verdict", "NOT_CONTAINED", "--json", "-").out)
    assert ids == [r["id"] for r in rows["scenarios"]]
    assert "nginx-reads-shadow-permissive-domain" in ids and FLAGSHIP not in ids
    assert table.out.splitlines()[0].split()[:4] == ["scenario", "difficulty", "service", "technique"]


def test_where_no_scenario_fits(host: Host) -> None:
    both = ["--technique", "T1003.008", "--tag", "dac", "--verdict", "OVERBLOCKED"]
    assert "no scenario fits: there are " in host.lsmlab("scenarios", *both).refused(5)
    nothing = host.lsmlab("scenarios", *both, "--json", "-")
    assert (nothing.code, json.loads(nothing.out)) == (5, {"schema": 1, "scenarios": []})


# Writing scenarios


def test_from_nothing_to_a_scenario_that_is_checked(host: Host) -> None:
    new = host.lsmlab("new", "scenario", "mine")
    assert (new.code, new.err) == (0, "")
    assert new.out.startswith("scenarios/mine: nginx.apparmor, scenario.yaml, site.conf\n")
    commands = [line.split()[1:] for line in new.out.splitlines() if line.startswith("  lsmlab ")]
    assert commands == [["check", "mine"], ["run", "mine"]]
    checked = host.lsmlab(*commands[0], "--no-compile")
    assert checked.code == 0, checked.out
    assert re.search(r"^ok +scenario +mine +keys, 2 files$", checked.out, re.MULTILINE)
    labs = len(discovery.labs(REPO).ids)
    assert f"\n1 scenario and {labs} labs: {labs + 1} ok; policies were not compiled, as asked\n" in checked.out
    again = host.lsmlab("new", "scenario", "mine").refused(4)
    assert "a scenario is called 'mine' already" in again


def test_a_check_that_could_not_compile_is_no_success(host: Host) -> None:
    host.lsmlab("new", "scenario", "mine")
    found = host.lsmlab("check", "mine")
    assert found.code == 3
    assert "not compiled: nginx.apparmor: the image of debian-13 is not built" in found.out
    assert not host.called("mmdebstrap")


def test_a_check_lists_all_faults_as_text_and_as_json(host: Host) -> None:
    file = own_scenario(host, SCENARIO.replace(f"id: {FLAGSHIP}", "id: mine").replace("title:", "titel:"))
    own_scenario(host, SCENARIO.replace("technique:", "technik:"), "other")
    found = host.lsmlab("check", "--no-compile")
    assert found.code == 4
    assert f"{file}:3: titel: unknown key; did you mean 'title'?" in found.out
    assert "technik: unknown key" in found.out and "Traceback" not in found.err
    as_json = host.lsmlab("check", "--no-compile", "--json", "-")
    assert as_json.code == 4
    rows = {r["id"]: r["status"] for r in json.loads(as_json.out)["files"]}
    assert (rows.pop("mine"), rows.pop("other")) == ("faulty", "faulty")
    assert set(rows.values()) == {"sound"} and {"debian-12", "debian-13"} <= set(rows)


def test_the_schema_is_json(host: Host) -> None:
    for kind in ("scenario", "lab"):
        found = host.lsmlab("schema", kind)
        assert (found.code, found.err) == (0, "")
        assert json.loads(found.out)["title"] == f"lsmlab {kind}"
    assert host.lsmlab("schema").out == host.lsmlab("schema", "scenario").out
    assert not host.home.exists()


def test_the_catalogue_is_made_of_what_is_kept_or_of_files(kept: Host) -> None:
    first = kept.lsmlab("catalogue", "--out", ".")
    assert (first.code, first.out, first.err) == (0, "catalogue.md\ncomparison.md\n", "")
    text = (kept.work / "catalogue.md").read_text()
    assert f"### {FLAGSHIP}" in text and "2 were seen (2 CONTAINED)" in text
    kept.lsmlab("show", "1", "--json", "one.json")
    assert kept.lsmlab("catalogue", "--out", ".", "--outcomes", "one.json").code == 0
    assert "1 were seen (1 CONTAINED)" in (kept.work / "catalogue.md").read_text()
    assert "outcomes" in kept.lsmlab("catalogue", "--out", ".", "--outcomes", "catalogue.md").refused(4)


COMPLETED: list[tuple[str, str]] = [
    ("lsmlab check nginx-reads-shadow-wi", "nginx-reads-shadow-wide-profile"),
    ("lsmlab check --lab debian-1", "debian-12"),
    ("lsmlab schema s", "scenario"),
    ("lsmlab scenarios --tag path", "path-traversal"),
    ("lsmlab scenarios --technique T10", "T1003.008"),
    ("lsmlab scenarios --service ng", "nginx"),
    ("lsmlab scenarios --difficulty int", "intermediate"),
    ("lsmlab scenarios --verdict NOT", "NOT_CONTAINED"),
    ("lsmlab scenarios --framework app", "apparmor"),
]


@pytest.mark.parametrize(("words", "wanted"), COMPLETED, ids=[w for _, w in COMPLETED])
def test_the_shell_completes_what_is_there(host: Host, words: str, wanted: str) -> None:
    asked = {"_LSMLAB_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    found = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv = ['lsmlab']; import lsmlab.cli; lsmlab.cli.main()"],
        cwd=host.work, env={**os.environ, "LSMLAB_HOME": str(host.home), **asked},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert wanted in found.stdout.split(), found
    assert not host.home.exists()


def test_own_scenarios_are_listed_beside_the_built_in(host: Host) -> None:
    own_scenario(host, SCENARIO.replace(f"id: {FLAGSHIP}", "id: mine"))
    assert re.search(r"^mine ", host.lsmlab("scenarios").out, re.MULTILINE)


@pytest.mark.parametrize(
    "command",
    [
        "scenarios",
        "labs --json -",
        "doctor",
        "--help",
    ],
)
def test_a_reader_that_goes_away_is_nothing_to_speak_of(host: Host, command: str) -> None:
    with host.start(*command.split()) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
