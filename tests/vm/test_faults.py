"""What happens to a run: killed, interrupted, damaged, twice at once. Nothing is left, and nothing recorded is lost."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import environment, gone_within, guests_of, kill, lsmlab, outcomes, scratch, start

from lsmlab import discovery, host, paths
from lsmlab.errors import MachineError
from lsmlab.image import build
from lsmlab.machine.hardware import Boot, Hardware
from lsmlab.machine.qemu import QEMU, QemuMachine, disk_engine
from lsmlab.progress import Silent
from lsmlab.store import Store

pytestmark = pytest.mark.lsmlab_vm

FLAGSHIP = ("run", "nginx-reads-shadow", "--lab", "debian-13")


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Saved guests are there, so that the moments below fall into the run itself."""
    lsmlab(*FLAGSHIP, env=environment(tmp_path_factory.mktemp("warm")))


def kill_at_random(state: Path, times: int, longest: float) -> list[float]:
    """Kill -9 a run `times` times at random moments; how long its guests outlived it. Checks the store each time."""
    env = environment(state)
    file = state / "lsmlab" / "outcomes.sqlite"
    lasted: list[float] = []
    known = 0
    for number in range(times):
        process = start(*FLAGSHIP, env=env)
        time.sleep(random.uniform(0, 3 * longest if number % 10 == 9 else longest))
        guests = guests_of(process.pid)
        kill(process)
        lasted.append(gone_within(guests, 2.0))
        count = Store(file).count() if file.exists() else 0
        assert count >= known, "an outcome that was recorded is gone"
        known = count
    return lasted


def test_kill_9_takes_the_guests_along_and_loses_nothing(tmp_path: Path) -> None:
    kill_at_random(tmp_path, 6, 5)
    done = lsmlab(*FLAGSHIP, "--json", "-", env=environment(tmp_path))
    assert all(o["verdict"] == "CONTAINED" for o in outcomes(done.stdout).values())
    assert scratch() == set(), "the next run sweeps what the killed ones left"


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_kill_9_a_hundred_times(tmp_path: Path) -> None:
    lasted = kill_at_random(tmp_path, 100, 5)
    kept = Store(tmp_path / "lsmlab" / "outcomes.sqlite").count()
    sys.stderr.write(f"100 runs killed; guests gone after {max(lasted):.2f} s at the most; {kept} outcomes kept\n")
    done = lsmlab(*FLAGSHIP, "--json", "-", env=environment(tmp_path))
    assert all(o["verdict"] == "CONTAINED" for o in outcomes(done.stdout).values())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "step",
    [
        pytest.param("starting the guest", marks=pytest.mark.slow),
        pytest.param("mode, service", marks=pytest.mark.slow),
        "attack read-shadow",
    ],
)
def test_an_interrupted_run_cleans_up(tmp_path: Path, number: signal.Signals, step: str) -> None:
    process = start(*FLAGSHIP, env=environment(tmp_path))
    assert process.stderr is not None
    line = next((line for line in process.stderr if step in line), "")
    assert line, f"the run never came to: {step}"
    guests = guests_of(process.pid)
    words = kill(process, number)
    assert process.returncode == 2, words
    assert words.rstrip().endswith("lsmlab: interrupted; outcomes recorded so far are kept"), words
    assert "Traceback" not in words
    gone_within(guests, 2.0)
    assert scratch() == set()


@pytest.mark.parametrize(
    "step", [pytest.param("booting", marks=pytest.mark.slow), pytest.param("letting", marks=pytest.mark.slow), "saving"]
)
def test_an_interrupted_boot_leaves_no_half_made_state(tmp_path: Path, step: str) -> None:
    cache = shared_copy(tmp_path / "cache" / "lsmlab")
    shutil.rmtree(cache / "states")
    env = environment(tmp_path / "state", XDG_CACHE_HOME=str(tmp_path / "cache"))
    process = start("shell", "debian-13", "--", "true", env=env)
    assert process.stderr is not None
    line = next((line for line in process.stderr if step in line), "")
    assert line, f"the run never came to: {step}"
    guests = guests_of(process.pid)
    words = kill(process, signal.SIGINT)
    assert process.returncode == 2, words
    gone_within(guests, 2.0)
    assert list((cache / "scratch").glob("*")) == []
    assert list((cache / "states").glob("*")) == []


def test_two_runs_that_need_the_same_state_boot_it_once(tmp_path: Path) -> None:
    cache = shared_copy(tmp_path / "cache" / "lsmlab")
    shutil.rmtree(cache / "states")
    env = environment(tmp_path / "state", XDG_CACHE_HOME=str(tmp_path / "cache"))
    runs = [start("shell", "debian-13", "--", "echo", "here", env=env) for _ in range(2)]
    ended = [run.communicate(timeout=600) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], ended
    assert [printed for printed, _ in ended] == ["here\n", "here\n"]
    assert sum("booting Debian 13" in words for _, words in ended) == 1
    # Each may also have waited for the other to verify the image
    assert sum("another run is booting this; waiting" in words for _, words in ended) == 1, ended
    assert len(list((cache / "states").glob("debian-13-none-*"))) == 1


def test_a_state_of_another_qemu_is_not_used(tmp_path: Path) -> None:
    cache = shared_copy(tmp_path / "cache" / "lsmlab")
    for state in (cache / "states").glob("debian-13-none-*"):
        manifest = state / "manifest.json"
        text = manifest.read_text("utf-8")
        changed = json.loads(text) | {"qemu": "QEMU emulator version 1.0"}
        manifest.unlink()
        manifest.write_text(json.dumps(changed), "utf-8")
    env = environment(tmp_path / "state", XDG_CACHE_HOME=str(tmp_path / "cache"))
    done = lsmlab("shell", "debian-13", "--", "true", env=env)
    assert "another qemu" in done.stderr
    assert "booting Debian 13" in done.stderr


def test_a_guest_that_dies_in_one_arm_is_replaced_for_the_others(tmp_path: Path) -> None:
    process = start(*FLAGSHIP, "-f", "selinux", "--guests", "1", "--json", "-", env=environment(tmp_path))
    assert process.stderr is not None
    for line in process.stderr:
        if "selinux-permissive: attack" in line:
            for pid in guests_of(process.pid):
                os.kill(pid, signal.SIGKILL)
            break
    printed, words = process.communicate(timeout=600)
    assert process.returncode == 3, words
    arms = {a["arm"]: a for a in outcomes(printed)["nginx-reads-shadow", "selinux"]["arms"]}
    assert [a["result"] for a in arms["selinux-permissive"]["attempts"]] == ["failed"]
    for name in ("dac", "selinux-enforcing"):
        assert not arms[name]["error"] and all(a["result"] != "failed" for a in arms[name]["attempts"]), name


def test_two_runs_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    runs = [
        start(*FLAGSHIP, "-f", "selinux", "-q", "--guests", "1", "--json", "-", env=environment(tmp_path))
        for _ in range(2)
    ]
    for run in runs:
        printed, words = run.communicate(timeout=600)
        assert run.returncode == 0, words
        assert [o["verdict"] for o in outcomes(printed).values()] == ["CONTAINED"]
    assert Store(tmp_path / "lsmlab" / "outcomes.sqlite").count() == 2


def shared_copy(target: Path) -> Path:
    """A cache of its own made of hard links: files are replaced in it, never written into."""
    for kind in ("images", "states"):
        for folder in (paths.cache() / kind).glob("debian-13-*"):
            shutil.copytree(folder, target / kind / folder.name, copy_function=lambda a, b: Path(b).hardlink_to(a))
    return target


def spoil(file: Path, *, truncate: bool) -> None:
    data = bytearray(file.read_bytes())
    if truncate:
        del data[len(data) // 2 :]
    else:
        data[len(data) // 2] ^= 0xFF
    file.unlink()
    file.write_bytes(data)


@pytest.mark.parametrize("truncate", [pytest.param(True, marks=pytest.mark.slow), False], ids=["truncated", "one bit"])
def test_a_damaged_saved_guest_is_said_and_made_anew(tmp_path: Path, truncate: bool) -> None:
    cache = shared_copy(tmp_path / "cache" / "lsmlab")
    for state in (cache / "states").glob("debian-13-none-*"):
        spoil(state / "ram", truncate=truncate)
    env = environment(tmp_path / "state", XDG_CACHE_HOME=str(tmp_path / "cache"))
    done = lsmlab("shell", "debian-13", "--", "true", env=env)
    assert "The saved state of debian-13 (none) is damaged" in done.stderr
    assert "damaged" not in lsmlab("shell", "debian-13", "--", "true", env=env).stderr


def test_a_damaged_image_is_never_used(tmp_path: Path) -> None:
    cache = shared_copy(tmp_path / "cache" / "lsmlab")
    for image in (cache / "images").glob("debian-13-*"):
        spoil(image / "disk.qcow2", truncate=False)
    stub = tmp_path / "bin"
    stub.mkdir()
    (stub / "mmdebstrap").write_text("#!/bin/sh\necho 'E: no packages today' >&2\nexit 1\n")
    (stub / "mmdebstrap").chmod(0o755)
    env = environment(tmp_path / "state", XDG_CACHE_HOME=str(tmp_path / "cache"), PATH=f"{stub}:{os.environ['PATH']}")
    done = lsmlab(*FLAGSHIP, env=env, code=3)
    assert "The cached image of debian-13 is damaged" in done.stderr
    assert "E: no packages today" in done.stderr
    assert list((cache / "scratch").glob("*")) == []


@pytest.fixture
def parts() -> tuple[build.Image, Hardware]:
    image = build.ensure(discovery.load_lab("debian-13"), Silent())
    return image, Hardware("tcg", 512, "for a test")


def test_a_guest_that_never_comes_up_shows_its_console(parts: tuple[build.Image, Hardware], tmp_path: Path) -> None:
    image, hardware = parts
    boot = Boot(image.kernel, image.initrd, "console=ttyS0 root=/dev/vda init=/bin/false panic=0")
    with pytest.raises(MachineError, match="did not come up") as caught:
        QemuMachine.start("dead", hardware, image.disk, boot=boot, scratch=tmp_path, timeout=25)
    assert "did not answer within 25 s" in str(caught.value)
    assert "Kernel panic" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_qemu_that_dies_says_why(parts: tuple[build.Image, Hardware], tmp_path: Path) -> None:
    image, hardware = parts
    boot = Boot(image.folder, image.initrd, "")
    with pytest.raises(MachineError, match=r"could not (load|open) kernel"):
        QemuMachine.start("none", hardware, image.disk, boot=boot, scratch=tmp_path, timeout=25)
    assert list(tmp_path.iterdir()) == []


def test_a_qemu_that_may_not_use_io_uring_is_started_without(tmp_path: Path) -> None:
    """Though qemu-img may: it is of another build, or a limit is reached that one of them alone has."""
    stub = tmp_path / "bin"
    stub.mkdir()
    program = stub / QEMU
    refusal = "Unable to use io_uring: failed to init linux io_uring ring: Operation not permitted"
    program.write_text(
        f'#!/bin/sh\ncase $* in *io_uring*) echo refused >> {tmp_path}/refused; echo "{refusal}" >&2; exit 1;; esac\n'
        f'exec {host.need(QEMU)} "$@"\n'
    )
    program.chmod(0o755)
    env = environment(tmp_path / "state", PATH=f"{stub}:{os.environ['PATH']}")
    done = lsmlab("shell", "debian-13", "--", "echo", "here", env=env)
    assert done.stdout == "here\n"
    assert "does not start" not in done.stderr, "no saved state is to blame"
    if disk_engine() == "io_uring":
        assert (tmp_path / "refused").read_text() == "refused\n"


def test_a_file_that_is_not_there_is_named(parts: tuple[build.Image, Hardware], tmp_path: Path) -> None:
    image, hardware = parts
    boot = Boot(tmp_path / "no-kernel", image.initrd, "")
    with pytest.raises(MachineError, match="no-kernel: cannot be opened for a guest: No such file"):
        QemuMachine.start("none", hardware, image.disk, boot=boot, scratch=tmp_path, timeout=25)
    assert list(tmp_path.iterdir()) == []


def test_a_guest_that_is_killed_is_an_error_and_no_verdict(tmp_path: Path) -> None:
    process = start(*FLAGSHIP, "-f", "selinux", "--guests", "1", "--json", "-", env=environment(tmp_path))
    assert process.stderr is not None
    told = iter(process.stderr.readline, "")
    assert any("attack read-shadow" in line for line in told)  # earlier, its saved state would be to blame
    for pid in guests_of(process.pid):
        subprocess.run(["kill", "-9", str(pid)], check=True)
    printed, words = process.communicate(timeout=300)
    assert process.returncode == 3, words
    assert [o["verdict"] for o in outcomes(printed).values()] == ["ERROR"]
