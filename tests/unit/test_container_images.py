"""What containers are made of, without a guest: a scenario's words, contexts, what is fetched or built, errors."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from entries import Notes
from hypothesis import given
from hypothesis import strategies as st

from fakes import ScriptedChannel, said
from lsmlab import cache, discovery, host, inventory, prepare, scenario
from lsmlab.container import context, delivery, engine, install, spec
from lsmlab.container.spec import Container, ContainerImage
from lsmlab.errors import DamagedError, DefinitionError, DownloadError, EngineError, HostError, ImageError
from lsmlab.image import container, debian, step
from lsmlab.scenario import Scenario
from lsmlab.terms import Arm

pytestmark = pytest.mark.container

REPO = Path(__file__).resolve().parents[2]
DIGEST = "3df58cf3dc53c3218378cf6ff704a1b8cb3a70a098483647e57dad924f04d428"
REFERENCE = f"registry.example.org:5000/shop/words@sha256:{DIGEST}"
TREE = b"a root tree"


# A scenario's words


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("registry.example.org/shop:1.2", "is not pinned, and may be another image tomorrow"),
        ("registry.example.org/shop", "`skopeo inspect --format '{{.Digest}}' docker://registry.example.org/shop`"),
        ("nginx", "it names no registry, such as docker.io"),
        (f"library/nginx@sha256:{DIGEST}", "it names no registry"),
        (f"registry.example.org/nginx:1@sha256:{DIGEST}", "a tag and a digest: expected the digest alone, without :1"),
        ("registry.example.org/nginx@sha256:12ab", "its digest of 64 hexadecimal digits"),
        (f"registry.example.org/nginx@sha256:{DIGEST.upper()}", "in lower case"),
        (f"registry.example.org/--tls@sha256:{DIGEST}", "is no name of an image"),
        (f"-x.y/nginx@sha256:{DIGEST}", "is no name of an image"),
    ],
)
def test_an_image_of_a_registry_has_to_be_pinned(value: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        ContainerImage(registry=value)


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1:5000", True), ("127.9.9.9", True), ("localhost", True), ("localhost:80", True),
        ("[::1]:5000", True),
        ("128.0.0.1:5000", False), ("localhost.example.org", False), ("127.0.0.1.example.org", False),
        ("[2001:db8::1]:5000", False),
    ],
)  # fmt: skip
def test_tls_is_verified_but_on_a_loopback_address(address: str, loopback: bool) -> None:
    image = ContainerImage(registry=f"{address}/shop@sha256:{DIGEST}")
    assert image.registry is not None and spec.is_loopback(image.registry) is loopback


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, "exactly one of"),
        ({"registry": REFERENCE, "packages": ["nginx"]}, "exactly one of"),
        ({"packages": []}, "at least one"),
        ({"packages": ["nginx"], "base": {"registry": REFERENCE}}, "what a `dockerfile` builds on"),
        ({"packages": ["--include=x"]}, "pattern"),
    ],
)
def test_an_image_is_made_of_one_thing(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        ContainerImage.model_validate_json(json.dumps(keys))


HEAD = "kind: lsmlab/scenario\nextends: container-reads-host-shadow\nid: mine\ntitle: mine\nsubject:\n  container:\n"


def load(folder: Path, image: str, files: dict[str, str] | None = None) -> Scenario:
    """A scenario whose container has `image`, line 7 of its file."""
    (folder / "mine").mkdir(exist_ok=True)
    file = folder / "mine" / "scenario.yaml"
    file.write_text(f"{HEAD}    image: {image}\n")
    for name, text in (files or {}).items():
        (folder / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "mine" / name).write_text(text)
    return scenario.load(file, discovery.scenarios(REPO).get)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("{dockerfile: image/Dockerfile}", r"scenario.yaml:7: no such file: .*/mine/image/Dockerfile"),
        (
            '{registry: "registry.example.org/nginx:1"}',
            r"scenario.yaml:7: subject.container.image.registry: .* is not pinned",
        ),
        ("{packages: [nginx], tag: x}", r"scenario.yaml:7: subject.container.image.tag: unknown key"),
        ("{dockerfile: ../other/Dockerfile}", r"scenario.yaml:7: dockerfile: expected a file in the scenario's folder"),
    ],
)
def test_a_fault_is_told_with_file_and_line(tmp_path: Path, image: str, words: str) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "Dockerfile").write_text("FROM scratch\n")
    with pytest.raises(DefinitionError, match=words):
        load(tmp_path, image)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("# none\n", 1, "no FROM"),
        ("FROM lsmlab AS a\nFROM debian:13\n", 2, "FROM debian:13: the engine in the guest has no network"),
        ("FROM base\n", 1, "FROM base: the engine"),
        ("ARG X=lsmlab\nFROM $X\n", 2, r"FROM $x"),
        ("FROM b\nFROM lsmlab AS b\n", 1, "FROM b: "),
    ],
)
def test_a_dockerfile_builds_on_what_the_engine_has(tmp_path: Path, text: str, line: int, words: str) -> None:
    with pytest.raises(DefinitionError, match=re.escape(words)) as caught:
        load(tmp_path, "{dockerfile: image/Dockerfile}", {"image/Dockerfile": text})
    assert f"/mine/image/Dockerfile:{line}: " in caught.value.message


def test_stages_and_a_base_are_what_it_may_build_on(tmp_path: Path) -> None:
    text = "FROM --platform=linux/amd64 lsmlab AS Tools\nfrom\ttools\nFROM base\nFROM scratch\n"
    image = f'{{dockerfile: image/Dockerfile, base: {{registry: "{REFERENCE}"}}}}'
    (found,) = load(tmp_path, image, {"image/Dockerfile": text}).contexts()
    assert found.builds_on_busybox
    (other,) = load(tmp_path, "{dockerfile: image/Dockerfile}", {"image/Dockerfile": "FROM scratch\n"}).contexts()
    assert not other.builds_on_busybox


def test_the_scenarios_digest_is_that_of_all_that_goes_into_the_image(tmp_path: Path) -> None:
    files = {"image/Dockerfile": "FROM scratch\nCOPY a /\n", "image/a": "a"}
    dockerfile = "{dockerfile: image/Dockerfile}"
    seen = {load(tmp_path, dockerfile, files).digest()}
    assert load(tmp_path, dockerfile).digest() in seen
    (tmp_path / "mine/image/a").write_text("b")
    seen.add(load(tmp_path, dockerfile).digest())
    (tmp_path / "mine/image/a").chmod(0o755)
    seen.add(load(tmp_path, dockerfile).digest())
    (tmp_path / "mine/image/a").rename(tmp_path / "mine/image/b")
    seen.add(load(tmp_path, dockerfile).digest())
    seen.add(load(tmp_path, "{packages: [nginx]}").digest())
    seen.add(load(tmp_path, f'{{registry: "{REFERENCE}"}}').digest())
    seen.add(load(tmp_path, f'{{registry: "{REFERENCE[:-1]}0"}}').digest())
    assert len(seen) == 7


def test_the_scenarios_digest_does_not_know_where_it_lies(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    files = {"image/Dockerfile": "FROM scratch\n"}
    one, two = (load(tmp_path / name, "{dockerfile: image/Dockerfile}", files).digest() for name in ("one", "two"))
    assert one == two


# Build contexts


def read(folder: Path, text: str = "FROM scratch\n") -> context.Context:
    (folder / "Dockerfile").write_text(text)
    return context.read(folder / "Dockerfile", has_base=False)


def test_a_context_is_packed_the_same_each_time_and_is_roots(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/run.sh").write_text("#!/bin/sh\n")
    (tmp_path / "sub/run.sh").chmod(0o700)
    (tmp_path / "link").symlink_to("sub/run.sh")
    found = read(tmp_path)
    os.utime(tmp_path / "sub/run.sh", (1, 1))
    assert found.tar() == read(tmp_path).tar() and found.digest() == read(tmp_path).digest()
    with tarfile.open(fileobj=io.BytesIO(found.tar())) as tar:
        members = {m.name: (m.mode, m.uid, m.linkname) for m in tar.getmembers()}
    assert members == {
        "Dockerfile": (0o644, 0, ""), "link": (0o755, 0, "sub/run.sh"), "sub": (0o755, 0, ""),
        "sub/run.sh": (0o755, 0, ""),
    }  # fmt: skip


@pytest.mark.parametrize("target", ["/etc/passwd", "../secret", "sub/../../secret"])
def test_a_link_out_of_the_context_is_a_fault(tmp_path: Path, target: str) -> None:
    (tmp_path / "secret").write_text("x")
    (tmp_path / "context/sub").mkdir(parents=True)
    (tmp_path / "context/link").symlink_to(target)
    with pytest.raises(DefinitionError, match=r"context/link: a link that leads out of the build context"):
        read(tmp_path / "context")


def test_what_a_context_cannot_have_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DefinitionError, match="neither file, folder nor link"):
        read(tmp_path)
    (tmp_path / "pipe").unlink()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(DefinitionError, match="loop: "):
        read(tmp_path)
    (tmp_path / "loop").unlink()
    monkeypatch.setattr(context, "MOST_FILES", 1)
    (tmp_path / "more").write_text("x")
    with pytest.raises(DefinitionError, match="more than 1 files: too much for a build context"):
        read(tmp_path)
    monkeypatch.setattr(context, "MOST_FILES", 9)
    monkeypatch.setattr(context, "MOST_MIB", 0)
    with pytest.raises(DefinitionError, match="more than 0 MiB: too much for a build context"):
        read(tmp_path)


def test_a_step_of_the_engine_is_a_line_of_the_dockerfile(tmp_path: Path) -> None:
    text = "# a shop\nARG A\nFROM scratch\n\nRUN a \\\n  # why\n  && b\nrun c\nCMD d \\"
    found = read(tmp_path, text)
    assert [(i.line, i.word) for i in found.instructions] == [
        (2, "ARG"), (3, "FROM"), (5, "RUN"), (8, "RUN"), (9, "CMD"),
    ]  # fmt: skip
    assert found.instructions[2].arguments == "a && b"
    assert [found.line_of_step(n) for n in (0, 1, 3, 5, 6)] == [1, 2, 5, 9, 1]


@given(st.text(alphabet="aF \t\\\n\r#$\x0b\x0c\u2028\x85", max_size=40))
def test_no_text_of_a_dockerfile_is_more_than_instructions(text: str) -> None:
    found = list(context._instructions(text))
    lines = [one.line for one in found]
    assert lines == sorted(set(lines)) and all(1 <= line <= len(text.splitlines()) for line in lines)
    assert all(one.word for one in found)
    list(context._stages(tuple(found)))


# On this machine


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LSMLAB_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(host, "find", lambda program: f"/usr/bin/{program}")
    return tmp_path / "home"


Do = Callable[[Sequence[str], str], None]


def skopeo(monkeypatch: pytest.MonkeyPatch, do: Do | None = None) -> list[list[str]]:
    """Have each long step do `do`, or write what was asked for; what was asked for."""
    asked: list[list[str]] = []

    def run(argv: Sequence[str], what: str) -> None:
        asked.append(list(argv))
        if do is not None:
            do(argv, what)
        target = next(word for word in argv if word.startswith("docker-archive:"))
        Path(target.split(":")[1]).write_bytes(TREE)

    monkeypatch.setattr(step, "run", run)
    return asked


def ensure(image: ContainerImage, told: Notes | None = None, suite: str | None = "trixie") -> container.Made:
    with contextlib.ExitStack() as uses:
        return container.ensure(image, suite, told or Notes(), "task", uses)


def test_an_image_is_fetched_once_for_linux_on_amd64(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, told = skopeo(monkeypatch), Notes()
    made = ensure(ContainerImage(registry=REFERENCE), told)
    (argv,) = asked
    words = " ".join(argv)
    assert "--override-os=linux --override-arch=amd64" in words
    assert f"copy docker://{REFERENCE} docker-archive:" in words, "TLS is verified"
    assert words.endswith(f"/image.tar:lsmlab-registry:{DIGEST[:16]}")
    assert any("fetching registry.example.org:5000/" in step for step in told.steps)
    assert any("Made the container image of" in note for note in told.notes)
    assert made.archive is not None and made.archive.file.read_bytes() == TREE
    assert made.record.image == REFERENCE and made.record.sha256 == (cache.file_digest(made.archive.file),)
    again = ensure(ContainerImage(registry=f"mirror.example.org/other@sha256:{DIGEST}"))
    assert len(asked) == 1 and again.archive == made.archive, "the digest alone counts"


def test_a_registry_on_this_machine_may_speak_plain_http(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = skopeo(monkeypatch)
    ensure(ContainerImage(registry=f"127.0.0.1:5000/shop@sha256:{DIGEST}"))
    assert "--src-tls-verify=false" in asked[0]


def test_a_cached_image_that_is_damaged_is_made_anew(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, told = skopeo(monkeypatch), Notes()
    made = ensure(ContainerImage(registry=REFERENCE))
    assert made.archive is not None
    made.archive.file.write_bytes(TREE[:-1] + b"x")
    other = ensure(ContainerImage(registry=REFERENCE), told)
    assert len(asked) == 2 and other.archive is not None and other.archive.file.read_bytes() == TREE
    assert any("is damaged (image.tar is damaged" in note for note in told.notes), told.notes


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [  # as skopeo 1.9 says it
        ("writing blob: happened during read: Digest did not match, expected sha256:a, got sha256:b",
         DamagedError, "is not whole, or not what its digest says, and is not used"),
        ("determining manifest MIME type for docker://x: Manifest does not match provided manifest digest sha256:a",
         DamagedError, "is not used"),
        ("reading config blob a: Download config.json digest a does not match expected b", DamagedError, "is not used"),
        ("reading blob a: Error fetching blob: invalid status code from registry 404 (Not Found)",
         DamagedError, "is not whole"),
        ("initializing source: reading manifest a in b: manifest unknown: manifest unknown",
         DownloadError, "registry.example.org:5000 has no shop/words with this digest"),
        ('pinging container registry: Get \\"http://a/v2/\\": dial tcp a: connect: connection refused',
         DownloadError, 'registry.example.org:5000 cannot be asked: pinging container registry: Get "http://a/v2/"'),
        ("Get: x509: certificate signed by unknown authority", DownloadError, "cannot be asked"),
        ("requested access to the resource is denied", DownloadError, "does not give it to us"),
        ("choosing image: no image found in manifest list for architecture amd64",
         DownloadError, "not there for linux/amd64"),
    ],
)  # fmt: skip
def test_what_a_registry_does_wrong_is_said(
    home: Path, monkeypatch: pytest.MonkeyPatch, words: str, kind: type[Exception], message: str
) -> None:
    def fail(argv: Sequence[str], what: str) -> None:
        raise ImageError(f'{what} failed (1): skopeo ...\ntime="2026-11-29T00:45:45Z" level=fatal msg="{words}"')

    skopeo(monkeypatch, fail)
    with pytest.raises(kind, match=re.escape(message)) as caught:
        ensure(ContainerImage(registry=REFERENCE))
    assert str(caught.value).count("\n") == 1, "one line, and what to do"
    assert not cache.builds(home / "cache" / container.FOLDER / "*")


def test_a_full_disk_is_not_the_registrys_fault(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(argv: Sequence[str], what: str) -> None:
        raise ImageError(
            'fetching failed (1): skopeo\nlevel=fatal msg="writing blob: write a: no space left on device"'
        )

    skopeo(monkeypatch, fail)
    with pytest.raises(HostError, match=r"the disk is full: \d+ MiB free while the container image of "):
        ensure(ContainerImage(registry=REFERENCE))


def test_without_skopeo_what_to_install_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LSMLAB_HOME", str(tmp_path))
    real = host.find
    monkeypatch.setattr(host, "find", lambda program: None if program == "skopeo" else real(program))
    with pytest.raises(HostError, match="skopeo is not installed on this machine") as caught:
        ensure(ContainerImage(registry=REFERENCE))
    assert "apt-get install skopeo" in caught.value.hint


def tree_of(packages: dict[str, str]) -> bytes:
    status = "\n\n".join(
        f"Package: {n}\nStatus: install ok installed\nVersion: {v}\nDescription: x\n more" for n, v in packages.items()
    )
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        member = tarfile.TarInfo("./var/lib/dpkg/status")
        member.size = len(status)
        tar.addfile(member, io.BytesIO(status.encode()))
    return buffer.getvalue()


def test_a_tree_of_packages_is_of_the_labs_suite_and_says_its_versions(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def install_packages(suite: str, packages: Sequence[str], work: Path, what: str, **more: str) -> None:
        asked.append((suite, tuple(packages), more["variant"]))
        (work / "tree.tar").write_bytes(tree_of({"nginx": "1.26.3-3", "libc6": "2.41"}))

    monkeypatch.setattr(debian, "install", install_packages)
    monkeypatch.setattr(debian, "see_what_a_tree_needs", lambda _: None)
    made = ensure(ContainerImage(packages=("nginx",)))
    assert made.record.packages == {"nginx": "1.26.3-3"} and made.record.image == "Debian packages nginx"
    ensure(ContainerImage(packages=("nginx", "nginx")))
    ensure(ContainerImage(packages=("nginx",)), suite="bookworm")
    assert asked == [("trixie", ("nginx",), "essential"), ("bookworm", ("nginx",), "essential")]
    with pytest.raises(ImageError, match="needs a lab that is built of them"):
        ensure(ContainerImage(packages=("nginx",)), suite=None)
    for name in ("nginx-", "mail-transport-agent"):  # "remove it" to apt, and a virtual one
        with pytest.raises(ImageError, match=f"apt took {name}, and no package of that name was installed"):
            ensure(ContainerImage(packages=(name, "nginx")))


def test_the_cache_lists_them_and_prunes_what_is_damaged_or_all(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skopeo(monkeypatch)
    made = ensure(ContainerImage(registry=REFERENCE))
    (entry,) = inventory.entries()
    assert (entry.kind, entry.status) == ("container image", inventory.Status.CURRENT)
    assert entry.name.startswith(f"registry-{DIGEST[:16]}-")
    assert inventory.prune(everything=False).removed == []
    assert made.archive is not None
    made.archive.file.write_bytes(b"")
    assert [e.name for e in inventory.prune(everything=False).removed] == [entry.name]
    ensure(ContainerImage(registry=REFERENCE))
    assert len(inventory.prune(everything=True).removed) == 1 and inventory.entries() == []


# Into the guest


class Guest(ScriptedChannel):
    """A guest whose engine answers by the path that it is asked; what it was sent."""

    def __init__(self, answers: dict[str, str]) -> None:
        self.posted: list[tuple[str, bytes]] = []
        self.files: dict[str, bytearray] = {}

        def curl(argv: tuple[str, ...]) -> Any:
            url, file = argv[-1], argv[argv.index("--upload-file") + 1]
            self.posted.append((url, bytes(self.files[file])))
            return said(next(text for path, text in answers.items() if f"{path}?" in url))

        super().__init__([(r"curl ", curl), (r"cat /bin/busybox$", said("BUSYBOX")), (r"rm --force /var/tmp/", said())])

    def write_file(self, path: str, data: bytes, *, mode: int | None = None, owner: str | None = None) -> None:
        self.files[path] = bytearray(data)

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float = 60) -> Any:
        if argv[0] == "dd":
            given = dict(word.partition("=")[::2] for word in argv[1:])
            assert int(given["seek"]) == len(self.files[given["of"]]) and given["oflag"] == "seek_bytes"
            assert 0 < len(stdin) <= delivery.PIECE
            self.files[given["of"]] += stdin
            return said()
        return super().run(argv, stdin=stdin, timeout=timeout)


@pytest.fixture
def tags(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []

    class FakeEngine:
        def __init__(self, _: Any) -> None: ...

        def tag(self, image: str, name: str) -> None:
            found.append((image, name))

    monkeypatch.setattr(delivery, "Engine", FakeEngine)
    return found


def test_an_archive_goes_over_in_pieces_and_comes_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tags: list[tuple[str, str]]
) -> None:
    monkeypatch.setattr(delivery, "PIECE", 1000)
    data = os.urandom(4321)
    (tmp_path / "a.tar").write_bytes(data)
    guest, told = Guest({"/images/load": '{"stream":"Loaded image: x"}\n'}), list[str]()
    delivery.load(guest, tmp_path / "a.tar", "x:1", ("y:1", "base:latest"), told.append)
    ((url, sent),) = guest.posted
    assert sent == data and url.startswith("http://engine/v1.41/images/load?")
    assert tags == [("x:1", "y:1"), ("x:1", "base:latest")]
    assert len(told) == 6 and told[-1] == "the engine loads the image"


def test_a_root_tree_is_imported_under_the_images_name(tmp_path: Path, tags: list[tuple[str, str]]) -> None:
    (tmp_path / "tree.tar").write_bytes(TREE)
    guest = Guest({"/images/create": '{"status":"sha256:1"}\n'})
    delivery.import_tree(guest, tmp_path / "tree.tar", "lsmlab-image:12", lambda _: None)
    ((url, sent),) = guest.posted
    assert sent == TREE and "fromSrc=-&repo=lsmlab-image&tag=12&changes=ENV%20PATH%3D" in url


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ('{"errorDetail":{"message":"a"},"error":"no space left on device"}', "loading .*: no space left on device"),
        ('{"message":"invalid tar header"}', "invalid tar header"),
        ("<html>", "it answered nonsense: '<html>'"),
    ],
)
def test_what_an_engine_says_of_an_archive_is_told(tmp_path: Path, answer: str, words: str) -> None:
    (tmp_path / "a.tar").write_bytes(TREE)
    with pytest.raises(EngineError, match=words):
        delivery.load(Guest({"/images/load": answer}), tmp_path / "a.tar", "x:1", (), lambda _: None)


def built(tmp_path: Path, text: str, answer: Sequence[dict[str, str]]) -> Guest:
    given = read(tmp_path, text)
    guest = Guest({"/build": "".join(f"{json.dumps(one)}\n" for one in answer)})
    delivery.build(guest, ContainerImage(dockerfile=given.dockerfile), given, lambda _: None)
    return guest


def test_a_build_has_no_network_and_busybox_where_it_is_built_on_that(tmp_path: Path) -> None:
    guest = built(tmp_path, "FROM scratch\n", [{"stream": "Successfully built 1\n"}])
    ((url, sent),) = guest.posted
    assert "networkmode=none" in url and "t=lsmlab-image%3A" in url and "dockerfile=Dockerfile" in url
    assert sent == read(tmp_path).tar()
    guest = built(tmp_path, "FROM lsmlab\n", [{"stream": "Successfully built 1\n"}])
    (first, base), (second, _) = guest.posted
    assert "t=lsmlab%3Alatest" in first and "t=lsmlab-image%3A" in second
    with tarfile.open(fileobj=io.BytesIO(base)) as tar:
        assert tar.getmember("busybox").mode == 0o755
        made = tar.extractfile("Dockerfile")
        assert made is not None and made.read() == b"FROM lsmlab\nCOPY busybox /bin/busybox\n"


def test_a_build_that_fails_is_told_with_its_line_and_the_engines_words(tmp_path: Path) -> None:
    text = "# a shop\nFROM scratch\n\nRUN a \\\n  && b\n"
    steps = [{"stream": "Step 1/2 : FROM scratch\n"}, {"stream": " ---> 1\n"}, {"stream": "Step 2/2 : RUN a && b\n"}]
    end = [{"stream": "\x1b[91mb: not found\n\x1b[0m"}, {"error": "'b' returned a non-zero code: 127"}]
    with pytest.raises(EngineError) as caught:
        built(tmp_path, text, [*steps, *end])
    first, *rest = caught.value.message.splitlines()
    assert first == (
        f"{tmp_path}/Dockerfile:4: the engine in the guest does not build this: 'b' returned a non-zero code: 127"
    )
    assert rest[-1] == "  b: not found" and "  Step 2/2 : RUN a && b" in rest
    with pytest.raises(EngineError, match=r"Dockerfile:3: .* unknown instruction: FRO"):
        built(tmp_path, text, [{"message": "dockerfile parse error on line 3: unknown instruction: FRO"}])


# The container


class Sdk:
    """What is asked of the Docker SDK to make a container."""

    base_url, api_version = "http://engine:1", "1.45"

    def __init__(self, config: dict[str, Any]) -> None:
        self.config, self.made = config, dict[str, Any]()

    def inspect_image(self, _: str) -> dict[str, Any]:
        return {"Config": self.config}

    def create_host_config(self, **keys: Any) -> dict[str, Any]:
        return keys

    def create_container(self, **keys: Any) -> dict[str, Any]:
        self.made = keys
        return {"Id": "c1"}

    def start(self, _: str) -> None: ...

    def inspect_container(self, _: str) -> dict[str, Any]:
        return {"State": {"Running": True}}


def process_of(config: dict[str, Any], **keys: Any) -> tuple[Any, Any, engine.Running, dict[str, Any]]:
    sdk = Sdk(config)
    made = engine.Engine.__new__(engine.Engine)
    made._vehicle = install.VEHICLE
    made._client, made._adapter = sdk, None  # type: ignore[assignment]
    given = Container.model_validate_json(json.dumps({"image": {"packages": ["nginx"]}, **keys}))
    running = made.start(given, Arm.APPARMOR_ENFORCE, name="subject", unconfined=False)
    return sdk.made.get("entrypoint"), sdk.made.get("command"), running, sdk.made


@pytest.mark.parametrize("own", [{"Cmd": ["nginx"]}, {"Entrypoint": ["/start"]}])
def test_the_main_process_is_the_scenarios_or_the_images_or_busyboxes(own: dict[str, Any]) -> None:
    assert process_of(own)[:2] == (None, None), "the image's own"
    assert process_of(own, run=["nginx", "-g", "daemon off;"])[:2] == (["nginx", "-g", "daemon off;"], None)
    idle = [install.PROGRAM_BESIDE, "tail", "-f", "/dev/null"]
    assert process_of({"Cmd": None, "Entrypoint": None})[:2] == (idle, None)


def test_what_an_attempt_runs_is_busybox_at_a_path_that_no_image_has() -> None:
    *_, running, made = process_of({"Cmd": ["nginx"]}, binds=["/etc:/hostetc:ro"])
    assert made["host_config"]["binds"] == ["/usr/lib/lsmlab/vehicle:/.lsmlab/busybox:ro", "/etc:/hostetc:ro"]
    assert running.command(("cat", "/etc/shadow")) == ["/.lsmlab/busybox", "cat", "/etc/shadow"]


@pytest.fixture
def delivered(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    done: list[tuple[str, Any]] = []
    monkeypatch.setattr(delivery, "load", lambda _c, _a, loaded, names, _t: done.append(("load", (loaded, names))))
    monkeypatch.setattr(delivery, "import_tree", lambda _c, _a, name, _t: done.append(("import", name)))
    monkeypatch.setattr(delivery, "build", lambda _c, image, _g, _t: done.append(("build", image.name)))
    return done


@pytest.mark.parametrize("arm", [Arm.SELINUX_UNCONFINED, Arm.APPARMOR_UNCONFINED])
def test_the_engine_is_given_what_a_container_is_made_of(
    tmp_path: Path, arm: Arm, delivered: list[tuple[str, Any]]
) -> None:
    (tmp_path / "Dockerfile").write_text("FROM base\n")
    archive = container.Archive(tmp_path / "a.tar", "12", {})
    loaded = f"lsmlab-registry:{DIGEST[:16]}"
    of_registry, of_packages = ContainerImage(registry=REFERENCE), ContainerImage(packages=("nginx",))
    on_base = ContainerImage(dockerfile=tmp_path / "Dockerfile", base=spec.BaseImage(registry=REFERENCE))
    channel = ScriptedChannel([(r"write /sys/fs/selinux/enforce", said())], {})
    for image, built_from in (
        (of_registry, None), (of_packages, None), (on_base, context.read(tmp_path / "Dockerfile", has_base=True)),
    ):  # fmt: skip
        prepare._deliver(channel, arm, container.Made(image, archive, built_from), lambda _: None)
    assert delivered == [
        ("load", (loaded, (of_registry.name,))), ("import", of_packages.name),
        ("load", (loaded, ("base:latest",))), ("build", on_base.name),
    ]  # fmt: skip
    written = [line for line in channel.lines if line.startswith("write /sys/fs/selinux/enforce")]
    assert len(written) == (2 if arm is Arm.SELINUX_UNCONFINED else 0), "nothing is refused while it is built"
