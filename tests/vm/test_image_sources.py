"""What containers are made of, in real guests: a real registry, a build in the guest, and what goes wrong with each."""

from __future__ import annotations

import hashlib
import io
import json
import secrets
import shutil
import socket
import subprocess
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from command import environment, lsmlab, outcomes

from lsmlab import cache, paths
from lsmlab.image import container

pytestmark = [pytest.mark.lsmlab_vm, pytest.mark.container, pytest.mark.slow]

LAB = "docker-debian-13"
PROGRAMS = {"skopeo": "skopeo", "docker-registry": "docker-registry"}


def need(program: str) -> str:
    """Its path. Where apt has it, who runs the tests has to have it: `make test` installs it."""
    found = shutil.which(program)
    if found is not None:
        return found
    shown = subprocess.run(["apt-cache", "show", PROGRAMS[program]], capture_output=True, check=False)
    assert shown.returncode != 0, f"{program} is not installed, and apt has it: scripts/setup.sh --tests"
    pytest.skip(f"apt has no {PROGRAMS[program]} here")


@dataclass(frozen=True, slots=True)
class Registry:
    """A registry of this machine's own."""

    address: str
    folder: Path

    def push(self, name: str, archive: Path, work: Path) -> str:
        """Put the image of a docker-archive there; its digest, as `sha256:...`."""
        said = work / "digest"
        subprocess.run(
            ["skopeo", "copy", "--dest-tls-verify=false", "--digestfile", said, f"docker-archive:{archive}",
             f"docker://{self.address}/{name}:1"],
            check=True, capture_output=True,
        )  # fmt: skip
        return said.read_text("ascii").strip()

    def blob(self, digest: str) -> Path:
        """Where it keeps what has this digest."""
        number = digest.removeprefix("sha256:")
        return self.folder / "docker/registry/v2/blobs/sha256" / number[:2] / number / "data"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    need("skopeo")
    program = need("docker-registry")
    work = tmp_path_factory.mktemp("registry")
    address, folder = f"127.0.0.1:{free_port()}", work / "data"
    settings = {
        "version": "0.1", "http": {"addr": address}, "storage": {"filesystem": {"rootdirectory": str(folder)}},
    }  # fmt: skip
    (work / "settings.yaml").write_text(json.dumps(settings))
    with (
        (work / "log").open("wb") as log,
        subprocess.Popen([program, "serve", work / "settings.yaml"], stdout=log, stderr=log) as serving,
    ):
        try:
            host, _, port = address.partition(":")
            deadline = time.monotonic() + 20
            while True:
                try:
                    socket.create_connection((host, int(port)), 1).close()
                    break
                except OSError:
                    assert serving.poll() is None and time.monotonic() < deadline, (work / "log").read_text()
                    time.sleep(0.05)
            yield Registry(address, folder)
        finally:
            serving.terminate()


def added(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def small_archive(file: Path, words: str) -> None:
    """A docker-archive of one layer with one file in it, and a user of its own."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        added(tar, "srv/words", words.encode())
    layer = buffer.getvalue()
    about = {
        "architecture": "amd64", "os": "linux", "config": {"Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
    }  # fmt: skip
    manifest = [{"Config": "config.json", "RepoTags": ["made:here"], "Layers": ["layer.tar"]}]
    with tarfile.open(file, "w") as tar:
        added(tar, "config.json", json.dumps(about).encode())
        added(tar, "layer.tar", layer)
        added(tar, "manifest.json", json.dumps(manifest).encode())


@pytest.fixture
def pushed(registry: Registry, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """An image that nobody has seen before: its reference, and the words in its file."""
    words = f"lsmlab-{secrets.token_hex(8)}"
    small_archive(tmp_path / "image.tar", words)
    digest = registry.push("shop/words", tmp_path / "image.tar", tmp_path)
    yield f"{registry.address}/shop/words@{digest}", words
    for folder in cache.builds(paths.cache() / container.FOLDER / f"registry-{digest.partition(':')[2][:16]}-*"):
        cache.drop(folder)


def write_scenario(folder: Path, name: str, image: dict[str, Any], benign: list[str], shown: str) -> Path:
    """One that reads the host's shadow from a container of `image`, and does something benign with it."""
    attack = {
        "id": "read-shadow", "kind": "attack", "run": ["cat", "/hostetc/shadow"],
        "canary": {"file": "/etc/shadow", "line": "lsmlab-{canary}:!:20000:0:99999:7:::"},
        "allowed_if": {"output": "lsmlab-{canary}:"},
    }  # fmt: skip
    work = {"id": "read-words", "kind": "benign", "run": benign, "allowed_if": {"output": shown}}
    about = {
        "kind": "lsmlab/scenario", "extends": "container-reads-host-shadow", "id": name, "title": name,
        "subject": {"container": {"image": image}}, "attempts": [attack, work],
    }  # fmt: skip
    (folder / name).mkdir(parents=True, exist_ok=True)
    lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in about.items())
    (folder / name / "scenario.yaml").write_text(lines)
    return folder / name


def run(folder: Path, state: Path, code: int = 0) -> dict[str, dict[str, Any]]:
    asked = ("run", str(folder), "--lab", LAB, "--framework", "apparmor", "--json", "-")
    return {name: o for (name, _), o in outcomes(lsmlab(*asked, env=environment(state), code=code).stdout).items()}


def test_an_image_of_a_registry_is_fetched_by_its_digest_and_run(pushed: tuple[str, str], tmp_path: Path) -> None:
    """As it is; and as what a Dockerfile builds on, whose RUN has BusyBox."""
    reference, words = pushed
    mine = tmp_path / "mine"
    write_scenario(mine, "from-a-registry", {"registry": reference}, ["cat", "/srv/words"], words)
    built = {"dockerfile": "image/Dockerfile", "base": {"registry": reference}}
    folder = write_scenario(mine, "built-on-it", built, ["cat", "/srv/words", "/srv/more"], f"{words}made by RUN")
    (folder / "image").mkdir()
    (folder / "image" / "Dockerfile").write_text(
        "FROM lsmlab AS tools\nRUN mkdir /out && \\\n    echo made by RUN | tee /out/more\n"
        "FROM base\nCOPY --from=tools /out/more /srv/more\n"
    )
    found = run(mine, tmp_path)
    assert {name: o["verdict"] for name, o in found.items()} == dict.fromkeys(
        ("from-a-registry", "built-on-it"), "NOT_CONTAINED"
    )
    for outcome in found.values():
        for arm in outcome["arms"]:
            assert {a["result"] for a in arm["attempts"]} == {"allowed"}, arm
            assert reference in arm["images"][0]["image"] and len(arm["images"][0]["sha256"][-1]) == 64
            for attempt in arm["attempts"]:
                seen = attempt["observation"]
                (record,) = [x for x in seen["log"].splitlines() if 'key="lsmlab-subject"' in x and "syscall=59" in x][
                    :1
                ]
                assert f" auid={seen['auid']} " in record and 'exe="/.lsmlab/busybox"' in record


def test_what_is_wrong_with_a_registry_is_one_clear_error_each(
    registry: Registry, pushed: tuple[str, str], tmp_path: Path
) -> None:
    """Nothing is booted for them: an image that is not there is told of before."""
    reference, words = pushed
    name, _, digest = reference.partition("@")
    absent = f"{name}@sha256:{'0' * 64}"
    gone = f"127.0.0.1:{free_port()}/shop/words@{digest}"
    small_archive(tmp_path / "damaged.tar", f"{words} and more")
    damaged = f"{registry.address}/shop/damaged@{registry.push('shop/damaged', tmp_path / 'damaged.tar', tmp_path)}"
    manifest = json.loads(registry.blob(damaged.partition("@")[2]).read_bytes())
    layer = registry.blob(manifest["layers"][0]["digest"])
    data = bytearray(layer.read_bytes())
    data[len(data) // 2] ^= 0xFF
    layer.write_bytes(data)
    mine = tmp_path / "mine"
    for name_, broken in (("absent", absent), ("gone", gone), ("damaged", damaged)):
        write_scenario(mine, name_, {"registry": broken}, ["cat", "/srv/words"], words)
    start = time.monotonic()
    found = run(mine, tmp_path, code=3)
    assert {name_: o["verdict"] for name_, o in found.items()} == dict.fromkeys(("absent", "damaged", "gone"), "ERROR")
    errors = {name_: o["arms"][0]["error"] for name_, o in found.items()}
    assert f"{registry.address} has no shop/words with this digest" in errors["absent"]
    assert f"skopeo inspect --format '{{{{.Digest}}}}' docker://{registry.address}/shop/words:TAG" in errors["absent"]
    assert "cannot be asked" in errors["gone"] and "connection refused" in errors["gone"]
    assert "is not whole, or not what its digest says, and is not used" in errors["damaged"]
    assert all(len(error) < 900 for error in errors.values()), errors
    assert time.monotonic() - start < 60


def test_a_build_that_fails_shows_the_engines_words_and_the_line(tmp_path: Path) -> None:
    folder = write_scenario(tmp_path / "mine", "does-not-build", {"dockerfile": "image/Dockerfile"}, ["id"], "uid")
    (folder / "image").mkdir()
    dockerfile = folder / "image" / "Dockerfile"
    dockerfile.write_text("# of a shop\nFROM lsmlab\n\nRUN echo about to fail && \\\n    cat /no/such/file\n")
    (outcome,) = run(tmp_path / "mine", tmp_path, code=3).values()
    assert outcome["verdict"] == "ERROR"
    error = outcome["arms"][0]["error"]
    assert error.startswith(f"{dockerfile}:4: the engine in the guest does not build this: ")
    assert "about to fail" in error and "can't open '/no/such/file': No such file or directory" in error
