"""The agent that runs in guests, its functions natively on this machine: read exactly, or told to be unreadable."""

from __future__ import annotations

import ast
import base64
import contextlib
import ctypes
import errno
import json
import os
import resource
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from descriptors import descriptors
from lsmlab.guest import agent

SOURCE = Path(agent.__file__)
EVERY_BYTE = bytes(range(256))
MARK = "a" * 16

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may do this")


def raw(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def text(done: dict[str, Any], key: str = "out") -> str:
    return raw(done[key]).decode()


def sh(script: str, *arguments: str, timeout: float = 60) -> dict[str, Any]:
    return agent.run(["sh", "-c", script, "sh", *arguments], timeout=timeout)


def children() -> list[str]:
    found = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            found += (task / "children").read_text().split()
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


def wait_until(true: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# The source


def test_the_source_is_python_3_9_and_needs_the_standard_library_only() -> None:
    tree = ast.parse(SOURCE.read_text("utf-8"), feature_version=(3, 9))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert len(imported) > 10
    assert {name.partition(".")[0] for name in imported} <= sys.stdlib_module_names


# Commands


@pytest.mark.parametrize("code", [0, 1, 126, 255])
def test_run_gives_the_exit_status(code: int) -> None:
    done = sh(f"exit {code}")
    assert (done["exit_code"], done["signal"], done["timed_out"], done["too_much"]) == (code, None, False, False)
    assert 0 < done["seconds"] < 20


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_run_gives_the_signal(number: signal.Signals) -> None:
    done = sh(f"kill -{number.value} $$")
    assert (done["exit_code"], done["signal"]) == (None, number.value)


def test_run_says_126_and_127_as_a_shell_does(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("no program")
    for program, code, words in (
        ("/no/such/program", 127, "No such file or directory"),
        ("no-such-program-here", 127, "No such file or directory"),
        (str(plain), 126, "Permission denied"),
        (str(tmp_path), 126, "Permission denied"),
        (f"{plain}/below", 126, "Not a directory"),
    ):
        done = agent.run([program])
        assert (done["exit_code"], done["signal"], text(done)) == (code, None, "")
        assert text(done, "err") == f"{program}: {words}"
    plain.chmod(0o755)
    plain.write_bytes(b"\x7fELF, not really")
    assert agent.run([str(plain)])["exit_code"] == 126


@pytest.mark.parametrize("data", [b"", b"word", EVERY_BYTE * 8192], ids=["none", "word", "2-MiB"])
def test_run_gives_the_program_its_input(data: bytes) -> None:
    done = agent.run(["cat"], stdin=base64.b64encode(data).decode())
    assert (done["exit_code"], raw(done["out"]) == data) == (0, True)
    assert agent.run(["true"], stdin=base64.b64encode(data).decode())["exit_code"] == 0


def test_run_keeps_both_outputs_as_bytes_and_apart() -> None:
    script = f"import os; os.write(1, bytes(range(256)) * 4096); os.write(2, {EVERY_BYTE!r}); os.write(1, b'end')"
    done = agent.run([sys.executable, "-c", script])
    assert raw(done["out"]) == EVERY_BYTE * 4096 + b"end"
    assert raw(done["err"]) == EVERY_BYTE


def test_run_ends_the_whole_session_in_time_and_reports_what_was_said(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = """
        echo partial; echo words >&2
        sleep 61 & echo $! >> "$1"
        "$2" -c 'import os, time; os.setpgid(0, 0); print(os.getpid(), flush=True); time.sleep(61)' >> "$1" &
        while [ "$(wc -l < "$1")" -lt 2 ]; do sleep 0.01; done
        echo $$ >> "$1"; wait
    """
    start = time.monotonic()
    done = sh(script, str(pids), sys.executable, timeout=1.5)
    assert 1.5 <= time.monotonic() - start < 15
    assert (done["timed_out"], done["exit_code"], done["signal"], done["too_much"]) == (True, None, None, False)
    assert (text(done), text(done, "err")) == ("partial\n", "words\n")
    there = [int(pid) for pid in pids.read_text().split()]
    assert len(there) == 3
    wait_until(lambda: not any(map(alive, there)))


def test_run_with_no_time_left_still_ends_the_program() -> None:
    for limit in (0, -1.0, 0.001):
        assert agent.run(["sleep", "61"], timeout=limit)["timed_out"]


def test_run_stops_a_program_that_says_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "MOST_OUTPUT", 100_000)
    for stream in ("", " >&2"):
        start = time.monotonic()
        done = sh(f"yes{stream}")
        assert time.monotonic() - start < 20
        assert (done["too_much"], done["timed_out"]) == (True, False)
        assert len(raw(done["err" if stream else "out"])) == 100_000
    exact = sh("head -c 100000 /dev/zero")
    assert (exact["too_much"], exact["exit_code"], len(raw(exact["out"]))) == (False, 0, 100_000)
    assert sh("head -c 100001 /dev/zero")["too_much"]


def test_a_child_left_behind_does_not_delay_the_answer() -> None:
    start = time.monotonic()
    done = sh("sleep 61 & echo $!")
    try:
        assert time.monotonic() - start < 20
        assert done["exit_code"] == 0
        assert alive(int(text(done)))
    finally:
        os.kill(int(text(done)), signal.SIGKILL)


def test_a_program_that_closes_its_outputs_is_waited_for_without_spinning() -> None:
    before = time.process_time()
    done = sh("exec > /dev/null 2>&1; sleep 0.7; exit 3")
    assert (done["exit_code"], done["seconds"] >= 0.7) == (3, True)
    assert time.process_time() - before < 0.5


def test_two_hundred_runs_leave_nothing_behind() -> None:
    sh("true")
    before = descriptors()
    for number in range(200):
        done = agent.run(["no-such-program"] if number % 5 == 4 else ["true"], stdin="YQ==")
        assert done["exit_code"] == (127 if number % 5 == 4 else 0)
    assert descriptors() == before
    assert children() == []


def test_a_run_that_cannot_be_waited_for_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    before = descriptors()
    with pytest.raises(OSError, match="Too many open files"):
        agent.run(["sleep", "61"])
    assert (descriptors(), children()) == (before, [])


def test_run_works_with_more_descriptors_than_select_can_take() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1500:
        pytest.skip("this machine allows a process fewer than 1500 descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (1500, hard))
    held = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
    try:
        assert text(sh("echo here")) == "here\n"
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# Commands as a service


Ground = Callable[..., dict[str, Any]]
CAP_CHOWN, CAP_SETUID, CAP_NET_BIND_SERVICE = 1 << 0, 1 << 7, 1 << 10
STATUS = 'cat "/proc/$$/status" "/proc/$$/loginuid" && echo && cat "/proc/$$/oom_score_adj" && readlink "/proc/$$/exe"'


def _mounts_may_be_made() -> bool:
    tried = ["unshare", "--mount", "sh", "-c", "echo 7 > /proc/self/loginuid && mount --bind /bin/sh /bin/sh"]
    return subprocess.run(tried, capture_output=True, check=False).returncode == 0


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a service's program, `served`, that every user may enter; skips where none can be acted for."""
    if os.geteuid() != 0 or not _mounts_may_be_made():
        pytest.skip("only root with a mount namespace and an audit user id of its own can act for a service")
    folder = Path(tempfile.mkdtemp(prefix="lsmlab-agent-"))
    folder.chmod(0o755)
    shutil.copy("/bin/sleep", folder / "served")
    monkeypatch.setattr(agent, "VEHICLE", str(folder / "vehicle"))
    monkeypatch.setattr(agent, "ENFORCE", str(folder / "no-selinux"))
    yield folder
    shutil.rmtree(folder)


def rights(folder: Path, **changed: Any) -> dict[str, Any]:
    return {
        "auid": 0x40000007, "uid": 65534, "gid": 65533, "groups": [42, 50], "cap_bounding": CAP_NET_BIND_SERVICE,
        "no_new_privs": False, "exe": str(folder / "served"), **changed,
    }  # fmt: skip


def read_status(done: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
    assert (done["exit_code"], text(done, "err")) == (0, "")
    *status, auid, adjustment, exe = text(done).splitlines()
    return {name: " ".join(value.split()) for name, _, value in (s.partition(":") for s in status)}, [
        auid, adjustment, exe,
    ]  # fmt: skip


@pytest.mark.parametrize("no_new_privs", [False, True])
def test_a_command_has_the_rights_of_the_service(service: Path, *, no_new_privs: bool) -> None:
    done = agent.run_as(["sh", "-c", STATUS], rights(service, no_new_privs=no_new_privs), 20)
    status, rest = read_status(done)
    assert status["Uid"] == "65534 65534 65534 65534"
    assert status["Gid"] == "65533 65533 65533 65533"
    assert status["Groups"] == "42 50"
    assert {status[name].strip("0") for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {""}
    assert int(status["CapBnd"], 16) == CAP_NET_BIND_SERVICE
    assert status["NoNewPrivs"] == str(int(no_new_privs))
    assert rest == [str(0x40000007), "0", str(service / "served")]
    assert (service / "served").read_bytes() == Path("/bin/sleep").read_bytes()  # the mount was the command's own


def test_a_command_of_root_has_the_bounding_set_and_no_more(service: Path) -> None:
    most = CAP_CHOWN | CAP_SETUID
    for changed in ({}, {"no_new_privs": True}):
        who = rights(service, uid=0, gid=0, groups=[], cap_bounding=most, **changed)
        status, _ = read_status(agent.run_as(["sh", "-c", STATUS], who, 20))
        assert {int(status[name], 16) for name in ("CapPrm", "CapEff", "CapBnd")} == {most}
        assert {int(status[name], 16) for name in ("CapInh", "CapAmb")} == {0}


def test_what_the_agent_could_hand_down_is_not_handed_down(service: Path) -> None:
    """Inheritable and ambient capabilities, kept capabilities, groups: of an agent that has them all."""
    script = f"""
import ctypes, json, sys
sys.path[:0] = [{str(SOURCE.parent)!r}]
import agent
libc = agent._libc
header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert libc.capget(header, sets) == 0
sets[2] |= {CAP_CHOWN | CAP_SETUID}
assert libc.capset(header, sets) == 0
assert libc.prctl(47, 2, 0, 0, 0) == libc.prctl(47, 2, 7, 0, 0) == 0, "PR_CAP_AMBIENT_RAISE"
assert libc.prctl(28, 1 << 2 | 1 << 4, 0, 0, 0) == 0, "SECBIT_NO_SETUID_FIXUP, SECBIT_KEEP_CAPS"
agent.VEHICLE, agent.ENFORCE = {agent.VEHICLE!r}, "/nonexistent"
print(json.dumps([agent.run_as(["sh", "-c", sys.argv[1]], json.loads(who), 20) for who in sys.argv[2:]]))
"""
    everything = (1 << 64) - 1
    who = [rights(service, cap_bounding=everything), rights(service, uid=0, cap_bounding=CAP_NET_BIND_SERVICE)]
    argv = [sys.executable, "-c", script, STATUS, *map(json.dumps, who)]
    service_user, service_root = json.loads(subprocess.run(argv, stdout=subprocess.PIPE, check=True).stdout)
    status, _ = read_status(service_user)
    assert {status[name].strip("0") for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {""}
    assert int(status["CapBnd"], 16) & CAP_CHOWN
    status, _ = read_status(service_root)
    assert int(status["CapPrm"], 16) | int(status["CapEff"], 16) == CAP_NET_BIND_SERVICE
    assert int(status["CapInh"], 16) | int(status["CapAmb"], 16) == 0


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"auid": None}, "the audit user id: [Errno 22] Invalid argument"),
        ({"exe": "/no/such/program"}, "mounting over /no/such/program: [Errno 2] No such file or directory"),
        ({"exe": "/usr/sbin/served (deleted)"}, "mounting over /usr/sbin/served (deleted): [Errno 2]"),
        ({"groups": [1] * 70_000}, "groups: "),
        ({"groups": [-1]}, "groups: "),
        ({"uid": -1}, "uid -1, gid 65533"),
        ({"gid": 0xFFFFFFFF}, "uid 65534, gid 4294967295"),
    ],
    ids=["auid", "exe", "deleted", "many-groups", "no-group", "uid", "gid"],
)
def test_a_service_that_cannot_be_acted_for_is_told_with_the_step(
    service: Path, changed: dict[str, Any], words: str
) -> None:
    proof = service / "proof"
    before = descriptors()
    with pytest.raises(agent.Refused) as caught:
        agent.run_as(["touch", str(proof)], rights(service, **changed), 20)
    assert str(caught.value).startswith("the service cannot be acted for: ")
    assert words in str(caught.value)
    assert not proof.exists()
    assert (descriptors(), children()) == (before, [])


def test_no_step_may_fail_and_the_command_still_run(service: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proof, whole = service / "proof", agent._becoming
    who = rights(service, uid=0, gid=0, no_new_privs=True)

    def fail() -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    names = [name for name, _ in whole(who, agent.VEHICLE)]
    assert len(names) == len(set(names)) == 12
    for broken in names:

        def with_one_broken(*arguments: Any, broken: str = broken) -> list[tuple[str, Callable[[], Any]]]:
            return [(name, fail if name == broken else do) for name, do in whole(*arguments)]

        monkeypatch.setattr(agent, "_becoming", with_one_broken)
        with pytest.raises(agent.Refused) as caught:
            agent.run_as(["touch", str(proof)], who, 20)
        assert str(caught.value).endswith(f"{broken}: [Errno 1] Operation not permitted")
        assert not proof.exists()
    monkeypatch.setattr(agent, "_becoming", whole)
    assert agent.run_as(["touch", str(proof)], rights(service, uid=0, cap_bounding=2), 20)["exit_code"] == 0
    assert proof.exists()


def test_a_command_whose_exec_is_refused_is_126_and_one_that_is_missing_refused(service: Path) -> None:
    (service / "served").chmod(0o755)
    service.chmod(0o700)
    done = agent.run_as(["true"], rights(service), 20)
    assert (done["exit_code"], text(done, "err")) == (126, "true: Permission denied")
    with pytest.raises(agent.Refused, match="no-such-program: no such program in the guest"):
        agent.run_as(["no-such-program"], rights(service), 20)


def test_what_a_commands_children_write_is_read_as_well(service: Path) -> None:
    argv = ["sh", "-c", "(sleep 0.5; echo late) & echo soon >&2; exit 1"]
    done = agent.run_as(argv, rights(service), 20, whole=True)
    assert (done["exit_code"], text(done), text(done, "err")) == (1, "late\n", "soon\n")
    assert (done["timed_out"], done["cut_short"]) == (False, False)
    done = agent.run_as(argv, rights(service), 20)
    assert (done["exit_code"], text(done), "cut_short" in done) == (1, "", False)


def test_children_that_may_go_on_writing_are_waited_for_as_long_as_the_command_had(service: Path) -> None:
    argv = ["sh", "-c", "sleep 30 & echo $!; exit 1"]
    start = time.monotonic()
    done = agent.run_as(argv, rights(service), 1, whole=True)
    os.kill(int(text(done)), signal.SIGKILL)
    assert 1 <= time.monotonic() - start < 10
    assert (done["exit_code"], done["timed_out"], done["cut_short"]) == (1, False, True)


def test_a_command_as_a_service_is_ended_in_time(service: Path) -> None:
    done = agent.run_as(["sh", "-c", "echo begun; sleep 61"], rights(service), 1)
    assert (done["timed_out"], text(done)) == (True, "begun\n")
    assert children() == []


# Files


def written(path: Path, data: bytes, **how: Any) -> None:
    agent.write(str(path), base64.b64encode(data).decode(), **how)


def test_write_makes_a_file_its_folders_and_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "it's é\n"
    written(path, EVERY_BYTE, mode=0o4640)
    assert path.read_bytes() == EVERY_BYTE
    assert stat.S_IMODE(path.stat().st_mode) == 0o4640


def test_write_is_in_place(tmp_path: Path) -> None:
    path = tmp_path / "there"
    path.write_bytes(b"a long first content" * 100)
    path.chmod(0o600)
    (tmp_path / "link").symlink_to(path)
    before = path.stat()
    written(path, b"short")
    written(tmp_path / "link", b"by its link")
    after = path.stat()
    assert (path.read_bytes(), after.st_ino, after.st_mode) == (b"by its link", before.st_ino, before.st_mode)
    written(path, b"")
    assert path.read_bytes() == b""


@as_root
def test_write_gives_the_owner_and_keeps_the_mode(tmp_path: Path) -> None:
    path = tmp_path / "owned"
    written(path, b"x", mode=0o2751, owner="nobody:daemon")
    found = path.stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (65534, 1, 0o2751)


def test_write_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(agent.Refused, match=r"the owner no-such-user:root: .*no-such-user"):
        written(tmp_path / "x", b"x", owner="no-such-user:root")
    with pytest.raises(agent.Refused, match="no-such-group"):
        written(tmp_path / "x", b"x", owner="root:no-such-group")
    with pytest.raises(IsADirectoryError):
        written(tmp_path, b"x")
    with pytest.raises(FileExistsError):
        written(tmp_path / "x" / "y", b"x")


@pytest.fixture
def accounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Writes /etc/passwd, /etc/group and /etc/gshadow of the test's own; what both groups' files hold then."""
    files = {name: tmp_path / name for name in ("passwd", "group", "gshadow")}
    for constant, name in (("USERS", "passwd"), ("GROUPS", "group"), ("SHADOWED_GROUPS", "gshadow")):
        monkeypatch.setattr(agent, constant, str(files[name]))
    files["passwd"].write_text("root:x:0:0::/:/bin/sh\nwww-data:x:33:33::/:/bin/sh\n")
    monkeypatch.setattr(agent, "ACCOUNTS_LOCK", str(tmp_path / ".pwd.lock"))
    monkeypatch.setattr(agent, "NAME_CACHES", ((str(tmp_path / "none"), ["false"]),))

    def joined(user: str, group: str, groups: str, shadowed: str | None = None) -> list[str]:
        files["group"].write_text(groups)
        if shadowed is not None:
            files["gshadow"].write_text(shadowed)
        before = files["group"].stat()
        agent.join(user, group)
        after = files["group"].stat()
        assert (before.st_ino, before.st_mode) == (after.st_ino, after.st_mode)
        return [file.read_text() for name, file in files.items() if name != "passwd" and file.exists()]

    return joined


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("shadow:x:42:", "shadow:x:42:www-data"),
        ("shadow:x:42:\n", "shadow:x:42:www-data\n"),
        ("a:x:1:\nshadow:x:42:ann,bob\nz:x:2:\n", "a:x:1:\nshadow:x:42:ann,bob,www-data\nz:x:2:\n"),
        ("shadow:x:42:www-data\n", "shadow:x:42:www-data\n"),
        ("shadow:x:42:ann,www-data,bob\n", "shadow:x:42:ann,www-data,bob\n"),
        ("shadow:x:42:www-data2\n", "shadow:x:42:www-data2,www-data\n"),
        ("shadowy:x:41:\nshadow:x:42:\n", "shadowy:x:41:\nshadow:x:42:www-data\n"),
    ],
)
def test_a_user_joins_a_group(accounts: Callable[..., list[str]], before: str, after: str) -> None:
    assert accounts("www-data", "shadow", before) == [after]
    shadowed = before.replace(":x:42:", ":*::")
    assert accounts("www-data", "shadow", before, shadowed) == [after, after.replace(":x:42:", ":*::")]


def test_a_group_that_only_its_shadow_lacks_is_joined(accounts: Callable[..., list[str]]) -> None:
    assert accounts("www-data", "shadow", "shadow:x:42:\n", "other:*::\n") == ["shadow:x:42:www-data\n", "other:*::\n"]


@pytest.mark.parametrize(
    ("user", "group", "words"),
    [
        ("www", "shadow", "passwd has no user 'www'"),
        ("www-data", "shad", "group has no group 'shad'"),
        ("www-data", "", "group has no group ''"),
    ],
)
def test_who_cannot_join_is_told(accounts: Callable[..., list[str]], user: str, group: str, words: str) -> None:
    with pytest.raises(agent.Refused, match=words):
        accounts(user, group, "shadow:x:42:\n")


def test_a_name_cache_is_told_to_forget(
    accounts: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "told"
    caches = [(str(tmp_path / "none"), ["false"]), (str(tmp_path), ["touch", str(told)])]
    monkeypatch.setattr(agent, "NAME_CACHES", caches)
    accounts("www-data", "shadow", "shadow:x:42:\n")
    assert told.exists()
    monkeypatch.setattr(agent, "NAME_CACHES", [(str(tmp_path), ["false"])])
    with pytest.raises(agent.Refused, match="false does not forget what it knew of shadow"):
        accounts("www-data", "shadow", "shadow:x:42:\n")


def test_who_changes_groups_at_this_moment_is_not_disturbed(accounts: Callable[..., list[str]], tmp_path: Path) -> None:
    holds = (
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holds, str(tmp_path / ".pwd.lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(agent.Refused, match="another program changes users or groups at this moment"):
            accounts("www-data", "shadow", "shadow:x:42:\n")
    assert accounts("www-data", "shadow", "shadow:x:42:\n") == ["shadow:x:42:www-data\n"]


def test_the_kernels_features_are_one_text(tmp_path: Path) -> None:
    for path, words in {"caps/mask": "chown kill\n", "policy/versions/v5": "yes\n", "domain/empty": ""}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(words)
    assert agent.apparmor_features(str(tmp_path)) == (
        "caps {mask {chown kill\n}\n\n}\ndomain {empty {\n}\n\n}\npolicy {versions {v5 {yes\n}\n\n}\n\n}\n"
    )


def test_a_domain_of_which_nothing_can_be_learned_is_taken_for_permissive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What SELinux answers a test in a guest knows; here there is none, or it answers otherwise."""
    rested: list[str] = []
    monkeypatch.setattr(agent, "at_rest", rested.append)
    monkeypatch.setattr(agent, "pids", lambda _: [1, 2] if rested else [])
    monkeypatch.setattr(agent, "text_if_any", lambda path: "" if "/1/" in path else "u:r:httpd_t:s0")
    monkeypatch.setattr(agent, "ACCESS", str(tmp_path / "access"))
    monkeypatch.setattr(agent, "PROCESS_CLASS", str(tmp_path / "index"))
    assert agent.permissive("nginx.service") is True
    (tmp_path / "index").write_text("2")
    (tmp_path / "access").write_text("x" * 30)
    with pytest.raises(agent.Refused, match="for u:r:httpd_t:s0; expected six numbers"):
        agent.permissive("nginx.service")
    monkeypatch.setattr(agent, "text_if_any", lambda _: "")
    assert agent.permissive("nginx.service") is False, "all have ended"
    assert rested == ["nginx.service"] * 3


class Restorecon:
    """Stands for libselinux: keeps what it is told, and refuses a path."""

    def __init__(self, refused: bytes = b"") -> None:
        self.opened = 0
        self.given: list[tuple[bytes, int]] = []
        self.refused = refused
        self.selabel_open = self._open
        self.selinux_restorecon_set_sehandle = self._set

    def _open(self, *_: Any) -> int:
        self.opened += 1
        return self.opened

    def _set(self, _: Any) -> None:
        pass

    _open.restype = _set.argtypes = None  # type: ignore[attr-defined]

    def selinux_restorecon(self, path: bytes, flags: int) -> int:
        """See restorecon(3)."""
        self.given.append((path, flags))
        return -1 if path == self.refused else 0


@pytest.fixture
def labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Restorecon], agent._Labels]:
    """A machine with SELinux, whose labels are in a folder of the test's own."""
    files = tmp_path / "selinux/default/contexts/files"
    files.mkdir(parents=True)
    (files / "file_contexts").write_text("/srv(/.*)?  x\n")
    (tmp_path / "selinux/config").write_text("")
    monkeypatch.setattr(agent, "ENFORCE", str(tmp_path))
    monkeypatch.setattr(agent._Labels, "READ_FROM", str(tmp_path / "selinux"))

    def made(library: Restorecon) -> agent._Labels:
        found = agent._Labels()
        found._library = library
        monkeypatch.setattr(agent, "_labels", found)
        return found

    return made


def test_labels_are_given_by_the_library_and_read_in_once(
    labels: Callable[[Restorecon], agent._Labels], tmp_path: Path
) -> None:
    labels(library := Restorecon())
    agent.relabel([])
    assert (library.opened, library.given) == (1, [])
    agent.relabel(["/srv/www", "/srv/a b"])
    agent.relabel(["/srv/é"])
    assert [path for path, _ in library.given] == [b"/srv/www", b"/srv/a b", "/srv/é".encode()]
    assert {flags for _, flags in library.given} == {0x4D}
    assert library.opened == 1
    (tmp_path / "selinux/default/contexts/files/file_contexts.local").write_text("/opt  y\n")
    agent.relabel(["/opt"])
    assert library.opened == 2, "a policy that has changed is read in anew"


def test_what_the_library_may_not_label_the_program_labels(
    labels: Callable[[Restorecon], agent._Labels], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def run(argv: list[str]) -> dict[str, Any]:
        asked.append(argv)
        return {"exit_code": len(asked) - 1, "err": base64.b64encode(b"not permitted\n").decode()}

    monkeypatch.setattr(agent, "run", run)
    labels(Restorecon(refused=b"/b"))
    agent.relabel(["/a", "/b"])
    assert asked == [["restorecon", "-RF", "--", "/a", "/b"]]
    with pytest.raises(agent.Refused, match="restorecon: not permitted"):
        agent.relabel(["/b"])


def test_without_the_library_the_program_labels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(agent, "ENFORCE", str(tmp_path))
    monkeypatch.setattr(agent, "_labels", agent._Labels())
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())  # an old one, that has no such functions

    def run(argv: list[str]) -> dict[str, Any]:
        asked.append(argv)
        return {"exit_code": 0, "err": ""}

    monkeypatch.setattr(agent, "run", run)
    agent.relabel([])
    assert asked == []
    agent.relabel(["/a"])
    assert asked == [["restorecon", "-RF", "--", "/a"]]


def test_plant_appends_to_a_file_that_is_there(tmp_path: Path) -> None:
    path = tmp_path / "shadow"
    path.write_text("root:*:\n")
    path.chmod(0o640)
    before = path.stat()
    assert agent.plant(str(path), f"lsmlab-é-{MARK}:!::") is True
    assert path.read_text("utf-8") == f"root:*:\nlsmlab-é-{MARK}:!::\n"
    assert (path.stat().st_ino, path.stat().st_mode) == (before.st_ino, before.st_mode)
    (tmp_path / "link").symlink_to("shadow")
    assert agent.plant(str(tmp_path / "link"), "by a link") is True
    assert path.read_text("utf-8").endswith("\nby a link\n")
    assert (tmp_path / "link").is_symlink()


def test_plant_makes_nothing_and_waits_for_nothing(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "disk").symlink_to("/dev/null")
    before = sorted(tmp_path.iterdir())
    for name in ("absent", "absent/below", "dangling", "loop", "folder", "pipe", "disk"):
        assert agent.plant(str(tmp_path / name), "word") is False, name
    assert sorted(tmp_path.iterdir()) == before
    assert agent.plant("/proc/version", "word") is False  # regular, and cannot be written
    assert agent.plant("/proc/sys/kernel/ostype", "word") is False


# Objects


def test_an_absent_object(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("")
    for name in ("absent", "absent/below", "dangling", "loop", "loop/below", "file/below"):
        found = agent.look_at(str(tmp_path / name))
        assert (found["exists"], found["chain"], found["path"]) == (False, [], str(tmp_path / name)), name


def test_an_object_that_cannot_be_looked_at_is_not_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> os.stat_result:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "lstat", refuse)
    with pytest.raises(PermissionError):
        agent.look_at("/etc/passwd")


@pytest.mark.parametrize("name", ["plain", "two  words", "a\nb", "é 🐧", "back\\slash", "-", "tab\t", " - "])
def test_an_object_with_every_component_of_its_real_path(tmp_path: Path, name: str) -> None:
    real = tmp_path / name / name
    real.parent.mkdir()
    real.write_text("")
    real.chmod(0o4711)
    (tmp_path / "link-to-folder").symlink_to(name)
    found = json.loads(json.dumps(agent.look_at(f"{tmp_path}/link-to-folder/{name}")))
    assert (found["exists"], found["real"], found["read_only"]) == (True, str(real), False)
    assert [entry["path"] for entry in found["chain"]] == [str(p) for p in (*reversed(real.parents), real)]
    said = subprocess.run(
        ["stat", "--printf", "%f %u %g %D %i %U %G", "--", real], capture_output=True, text=True, check=True
    ).stdout.split()
    last = found["chain"][-1]
    assert [f"{last['mode']:x}", *(str(last[key]) for key in ("uid", "gid", "dev", "ino", "user", "group"))] == said
    assert found["label"] == ""
    device = subprocess.run(
        ["findmnt", "-no", "SOURCE", "-T", real], capture_output=True, text=True, check=False
    ).stdout.strip()
    if device:
        assert found["device"] == device.rpartition("/dev/")[2]


def acl(*entries: tuple[int, int, int]) -> bytes:
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def test_the_acl_of_an_object(tmp_path: Path) -> None:
    path = tmp_path / "object"
    path.write_text("")
    nobody = 0xFFFFFFFF
    entries = acl(
        (1, 6, nobody), (2, 4, 1000), (2, 5, 65534), (4, 4, nobody), (8, 7, 42), (16, 6, nobody), (32, 0, nobody)
    )
    try:
        os.setxattr(path, "system.posix_acl_access", entries)
    except OSError as error:
        pytest.skip(f"no ACL can be set here: {error.strerror}")
    *ancestors, last = agent.look_at(str(path))["chain"]
    assert last["acl"] == [
        "user::rw-", "user:1000:r--", "user:65534:r-x", "group::r--", "group:42:rwx", "mask::rw-", "other::---",
    ]  # fmt: skip
    assert [entry["acl"] for entry in ancestors] == [[]] * len(ancestors)


def test_an_acl_that_cannot_be_read_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for code, known in ((errno.ENODATA, True), (errno.ENOTSUP, True), (errno.EACCES, False), (errno.EIO, False)):

        def refuse(path: str, name: str, code: int = code) -> bytes:
            raise OSError(code, os.strerror(code), path)

        monkeypatch.setattr(os, "getxattr", refuse)
        with contextlib.nullcontext() if known else pytest.raises(OSError, match=os.strerror(code)):
            assert agent._acl("/etc") == []


MOUNTS = r"""22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard
31 22 0:27 / /a\040b\012 ro,nosuid - tmpfs tmp\040fs rw
32 22 0:28 / /ro\134 rw - squashfs /dev/mapper/ro ro,errors=continue
33 22 254:1 / /over rw master:2 propagate_from:1 - ext4 /dev/vdb1 rw
34 22 0:29 / /none rw - tmpfs  rw"""


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        ("22", (False, "vda")),
        ("31", (True, "tmp\\040fs")),
        ("32", (True, "mapper/ro")),
        ("33", (False, "vdb1")),
        ("34", (False, "")),
        ("3", None),
        ("99", None),
    ],
)
def test_the_mount_of_an_object_is_the_kernels_own(
    monkeypatch: pytest.MonkeyPatch, number: str, expected: tuple[bool, str] | None
) -> None:
    def read(path: str) -> str:
        return MOUNTS if path.endswith("/mountinfo") else f"pos:\t0\nflags:\t012100000\nmnt_id:\t{number}\nino:\t1"

    monkeypatch.setattr(agent, "text_of", read)
    if expected is None:
        with pytest.raises(agent.Refused, match=f"its mount {number} is not in"):
            agent._mount_of("/")
    else:
        assert agent._mount_of("/") == expected


@as_root
def test_a_read_only_mount_and_one_hidden_below_another(tmp_path: Path) -> None:
    script = f"""
set -e
mount -t tmpfs -o mode=755 upper "$1"
mkdir "$1/deep é"; echo x > "$1/deep é/f"
mount --bind "$1/deep é" "$1/deep é"; mount -o remount,ro,bind "$1/deep é"
{shlex.quote(sys.executable)} -c "$2" "$1/deep é/f"
mount -t tmpfs -o mode=755 hider "$1"; mkdir "$1/deep é"; echo x > "$1/deep é/f"
{shlex.quote(sys.executable)} -c "$2" "$1/deep é/f"
"""
    look = (
        f"import json, sys; sys.path[:0] = [{str(SOURCE.parent)!r}]; import agent; "
        "found = agent.look_at(sys.argv[1]); print(json.dumps([found['read_only'], found['device']]))"
    )
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", tmp_path, look], capture_output=True, text=True, check=False
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    assert [json.loads(line) for line in done.stdout.splitlines()] == [[True, "upper"], [False, "hider"]], done.stderr


# The log


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "audit.log"
    path.write_bytes(b"before the window\n")
    monkeypatch.setattr(agent, "LOG", str(path))
    agent._log.on(str(path))  # what stays open is open
    return path


def append(path: Path, *parts: bytes, pause: float = 0.0) -> None:
    with path.open("ab", buffering=0) as file:
        for part in parts:
            time.sleep(pause)
            file.write(part)


def test_the_log_is_read_from_the_offset_to_the_word(log: Path) -> None:
    append(log, b"one\n", b"msg='%s'\n" % MARK.encode())
    found, seen = agent.read_log(18, MARK, 20, 1 << 20)
    assert (found, seen) == (f"one\nmsg='{MARK}'\n".encode(), True)


def test_a_word_that_comes_later_and_in_pieces_is_waited_for(log: Path) -> None:
    word = MARK.encode()
    pieces = [b"a record\n", b"msg='" + word[:1], word[1:15], word[15:] + b"'\n"]
    writer = threading.Thread(target=append, args=(log, *pieces), kwargs={"pause": 0.05})
    before = descriptors()
    start, used = time.monotonic(), time.process_time()
    writer.start()
    found, seen = agent.read_log(18, MARK, 20, 1 << 20)
    assert (seen, word in found) == (True, True)
    assert 0.15 <= time.monotonic() - start < 10
    assert time.process_time() - used < 0.5, "it spins"
    writer.join()
    assert descriptors() == before


def test_a_word_across_two_reads_is_found(log: Path) -> None:
    size = 1 << 20
    for cut in (0, 1, 8, 15, 16):
        log.write_bytes(b"x" * (size - cut) + MARK.encode() + b"\n")
        found, seen = agent.read_log(0, MARK, 5, 8 << 20)
        assert (seen, found[-40:].rstrip()[-16:], found.count(b"x")) == (True, MARK.encode(), size - cut)


def test_a_word_that_does_not_come_costs_the_time_and_no_more(log: Path) -> None:
    append(log, MARK[:15].encode())
    start = time.monotonic()
    found, seen = agent.read_log(18, MARK, 0.5, 1 << 20)
    assert (found, seen) == (MARK[:15].encode(), False)
    assert 0.5 <= time.monotonic() - start < 5


def test_a_flood_is_read_to_the_limit_only(log: Path) -> None:
    log.write_bytes(b"y" * 3_000_000 + MARK.encode())
    start = time.monotonic()
    found, seen = agent.read_log(0, MARK, 20, 2_000_000)
    assert (len(found), seen) == (2_000_000, False)
    assert time.monotonic() - start < 5
    assert agent.read_log(0, MARK, 20, 3_000_016)[1] is True


def test_a_rotated_log_is_not_waited_for(log: Path) -> None:
    def rotate() -> None:
        time.sleep(0.2)
        append(log, b"last of the old\n")
        log.rename(log.with_suffix(".1"))
        append(log, MARK.encode())

    rotation = threading.Thread(target=rotate)
    start = time.monotonic()
    rotation.start()
    found, seen = agent.read_log(18, MARK, 20, 1 << 20)
    assert (found, seen) == (b"last of the old\n", False)
    assert time.monotonic() - start < 5
    rotation.join()


def test_a_log_that_was_rotated_before_is_read_as_any_other(log: Path) -> None:
    agent.read_log(0, MARK, 0, 1)  # watched from here on
    for number in range(3):
        log.rename(log.with_suffix(f".{number}"))
        append(log, b"new\n")
        writer = threading.Thread(target=append, args=(log, MARK.encode()), kwargs={"pause": 0.2})
        writer.start()
        assert agent.read_log(0, MARK, 20, 1 << 20) == (f"new\n{MARK}".encode(), True)
        writer.join()


def test_windows_one_after_another_and_at_the_same_time(log: Path) -> None:
    before = descriptors()
    found: list[bool] = []
    threads = [
        threading.Thread(target=lambda n=n: found.append(agent.read_log(18, f"{MARK}{n}", 20, 1 << 20)[1]))
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for number in range(8):
        append(log, f"{MARK}{number}\n".encode(), pause=0.02)
    for thread in threads:
        thread.join(30)
    assert found == [True] * 8
    for number in range(100):
        append(log, f"word {number}\n".encode())
        assert agent.read_log(18, f"word {number}", 20, 1 << 20)[1]
    assert descriptors() == before


def test_a_log_that_another_reads_is_waited_for_in_time(log: Path) -> None:
    with agent._log.in_use:
        start = time.monotonic()
        assert agent.read_log(0, "before", 0.3, 100) == (b"", False)
        assert 0.3 <= time.monotonic() - start < 3
    assert agent.read_log(0, "before", 0.3, 100) == (b"before the window\n", True)


def test_a_log_that_is_not_there_is_told(log: Path) -> None:
    log.unlink()
    before = descriptors()
    with pytest.raises(agent.Refused, match=r"audit\.log cannot be watched: No such file"):
        agent.read_log(0, MARK, 1, 100)
    assert descriptors() == before


# Auditing


class Link:
    """An audit socket: behind each message comes who sent it, which is 0 for the kernel."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link

    def recvfrom(self, size: int) -> tuple[bytes, tuple[int, int]]:
        data = self._link.recv(size)
        return data[:-4], (struct.unpack("=I", data[-4:])[0], 0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link, name)


class Kernel:
    """The kernel's end of an audit socket: `answer` to each message, which is kept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: Message, pause: float = 0) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.opened = 0
        self.pause = pause
        self._answers = answers
        monkeypatch.setattr(agent, "_audit", agent._Audit())
        names = types.SimpleNamespace(socket=self._open, AF_NETLINK=socket.AF_NETLINK, SOCK_RAW=socket.SOCK_RAW)
        monkeypatch.setattr(agent, "socket", names)

    def _open(self, *kind: int) -> Link:
        assert kind == (socket.AF_NETLINK, socket.SOCK_RAW, 9)
        self.opened += 1
        ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        threading.Thread(target=self._serve, args=(theirs,), daemon=True).start()
        return Link(ours)

    def _serve(self, end: socket.socket) -> None:
        with end, contextlib.suppress(OSError):  # who asked may have gone
            while data := end.recv(1 << 16):
                self.asked.append((*struct.unpack_from("=IHHII", data), data[16:]))
                for answer in self._answers:
                    time.sleep(self.pause)
                    end.send(answer(self.asked[-1][3]))


Message = Callable[[int], bytes]


def netlink(kind: int, body: bytes, number: int = 0, sender: int = 0) -> Message:
    """A message, to question `number` or to the one that was just asked; in it stands the port of who asked."""
    return lambda asked: (
        struct.pack("=IHHII", 16 + len(body), kind, 0, number or asked, 4711) + body + struct.pack("=I", sender)
    )


def test_the_state_of_auditing(monkeypatch: pytest.MonkeyPatch, log: Path) -> None:
    kernel = Kernel(monkeypatch, netlink(1000, struct.pack("=12I", 1, 2, 1, 344, 0, 16384, 7, 3, 9, 60000, 0, 0)))
    found = log.stat()
    assert agent.audit_state() == {
        "enabled": 2, "daemon_pid": 344, "lost": 7, "backlog": 3,
        "log": f"{found.st_dev}:{found.st_ino}", "size": 18,
    }  # fmt: skip
    assert kernel.asked == [(16, 1000, 1, 1, 0, b"")]
    log.unlink()
    with pytest.raises(agent.Refused, match=r"audit\.log: No such file or directory"):
        agent.audit_state()


def test_auditing_is_asked_over_one_socket_and_an_answer_to_another_question_is_none(
    monkeypatch: pytest.MonkeyPatch, log: Path
) -> None:
    status = [struct.pack("=8I", 1, 1, 1, 344, 0, 16384, lost, 0) for lost in (3, 4, 5)]
    kernel = Kernel(
        monkeypatch,
        netlink(1000, status[0], sender=4242),  # of a process: any of root's may write to the agent's socket
        netlink(1000, status[1], 77),
        lambda _: b"no message\0\0\0\0",
        netlink(1000, status[2]),
    )
    before = descriptors()
    assert [agent.audit_state()["lost"] for _ in range(20)] == [5] * 20
    assert [asked[3] for asked in kernel.asked] == list(range(1, 21))
    assert (kernel.opened, len(descriptors() - before)) == (1, 2)  # and the kernel's end


def test_auditing_that_does_not_answer_is_told_in_time_and_asked_anew(
    monkeypatch: pytest.MonkeyPatch, log: Path
) -> None:
    monkeypatch.setattr(agent, "AUDIT_SECONDS", 0.3)
    late = [netlink(1000, b"x" * 40, number) for number in range(900, 920)]
    kernel = Kernel(monkeypatch, *late, pause=0.1)
    before = descriptors()
    start = time.monotonic()
    for _ in range(2):
        with pytest.raises(OSError, match="timed out"):
            agent.audit_state()
    assert 0.6 <= time.monotonic() - start < 1.5
    assert kernel.opened == 2, "what was left in the first socket is gone with it"
    wait_until(lambda: descriptors() <= before)


def test_auditing_is_asked_by_one_at_a_time(monkeypatch: pytest.MonkeyPatch, log: Path) -> None:
    Kernel(monkeypatch, netlink(1000, struct.pack("=8I", 1, 1, 1, 344, 0, 16384, 0, 0)))
    found: list[int] = []

    def ask() -> None:
        found.extend(agent.audit_state()["daemon_pid"] for _ in range(50))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [344] * 200
    monkeypatch.setattr(agent, "AUDIT_SECONDS", 0.1)
    with agent._audit._in_use, pytest.raises(agent.Refused, match=r"not answered another question for 0\.1 s"):
        agent.audit_state()


def test_the_sentinel_is_a_record_that_the_kernel_confirms(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch, netlink(2, struct.pack("=iIHHII", 0, 16, 1005, 5, 1, 0)))
    agent.sentinel(MARK)
    assert kernel.asked == [(33, 1005, 5, 1, 0, MARK.encode() + b"\0")]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (netlink(2, struct.pack("=i", -errno.EPERM)), "Operation not permitted"),
        (netlink(2, struct.pack("=i", -errno.ECONNREFUSED)), "Connection refused"),
        (netlink(1300, b""), "answers with message type 1300"),
    ],
)
def test_a_kernel_that_refuses_to_audit_is_told(monkeypatch: pytest.MonkeyPatch, answer: Message, words: str) -> None:
    Kernel(monkeypatch, answer)
    for ask in (lambda: agent.sentinel(MARK), agent.audit_state):
        with pytest.raises(agent.Refused, match=words):
            ask()


def test_a_short_audit_status_is_an_error(monkeypatch: pytest.MonkeyPatch, log: Path) -> None:
    Kernel(monkeypatch, netlink(1000, b"\1\0\0\0"))
    with pytest.raises(struct.error):
        agent.audit_state()


# Frameworks


@pytest.fixture
def frameworks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the three files that say the mode; none is there yet."""
    for name in ("LSM", "ENFORCE", "PROFILES", "APPARMOR_MODE"):
        monkeypatch.setattr(agent, name, str(tmp_path / name.lower()))
    return tmp_path


def test_the_mode_is_what_the_kernel_says(frameworks: Path) -> None:
    (frameworks / "lsm").write_text("lockdown,capability,yama")
    nothing = {"selinux_enforcing": None, "profiles": None, "apparmor_mode": None}
    assert agent.mode() == {**nothing, "lsm": ["lockdown", "capability", "yama"]}
    (frameworks / "lsm").write_text("capability,selinux\n")
    for word, enforcing in (("0", False), ("1", True), ("1\n", True)):
        (frameworks / "enforce").write_text(word)
        assert agent.mode() == {**nothing, "lsm": ["capability", "selinux"], "selinux_enforcing": enforcing}
    (frameworks / "lsm").write_text("capability,apparmor")
    (frameworks / "apparmor_mode").write_text("complain\n")
    (frameworks / "profiles").write_text("nginx (enforce)\n/usr/bin/a (b) (c (complain)\n:ns://x//y (unconfined)\n")
    assert agent.mode()["profiles"] == {
        "nginx": "enforce", "/usr/bin/a (b) (c": "complain", ":ns://x//y": "unconfined",
    }  # fmt: skip
    (frameworks / "profiles").write_text("")
    assert (agent.mode()["profiles"], agent.mode()["apparmor_mode"]) == ({}, "complain")


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"lsm": ""},
        {"lsm": "\n"},
        {"lsm": "capability,"},
        {"lsm": "capability,selinux"},
        {"lsm": "capability,selinux", "enforce": ""},
        {"lsm": "capability,selinux", "enforce": "2"},
        {"lsm": "capability,selinux", "enforce": "01"},
        {"lsm": "capability,apparmor"},
        {"lsm": "capability,apparmor", "profiles": "nginx\n"},
        {"lsm": "capability,apparmor", "profiles": "nginx (enforce\n"},
        {"lsm": "capability,apparmor", "profiles": " (enforce)\n"},
        {"lsm": "capability,apparmor", "profiles": "nginx (enforce)\n"},
    ],
    ids=str,
)
def test_a_mode_that_cannot_be_read_is_an_error_and_never_no_framework(frameworks: Path, files: dict[str, str]) -> None:
    for name, words in files.items():
        (frameworks / name).write_text(words)
    with pytest.raises((agent.Refused, FileNotFoundError)):
        agent.mode()


@pytest.mark.parametrize("name", ["lsm", "enforce", "profiles", "apparmor_mode"])
@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.EINVAL, errno.ENOENT, errno.ESRCH])
def test_every_refusal_to_say_the_mode_is_an_error(
    frameworks: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    (frameworks / "lsm").write_text("capability,selinux,apparmor")
    (frameworks / "enforce").write_text("1")
    (frameworks / "profiles").write_text("nginx (enforce)")
    (frameworks / "apparmor_mode").write_text("enforce")
    assert agent.mode()["profiles"]
    read = agent.text_of

    def refuse(path: str) -> str:
        if path.endswith(name):
            raise OSError(code, os.strerror(code), path)
        return read(path)

    monkeypatch.setattr(agent, "text_of", refuse)
    with pytest.raises(OSError, match=os.strerror(code)):
        agent.mode()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EIO, errno.EINVAL, errno.ENOMEM])
def test_what_is_there_and_cannot_be_read_is_an_error(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(path: str) -> str:
        raise OSError(code, os.strerror(code), path)

    monkeypatch.setattr(agent, "text_of", refuse)
    with pytest.raises(OSError, match=os.strerror(code)):
        agent.text_if_any("/proc/1/stat")


# Services


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree of cgroups: name of the group -> its processes, as `group` makes them."""
    monkeypatch.setattr(agent, "CGROUPS", str(tmp_path))
    return tmp_path


def group(root: Path, name: str, *pids: int) -> None:
    (root / name).mkdir(parents=True, exist_ok=True)
    (root / name / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in pids))


def test_the_processes_of_a_unit(cgroups: Path) -> None:
    group(cgroups, "", 1)
    group(cgroups, "other.service", 2)
    group(cgroups, "web.service", 10, 11)
    group(cgroups, "web.service/sub", 12)
    group(cgroups, "web.service/sub/deeper", 13)
    group(cgroups, "web.service/gone")
    (cgroups / "web.service/no-procs").mkdir()
    group(cgroups, "system-web.slice/web@a.service", 20)
    group(cgroups, "system-web.slice/web@b.service/payload", 21)
    group(cgroups, "system-web.slice", 22)
    (cgroups / "loop").symlink_to(".")
    assert sorted(agent.pids("web.service")) == [10, 11, 12, 13]
    assert agent.pids("web@a.service") == [20]
    assert agent.pids("web@b.service") == [21]
    assert agent.pids("web@c.service") == []
    assert agent.pids("absent.service") == []
    group(cgroups, "web@c.service", 30)  # with Slice=system.slice it lies there itself
    assert agent.pids("web@c.service") == [30]


def test_processes_that_cannot_be_listed_are_an_error_and_never_none(
    cgroups: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group(cgroups, "web.service")
    (cgroups / "web.service/cgroup.procs").write_text("nonsense\n")
    with pytest.raises(ValueError, match="nonsense"):
        agent.pids("web.service")

    def refuse(path: str) -> str:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), path)

    with monkeypatch.context() as patch:
        patch.setattr(agent, "text_of", refuse)
        with pytest.raises(OSError, match="not supported"):
            agent.pids("web.service")
    monkeypatch.setattr(agent, "CGROUPS", f"{cgroups}/nowhere")
    for unit in ("web.service", "web@a.service"):
        with pytest.raises(agent.Refused, match="nowhere is not there"):
            agent.pids(unit)


def test_a_group_that_ends_while_it_is_read_has_no_process(cgroups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group(cgroups, "web.service", 10)
    read = agent.text_of

    def vanish(path: str) -> str:
        if "web.service" in path:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), path)
        return read(path)

    monkeypatch.setattr(agent, "text_of", vanish)
    assert agent.pids("web.service") == []


KNOWN = {"active": "active", "sub": "running", "result": "success", "main_pid": os.getpid()}


def test_the_subject_is_its_processes_as_the_kernel_has_them(cgroups: Path) -> None:
    group(cgroups, "web.service", os.getpid())
    with subprocess.Popen(["sleep", "61"]) as child:
        try:
            wait_until(lambda: Path(f"/proc/{child.pid}/comm").read_text() == "sleep\n")
            group(cgroups, "web.service", os.getpid(), child.pid, 0x3FFFFF)
            found = json.loads(json.dumps(agent.subject("web.service", KNOWN)))
        finally:
            child.kill()
    assert found["service"] == KNOWN
    main, worker = found["processes"]
    assert (main["pid"], main["main"], main["exe"]) == (os.getpid(), True, str(Path("/proc/self/exe").readlink()))
    assert (worker["pid"], worker["ppid"], worker["main"], worker["name"]) == (child.pid, os.getpid(), False, "sleep")
    assert worker["uids"] == [*os.getresuid(), os.geteuid()]
    assert worker["gids"] == [*os.getresgid(), os.getegid()]
    assert worker["groups"] == sorted(os.getgroups())
    said = dict(line.split(":\t") for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    for key, name in (("permitted", "CapPrm"), ("effective", "CapEff"), ("bounding", "CapBnd")):
        assert main[f"cap_{key}"] == int(said[name], 16)
    assert (worker["no_new_privs"], worker["seccomp"]) == (said["NoNewPrivs"] == "1", int(said["Seccomp"]))


def test_a_zombie_is_no_process_of_the_subject(cgroups: Path) -> None:
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    group(cgroups, "web.service", os.getpid(), child.pid)
    assert [p["pid"] for p in agent.subject("web.service", KNOWN)["processes"]] == [os.getpid()]
    child.wait()


@pytest.mark.parametrize("what", ["readlink", "status", "current"])
def test_a_process_that_cannot_be_read_is_an_error_and_not_left_out(
    cgroups: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    group(cgroups, "web.service", os.getpid())
    read = agent.text_of

    def refuse(path: str) -> str:
        if path.endswith(what) or what == "readlink" == path:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return read(path)

    if what == "readlink":
        monkeypatch.setattr(os, "readlink", lambda _: refuse("readlink"))
    else:
        monkeypatch.setattr(agent, "text_of", refuse)
    with pytest.raises(PermissionError):
        agent.subject("web.service", KNOWN)


def test_a_status_without_a_line_is_an_error(cgroups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group(cgroups, "web.service", os.getpid())
    read = agent.text_of
    monkeypatch.setattr(agent, "text_of", lambda path: read(path).replace("\nSeccomp:", "\nOther:"))
    with pytest.raises(KeyError, match="Seccomp"):
        agent.subject("web.service", KNOWN)


def test_a_label_is_empty_only_where_no_framework_gives_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for code, known in ((errno.EINVAL, True), (errno.EACCES, False), (errno.ESRCH, False), (errno.ENOENT, False)):

        def refuse(path: str, code: int = code) -> str:
            raise OSError(code, os.strerror(code), path)

        monkeypatch.setattr(agent, "text_of", refuse)
        with contextlib.nullcontext() if known else pytest.raises(OSError, match=os.strerror(code)):
            assert agent._label_of("/proc/1") == ""


def test_the_state_is_asked_anew_once_the_main_process_is_gone(cgroups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def service_of(unit: str) -> dict[str, Any]:
        asked.append(unit)
        return {**KNOWN, "active": "failed", "main_pid": 0}

    monkeypatch.setattr(agent, "service", service_of)
    group(cgroups, "web.service", os.getpid())
    assert agent.subject("web.service", KNOWN)["service"]["active"] == "active"
    assert asked == []
    for known in (None, {**KNOWN, "main_pid": 0}, {**KNOWN, "main_pid": 1}):
        assert agent.subject("web.service", known)["service"]["active"] == "failed"
    assert asked == ["web.service"] * 3


def test_a_service_that_is_being_started_anew_is_waited_for(cgroups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = iter(["deactivating", "activating", "active"])
    monkeypatch.setattr(agent, "service", lambda _: {**KNOWN, "active": next(states), "main_pid": os.getpid()})
    group(cgroups, "web.service", os.getpid())
    found = agent.subject("web.service", {**KNOWN, "main_pid": 1})
    assert found["service"]["active"] == "active"
    assert [p["main"] for p in found["processes"]] == [True]


def test_a_service_that_never_gets_there_is_as_it_is(cgroups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "ON_ITS_WAY_SECONDS", 0.1)
    monkeypatch.setattr(agent, "service", lambda _: {**KNOWN, "active": "activating", "main_pid": 0})
    group(cgroups, "web.service", os.getpid())
    assert agent.subject("web.service")["service"]["active"] == "activating"


NGINX = {"ActiveState": "active", "SubState": "running", "Result": "success", "MainPID": 481}


def reply(number: int, value: str | int, *, fault: str = "", kind: int = 2, order: bytes = b"l") -> bytes:
    """An answer of systemd's, as it was seen on its socket: a sender is named, and the reply's number comes first."""
    if isinstance(value, int):
        body = b"\x01u\x00\x00" + struct.pack("<I", value)
    else:
        text = struct.pack("<I", len(value)) + value.encode() + b"\0"
        body = text if fault else b"\x01s\x00\x00" + text
    head = b"\x05\x01u\x00" + struct.pack("<I", number)
    if fault:
        head += b"\x04\x01s\x00" + struct.pack("<I", len(fault)) + fault.encode() + b"\0"
        head += b"\0" * (-len(head) % 8)
    head += b"\x08\x01g\x00" + (b"\x01s\x00" if fault else b"\x01v\x00")
    start = struct.pack("<cBBBIII", order, 3 if fault else kind, 1, 1, len(body), number + 100, len(head))
    return start + head + b"\0" * (-len(head) % 8) + body


class Systemd:
    """What listens at systemd's own socket: says who may talk, then one answer for each question."""

    def __init__(self, place: Path) -> None:
        self.asked: list[bytes] = []
        self.starts: list[bytes] = []
        self.greeting = b"OK 0123456789abcdef0123456789abcdef\r\n"
        self.answer: Callable[[int, bytes], bytes] = self.of_nginx
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(place))
        self._server.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    @staticmethod
    def of_nginx(number: int, question: bytes) -> bytes:
        (name,) = (name for name in NGINX if name.encode() + b"\0" in question)
        return reply(number, NGINX[name])  # type: ignore[arg-type]

    def _serve(self) -> None:
        while True:
            link = self._server.accept()[0]
            with link, link.makefile("rb") as stream:
                self.asked.append(stream.readline() + stream.readline())
                link.sendall(self.greeting)
                while len(start := stream.read(16)) == 16:
                    size, number, length = struct.unpack("<4xIII", start)
                    self.starts.append(start)
                    question = stream.read(length + -length % 8 + size)
                    self.asked.append(question)
                    with contextlib.suppress(OSError):
                        link.sendall(self.answer(number, question))


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Systemd:
    monkeypatch.setattr(agent, "SYSTEMD", str(tmp_path / "private"))
    monkeypatch.setattr(agent, "SYSTEMD_SECONDS", 5)
    return Systemd(tmp_path / "private")


def test_what_systemd_says(systemd: Systemd) -> None:
    assert agent.service("nginx@1.service") == {
        "active": "active", "sub": "running", "result": "success", "main_pid": 481,
    }  # fmt: skip
    greeting, *questions = systemd.asked
    assert greeting == b"\0AUTH EXTERNAL " + str(os.geteuid()).encode().hex().encode() + b"\r\nBEGIN\r\n"
    assert len(questions) == 4
    for question in questions:
        assert b"/org/freedesktop/systemd1/unit/nginx_401_2eservice\0" in question
        assert b"org.freedesktop.DBus.Properties\0" in question


def test_a_question_to_systemd_byte_for_byte(systemd: Systemd) -> None:
    """As libsystemd takes it: a field of the header begins at a multiple of 8, a text of the body at one of 4."""
    agent.service("nginx.service")
    assert systemd.asked[1] == (
        b"\x01\x01o\x00\x2e\x00\x00\x00/org/freedesktop/systemd1/unit/nginx_2eservice\x00\x00"
        b"\x02\x01s\x00\x1f\x00\x00\x00org.freedesktop.DBus.Properties\x00"
        b"\x03\x01s\x00\x03\x00\x00\x00Get\x00\x00\x00\x00\x00"
        b"\x08\x01g\x00\x02ss\x00"
        b"\x1d\x00\x00\x00org.freedesktop.systemd1.Unit\x00\x00\x00"
        b"\x0b\x00\x00\x00ActiveState\x00"
    )
    assert systemd.starts[0] == b"l\x01\x00\x01\x34\x00\x00\x00\x01\x00\x00\x00\x78\x00\x00\x00"


def test_a_group_of_units_has_no_main_process(systemd: Systemd) -> None:
    assert agent.service("9.slice") == {"active": "active", "sub": "running", "result": "success", "main_pid": 0}
    assert len(systemd.asked) == 3
    assert b"/unit/_39_2eslice\0" in systemd.asked[1]


def test_what_systemd_tells_besides_is_let_alone(systemd: Systemd) -> None:
    """Signals come to whoever listens at its socket."""
    systemd.answer = lambda number, question: (
        reply(0, "/org/freedesktop/systemd1/job/7", kind=4) + systemd.of_nginx(number, question)
    )
    assert agent.service("nginx.service")["main_pid"] == 481


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (reply(1, "Access denied", fault="org.freedesktop.DBus.Error.AccessDenied"), "AccessDenied: Access denied"),
        (reply(1, "x", order=b"B"), "expected a message of D-Bus"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "expected a message of D-Bus"),
        (reply(1, "active").replace(b"\x01s\x00\x00", b"\x01x\x00\x00"), "nonsense: a value of type 'x'"),
        (reply(1, "active").replace(b"active", b"\xff\xfe\xfd\xfc\xfb\xfa"), "nonsense: "),
        (reply(1, "active").replace(b"\x06\x00\x00\x00active", b"\xff\xff\x00\x00active"), "nonsense: "),
        (reply(1, "active")[:30], "does not answer within"),
        (b"", "does not answer within"),
    ],
    ids=str,
)
def test_an_answer_of_systemds_that_is_none(
    systemd: Systemd, monkeypatch: pytest.MonkeyPatch, answer: bytes, words: str
) -> None:
    monkeypatch.setattr(agent, "SYSTEMD_SECONDS", 0.5)
    systemd.answer = lambda number, _: answer if number == 1 else b""
    with pytest.raises(agent.Refused, match=words):
        agent.service("nginx.service")


def test_who_may_not_talk_to_systemd_is_told(systemd: Systemd) -> None:
    systemd.greeting = b"REJECTED EXTERNAL\r\n"
    with pytest.raises(agent.Refused, match="does not talk to the agent: b'REJECTED"):
        agent.service("nginx.service")


def test_without_systemd_nothing_is_known_of_a_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "SYSTEMD", str(tmp_path / "none"))
    with pytest.raises(agent.Refused, match="none: No such file or directory"):
        agent.service("nginx.service")


JOB = "/org/freedesktop/systemd1/job/414"


def accepted(job: str = JOB) -> bytes:
    """systemd's answer to StartUnit, which names the job."""
    return plain(2, b"\x05\x01u\x00\x01\x00\x00\x00\x08\x01g\x00\x01o\x00", text_of_bus(job))


def removed(result: str, job: str = JOB) -> bytes:
    """The signal that a job is over."""
    body = struct.pack("<I", 414)
    for text in (job, "nginx.service", result):
        body += b"\0" * (-len(body) % 4) + text_of_bus(text)
    head = b"\x01\x01o\x00" + text_of_bus("/org/freedesktop/systemd1")
    head += b"\0" * (-len(head) % 8) + b"\x03\x01s\x00" + text_of_bus("JobRemoved")
    return plain(4, head + b"\0" * (-len(head) % 8) + b"\x08\x01g\x00\x04uoss\x00", body)


def text_of_bus(text: str) -> bytes:
    return struct.pack("<I", len(text)) + text.encode() + b"\0"


def plain(kind: int, head: bytes, body: bytes) -> bytes:
    start = struct.pack("<cBBBIII", b"l", kind, 1, 1, len(body), 9, len(head))
    return start + head + b"\0" * (-len(head) % 8) + body


@pytest.mark.parametrize(
    ("answers", "found"),
    [
        ((accepted(), removed("done")), ""),
        ((removed("done"), accepted()), ""),  # a job that is done at once
        ((accepted(), removed("skipped")), ""),  # a condition of the unit does not hold: systemctl's 0 as well
        ((accepted(), removed("failed")), "systemd's job ended: failed"),
        ((accepted(), removed("dependency")), "systemd's job ended: dependency"),
        ((accepted(), removed("done", f"{JOB}5"), removed("timeout")), "systemd's job ended: timeout"),
        ((removed("failed", "/another"), accepted(), reply(0, "x", kind=4), removed("done")), ""),
        ((reply(1, "Unit x not found.", fault="a.NoSuchUnit"),), "a.NoSuchUnit: Unit x not found."),
    ],
)
def test_a_unit_is_started(systemd: Systemd, answers: tuple[bytes, ...], found: str) -> None:
    systemd.answer = lambda *_: b"".join(answers)
    assert agent.start_unit("nginx.service", 20) == found
    _, question = systemd.asked
    assert b"\x03\x01s\x00\x09\x00\x00\x00StartUnit\0" in question
    assert question.endswith(b"\x0d\0\0\0nginx.service\0\0\0\x07\0\0\0replace\0")


@pytest.mark.parametrize("answers", [b"", accepted(), removed("done"), accepted() + removed("done", "/another")])
def test_a_start_that_does_not_end_is_none(systemd: Systemd, answers: bytes) -> None:
    systemd.answer = lambda *_: answers
    with pytest.raises(agent.Refused, match=r"nginx\.service is not started within 0\.3 s"):
        agent.start_unit("nginx.service", 0.3)


def of(monkeypatch: pytest.MonkeyPatch, *pids: int) -> None:
    monkeypatch.setattr(agent, "pids", lambda _: list(pids))


def test_a_sleeping_service_is_at_rest_and_a_busy_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        subprocess.Popen(["sleep", "61"]) as asleep,
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy,
    ):
        try:
            of(monkeypatch, asleep.pid)
            assert agent.at_rest("x", 10) is True
            of(monkeypatch, asleep.pid, busy.pid)
            start = time.monotonic()
            assert agent.at_rest("x", 0.5) is False
            assert 0.5 <= time.monotonic() - start < 5
            busy.send_signal(signal.SIGSTOP)  # stopped is not asleep
            assert agent.at_rest("x", 0.3) is False
            of(monkeypatch)
            assert agent.at_rest("x", 10) is True
        finally:
            asleep.kill()
            busy.kill()


def test_a_service_that_changes_comes_to_rest_later(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(["sleep", "61"]) as one, subprocess.Popen(["sleep", "61"]) as two:
        try:
            readings = iter([[one.pid], [one.pid, 0x3FFFFF], [one.pid, two.pid], [two.pid], [two.pid], [two.pid]])
            monkeypatch.setattr(agent, "pids", lambda _: next(readings))
            assert agent.at_rest("x", 10) is True
            assert len(list(readings)) <= 1  # it has seen the same twice
        finally:
            one.kill()
            two.kill()


# A visitor


Answering = Callable[[socket.socket, bytes], None]


class Server:
    """A server of one answer at a time: `answering` gets the connection and the request's head."""

    def __init__(self, answering: Answering) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.requests: list[bytes] = []
        self._answering = answering
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                link, _ = self._listener.accept()
                with link, contextlib.suppress(OSError):
                    head = b""
                    while b"\r\n\r\n" not in head and (part := link.recv(1 << 16)):
                        head += part
                    self.requests.append(head)
                    self._answering(link, head)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


Serving = Callable[[Answering | bytes], Server]


@pytest.fixture
def serving() -> Iterator[Serving]:
    servers: list[Server] = []

    def start(answer: Answering | bytes) -> Server:
        servers.append(Server(answer if callable(answer) else lambda link, _: link.sendall(answer)))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def ok(body: bytes, *, status: str = "200 OK", more: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\n{more}Content-Length: {len(body)}\r\n\r\n".encode() + body


def dripping(*, before: bytes, pause: float = 0.1) -> Answering:
    def drip(link: socket.socket, _: bytes) -> None:
        link.sendall(before)
        while True:
            link.sendall(b"x")
            time.sleep(pause)

    return drip


@pytest.mark.parametrize("status", ["200 OK", "403 Forbidden", "500 Oops", "299"])
def test_a_visit_gives_status_and_body(serving: Serving, status: str) -> None:
    server = serving(ok(EVERY_BYTE * 1000, status=status))
    before = descriptors()
    done = agent.visit("GET", server.port, "/", 20)
    assert (done["status"], raw(done["out"])) == (int(status[:3]), EVERY_BYTE * 1000)
    assert text(done, "head") == f"HTTP/1.1 {status}\r\nContent-Length: 256000\r\n\r\n"
    assert (done["err"], done["timed_out"], done["too_much"], done["cut_short"]) == ("", False, False, False)
    wait_until(lambda: descriptors() <= before)  # the server's own end as well


@pytest.mark.parametrize(
    "path",
    ["/", "/static../etc/shadow", "/../..//a", "//a//b", "/%2e%2E/%00", "/a?b=c&d=/../#e", "/é/🐧", "/%", "/\\..\\",
     "/a\x01\x7f", "/" + "a" * 20_000],
    ids=range(11),
)  # fmt: skip
def test_a_path_is_sent_as_it_is_written(serving: Serving, path: str) -> None:
    server = serving(ok(b"fine"))
    assert agent.visit("GET", server.port, path, 20)["status"] == 200
    line, *headers = server.requests[0].split(b"\r\n")
    assert line == f"GET {path} HTTP/1.1".encode()
    assert headers == [
        f"Host: 127.0.0.1:{server.port}".encode(), b"User-Agent: lsmlab", b"Connection: close", b"", b"",
    ]  # fmt: skip


def test_a_visit_carries_a_body(serving: Serving) -> None:
    def answering(link: socket.socket, head: bytes) -> None:
        body = head.partition(b"\r\n\r\n")[2]
        while len(body) < 5:
            body += link.recv(100)
        link.sendall(ok(body))

    server = serving(answering)
    done = agent.visit("PUT", server.port, "/x", 20, "h\u00e9llo"[:4])
    assert (done["status"], raw(done["out"])) == (200, "h\u00e9ll".encode())
    assert b"\r\nContent-Length: 5\r\n" in server.requests[0]


@pytest.mark.parametrize(
    ("head", "out"),
    [
        # A length that is none: all that comes is the body, or a canary in it would not be seen
        *((f"Content-Length: {length}\r\n", "canary")
          for length in ("many", "2, 2", "", "-1", "+2", "1_0", "2\0", "9" * 5000)),
        ("Content-Length: 3\r\nContent-Length: 1\r\n", "can"),
        ("A: b\r\n Content-Length: 3\r\n", "canary"),
        ("Content-Length: 0\r\n\tx: y\r\n", "canary"),
        ("no colon\r\nContent-Length: 3\r\n", "canary"),
        ("Content-Length: 3\r\nn\xe4me: x\r\n", "canary"),
        (": x\r\nContent-Length: 3\r\n", "canary"),
        ("A:\r\nCONTENT-LENGTH:3\r\n", "can"),
    ],
)  # fmt: skip
def test_a_strange_length_hides_nothing(serving: Serving, head: str, out: str) -> None:
    done = agent.visit("GET", serving(f"HTTP/1.1  403 Forbidden\r\n{head}\r\ncanary".encode()).port, "/", 20)
    assert (done["status"], text(done), done["err"]) == (403, out, "")


def test_a_visit_uses_the_method_and_follows_nothing(serving: Serving) -> None:
    server = serving(ok(b"moved", status="302 Found", more="Location: /elsewhere\r\n"))
    done = agent.visit("DELETE", server.port, "/x", 20)
    assert (done["status"], text(done), len(server.requests)) == (302, "moved", 1)
    assert server.requests[0].startswith(b"DELETE /x ")
    head = serving(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    done = agent.visit("HEAD", head.port, "/", 20)
    assert (done["status"], done["out"], done["err"]) == (200, "", "")


def test_a_body_in_chunks_or_to_the_end_or_none(serving: Serving) -> None:
    chunks = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nTrailer: x\r\n\r\n"
    assert text(agent.visit("GET", serving(chunks).port, "/", 20)) == "abcde"
    assert text(agent.visit("GET", serving(b"HTTP/1.0 200 OK\r\n\r\nto the end").port, "/", 20)) == "to the end"
    done = agent.visit("GET", serving(b"HTTP/1.1 204 No Content\r\n\r\n").port, "/", 20)
    assert (done["status"], done["out"], done["err"]) == (204, "", "")
    many = b"HTTP/1.1 200 OK\n" + b"A: b\n" * 500 + b"CONTENT-length:4\n\nmanyx"
    assert text(agent.visit("GET", serving(many).port, "/", 20)) == "many"
    cut = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n"
    done = agent.visit("GET", serving(cut).port, "/", 20)
    assert (text(done), done["err"]) == ("abc", "")
    hint = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + ok(b"then", status="403 Forbidden")
    done = agent.visit("GET", serving(hint).port, "/", 20)
    assert (done["status"], text(done)) == (403, "then")
    continued = b"HTTP/1.1 100 Continue\r\n\r\n" + ok(b"then")
    assert text(agent.visit("GET", serving(continued).port, "/", 20)) == "then"


def test_an_answer_that_is_whole_is_not_waited_for_beyond_its_end(serving: Serving) -> None:
    def answer_and_stay(link: socket.socket, _: bytes) -> None:
        link.sendall(ok(b"whole"))
        link.recv(1)

    start = time.monotonic()
    done = agent.visit("GET", serving(answer_and_stay).port, "/", 10)
    assert (text(done), done["timed_out"]) == ("whole", False)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("before", "out"),
    [
        (b"", ""),
        (b"HTTP/1.1 200 OK\r\nX: ", ""),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 100 ", ""),
        (b"HTTP/1.1 200 OK\r\n\r\nbegun", "begun"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\nbegun", "begun"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nbegun\r\nfffff\r\n", "begun"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nbegun\r\n0\r\nTrailer", "begun"),
    ],
    ids=["status", "header", "continue", "to-the-end", "length", "chunk", "trailer"],
)
def test_a_server_that_drips_bytes_is_not_waited_for_longer(serving: Serving, before: bytes, out: str) -> None:
    server = serving(dripping(before=before))
    start = time.monotonic()
    done = agent.visit("GET", server.port, "/", 1)
    assert 1 <= time.monotonic() - start < 4
    assert (done["timed_out"], done["err"]) == (True, "")
    assert text(done).startswith(out)
    assert done["status"] == (200 if out else None)
    assert done["cut_short"] is bool(out)


def test_a_silent_server_costs_the_whole_time_and_no_more(serving: Serving) -> None:
    server = serving(lambda *_: time.sleep(3))
    start = time.monotonic()
    done = agent.visit("GET", server.port, "/", 0.7)
    assert 0.7 <= time.monotonic() - start < 2.5
    assert (done["timed_out"], done["status"], done["out"]) == (True, None, "")


def test_a_refused_connection_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
    done = agent.visit("GET", port, "/", 20)
    assert (done["status"], text(done, "err"), done["timed_out"]) == (None, "Connection refused", False)


def test_an_endless_body_is_too_much(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    def pour(link: socket.socket, _: bytes) -> None:
        link.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            link.sendall(b"y" * 10_000)

    def pour_chunks(link: socket.socket, _: bytes) -> None:
        link.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n")
        while True:
            link.sendall(b"3333\r\n" + b"y" * 0x3333 + b"\r\n")

    monkeypatch.setattr(agent, "MOST_OUTPUT", 200_000)
    for pouring in (pour, pour_chunks):
        done = agent.visit("GET", serving(pouring).port, "/", 20)
        assert (done["too_much"], done["timed_out"], done["status"], done["err"]) == (True, False, 200, "")
        assert len(raw(done["out"])) == 200_000
    exact = agent.visit("GET", serving(ok(bytes(200_000))).port, "/", 20)
    assert (exact["too_much"], exact["err"], len(raw(exact["out"]))) == (False, "", 200_000)


@pytest.mark.parametrize(
    ("answer", "status", "out"),
    [
        (b"", None, ""),
        (b"SSH-2.0-OpenSSH\r\n", None, ""),
        (b"\xff\xfe\x00" * 100, None, ""),
        (b"HTTP/1.1 99999 x\r\n\r\n", None, ""),
        (b"x" * 100_000, None, ""),
        (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 20_000 + b"\r\n", None, ""),
        (b"HTTP/1.1 200 OK\r\nA: " + b"b" * 100_000 + b"\r\n\r\n", None, ""),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort", 200, "short"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc", 200, ""),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc", 200, "abc"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabcde\r\n0\r\n\r\n", 200, "abc"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", 200, "abc"),
        *((b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + size + b"\r\nabc", 200, "")
          for size in (b"-3", b"+3", b"0x3", b"1_0", b"", b"3" * 60_000)),
        (b"HTTP/1.1 100 Continue\r\n\r\n", None, ""),
        (b"HTTP/1.1 102 Processing\r\n\r\n" * 10_000, None, ""),
        (b"HTTP/1.1 200 OK\r\nA: b", None, ""),
        (b"HTTP/1.1 000 x\r\n\r\n", None, ""),
        (b"HTTP/9 200 OK\r\n\r\n", None, ""),
    ],
    ids=["nothing", "ssh", "binary", "status", "line", "headers", "header", "short", "chunk", "cut-chunk", "long-chunk",
         "no-last-chunk", "negative", "plus", "prefix", "underscore", "no-size", "long-size", "go-on", "endless",
         "cut-head", "zero", "version"],
)  # fmt: skip
def test_what_is_no_http_is_told(serving: Serving, answer: bytes, status: int | None, out: str) -> None:
    server = serving(answer)
    before = descriptors()
    done = agent.visit("GET", server.port, "/", 20)
    assert (done["status"], text(done), done["timed_out"], done["too_much"]) == (status, out, False, False)
    assert text(done, "err") != ""
    assert done["cut_short"] is (status is not None)
    wait_until(lambda: descriptors() <= before)


# An attempt


def test_an_attempt_needs_something_to_do() -> None:
    with pytest.raises(agent.Refused, match="a request, a command or an engine"):
        agent.attempt(close={})


def test_an_attempt_goes_from_the_canary_to_the_evidence(
    serving: Serving, log: Path, cgroups: Path, frameworks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    canary, effect = frameworks / "canary", frameworks / "effect"
    canary.write_text("")
    group(cgroups, "web.service", os.getpid())
    (frameworks / "lsm").write_text("capability")

    def answer(link: socket.socket, _: bytes) -> None:
        seen.append(canary.read_text())
        effect.write_text("done")
        append(log, b"type=AVC \xff\n")
        link.sendall(ok(b"served"))

    monkeypatch.setattr(agent, "sentinel", lambda word: append(log, word.encode() + b"\n"))
    monkeypatch.setattr(agent, "audit_state", lambda: {"state": "of auditing"})
    made = agent.attempt(
        close={"unit": "web.service", "offset": 18, "word": MARK, "seconds": 10, "most": 1000, "known": KNOWN},
        canary={"file": str(canary), "line": "a word"},
        effect=["cat", str(effect)],
        request={"method": "GET", "port": serving(answer).port, "path": "/", "timeout": 10},
    )
    made = json.loads(json.dumps(made))
    assert seen == ["a word\n"]
    assert (made["planted"], made["effect_before"]["exit_code"], text(made["effect_after"])) == (True, 1, "done")
    assert (made["result"]["status"], text(made["result"])) == (200, "served")
    closed = made["closed"]
    assert (closed["log"], closed["problem"]) == (f"type=AVC \\xff\n{MARK}\n", "")
    assert closed["audit"] == {"state": "of auditing"}
    assert [p["pid"] for p in closed["subject"]["processes"]] == [os.getpid()]


@pytest.mark.parametrize("fault", [agent.Refused("no queue"), OSError(errno.EIO, "no queue"), TimeoutError()])
def test_a_log_that_cannot_be_read_is_a_problem_of_the_window(
    cgroups: Path, frameworks: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    def refuse(word: str) -> None:
        raise fault

    (frameworks / "lsm").write_text("capability")
    group(cgroups, "web.service", os.getpid())
    monkeypatch.setattr(agent, "sentinel", refuse)
    monkeypatch.setattr(agent, "audit_state", dict)
    closed = agent.close_window("web.service", 0, MARK, 1, 100, KNOWN)
    assert closed["problem"] in {"no queue", "[Errno 5] no queue", "TimeoutError()"}
    assert closed["log"] == ""


# The stream


class Asked:
    """The agent's other end: send it lines, read its answers."""

    def __init__(self) -> None:
        self.ours, theirs = socket.socketpair()
        self.ours.settimeout(20)
        self._theirs = theirs
        self._answers = self.ours.makefile("rb")
        self.thread = threading.Thread(target=agent.serve, args=(theirs.fileno(), theirs.fileno()), daemon=True)
        self.thread.start()

    def send(self, *questions: Any) -> None:
        for question in questions:
            self.ours.sendall(question if isinstance(question, bytes) else json.dumps(question).encode() + b"\n")

    def answer(self) -> dict[str, Any]:
        """The next one: an empty line, and then the answer on a line of its own."""
        assert self._answers.readline() == b"\n"
        line = self._answers.readline()
        assert line.endswith(b"\n")
        answer = json.loads(line)
        assert isinstance(answer, dict)
        return answer

    def answers(self, count: int) -> dict[Any, dict[str, Any]]:
        found = [self.answer() for _ in range(count)]
        return {answer["id"]: answer for answer in found}

    def end(self) -> None:
        self.ours.shutdown(socket.SHUT_WR)
        self.thread.join(20)
        assert not self.thread.is_alive()
        self._answers.close()
        self.ours.close()
        self._theirs.close()


@pytest.fixture
def asked() -> Iterator[Asked]:
    other = Asked()
    yield other
    other.end()


def test_an_answer_carries_the_id_of_its_question(asked: Asked) -> None:
    asked.send({"id": 7, "do": "ping"}, {"id": 2**53, "do": "run", "argv": ["printf", "a\nb"]})
    found = asked.answers(2)
    assert found[7] == {"id": 7, "answer": None}
    assert text(found[2**53]["answer"]) == "a\nb"


def test_questions_are_answered_side_by_side(asked: Asked) -> None:
    asked.send({"id": 1, "do": "run", "argv": ["sleep", "61"], "timeout": 2})
    asked.send(*({"id": number, "do": "run", "argv": ["echo", str(number)]} for number in range(2, 12)))
    start = time.monotonic()
    found = asked.answers(10)
    assert time.monotonic() - start < 1.9
    assert {number: text(answer["answer"]) for number, answer in found.items()} == {n: f"{n}\n" for n in range(2, 12)}
    assert asked.answer()["answer"]["timed_out"] is True


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ({"do": "no-such"}, "unknown operation 'no-such'"),
        ({}, "unknown operation None"),
        ({"do": ["ping"]}, "unknown operation ['ping']"),
        ({"do": "serve"}, "unknown operation 'serve'"),
        ({"do": "ping", "more": 1}, "unexpected keyword argument 'more'"),
        ({"do": "run"}, "missing 1 required positional argument: 'argv'"),
        ({"do": "run", "argv": []}, "Error"),
        ({"do": "run", "argv": ["a\0b"]}, "null byte"),
        ({"do": "run", "argv": 5}, "Error"),
        ({"do": "run", "argv": ["true"], "stdin": "not base64"}, "Error"),
        ({"do": "write", "path": "/proc/version/x", "data": ""}, "/proc/version"),
        ({"do": "write", "path": "/", "data": ""}, "/: Is a directory"),
        ({"do": "attempt", "close": {}}, "an attempt needs a request, a command or an engine"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_an_answer_too(asked: Asked, question: dict[str, Any], words: str) -> None:
    asked.send({"id": 5, **question}, {"id": 6, "do": "ping"})
    found = asked.answers(2)
    assert "answer" not in found[5]
    assert words in found[5]["error"]
    assert found[6]["answer"] is None


def test_nonsense_is_ignored(asked: Asked) -> None:
    deep = b"[" * 200_000
    for nonsense in (b"", b"\xff\xfe", b"{", b'"id": 1}', b"5", b"null", b"[1]", b'"text"', deep, b'{"id": 9,', b"\0"):
        asked.send(nonsense + b"\n")
    asked.send({"id": 3, "do": "ping"})
    assert asked.answer() == {"id": 3, "answer": None}


def test_questions_come_in_pieces_of_any_size_and_several_at_once(asked: Asked) -> None:
    whole = b"".join(json.dumps({"id": n, "do": "ping"}).encode() + b"\n" for n in range(20))
    for at in range(0, len(whole), 7):
        asked.send(whole[at : at + 7])
    assert set(asked.answers(20)) == set(range(20))
    big = {"id": 50, "do": "run", "argv": ["wc", "-c"], "stdin": base64.b64encode(bytes(12 << 20)).decode()}
    start = time.monotonic()
    asked.send(big)
    assert text(asked.answer()["answer"]).split() == [str(12 << 20)]
    assert time.monotonic() - start < 10


def test_an_answer_is_one_line_whatever_is_in_it(asked: Asked) -> None:
    word = 'a\nb\u2028\x1d"\\é\udcff'
    asked.send({"id": word, "do": "no\nsuch"}, {"id": 4, "do": "run", "argv": ["printf", r"\n\n\377\r\n"]})
    found = asked.answers(2)
    assert found[word]["error"] == "unknown operation 'no\\nsuch'"
    assert raw(found[4]["answer"]["out"]) == b"\n\n\xff\r\n"


def test_an_answer_that_is_no_json_is_an_error(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(agent.OPERATIONS, "ping", lambda: b"bytes")
    asked.send({"id": 1, "do": "ping"})
    assert "not JSON serializable" in asked.answer()["error"]


def test_a_machine_without_threads_is_still_answered(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    asked.send({"id": 1, "do": "ping"}, {"id": 2, "do": "ping"})
    assert set(asked.answers(2)) == {1, 2}


def test_threads_wait_for_the_next_question_but_few(asked: Asked) -> None:
    before = threading.active_count()
    asked.send(*({"id": number, "do": "ping"} for number in range(100)))
    assert len(asked.answers(100)) == 100
    wait_until(lambda: threading.active_count() <= before + agent.IDLE_THREADS)


def test_one_question_after_the_other_is_answered_by_the_same_thread(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(agent.OPERATIONS, "ping", threading.get_ident)
    asked.send({"id": 1, "do": "ping"})
    first = asked.answer()["answer"]
    for number in range(2, 20):
        asked.send({"id": number, "do": "ping"})
        assert asked.answer()["answer"] == first


def test_who_is_gone_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread goes on: a connection may be lost while something is done."""
    reading, writing = os.pipe()
    os.close(reading)
    answering = agent._Answering(writing)
    answering.answer({"id": 1, "do": "ping"})
    wait_until(lambda: answering._idle == 1)
    done = threading.Event()
    monkeypatch.setitem(agent.OPERATIONS, "ping", done.set)
    answering.answer({"id": 2, "do": "ping"})
    assert done.wait(20)
    os.close(writing)
