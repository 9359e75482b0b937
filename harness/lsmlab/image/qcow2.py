"""Disks in QEMU's format, from elsewhere: looked at before QEMU is let at them."""

from __future__ import annotations

import struct
from pathlib import Path

from lsmlab.errors import DamagedError

MAGIC = b"QFI\xfb"
EXTERNAL_DATA_FILE = 1 << 2


def is_qcow2(path: Path) -> bool:
    """Whether the file begins as one does. Raises OSError."""
    with path.open("rb") as handle:
        return handle.read(4) == MAGIC


def size_of_plain(path: Path, *, what: str = "") -> int:
    """The size of a disk, bytes, that is a file of its own: QEMU would open others that its header names.

    Raises DamagedError. Source of the layout: https://www.qemu.org/docs/master/interop/qcow2.html
    """
    name = what or path.name
    with path.open("rb") as handle:
        head = handle.read(80)
    if len(head) < 80 or head[:4] != MAGIC:
        raise DamagedError(f"{name}: is no disk in the format qcow2")
    version, backing, _, _, virtual = struct.unpack(">IQIIQ", head[4:32])
    features = struct.unpack(">Q", head[72:80])[0] if version >= 3 else 0
    if backing or features & EXTERNAL_DATA_FILE:
        raise DamagedError(f"{name}: its header names another file, which an image of its own never does")
    return int(virtual)
