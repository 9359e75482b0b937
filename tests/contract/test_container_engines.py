"""What every container engine must do for us, over one of the tests' own and over Docker Engine in a real guest."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fake_engine import AgentChannel, LocalEngine
from lsmlab import discovery
from lsmlab.bench import open_bench
from lsmlab.channel.base import Channel
from lsmlab.container import install, transport
from lsmlab.container.engine import Engine, Running
from lsmlab.container.spec import Container
from lsmlab.errors import EngineError, FrameworkError
from lsmlab.progress import Silent
from lsmlab.terms import Arm, Framework, Kernel

pytestmark = pytest.mark.container

ARM = Arm.APPARMOR_ENFORCE
IN_A_GUEST = pytest.param("in-a-guest", marks=[pytest.mark.lsmlab_vm, pytest.mark.slow])


@dataclass(frozen=True, slots=True)
class There:
    """An engine, and the way to it."""

    engine: Engine
    channel: Channel
    socket: str

    def start(self, name: str, **container: object) -> Running:
        given = Container.model_validate(container, strict=False)
        return self.engine.start(given, ARM, name=name, unconfined=False)

    def run(self, container: Running, *argv: str) -> tuple[int, bytes, bytes]:
        """Exit status, output and errors of a command, which is run as an attempt runs it."""
        number, request = container.prepare(argv)
        answer = self.channel.ask(
            "exchange", within=90, path=self.socket, timeout=60, data=base64.b64encode(request).decode()
        )
        written = container.output(transport.carried(answer, "the command"))
        return container.exit_code(number), written.out, written.err


@pytest.fixture(scope="module", params=["local", IN_A_GUEST])
def there(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[There]:
    if request.param == "local":
        folder: Path = tmp_path_factory.mktemp("engine")
        local = LocalEngine(folder)
        channel = AgentChannel()
        yield There(Engine(channel, local.path), channel, local.path)
        local.close()
        return
    with (
        open_bench(discovery.load_lab("docker-debian-13"), Silent()) as bench,
        bench.guest(Kernel.APPARMOR, "contract of engines") as guest,
    ):
        yield There(Engine(guest.channel), guest.channel, install.SOCKET)


@pytest.fixture(scope="module")
def running(there: There) -> Running:
    """The container that tests share; none leaves anything in it that another looks at."""
    return there.start("shared", run=["sleep", "1000"])


@pytest.mark.parametrize("status", [0, 1, 7, 126, 127, 255])
def test_an_exit_status_is_the_commands_own(there: There, running: Running, status: int) -> None:
    assert there.run(running, "sh", "-c", f"exit {status}") == (status, b"", b"")


def test_a_signal_is_told_as_a_shell_tells_it(there: There, running: Running) -> None:
    assert there.run(running, "sh", "-c", "kill -9 $$")[0] == 128 + 9


def test_output_and_errors_are_kept_apart(there: There, running: Running) -> None:
    assert there.run(running, "sh", "-c", "echo out; echo err >&2; exit 3") == (3, b"out\n", b"err\n")


def test_arguments_arrive_as_they_are(there: There, running: Running) -> None:
    awkward = ("two words", "", "a\nb", 'it\'s "quoted"', "$HOME `id`", "*", "-n", "é")
    code, out, _ = there.run(running, "sh", "-c", 'for word; do echo "<$word>"; done', "sh", *awkward)
    assert (code, out.decode()) == (0, "".join(f"<{word}>\n" for word in awkward))


def test_every_byte_comes_through(there: There, running: Running) -> None:
    every = bytes(range(256))
    octal = "".join(f"\\0{byte:03o}" for byte in every)
    code, out, _ = there.run(running, "sh", "-c", f"printf '%b' '{octal}'")
    assert (code, out) == (0, every)


def test_much_output_is_whole(there: There, running: Running) -> None:
    code, out, _ = there.run(running, "sh", "-c", "head -c 3000000 /dev/zero; head -c 1000 /dev/zero >&2")
    assert (code, len(out), out.count(0)) == (0, 3_000_000, 3_000_000)


def test_a_program_that_is_not_there_is_no_success(there: There, running: Running) -> None:
    code, _, err = there.run(running, "sh", "-c", "no-such-program")
    assert (code, b"not found" in err) == (127, True)


def test_containers_have_files_of_their_own(there: There) -> None:
    one, other = there.start("one", run=["sleep", "1000"]), there.start("other", run=["sleep", "1000"])
    assert there.run(one, "sh", "-c", "echo of one > note; cat note") == (0, b"of one\n", b"")
    assert there.run(other, "cat", "note")[0] == 1
    assert there.run(one, "cat", "note")[1] == b"of one\n"


def test_a_container_that_ends_at_once_is_an_error_with_its_last_words(there: There) -> None:
    def start() -> None:
        container = there.start("short", run=["sh", "-c", "echo no configuration; exit 5"])
        while time.monotonic() < deadline:  # it was looked at before it had ended
            container.need_running()

    deadline = time.monotonic() + 60
    with pytest.raises(EngineError, match="ended at once, with exit status 5") as caught:
        start()
    assert "short: no configuration" in caught.value.message


def test_a_framework_that_its_machine_lacks_is_an_error_and_no_control(there: There) -> None:
    there.engine.need(Framework.APPARMOR)
    with pytest.raises(FrameworkError, match="does not confine by SELinux"):
        there.engine.need(Framework.SELINUX)


def test_no_engine_is_an_error_that_says_so(there: There) -> None:
    with pytest.raises(EngineError, match=r"no container engine answers on /nowhere\.sock"):
        Engine(there.channel, "/nowhere.sock")
