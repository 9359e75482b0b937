"""What a distribution says of its files: lists of digests, and whose signature they bear."""

from __future__ import annotations

import base64
import binascii
import datetime
import re
import subprocess
import tempfile
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
    """When the last of the keys in a file expires, as gpg lists them; None: never.

    For a warning before a download: nothing is verified here, which gpgv does. Raises HostError, ImageError.
    """
    with tempfile.TemporaryDirectory() as home:  # of its own: nothing is read from the user's, or written there
        argv = [host.need("gpg"), "--batch", "--no-autostart", "--homedir", home, "--with-colons", "--show-keys"]
        try:
            done = subprocess.run(
                argv, env=host.environment(), input=_keys(keyring), capture_output=True, timeout=60, check=False
            )
        except subprocess.TimeoutExpired:
            raise HostError(f"{keyring}: gpg does not list its keys within a minute") from None
    listed = [line.split(":") for line in done.stdout.decode("utf-8", "replace").splitlines()]
    ends = [fields[6] for fields in listed if fields[0] == "pub" and len(fields) > 6]
    if not ends:
        raise ImageError(f"{keyring}: gpg finds no key in it", hint=present_key(keyring))
    if not all(end.isdigit() for end in ends):  # empty: without an end
        return None
    return datetime.datetime.fromtimestamp(max(map(int, ends)), datetime.UTC)


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
