"""The engine in a guest: its settings, the runtime that marks an attempt, and the one image. Done once a boot."""

from __future__ import annotations

import io
import json
import tarfile

from lsmlab.channel.base import Channel
from lsmlab.definition import digest_of

DEFAULT_PROFILE = "docker-default"
"""The AppArmor profile that the engine loads, and confines containers by."""
SOCKET = "/run/docker.sock"
SLICE = "system-lsmlab.slice"
"""The subject's container lies in this group of systemd's: to the agent, a unit like any other."""
IMAGE = "lsmlab"
VEHICLE = "/usr/lib/lsmlab/vehicle"
"""The one program of every container, a copy of the guest's BusyBox: the image's audit rule records its exec."""
PROGRAM = "/bin/busybox"
"""Where a container has it."""
PROGRAM_BESIDE = "/.lsmlab/busybox"
"""Where a container has it whose image is another: a path that no image has."""
VEHICLE_THERE = "/var/lib/lsmlab/vehicle"
"""The same on a machine that is kept."""
SETTINGS_PATH = "/etc/docker/daemon.json"
VOLUMES = "/var/lib/docker/volumes"
RUNC = "/usr/sbin/runc"
"""Where a guest of ours has it."""
RUNTIME = "lsmlab"
RUNTIME_PATH = "/usr/local/bin/lsmlab-runtime"
AUID_PATH = "/etc/docker/lsmlab-auid"
"""In a folder that the engine's domain may read."""
RUNTIME_SCRIPT = f"""#!/bin/sh
# lsmlab: runc, but for the audit user id. An attempt's processes so bear a mark that no other process bears.
if [ -s {AUID_PATH} ]; then
    read -r auid < {AUID_PATH} && echo "$auid" > /proc/self/loginuid || exit 1
fi
exec {RUNC} "$@"
"""
SETTINGS = {
    "bridge": "none",
    "ip-forward": False,
    "iptables": False,
    "ip6tables": False,
    "selinux-enabled": True,
    "storage-driver": "overlay2",
    "exec-opts": ["native.cgroupdriver=systemd"],
    "runtimes": {RUNTIME: {"path": RUNTIME_PATH}},
}
"""Of dockerd. Where the kernel has no SELinux, it says so and goes on."""
APPLETS = (
    "cat", "cp", "dd", "echo", "grep", "head", "httpd", "id", "kill", "ln", "ls", "mkdir", "mount", "mv", "nc", "ps",
    "rm", "sed", "sh", "sleep", "tail", "tee", "touch", "umount", "unshare",
)  # fmt: skip
FILES = {"etc/passwd": "root:x:0:0:root:/:/bin/sh\n", "etc/group": "root:x:0:\n", "etc/hostname": "container\n"}
LIBRARIES = {"lib": "usr/lib", "lib64": "usr/lib64"}
"""For a container that has the guest's /usr."""
FOLDERS = ("bin", "dev", "etc", "mnt", "proc", "run", "srv", "sys", "tmp", "var")


def image_tar() -> bytes:
    """The image's root tree: folders, links to the one program, which is mounted in, and three small files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in FOLDERS:
            folder = tarfile.TarInfo(name)
            folder.type, folder.mode = tarfile.DIRTYPE, 0o1777 if name == "tmp" else 0o755
            tar.addfile(folder)
        for name, target in {**{f"bin/{name}": "busybox" for name in APPLETS}, **LIBRARIES}.items():
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, target
            tar.addfile(link)
        for name, text in {"bin/busybox": "", **FILES}.items():
            file = tarfile.TarInfo(name)
            file.size, file.mode = len(text), 0o644
            tar.addfile(file, io.BytesIO(text.encode()))
    return buffer.getvalue()


def settings() -> bytes:
    """/etc/docker/daemon.json."""
    return json.dumps(SETTINGS, indent=2).encode() + b"\n"


def digest() -> str:
    """Of all that a saved guest's engine was installed from."""
    return digest_of(settings(), RUNTIME_SCRIPT, image_tar())


def write(channel: Channel) -> None:
    """Put into the guest what its engine is to find when it starts."""
    channel.write_file(SETTINGS_PATH, settings())
    channel.write_file(RUNTIME_PATH, RUNTIME_SCRIPT.encode(), mode=0o755)
    channel.ask("relabel", within=120, paths=["/etc/docker", RUNTIME_PATH])
    channel.run(["cp", "/bin/busybox", VEHICLE]).check()  # in place: the audit rule knows the file by its inode
    channel.run(["chmod", "0755", VEHICLE]).check()
    if channel.run(["test", "-e", "/sys/fs/selinux/enforce"]).ok:  # as every file of a container's tree is labelled
        channel.run(["chcon", "--type", "container_file_t", VEHICLE]).check()
