"""The disk by which cloud-init is told, at an image's first boot, who may log in: its NoCloud source.

https://docs.cloud-init.io/en/latest/reference/datasources/nocloud.html
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

USER = "lsmlab"
MAC_ADDRESS = "52:54:00:12:34:56"
"""QEMU's own, of the one network card that a guest has."""


@dataclass(frozen=True, slots=True)
class KeyPair:
    """An SSH key in OpenSSH's forms."""

    private: str
    public: str

    @classmethod
    def generate(cls) -> KeyPair:
        """A new one, Ed25519."""
        # Here, as pycdlib below: no command but the one that prepares an image has to wait for them
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: PLC0415
        from cryptography.hazmat.primitives.serialization import (  # noqa: PLC0415
            Encoding,
            NoEncryption,
            PrivateFormat,
            PublicFormat,
        )

        key = Ed25519PrivateKey.generate()
        private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
        public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        return cls(private.decode(), public.decode())


def write(target: Path, user: KeyPair, machine: KeyPair) -> None:
    """Write the disk, ISO 9660: USER may log in with the key `user` and is root by sudo; `machine` is its host key.

    So it is known beforehand, and nobody is taken at his word at the first connection.
    """
    import pycdlib  # noqa: PLC0415 - see KeyPair.generate

    documents = {
        "user-data": "#cloud-config\n" + json.dumps(_user_data(user, machine), indent=1),  # JSON is YAML
        "meta-data": json.dumps({"instance-id": "lsmlab", "local-hostname": "lsmlab"}),
        "network-config": json.dumps(
            {"version": 2, "ethernets": {"first": {"match": {"macaddress": MAC_ADDRESS}, "dhcp4": True}}}
        ),
    }
    disk = pycdlib.PyCdlib()
    disk.new(interchange_level=3, joliet=3, rock_ridge="1.09", vol_ident="cidata")
    for number, (name, text) in enumerate(documents.items()):
        data = text.encode()
        disk.add_fp(io.BytesIO(data), len(data), f"/FILE{number}.;1", rr_name=name, joliet_path=f"/{name}")
    disk.write(str(target))
    disk.close()


def _user_data(user: KeyPair, machine: KeyPair) -> dict[str, object]:
    return {
        "hostname": "lsmlab",
        "manage_etc_hosts": True,
        "users": [
            {
                "name": USER,
                "sudo": "ALL=(ALL) NOPASSWD:ALL",
                "shell": "/bin/bash",
                "lock_passwd": True,
                "ssh_authorized_keys": [user.public],
            }
        ],
        "ssh_deletekeys": True,
        "ssh_genkeytypes": ["ed25519"],
        "ssh_keys": {"ed25519_private": machine.private, "ed25519_public": f"{machine.public} lsmlab"},
        "ssh_pwauth": False,
        "package_update": False,
        "package_upgrade": False,
    }
