"""What a lab's own policy tools say of profiles and types, asked natively in the image's own root tree: no guest boots.

As in `policy`, the distribution's programs are what answers: its parser, its abstractions, its policy.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lsmlab import cache, host
from lsmlab.errors import ImageError
from lsmlab.scenario import read_file

FOLDER = "/etc/apparmor.d"
PROBE = """
set -eu
cd "$1"
mkdir tree
tar -C tree -xf "$2"
mv sets ask tree/
PATH=$PATH:/usr/sbin:/sbin
chroot tree sh /ask
mv tree/sets sets
rm -rf tree
"""
ASK = """
set -eu
cd /sets
if [ -d /etc/selinux/default ]; then seinfo -t > types && seinfo -b > booleans; fi
command -v apparmor_parser > /dev/null || exit 0
apparmor_parser --names /etc/apparmor.d > names 2> /dev/null || :
for set in set-*; do
    cp -R /etc/apparmor.d $set/base
    cp $set/profiles/* $set/base/ 2> /dev/null || :
    number=0
    while read -r path; do
        number=$((number + 1))
        if [ -f "$set/base/$path" ]; then
            parser="apparmor_parser --base /sets/$set/base"
            $parser --skip-kernel-load --skip-cache "/sets/$set/base/$path" > $set/log-$number 2>&1 &&
                : > $set/ok-$number || :
            $parser --names "/sets/$set/base/$path" > $set/names-$number 2> /dev/null || :
        else
            echo "the image has no such profile" > $set/log-$number
        fi
    done < $set/paths
    rm -rf $set/base
done
"""

_NO_KERNEL = re.compile(r"^(?:Cache read/write disabled|Warning: unable to find a suitable fs).*$", re.MULTILINE)
"""Of a parser in a place without AppArmor's file system: nothing about the profile."""
_PLACED = re.compile(r"^AppArmor parser error for \S+(?: in (?:profile )?(\S+))? at line (\d+): *", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class ProfileSet:
    """Profiles that are loaded together: files of the host, and files that the image has in /etc/apparmor.d."""

    files: tuple[Path, ...] = ()
    shipped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Profile:
    """What the parser says of one file. `names` are the profiles in it, `words` its own message."""

    source: str
    compiles: bool
    words: str
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Probed:
    """What the image's tools said. None: the image has no such tool."""

    types: frozenset[str] | None
    """Every type of the distribution's SELinux policy. No aliases: a record of the kernel never has one."""
    booleans: frozenset[str] | None
    """Every boolean of it."""
    names: frozenset[str] | None
    """Every AppArmor profile that the distribution ships."""
    profiles: tuple[tuple[Profile, ...], ...]
    """For each set that was asked about, in the same order; empty where there is no parser."""


def examine(policy_tree: Path, sets: Sequence[ProfileSet]) -> Probed:
    """Compile each set's profiles, beside those that the distribution ships. Nothing is loaded into a kernel.

    Takes seconds. Raises HostError where no namespaces can be made here, ImageError for answers that make no sense.
    """
    with cache.making("probe", "policies were checked") as work:
        (work / "sets").mkdir()
        (work / "ask").write_text(ASK, "utf-8")
        for number, wanted in enumerate(sets):
            _put(work / "sets" / f"set-{number}", wanted)
        host.run(host.in_namespace(["sh", "-c", PROBE, "probe", str(work), str(policy_tree)]), what="checking policies")
        answers = work / "sets"
        names = _lines(answers / "names")
        return Probed(
            types=_listed(answers / "types"),
            booleans=_listed(answers / "booleans"),
            names=frozenset(names) if names is not None else None,
            profiles=()
            if names is None
            else tuple(_read(answers / f"set-{number}", wanted) for number, wanted in enumerate(sets)),
        )


def _put(folder: Path, wanted: ProfileSet) -> None:
    (folder / "profiles").mkdir(parents=True)
    for file in wanted.files:
        (folder / "profiles" / file.name).write_bytes(read_file(file))
    (folder / "paths").write_text("".join(f"{path}\n" for path, _ in _named(wanted)), "utf-8")


def _named(wanted: ProfileSet) -> list[tuple[str, str]]:
    """Where each profile lies below /etc/apparmor.d, and what it is called to a person."""
    own = [(file.name, str(file)) for file in wanted.files]
    return own + [(path.removeprefix(f"{FOLDER}/"), path) for path in wanted.shipped]


def _read(folder: Path, wanted: ProfileSet) -> tuple[Profile, ...]:
    found = []
    for number, (path, source) in enumerate(_named(wanted), 1):
        words = _lines(folder / f"log-{number}")
        if words is None:
            raise ImageError(f"{source}: the image's apparmor_parser gave no answer")
        found.append(
            Profile(
                source=source,
                compiles=(folder / f"ok-{number}").exists(),
                words=placed("\n".join(words), f"/sets/{folder.name}/base", path, source),
                names=tuple(_lines(folder / f"names-{number}") or ()),
            )
        )
    return tuple(found)


def placed(words: str, base: str, path: str, source: str) -> str:
    """The parser's words with the file that a person knows, and file and line in front: `FILE:3: syntax error`."""

    def known(name: str) -> str:
        return name.replace(f"{base}/{path}", source).replace(base, FOLDER)

    text = _PLACED.sub(lambda m: f"{m[1] or f'{base}/{path}'}:{m[2]}: ", _NO_KERNEL.sub("", words))
    return "\n".join(line for line in known(text).splitlines() if line.strip())


def _listed(file: Path) -> frozenset[str] | None:
    """What seinfo lists, each indented below a heading."""
    lines = _lines(file)
    return None if lines is None else frozenset(line.strip() for line in lines if line.startswith(" "))


def _lines(file: Path) -> list[str] | None:
    return file.read_text("utf-8", "replace").splitlines() if file.is_file() else None
