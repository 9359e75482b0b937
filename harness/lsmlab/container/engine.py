"""A container engine in a guest, and one container of it: created, started, and a command run in it."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import docker
import requests
from docker.constants import DEFAULT_DOCKER_API_VERSION
from docker.errors import DockerException

from lsmlab.channel.base import Channel
from lsmlab.container import install, transport
from lsmlab.container.kept import LEAST_API
from lsmlab.container.spec import Container
from lsmlab.errors import EngineError, FrameworkError
from lsmlab.terms import Arm, Framework

T = TypeVar("T")

LOG_LINES = 10
UNCONFINED = {Framework.APPARMOR: "apparmor=unconfined", Framework.SELINUX: "label=disable"}
OPTION = {Framework.APPARMOR: "apparmor=", Framework.SELINUX: "label="}
FRAME = struct.Struct(">BxxxI")
"""Before each piece of a container's output: 1 or 2 for which stream, and its length."""


@dataclass(frozen=True, slots=True)
class Output:
    """What a command in a container wrote."""

    out: bytes
    err: bytes


class Engine:
    """The engine behind `channel`. Every method raises EngineError."""

    def __init__(self, channel: Channel, socket: str = install.SOCKET, *, vehicle: str = install.VEHICLE) -> None:
        """Reach the engine, and see that it is not too old. `vehicle`: where its machine has the one program."""
        self._vehicle = vehicle
        self._adapter = transport.ChannelAdapter(channel, socket)
        least = ".".join(map(str, LEAST_API))
        found = _asked(self._client_of(least).version, api_version=False)
        said = found.get("ApiVersion") if isinstance(found, dict) else None
        numbers = re.fullmatch(r"(\d{1,4})\.(\d{1,4})", said) if isinstance(said, str) else None
        if numbers is None:
            raise EngineError(f"what answers on {socket} is no container engine: API version {said!r:.80}")
        version = (int(numbers[1]), int(numbers[2]))
        if version < LEAST_API:
            raise EngineError(
                f"the container engine is too old: it speaks API {said}, and {least} is needed",
                hint="Docker Engine 20.10 or later.",
            )
        ours = DEFAULT_DOCKER_API_VERSION
        self._client = self._client_of(min(said or "", ours, key=lambda v: [int(n) for n in v.split(".")]))

    def _client_of(self, version: str) -> Any:
        client = docker.APIClient(base_url="tcp://engine:1", version=version, timeout=transport.ENGINE_SECONDS)
        client.trust_env = False  # this machine's proxies and keys are nothing to a guest
        client.mount(client.base_url, self._adapter)
        return client

    @property
    def frameworks(self) -> frozenset[Framework]:
        """The frameworks that the engine confines containers by."""
        said = _asked(self._client.info).get("SecurityOptions") or []
        names = {str(option).partition(",")[0] for option in said}
        return frozenset(f for f in Framework if f"name={f}" in names)

    def need(self, framework: Framework) -> None:
        """See that containers can be confined by `framework`: a host without it is no control, but a mistake."""
        if framework not in self.frameworks:
            raise FrameworkError(
                f"the container engine does not confine by {framework.display}: its host's kernel lacks it, or its "
                "settings leave it out",
                hint="A container is held by its host's kernel and policy. `docker info` names them.",
            )

    def load_image(self) -> None:
        """Import the one image that scenarios' containers are made of."""
        _asked(
            self._client.import_image_from_data, install.image_tar(), repository=install.IMAGE, tag="latest",
            changes=["ENV PATH=/bin", "ENV LC_ALL=C"],
        )  # fmt: skip
        _asked(self._client.inspect_image, install.IMAGE)

    def tag(self, image: str, name: str) -> None:
        """Give an image one more name."""
        repository, _, tag = name.partition(":")
        _asked(self._client.tag, image, repository, tag=tag)

    def _process(self, container: Container) -> dict[str, Any]:
        """What a container is made of, and its main process: the image's own, where nothing else is said."""
        if container.image is None:
            return {"image": install.IMAGE, "command": list(container.run)}
        said: dict[str, Any] = {"image": container.image.name}
        if container.names_a_process:
            return said | {"entrypoint": list(container.run)}  # in place of the image's own, and of its arguments
        config = _asked(self._client.inspect_image, container.image.name).get("Config") or {}
        if config.get("Cmd") or config.get("Entrypoint"):
            return said
        return said | {"entrypoint": [install.PROGRAM_BESIDE, *container.run]}

    def start(
        self, container: Container, arm: Arm, *, name: str, unconfined: bool, group: str | None = None
    ) -> Running:
        """Create a container and start it. `group`: the slice that it is to lie in."""
        framework = arm.framework
        assert framework is not None
        made = _asked(
            self._client.create_container, **self._process(container), name=name, user=container.user,
            host_config=self._host_config(container, framework, unconfined=unconfined, group=group),
            use_config_proxy=False,
        )  # fmt: skip
        running = Running(self._client, self._adapter, str(made["Id"]), name, beside=container.image is not None)
        try:
            _asked(self._client.start, running.id)
        except EngineError as error:
            raise EngineError(f"{error.message}{running.last_words()}") from error
        running.need_running()
        return running

    def _host_config(
        self, container: Container, framework: Framework, *, unconfined: bool, group: str | None
    ) -> dict[str, Any]:
        program = install.PROGRAM if container.image is None else install.PROGRAM_BESIDE
        found: dict[str, Any] = self._client.create_host_config(
            binds=[f"{self._vehicle}:{program}:ro", *container.binds],
            cap_add=list(container.cap_add),
            privileged=container.privileged,
            security_opt=options(container, framework, unconfined=unconfined),
            network_mode=container.network,
            pid_mode=container.pid,
            runtime=install.RUNTIME,
            cgroup_parent=group,
        )
        if "systempaths=unconfined" in container.security_opt:  # docker's own command line makes the same of it
            found |= {"MaskedPaths": [], "ReadonlyPaths": []}
        return found


def options(container: Container, framework: Framework, *, unconfined: bool) -> list[str]:
    """The `--security-opt` of a container in an arm of `framework`: only its own, or its control's, and the others."""
    neutral = [o for o in container.security_opt if not o.startswith((*OPTION.values(), "systempaths="))]
    own = [o for o in container.security_opt if o.startswith(OPTION[framework])]
    return [*neutral, *([UNCONFINED[framework]] if unconfined else own)]


@dataclass(frozen=True, slots=True)
class Running:
    """A container that runs. Every method raises EngineError."""

    client: Any
    adapter: transport.ChannelAdapter
    id: str
    name: str
    beside: bool = False
    """Its image is not the one of BusyBox alone, whose words are then said to the program beside it."""

    def command(self, argv: tuple[str, ...]) -> list[str]:
        """A command of BusyBox's, as it is run in here."""
        return [install.PROGRAM_BESIDE, *argv] if self.beside else list(argv)

    def need_running(self) -> None:
        """See that it has not ended."""
        state = _asked(self.client.inspect_container, self.id).get("State") or {}
        if state.get("Running") is not True:
            words = f"the container {self.name} ended at once, with exit status {state.get('ExitCode')!r:.20}"
            raise EngineError(f"{words}{self.last_words()}", hint="Its `run` has to be a program that keeps running.")

    def last_words(self) -> str:
        """The end of its log, as lines below an error; empty where it wrote nothing."""
        log = b""
        with suppress(EngineError):
            log = _asked(self.client.logs, self.id, tail=LOG_LINES)
        lines = log.decode("utf-8", "backslashreplace").splitlines()[-LOG_LINES:]
        return "".join(f"\n  {self.name}: {line[:200]}" for line in lines)

    def prepare(self, argv: tuple[str, ...]) -> tuple[str, bytes]:
        """A command that is to run in it: its id, and the request that runs it, as `exchange` of the agent takes it."""
        try:
            made = _asked(self.client.exec_create, self.id, self.command(argv))
        except EngineError as error:
            raise EngineError(f"{error.message}{self.last_words()}") from error
        number = str(made["Id"])
        path = f"{self.client.base_url}/v{self.client.api_version}/exec/{number}/start"
        asked = requests.Request("POST", path, json={"Tty": False, "Detach": False})
        return number, transport.message(self.client.prepare_request(asked))

    def output(self, answer: bytes) -> Output:
        """What a command wrote, from the engine's answer to the request that ran it."""
        response = transport.read_response(answer, "running a command in the container")
        if response.status_code >= 300:
            raise EngineError(f"the container {self.name} runs no command: {response.text[:500]}{self.last_words()}")
        return demultiplexed(response.content)

    def exit_code(self, number: str) -> int:
        """The exit status of a command that has ended; 128 and more for a signal, as the engine says it."""
        code = _asked(self.client.exec_inspect, number).get("ExitCode")
        if type(code) is not int or not 0 <= code <= 255:
            raise EngineError(f"the command in the container {self.name} has not ended: exit status {code!r:.40}")
        return code


def demultiplexed(data: bytes) -> Output:
    """A container's two streams, which come in one. Raises EngineError where it is not whole."""
    streams: dict[int, bytearray] = {1: bytearray(), 2: bytearray()}
    at = 0
    while at < len(data):
        if len(data) - at < FRAME.size:
            raise EngineError("the output of the command in the container ended within a piece's head")
        stream, length = FRAME.unpack_from(data, at)
        at += FRAME.size
        if stream not in streams or length > len(data) - at:
            raise EngineError(
                f"the output of the command in the container is not whole: stream {stream}, {length} bytes"
            )
        streams[stream] += data[at : at + length]
        at += length
    return Output(bytes(streams[1]), bytes(streams[2]))


def bring_up(channel: Channel, units: Sequence[str]) -> None:
    """Start the engine of a freshly booted guest, and give it the image. Raises EngineError and ChannelError."""
    install.write(channel)
    started = channel.run(["systemctl", "start", units[0]], timeout=300)
    if not started.ok:
        log = channel.run(["journalctl", "--unit", units[0], "--no-pager", "--lines", "15", "--output", "cat"]).out
        raise EngineError(f"the container engine does not start: {started.err.strip()}\n{log}")
    Engine(channel).load_image()
    channel.run(["sync"]).check()


def _asked(do: Callable[..., T], *arguments: Any, **named: Any) -> T:
    """What the SDK answers. Raises EngineError with the engine's own words."""
    try:
        return do(*arguments, **named)
    except (DockerException, requests.RequestException, ValueError, KeyError, TypeError, AttributeError) as error:
        words = getattr(error, "explanation", None) or str(error) or type(error).__name__
        raise EngineError(f"the container engine: {str(words)[:1000]}") from error
