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
from lsmlab.errors import DownloadError, ImageError
from lsmlab.progress import Progress

PART, ABOUT = "part", "about.json"
CONNECT_SECONDS, READ_SECONDS = 15, 60
"""How long a server may take to be reached, and then between two pieces."""
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")


def is_address(source: str) -> bool:
    """Whether `source` is to be fetched from somewhere, and is no file here."""
    return "://" in source


@contextmanager
def fetched(address: str, progress: Progress, task: str) -> Iterator[Path]:
    """The file at `address` (http or https), whole, while the block lasts.

    It is kept where the connection breaks, or the block is left by an error that is not the file's own fault (an
    ImageError), and then not fetched again. Raises DownloadError that says what to do, and HostError where the disk is
    full.
    """
    scheme = address.partition("://")[0].lower()
    if scheme not in {"http", "https"}:
        raise DownloadError(f"{address}: expected an address that begins with http:// or https://")
    folder = paths.cache() / "downloads" / digest_of(address)[:24]
    with (
        cache.lock(
            paths.cache() / "locks" / f"download-{folder.name}",
            waiting=lambda: progress.step(task, "another run is downloading this; waiting"),
        ),
        cache.use(folder),
    ):
        paths.make(folder)
        with cache.full_disk_is_said(f"{address} was downloaded"):
            _fetch(address, folder, progress, task)
        try:
            yield folder / PART
        except ImageError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)


def _fetch(address: str, folder: Path, progress: Progress, task: str) -> None:
    part = folder / PART
    progress.step(task, f"asking for {address}")
    validator = _validator_of(folder, address)
    have = part.stat().st_size if validator and part.exists() else 0
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": validator}
    try:
        with requests.get(address, headers=headers, stream=True, timeout=(CONNECT_SECONDS, READ_SECONDS)) as answer:
            start, total = _extent(address, answer, part, have)
            if start == 0:
                _remember(folder, address, answer)
            if start != total:
                cache.need_mib((total - start) >> 20 if total else 0, "the rest of the download")
                _receive(answer, part, start, total, progress, task)
    except requests.RequestException as error:
        raise DownloadError(f"{address}: {_words(error)}", hint=_resume_hint(part)) from error
    got = part.stat().st_size
    if total is not None and got != total:
        raise DownloadError(
            f"{address}: the connection ended after {got >> 20} of {total >> 20} MiB", hint=_resume_hint(part)
        )


def _extent(address: str, answer: requests.Response, part: Path, have: int) -> tuple[int, int | None]:
    """Where the answer's body begins, and how long the whole file is, bytes. Raises DownloadError."""
    if answer.status_code == requests.codes.partial_content and have:
        found = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        if found is None or int(found[1]) != have:
            raise DownloadError(f"{address}: the server sent another part than was asked for")
        return have, int(found[2])
    if answer.status_code == requests.codes.requested_range_not_satisfiable and have:
        if answer.headers.get("Content-Range") == f"bytes */{have}":
            return have, have  # all of it is here
        part.unlink()
        raise DownloadError(
            f"{address}: the file there is shorter than what is here of it", hint="The same command begins anew."
        )
    if answer.status_code != requests.codes.ok:
        hint = "See that the address is right." if 400 <= answer.status_code < 500 else "Try again later."
        raise DownloadError(f"{address}: the server says {answer.status_code} {answer.reason}", hint=hint)
    length = answer.headers.get("Content-Length", "")
    return 0, int(length) if length.isascii() and length.isdigit() else None


def _receive(
    answer: requests.Response, part: Path, start: int, total: int | None, progress: Progress, task: str
) -> None:
    got, told = start, -1
    with part.open("r+b" if start else "wb") as handle:
        handle.seek(start)
        for piece in answer.iter_content(1 << 18):
            handle.write(piece)
            got += len(piece)
            tenth = got * 10 // total if total else got >> 27
            if tenth != told:
                of = f" of {total >> 20}" if total else ""
                progress.step(task, f"downloading: {got >> 20}{of} MiB")
                told = tenth


def _validator_of(folder: Path, address: str) -> str:
    """What an earlier attempt's server called the file's version; empty where it said nothing."""
    with suppress(OSError, ValueError, AttributeError):
        about = json.loads((folder / ABOUT).read_text("utf-8"))
        if about.get("address") == address:
            return str(about.get("validator", ""))
    return ""


def _remember(folder: Path, address: str, answer: requests.Response) -> None:
    tag = answer.headers.get("ETag", "")
    validator = tag if tag and not tag.startswith("W/") else answer.headers.get("Last-Modified", "")
    (folder / PART).unlink(missing_ok=True)  # first: a part of another version has no such validator
    (folder / ABOUT).write_text(json.dumps({"address": address, "validator": validator}), "utf-8")


def _words(error: requests.RequestException) -> str:
    """What went wrong, without the layers around it."""
    if isinstance(error, requests.Timeout):
        return "the server does not answer"
    inner: BaseException = error
    while (below := inner.__cause__ or inner.__context__) is not None:
        inner = below
    return getattr(inner, "strerror", None) or str(inner) or type(inner).__name__


def _resume_hint(part: Path) -> str:
    kept = part.stat().st_size >> 20 if part.exists() else 0
    return f"The same command goes on behind the {kept} MiB that are here." if kept else "Try again later."
