"""Files from elsewhere, over HTTP: with progress, and going on where an earlier attempt stopped."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import requests

from lsmlab import cache, paths
from lsmlab.definition import digest_of
from lsmlab.errors import DamagedError, DownloadError
from lsmlab.progress import Progress

PART, ABOUT = "part", "about.json"
CONNECT_SECONDS, READ_SECONDS = 15, 60
"""How long a server may take to be reached, and then between two pieces."""
PIECE = 1 << 14
"""What is read at once, bytes: of a piece that the connection breaks in, nothing is kept."""
ROOM_MIB = 64
"""How much has to be free at least for each further part of a file whose length the server does not say."""
_LENGTH = re.compile(r"[0-9]{1,18}")
_RANGE = re.compile(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18})")


def is_address(source: str) -> bool:
    """Whether `source` is to be fetched from somewhere, and is no file here."""
    return "://" in source


def shown(address: str) -> str:
    """The address without what may be secret in it: a password, a signed query."""
    scheme, _, rest = address.partition("://")
    return f"{scheme}://{re.split('[?#]', rest)[0].rpartition('@')[2]}"


@contextmanager
def fetched(address: str, progress: Progress, task: str) -> Iterator[Path]:
    """The file at `address` (http or https), whole, while the block lasts.

    It is kept where the connection breaks, or the block is left by an error that is not the file's own (that is, a
    DamagedError), and then not fetched again. Raises DownloadError that says what to do, and HostError for a full disk.
    """
    scheme = address.partition("://")[0].lower()
    if scheme not in {"http", "https"}:
        raise DownloadError(f"{shown(address)}: expected an address that begins with http:// or https://")
    folder = paths.cache() / "downloads" / digest_of(address)[:24]
    with (
        cache.lock(
            paths.cache() / "locks" / f"download-{folder.name}",
            waiting=lambda: progress.step(task, "another run is downloading this; waiting"),
        ),
        cache.use(folder),
    ):
        paths.make(folder)
        with cache.full_disk_is_said(f"{shown(address)} was downloaded"):
            _fetch(address, folder, progress, task)
        try:
            yield folder / PART
        except DamagedError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)


def small(address: str, most: int) -> bytes:
    """What lies at `address`, of at most `most` bytes. Raises DownloadError that says what to do."""
    name = shown(address)
    try:
        with requests.get(address, stream=True, timeout=(CONNECT_SECONDS, READ_SECONDS)) as answer:
            if answer.status_code != requests.codes.ok:
                raise DownloadError(f"{name}: the server says {answer.status_code} {answer.reason}")
            data = bytearray()
            for piece in answer.iter_content(PIECE):
                data += piece
                if len(data) > most:
                    raise DownloadError(f"{name}: more than {most} bytes, which it cannot be")
    except (requests.RequestException, ValueError) as error:
        raise DownloadError(f"{name}: {_words(error)}", hint="See that the address is right, or try later.") from error
    return bytes(data)


def length(address: str) -> int | None:
    """How long the file at `address` is, bytes, without fetching it; None where the server does not say.

    Raises DownloadError where it is not there.
    """
    name = shown(address)
    try:
        answer = requests.head(address, allow_redirects=True, timeout=(CONNECT_SECONDS, READ_SECONDS))
    except (requests.RequestException, ValueError) as error:
        raise DownloadError(f"{name}: {_words(error)}", hint="See that the address is right, or try later.") from error
    if answer.status_code != requests.codes.ok:
        raise DownloadError(f"{name}: the server says {answer.status_code} {answer.reason}")
    said = answer.headers.get("Content-Length", "")
    return int(said) if _LENGTH.fullmatch(said) else None


def _fetch(address: str, folder: Path, progress: Progress, task: str) -> None:
    part, name = folder / PART, shown(address)
    progress.step(task, f"asking for {name}")
    validator = _validator_of(folder)
    have = part.stat().st_size if validator and part.exists() else 0
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": validator}
    try:
        with requests.get(address, headers=headers, stream=True, timeout=(CONNECT_SECONDS, READ_SECONDS)) as answer:
            start, total = _extent(name, answer, part, have)
            if start == 0:
                _remember(folder, answer)
            if start != total:
                _receive(name, answer, part, start, total, progress, task)
    except (requests.RequestException, ValueError) as error:  # ValueError: an address that is none
        raise DownloadError(f"{name}: {_words(error)}", hint=_resume_hint(folder)) from error
    got = part.stat().st_size
    if total is not None and got != total:
        raise DownloadError(
            f"{name}: the connection ended after {got >> 20} of {total >> 20} MiB", hint=_resume_hint(folder)
        )


def _extent(name: str, answer: requests.Response, part: Path, have: int) -> tuple[int, int | None]:
    """Where the answer's body begins, and how long the whole file is, bytes. Raises DownloadError."""
    if answer.headers.get("Content-Encoding", "identity") != "identity":
        raise DownloadError(f"{name}: the server packs the file anew, which was not asked for")
    if answer.status_code == requests.codes.partial_content and have:
        found = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        if found is None or int(found[1]) != have:
            raise DownloadError(f"{name}: the server sent another part than was asked for")
        return have, int(found[2])
    if answer.status_code == requests.codes.requested_range_not_satisfiable and have:
        if answer.headers.get("Content-Range") == f"bytes */{have}":
            return have, have  # all of it is here
        part.unlink()
        raise DownloadError(
            f"{name}: the file there is shorter than what is here of it", hint="The same command begins anew."
        )
    if answer.status_code != requests.codes.ok:
        hint = "See that the address is right." if 400 <= answer.status_code < 500 else "Try again later."
        raise DownloadError(f"{name}: the server says {answer.status_code} {answer.reason}", hint=hint)
    length = answer.headers.get("Content-Length", "")
    return 0, int(length) if _LENGTH.fullmatch(length) else None


def _receive(
    name: str, answer: requests.Response, part: Path, start: int, total: int | None, progress: Progress, task: str
) -> None:
    got, told = start, -1
    if total is not None:
        cache.need_mib((total - start) >> 20, "the rest of the download")
    with part.open("r+b" if start else "wb") as handle:
        handle.seek(start)
        for piece in answer.iter_content(PIECE):
            got += len(piece)
            if total is not None and got > total:
                raise DownloadError(f"{name}: the server sends more than it said")
            handle.write(piece)
            tenth = got * 10 // total if total else got // (ROOM_MIB << 20)
            if tenth != told:
                if total is None:
                    cache.need_mib(ROOM_MIB, "the next part of the download")
                of = f" of {total >> 20}" if total else ""
                progress.step(task, f"downloading: {got >> 20}{of} MiB")
                told = tenth


def _validator_of(folder: Path) -> str:
    """What an earlier attempt's server called the file's version; empty where it said nothing."""
    with suppress(OSError, ValueError, AttributeError):
        return str(json.loads((folder / ABOUT).read_text("utf-8")).get("validator", ""))
    return ""


def _remember(folder: Path, answer: requests.Response) -> None:
    tag = answer.headers.get("ETag", "")
    validator = tag if tag and not tag.startswith("W/") else answer.headers.get("Last-Modified", "")
    (folder / PART).unlink(missing_ok=True)  # first: a part of another version has no such validator
    (folder / ABOUT).write_text(json.dumps({"validator": validator}), "utf-8")


def _words(error: Exception) -> str:
    """What went wrong, without the layers around it."""
    if isinstance(error, requests.Timeout):
        return "the server does not answer"
    inner: BaseException = error
    while (below := inner.__cause__ or inner.__context__) is not None:
        inner = below
    return getattr(inner, "strerror", None) or str(inner) or type(inner).__name__


def _resume_hint(folder: Path) -> str:
    """What to do. A part that nothing vouches for is not kept: it could not be gone on with."""
    part = folder / PART
    if not _validator_of(folder):
        part.unlink(missing_ok=True)
    kept = part.stat().st_size >> 20 if part.exists() else 0
    again = "See that the address is right, or try again later."
    return f"The same command goes on behind the {kept} MiB that are here." if kept else again
