"""Images: what their digest hangs on, where their packages come from, the proof about dontaudit, how they are found."""

from __future__ import annotations

import contextlib
import errno
import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from entries import Notes, put_image

from lsmlab import cache, discovery, host, paths
from lsmlab.errors import HostError, ImageError
from lsmlab.image import build, debian, policy, profile
from lsmlab.image.build import Image
from lsmlab.lab import Lab


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An LSMLAB_HOME of the test's own."""
    monkeypatch.setenv("LSMLAB_HOME", str(tmp_path / "home"))
    for name in ("LSMLAB_MIRROR", "LSMLAB_SECURITY_MIRROR"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "home"


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a program on a PATH that has nothing else."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def add(name: str, body: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)

    return add


Stub = Callable[[str, str], None]


@pytest.fixture(scope="module")
def lab() -> Lab:
    return discovery.load_lab("debian-13")


# The proof that a policy without dontaudit decides the same

SHIPPED = """\
(type httpd_t)
(allow httpd_t etc_t (file (read open)))
(dontaudit httpd_t shadow_t (file (read)))
(dontaudit httpd_t self (capability (net_admin)))
(booleanif (httpd_can_network_connect)
    (true
        (allow httpd_t port_t (tcp_socket (name_connect)))
        (dontaudit httpd_t port_t (udp_socket (name_bind)))
    )
)
(booleanif (not (allow_ypbind))
    (false
        (dontaudit httpd_t ypbind_t (fifo_file (read)))
    )
)
(typetransition httpd_t tmp_t file httpd_tmp_t)
"""
AUDITED = """\
(type httpd_t)
(allow httpd_t etc_t (file (read open)))
(booleanif (httpd_can_network_connect)
    (true
        (allow httpd_t port_t (tcp_socket (name_connect)))
    )
)
(typetransition httpd_t tmp_t file httpd_tmp_t)
"""


def test_a_policy_without_dontaudit_decides_the_same() -> None:
    assert policy.prove_same_decisions(SHIPPED, AUDITED) == 4


@pytest.mark.parametrize(
    "change",
    [
        ("(allow httpd_t etc_t (file (read open)))\n", ""),
        ("(file (read open))", "(file (read))"),
        ("(file (read open))", "(file (read open write))"),
        ("        (allow httpd_t port_t (tcp_socket (name_connect)))\n", ""),
        ("(true\n", "(false\n"),
        ("httpd_can_network_connect", "httpd_can_network_relay"),
        ("(typetransition httpd_t tmp_t file httpd_tmp_t)\n", ""),
        ("(type httpd_t)\n", "(type httpd_t)\n(allow httpd_t shadow_t (file (read)))\n"),
        ("file httpd_tmp_t)\n", "file httpd_tmp_t)\n(typepermissive httpd_t)\n"),
    ],
    ids=lambda change: change[1][:40].strip() or f"without {change[0][:40].strip()}",
)
def test_any_other_difference_is_an_error_that_shows_it(change: tuple[str, str]) -> None:
    audited = AUDITED.replace(*change)
    assert audited != AUDITED
    with pytest.raises(ImageError, match="decides otherwise than the distribution's: "):
        policy.prove_same_decisions(SHIPPED, audited)


def test_a_difference_at_the_end_is_shown_too() -> None:
    with pytest.raises(ImageError, match="typepermissive"):
        policy.prove_same_decisions(SHIPPED, AUDITED + "(typepermissive httpd_t)\n")


def test_the_first_difference_is_shown() -> None:
    with pytest.raises(ImageError) as caught:
        policy.prove_same_decisions(SHIPPED, AUDITED.replace("(read open)", "(read)"))
    assert "(allow httpd_t etc_t (file (read open))) / (allow httpd_t etc_t (file (read)))" in str(caught.value)


def test_a_dontaudit_that_is_left_is_an_error() -> None:
    with pytest.raises(ImageError, match="1 dontaudit rules are left"):
        policy.prove_same_decisions(SHIPPED, AUDITED + "(dontaudit httpd_t shadow_t (file (read)))\n")


@pytest.mark.parametrize(
    ("shipped", "audited"),
    [("", ""), (AUDITED, AUDITED), (SHIPPED, ""), ("(dontaudit a b (file (read)))", "(type a)")],
    ids=["empty", "no dontaudit", "no allow", "only a type"],
)
def test_comparing_nothing_proves_nothing(shipped: str, audited: str) -> None:
    with pytest.raises(ImageError, match="nothing was proved"):
        policy.prove_same_decisions(shipped, audited)


def test_decisions_leave_out_what_decides_nothing() -> None:
    left = policy.decisions(SHIPPED)
    assert "dontaudit" not in left
    assert "ypbind" not in left
    assert left == policy.decisions(AUDITED)


# The recipe


def with_image(lab: Lab, **changes: object) -> Lab:
    return lab.model_copy(update={"image": lab.disk.model_copy(update=changes)})


def test_the_recipe_changes_with_what_goes_into_the_image(lab: Lab) -> None:
    others = [
        with_image(lab, packages=(*lab.disk.packages, "apache2")),
        with_image(lab, packages=lab.disk.packages[::-1]),
        with_image(lab, suite="sid"),
        with_image(lab, disk_mib=4096),
        with_image(lab, masked_units=()),
    ]
    digests = [build.recipe_digest(one) for one in [lab, *others]]
    assert len(set(digests)) == len(digests)
    assert all(len(d) == 64 for d in digests)


def test_the_recipe_does_not_change_with_what_does_not(lab: Lab) -> None:
    changes: list[dict[str, object]] = [
        {"memory_mib": 2048},
        {"title": "x"},
        {"services": {}},
        {"kernel_arguments": {}},
    ]
    for change in changes:
        assert build.recipe_digest(lab.model_copy(update=change)) == build.recipe_digest(lab), change


def test_the_recipe_changes_with_the_files_that_are_laid_over(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "package"
    overlay = package / "image" / "overlay" / "etc"
    overlay.mkdir(parents=True)
    (package / "image" / "prepare.sh").write_text("true\n")
    (overlay / "hosts").write_text("127.0.0.1 localhost\n")
    monkeypatch.setattr(resources, "files", lambda _: package)
    seen = [build.recipe_digest(lab)]
    assert build.recipe_digest(lab) == seen[0]
    for change in (
        lambda: (overlay / "hosts").write_text("127.0.0.1 lab\n"),
        lambda: (overlay / "hosts").rename(overlay / "hostname"),
        lambda: (overlay / "new").write_text(""),
        lambda: (package / "image" / "prepare.sh").write_text("false\n"),
    ):
        change()
        seen.append(build.recipe_digest(lab))
    assert len(set(seen)) == len(seen)


def test_the_recipe_changes_with_links_and_modes(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package"
    wants = package / "image" / "overlay" / "wants"
    wants.mkdir(parents=True)
    (package / "image" / "prepare.sh").write_text("true\n")
    (wants / "file").write_text("x")
    monkeypatch.setattr(resources, "files", lambda _: package)
    before = build.recipe_digest(lab)
    (wants / "a.service").symlink_to("/etc/systemd/system/a.service")
    linked = build.recipe_digest(lab)
    (wants / "file").chmod(0o755)
    assert len({before, linked, build.recipe_digest(lab)}) == 3


def test_two_labs_have_two_folders(lab: Lab) -> None:
    assert build.folder_of(lab, "a").name.startswith("debian-13-")
    assert build.folder_of(lab, "a") != build.folder_of(discovery.load_lab("debian-12"), "a")
    assert build.folder_of(lab, "a").parent == paths.cache() / "images"


# Where packages come from

DEBIAN = """
echo 'Debian|Debian|http://deb.example/debian/'
echo 'Docker|Docker CE|https://docker.example/'
echo 'Debian|Debian-Security|http://deb.example/security/'
echo 'Debian|Debian|http://second.example/debian/'
echo '||'
"""
KEYRING = Path("/dev/null")


@pytest.fixture
def keyring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian, "KEYRING", KEYRING)


def test_a_package_that_does_not_exist_is_named(lab: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = "installing failed (25): mmdebstrap\nBuilding tree...\nE: Unable to locate package no-such-one\nE: x"

    def fail(*_: object, **__: object) -> bytes:
        raise HostError(said)

    recipe = lab.image
    assert recipe is not None
    monkeypatch.setattr(debian, "package_sources", lambda _: [])
    monkeypatch.setattr(debian, "proxy_settings", lambda: "")
    monkeypatch.setattr(host, "need", str)
    monkeypatch.setattr(host, "run", fail)
    with pytest.raises(ImageError) as caught:
        debian._bootstrap(lab, recipe, tmp_path)
    assert caught.value.message == "Debian trixie has no package no-such-one"
    said = "installing failed (100): mmdebstrap\nE: Failed to fetch"
    with pytest.raises(ImageError, match="Failed to fetch"):
        debian._bootstrap(lab, recipe, tmp_path)


@pytest.mark.usefixtures("keyring")
def test_packages_come_from_where_this_machines_apt_takes_them(stub: Stub) -> None:
    stub("apt-get", DEBIAN)
    option = f"[signed-by={KEYRING}]"
    assert debian.package_sources("trixie") == [
        f"deb {option} http://deb.example/debian/ trixie main",
        f"deb {option} http://deb.example/debian/ trixie-updates main",
        f"deb {option} http://deb.example/security/ trixie-security main",
    ]


@pytest.mark.usefixtures("keyring")
def test_a_mirror_may_be_named(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    stub("apt-get", "exit 1")
    monkeypatch.setenv("LSMLAB_MIRROR", "http://mirror.example/debian")
    sources = debian.package_sources("bookworm")
    assert [line.split(" ", 2)[2] for line in sources] == [
        "http://mirror.example/debian bookworm main",
        "http://mirror.example/debian bookworm-updates main",
    ]
    monkeypatch.setenv("LSMLAB_SECURITY_MIRROR", "http://mirror.example/security")
    assert debian.package_sources("bookworm")[2].endswith("http://mirror.example/security bookworm-security main")


@pytest.mark.usefixtures("keyring")
@pytest.mark.parametrize("listed", ["", "echo 'Ubuntu|Ubuntu|http://ubuntu.example/'", "echo nonsense"])
def test_a_machine_without_a_debian_archive(stub: Stub, listed: str) -> None:
    stub("apt-get", listed or ":")
    with pytest.raises(HostError, match="names no Debian archive") as caught:
        debian.package_sources("trixie")
    assert "LSMLAB_MIRROR" in caught.value.hint


@pytest.mark.usefixtures("keyring")
def test_a_machine_without_apt_at_all(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HostError, match="names no Debian archive"):
        debian.package_sources("trixie")
    monkeypatch.setenv("LSMLAB_MIRROR", "http://mirror.example/debian")
    assert len(debian.package_sources("trixie")) == 2


@pytest.mark.usefixtures("keyring")
def test_an_apt_that_fails_is_quoted(stub: Stub) -> None:
    stub("apt-get", 'echo "E: malformed line 1" >&2; exit 100')
    with pytest.raises(HostError, match="reading apt's sources failed") as caught:
        debian.package_sources("trixie")
    assert "E: malformed line 1" in str(caught.value)


def test_a_keyring_that_is_missing(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub("apt-get", DEBIAN)
    monkeypatch.setattr(debian, "KEYRING", tmp_path / "none.gpg")
    with pytest.raises(HostError, match=r"none\.gpg is missing") as caught:
        debian.package_sources("trixie")
    assert "debian-archive-keyring" in caught.value.hint


def test_apts_proxy_is_used_and_nothing_else(stub: Stub) -> None:
    wanted = [
        'Acquire::http::Proxy "http://proxy.example:3128/";',
        'Acquire::https::Proxy "DIRECT";',
        'Acquire::http::Proxy-Auto-Detect "/usr/bin/auto";',
        'Acquire::https::CaInfo "/etc/ssl/own.pem";',
        'Acquire::Retries "3";',
    ]
    others = [
        'APT::Architecture "amd64";',
        'Acquire::http::Proxy "";',
        'Dir::State "var/lib/apt";',
        'DPkg::Post-Invoke:: "rm -rf /";',
        "Acquire::https::Verify-Peer;",
    ]
    stub("apt-config", "\n".join(f"echo '{line}'" for line in (*wanted, *others)))
    assert debian.proxy_settings().splitlines() == wanted


def test_no_proxy_and_no_apt_config(stub: Stub) -> None:
    assert debian.proxy_settings() == ""
    stub("apt-config", "echo 'APT::Architecture \"amd64\";'")
    assert debian.proxy_settings() == ""


# How they are found, and built once


def test_an_image_is_found_only_when_it_is_whole(lab: Lab) -> None:
    assert build.find(lab) is None
    files = {name: name.encode() for name in debian.FILES}
    with cache.scratch("image") as work:
        for name, content in files.items():
            (work / name).write_bytes(content)
        about = {
            "kernel_release": "6.12",
            "packages": {"nginx": "1"},
            "built": "2026-11-24",
            "root_arguments": "root=/",
        }
        cache.publish(work, build.folder_of(lab, "a"), debian.FILES, about)
    image = build.find(lab, full_check=True)
    assert image is not None
    assert (image.lab, image.kernel_release, image.packages) == ("debian-13", "6.12", {"nginx": "1"})
    assert image.digest == cache.file_digest(image.disk)
    assert (image.root_arguments, image.access) == ("root=/", None)
    for path in (image.disk, image.kernel, image.initrd, image.need_policy_tree()):
        assert path.is_file()
    image.initrd.write_bytes(b"Initrd")
    assert build.find(lab, full_check=True) is None
    image.initrd.write_bytes(b"shorter or longer")
    assert build.find(lab) is None


@pytest.mark.parametrize("lacking", ["kernel_release", "packages", "built", "root_arguments", "files"])
def test_a_manifest_of_another_shape_is_damage(lab: Lab, lacking: str) -> None:
    with cache.scratch("image") as work:
        for name in build.FILES:
            (work / name).touch()
        about = {"kernel_release": "", "packages": {}, "built": "", "root_arguments": ""}
        cache.publish(work, build.folder_of(lab, "a"), build.FILES, about)
    manifest = build.folder_of(lab, "a") / cache.MANIFEST
    content = json.loads(manifest.read_text())
    content[lacking] = {"disk.qcow2": {}}
    if lacking != "files":
        del content[lacking]
    manifest.write_text(json.dumps(content))
    assert build.find(lab) is None


def build_made_up(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Have builds take no time; the folders that were built."""
    built: list[Path] = []

    def make(lab: Lab, folder: Path, *_: object) -> Image:
        built.append(folder)
        assert cache.in_use(folder), "held before it is there: nobody can remove it in between"
        return put_image(lab, folder.name.rpartition("-")[2])

    monkeypatch.setattr(build, "_make", make)
    return built


def test_an_image_is_built_once_and_held(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    built = build_made_up(monkeypatch)
    with contextlib.ExitStack() as uses:
        first = build.ensure(lab, Notes(), uses=uses)
        assert cache.drop(first.folder) is None
    assert not cache.in_use(first.folder)
    assert build.ensure(lab, Notes()) == first
    assert not cache.in_use(first.folder)
    with contextlib.ExitStack() as uses:
        assert build.ensure(lab, Notes(), uses=uses) == first
        assert cache.drop(first.folder) is None
        second = build.ensure(lab, Notes(), rebuild=True, uses=uses)
        assert cache.drop(second.folder) is None
    assert built == [first.folder, second.folder]
    assert build.find(lab) == second


def test_a_damaged_image_is_said_and_left_to_who_uses_it(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    built = build_made_up(monkeypatch)
    notes = Notes()
    old = put_image(lab, "old")
    with cache.use(old.folder):
        old.initrd.write_bytes(b"y")
        new = build.ensure(lab, notes)
        assert old.initrd.exists()
    assert built == [new.folder]
    (note,) = notes.notes
    assert re.fullmatch(r"The cached image of debian-13 is damaged \(initrd is damaged: .*\): it is not used\.", note)


def test_an_image_that_is_removed_once_it_was_found_is_built_anew(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    built = build_made_up(monkeypatch)
    old = put_image(lab, "old")
    find = cache.builds

    def late(pattern: Path) -> list[Path]:
        found = find(pattern)
        cache.drop(old.folder)
        return found

    monkeypatch.setattr(cache, "builds", late)
    assert build.ensure(lab, Notes()).folder == built[0] != old.folder


def test_an_image_that_another_run_builds_is_waited_for(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    built = build_made_up(monkeypatch)
    notes = Notes()
    found: list[Image] = []
    with cache.lock(paths.cache() / "locks" / f"image-{build.recipe_digest(lab)[:16]}"):
        waiter = threading.Thread(target=lambda: found.append(build.ensure(lab, notes)))
        waiter.start()
        deadline = time.monotonic() + 20
        while "another run is building this image; waiting" not in notes.steps:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        theirs = put_image(lab, "theirs")
    waiter.join(20)
    assert found == [theirs]
    assert built == []


# Compiled policies


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], bytes]:
    """Compiles one module for the image of a digest; the compiler answers with how often it was asked."""
    module = tmp_path / "own.cil"
    module.write_text("(type own_t)")
    calls: list[str] = []

    def answer(argv: Sequence[str], **_: object) -> bytes:
        calls.append(argv[-2])
        for name in policy.FILES:
            (Path(argv[-2]) / name).write_text(f"{name} {len(calls)}")
        return b""

    monkeypatch.setattr(host, "in_namespace", list)
    monkeypatch.setattr(host, "run", answer)
    return lambda digest: policy.compile_modules(tmp_path / "tree.tar", digest, [module]).policy


def test_a_policy_is_compiled_once_for_an_image(compiled: Callable[[str], bytes]) -> None:
    assert [compiled("one"), compiled("one"), compiled("two"), compiled("one")] == [
        b"policy 1", b"policy 1", b"policy 2", b"policy 1",
    ]  # fmt: skip
    manifests = [cache.read_manifest(folder) for folder in (paths.cache() / "policies").iterdir()]
    assert sorted(m["image"] for m in manifests if m) == ["one", "two"]


def test_a_damaged_policy_is_compiled_anew(compiled: Callable[[str], bytes]) -> None:
    compiled("one")
    (folder,) = (paths.cache() / "policies").iterdir()
    (folder / "policy").write_bytes(b"policy !")
    assert compiled("one") == b"policy 2"
    assert compiled("one") == b"policy 2"


# Compiled profiles


@pytest.mark.parametrize(
    ("line", "elsewhere"),
    [
        ("##included <tunables/global>", False),
        ("##failed include <local/nginx>", False),
        ("##skipped duplicate include <abstractions/base>", False),
        ("  /srv/** r, # ##included", False),
        ('##included "/srv/rules"', True),
        ("##failed include </srv/rules>", True),
        ("##failed include <../../srv/rules>", True),
        ('##included "srv/rules"', True),
        ("##included srv/rules", True),
    ],
)
def test_what_a_profile_includes_from_elsewhere(line: str, *, elsewhere: bool) -> None:
    text = f"\n\n##included <abstractions/base>\n{line}\nprofile x {{ }}\n"
    assert profile.leads_elsewhere(text) is elsewhere
    assert profile.leads_elsewhere("profile x {}\n"), "no include is shown: of another parser, perhaps"


class Parser:
    """Stands for the image's parser in its namespace; what it was asked, and what it finds."""

    def __init__(self) -> None:
        self.asked: list[dict[str, bytes]] = []
        self.text = "##included <abstractions/base>\n"
        self.names = b"nginx\nnginx//child\n"
        self.error: Exception | None = None

    def __call__(self, argv: Sequence[str], **_: object) -> bytes:
        work = Path(argv[-3])
        files = work / "files"
        self.asked.append({str(p.relative_to(files)): p.read_bytes() for p in files.rglob("*") if p.is_file()})
        assert (work / "kernel-features").read_text("ascii").startswith("caps {")
        if self.error is not None:
            raise self.error
        for name in ("enforce", "complain"):
            (work / name).write_text(f"{name} {len(self.asked)}")
        (work / "names").write_bytes(self.names)
        (work / "text").write_text(self.text)
        return b""


@pytest.fixture
def parser(monkeypatch: pytest.MonkeyPatch) -> Parser:
    made = Parser()
    monkeypatch.setattr(host, "in_namespace", list)
    monkeypatch.setattr(host, "run", made)
    return made


FEATURES = "caps {mask {chown\n}\n}\nfile {mask {read\n}\n}\npolicy {versions {v5 {yes\n}\n}\n}\n"
NGINX = {"/etc/apparmor.d/nginx": b"profile nginx {}"}


def compiled_profile(
    image_digest: str = "one", features: Any = FEATURES, path: str = "/etc/apparmor.d/nginx", **written: bytes
) -> profile.Compiled | None:
    files = {**NGINX, **{f"/etc/apparmor.d/local/{name}": data for name, data in written.items()}}
    return profile.compile_file(Path("/tree.tar"), image_digest, features, files, path)


def test_a_profile_is_compiled_once_for_all_that_goes_in(parser: Parser) -> None:
    first = compiled_profile()
    assert first == profile.Compiled(b"enforce 1", b"complain 1", ("nginx", "nginx//child")) == compiled_profile()
    others = [
        compiled_profile("two"), compiled_profile(features=FEATURES.replace("chown", "kill")),
        compiled_profile(path="/etc/apparmor.d/other"), compiled_profile(a=b"x"), compiled_profile(a=b"y"),
    ]  # fmt: skip
    assert [one.enforce for one in others if one] == [f"enforce {n}".encode() for n in range(2, 7)]
    assert parser.asked[4] == {"nginx": b"profile nginx {}", "local/a": b"x"}
    assert compiled_profile() == first


@pytest.mark.parametrize(
    "path",
    ["/etc/ld.so.preload", "/usr/lib/x86_64-linux-gnu/libm.so.6", "/etc/apparmor.d/../ld.so.preload", "//etc/x", "/a"],
)
def test_what_is_no_profile_is_not_laid_out_for_the_parser(parser: Parser, path: str) -> None:
    """The parser runs on this machine: what a scenario writes in a guest is not to be run by it."""
    profile.compile_file(Path("/tree.tar"), "one", FEATURES, {**NGINX, path: b"x"}, "/etc/apparmor.d/nginx")
    assert parser.asked == [{"nginx": b"profile nginx {}"}]


def test_the_last_of_two_that_write_one_profile_counts(parser: Parser) -> None:
    written = {**NGINX, "/etc//apparmor.d/./nginx": b"profile z {}", "/etc/apparmor.d/x/../nginx": b"profile a {}"}
    profile.compile_file(Path("/tree.tar"), "one", FEATURES, written, "/etc/apparmor.d/nginx")
    assert parser.asked == [{"nginx": b"profile a {}"}]


@pytest.mark.parametrize("features", [None, "", "nonsense", 7, FEATURES + "{", FEATURES + "é", FEATURES * 200])
def test_what_the_kernel_is_able_to_has_to_be_known(parser: Parser, features: Any) -> None:
    assert compiled_profile(features=features) is None
    assert parser.asked == []


@pytest.mark.parametrize("path", ["/etc/apparmor/parser.conf", "/usr/share/apparmor-features/features"])
def test_where_the_parsers_settings_are_written_a_guest_is_asked(parser: Parser, path: str) -> None:
    settings = {**NGINX, path: b"x"}
    assert profile.compile_file(Path("/tree.tar"), "one", FEATURES, settings, "/etc/apparmor.d/nginx") is None
    assert parser.asked == []


def test_what_this_machine_cannot_know_a_guest_is_asked(parser: Parser) -> None:
    parser.text = '##included "/srv/rules"\n'
    assert compiled_profile() is None
    assert compiled_profile() is None
    assert len(parser.asked) == 1, "that is known the next time"
    for error in (HostError("compiling an AppArmor profile failed (1)"), OSError(errno.ENOTDIR, "Not a directory")):
        parser.error = error
        assert compiled_profile(a=b"x") is None
    parser.error, parser.text = None, "##included <a>"
    assert compiled_profile(a=b"x") is not None, "what failed is tried again"
    parser.names = b"\n"
    assert compiled_profile(a=b"y") is None, "no profile is in it"
    parser.names = b"\xff"
    assert compiled_profile(a=b"z") is not None


def test_a_damaged_profile_is_compiled_anew(parser: Parser) -> None:
    compiled_profile()
    (folder,) = (paths.cache() / "policies").iterdir()
    (folder / "enforce").write_bytes(b"enforce !")
    found = compiled_profile()
    assert found is not None
    assert (found.enforce, len(parser.asked)) == (b"enforce 2", 2)
