"""scripts/setup.sh on a made-up machine: a PATH of stubs that write down how they were called."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]

# What the script itself is written with; the rest of the real machine is out of its sight.
REAL = ("bash", "cat", "cp", "cut", "dirname", "env", "mkdir", "mktemp", "mv", "paste", "rm", "sed", "sort", "tail")
NEEDED = (
    "debugfs", "docker-registry", "gpg", "gpg-agent", "gpgv", "mke2fs", "mmdebstrap", "mount", "newuidmap", "qemu-img",
    "qemu-system-x86_64", "setpriv", "skopeo",
)  # fmt: skip
KEYRING = "usr/share/keyrings/debian-archive-keyring.gpg"

# The same stub stands for the system's Python and for the one inside .venv, as `-m venv` copies it.
PYTHON = """
case "$*" in
  *version_info*) echo 3.11.2 ;;
  *"-m venv --clear"*) rm -rf .venv && mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
esac
"""


@dataclass(frozen=True, slots=True)
class Host:
    """A machine with everything installed and no .venv; root is its user."""

    path: Path

    @property
    def repo(self) -> Path:
        return self.path / "repo"

    @property
    def stamp(self) -> Path:
        return self.repo / ".venv/.stamp"

    def stub(self, name: str, body: str = "") -> None:
        file = self.path / "bin" / name
        file.write_text(f'#!/bin/sh\necho "{name} $*" >>"$CALLS"\n{body}\n')
        file.chmod(0o755)

    def remove(self, *names: str) -> None:
        for name in names:
            (self.path / "bin" / name).unlink()

    def user(self, uid: int) -> None:
        self.stub("id", f"echo {uid}")

    def setup(self, *options: str) -> subprocess.CompletedProcess[str]:
        """Run the script anew, without a terminal. `calls` then holds what this run has called."""
        calls = self.path / "calls"
        calls.write_text("")
        env = {"PATH": str(self.path / "bin"), "CALLS": str(calls), "LSMLAB_SETUP_ROOT": str(self.path)}
        bash = self.path / "bin" / "bash"
        return subprocess.run(
            [str(bash), str(self.repo / "scripts/setup.sh"), *options],
            env=env | {"TMPDIR": str(self.path / "tmp")},
            cwd=self.path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def calls(self, *programs: str) -> list[str]:
        """Calls of these programs in the last run; of any program that changes something when none is named."""
        lines = (self.path / "calls").read_text().splitlines()
        names = programs or ("apt-get", "sudo")
        return [line for line in lines if line.split()[0] in names or (not programs and " -m " in line)]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    host = Host(tmp_path)
    for folder in ("bin", "tmp", "repo/scripts", Path(KEYRING).parent):
        (tmp_path / folder).mkdir(parents=True)
    for name in REAL:
        real = shutil.which(name)
        assert real, f"this machine has no {name}"
        (tmp_path / "bin" / name).symlink_to(real)
    for name in (*NEEDED, "unshare", "apt-get"):
        host.stub(name)
    (tmp_path / KEYRING).touch()
    host.stub("python3", PYTHON)
    host.user(0)
    shutil.copy(REPO / "scripts/setup.sh", host.repo / "scripts")
    shutil.copy(REPO / "pyproject.toml", host.repo)
    return host


@pytest.fixture
def ready(host: Host) -> Host:
    result = host.setup()
    assert result.returncode == 0, result.stderr
    return host


def test_makes_the_venv(host: Host) -> None:
    result = host.setup()
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
    venv, pip, compiled = host.calls()
    assert venv == "python3 -m venv --clear .venv"
    assert "-m pip install" in pip
    assert pip.endswith("--editable .[dev]")
    assert compiled == "python3 -m compileall -q harness/lsmlab"
    assert host.stamp.is_file()
    assert result.stderr.endswith("set-up: ready\n")


def test_a_second_run_does_nothing(ready: Host) -> None:
    result = ready.setup()
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "set-up: nothing to do\n")
    assert ready.calls() == []


def test_a_ready_venv_needs_no_other_python(ready: Host) -> None:
    ready.remove("python3")
    assert ready.setup().stderr == "set-up: nothing to do\n"


def test_a_changed_pyproject_runs_pip_alone(ready: Host) -> None:
    later = ready.stamp.stat().st_mtime + 10
    os.utime(ready.repo / "pyproject.toml", (later, later))
    assert ready.setup().returncode == 0
    pip, compiled = ready.calls()
    assert "-m pip install" in pip
    assert "-m compileall" in compiled


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param("rm .venv/.stamp", id="pip-was-cut-short"),
        pytest.param("rm .venv/bin/python", id="python-is-gone"),
        pytest.param("printf '#!/bin/sh\\nexit 1\\n' >.venv/bin/python", id="lsmlab-is-not-in-it"),
        pytest.param("echo /elsewhere >.venv/.stamp", id="copied-from-another-folder"),
        pytest.param("rm -r .venv/bin .venv/.stamp", id="venv-was-cut-short"),
    ],
)
def test_a_damaged_venv_is_made_again(ready: Host, damage: str) -> None:
    subprocess.run(["sh", "-c", damage], cwd=ready.repo, check=True)
    assert ready.setup().returncode == 0
    assert ready.calls()[0] == "python3 -m venv --clear .venv"
    assert ready.setup().stderr == "set-up: nothing to do\n"


def test_a_failed_pip_shows_its_output_and_is_run_again(host: Host) -> None:
    host.stub("python3", PYTHON + 'case "$*" in *"pip install"*) echo "No matching distribution"; exit 3 ;; esac')
    result = host.setup()
    assert result.returncode == 1
    assert "exit status 3" in result.stderr
    assert "    No matching distribution\n" in result.stderr
    assert not host.stamp.exists()
    host.stub("python3", PYTHON)
    assert host.setup().returncode == 0
    assert host.calls()[0] == "python3 -m venv --clear .venv"


def test_a_failed_pip_after_a_change_leaves_no_stamp(ready: Host) -> None:
    later = ready.stamp.stat().st_mtime + 10
    os.utime(ready.repo / "pyproject.toml", (later, later))
    python = ready.repo / ".venv/bin/python"
    python.write_text('#!/bin/sh\ncase "$*" in *"pip install"*) exit 1 ;; esac\n')
    assert ready.setup().returncode == 1
    assert not ready.stamp.exists()


def test_missing_python(host: Host) -> None:
    host.remove("python3")
    result = host.setup()
    assert result.returncode == 1
    assert "no python3. Install Python 3.11 or later" in result.stderr


def test_old_python(host: Host) -> None:
    host.stub("python3", "echo 3.9.2; exit 1")
    result = host.setup()
    assert result.returncode == 1
    assert "python3 is version 3.9.2. Install Python 3.11 or later" in result.stderr
    assert host.calls() == []


def _installs(host: Host, *names: str) -> str:
    """Body of an apt-get that brings these commands."""
    return (
        'case "$*" in *install*) '
        + "".join(f'cp "{host.path}/bin/gpg" "{host.path}/bin/{n}"; ' for n in names)
        + ";; esac"
    )


def test_root_installs_what_is_missing_with_apt(host: Host) -> None:
    missing = ("qemu-system-x86_64", "qemu-img", "mke2fs", "debugfs")
    host.remove(*missing)
    host.stub("apt-get", _installs(host, *missing))
    result = host.setup()
    assert result.returncode == 0, result.stderr
    assert host.calls("apt-get") == [
        "apt-get -o DPkg::Lock::Timeout=300 update",
        "apt-get -o DPkg::Lock::Timeout=300 install --yes --no-install-recommends e2fsprogs qemu-system-x86 qemu-utils",
    ]
    assert host.calls("sudo") == []
    why = result.stderr.index("apt-get needs root to install these packages; nothing else here does")
    assert result.stderr.index("qemu-img") < why < result.stderr.index("installing: e2fsprogs")


def test_apt_runs_without_questions(host: Host) -> None:
    host.remove("qemu-img")
    host.stub("apt-get", f'echo "asked: $DEBIAN_FRONTEND" >>"$CALLS"\n{_installs(host, "qemu-img")}')
    assert host.setup().returncode == 0
    assert host.calls("asked:") == ["asked: noninteractive"] * 2


def test_missing_keyring(host: Host) -> None:
    (host.path / KEYRING).unlink()
    host.stub("apt-get", f'case "$*" in *install*) : >"{host.path / KEYRING}" ;; esac')
    assert host.setup().returncode == 0
    assert host.calls("apt-get")[1].endswith(" debian-archive-keyring")


def test_missing_ensurepip(host: Host) -> None:
    has_it = host.path / "ensurepip"
    host.stub("python3", PYTHON + f'case "$*" in *ensurepip*) test -e "{has_it}" ;; esac')
    host.stub("apt-get", f'case "$*" in *install*) : >"{has_it}" ;; esac')
    assert host.setup().returncode == 0
    assert host.calls("apt-get")[1].endswith(" python3-venv")


def test_tools_in_sbin_are_found(host: Host) -> None:
    sbin = host.path / "usr/sbin"
    sbin.mkdir()
    for name in ("mke2fs", "debugfs"):
        (host.path / "bin" / name).rename(sbin / name)
    assert host.setup().returncode == 0
    assert host.calls("apt-get") == []


def test_only_others_than_root_need_newuidmap(host: Host) -> None:
    host.remove("newuidmap", "apt-get")
    assert host.setup().returncode == 0
    host.user(1000)
    result = host.setup()
    assert result.returncode == 1
    assert "Debian, Ubuntu: uidmap\n" in result.stderr
    assert "Fedora:         shadow-utils\n" in result.stderr


@pytest.mark.parametrize("sudo", [None, "exit 1"], ids=["no-sudo", "sudo-wants-a-password"])
def test_an_ordinary_user_without_sudo_is_told_the_packages(host: Host, sudo: str | None) -> None:
    host.user(1000)
    host.remove("qemu-img", "mmdebstrap")
    if sudo is not None:
        host.stub("sudo", sudo)
    result = host.setup()
    assert result.returncode == 1
    assert "you are not root, and cannot become root with sudo" in result.stderr
    assert "Debian, Ubuntu: mmdebstrap qemu-utils\n" in result.stderr
    assert "Fedora:         mmdebstrap qemu-img\n" in result.stderr
    assert host.calls("apt-get") == []
    assert not host.stamp.exists()


def test_an_ordinary_user_installs_through_sudo(host: Host) -> None:
    host.user(1000)
    host.remove("mmdebstrap")
    host.stub("sudo", 'if [ "$1" = -n ]; then shift; fi; if [ "$1" = true ]; then exit 0; fi; exec "$@"')
    host.stub("apt-get", _installs(host, "mmdebstrap"))
    result = host.setup()
    assert result.returncode == 0, result.stderr
    update, install = host.calls("apt-get")
    assert update.endswith(" update")
    assert install.endswith(" install --yes --no-install-recommends mmdebstrap")
    assert [call for call in host.calls("sudo") if "pip" in call or "venv" in call] == []


def test_no_apt_get(host: Host) -> None:
    host.remove("apt-get", "qemu-system-x86_64", "gpg")
    result = host.setup()
    assert result.returncode == 1
    assert "there is no apt-get here" in result.stderr
    assert "Debian, Ubuntu: gpg qemu-system-x86\n" in result.stderr
    assert "Fedora:         gnupg2 qemu-system-x86-core\n" in result.stderr


@pytest.mark.parametrize("step", ["update", "install"])
def test_a_failed_apt_shows_its_last_lines(host: Host, step: str) -> None:
    host.remove("qemu-img")
    host.stub("apt-get", f'case "$*" in *{step}*) echo "E: Unable to fetch"; exit 100 ;; esac')
    result = host.setup()
    assert result.returncode == 1
    assert "    E: Unable to fetch\n" in result.stderr
    assert not (host.repo / ".venv").exists()


def test_apt_that_brings_nothing_is_not_believed(host: Host) -> None:
    host.remove("qemu-img")
    result = host.setup()
    assert result.returncode == 1
    assert "apt-get succeeded, and yet these are missing" in result.stderr


def test_leaves_no_temporary_files(ready: Host) -> None:
    assert list((ready.path / "tmp").iterdir()) == []


# What tests alone use


FOR_TESTS = "set-up: missing on this machine, and used by tests alone:\n    vagrant "


def test_what_tests_alone_use_is_installed_for_them_alone(ready: Host) -> None:
    assert ready.setup().stderr == "set-up: nothing to do\n"
    ready.stub("apt-get", _installs(ready, "vagrant"))
    result = ready.setup("--tests")
    assert result.returncode == 0
    assert result.stderr.startswith(FOR_TESTS)
    assert result.stderr.endswith("set-up: installing: vagrant-libvirt\nset-up: ready\n")
    update, install = ready.calls()
    assert update.endswith(" update")
    assert install.endswith(" install --yes --no-install-recommends vagrant-libvirt")
    assert ready.setup("--tests").stderr == "set-up: nothing to do\n"


def test_what_is_needed_goes_before_what_tests_use(host: Host) -> None:
    host.remove("qemu-img")
    host.stub("apt-get", _installs(host, "qemu-img", "vagrant"))
    assert host.setup("--tests").returncode == 0
    last_words = [call.split()[-1] for call in host.calls()]
    assert last_words == ["update", "qemu-utils", ".venv", ".[dev]", "harness/lsmlab", "vagrant-libvirt"]


@pytest.mark.parametrize(
    ("lacking", "why"),
    [
        ("apt-get", "there is no apt-get here."),
        ("root", "you are not root, and cannot become root with sudo."),
        ("package", "    E: Unable to locate package\nset-up: apt-get could not install that."),
    ],
)
def test_what_tests_use_is_done_without_and_not_tried_again(ready: Host, lacking: str, why: str) -> None:
    if lacking == "apt-get":
        ready.remove("apt-get")
    elif lacking == "root":
        ready.user(1000)
    else:
        ready.stub("apt-get", 'case "$*" in *install*) echo "E: Unable to locate package"; exit 100 ;; esac')
    result = ready.setup("--tests")
    assert (result.returncode, result.stdout) == (0, "")
    assert result.stderr.startswith(FOR_TESTS)
    assert result.stderr.endswith(f"{why} Going on without: these tests are skipped.\nset-up: ready\n")
    again = ready.setup("--tests")
    assert (again.returncode, again.stderr, ready.calls()) == (0, "set-up: nothing to do\n", [])


def test_a_vagrant_that_is_there_is_left_as_it_is(ready: Host) -> None:
    ready.stub("vagrant")
    assert ready.setup("--tests").stderr == "set-up: nothing to do\n"
    assert ready.calls("apt-get", "vagrant") == []


def test_what_cannot_be_installed_for_tests_keeps_nothing_else_from_it(ready: Host) -> None:
    ready.remove("skopeo", "docker-registry")
    (ready.path / "run/systemd/system").mkdir(parents=True)
    ready.stub("systemctl")
    cannot = 'case "$*" in *vagrant*) echo "E: Unable to locate package"; exit 100 ;; esac'
    ready.stub("apt-get", f"{cannot}\n{_installs(ready, 'skopeo', 'docker-registry')}")
    result = ready.setup("--tests")
    assert result.returncode == 0
    assert "set-up: apt-get could not install that. Going on without: these tests are skipped." in result.stderr
    mask = "systemctl mask docker-registry.service"  # before it is installed: its service would be there for all
    calls = ready.calls("apt-get", "systemctl")
    assert [call if call == mask else call.split()[-1] for call in calls] == [
        "update", "vagrant-libvirt", "skopeo", mask, "docker-registry",
    ]  # fmt: skip
    assert ready.setup("--tests").stderr == "set-up: nothing to do\n"


def test_an_option_that_it_does_not_have(host: Host) -> None:
    result = host.setup("--test")
    assert (result.returncode, result.stderr) == (1, "usage: scripts/setup.sh [--tests]\n")


@pytest.mark.parametrize(
    ("target", "option"), [("test", " --tests"), ("test-all", " --tests"), ("run", ""), ("setup", "")]
)
def test_which_targets_of_make_set_up_for_tests(target: str, option: str) -> None:
    # Not as a part of the make that may have started these tests
    env = {name: value for name, value in os.environ.items() if name not in {"ARGS", "MAKEFLAGS", "MAKELEVEL"}}
    asked = ["make", "--dry-run", target]
    shown = subprocess.run(asked, cwd=REPO, env=env, capture_output=True, text=True, check=True).stdout
    assert shown.splitlines()[0].rstrip() == f"scripts/setup.sh{option}"
