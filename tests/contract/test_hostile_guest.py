"""A guest that may say anything: the right answer or a ChannelError, in bounded time, and nothing is left behind."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from descriptors import descriptors
from lsmlab import attempt, facts, portal
from lsmlab.channel import agent
from lsmlab.channel.agent import AgentChannel, agent_source, command_result
from lsmlab.errors import ChannelError

Question = dict[str, Any]
Answering = Callable[[Question], bytes | None]
"""What the guest sends for a question: any bytes; None closes the connection."""

DONE = {
    "exit_code": 0, "signal": None, "out": "b3V0", "err": "", "timed_out": False, "too_much": False, "seconds": 0.5,
}  # fmt: skip
DEEP = 200_000


def right(question: Question, answer: object = "right") -> bytes:
    return b"\n" + json.dumps({"id": question["id"], "answer": answer}).encode() + b"\n"


class Peer:
    """The guest's end of a channel."""

    def __init__(self, end: socket.socket, answering: Answering) -> None:
        self.end = end
        self.questions: list[Question] = []
        self._answering = answering
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError), self.end.makefile("rb") as lines:
            for line in lines:
                self.questions.append(json.loads(line))
                answer = self._answering(self.questions[-1])
                if answer is None:
                    break
                self.end.sendall(answer)
        self._end()

    def _end(self) -> None:
        with contextlib.suppress(OSError):
            self.end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._end()
        self._thread.join(20)
        assert not self._thread.is_alive()
        self.end.close()


async def tasks() -> list[str]:
    return [repr(task) for task in asyncio.all_tasks() if task is not asyncio.current_task()]


OverPeer = Callable[[Answering], tuple[AgentChannel, Peer]]


@pytest.fixture
def over_peer() -> Iterator[OverPeer]:
    """A channel to a guest that answers as told. At the end nothing of it may be left."""
    portal.call(tasks())  # the loop, with its own descriptors, is there
    before = descriptors()
    opened: list[tuple[AgentChannel, Peer]] = []

    def connect(answering: Answering) -> tuple[AgentChannel, Peer]:
        ours, theirs = socket.socketpair()
        channel = AgentChannel(ours, "peer")
        channel.connect()
        opened.append((channel, Peer(theirs, answering)))
        return opened[-1]

    yield connect
    for channel, peer in opened:
        start = time.monotonic()
        channel.close()
        channel.close()
        assert time.monotonic() - start < 3
        with pytest.raises(ChannelError, match="closed"):
            channel.ask("ping")
        peer.close()
    assert opened
    assert portal.call(tasks()) == []
    assert descriptors() <= before


def nothing(_: Question) -> bytes:
    return b""


# Noise


NOISE: dict[str, Callable[[Question], bytes]] = {
    "empty-lines": lambda _: b"\n" * 100_000,
    "garbage": lambda _: os.urandom(100_000).replace(b"\n", b"") + b"\n",
    "nul-bytes": lambda _: bytes(100_000) + b"\n",
    "not-utf-8": lambda q: b'{"id": %d, "answer": "\xff\xfe"}\n' % q["id"],
    "utf-16": lambda q: json.dumps({"id": q["id"], "answer": "wrong"}).encode("utf-16-le") + b"\n",
    "half-an-answer": lambda q: b'{"id": %d, "answer": "wro\n' % q["id"],
    "two-answers-in-one": lambda q: b'{"id": %d, "answer": "wrong"}{"id": %d}\n' % (q["id"], q["id"]),
    "no-object": lambda q: b'5\nnull\n[1, 2]\n"text"\n[{"id": %d, "answer": "wrong"}]\ntrue\nNaN\n' % q["id"],
    "no-id": lambda _: b'{}\n{"answer": "wrong"}\n',
    "another-id": lambda q: b'{"id": %d, "answer": "wrong"}\n' % (q["id"] + 1),
    "ids-that-are-no-numbers": lambda q: b"".join(
        b'{"id": %s, "answer": "wrong"}\n' % json.dumps(one).encode()
        for one in (None, True, False, [], {}, [q["id"]], {"id": 1}, str(q["id"]), float(q["id"]), float("nan"), 1e400)
    ),
    "a-huge-id": lambda _: b'{"id": %s, "answer": "wrong"}\n' % (b"9" * 4000),
    "a-hugest-id": lambda _: b'{"id": %s, "answer": "wrong"}\n' % (b"9" * 1_000_000),
    "huge-integers": lambda q: b'{"id": %d, "answer": %s}\n' % (q["id"], b"7" * 1_000_000),
    "deep-lists": lambda q: b'{"id": %d, "answer": %s%s}\n' % (q["id"], b"[" * DEEP, b"]" * DEEP),
    "deep-objects": lambda q: b'{"id": %d, "answer": %s1%s}\n' % (q["id"], b'{"a":' * DEEP, b"}" * DEEP),
    "open-lists": lambda _: b"[" * DEEP + b"\n",
    "ready-spam": lambda _: b"ready\n" * 100_000,
    "stale-answers": lambda q: b"".join(b'\n{"id": %d, "answer": "wrong"}\n' % (q["id"] - n) for n in range(1, 20_000)),
}


@pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
def test_noise_before_the_answer_does_not_matter(over_peer: OverPeer, noise: Callable[[Question], bytes]) -> None:
    channel, peer = over_peer(lambda question: noise(question) + right(question, len(peer.questions)))
    for number in (1, 2):
        assert channel.ask("ping", within=30) == number


@pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
def test_noise_without_an_answer_is_an_error_in_time(over_peer: OverPeer, noise: Callable[[Question], bytes]) -> None:
    channel, _ = over_peer(noise)
    start = time.monotonic()
    with pytest.raises(ChannelError, match="ping: no answer from the agent in 0 s"):
        channel.ask("ping", within=0.4)
    assert 0.4 <= time.monotonic() - start < 5


def test_noise_without_end_is_an_error_in_time(over_peer: OverPeer) -> None:
    def pour(peer: Peer) -> None:
        for noise in itertools.cycle((b"ready\n" * 10_000, b"\n" * 60_000, b'{"id": 1}\n' * 6_000)):
            try:
                peer.end.sendall(noise)
            except OSError:
                return

    channel, peer = over_peer(nothing)
    pouring = threading.Thread(target=pour, args=(peer,), daemon=True)
    pouring.start()
    start = time.monotonic()
    with pytest.raises(ChannelError, match="no answer"):
        channel.ask("ping", within=1)
    assert time.monotonic() - start < 10
    channel.close()
    pouring.join(20)
    assert not pouring.is_alive()


# Too long


def test_a_line_without_end_is_an_error_at_once_and_costs_no_memory(
    over_peer: OverPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "ANSWER_BYTES", 1 << 20)
    channel, peer = over_peer(nothing)

    def pour() -> None:
        try:
            for _ in range(1000):
                peer.end.sendall(b"x" * 100_000)
        except OSError:
            return

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pouring = threading.Thread(target=pour, daemon=True)
    pouring.start()
    start = time.monotonic()
    with pytest.raises(ChannelError, match=r"ping: (an answer of more than 1 MiB|no answer)"):
        channel.ask("ping", within=5)
    assert time.monotonic() - start < 10
    pouring.join(60)
    assert not pouring.is_alive(), "the guest is not read any more"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10  # KiB


def test_an_answer_that_is_too_long_is_an_error_and_the_channel_goes_on(
    over_peer: OverPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "ANSWER_BYTES", 100_000)
    channel, _ = over_peer(lambda question: right(question, "y" * question["size"]))
    empty = len(right({"id": 1 << 47, "size": 0}, "")) - 2
    for size in (10, 200_000, 99_000, 5_000_000, 10):
        if size + empty > 100_000:
            with pytest.raises(ChannelError, match="an answer of more than 0 MiB"):
                channel.ask("ping", size=size, within=20)
        else:
            assert channel.ask("ping", size=size, within=20) == "y" * size


def test_a_window_of_the_largest_size_comes_through(over_peer: OverPeer) -> None:
    whole = "\x1d" * attempt.WINDOW_BYTES  # six bytes each
    channel, _ = over_peer(lambda question: right(question, whole))
    assert channel.ask("close_window", within=60) == whole


# Silence, the end, the order


def test_silence_is_an_error_in_time(over_peer: OverPeer) -> None:
    channel, _ = over_peer(nothing)
    for within in (0.2, 1.0):
        start = time.monotonic()
        with pytest.raises(ChannelError, match="no answer"):
            channel.ask("ping", within=within)
        assert within <= time.monotonic() - start < within + 3


def test_a_guest_that_reads_nothing_is_an_error_in_time(over_peer: OverPeer) -> None:
    def sleep(_: Question) -> bytes:
        time.sleep(2)
        return b""

    channel, _ = over_peer(sleep)
    start = time.monotonic()
    for _ in range(2):
        with pytest.raises(ChannelError, match="write: no answer"):
            channel.ask("write", within=0.3, path="/x", data="x" * (16 << 20))
    assert time.monotonic() - start < 6


@pytest.mark.parametrize(
    "sent", [b"", b'\n{"id": ', b"ready\n", b"x" * 100_000], ids=["nothing", "half", "ready", "much"]
)
def test_a_guest_that_goes_in_the_middle_is_an_error_at_once(over_peer: OverPeer, sent: bytes) -> None:
    def go(_: Question) -> None:
        peer.end.sendall(sent)

    channel, peer = over_peer(go)
    start = time.monotonic()
    for _ in range(2):
        with pytest.raises(ChannelError, match=r"closed|reset|[Bb]roken"):
            channel.ask("ping", within=30)
    assert time.monotonic() - start < 10


def test_closing_ends_whoever_waits(over_peer: OverPeer) -> None:
    channel, _ = over_peer(nothing)
    threading.Timer(0.3, channel.close).start()
    start = time.monotonic()
    with pytest.raises(ChannelError, match="the channel was closed"):
        channel.ask("ping", within=30)
    assert time.monotonic() - start < 10


def test_answers_in_another_order_go_to_their_questions(over_peer: OverPeer) -> None:
    count, kept = 20, list[Question]()

    def last_first(question: Question) -> bytes:
        kept.append(question)
        if len(kept) < count:
            return b""
        return b"".join(right(one, one["word"]) for one in reversed(kept))

    channel, _ = over_peer(last_first)
    found: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: channel.ask("ping", word=n, within=30)}))
        for n in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
    assert found == {n: n for n in range(count)}


def test_an_answer_after_its_time_is_nobodys(over_peer: OverPeer) -> None:
    late = list[bytes]()

    def one_late(question: Question) -> bytes:
        late.append(right(question, f"to {len(late)}"))
        return b"" if len(late) == 1 else late[0] + late[1] + late[0]

    channel, _ = over_peer(one_late)
    with pytest.raises(ChannelError, match="no answer"):
        channel.ask("ping", within=0.2)
    assert channel.ask("ping", within=20) == "to 1"


def test_the_first_answer_counts(over_peer: OverPeer) -> None:
    channel, _ = over_peer(lambda question: right(question, "first") + right(question, "second"))
    assert [channel.ask("ping", within=20) for _ in range(3)] == ["first"] * 3


def test_two_channels_ask_by_other_numbers(over_peer: OverPeer) -> None:
    numbers = []
    for _ in range(2):
        channel, peer = over_peer(right)
        channel.ask("ping", within=20)
        numbers.append(peer.questions[0]["id"])
    assert numbers[0] != numbers[1]


# The start


def test_the_agent_is_sent_as_the_first_line() -> None:
    ours, theirs = socket.socketpair()
    channel = AgentChannel(ours, "peer")
    with theirs, theirs.makefile("rb") as lines:
        channel.connect()
        sent: list[bytes] = []

        def load() -> None:
            sent.append(lines.readline())
            theirs.sendall(b"ready\n")

        thread = threading.Thread(target=load)
        thread.start()
        channel.bootstrap(20)
        thread.join()
        assert base64.b64decode(sent[0], validate=False) == agent_source()
        assert sent[0].count(b"\n") == 1
        channel.close()


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (b"", "did not answer within 0 s"),
        (b"garbage\nready", "did not answer within 0 s"),
        (b"ready \n", "did not answer within 0 s"),
        (b"x" * 300_000, "did not answer within 0 s"),
        (None, "closed|reset"),
        (b"noise\n\xff\nready\n", ""),
    ],
    ids=["silence", "no-newline", "another-word", "much", "gone", "noise"],
)
def test_a_guest_whose_agent_does_not_start(said: bytes | None, words: str) -> None:
    ours, theirs = socket.socketpair()
    channel = AgentChannel(ours, "peer")
    channel.connect()
    with theirs:
        if said is None:
            theirs.close()
        else:
            theirs.sendall(said)
        start = time.monotonic()
        if words:
            with pytest.raises(ChannelError, match=words):
                channel.bootstrap(0.4)
        else:
            channel.bootstrap(20)
        assert time.monotonic() - start < 5
        channel.close()


def test_an_agent_that_never_comes_up(over_peer: OverPeer) -> None:
    channel, _ = over_peer(nothing)
    with pytest.raises(ChannelError, match="ping: no answer"):
        channel.wait_until_up(0.2)


def test_a_channel_that_was_never_connected() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        channel = AgentChannel(ours, "peer")
        for act in (lambda: channel.ask("ping"), lambda: channel.bootstrap(5), lambda: channel.run(["true"])):
            with pytest.raises(ChannelError, match="not connected"):
                act()
        channel.close()
        channel.close()
        assert ours.fileno() == -1


# What the answers say


def test_the_agents_answer_becomes_a_result(over_peer: OverPeer) -> None:
    channel, _ = over_peer(lambda question: right(question, {**DONE, "exit_code": 4}))
    result = channel.run(["x"])
    assert (result.exit_code, result.signal, result.stdout, result.stderr, result.seconds) == (
        4,
        None,
        b"out",
        b"",
        0.5,
    )


NONSENSE: list[Any] = [
    None, 5, "nonsense", [], {}, [DONE], {"exit_code": 0},
    {key: value for key, value in DONE.items() if key != "err"},
    {**DONE, "exit_code": None}, {**DONE, "signal": 9},
]  # fmt: skip
WRONG: dict[str, tuple[Any, ...]] = {
    "exit_code": (-1, 256, 10**4000, 0.0, "0", True, []),
    "out": ("!", 7, None, "b3V", "b3V0\n", "é", ["b3V0"]),
    "err": ("=", {}),
    "seconds": (None, "1", 1, float("nan"), float("inf")),
    "timed_out": (None, 0, "no"),
    "too_much": (None, 1, "no"),
}
NONSENSE += [{**DONE, key: one} for key, ones in WRONG.items() for one in ones]
NONSENSE += [{**DONE, "exit_code": None, "signal": one} for one in (0, -9, 65, 10**4000, "9")]


@pytest.mark.parametrize("answer", NONSENSE, ids=lambda answer: str(answer)[:60])
def test_nonsense_is_an_error_of_the_channel(answer: object) -> None:
    heard = json.loads(json.dumps(answer))
    with pytest.raises(ChannelError, match="answered nonsense") as caught:
        command_result(heard, ("x",), "peer")
    assert len(str(caught.value)) < 2000


def test_nested_nonsense_is_an_error_of_the_channel(over_peer: OverPeer) -> None:
    for depth in range(100, 1000, 50):
        deep = b"[" * depth + b"]" * depth

        def nested(question: Question, deep: bytes = deep) -> bytes:
            return b'{"id": %d, "answer": %s}\n' % (question["id"], deep)

        channel, _ = over_peer(nested)
        with pytest.raises(ChannelError):
            channel.run(["x"], timeout=-29)


def test_output_beyond_what_is_carried_is_an_error() -> None:
    with pytest.raises(ChannelError, match="more output than the agent carries"):
        command_result({**DONE, "too_much": True, "exit_code": None, "signal": 9}, ("x",), "peer")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("two\nlines\r\t", "two\nlines\\r\\t"),
        ("\ud800 \u202e é", r"\ud800 \u202e é"),
        (["a", 5], "['a', 5]"),
        (None, "None"),
        ("z" * 1_000_000, "z" * 2000),
    ],
    ids=["escapes", "lines", "surrogate", "list", "null", "long"],
)
def test_the_guests_words_are_fit_for_a_terminal(over_peer: OverPeer, error: object, words: str) -> None:
    def answer(question: Question) -> bytes:
        return json.dumps({"id": question["id"], "error": error}).encode() + b"\n"

    channel, _ = over_peer(answer)
    with pytest.raises(ChannelError) as caught:
        channel.ask("ping", within=20)
    assert str(caught.value) == f"peer: ping: {words}"
    assert str(caught.value).encode()


def test_an_answer_that_is_neither_is_nonsense(over_peer: OverPeer) -> None:
    channel, _ = over_peer(lambda question: b'{"id": %d}\n' % question["id"])
    with pytest.raises(ChannelError, match="ping: nonsense"):
        channel.ask("ping", within=20)


@pytest.mark.parametrize("lsm", [None, "selinux", [5], ["\ud800"], [[]], {"a": 1}, [["x"] * 3]], ids=str)
def test_facts_that_are_none_are_an_error(over_peer: OverPeer, lsm: object) -> None:
    channel, _ = over_peer(lambda question: right(question, {"lsm": lsm, "selinux_enforcing": None, "profiles": None}))
    with pytest.raises(ChannelError, match="the agent answered nonsense"):
        facts.read(facts.ModeFacts, channel.ask("mode", within=20))


# The end of the program


@pytest.mark.parametrize("end", ["channel.close()", "pass"], ids=["closed", "not-closed"])
def test_a_program_ends_without_a_word_about_its_channels(end: str) -> None:
    script = f"""
import socket
from lsmlab.channel.agent import AgentChannel
from lsmlab.errors import ChannelError
ours, theirs = socket.socketpair()
channel = AgentChannel(ours, "peer")
channel.connect()
theirs.sendall(b"half a line")
try:
    channel.ask("ping", within=0.2)
except ChannelError as error:
    print(error)
{end}
theirs.close()
"""
    options = ["-X", "dev"] if end != "pass" else []
    done = subprocess.run([sys.executable, *options, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "peer: ping: no answer from the agent in 0 s\n"
