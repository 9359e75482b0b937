"""From a distribution's download to a verdict: a stand-in of each shape, over loopback, through the whole path."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import lsmlab

import standin
from standin import FEDORA, UBUNTU, Shape, Signer

pytestmark = [pytest.mark.lsmlab_vm, pytest.mark.cloud, pytest.mark.slow]

BLOCKED = {"apparmor": ('apparmor="DENIED"', 'name="/etc/shadow"'), "selinux": ("avc:  denied", "httpd_t", "shadow_t")}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str, Signer]]:
    """A folder of disk images with signed lists beside them, the address where it is served, and who signs."""
    folder = tmp_path_factory.mktemp("published")
    signer = Signer.make(tmp_path_factory.mktemp("gnupg") / "home")
    tree = standin.root_tree(tmp_path_factory.mktemp("tree"))
    for shape in (UBUNTU, FEDORA):
        standin.disk(tree, shape, folder / f"{shape.name}.qcow2")
        standin.publish(folder, f"{shape.name}.qcow2", shape, signer)
    tree.unlink()
    try:
        with standin.served(folder) as address:
            yield folder, address, signer
    finally:
        signer.close()


@pytest.mark.parametrize("shape", [UBUNTU, FEDORA], ids=lambda shape: shape.name)
def test_the_flagship_is_contained_on_a_downloaded_image(
    published: tuple[Path, str, Signer], shape: Shape, tmp_path: Path
) -> None:
    _, address, signer = published
    (tmp_path / "labs").mkdir()
    (tmp_path / "key.asc").write_bytes(signer.public)
    lab = standin.lab_file(shape, address, tmp_path / "key.asc", "standin")
    (tmp_path / "labs" / "standin.yaml").write_text(lab)
    env = os.environ | {"LSMLAB_HOME": str(tmp_path / "home")}
    lsmlab(
        "run", "nginx-reads-shadow", "--lab", "standin", "--accel", "tcg", "--json", "out.json",
        cwd=tmp_path, env=env, timeout=1500,
    )  # fmt: skip
    (outcome,) = json.loads((tmp_path / "out.json").read_text())["outcomes"]
    assert (outcome["lab"], outcome["framework"], outcome["verdict"]) == ("standin", shape.framework, "CONTAINED")
    by_arm: dict[str, Any] = {arm["arm"]: arm for arm in outcome["arms"]}
    assert len(by_arm) == 3
    assert all(arm["error"] in {None, ""} for arm in by_arm.values())
    assert all("root=UUID=" in arm["command_line"] for arm in by_arm.values()), "the image's own root file system"
    enforcing = by_arm[{"selinux": "selinux-enforcing", "apparmor": "apparmor-enforce"}[shape.framework]]
    attack = enforcing["attempts"][0]
    assert all(word in attack["observation"]["log"] for word in BLOCKED[shape.framework])
    # What only runs now: the guest is reached, and reaches nothing, not even this machine
    port = address.rpartition(":")[2]
    reach = f"import socket; socket.create_connection(('10.0.2.2', {port}), 5)"
    alone = lsmlab(
        "shell", "standin", "--accel", "tcg", "--", "python3", "-c", reach, cwd=tmp_path, env=env, timeout=300, code=1
    )
    assert "Error" in alone.stderr
    if shape.framework == "selinux":
        labels = lsmlab(
            "shell", "standin", "--arm", "selinux-enforcing", "--accel", "tcg", "--", "sh", "-c",
            "id -Z; ls -Z /etc/shadow; findmnt -no FSTYPE,OPTIONS /", cwd=tmp_path, env=env, timeout=300,
        )  # fmt: skip
        assert "system_u:object_r:shadow_t" in labels.stdout
        assert "btrfs" in labels.stdout
        assert "subvol=/root" in labels.stdout


def test_an_image_that_lets_nobody_in_shows_its_console(
    published: tuple[Path, str, Signer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lsmlab.errors import MachineError  # noqa: PLC0415
    from lsmlab.image import build, cloud  # noqa: PLC0415
    from lsmlab.lab import load  # noqa: PLC0415
    from lsmlab.progress import Silent  # noqa: PLC0415

    folder, address, signer = published
    monkeypatch.setenv("LSMLAB_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(cloud.FIRST_BOOT_SECONDS, "tcg", 20.0)
    (tmp_path / "key.asc").write_bytes(signer.public)
    (tmp_path / "standin.yaml").write_text(standin.lab_file(UBUNTU, address, tmp_path / "key.asc", "standin"))
    with pytest.raises(MachineError) as caught:
        build.ensure(
            load(tmp_path / "standin.yaml", lambda _: None), Silent(), accelerator="tcg",
            file=folder / f"{UBUNTU.name}.qcow2",
        )  # fmt: skip
    assert "its sshd let nobody in within 20 s" in str(caught.value)
    assert "last lines of its console" in str(caught.value)
    assert "Linux version" in str(caught.value) or "systemd" in str(caught.value) or "[    " in str(caught.value)
    assert list((tmp_path / "home").rglob("*.qcow2")) == [], (
        "neither a half-made image nor a download: the file was here"
    )
