"""AppArmor profiles compiled natively, with the distribution's own parser, in a part of the image's own root tree.

As in `policy`: under emulation the parser takes a third of a second for what takes 20 ms here, byte for byte the same.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lsmlab import cache, host, paths
from lsmlab.definition import digest_of
from lsmlab.errors import HostError
from lsmlab.image.probe import FOLDER

SETTINGS = ("/etc/apparmor/", "/usr/share/apparmor-features/")
"""Where the parser's own settings lie, and the features that they may pin."""
COMPILE = """
set -eu
umask 022
export LC_ALL=C
cd "$1"
mkdir tree
tar -C tree -xf "$2" ./usr/sbin/apparmor_parser ./etc/apparmor ./etc/apparmor.d ./usr/share/apparmor-features
for part in ./lib ./lib64 ./usr/lib64 './usr/lib/*/ld-linux*' './usr/lib/*/libc.so*' './usr/lib/*/libm.so*' \\
    './usr/lib/*/libgcc_s.so*' './usr/lib/*/libstdc++.so*' './usr/lib/*/libapparmor.so*'
do echo "$part"; done > parts
if ! tar -C tree -xf "$2" --wildcards --files-from parts 2> tar.log # not every distribution has all
then
    if grep -v -e ': Not found in archive$' -e 'Exiting with failure status due to previous errors$' tar.log >&2
    then exit 1
    fi
fi
if find tree/etc/apparmor.d -type l | grep .; then echo "a link may lead to what is not here" >&2; exit 1; fi
if grep -i -E '^[[:space:]]*(include|base)' tree/etc/apparmor/parser.conf >&2; then exit 1; fi
[ ! -d files ] || cp -R files/. tree/etc/apparmor.d/
cp kernel-features tree/
mkdir -m 0777 tree/out
chmod -R go=rX tree/etc/apparmor.d
chroot=$(PATH=$PATH:/usr/sbin:/sbin command -v chroot)
ulimit -v 1048576
ulimit -t 60
parse="env -i $chroot --userspec=65534:65534 --groups= tree
    /usr/sbin/apparmor_parser --kernel-features /kernel-features"
$parse --preprocess "$3" > text
$parse --names "$3" > names
$parse --skip-kernel-load --skip-cache --ofile /out/enforce "$3"
$parse --skip-kernel-load --skip-cache --ofile /out/complain --Complain "$3"
cp tree/out/enforce tree/out/complain .
rm -rf tree
"""
COMPILE_SECONDS = 90
FILES = ("enforce", "complain", "names")
MOST_FEATURES = 8192
"""Characters: what libapparmor has room for."""

_INCLUDED = re.compile(r"##(?:included|failed include|skipped duplicate include) (.*)$", re.MULTILINE)
_BELOW = re.compile(r"<(?!/)(?!.*\.\.)[^<>]+>")
"""An include that is looked for in /etc/apparmor.d and nowhere else."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """A file of profiles as the kernel takes it, as it is written and in complain mode; and the profiles in it."""

    enforce: bytes
    complain: bytes
    names: tuple[str, ...]


def leads_elsewhere(preprocessed: str) -> bool:
    """Whether a profile, as `apparmor_parser --preprocess` shows it, includes what is not in /etc/apparmor.d.

    So it is taken to do where no include is shown at all: a parser may show them in another way.
    """
    targets = _INCLUDED.findall(preprocessed)
    return not targets or any(_BELOW.fullmatch(target.strip()) is None for target in targets)


def compile_file(
    policy_tree: Path, image_digest: str, features: Any, written: Mapping[str, bytes], path: str
) -> Compiled | None:
    """What `path` compiles to with the image's files, and those of `written` besides or instead; cached by the digest
    of all that goes in. `features`: what the guest says that its kernel is able to, in libapparmor's form.

    None where a guest's own parser is to be asked: for a profile that does not compile, or that includes what is not in
    /etc/apparmor.d and may be another file in a guest, and where nothing can be compiled on this machine.
    """
    files = _profiles_of(written)
    if files is None or not _are_features(features):
        return None
    given = [part for name, data in sorted(files.items()) for part in (name, data)]
    how = (COMPILE, _INCLUDED.pattern, _BELOW.pattern)
    key = digest_of("profile-2", *how, image_digest, features, path, *given)
    target = paths.cache() / "policies" / key[:24]
    with cache.lock(paths.cache() / "locks" / f"policy-{key[:24]}"):
        with cache.use(target):
            manifest = cache.read_manifest(target)
            if manifest is not None and not cache.damage(target, manifest, full=True):
                return _compiled(target) if manifest.get("elsewhere") is False else None
        try:
            host.need_x86("compiling an AppArmor profile with the image's own tools")
            with cache.making("policy", "a profile was compiled") as work:
                _compile(work, policy_tree, files, features, path)
                elsewhere = leads_elsewhere((work / "text").read_text("utf-8", "replace"))
                compiled = _compiled(work)
                about = {"elsewhere": elsewhere, "profile": path, "image": image_digest}
                cache.publish(work, target, FILES, about)
        except (HostError, OSError):
            return None
    return None if elsewhere else compiled


def _profiles_of(written: Mapping[str, bytes]) -> dict[str, bytes] | None:
    """Those of `written` that are in /etc/apparmor.d, by their path there, the last of two for the same one: a profile
    includes nothing else that may be compiled here. None where the parser's own settings are written.

    What lies elsewhere is not laid out for the parser: it would run what a scenario has in place of its libraries.
    """
    found: dict[str, bytes] = {}
    for path, data in written.items():
        plain = "/" + posixpath.normpath(path).lstrip("/")
        if plain.startswith(SETTINGS):
            return None
        if plain.startswith(f"{FOLDER}/"):
            found[plain.removeprefix(f"{FOLDER}/")] = data
    return found


def _are_features(said: Any) -> bool:
    """Whether it is what a guest's kernel may be able to; the parser takes anything, and compiles less for nonsense."""
    return (
        isinstance(said, str)
        and said.isascii()
        and len(said) <= MOST_FEATURES
        and said.count("{") == said.count("}")
        and all(f"{name} {{" in said for name in ("policy", "file", "caps"))
    )


def _compile(work: Path, policy_tree: Path, files: Mapping[str, bytes], features: str, path: str) -> None:
    for name, data in files.items():
        there = work / "files" / name
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_bytes(data)
    (work / "kernel-features").write_text(features, "ascii")
    argv = ["sh", "-c", COMPILE, "compile", str(work), str(policy_tree), path]
    host.run(host.in_namespace(argv), what="compiling an AppArmor profile", timeout=COMPILE_SECONDS)


def _compiled(folder: Path) -> Compiled | None:
    """What was compiled; None where there is nothing in it, as for a profile that is disabled."""
    enforce, complain, names = ((folder / name).read_bytes() for name in FILES)
    listed = tuple(name.strip() for name in names.decode("utf-8", "surrogateescape").split("\n") if name.strip())
    return Compiled(enforce, complain, listed) if enforce and complain and listed else None
