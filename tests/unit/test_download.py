"""Downloads from a real server on this machine: whole or not at all, and going on where the connection broke."""

from __future__ import annotations

import gzip
import itertools
import os
import re
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from entries import Notes

from lsmlab import cache, download, inventory
from lsmlab.errors import DamagedError, DownloadError, HostError, ImageError, LsmlabError

CONTENT = os.urandom(3 << 20)


class Server(ThreadingHTTPServer):
    """Serves `content` at any path. `cut`: how many bytes of each body go out before the connection ends."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.tag: str | None = '"one"'
        self.status = 200
        self.cut: Iterator[int] = itertools.repeat(1 << 40)
        self.length = True
        self.headers: dict[str, str] = {}
        self.asked: list[str | None] = []
        """The Range of each request."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/image"


class Handler(BaseHTTPRequestHandler):
    """Answers as its server says."""

    server: Server

    def do_GET(self) -> None:
        """Of http.server: one request."""
        server = self.server
        server.asked.append(self.headers["Range"])
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        start = int(wanted[1]) if wanted and self.headers["If-Range"] == server.tag else 0
        if start >= len(server.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            self.send_header("Content-Length", "9")
            self.end_headers()
            self.wfile.write(b"no range\n")
            return
        body = server.content[start:]
        self.send_response(206 if start else server.status)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        if server.tag:
            self.send_header("ETag", server.tag)
        if server.length:
            self.send_header("Content-Length", str(len(body)))
        for name, value in server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: next(server.cut)])

    def log_message(self, *_: object) -> None:
        """Of http.server: says nothing."""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LSMLAB_HOME", str(tmp_path / "home"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "home"


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as serving:
        threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield serving
        serving.shutdown()


def fetch(address: str) -> bytes:
    with download.fetched(address, Notes(), "image") as path:
        return path.read_bytes()


def refused(address: str) -> LsmlabError:
    with pytest.raises(LsmlabError) as caught:
        fetch(address)
    return caught.value


def answering_range(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """Have the server say of a part that it is another one."""
    send = Handler.send_header
    other = {"Content-Range": value}
    monkeypatch.setattr(Handler, "send_header", lambda self, name, was: send(self, name, str(other.get(name, was))))


def kept(home: Path) -> list[bytes]:
    return [path.read_bytes() for path in (home / "cache" / "downloads").glob("*/part")]


def test_a_file_is_fetched_and_not_kept(server: Server, home: Path) -> None:
    notes = Notes()
    with download.fetched(server.address, notes, "image") as path:
        assert path.read_bytes() == CONTENT
        assert inventory.entries()[0].in_use
    assert kept(home) == []
    assert list((home / "cache" / "downloads").iterdir()) == []
    assert "downloading: 3 of 3 MiB" in notes.steps
    assert len(notes.steps) < 15


def test_a_file_without_a_length_is_fetched(server: Server) -> None:
    server.length = False
    assert fetch(server.address) == CONTENT


def test_a_broken_download_goes_on_where_it_stopped(server: Server, home: Path) -> None:
    server.cut = iter([1 << 20, 1 << 19, 1 << 40])
    for got in (1 << 20, 3 << 19):
        error = refused(server.address)
        assert isinstance(error, DownloadError)
        assert "goes on behind the 1 MiB" in error.hint
        assert kept(home) == [CONTENT[:got]]
        (entry,) = inventory.entries()
        assert (entry.kind, entry.status, entry.in_use) == ("download", inventory.Status.UNFINISHED, False)
    assert fetch(server.address) == CONTENT
    assert server.asked == [None, f"bytes={1 << 20}-", f"bytes={3 << 19}-"]


def test_a_whole_file_that_could_not_be_used_is_kept(server: Server, home: Path) -> None:
    for _ in range(2):
        with pytest.raises(HostError), download.fetched(server.address, Notes(), "image"):
            raise HostError("no room to unpack it")
        assert kept(home) == [CONTENT]
    assert server.asked == [None, f"bytes={len(CONTENT)}-"]


def test_a_file_that_is_at_fault_itself_is_not_kept(server: Server, home: Path) -> None:
    with pytest.raises(ImageError), download.fetched(server.address, Notes(), "image"):
        raise ImageError("of a lab that is not known in this folder")
    assert kept(home) == [CONTENT]
    with pytest.raises(DamagedError), download.fetched(server.address, Notes(), "image"):
        raise DamagedError("its digest is another")
    assert kept(home) == []


def test_a_server_that_sends_more_than_it_said_is_not_believed(
    server: Server, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.cut = iter([1 << 20, 1 << 40])
    refused(server.address)
    answering_range(monkeypatch, f"bytes {1 << 20}-{len(CONTENT) - 1}/{(1 << 20) + 10}")
    assert "sends more than it said" in refused(server.address).message
    assert len(kept(home)[0]) <= (1 << 20) + 10


def test_a_file_that_is_packed_on_the_way_is_refused(server: Server, home: Path) -> None:
    server.content = gzip.compress(bytes(8 << 20))
    server.headers = {"Content-Encoding": "gzip"}
    assert "packs the file anew" in refused(server.address).message
    assert kept(home) == []


def test_of_a_file_without_a_length_no_more_is_taken_than_there_is_room(
    server: Server, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.length, server.tag = False, None
    monkeypatch.setattr(cache, "free_mib", lambda: download.ROOM_MIB - 1)
    assert "MiB free; the next part of the download takes up to" in refused(server.address).message


@pytest.mark.parametrize("address", ["http://", "http://[::1/", "http://a..b/x", "http://127.0.0.1:99999999/x"])
def test_an_address_that_is_none_is_told(address: str) -> None:
    error = refused(address)
    assert isinstance(error, DownloadError)
    assert "See that the address is right" in error.hint


@pytest.mark.parametrize("target", ["file:///etc/passwd", "http://.a..b/", "http://[::1/"])
def test_a_redirection_to_nowhere_is_told(server: Server, target: str) -> None:
    server.status, server.headers = 302, {"Location": target}
    assert isinstance(refused(server.address), DownloadError)


def test_what_may_be_secret_in_an_address_is_not_shown(server: Server) -> None:
    server.status = 404
    secret = server.address.replace("//", "//bob:s3cret@") + "?signed=s3cret#s3cret"
    notes = Notes()
    with pytest.raises(DownloadError) as caught, download.fetched(secret, notes, "image"):
        pass
    assert "s3cret" not in str(caught.value) + "".join(notes.steps)
    assert download.shown(secret) == server.address


def test_more_than_the_server_has_is_told(server: Server, home: Path) -> None:
    server.cut = iter([1 << 20, 1 << 40])
    refused(server.address)
    server.content = CONTENT[:500_000]
    assert "shorter than what is here" in refused(server.address).message
    assert fetch(server.address) == server.content


def test_another_version_is_fetched_from_its_beginning(server: Server) -> None:
    server.cut = iter([1 << 20, 1 << 40])
    refused(server.address)
    server.content, server.tag = os.urandom(2 << 20), '"two"'
    assert fetch(server.address) == server.content


@pytest.mark.parametrize("tag", [None, 'W/"weak"'])
def test_what_no_server_vouches_for_is_not_gone_on_with(server: Server, tag: str | None) -> None:
    server.tag = tag
    server.cut = iter([1 << 20, 1 << 40])
    refused(server.address)
    assert fetch(server.address) == CONTENT
    assert server.asked == [None, None]


def test_a_server_that_sends_another_part_is_not_believed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.cut = iter([1 << 20, 1 << 40])
    refused(server.address)
    answering_range(monkeypatch, f"bytes 5-{len(CONTENT) - 1}/{len(CONTENT)}")
    assert "another part than was asked for" in refused(server.address).message


@pytest.mark.parametrize(("status", "hint"), [(404, "See that the address is right."), (503, "Try again later.")])
def test_what_the_server_refuses_is_told(server: Server, home: Path, status: int, hint: str) -> None:
    server.status = status
    error = refused(server.address)
    assert f"the server says {status}" in error.message
    assert error.hint == hint
    assert kept(home) == []


def test_a_server_that_is_not_there_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    error = refused(f"http://127.0.0.1:{port}/image")
    assert isinstance(error, DownloadError)
    assert "Connection refused" in error.message
    assert error.hint == "See that the address is right, or try again later."


@pytest.mark.parametrize("address", ["ftp://example.org/x", "file:///etc/passwd"])
def test_other_addresses_are_refused(address: str, home: Path) -> None:
    assert "expected an address that begins with http:// or https://" in refused(address).message
    assert not (home / "cache" / "downloads").exists()


def test_a_disk_too_small_is_told_before_it_is_full(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "free_mib", lambda: 2)
    error = refused(server.address)
    assert isinstance(error, HostError)
    assert "2 MiB free" in error.message


def test_an_unfinished_download_is_pruned(server: Server, home: Path) -> None:
    server.cut = iter([1 << 20])
    refused(server.address)
    pruned = inventory.prune(everything=False)
    assert [entry.kind for entry in pruned.removed] == ["download"]
    assert list((home / "cache" / "downloads").iterdir()) == []
