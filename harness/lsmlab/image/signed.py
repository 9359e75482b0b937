"""What a distribution says of its files: lists of digests, and whose signature they bear."""

from __future__ import annotations

import base64
import binascii
import datetime
import hashlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from lsmlab import cache, host
from lsmlab.errors import DamagedError, HostError, ImageError

MOST_BYTES = 1 << 20
"""A list of digests, its signature, or a keyring: more is something else."""
_BSD = re.compile(r"SHA256 \((?P<name>[^)\n]+)\) = (?P<digest>[0-9a-fA-F]{64})")
_COREUTILS = re.compile(r"(?P<digest>[0-9a-fA-F]{64}) [ *](?P<name>\S+)")
_ARMOR = re.compile(
    r"-----BEGIN PGP PUBLIC KEY BLOCK-----\n(?:[A-Za-z]+: .*\n)*\n(?P<data>[A-Za-z0-9+/=\n]+?)\n=[A-Za-z0-9+/=]{4}\n"
    r"-----END PGP PUBLIC KEY BLOCK-----"
)
REFUSALS = {
    "BADSIG": "it is not what was signed",
    "EXPKEYSIG": "the key that signed it has expired",
    "REVKEYSIG": "the key that signed it was revoked",
    "EXPSIG": "the signature has expired",
}
"""gpgv's words, and what they mean: doc/DETAILS of GnuPG."""
_KEY, _SIGNATURE = 6, 2
"""Packets of OpenPGP, of version 4: RFC 4880, 5.2.3 and 5.5.2."""
_BY_ITSELF = frozenset({0x10, 0x11, 0x12, 0x13, 0x1F})
"""Signatures by which a key says something of itself."""
_MADE, _VALID_FOR, _ISSUER = 2, 9, 16
"""What they say: when they were made, the seconds that the key is valid from its making, and whose they are."""


def verified(what: str, text: bytes, signature: bytes | None, keyring: Path) -> str:
    """The part of `text` that bears a good signature by a key of `keyring`; `what` names it.

    `signature` None: `text` is clear-signed. Raises DamagedError where it is not what was signed, and ImageError where
    no key here vouches for it.
    """
    with cache.scratch("signature") as folder:
        (folder / "keys").write_bytes(_keys(keyring))
        (folder / "text").write_bytes(text)
        argv = [host.need("gpgv"), "--status-fd", "1", "--keyring", str(folder / "keys")]
        if signature is None:
            argv += ["--output", str(folder / "signed"), str(folder / "text")]
        else:
            (folder / "signature").write_bytes(signature)
            argv += [str(folder / "signature"), str(folder / "text")]
        done = subprocess.run(argv, env=host.environment(), capture_output=True, timeout=60, check=False)
        _see(what, done, keyring)
        # Of a clear-signed text only what the signature covers: around it may stand anything
        signed = folder / ("text" if signature is not None else "signed")
        if not signed.is_file():
            raise DamagedError(f"{what}: bears no signature")
        return signed.read_bytes().decode("utf-8", "replace")


def _see(what: str, done: subprocess.CompletedProcess[bytes], keyring: Path) -> None:
    """Raises where gpgv's status lines are not those of one good signature by a key that is valid today."""
    words = [line.split() for line in done.stdout.decode("utf-8", "replace").splitlines()]
    said = {parts[1]: parts[2:] for parts in words if len(parts) > 1 and parts[0] == "[GNUPG:]"}
    for word, meaning in REFUSALS.items():
        if word in said:
            key = said[word][0] if said[word] else "unknown"
            kind = DamagedError if word == "BADSIG" else ImageError
            raise kind(
                f"{what}: {meaning} (key {key})",
                hint="" if word == "BADSIG" else present_key(keyring),
            )
    if "NO_PUBKEY" in said:
        raise ImageError(
            f"{what}: signed by the key {' '.join(said['NO_PUBKEY'])}, which is not in {keyring}",
            hint="See on another way that it is the distribution's key before you put it there.",
        )
    if done.returncode != 0 or "VALIDSIG" not in said:
        last = (done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no signature is found"])[-1]
        raise DamagedError(f"{what}: bears no good signature: {last[:300]}")


def present_key(keyring: Path) -> str:
    """What to do about a key that is not valid any more."""
    return f"Put the distribution's present key into {keyring}, and see its fingerprint on another way."


def expiry(keyring: Path) -> datetime.datetime | None:
    """When the last of the keys in a file expires, as they say themselves; None: never, or nobody can tell.

    For a warning before a download: nothing is verified here, which gpgv does. Raises HostError, ImageError.
    """
    try:
        ends = list(_ends(_keys(keyring)))
    except (LookupError, ValueError, OverflowError):
        return None
    return max((end for end in ends if end is not None), default=None) if None not in ends else None


def _ends(data: bytes) -> Iterator[datetime.datetime | None]:
    """When each key expires; None: never."""
    key, newest, valid_for = b"", -1, 0
    for tag, body in [*_packets(data), (_KEY, b"")]:
        if tag == _KEY:
            if key:
                end = int.from_bytes(key[1:5]) + valid_for
                yield datetime.datetime.fromtimestamp(end, datetime.UTC) if valid_for else None
            key, newest, valid_for = body, -1, 0
        elif tag == _SIGNATURE and body[0] == key[0] == 4 and body[1] in _BY_ITSELF:
            said = _said(body)
            made = int.from_bytes(said[_MADE])
            if said.get(_ISSUER) == _key_id(key) and made > newest:
                newest, valid_for = made, int.from_bytes(said.get(_VALID_FOR, b""))


def _packets(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Tag and body of each packet."""
    at = 0
    while at < len(data):
        first = data[at]
        if first & 0x40:
            tag, (size, begin) = first & 0x3F, _size(data, at + 1, 223)
        else:
            octets = 1 << (first & 3)
            tag, begin = first >> 2 & 0xF, at + 1 + octets
            size = int.from_bytes(data[at + 1 : begin])
        yield tag, data[begin : begin + size]
        at = begin + size


def _size(data: bytes, at: int, most_in_two: int) -> tuple[int, int]:
    """A length in one, two or five octets, and where what it is of begins: RFC 4880, 4.2.2."""
    first = data[at]
    if first < 192:
        return first, at + 1
    if first <= most_in_two:
        return (first - 192 << 8) + data[at + 1] + 192, at + 2
    return int.from_bytes(data[at + 1 : at + 5]), at + 5


def _said(signature: bytes) -> dict[int, bytes]:
    """The parts of a signature, by their type: those that it covers, and where they lack, those beside it."""
    found: dict[int, bytes] = {}
    at = 4
    for _ in range(2):
        at, end = at + 2, at + 2 + int.from_bytes(signature[at : at + 2])
        while at < end:
            size, begin = _size(signature, at, 254)
            found.setdefault(signature[begin] & 0x7F, signature[begin + 1 : begin + size])
            at = begin + size
    return found


def _key_id(key: bytes) -> bytes:
    digest = hashlib.sha1(b"\x99" + len(key).to_bytes(2) + key, usedforsecurity=False)
    return digest.digest()[-8:]


def _keys(keyring: Path) -> bytes:
    """The keys in binary form, which is all that gpgv takes; the file may be armored. Raises HostError, ImageError."""
    try:
        data = keyring.read_bytes()
    except OSError as error:
        raise HostError(f"{keyring}: {error.strerror}") from error
    if not data.lstrip().startswith(b"-----BEGIN"):
        return data
    blocks = _ARMOR.findall(data.decode("ascii", "replace").replace("\r\n", "\n"))
    try:
        found = b"".join(base64.b64decode(block, validate=False) for block in blocks)
    except binascii.Error:
        found = b""
    if not found:
        raise ImageError(f"{keyring}: holds no public keys")
    return found


def digest_of(what: str, text: str, name: str) -> str:
    """The SHA-256 that a list says of the file `name`, in coreutils' form or BSD's; hexadecimal, lower case.

    Raises ImageError where it is not in the list, or there twice and not the same.
    """
    found = {
        match["digest"].lower()
        for line in text.splitlines()
        if (match := _BSD.fullmatch(line.strip()) or _COREUTILS.fullmatch(line.strip())) and match["name"] == name
    }
    if len(found) != 1:
        raise ImageError(f"{what}: has {'two digests' if found else 'no digest'} of {name}")
    return found.pop()
