"""An image put into the engine of a guest: loaded, imported, or built there. Once a booted kernel of a scenario."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, urlencode

from lsmlab.channel.base import Channel
from lsmlab.container import context, install
from lsmlab.container.context import Context, Entry
from lsmlab.container.engine import Engine
from lsmlab.container.kept import LEAST_API
from lsmlab.container.spec import ContainerImage
from lsmlab.errors import EngineError

PIECE = 8 << 20
"""What goes over the channel at once, bytes."""
IN_GUEST = "/var/tmp/lsmlab-image.tar"  # noqa: S108 - a guest's, on its disk: /tmp is in its memory
BUILD_IN_GUEST = "/var/tmp/lsmlab-context.tar"  # noqa: S108
TAKE_SECONDS = 600.0
"""How long the engine may take to read an image, or to build one: some ten seconds for 100 MB under emulation."""
SHOWN_LINES = 12
"""Of what a build that fails has said."""
_COLOUR = re.compile("\x1b\\[[0-9;]*m")
"""Around what a step wrote to its standard error."""
_STEP = re.compile(r"^Step (\d+)/\d+ : ")

Tell = Callable[[str], None]


def load(channel: Channel, archive: Path, loaded: str, names: tuple[str, ...], tell: Tell) -> None:
    """Have the engine load a docker-archive, whose image it then calls `loaded`, and give it more names.

    Raises EngineError and ChannelError.
    """
    _send_file(channel, archive, tell)
    tell("the engine loads the image")
    _ask(channel, IN_GUEST, "/images/load", {"quiet": "1"}, f"loading {archive}")
    engine = Engine(channel)
    for name in names:
        engine.tag(loaded, name)


def import_tree(channel: Channel, tree: Path, name: str, tell: Tell) -> None:
    """Have the engine make an image of a root tree. Raises EngineError and ChannelError."""
    _send_file(channel, tree, tell)
    tell("the engine imports the root tree")
    repository, _, tag = name.partition(":")
    changes = ["ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "ENV LC_ALL=C"]
    asked = [("fromSrc", "-"), ("repo", repository), ("tag", tag), *(("changes", change) for change in changes)]
    _ask(channel, IN_GUEST, "/images/create", asked, f"importing {tree}")


def build(channel: Channel, image: ContainerImage, given: Context, tell: Tell) -> None:
    """Have the engine build an image, without a network. Raises EngineError with its words and the line."""
    if given.builds_on_busybox:
        tell("the engine makes the image that it is built on")
        _give_busybox(channel)
    tell(f"the engine builds {given.dockerfile.name}")
    said = _build(channel, given.tar(), given.dockerfile.name, image.name)
    if (fault := _fault(said)) is not None:
        raise _build_error(given, said, fault)


def _give_busybox(channel: Channel) -> None:
    """Put BusyBox itself into the image `lsmlab`, of this guest alone: elsewhere its program is mounted in, and while
    an image is built nothing can be mounted."""
    program = channel.run(["cat", "/bin/busybox"]).check().stdout
    files = (
        Entry("Dockerfile", 0o644, f"FROM {install.IMAGE}\nCOPY busybox {install.PROGRAM}\n".encode()),
        Entry("busybox", 0o755, program),
    )
    said = _build(channel, context.packed(files), "Dockerfile", f"{install.IMAGE}:latest")
    if (fault := _fault(said)) is not None:
        raise EngineError(f"the engine in the guest cannot make the image that others are built on: {fault}")


def _build(channel: Channel, tar: bytes, dockerfile: str, name: str) -> list[Mapping[str, Any]]:
    _send(channel, iter([tar]), BUILD_IN_GUEST)
    asked = {"t": name, "dockerfile": dockerfile, "networkmode": "none", "version": "1", "forcerm": "1", "pull": "0"}
    return _post(channel, BUILD_IN_GUEST, "/build", asked, f"building {dockerfile}")


def _build_error(given: Context, said: list[Mapping[str, Any]], fault: str) -> EngineError:
    lines = _COLOUR.sub("", "".join(str(one.get("stream", "")) for one in said)).splitlines()
    steps = [int(found[1]) for line in lines if (found := _STEP.match(line))]
    parsed = re.search(r"parse error on line (\d+)", fault)
    line = int(parsed[1]) if parsed else given.line_of_step(steps[-1] if steps else 1)
    shown = "".join(f"\n  {one[:200]}" for one in lines[-SHOWN_LINES:] if one.strip())
    return EngineError(f"{given.dockerfile}:{line}: the engine in the guest does not build this: {fault}{shown}")


# Over the channel


def _send_file(channel: Channel, file: Path, tell: Tell) -> None:
    total = file.stat().st_size
    with file.open("rb") as source:
        _send(channel, _pieces(source, total, tell), IN_GUEST)


def _pieces(source: IO[bytes], total: int, tell: Tell) -> Iterator[bytes]:
    sent = 0
    while piece := source.read(PIECE):
        tell(f"putting the image into the guest: {sent >> 20} of {total >> 20} MiB")
        yield piece
        sent += len(piece)


def _send(channel: Channel, pieces: Iterator[bytes], path: str) -> None:
    """Write a file of the guest piece by piece: the agent takes each whole into its memory."""
    channel.write_file(path, b"", mode=0o600)
    at = 0
    for large in pieces:
        for start in range(0, len(large), PIECE):
            piece = large[start : start + PIECE]
            argv = ["dd", f"of={path}", "bs=1M", f"seek={at}", "oflag=seek_bytes", "conv=notrunc", "status=none"]
            channel.run(argv, stdin=piece, timeout=120).check()
            at += len(piece)


def _ask(channel: Channel, path: str, at: str, asked: Any, what: str) -> None:
    if (fault := _fault(_post(channel, path, at, asked, what))) is not None:
        raise EngineError(f"the engine in the guest: {what}: {fault}")


def _post(channel: Channel, path: str, at: str, asked: Any, what: str) -> list[Mapping[str, Any]]:
    """Have the engine read the file `path` of the guest, which is gone afterwards; what it says, message by message."""
    version = ".".join(map(str, LEAST_API))
    argv = [
        "curl", "--silent", "--show-error", "--unix-socket", install.SOCKET, "--request", "POST",
        "--header", "Content-Type: application/x-tar", "--header", "Expect:", "--upload-file", path,
        f"http://engine/v{version}{at}?{urlencode(asked, quote_via=quote)}",
    ]  # fmt: skip
    done = channel.run(argv, timeout=TAKE_SECONDS)
    channel.run(["rm", "--force", path]).check()
    if not done.ok:
        raise EngineError(f"the engine in the guest: {what}: {done.err.strip()[:500] or done.ended()}")
    found: list[Mapping[str, Any]] = []
    for line in done.out.splitlines():
        try:
            one = json.loads(line)
        except ValueError:
            raise EngineError(f"the engine in the guest: {what}: it answered nonsense: {line[:200]!r}") from None
        if isinstance(one, dict):
            found.append(one)
    return found


def _fault(said: list[Mapping[str, Any]]) -> str | None:
    """What the engine says went wrong, within what it says or instead of it."""
    return next(
        (str(one.get("error") or one["message"])[:1000] for one in said if one.keys() & {"error", "message"}), None
    )
