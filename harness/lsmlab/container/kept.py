"""A container engine on a machine that is kept: whether it will do, and what the journal there says of it.

Its answers come from guest/engine.py; nothing is changed by asking.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection
from typing import Any

from lsmlab import facts
from lsmlab.channel.base import Channel
from lsmlab.container import install
from lsmlab.definition import Strict
from lsmlab.errors import EngineError, FrameworkError
from lsmlab.facts import Number
from lsmlab.terms import Framework

PARTS = ("files", "engine")
"""What adds to the agent there what is asked here."""
LEAST_API = (1, 41)
"""Docker Engine 20.10, which Debian 11 and 12 have."""
DATA = install.VOLUMES.rpartition("/")[0]
BY_OPTION = {
    "--config-file": "its settings are in another file",
    "--add-runtime": "its runtimes are not in its settings",
    **dict.fromkeys(
        ("--max-concurrent-downloads", "--max-concurrent-uploads", "--max-download-attempts", "--feature"),
        "that goes back to its default when it reads its settings again, as a run has it do",
    ),
}
"""Options of dockerd's that keep it from taking a runtime, or that would be lost: see moby, daemon/reload.go."""
INSTALL = "Install Docker Engine there (Debian: docker.io), and `systemctl enable --now docker.service`."


class EngineFacts(Strict):
    """What is known of an engine; where it does not run (`pid` 0), the rest is empty."""

    installed: bool
    pid: Number
    runc: str
    busybox: str
    """A BusyBox that needs no library; empty where there is none."""
    program: str = ""
    options: tuple[str, ...] = ()
    """Of its command line, without their values."""
    api: str = ""
    version: str = ""
    security: tuple[str, ...] = ()
    cgroups: str = ""
    data: str = ""
    knows_runtime: bool = False
    has_image: bool = False
    settings_problem: str = ""
    settings_unread: bool = False

    @property
    def names(self) -> frozenset[str]:
        """Of what it calls its security options."""
        return frozenset(option.partition(",")[0].removeprefix("name=") for option in self.security)

    @property
    def frameworks(self) -> tuple[Framework, ...]:
        """Those that it confines containers by."""
        return tuple(f for f in Framework if f in self.names)


def look(channel: Channel) -> EngineFacts:
    """Ask. Raises ChannelError."""
    answer = channel.ask(
        "engine_state", within=60,
        socket=install.SOCKET, settings=install.SETTINGS_PATH, runtime=install.RUNTIME, image=install.IMAGE,
    )  # fmt: skip
    return facts.read(EngineFacts, answer)


def problem(found: EngineFacts) -> tuple[str, str]:
    """Why no container of ours can be had of it, and what to do; empty where it will do."""
    if not found.installed:
        return "there is no Docker Engine (docker.service)", INSTALL
    if not found.pid:
        return "Docker Engine does not run (docker.service)", "`systemctl start docker.service` there."
    if found.program != "dockerd":
        return f"docker.service runs {found.program[:40]!r}, and no dockerd", INSTALL
    least = ".".join(map(str, LEAST_API))
    numbers = found.api.split(".")
    if len(numbers) != 2 or not all(n.isascii() and n.isdecimal() and len(n) < 5 for n in numbers):
        return f"what answers is no Docker Engine: API version {found.api[:40]!r}", INSTALL
    if tuple(map(int, numbers)) < LEAST_API:
        return f"Docker Engine is too old: it speaks API {found.api}, and {least} is needed", "20.10 or later."
    return _problem_of_settings(found) or _problem_of_machine(found) or ("", "")


def _problem_of_settings(found: EngineFacts) -> tuple[str, str] | None:
    if "rootless" in found.names:
        return "Docker Engine is rootless: root in its containers is not the machine's", "Scenarios need one of root's."
    if "userns" in found.names:
        return (
            "Docker Engine maps users (userns-remap): root in its containers is not the machine's",
            "Use a machine without `userns-remap`, or a guest: `--lab docker-debian-13`.",
        )
    if found.cgroups != "systemd 2":
        return (
            f"Docker Engine's cgroup driver and version are {found.cgroups[:40]!r}, and 'systemd 2' is needed",
            '`"exec-opts": ["native.cgroupdriver=systemd"]` in its settings, and a kernel with cgroup v2.',
        )
    if found.data != DATA:
        return f"Docker Engine has its data in {found.data[:80]!r}, and scenarios name {DATA}", "Use a guest instead."
    for option, why in BY_OPTION.items():
        if option in found.options:
            return f"dockerd is started with {option}: {why}", f"Say it in {install.SETTINGS_PATH} instead."
    if found.settings_problem:
        return f"{install.SETTINGS_PATH} {found.settings_problem[:200]}", "A runtime is added to it for the run."
    if found.settings_unread:
        return (
            f"{install.SETTINGS_PATH} was changed since Docker Engine has read it, and a run would have it read",
            "`systemctl reload docker.service` there, if that change is wanted.",
        )
    return None


def _problem_of_machine(found: EngineFacts) -> tuple[str, str] | None:
    if found.knows_runtime:
        return f"Docker Engine has a runtime {install.RUNTIME!r} already", "Nothing of somebody else's is replaced."
    if found.has_image:
        return (
            f"Docker Engine has an image {install.IMAGE!r} already",
            f"`docker rmi {install.IMAGE}`, if it is unused.",
        )
    if not found.runc:
        return "there is no runc, which starts containers", "It comes with Docker Engine: containerd.io, or runc."
    if not found.busybox:
        return (
            "there is no static BusyBox, which is the one program of every container",
            "Debian, Ubuntu: `apt install busybox-static`; Fedora: `dnf install busybox`.",
        )
    return None


def need(found: EngineFacts, name: str, frameworks: Collection[Framework]) -> None:
    """See that it will do, and that it confines by each of `frameworks`. Raises EngineError, FrameworkError."""
    why, hint = problem(found)
    if why:
        raise EngineError(f"{name}: {why}", hint=hint)
    for framework in frameworks:
        if framework not in found.frameworks:
            on = (
                '`"selinux-enabled": true` in its settings.' if framework is Framework.SELINUX else "See `docker info`."
            )
            raise FrameworkError(f"{name}: Docker Engine does not confine by {framework.display} there", hint=on)


def for_journal(found: EngineFacts) -> dict[str, Any]:
    """What the machine is told to have for containers, and to undo. Each time with a word of its own."""
    about = {
        "socket": install.SOCKET, "settings": install.SETTINGS_PATH, "runtime": install.RUNTIME,
        "image": install.IMAGE, "word": secrets.token_hex(16),
    }  # fmt: skip
    script = install.RUNTIME_SCRIPT.replace(install.RUNC, found.runc)
    return {"about": about, "runtime": {"path": install.RUNTIME_PATH, "script": script}, "program": found.busybox}
