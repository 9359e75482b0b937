"""What containers are made of, made on this machine: a registry's image, or a root tree of Debian packages.

Both are cached by what was asked for. Guests have no network: what is made here is put into them.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import re
import secrets
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lsmlab import cache, host, paths
from lsmlab.container import context, spec
from lsmlab.container.context import Context
from lsmlab.container.spec import ContainerImage, ImageRecord
from lsmlab.definition import digest_of
from lsmlab.errors import DamagedError, DownloadError, HostError, ImageError, LsmlabError
from lsmlab.image import debian, step
from lsmlab.progress import Progress

FORMAT = "1"
"""Changes with how it is made: what was made before is then made anew."""
FOLDER = "containers"
ARCHIVE = "image.tar"
LOADED = "lsmlab-registry"
"""What the engine calls what it loads from an archive, with the first digits of the digest as its tag."""
NEEDED_MIB = 1024
"""What the largest of them takes while it is made, with room to spare."""
TELL_SECONDS = 2.0
_WORDS: tuple[tuple[str, type[LsmlabError], str, str], ...] = (
    (
        "[Dd]igest did not match|does not match (expected|provided)|fetching blob: .* from registry 404",
        DamagedError,
        "what {registry} sends is not whole, or not what its digest says, and is not used",
        "The registry holds a damaged image, or somebody has changed it: push it there anew.",
    ),
    (
        "manifest unknown|name unknown|repository name not known",
        DownloadError,
        "{registry} has no {name} with this digest",
        "`skopeo inspect --format '{{{{.Digest}}}}' docker://{name}:TAG` prints the digest that a tag has now.",
    ),
    (
        "unauthorized|access to the resource is denied|authentication required",
        DownloadError,
        "{registry} does not give it to us",
        "`skopeo login {registry}` logs in there.",
    ),
    (
        "no image found in (manifest list|image index)",
        DownloadError,
        "it is not there for linux/amd64, which guests are",
        "Name an image that is.",
    ),
    ("no space left on device", HostError, os.strerror(errno.ENOSPC), ""),  # which `cache.making` knows
)
"""What skopeo says, and what is wrong: words of 1.9, from a registry in which each was made to happen."""
_FATAL = re.compile(r'level=fatal msg="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True)
class Archive:
    """One in the cache. `sha256`: of the file. `packages`: Debian's that were asked for, with their versions."""

    file: Path
    sha256: str
    packages: dict[str, str]


@dataclass(frozen=True, slots=True)
class Made:
    """All that an engine in a guest needs to have one image."""

    image: ContainerImage
    archive: Archive | None
    """Of the image itself, or of what its Dockerfile builds on."""
    context: Context | None

    @property
    def record(self) -> ImageRecord:
        """As an outcome keeps it."""
        digests = [*([self.context.digest()] if self.context else []), *([self.archive.sha256] if self.archive else [])]
        packages = self.archive.packages if self.archive else {}
        return ImageRecord(image=str(self.image), sha256=tuple(digests), packages=packages)


def ensure(image: ContainerImage, suite: str | None, progress: Progress, task: str, uses: contextlib.ExitStack) -> Made:
    """What `image` takes, made where it is not in the cache: minutes then, and the network.

    `suite`: of the Debian packages, the lab's own. Nobody removes it before `uses` is closed.
    Raises DownloadError, ImageError, HostError and DefinitionError.
    """
    if image.packages is not None:
        return Made(image, _packages(image.packages, suite, progress, task, uses), None)
    archive = _registry(image.fetched, progress, task, uses) if image.fetched is not None else None
    built = context.read(image.dockerfile, has_base=image.base is not None) if image.dockerfile is not None else None
    return Made(image, archive, built)


def loaded_name(reference: str) -> str:
    """What the engine calls an image of a registry once it has loaded its archive."""
    return f"{LOADED}:{spec.digest_in(reference)[:16]}"


# From a registry


def _registry(reference: str, progress: Progress, task: str, uses: contextlib.ExitStack) -> Archive:
    def make(work: Path) -> None:
        _fetch(reference, work, progress, task)

    return _ensure(f"registry-{spec.digest_in(reference)[:16]}", reference, make, progress, task, uses)


def _fetch(reference: str, work: Path, progress: Progress, task: str) -> None:
    """skopeo verifies the manifest by the digest that is asked for, and each blob by the one that the manifest says."""
    program = host.find("skopeo")
    if program is None:
        raise HostError(
            f"skopeo is not installed on this machine, and {reference} is fetched with it",
            hint=f"{host.to_install('skopeo')}. Only scenarios that name an image of a registry need it.",
        )
    shown = f"{spec.host_of(reference)}/...@sha256:{spec.digest_in(reference)[:12]}"
    plain = ["--src-tls-verify=false"] if spec.is_loopback(reference) else []
    argv = [
        program, "--override-os=linux", "--override-arch=amd64", f"--tmpdir={work}", "copy", *plain,
        f"docker://{reference}", f"docker-archive:{work / ARCHIVE}:{loaded_name(reference)}",
    ]  # fmt: skip
    with _told(work, lambda mib: progress.step(task, f"fetching {shown}: {mib} MiB")):
        try:
            step.run(host.dying_with_us(argv), f"fetching {reference}")
        except ImageError as error:
            raise _in_words(reference, error) from error


def _in_words(reference: str, error: ImageError) -> LsmlabError:
    """What skopeo said, as what is wrong and what to do."""
    fatal = _FATAL.findall(error.message)
    words = fatal[-1].replace(r"\"", '"') if fatal else error.message.splitlines()[-1]
    words = words.replace(f"initializing source docker://{reference}: ", "")
    registry = spec.host_of(reference)
    name, _, digest = reference.partition("@")
    for pattern, kind, what, hint in _WORDS:
        if re.search(pattern, words):
            told = what.format(registry=registry, name=name.partition("/")[2], digest=digest)
            return kind(f"{reference}: {told}: {words}", hint=hint.format(registry=registry, name=name))
    return DownloadError(
        f"{reference}: {registry} cannot be asked: {words}",
        hint="See that the registry is there and its name right; TLS is verified unless it is on a loopback address.",
    )


# Of Debian packages


def _packages(
    packages: tuple[str, ...], suite: str | None, progress: Progress, task: str, uses: contextlib.ExitStack
) -> Archive:
    if suite is None:
        raise ImageError("a container of Debian packages needs a lab that is built of them", hint="`lsmlab labs`.")
    wanted = tuple(sorted(set(packages)))
    words = f"Debian {suite}: {', '.join(wanted)}"

    def make(work: Path) -> None:
        debian.see_what_a_tree_needs("a container of Debian packages")
        with _told(work, lambda mib: progress.step(task, f"installing {words}: {mib} MiB")):
            hint = "Mend `packages` of the scenario's container image."
            debian.install(suite, wanted, work, f"installing {words}", variant="essential", hint=hint)
        (work / "tree.tar").rename(work / ARCHIVE)

    name = f"packages-{digest_of(FORMAT, suite, *wanted, '', *debian.EXCLUDED)[:16]}"
    return _ensure(name, words, make, progress, task, uses, asked=wanted)


def _versions(archive: Path, asked: tuple[str, ...]) -> dict[str, str]:
    """Of the packages that were asked for, by the tree's own dpkg. Raises ImageError."""
    try:
        with tarfile.open(archive) as tar:
            status = tar.extractfile("./var/lib/dpkg/status")
            text = status.read().decode("utf-8", "replace") if status is not None else ""
    except (tarfile.TarError, KeyError) as error:
        raise ImageError(f"the root tree has no list of its packages: {error}") from error
    found = {}
    for paragraph in text.split("\n\n"):
        fields = dict(line.partition(": ")[::2] for line in paragraph.splitlines() if line[:1].strip())
        if fields.get("Package") in asked:
            found[fields["Package"]] = fields.get("Version", "")
    lacking = [name for name in asked if name not in found]
    if lacking:
        raise ImageError(
            f"apt took {lacking[0]}, and no package of that name was installed",
            hint="Name each package itself: no virtual one, and nothing that apt reads as an order.",
        )
    return found


# The cache


def _ensure(
    name: str,
    words: str,
    make: Callable[[Path], None],
    progress: Progress,
    task: str,
    uses: contextlib.ExitStack,
    asked: tuple[str, ...] = (),
) -> Archive:
    """The cached archive called `name`, every byte verified, or a new one that `make` puts into a work folder."""
    pattern = paths.cache() / FOLDER / f"{name}-*"
    lock = paths.cache() / "locks" / f"container-{name}"
    with cache.lock(lock, waiting=lambda: progress.step(task, f"another run is making {words}; waiting")):
        for folder in cache.builds(pattern):
            with contextlib.ExitStack() as held:
                if not held.enter_context(cache.use(folder)):
                    continue  # removed since it was found
                manifest = cache.read_manifest(folder)
                wrong = "its manifest cannot be read" if manifest is None else cache.damage(folder, manifest, full=True)
                if manifest is not None and not wrong:
                    uses.enter_context(held.pop_all())
                    return _archive(folder)
            progress.note(f"The cached container image of {words} is damaged ({wrong}): it is made anew.")
            cache.discard(folder)
        folder = pattern.with_name(f"{name}-{secrets.token_hex(3)}")
        uses.enter_context(cache.use(folder))  # before it is there: nobody removes it in between
        with cache.making(f"container-{name}", f"the container image of {words} was made") as work:
            cache.need_mib(NEEDED_MIB, "a container image")
            make(work)
            about = {
                "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "what": words, "packages": _versions(work / ARCHIVE, asked) if asked else {},
            }  # fmt: skip
            cache.publish(work, folder, (ARCHIVE,), about)
    found = _archive(folder)
    progress.note(f"Made the container image of {words} ({cache.size(folder) >> 20} MiB in {folder}).")
    return found


def _archive(folder: Path) -> Archive:
    manifest = cache.read_manifest(folder)
    if manifest is None:
        raise HostError(f"{folder}: the container image vanished while it was put in place")
    return Archive(folder / ARCHIVE, manifest["files"][ARCHIVE]["sha256"], dict(manifest.get("packages", {})))


@contextlib.contextmanager
def _told(work: Path, tell: Callable[[int], None]) -> Iterator[None]:
    """`tell` how many MiB lie in `work`, again and again while the block lasts."""
    over = threading.Event()

    def watch() -> None:
        while True:
            tell(cache.size(work) >> 20)
            if over.wait(TELL_SECONDS):
                return

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    finally:
        over.set()
        watching.join()
