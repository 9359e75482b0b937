"""A guest's own sshd at a port of this machine. The guest has no network: its console, made raw, carries the bytes.

Each connection has a number; a frame is the number, a length and so many bytes, and one without bytes opens or ends it.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import paramiko

from lsmlab.machine.qemu import QemuMachine

FRAME = struct.Struct("!HH")
RELAY = """
import os, socket, struct, threading, tty
console = os.open("/dev/hvc0", os.O_RDWR | os.O_NOCTTY)
tty.setraw(console)
writing, links = threading.Lock(), {}
def send(number, data):
    with writing:
        left = struct.pack("!HH", number, len(data)) + data
        while left:
            left = left[os.write(console, left):]
def out(number, link):
    try:
        while data := link.recv(4096):
            send(number, data)
    except OSError:
        pass
    send(number, b"")
def read(count):
    kept = b""
    while len(kept) < count:
        kept += os.read(console, count - len(kept))
    return kept
os.write(console, b"!")
while True:
    number, length = struct.unpack("!HH", read(4))
    data = read(length)
    if number not in links:
        links[number] = socket.create_connection(("127.0.0.1", 22))
        threading.Thread(target=out, args=(number, links[number]), daemon=True).start()
    elif not data:
        try:
            links[number].shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
    else:
        try:
            links[number].sendall(data)
        except OSError:
            pass
"""
PREPARE = """
set -e
systemctl unmask --quiet ssh.service
ssh-keygen -A
mkdir -p -m 700 /root/.ssh
cat > /root/.ssh/authorized_keys
useradd --create-home --shell /bin/bash vagrant
install -d -m 700 -o vagrant -g vagrant /home/vagrant/.ssh
install -m 600 -o vagrant -g vagrant /root/.ssh/authorized_keys /home/vagrant/.ssh
echo 'vagrant ALL=(ALL) NOPASSWD: ALL' > /etc/sudoers.d/vagrant # as Vagrant's boxes have it
chmod 440 /etc/sudoers.d/vagrant
if [ -e /sys/fs/selinux/enforce ]; then restorecon -RF /etc/ssh /etc/sudoers.d /root/.ssh /home/vagrant; fi
systemctl start ssh.service # before the time that is noted: it makes files
touch /run/before
until [ /run/after -nt /run/before ]; do touch /run/after; done # a file's time is that of the kernel's last tick
"""


@contextlib.contextmanager
def reached(machine: QemuMachine, home: Path) -> Iterator[int]:
    """The port of this machine at which the guest's sshd answers, to who has `home`'s key and knows the guest's.

    Let in are root, and vagrant, an ordinary user whom sudo makes root without a password.
    """
    own = paramiko.ECDSAKey.generate()
    (home / ".ssh").mkdir(mode=0o700)
    own.write_private_key_file(str(home / ".ssh" / "id_ecdsa"))
    public = f"{own.get_name()} {own.get_base64()}\n".encode()
    machine.channel.run(["sh", "-c", PREPARE], stdin=public, timeout=120).check()
    host_key = machine.channel.run(["cat", "/etc/ssh/ssh_host_ed25519_key.pub"]).check().out
    with relayed(machine) as port:
        (home / ".ssh" / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key}")
        yield port


@contextlib.contextmanager
def relayed(machine: QemuMachine, port: int = 0) -> Iterator[int]:
    """The port at which the sshd answers of a guest that was prepared already; 0: any. It ends with the guest."""
    machine.channel.run(["systemctl", "start", "ssh.service"], timeout=60).check()
    machine.channel.run(["systemd-run", "--quiet", "python3", "-c", RELAY], timeout=60).check()
    console = machine.terminal_socket
    assert console is not None
    console.settimeout(60)
    while console.recv(1) != b"!":
        pass
    console.settimeout(None)
    with socket.create_server(("127.0.0.1", port)) as listener:
        _Relay(listener, console).start()
        yield listener.getsockname()[1]


class _Relay:
    """This machine's end of the console."""

    def __init__(self, listener: socket.socket, console: socket.socket) -> None:
        self._listener = listener
        self._console = console
        self._writing = threading.Lock()
        self._links: dict[int, socket.socket] = {}

    def start(self) -> None:
        """Serve, until listener and console are closed."""
        for work in (self._accept, self._answers):
            threading.Thread(target=work, daemon=True).start()

    def _send(self, number: int, data: bytes) -> None:
        with self._writing:
            self._console.sendall(FRAME.pack(number, len(data)) + data)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            for number in itertools.count(1):
                self._links[number] = self._listener.accept()[0]
                self._send(number, b"")
                threading.Thread(target=self._questions, args=(number,), daemon=True).start()

    def _questions(self, number: int) -> None:
        with contextlib.suppress(OSError):
            while data := self._links[number].recv(4096):
                self._send(number, data)
        with contextlib.suppress(OSError):
            self._send(number, b"")

    def _answers(self) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                number, length = FRAME.unpack(self._read(FRAME.size))
                data = self._read(length)
                link = self._links[number]
                with contextlib.suppress(OSError):
                    if data:
                        link.sendall(data)
                    else:
                        link.close()
        for end in (self._listener, *self._links.values()):  # the guest is gone, and nothing answers at this port
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _read(self, count: int) -> bytes:
        kept = b""
        while len(kept) < count:
            data = self._console.recv(count - len(kept))
            if not data:
                raise EOFError
            kept += data
        return kept
