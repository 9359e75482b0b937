"""The folder that an image is built from: its Dockerfile, looked at without an engine, and all files as it takes them.

Nothing is executed here.
"""

from __future__ import annotations

import io
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lsmlab.definition import digest_of
from lsmlab.errors import DefinitionError

MOST_MIB = 64
"""What all files of a build context may take together: it goes into a guest."""
MOST_FILES = 2000
BUSYBOX, SCRATCH, BASE = "lsmlab", "scratch", "base"
"""What a Dockerfile here may build on: BusyBox, nothing, an image of a registry that the scenario names."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction of a Dockerfile; `line` is where it begins."""

    line: int
    word: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Entry:
    """A file, a folder or a link of a build context. `mode` as of stat(2); only who may execute it counts."""

    name: str
    mode: int
    data: bytes = b""
    target: str = ""


@dataclass(frozen=True, slots=True)
class Context:
    """A build context, read once."""

    dockerfile: Path
    instructions: tuple[Instruction, ...]
    entries: tuple[Entry, ...]

    @property
    def builds_on_busybox(self) -> bool:
        """Whether one of its stages does."""
        return any(name == BUSYBOX for _, name, _ in _stages(self.instructions))

    def digest(self) -> str:
        """SHA-256 over names, contents and who may execute what; where the folder lies does not matter."""
        parts: list[bytes | str] = [self.dockerfile.name]
        for entry in self.entries:
            parts += [entry.name, f"{_plain_mode(entry.mode):o}", entry.target, entry.data]
        return digest_of(*parts)

    def tar(self) -> bytes:
        """All of it as the engine takes it: the same bytes each time, owned by root."""
        return packed(self.entries)

    def line_of_step(self, number: int) -> int:
        """The line of the instruction that the engine counts as step `number`; 1 where there is no such step."""
        return self.instructions[number - 1].line if 0 < number <= len(self.instructions) else 1


def packed(entries: tuple[Entry, ...]) -> bytes:
    """Entries as a tar file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for entry in entries:
            member = tarfile.TarInfo(entry.name)
            member.mode, member.size = _plain_mode(entry.mode), len(entry.data)
            if entry.target:
                member.type, member.linkname = tarfile.SYMTYPE, entry.target
            elif stat.S_ISDIR(entry.mode):
                member.type = tarfile.DIRTYPE
            tar.addfile(member, io.BytesIO(entry.data))
    return buffer.getvalue()


def _plain_mode(mode: int) -> int:
    return 0o755 if stat.S_ISDIR(mode) or mode & 0o100 else 0o644


def read(dockerfile: Path, *, has_base: bool) -> Context:
    """The build context of `dockerfile`, which is its folder. `has_base`: it may build on `base`.

    Raises DefinitionError with file and line where an instruction needs what the engine does not have, and for a folder
    that is too large or leads out of itself.
    """
    try:
        text = dockerfile.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise DefinitionError(f"{dockerfile}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    found = tuple(_instructions(text))
    known = {BUSYBOX, SCRATCH, *([BASE] if has_base else [])}
    stages = list(_stages(found))
    if not stages:
        raise DefinitionError(f"{dockerfile}:1: no FROM: expected one of {', '.join(sorted(known))}")
    for line, name, alias in stages:
        if name not in known:
            hint = "`base: {registry: HOST/NAME@sha256:DIGEST}` beside `dockerfile` brings one: then `FROM base`."
            raise DefinitionError(
                f"{dockerfile}:{line}: FROM {name}: the engine in the guest has no network, and no such image; "
                f"expected one of {', '.join(sorted(known))}",
                hint="Say `FROM base`." if has_base else hint,
            )
        known |= {alias} - {""}
    return Context(dockerfile, found, _entries(dockerfile.parent))


def _instructions(text: str) -> Iterator[Instruction]:
    """Instructions with their continued lines; comments and empty lines between them do not count."""
    parts: list[str] = []
    start = 0
    for number, line in enumerate(text.splitlines(), 1):
        words = line.strip()
        if words.startswith("#"):
            continue
        piece = words.removesuffix("\\").strip()
        if piece and not parts:
            start = number
        parts += [piece] if piece else []
        if parts and words and not words.endswith("\\"):
            yield _instruction(start, parts)
            parts = []
    if parts:
        yield _instruction(start, parts)


def _instruction(line: int, parts: list[str]) -> Instruction:
    word, *arguments = " ".join(parts).split(None, 1)
    return Instruction(line, word.upper(), "".join(arguments))


def _stages(instructions: tuple[Instruction, ...]) -> Iterator[tuple[int, str, str]]:
    """Line, what it builds on, and its own name, of each FROM."""
    for one in instructions:
        if one.word == "FROM":
            words = [word for word in one.arguments.split() if not word.startswith("--")]
            alias = words[2].lower() if len(words) == 3 and words[1].lower() == "as" else ""
            yield one.line, words[0].lower() if words else "", alias


def _entries(folder: Path) -> tuple[Entry, ...]:
    root = folder.resolve()
    found: list[Entry] = []
    total = 0
    for path in sorted(root.rglob("*")):
        if len(found) == MOST_FILES:
            raise _too_large(folder, f"more than {MOST_FILES} files")
        entry = _entry(root, path)
        total += len(entry.data)
        if total > MOST_MIB << 20:
            raise _too_large(folder, f"more than {MOST_MIB} MiB")
        found.append(entry)
    return tuple(found)


def _too_large(folder: Path, words: str) -> DefinitionError:
    return DefinitionError(
        f"{folder}: {words}: too much for a build context, which goes into a guest",
        hint="The Dockerfile's folder is the context: give it a folder of its own, with what it copies alone.",
    )


def _entry(root: Path, path: Path) -> Entry:
    try:
        status = path.lstat()
        name = str(path.relative_to(root))
        if stat.S_ISLNK(status.st_mode):
            if not path.resolve().is_relative_to(root) or path.readlink().is_absolute():
                raise DefinitionError(f"{path}: a link that leads out of the build context, to {path.readlink()}")
            return Entry(name, status.st_mode, target=str(path.readlink()))
        if stat.S_ISDIR(status.st_mode):
            return Entry(name, status.st_mode)
        if not stat.S_ISREG(status.st_mode):
            raise DefinitionError(f"{path}: neither file, folder nor link: nothing that a build context can have")
        if status.st_size > MOST_MIB << 20:
            raise _too_large(root, f"more than {MOST_MIB} MiB")
        return Entry(name, status.st_mode, path.read_bytes())
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise DefinitionError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
