"""The accelerator: KVM counts only where it has booted the lab's kernel; why it does not is told apart."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lsmlab import discovery, doctor, host
from lsmlab.errors import HostError
from lsmlab.machine import accel
from lsmlab.machine.accel import KvmState
from lsmlab.machine.qemu import QEMU

PANIC = "echo '[    1.2] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)'; exit 0"


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "vmlinuz"
    path.write_bytes(b"a kernel")
    return path


@pytest.fixture(autouse=True)
def kvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A device that opens; and state of the test's own."""
    device = tmp_path / "kvm"
    device.touch()
    monkeypatch.setattr(accel, "KVM", device)
    monkeypatch.setenv("LSMLAB_HOME", str(tmp_path / "home"))
    return device


@pytest.fixture
def calls(tmp_path: Path) -> Callable[[], list[str]]:
    """How QEMU was called, but for its version."""

    def read() -> list[str]:
        file = tmp_path / "calls"
        return file.read_text().splitlines() if file.exists() else []

    return read


Calls = Callable[[], list[str]]
Qemu = Callable[..., None]


@pytest.fixture
def qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Qemu:
    """Puts a QEMU on PATH that does what is given."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def make(body: str, version: str = "QEMU emulator version 7.2") -> None:
        script = f"""#!/bin/sh
        case "$1" in --version) echo '{version}'; exit ;; esac
        echo "$*" >> '{tmp_path}/calls'
        {body}
        """
        (folder / QEMU).write_text(script)
        (folder / QEMU).chmod(0o755)

    make(PANIC)
    return make


def deny(monkeypatch: pytest.MonkeyPatch, device: Path) -> None:
    """Root may open anything: the kernel's refusal is made up."""
    real = os.open

    def refuse(path: Any, flags: int, *arguments: Any, **more: Any) -> int:
        if path == device:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, flags, *arguments, **more)

    monkeypatch.setattr(os, "open", refuse)


def test_proven(kernel: Path, qemu: Qemu, calls: Calls) -> None:
    found = accel.choose(kernel)
    assert (found.name, found.kvm) == ("kvm", KvmState.PROVEN)
    assert found.sentence() == "KVM: proven with the lab's own kernel"
    (call,) = calls()
    assert f"-accel kvm -cpu host -m 512M -kernel {kernel}" in call
    assert "-no-reboot" in call
    assert accel.choose(kernel, "kvm").name == "kvm"


def test_absent(kernel: Path, kvm: Path, qemu: Qemu, calls: Calls) -> None:
    kvm.unlink()
    found = accel.choose(kernel)
    assert (found.name, found.kvm) == ("tcg", KvmState.ABSENT)
    assert "No such file or directory" in found.detail
    assert found.sentence().startswith("TCG (software emulation): /dev/kvm is absent: ")
    assert calls() == []


def test_denied(kernel: Path, kvm: Path, qemu: Qemu, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    deny(monkeypatch, kvm)
    found = accel.choose(kernel)
    assert (found.name, found.kvm) == ("tcg", KvmState.DENIED)
    assert "may not be opened" in found.detail
    assert calls() == []


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("echo 'KVM internal error. Suberror: 1\nemulation failure' >&2; exit 1", "KVM internal error"),
        ('echo; echo "qemu: failed to initialize kvm: Device or resource busy" >&2; exit 1', "Device or resource busy"),
        ("exit 1", "stopped without a word"),
        ("echo 'Linux version 6.12'; exit 0", "stopped without a word"),
        ("printf '\\377\\200'; echo 'bad \\377' >&2; kill -SEGV $$", "bad"),
    ],
    ids=["emulation failure", "busy", "silent", "not through", "binary"],
)
def test_broken(kernel: Path, qemu: Qemu, body: str, words: str) -> None:
    qemu(body)
    found = accel.choose(kernel)
    assert (found.name, found.kvm) == ("tcg", KvmState.BROKEN)
    assert found.detail.startswith("it opens, but ")
    assert words in found.detail
    assert "\n" not in found.sentence()


def test_a_kernel_that_does_not_get_through_in_time(
    kernel: Path, qemu: Qemu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accel, "PROOF_SECONDS", 1)
    qemu(f"echo $$ > {tmp_path}/pid; echo 'Linux version 6.12'; exec sleep 60")
    start = time.monotonic()
    found = accel.choose(kernel)
    assert time.monotonic() - start < 5
    assert (found.name, found.kvm) == ("tcg", KvmState.BROKEN)
    assert "not through its boot after 1 s" in found.detail
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), signal.SIG_DFL)  # the probe is gone


def test_a_kernel_that_is_through_and_then_hangs_is_proof(
    kernel: Path, qemu: Qemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accel, "PROOF_SECONDS", 1)
    qemu(PANIC.replace("exit 0", "exec sleep 60"))
    assert accel.choose(kernel).kvm is KvmState.PROVEN


# What is remembered


def test_the_answer_is_remembered(kernel: Path, qemu: Qemu, calls: Calls) -> None:
    first = accel.choose(kernel)
    qemu("echo broken >&2; exit 1")
    assert accel.choose(kernel) == first
    assert len(calls()) == 1


def test_bad_news_is_remembered_as_well(kernel: Path, qemu: Qemu, calls: Calls) -> None:
    qemu("echo broken >&2; exit 1")
    first = accel.choose(kernel)
    assert accel.choose(kernel) == first
    assert len(calls()) == 1


def test_another_kernel_or_qemu_is_another_question(kernel: Path, qemu: Qemu, calls: Calls, tmp_path: Path) -> None:
    accel.choose(kernel)
    os.utime(kernel, (1, 1))
    accel.choose(kernel)
    assert len(calls()) == 2
    other = tmp_path / "vmlinuz-2"
    other.write_bytes(b"another")
    accel.choose(other)
    assert len(calls()) == 3
    qemu(PANIC, "QEMU emulator version 10.0")
    accel.choose(kernel)
    assert len(calls()) == 4
    accel.choose(other)
    assert len(calls()) == 5
    accel.choose(kernel)
    assert len(calls()) == 5


def test_a_device_that_appears_is_looked_at_anew(
    kernel: Path, kvm: Path, qemu: Qemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    kvm.unlink()
    assert accel.choose(kernel).kvm is KvmState.ABSENT
    kvm.touch()
    deny(monkeypatch, kvm)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, *rest: path != kvm and access(path, *rest))
    assert accel.choose(kernel).kvm is KvmState.DENIED


def test_a_device_that_is_opened_to_us_is_looked_at_anew(kernel: Path, kvm: Path, qemu: Qemu) -> None:
    kvm.unlink()
    assert accel.choose(kernel).kvm is KvmState.ABSENT
    kvm.touch()
    assert accel.choose(kernel).kvm is KvmState.PROVEN


@pytest.mark.parametrize("content", ["", "nonsense", "[]", "{}", '{"x": 1}', "null", "\x00"])
def test_a_memory_that_cannot_be_read_is_asked_again(
    kernel: Path, qemu: Qemu, calls: Calls, tmp_path: Path, content: str
) -> None:
    file = tmp_path / "home" / "state" / "acceleration.json"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    assert accel.choose(kernel).kvm is KvmState.PROVEN
    assert accel.choose(kernel).kvm is KvmState.PROVEN
    assert len(calls()) == 1


def test_an_entry_that_makes_no_sense_is_asked_again(kernel: Path, qemu: Qemu, calls: Calls, tmp_path: Path) -> None:
    accel.choose(kernel)
    file = tmp_path / "home" / "state" / "acceleration.json"
    (key,) = json.loads(file.read_text())
    for entry in (["unheard-of", "x"], [], None, 7, "", ["proven"]):
        file.write_text(json.dumps({key: entry}))
        assert accel.choose(kernel).kvm is KvmState.PROVEN, entry
    assert len(calls()) == 7


def test_only_the_newest_answers_are_kept(kernel: Path, qemu: Qemu, tmp_path: Path) -> None:
    for second in range(accel.REMEMBERED + 5):
        os.utime(kernel, (second, second))
        accel.choose(kernel)
    file = tmp_path / "home" / "state" / "acceleration.json"
    assert len(json.loads(file.read_text())) <= accel.REMEMBERED + 1
    assert [p.name for p in file.parent.iterdir()] == [file.name]


# What is asked for


def test_tcg_asked_for_never_probes(kernel: Path, qemu: Qemu, calls: Calls, tmp_path: Path) -> None:
    found = accel.choose(kernel, "tcg")
    assert found.name == "tcg"
    assert "as asked for" in found.sentence()
    assert calls() == []
    assert not (tmp_path / "home").exists()


def test_tcg_asked_for_says_nothing_of_kvm(kernel: Path, qemu: Qemu) -> None:
    assert "absent" not in accel.choose(kernel, "tcg").sentence()


@pytest.mark.parametrize("state", [KvmState.ABSENT, KvmState.DENIED, KvmState.BROKEN])
def test_kvm_asked_for_where_it_does_not_work(
    kernel: Path, kvm: Path, qemu: Qemu, state: KvmState, monkeypatch: pytest.MonkeyPatch
) -> None:
    if state is KvmState.ABSENT:
        kvm.unlink()
    elif state is KvmState.DENIED:
        deny(monkeypatch, kvm)
    else:
        qemu("echo 'emulation failure' >&2; exit 1")
    with pytest.raises(HostError) as caught:
        accel.choose(kernel, "kvm")
    assert caught.value.message.startswith(f"KVM was asked for, and /dev/kvm is {state}: ")
    assert caught.value.hint == accel.advice(state) != ""
    assert len({accel.advice(s) for s in KvmState}) == len(KvmState)


def test_the_kvm_of_another_processor_is_not_worth_trying(monkeypatch: pytest.MonkeyPatch) -> None:
    alma = discovery.load_lab("almalinux-10")
    assert accel.worth_trying() and doctor.needs(alma)["KVM"]
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert not accel.worth_trying() and not doctor.needs(alma)["KVM"]


@pytest.mark.parametrize(
    ("release", "absent", "denied"),
    [
        ("5.15.167.4-microsoft-standard-WSL2", "nestedVirtualization=true below [wsl2] in .wslconfig", "the group kvm"),
        ("6.12.41+deb13-amd64", "Enable virtualisation in the firmware", "then log in anew"),
    ],
)
def test_who_runs_linux_in_windows_is_told_what_to_do_there(
    kvm: Path, kernel: Path, monkeypatch: pytest.MonkeyPatch, release: str, absent: str, denied: str
) -> None:
    monkeypatch.setattr("platform.release", lambda: release)
    assert denied in accel.advice(KvmState.DENIED)
    kvm.unlink()
    with pytest.raises(HostError) as caught:
        accel.choose(kernel, "kvm")
    assert absent in caught.value.hint
    assert absent in doctor._kvm(discovery.load_lab()).advice
    assert ("wsl --shutdown" in caught.value.hint) == ("microsoft" in release)


def test_a_machine_without_qemu(kernel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert host.find(QEMU) is None
    with pytest.raises(HostError, match=f"{QEMU} is not installed") as caught:
        accel.choose(kernel)
    assert "qemu-system-x86" in caught.value.hint
