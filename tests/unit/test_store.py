"""The outcome store: what goes in comes out, whatever other processes do, and nothing of others is overwritten."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sqlite3
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest
from builders import outcome

from lsmlab import store
from lsmlab.errors import DefinitionError, StoreError
from lsmlab.outcome import Outcome
from lsmlab.store import Store
from lsmlab.terms import Arm, AttemptKind, Verdict


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LSMLAB_HOME", str(tmp_path / "home"))


@pytest.fixture
def kept(tmp_path: Path) -> Store:
    return Store(tmp_path / "outcomes.sqlite")


def set_version(path: Path, version: int) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {version}")
        connection.execute(f"PRAGMA application_id = {store.APPLICATION}")
        connection.commit()


def test_what_goes_in_comes_out(kept: Store) -> None:
    first, second = outcome(1), outcome(2, verdict=Verdict.UNATTRIBUTED, reason='é "quoted" \n \x1d \\xff 🐧')
    assert (kept.add(first), kept.add(second)) == (1, 2)
    assert kept.get("1") == (1, first)
    assert kept.get(second.id) == (2, second)
    assert kept.recent() == [(2, second), (1, first)]
    assert kept.recent(1) == [(2, second)]
    assert kept.count() == 2
    found = kept.get("2")[1]
    assert (found.as_expected, found.attempts) == (False, (("read-shadow", AttemptKind.ATTACK),))
    assert [(arm, name) for arm, name, _ in found.accounted] == [(Arm.SELINUX_ENFORCING, "read-shadow")]


def test_the_columns_are_those_of_the_outcome(kept: Store) -> None:
    kept.add(outcome(7, verdict=Verdict.ERROR))
    with contextlib.closing(sqlite3.connect(kept.path)) as connection:
        (row,) = connection.execute("SELECT id, scenario, lab, framework, verdict, expected, recorded FROM outcomes")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
    assert row == (
        "000000000007", "nginx-reads-shadow", "debian-13", "selinux", "ERROR", "CONTAINED", "2026-11-24T08:44:40+00:00",
    )  # fmt: skip
    assert version == store.VERSION


def test_a_new_store_is_empty(kept: Store) -> None:
    assert (kept.count(), kept.recent()) == (0, [])
    with pytest.raises(DefinitionError, match="no outcome is called '1'"):
        kept.get("1")


def test_a_lab_was_seen_when_it_last_came_out_as_expected(kept: Store) -> None:
    assert kept.proven() == {}
    kept.add(outcome(1, verdict=Verdict.ERROR))
    assert kept.proven() == {}
    kept.add(outcome(2))
    kept.add(outcome(3, verdict=Verdict.NOT_CONTAINED))
    assert kept.proven() == {"debian-13": outcome(2).recorded}


def test_another_store_of_the_same_file_sees_it(kept: Store) -> None:
    kept.add(outcome(1))
    assert Store(kept.path).get("1")[1] == outcome(1)


def test_the_default_place_is_the_state_folder(tmp_path: Path) -> None:
    Store().add(outcome(1))
    assert Store().path == tmp_path / "home" / "state" / "outcomes.sqlite"
    assert Store().count() == 1


def test_an_id_may_be_cut_where_one_begins_so(kept: Store) -> None:
    kept.add(outcome(1, id="abcdef000001"))
    kept.add(outcome(2, id="abcd00000002"))
    assert kept.get("abcde")[0] == 1
    with pytest.raises(DefinitionError, match="more than one outcome is called 'abcd'"):
        kept.get("abcd")
    for key in ("abc", "", "zzzz", "0", "-1", "9" * 30, "abcdef0000011", "abcd' OR 1 --", "1.0", " 1"):
        with pytest.raises(DefinitionError, match="no outcome is called"):
            kept.get(key)


@pytest.mark.parametrize("key", ["????", "[a-z]bcd", "ab*f"])
def test_a_key_is_no_pattern(kept: Store, key: str) -> None:
    kept.add(outcome(1, id="abcdef000001"))
    with pytest.raises(DefinitionError):
        kept.get(key)


def test_a_superscript_is_no_number(kept: Store) -> None:
    with pytest.raises(DefinitionError):
        kept.get("²")


def test_a_number_is_a_number_first(kept: Store) -> None:
    for n in range(3):
        kept.add(outcome(n))
    with contextlib.closing(sqlite3.connect(kept.path)) as connection:
        connection.execute("UPDATE outcomes SET number = 1234 WHERE number = 1")
        connection.execute("UPDATE outcomes SET id = '1234abcdef00' WHERE number = 2")
        connection.commit()
    assert kept.get("1234")[0] == 1234


def test_an_id_is_kept_once(kept: Store) -> None:
    kept.add(outcome(1))
    with pytest.raises(StoreError, match="UNIQUE"):
        kept.add(outcome(1))
    assert kept.count() == 1


def test_a_store_from_the_future_is_refused(kept: Store) -> None:
    kept.add(outcome(1))
    set_version(kept.path, store.VERSION + 1)
    before = kept.path.read_bytes()
    for act in (kept.count, kept.recent, lambda: kept.add(outcome(2)), lambda: kept.get("1")):
        with pytest.raises(
            StoreError, match=r"written by a newer lsmlab \(store version 2; this one knows 1\)\n  Upgrade"
        ):
            act()
    assert kept.path.read_bytes() == before


def test_a_store_from_the_future_with_another_journal_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "outcomes.sqlite"
    set_version(path, 99)
    before = path.read_bytes()
    with pytest.raises(StoreError, match="newer lsmlab"):
        Store(path).count()
    assert path.read_bytes() == before


def test_another_programs_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "outcomes.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE bookmarks (url TEXT)")
        connection.commit()
    with pytest.raises(StoreError):
        Store(path).add(outcome(1))


@pytest.mark.parametrize(
    "content", [b"hello, I am a text file\n" * 100, b"\0" * 5000, b"SQLite format 3\0" + b"\xff" * 5000]
)
def test_what_is_not_a_database_is_refused_and_left_alone(kept: Store, content: bytes) -> None:
    kept.path.write_bytes(content)
    for act in (kept.count, lambda: kept.add(outcome(1))):
        with pytest.raises(StoreError, match=r"outcomes\.sqlite: .*\n  If the file is damaged, move it away"):
            act()
    assert kept.path.read_bytes() == content


def test_a_folder_in_its_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="unable to open database file"):
        Store(tmp_path).count()


@pytest.mark.parametrize("document", ["{", "{}", '{"record": 2}', "null"])
def test_a_document_that_cannot_be_read_is_told(kept: Store, document: str) -> None:
    kept.add(outcome(1))
    with contextlib.closing(sqlite3.connect(kept.path)) as connection:
        connection.execute("UPDATE outcomes SET document = ?", (document,))
        connection.commit()
    for act in (lambda: kept.get("1"), kept.recent):
        with pytest.raises(StoreError, match="outcome 1 cannot be read: "):
            act()


def test_an_outcome_of_another_record_version_is_refused(kept: Store) -> None:
    kept.add(outcome(1))
    with contextlib.closing(sqlite3.connect(kept.path)) as connection:
        connection.execute("UPDATE outcomes SET document = json_set(document, '$.record', 2)")
        connection.commit()
    with pytest.raises(StoreError, match="outcome 1 cannot be read: Input should be 1"):
        kept.get("1")


def test_json_of_an_outcome_reads_back() -> None:
    one = outcome(3)
    assert Outcome.model_validate_json(one.model_dump_json(exclude={"as_expected"})) == one


# Several at once


def add_many(path: str, first: int, count: int) -> list[int]:
    """Add `count` outcomes; their numbers. Runs in a process of its own."""
    kept = Store(Path(path))
    return [kept.add(outcome(first + n)) for n in range(count)]


@pytest.mark.parametrize("made", [False, True], ids=["new file", "existing file"])
def test_two_processes_add_at_once(tmp_path: Path, made: bool) -> None:
    kept = Store(tmp_path / "outcomes.sqlite")
    if made:
        kept.count()
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        halves = [pool.submit(add_many, str(kept.path), first, 20) for first in (1000, 2000)]
        numbers = [n for half in halves for n in half.result(timeout=60)]
    assert sorted(numbers) == list(range(1, 41))
    assert {o.id for _, o in kept.recent(100)} == {outcome(f + n).id for f in (1000, 2000) for n in range(20)}


def test_threads_share_a_store(kept: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda n: kept.add(outcome(n)), range(24)))
    assert sorted(numbers) == list(range(1, 25))
    assert kept.count() == 24


def test_threads_make_a_store_together(tmp_path: Path) -> None:
    for attempt in range(40):
        made = Store(tmp_path / f"{attempt}.sqlite")
        with ThreadPoolExecutor(8) as pool:
            assert sorted(pool.map(lambda n, made=made: made.add(outcome(n)), range(8))) == list(range(1, 9))


ENDLESS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from builders import outcome
from lsmlab.store import Store
kept, number = Store(Path(sys.argv[2])), int(sys.argv[3])
while True:
    kept.add(outcome(number))
    print(f"{number:012x}", flush=True)
    number += 1
"""


def test_kill_9_loses_nothing_that_was_added(kept: Store) -> None:
    reported: list[str] = []
    for round_number in range(3):
        start = 1 + round_number * 100_000
        with subprocess.Popen(
            [sys.executable, "-c", ENDLESS, str(Path(__file__).parent), str(kept.path), str(start)],
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            reported += [process.stdout.readline().strip() for _ in range(3 + 5 * round_number)]
            process.send_signal(signal.SIGKILL)
            reported += process.stdout.read().split()
            assert process.wait(timeout=30) == -signal.SIGKILL
    found = {o.id for _, o in kept.recent(10_000)}
    assert len(reported) >= 3 + 8 + 13
    assert set(reported) <= found
    assert len(found) <= len(reported) + 3  # at most the one that each was killed on
    kept.add(outcome(999))
    assert kept.get(outcome(999).id)[0] > len(reported)
