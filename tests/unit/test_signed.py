"""Signed lists of digests: what is taken, and every reason not to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lsmlab import doctor, host
from lsmlab.errors import DamagedError, HostError, ImageError, LsmlabError
from lsmlab.image import signed
from standin import Signer

KEYS = Path(__file__).resolve().parents[2] / "labs" / "keys"
DIGEST = "ab" * 32
TEXT = f"{DIGEST} *disk.img\n".encode()
LATER = ("--faked-system-time", "20200101T000000!")

needs_gpg = pytest.mark.skipif(
    host.find("gpg") is None or host.find("gpg-agent") is None, reason="gpg and gpg-agent are not installed here"
)


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Signer]:
    made = Signer.make(tmp_path_factory.mktemp("gnupg") / "home")
    yield made
    made.close()


@pytest.fixture
def keyring(signer: Signer, tmp_path: Path) -> Path:
    path = tmp_path / "key.asc"
    path.write_bytes(signer.public)
    return path


def refused(text: bytes, signature: bytes | None, keyring: Path) -> LsmlabError:
    with pytest.raises(LsmlabError) as caught:
        signed.verified("the list", text, signature, keyring)
    assert caught.value.message.startswith(("the list: ", str(keyring)))
    return caught.value


@needs_gpg
def test_a_detached_signature_vouches_for_the_whole_list(signer: Signer, keyring: Path) -> None:
    assert signed.verified("the list", TEXT, signer.detached(TEXT), keyring) == TEXT.decode()


@needs_gpg
def test_a_binary_keyring_is_taken_as_it_is(signer: Signer, tmp_path: Path) -> None:
    (tmp_path / "keys.gpg").write_bytes(signer.gpg("--export"))
    assert signed.verified("the list", TEXT, signer.detached(TEXT), tmp_path / "keys.gpg") == TEXT.decode()


@needs_gpg
def test_of_a_clear_signed_list_only_what_is_signed_counts(signer: Signer, keyring: Path) -> None:
    around = f"SHA256 (disk.img) = {'66' * 32}\n".encode()
    text = around + signer.clear(TEXT) + around
    taken = signed.verified("the list", text, None, keyring)
    assert taken == TEXT.decode()
    assert signed.digest_of("the list", taken, "disk.img") == DIGEST


@needs_gpg
@pytest.mark.parametrize("clear", [True, False])
def test_a_changed_list_is_refused(signer: Signer, keyring: Path, clear: bool) -> None:
    if clear:
        error = refused(signer.clear(TEXT).replace(b"abab", b"acac"), None, keyring)
    else:
        error = refused(TEXT.replace(b"abab", b"acac"), signer.detached(TEXT), keyring)
    assert isinstance(error, DamagedError)
    assert "it is not what was signed" in error.message


@needs_gpg
def test_a_key_that_is_not_known_is_refused(signer: Signer, tmp_path: Path) -> None:
    other = Signer.make(tmp_path / "other")
    try:
        (tmp_path / "key.asc").write_bytes(other.public)
    finally:
        other.close()
    error = refused(TEXT, signer.detached(TEXT), tmp_path / "key.asc")
    assert isinstance(error, ImageError)
    assert not isinstance(error, DamagedError), "to fetch it again would not help"
    assert "which is not in" in error.message
    assert "distribution's key" in error.hint


@needs_gpg
def test_an_expired_key_is_refused(tmp_path: Path) -> None:
    old = Signer.make(tmp_path / "old", *LATER, until="1m")
    try:
        (tmp_path / "key.asc").write_bytes(old.public)
        signature = old.detached(TEXT, *LATER)
    finally:
        old.close()
    error = refused(TEXT, signature, tmp_path / "key.asc")
    assert "the key that signed it has expired" in error.message
    assert "present key" in error.hint


@needs_gpg
def test_when_keys_expire(signer: Signer, tmp_path: Path) -> None:
    other = Signer.make(tmp_path / "other", until="10y")
    try:
        other.gpg("--import", stdin=signer.public)
        (tmp_path / "first").write_bytes(other.gpg("--export"))
        for wanted in ("1y", "20y"):  # the newest of a key's own words counts
            other.gpg("--faked-system-time", "20300101T000000", "--quick-set-expire", fingerprint(other), wanted)
            (tmp_path / wanted).write_bytes(other.gpg("--armor", "--export", fingerprint(other)))
    finally:
        other.close()
    found = {name: signed.expiry(tmp_path / name) for name in ("first", "1y", "20y")}
    assert found["first"] is None, "one of its two keys has no end"
    assert [str(found[name])[:4] for name in ("1y", "20y")] == ["2031", "2049"]


def fingerprint(signer: Signer) -> str:
    listed = signer.gpg("--with-colons", "--list-secret-keys").decode().splitlines()
    return next(line.split(":")[9] for line in listed if line.startswith("fpr:"))


@pytest.mark.parametrize("cut", [0, 1, 3, 300])
def test_what_is_no_key_never_passes_for_one_without_an_end(cut: int, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(signed._keys(KEYS / "opensuse.asc")[:cut])
    with pytest.raises(ImageError, match="no key"):
        signed.expiry(tmp_path / "key")


def test_without_gpg_it_is_not_said_that_a_key_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "find", lambda _: None)
    found = doctor._key(KEYS / "opensuse.asc", needed=True)
    assert "when it expires gpg would say, which is not installed" in found.found


@needs_gpg
@pytest.mark.parametrize("text", [b"", TEXT, b"-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n\n" + TEXT])
def test_a_list_without_a_signature_is_refused(keyring: Path, text: bytes) -> None:
    assert isinstance(refused(text, None, keyring), DamagedError)
    assert isinstance(refused(text, b"", keyring), DamagedError)


@needs_gpg
def test_a_keyring_that_is_none_is_refused(signer: Signer, tmp_path: Path) -> None:
    empty = tmp_path / "empty.asc"
    empty.write_text("-----BEGIN PGP PUBLIC KEY BLOCK-----\nnothing\n")
    assert "holds no public keys" in refused(TEXT, signer.detached(TEXT), empty).message
    with pytest.raises(HostError, match="No such file"):
        signed.verified("the list", TEXT, signer.detached(TEXT), tmp_path / "nowhere")


def test_the_keys_that_come_with_lsmlab_are_keys() -> None:
    keys = sorted(KEYS.glob("*.asc"))
    assert len(keys) >= 4
    for key in keys:
        assert signed._keys(key)[0] & 0x80, f"{key}: an OpenPGP packet begins with bit 7"


@pytest.mark.parametrize(
    ("text", "digest"),
    [
        (f"{DIGEST} *disk.img", DIGEST),
        (f"{DIGEST}  disk.img\n{'cd' * 32}  other.img", DIGEST),
        (f"# disk.img: 5 bytes\nSHA256 (disk.img) = {DIGEST.upper()}", DIGEST),
        (f"{DIGEST} *disk.img\nSHA256 (disk.img) = {DIGEST}", DIGEST),
    ],
)
def test_digests_are_read_in_both_forms(text: str, digest: str) -> None:
    assert signed.digest_of("the list", text, "disk.img") == digest


@pytest.mark.parametrize(
    "text", ["", f"{DIGEST} *my-disk.img", f"{DIGEST[1:]} *disk.img", f"MD5 (disk.img) = {DIGEST}", "disk.img"]
)
def test_a_list_that_does_not_name_the_file_is_no_answer(text: str) -> None:
    with pytest.raises(ImageError, match=r"has no digest of disk\.img"):
        signed.digest_of("the list", text, "disk.img")


def test_two_answers_are_none() -> None:
    with pytest.raises(ImageError, match="has two digests"):
        signed.digest_of("the list", f"{DIGEST} *disk.img\n{'cd' * 32} *disk.img", "disk.img")
