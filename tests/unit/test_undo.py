"""Undoing on a machine that is kept: real files and their times, rights and attributes, a journal that a crash tore."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from lsmlab.guest import agent, files, kernel, undo
from lsmlab.guest.agent import Refused
from lsmlab.guest.files import Problems
from lsmlab.guest.undo import Journal

AUDITCTL = """#!/bin/sh
rules=$LSMLAB_TEST/rules
case $1 in
-l) if [ -s $rules ]; then cat $rules; else echo "No rules"; fi ;;
-a) echo "$*" >> $rules ;;
-A) shift; { echo "-a $*"; cat $rules; } > $rules.new; mv $rules.new $rules ;;
-d) shift; grep -vxF -e "-a $*" $rules > $rules.new; mv $rules.new $rules ;;
*) exit 9 ;;
esac
"""
SYSTEMCTL = """#!/bin/sh
unit=$LSMLAB_TEST/unit
echo "$*" >> $LSMLAB_TEST/asked
case $1 in
show) for last; do :; done
    echo LoadState=loaded
    if [ -e $unit-$last ]; then cat $unit-$last; else cat $unit; fi ;;
stop) printf 'ActiveState=inactive\\nInvocationID=\\n' > $unit ;;
start) printf 'ActiveState=active\\nInvocationID=%s\\n' $(wc -l < $LSMLAB_TEST/asked) > $unit ;;
reset-failed) ;;
*) exit 9 ;;
esac
"""
OWN_RULE = "-a always,exit -F arch=b64 -S execve -F key=its-own"
OURS = ["always,exit", "-F", "arch=b64", "-S", "all", "-F", "exit=-EACCES", "-F", "key=lsmlab-denied"]


class Place:
    """A machine in a folder: a tree that is kept, programs that keep rules and a unit, and its journal."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.etc = folder / "etc"
        self.state = folder / "state"
        self.journal = str(folder / "journal")
        for made in (self.etc, self.state):
            made.mkdir()
        (self.state / "rules").write_text(f"{OWN_RULE}\n")
        self.unit("active", "first")

    def unit(self, active: str, invocation: str) -> None:
        (self.state / "unit").write_text(f"ActiveState={active}\nInvocationID={invocation}\n")

    def begin(self, *more: Path) -> Journal:
        journal = Journal(self.journal)
        journal.begin("somebody", [str(self.etc), *map(str, more)], ["a.service"])
        return journal

    @property
    def asked(self) -> list[str]:
        lines = (self.state / "asked").read_text().splitlines() if (self.state / "asked").exists() else []
        return [line for line in lines if not line.startswith("show ")]

    def rules(self) -> list[str]:
        return (self.state / "rules").read_text().splitlines()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("auditctl", AUDITCTL), ("systemctl", SYSTEMCTL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("LSMLAB_TEST", str(tmp_path / "state"))
    monkeypatch.setattr(kernel, "SELINUX", str(tmp_path / "selinux"))
    monkeypatch.setattr(kernel, "APPARMOR", str(tmp_path / "apparmor"))
    monkeypatch.setattr(kernel, "APPARMOR_AUDIT", str(tmp_path / "apparmor-audit"))
    return Place(tmp_path)


def look(root: Path) -> dict[str, Any]:
    """All that a file is, but its inode and when it was changed; by other means than the program's own."""
    found: dict[str, Any] = {}
    for path in [root, *root.rglob("*")]:
        there = path.lstat()
        about: list[Any] = [there.st_mode, there.st_uid, there.st_gid, there.st_mtime_ns]
        names = os.listxattr(path, follow_symlinks=False)
        about.append({name: os.getxattr(path, name, follow_symlinks=False) for name in names})
        if path.is_symlink():
            about.append(path.readlink())
        elif path.is_file():
            about += [path.read_bytes(), there.st_nlink]
        found[str(path.relative_to(root))] = about
    return found


def furnish(etc: Path) -> None:
    (etc / "shadow").write_text("root:secret\n")
    (etc / "shadow").chmod(0o640)
    (etc / "sub" / "deep").mkdir(parents=True)
    (etc / "sub" / "deep" / "file").write_bytes(bytes(range(256)))
    (etc / "link").symlink_to("shadow")
    (etc / "program").write_bytes(b"#!/bin/sh\n")
    (etc / "program").chmod(0o4755)
    (etc / "twin").write_text("one\n")
    os.link(etc / "twin", etc / "other-twin")
    odd = os.fsdecode(b"not-utf-8-\xff\n")
    (etc / odd).write_text("odd\n")
    with contextlib.suppress(OSError):
        os.setxattr(etc / "shadow", "user.note", b"\0\xff")
    for number, path in enumerate([*etc.rglob("*"), etc]):
        os.utime(path, ns=(1, 10**18 + number), follow_symlinks=False)


def rewrite(etc: Path) -> None:
    (etc / "shadow").write_text("root:secret\nlsmlab-canary\n")


def rename_over(etc: Path) -> None:
    (etc / "new").write_text("root:other\n")
    (etc / "new").rename(etc / "shadow")


def make_and_remove(etc: Path) -> None:
    (etc / "made" / "below").mkdir(parents=True)
    (etc / "made" / "below" / "file").write_text("x")
    (etc / "sub" / "deep" / "file").unlink()
    (etc / "sub" / "deep").rmdir()
    (etc / "sub").rmdir()


def change_rights(etc: Path) -> None:
    (etc / "program").chmod(0o700)
    (etc / "shadow").chmod(0o666)
    (etc / "sub").chmod(0o777)
    with contextlib.suppress(OSError):
        os.removexattr(etc / "shadow", "user.note")
        os.setxattr(etc / "program", "user.more", b"1")


def change_kinds(etc: Path) -> None:
    (etc / "link").unlink()
    (etc / "link").write_text("a file")
    (etc / "shadow").unlink()
    (etc / "shadow").mkdir()
    (etc / "shadow" / "inside").write_text("x")
    (etc / "program").unlink()
    (etc / "program").symlink_to("/bin/true")


def write_through_a_twin(etc: Path) -> None:
    (etc / "twin").write_text("two\n")


def touch_only(etc: Path) -> None:
    os.utime(etc / "sub" / "deep" / "file")
    os.utime(etc / "link", follow_symlinks=False)


def change_the_odd_one(etc: Path) -> None:
    (etc / os.fsdecode(b"not-utf-8-\xff\n")).write_text("other\n")
    (etc / os.fsdecode(b"new-\xfe")).write_text("new\n")


CHANGES = (
    rewrite, rename_over, make_and_remove, change_rights, change_kinds, write_through_a_twin, touch_only,
    change_the_odd_one,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_files_are_put_back_by_the_run_itself_and_by_another(place: Place, change: Any) -> None:
    furnish(place.etc)
    before = look(place.etc)
    journal = place.begin()
    change(place.etc)
    assert look(place.etc) != before
    assert journal.end()
    assert look(place.etc) == before
    assert not Path(place.journal).exists()
    place.begin()._drop()  # as a killed agent does: the lock goes, the journal stays
    change(place.etc)
    again = Journal(place.journal)
    assert again.take_up()
    assert again.end()
    assert look(place.etc) == before
    assert not Path(place.journal).exists()


def test_a_second_journal_of_one_agent_keeps_all_once_more(place: Place) -> None:
    furnish(place.etc)
    before = look(place.etc)
    journal = Journal(place.journal)
    for change in CHANGES:
        journal.begin("somebody", [str(place.etc)], ["a.service"])
        change(place.etc)
        assert journal.end()
        assert look(place.etc) == before, change


def test_a_second_begin_of_one_agent_leaves_the_first_as_it_is(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(undo, "LOCK_SECONDS", 0.2)
    furnish(place.etc)
    before = look(place.etc)
    journal = place.begin()
    rewrite(place.etc)
    with pytest.raises(Refused, match="has not ended"):
        journal.begin("somebody", [str(place.etc)], ["a.service"])
    with pytest.raises(Refused, match="another run is at work"):
        Journal(place.journal).hold()
    assert journal.take_up(who="another")
    journal.end()
    assert look(place.etc) == before
    assert journal.end() == [], "nothing is begun"
    for late in (journal.mark, journal.restore):
        with pytest.raises(Refused, match=r"nothing was begun|no mark"):
            late("ready")


def test_what_is_asked_at_once_is_done_one_after_the_other(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish(place.etc)
    before = look(place.etc)
    journal = place.begin()
    journal.mark("ready")
    rewrite(place.etc)
    inside, at_once = [0], [0]
    real = files.Trees.scan

    def scan(self: files.Trees, *arguments: Any, **named: Any) -> dict[str, files.Entry]:
        inside[0] += 1
        at_once[0] = max(at_once[0], inside[0])
        time.sleep(0.05)
        found = real(self, *arguments, **named)
        inside[0] -= 1
        return found

    monkeypatch.setattr(files.Trees, "scan", scan)
    said: list[Exception] = []

    def ask(do: Any, *arguments: str) -> None:
        try:
            do(*arguments)
        except Refused as error:
            said.append(error)

    work = [(journal.restore, "ready"), (journal.mark, "other"), (journal.end,), (journal.restore, "ready")]
    threads = [threading.Thread(target=ask, args=asked) for asked in work]
    for thread in threads:
        thread.start()
        time.sleep(0.01)
    for thread in threads:
        thread.join(30)
    assert at_once == [1]
    assert {str(error) for error in said} <= {"no mark 'ready'", "nothing was begun"}, "a late one is refused"
    assert look(place.etc) == before
    assert not Path(place.journal).exists()


def test_an_end_that_comes_while_it_begins_waits_and_undoes(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(place.journal)
    monkeypatch.setattr(undo, "_journal", journal)
    real = kernel.audit_as_needed

    def slowly(rules: list[list[str]]) -> None:
        time.sleep(0.3)
        real(rules)

    monkeypatch.setattr(kernel, "audit_as_needed", slowly)
    monkeypatch.setattr(agent, "VEHICLE", agent.VEHICLE)
    thread = threading.Thread(target=undo.begin, args=("x", [str(place.etc)], ["a.service"], [], [OURS]))
    thread.start()
    while not Path(place.journal, "vehicle").exists():
        time.sleep(0.01)
    assert "1 audit rules" in undo.end()
    thread.join(10)
    assert place.rules() == [OWN_RULE]
    assert not Path(place.journal).exists()


def test_who_lost_a_connection_undoes_no_other_s_journal(place: Place) -> None:
    place.begin()._drop()
    rewrite(place.etc)
    assert not Journal(place.journal).take_up(who="somebody else")
    assert Journal(place.journal).status() is not None
    assert Journal(place.journal).take_up(who="somebody")


def test_what_is_not_kept_leaves_no_draft_behind(place: Place) -> None:
    furnish(place.etc)
    journal = place.begin()
    rewrite(place.etc)
    for path in (Path(place.journal) / "objects").iterdir():
        path.unlink()
    with pytest.raises(Refused, match="shadow: No such file or directory"):
        journal.end()
    assert not list(place.etc.rglob(f"{files.DRAFT}*"))
    assert (place.etc / "shadow").read_text() == "root:secret\nlsmlab-canary\n"


def test_a_mark_is_gone_back_to_as_often_as_asked(place: Place) -> None:
    furnish(place.etc)
    before = look(place.etc)
    journal = place.begin()
    rewrite(place.etc)
    journal.mark("ready")
    ready = look(place.etc)
    for change in (*CHANGES, *CHANGES):
        change(place.etc)
        journal.restore("ready")
        assert look(place.etc) == ready, change
    with pytest.raises(Refused, match="no mark 'other'"):
        journal.restore("other")
    journal.end()
    assert look(place.etc) == before


def test_what_was_changed_in_the_tick_of_the_look_is_seen(place: Place) -> None:
    """Same size, same inode, and a time that is set back: the content decides."""
    file = place.etc / "file"
    file.write_text("one")
    there = file.stat()
    journal = place.begin()
    file.write_text("two")
    os.utime(file, ns=(there.st_atime_ns, there.st_mtime_ns))
    assert journal.restore("") == [str(file)]
    assert file.read_text() == "one"


def test_what_was_absent_with_its_folders_is_gone_again(place: Place) -> None:
    file = place.folder / "srv" / "www" / "logo.svg"
    place.etc.joinpath("x").write_text("x")
    os.utime(place.folder, ns=(1, 10**18))
    journal = place.begin(file, file.parent)
    file.parent.mkdir(parents=True)
    file.write_text("<svg/>")
    journal.mark("ready")
    file.write_text("<other/>")
    journal.restore("ready")
    assert file.read_text() == "<svg/>"
    journal.end()
    assert not (place.folder / "srv").exists()


def test_a_path_through_a_link_is_kept_where_it_leads(place: Place) -> None:
    real = place.folder / "data"
    real.mkdir()
    (real / "page").write_text("theirs")
    (place.folder / "www").symlink_to(real)
    journal = place.begin(place.folder / "www" / "page")
    (place.folder / "www" / "page").write_text("ours")
    journal.end()
    assert (real / "page").read_text() == "theirs"


def test_the_journal_is_root_s_alone_and_there_before_anything_is_changed(place: Place) -> None:
    furnish(place.etc)
    place.begin()
    there = Path(place.journal)
    assert stat.S_IMODE(there.stat().st_mode) == 0o700
    assert all(not path.lstat().st_mode & 0o077 for path in there.rglob("*") if path.parent.name == "objects")
    kept = {path.read_bytes() for path in (there / "objects").iterdir()}
    assert {b"root:secret\n", bytes(range(256))} <= kept
    assert json.loads((there / "journal.json").read_text())["who"] == "somebody"
    assert place.asked == []


def test_a_journal_that_was_not_finished_is_nothing_to_undo(place: Place) -> None:
    """The machine lost its power while the journal was written: nothing had been changed."""
    furnish(place.etc)
    place.begin()._drop()
    there = Path(place.journal)
    text = (there / "journal.json").read_text()
    (there / "journal.json").unlink()
    (there / "journal.json.new").write_text(text[: len(text) // 2])
    changed = place.etc / "shadow"
    changed.write_text("by somebody else\n")
    again = Journal(place.journal)
    assert again.status() is None
    assert not again.take_up()
    assert changed.read_text() == "by somebody else\n"
    assert not there.exists()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"who": 1}', '{"format": 9, "who": "x", "begun": "y"}', "\xff"]
)
def test_a_journal_that_cannot_be_read_is_never_taken_for_none(place: Place, text: str) -> None:
    place.begin()._drop()
    (Path(place.journal) / "journal.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(Refused, match=r"journal\.json"):
        Journal(place.journal).take_up()
    assert Path(place.journal).is_dir()


def test_a_crash_in_the_middle_of_undoing_is_gone_on_from(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish(place.etc)
    before = look(place.etc)
    journal = place.begin()
    for change in (change_rights, rewrite, make_and_remove):
        change(place.etc)
    real, count = files._dress, iter(range(3))

    def dress(path: str, entry: files.Entry) -> None:
        if next(count, None) is None:
            raise KeyboardInterrupt
        real(path, entry)

    monkeypatch.setattr(files, "_dress", dress)
    with pytest.raises(KeyboardInterrupt):
        journal.end()
    journal._drop()
    monkeypatch.setattr(files, "_dress", real)
    assert look(place.etc) != before
    again = Journal(place.journal)
    assert again.take_up()
    again.end()
    assert look(place.etc) == before
    assert not list(place.etc.rglob(f"{files.DRAFT}*"))


def test_the_next_run_refuses_until_then_and_changes_nothing(place: Place) -> None:
    furnish(place.etc)
    place.begin()._drop()
    rewrite(place.etc)
    with pytest.raises(Refused, match="the journal of another run is there"):
        place.begin()
    again = Journal(place.journal)
    assert again.status() == {"who": "somebody", "begun": again.status()["begun"]}  # type: ignore[index]
    assert again.take_up()
    again.end()
    assert (place.etc / "shadow").read_text() == "root:secret\n"


@pytest.mark.parametrize("what", ["changed", "made", "removed"])
def test_what_somebody_changed_long_after_a_killed_run_is_not_taken_away(place: Place, what: str) -> None:
    furnish(place.etc)
    place.begin()._drop()
    rewrite(place.etc)
    before = time.time() - undo.GRACE_SECONDS - 60
    os.utime(Path(place.journal) / "lock", (before, before))
    path = place.etc / ("new" if what == "made" else "program")
    path.unlink() if what == "removed" else path.write_text("by the administrator\n")
    now = look(place.etc)
    with pytest.raises(Refused, match=f"by somebody else: .*{path}"):
        Journal(place.journal).take_up()
    assert look(place.etc) == now
    again = Journal(place.journal)
    assert again.take_up(force=True)
    assert str(path) in again.end()


def test_two_at_once_are_told_apart_from_one_that_was_killed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(undo, "LOCK_SECONDS", 0.2)
    place.begin()
    with pytest.raises(Refused, match="another run is at work"):
        Journal(place.journal).take_up()


def test_a_lock_that_was_removed_before_it_is_had_is_none(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = (Journal(place.journal) for _ in range(3))
    first.hold()
    real = fcntl.flock

    def flock(file: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        first._leave()  # the file that the second has opened is gone, and the third has another
        third.hold()
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(undo, "LOCK_SECONDS", 0.2)
    with pytest.raises(Refused, match="another run is at work"):
        second.hold()
    third._leave()
    second.hold()
    second._leave()
    assert not Path(place.journal).exists()


def test_many_at_once_have_the_folder_one_after_the_other(place: Place) -> None:
    inside: list[int] = []
    wrong: list[Any] = []

    def work(number: int) -> None:
        journal = Journal(place.journal)
        try:
            for _ in range(100):
                journal.hold()
                inside.append(number)
                time.sleep(0)
                wrong.extend([list(inside)] if len(inside) > 1 else [])
                inside.remove(number)
                journal._leave()
        except BaseException as error:  # noqa: BLE001 - any is a failure
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert not Path(place.journal).exists()


@pytest.mark.parametrize("mode", [0o755, 0o770])
def test_a_folder_that_others_may_enter_is_not_used(place: Place, mode: int) -> None:
    Path(place.journal).mkdir()
    Path(place.journal).chmod(mode)
    with pytest.raises(Refused, match="root alone"):
        place.begin()
    assert list(Path(place.journal).iterdir()) == []


def test_what_is_not_ours_in_the_journal_s_place_is_not_removed(place: Place) -> None:
    Path(place.journal).mkdir(mode=0o700)
    (Path(place.journal) / "diary").write_text("private")
    with pytest.raises(Refused, match="holds diary, which is none of lsmlab's"):
        place.begin()
    with pytest.raises(Refused, match="holds diary"):
        Journal(place.journal).take_up()
    assert (Path(place.journal) / "diary").read_text() == "private"


def test_too_much_to_keep_is_refused_and_nothing_is_left(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish(place.etc)
    monkeypatch.setattr(files, "MOST_BYTES", 260)
    with pytest.raises(Refused, match="have to be kept"):
        place.begin()
    assert not Path(place.journal).exists()


def test_what_something_else_changes_again_and_again_is_named(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    file = place.etc / "busy"
    file.write_text("was")
    journal = place.begin()
    real = files.Trees.put_back

    def put_back(self: files.Trees, *arguments: Any) -> list[str]:
        done = real(self, *arguments)
        file.write_text(f"busy {time.time_ns()}")
        return done

    monkeypatch.setattr(files.Trees, "put_back", put_back)
    file.write_text("first")
    with pytest.raises(Refused, match=f"not as it was: {file}: another digest, mtime"):
        journal.end()
    assert (Path(place.journal) / "journal.json").exists(), "it is still to be undone"


# What cannot be put back


class Elsewhere:
    """What lstat says of a folder, as if another file system were mounted there."""

    def __init__(self, there: os.stat_result) -> None:
        self._there = there
        self.st_dev = there.st_dev + 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._there, name)


def test_a_mount_below_what_is_kept_is_named_and_nothing_is_begun(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    furnish(place.etc)
    before = look(place.etc)
    mounted = f"{place.etc}/sub/deep"
    real = files._lstat

    def lstat(path: str) -> Any:
        there = real(path)
        return Elsewhere(there) if there is not None and path.startswith(mounted) else there

    monkeypatch.setattr(files, "_lstat", lstat)
    with pytest.raises(Refused, match=f"{mounted}: another file system is mounted there"):
        place.begin()
    assert not Path(place.journal).exists()
    assert look(place.etc) == before
    trees = files.Trees(str(place.folder))
    assert f"{mounted}/file" not in trees.scan([str(place.etc)], []), "as far as it is looked at"
    monkeypatch.setattr(files.Trees, "_keep", lambda *_: None)
    assert f"{mounted}/file" in trees.scan([str(place.etc), mounted], [], keep=True), "a tree of its own"


def test_sockets_and_pipes_are_in_nobody_s_way(place: Place) -> None:
    furnish(place.etc)
    os.mkfifo(place.etc / "pipe", 0o600)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(place.etc / "socket"))
    journal = place.begin()
    (place.etc / "pipe").unlink()
    (place.etc / "pipe").write_text("a file in its place\n")
    (place.etc / "socket").unlink()
    os.mkfifo(place.etc / "new", 0o600)
    rewrite(place.etc)
    journal.end()
    there = {path.name for path in place.etc.iterdir()}
    assert not there & {"pipe", "socket", "new"}
    assert (place.etc / "shadow").read_text() == "root:secret\n"


def test_a_device_that_is_gone_is_made_anew(place: Place) -> None:
    path = place.etc / "device"
    os.mknod(path, stat.S_IFCHR | 0o640, os.makedev(0, 0))  # the one that everybody may make
    before = look(place.etc)
    journal = place.begin()
    path.unlink()
    path.write_text("x")
    journal.end()
    assert look(place.etc) == before


def test_a_pipe_that_stays_gets_its_rights_back_and_its_time_is_its_own(place: Place) -> None:
    pipe = place.etc / "pipe"
    os.mkfifo(pipe, 0o600)
    journal = place.begin()
    os.utime(pipe, ns=(1, 10**18))
    assert journal.restore("") == []
    pipe.chmod(0o666)
    journal.end()
    assert stat.S_IMODE(pipe.stat().st_mode) == 0o600


def test_one_file_that_cannot_be_put_back_keeps_nothing_else_from_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    furnish(place.etc)
    before = look(place.etc)
    journal = place.begin()
    for change in (change_rights, rewrite, make_and_remove):
        change(place.etc)
    kernel.audit_as_needed([OURS])
    place.unit("active", "second")
    real = files._dress

    def dress(path: str, entry: files.Entry) -> None:
        if entry.get("digest") == hashlib.sha256(b"root:secret\n").hexdigest():
            raise PermissionError(1, "Operation not permitted", path)
        real(path, entry)

    monkeypatch.setattr(files, "_dress", dress)
    with pytest.raises(Refused, match=f"not as it was: {place.etc}/shadow: Operation not permitted; "):
        journal.end()
    after = look(place.etc)
    assert {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)} == {"shadow"}
    assert place.rules() == [OWN_RULE]
    assert place.asked[-1] == "start a.service"
    journal._drop()
    monkeypatch.setattr(files, "_dress", real)
    again = Journal(place.journal)
    assert again.take_up(force=True)
    again.end()
    assert look(place.etc) == before


def test_auditing_that_cannot_be_asked_keeps_no_service_stopped(place: Place) -> None:
    furnish(place.etc)
    before = look(place.etc)
    journal = place.begin()
    rewrite(place.etc)
    place.unit("active", "second")
    program = place.folder / "bin" / "auditctl"
    program.write_text("#!/bin/sh\necho gone >&2; exit 1\n")
    with pytest.raises(Refused, match="not as it was: auditctl -l: exit status 1: gone"):
        journal.end()
    assert look(place.etc) == before
    assert place.asked[-1] == "start a.service"
    program.write_text(AUDITCTL)
    journal.end()
    assert not Path(place.journal).exists()


def test_what_is_too_large_to_keep_can_still_be_taken_away(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish(place.etc)
    before = look(place.etc)
    journal = place.begin()
    monkeypatch.setattr(files, "MOST_BYTES", 1000)
    monkeypatch.setattr(files, "MOST_ENTRIES", 3)
    (place.etc / "shadow").write_bytes(bytes(2000))
    (place.etc / "new").write_bytes(bytes(2000))
    journal.end()
    assert look(place.etc) == before


# Services and auditing


def test_a_service_that_was_started_anew_is_started_once_more_with_what_was(place: Place) -> None:
    journal = place.begin()
    place.unit("active", "second")
    (place.etc / "site").write_text("ours")
    done = journal.end()
    assert "a.service stopped" in done and "a.service started" in done
    assert [line for line in place.asked if not line.startswith("reset")] == ["stop a.service", "start a.service"]
    assert not (place.etc / "site").exists()


def test_a_service_that_did_not_run_does_not_run(place: Place) -> None:
    place.unit("inactive", "")
    journal = place.begin()
    place.unit("active", "second")
    journal.end()
    assert [line for line in place.asked if not line.startswith("reset")] == ["stop a.service"]


@pytest.mark.parametrize("how", kernel.STOPPED_ALONG)
def test_a_service_that_runs_and_would_be_stopped_along_is_named(
    place: Place, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    journal = Journal(place.journal)
    monkeypatch.setattr(undo, "_journal", journal)
    monkeypatch.setattr(agent, "VEHICLE", agent.VEHICLE)
    (place.state / "unit-a.service").write_text(f"ActiveState=active\nInvocationID=1\n{how}=b.service c.service\n")
    (place.state / "unit-b.service").write_text("ActiveState=inactive\nInvocationID=\n")
    (place.state / "unit-c.service").write_text("ActiveState=active\nInvocationID=3\n")
    with pytest.raises(Refused, match=r"^c\.service: would be stopped with a\.service, and not started again"):
        undo.begin("x", [str(place.etc)], ["a.service"], [], [OURS])
    assert not Path(place.journal).exists() and place.asked == []
    undo.begin("x", [str(place.etc)], ["a.service", "c.service"], [], [OURS])
    undo.end()
    (place.state / "unit-c.service").write_text("ActiveState=inactive\nInvocationID=\n")
    undo.begin("x", [str(place.etc)], ["a.service"], [], [OURS])
    undo.end()


def test_a_service_that_was_let_alone_is_let_alone(place: Place) -> None:
    place.begin().end()
    assert place.asked == []


def test_our_audit_rules_go_before_the_others_and_away_again(place: Place) -> None:
    journal = place.begin()
    kernel.audit_as_needed([OURS, ["always,exit", "-S", "clone"]])
    assert place.rules() == [f"-a {' '.join(OURS)}", "-a always,exit -S clone", OWN_RULE]
    assert "2 audit rules" in journal.end()
    assert place.rules() == [OWN_RULE]


def test_a_rule_that_silences_all_is_taken_away_and_put_back(place: Place) -> None:
    (place.state / "rules").write_text("-a never,task\n")
    journal = place.begin()
    kernel.audit_as_needed([OURS])
    assert place.rules() == [f"-a {' '.join(OURS)}"]
    journal.end()
    assert place.rules() == ["-a never,task"]


# The frameworks


def boolean_files(folder: Path, **values: str) -> None:
    (folder / "booleans").mkdir(parents=True, exist_ok=True)
    (folder / "enforce").write_text("1")
    (folder / "commit_pending_bools").write_text("")
    (folder / "policy").write_bytes(b"policy")
    for name, value in values.items():
        (folder / "booleans" / name).write_text(value)


def test_booleans_are_set_back_and_committed(place: Place) -> None:
    folder = place.folder / "selinux"
    boolean_files(folder, one="0 0", two="1 1")
    (folder / "booleans" / "one").write_text("1 1")
    done = kernel.put_selinux_back(
        {"enforce": "1", "booleans": {"one": "0", "two": "1"}}, kernel.selinux(policy=False) or {}, Problems()
    )
    assert done == ["boolean one"]
    assert (folder / "booleans" / "one").read_text()[:1] == "0"
    assert (folder / "commit_pending_bools").read_text() == "1"
    assert kernel.differences(
        {"selinux": {"enforce": "1", "policy": "a", "booleans": {"x": "0"}}, "apparmor": None},
        {"selinux": {"enforce": "0", "policy": "b", "booleans": {"x": "1"}}, "apparmor": None},
    ) == ["SELinux: another enforce", "SELinux: another policy", "boolean x: another"]


def profile(folder: Path, name: str, mode: str = "enforce", digest: str = "d1", blob: bytes | None = b"blob") -> None:
    here = folder / "policy" / "profiles" / f"{name}.1"
    here.mkdir(parents=True)
    for file, text in (("name", name), ("mode", mode), ("sha256", digest)):
        (here / file).write_text(f"{text}\n")
    if blob is not None:
        (here / "raw_data").write_bytes(blob)


@pytest.fixture
def apparmor(place: Place) -> Path:
    folder = place.folder / "apparmor"
    profile(folder, "kept")
    for name in (".remove", ".replace", "profiles"):
        (folder / name).write_text("")
    (place.folder / "apparmor-audit").write_text("normal\n")
    return folder


def saved(kept: dict[str, bytes]) -> Any:
    def save(data: bytes) -> str:
        kept[f"name of {data!r}"] = data
        return f"name of {data!r}"

    return save


def test_a_profile_of_ours_is_removed_and_a_changed_one_is_loaded_from_its_own_content(
    place: Place, apparmor: Path
) -> None:
    kept: dict[str, bytes] = {}
    was = kernel.apparmor(saved(kept))
    profile(apparmor, "ours")
    (apparmor / "policy" / "profiles" / "kept.1" / "sha256").write_text("d2")
    (place.folder / "apparmor-audit").write_text("noquiet\n")
    now = kernel.apparmor(None)
    assert was is not None and now is not None
    wrong = kernel.differences({"selinux": None, "apparmor": was}, {"selinux": None, "apparmor": now})
    assert wrong == ["AppArmor: another audit parameter", "profile kept: another", "profile ours: another"]
    done = kernel.put_apparmor_back(was, now, kept.__getitem__, Problems())
    assert done == ["profile ours", "profile kept", "AppArmor's audit parameter"]
    assert (apparmor / ".remove").read_text() == "ours"
    assert (apparmor / ".replace").read_bytes() == b"blob"
    assert (place.folder / "apparmor-audit").read_text().startswith("normal")


def test_a_profile_whose_content_the_kernel_does_not_give_is_named_and_the_rest_goes_on(
    place: Place, apparmor: Path
) -> None:
    profile(apparmor, "opaque", blob=None)
    was = kernel.apparmor(saved({}))
    (apparmor / "policy" / "profiles" / "opaque.1" / "mode").write_text("complain")
    now = kernel.apparmor(None)
    assert was is not None and now is not None
    problems = Problems()
    (place.folder / "apparmor-audit").write_text("noquiet\n")
    assert kernel.put_apparmor_back(was, kernel.apparmor(None) or {}, str.encode, problems) == [
        "AppArmor's audit parameter"
    ]
    assert problems.words == ["profile opaque: was changed, and this kernel does not give what it was loaded from"]


@pytest.mark.parametrize("lacking", ["raw_data", "sha256"])
def test_a_loaded_profile_that_could_not_be_put_back_is_not_taken_away(
    place: Place, apparmor: Path, lacking: str
) -> None:
    here = apparmor / "policy" / "profiles" / "kept.1"
    journal = Journal(place.journal)
    journal.begin("x", [str(place.etc)], [], ["kept", "not-loaded"])
    journal.end()
    (here / lacking).unlink()
    with pytest.raises(Refused, match="profile kept: this kernel does not give"):
        journal.begin("x", [str(place.etc)], [], ["kept", "not-loaded"])
    assert not Path(place.journal).exists()
    journal.begin("x", [str(place.etc)], [], ["another"])
    journal.end()


def test_a_child_of_a_profile_comes_with_it_and_needs_its_digest_alone(place: Place, apparmor: Path) -> None:
    child = apparmor / "policy" / "profiles" / "kept.1" / "profiles" / "child.2"
    child.mkdir(parents=True)
    for file, text in (("name", "child"), ("mode", "enforce"), ("sha256", "d3")):
        (child / file).write_text(f"{text}\n")
    state = kernel.apparmor(saved({}))
    assert kernel.not_kept(state, ["kept"]) == []
    (child / "sha256").unlink()
    assert kernel.not_kept(kernel.apparmor(saved({})), ["kept"]) == ["kept//child"]
    assert kernel.not_kept(None, ["kept"]) == []


def test_what_a_command_of_a_service_left_behind_is_ended(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = place.begin()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        real = agent.text_of
        mine = f"/proc/{process.pid}/loginuid"
        monkeypatch.setattr(agent, "text_of", lambda path: "1073741999" if path == mine else real(path))
        journal.auids.add(1073741999)
        journal.restore("")
        assert process.wait(10) == -9
