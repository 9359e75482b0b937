"""`lsmlab check`: every fault of every file, with its place; what could not be looked at is never taken for sound."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lsmlab import check, discovery, host, skeleton
from lsmlab.check import policies
from lsmlab.check.findings import Checked, Findings
from lsmlab.errors import DefinitionError, HostError, PolicyError
from lsmlab.image import build, debian, policy, probe
from lsmlab.image.build import Image
from lsmlab.image.probe import Probed, Profile, ProfileSet
from lsmlab.progress import Silent
from lsmlab.report.checks import findings_text

TYPES = frozenset({"httpd_t", "sshd_key_t", "shadow_t"})


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LSMLAB_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def made(name: str = "mine", *changes: tuple[str, str], folder: str = "scenarios") -> Path:
    """A new scenario with something changed in its file."""
    made_in = Path(folder) / name
    if made_in.exists():
        shutil.rmtree(made_in)
    if discovery.scenarios().get(name):
        other = skeleton.create("to-be-renamed", Path(folder)).rename(made_in)
        changes = (("id: to-be-renamed", f"id: {name}"), *changes)
        assert other == made_in
    else:
        skeleton.create(name, Path(folder))
    file = made_in / "scenario.yaml"
    text = file.read_text("utf-8")
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    file.write_text(text, "utf-8")
    return file.resolve()


def found(*names: str, labs: Sequence[str] = ("debian-13",), compiling: bool = False) -> Findings:
    return check.check(names, labs, Silent(), compiling=compiling)


def entry(findings: Findings, name: str, kind: str = "scenario") -> Checked:
    (one,) = [f for f in findings.files if (f.kind, f.name) == (kind, name)]
    return one


# Definitions


def test_what_is_sound_is_said_to_be() -> None:
    made()
    findings = found()
    assert {(f.kind, f.name): f.status for f in findings.files} == {
        **{("lab", name): "sound" for name in discovery.labs().ids}, ("scenario", "mine"): "sound",
    }  # fmt: skip
    assert not findings.faulty and not findings.incomplete
    assert entry(findings, "mine").looked_at == [("keys", ""), ("2 files", "")]
    assert "policies were not compiled, as asked" in findings_text(findings)


def test_where_there_is_nothing_of_ones_own_the_library_is_checked() -> None:
    names = {f.name for f in found().files if f.kind == "scenario"}
    assert names == set(discovery.scenarios().built_in) != set()


def test_every_fault_of_every_file_is_there() -> None:
    one = made("one", ("title:", "titel:"), ("access: read #", "access: wread #"))
    two = made("two", ("from: site.conf", "from: absent.conf"))
    made("three")
    findings = found()
    assert sorted(fault.replace(str(one), "FILE") for fault in entry(findings, "one").faults) == [
        "FILE:1: title: is missing and is needed",
        "FILE:24: dac.access: expected 'read', 'write' or 'execute', found a text ('wread')",
        "FILE:4: titel: unknown key; did you mean 'title'?",
    ]
    (fault,) = entry(findings, "two").faults
    assert fault.startswith(f"{two}:") and "no such file" in fault
    assert entry(findings, "three").status == "sound"
    assert findings.faulty


def test_only_what_is_named_is_checked() -> None:
    made("one", ("title:", "titel:"))
    made("two")
    made("three", folder="elsewhere")
    assert [f.name for f in found("two", "elsewhere/three").files if f.kind == "scenario"] == ["two", "three"]
    assert [f.name for f in found("elsewhere").files if f.kind == "scenario"] == ["three"]
    assert [f.name for f in found("elsewhere/three/scenario.yaml").files if f.kind == "scenario"] == ["three"]
    with pytest.raises(DefinitionError, match=r"unknown scenario 'thre'\n  Did you mean 'two'|Known"):
        found("thre")
    Path("empty").mkdir()
    with pytest.raises(DefinitionError, match=r"empty: no scenario\.yaml"):
        found("empty")


def test_two_scenarios_with_one_id_are_told_with_both_files() -> None:
    first = made("mine")
    shutil.copytree(first.parent, Path("scenarios/deeper/mine"))
    second = Path("scenarios/deeper/mine/scenario.yaml").resolve()
    for names in ((), ("mine",), ("nginx-reads-shadow",)):
        findings = found(*names)
        (fault,) = findings.faults
        assert "2 scenarios are called 'mine'" in fault
        assert str(first) in fault and str(second) in fault
        assert findings.faulty


def test_two_that_are_named_with_one_id_are_told_too() -> None:
    first, second = made("mine", folder="a"), made("mine", folder="b")
    (fault,) = found("a/mine", "b/mine").faults
    assert str(first) in fault and str(second) in fault


def test_a_scenario_that_hides_one_of_the_librarys_is_noted() -> None:
    made("nginx-reads-shadow")
    findings = found()
    (note,) = entry(findings, "nginx-reads-shadow").notes
    assert note.startswith("hides the scenario of this name that comes with lsmlab: ")
    assert not findings.faulty


def test_a_slip_in_the_kind_does_not_make_a_file_unseen() -> None:
    slip = made("slip", ("kind: lsmlab/scenario", "kind: lsmlab/scenaro"))
    other = made("other", ("kind: lsmlab/scenario", "kind: Deployment"))
    Path("labs").mkdir()
    Path("labs/mine.yaml").write_text("kind: lsmlab/lap\nid: mine\n")
    Path("labs/compose.yaml").write_text("services: {}\n")
    findings = found()
    assert [fault.partition(": ")[0] for fault in findings.faults] == [str(slip), str(Path("labs/mine.yaml").resolve())]
    assert [note.partition(": ")[0] for note in findings.notes] == [str(other)]


def test_a_lab_with_a_fault_is_told_and_its_scenarios_are_checked_all_the_same() -> None:
    Path("labs").mkdir()
    Path("labs/mine.yaml").write_text("kind: lsmlab/lab\nextends: debian-13\nid: mine\nmemory_mib: many\n")
    Path("labs/odd.yaml").write_text(
        "kind: lsmlab/lab\nextends: debian-13\nid: odd\nservices: {nginx: {unit: a.service, apparmor_profile: x}}\n"
    )
    made()
    findings = found(labs=["mine"])
    assert "memory_mib: expected" in entry(findings, "mine", "lab").faults[0]
    assert "services.nginx.apparmor_profile: no such file" in entry(findings, "odd", "lab").faults[0]
    assert entry(findings, "mine").status == "sound"
    with pytest.raises(DefinitionError, match="unknown lab 'debian13'"):
        found(labs=["debian13"])


def test_a_service_that_the_lab_lacks() -> None:
    file = made("mine", ("service: nginx", "service: ngin"))
    (fault,) = entry(found(), "mine").faults
    assert fault.startswith(f"{file}:13: subject.service: lab debian-13 has no service 'ngin'; it has: ")


def test_a_framework_that_the_lab_lacks_is_noted() -> None:
    Path("labs").mkdir()
    Path("labs/mine.yaml").write_text("kind: lsmlab/lab\nextends: debian-13\nid: mine\nframeworks: [selinux]\n")
    made()
    assert entry(found(labs=["mine"]), "mine").notes == ["mine has no AppArmor: that part is not run there"]


def test_a_base_with_a_fault_is_told_with_its_own_file() -> None:
    base = made("base", ("title:", "titel:"))
    child = Path("scenarios/child/scenario.yaml")
    child.parent.mkdir()
    child.write_text("kind: lsmlab/scenario\nextends: base\nid: child\ntitle: t\n")
    assert entry(found("child"), "child").faults == [f"{base}:4: titel: unknown key; did you mean 'title'?"]


# Policies


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[ProfileSet]:
    """An image whose tools find no fault; the sets of profiles that they were asked about."""
    folder = tmp_path / "image"
    folder.mkdir()
    there = Image(
        "debian-13", folder, "86" * 32, "6.12", {}, {}, "2026-11-24", "root=/dev/vda", frozenset(debian.FILES)
    )
    monkeypatch.setattr(build, "find", lambda lab: there if lab.id == "debian-13" else None)
    asked: list[ProfileSet] = []

    def examine(tree: Path, sets: Sequence[ProfileSet]) -> Probed:
        asked.extend(sets)
        return answers(sets)

    monkeypatch.setattr(probe, "examine", examine)
    monkeypatch.setattr(policy, "compile_modules", lambda *_: b"policy")
    return asked


def answers(sets: Sequence[ProfileSet], **changes: Any) -> Probed:
    """Every profile compiles and is called nginx."""
    profiles = tuple(tuple(Profile(str(f), compiles=True, words="", names=("nginx",)) for f in s.files) for s in sets)
    base = {"types": TYPES, "booleans": frozenset({"httpd_enable_homedirs"}), "names": frozenset({"lsb_release"})}
    return Probed(**{**base, "profiles": profiles, **changes})


def told(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    monkeypatch.setattr(probe, "examine", lambda _, sets: answers(sets, **changes))


def test_what_was_compiled_is_said(image: list[ProfileSet]) -> None:
    made("mine", ("modules: []", "modules: [m.cil]")).with_name("m.cil").write_text("(type my_t)\n")
    findings = found(compiling=True)
    assert entry(findings, "mine").status == "sound"
    assert entry(findings, "mine").looked_at == [
        ("keys", ""), ("3 files", ""), ("nginx.apparmor", "debian-13"), ("types", "debian-13"), ("m.cil", "debian-13"),
    ]  # fmt: skip
    line = next(line for line in findings_text(findings).splitlines() if " mine " in line)
    assert line.split(maxsplit=3)[3] == "keys, 3 files; debian-13: nginx.apparmor, types, m.cil"
    assert ("nginx.apparmor", "debian-13") in entry(findings, "debian-13", "lab").looked_at
    assert [f.name for s in image for f in s.files].count("nginx.apparmor") == 2, "the lab's, and the scenario's"


def test_where_the_image_is_not_built_that_is_said_and_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    made()
    findings = found(compiling=True)
    (words,) = entry(findings, "mine").unchecked
    assert words == (
        "not compiled: nginx.apparmor: the image of debian-13 is not built; `lsmlab images build debian-13` builds it"
    )
    assert entry(findings, "mine").status == "unchecked"
    assert findings.incomplete and not findings.faulty
    text = findings_text(findings)
    assert "UNCHECKED  scenario  mine" in text and words in text and "not checked in full" in text


def test_a_host_on_which_nothing_can_be_compiled(image: list[ProfileSet], monkeypatch: pytest.MonkeyPatch) -> None:
    def examine(*_: object) -> Probed:
        raise HostError("making namespaces failed", hint="Build as root.")

    monkeypatch.setattr(probe, "examine", examine)
    made()
    findings = found(compiling=True)
    assert entry(findings, "mine").unchecked == [
        "not compiled: nginx.apparmor: making namespaces failed (Build as root.)"
    ]
    assert entry(findings, "debian-13", "lab").status == "unchecked"


def test_an_image_without_a_parser(image: list[ProfileSet], monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, names=None, profiles=())
    made()
    assert entry(found(compiling=True), "mine").unchecked == [
        "not compiled: nginx.apparmor: the image of debian-13 has no apparmor_parser"
    ]


def test_a_profile_that_does_not_compile(image: list[ProfileSet], monkeypatch: pytest.MonkeyPatch) -> None:
    profile = made().with_name("nginx.apparmor")

    def examine(_: Path, sets: Sequence[ProfileSet]) -> Probed:
        wrong = tuple(
            tuple(
                Profile(str(f), compiles=f != profile, words=f"{f}:33: syntax error" if f == profile else "", names=())
                for f in s.files
            )
            for s in sets
        )
        return answers(sets, profiles=wrong)

    monkeypatch.setattr(probe, "examine", examine)
    findings = found(compiling=True)
    assert entry(findings, "mine").faults == [f"{profile}:33: syntax error [AppArmor of debian-13]"]
    assert f"    {profile}:33: syntax error" in findings_text(findings)


def test_a_warning_of_the_parser_is_a_note(image: list[ProfileSet], monkeypatch: pytest.MonkeyPatch) -> None:
    profile = made().with_name("nginx.apparmor")
    warned = Profile(str(profile), compiles=True, words="Warning from x: rule not enforced", names=("nginx",))
    monkeypatch.setattr(probe, "examine", lambda _, sets: answers(sets, profiles=tuple((warned,) for _ in sets)))
    assert "rule not enforced" in entry(found(compiling=True), "mine").notes[0]


NAMES: list[tuple[tuple[str, str], str]] = [
    (
        ("apparmor: nginx #", "apparmor: nginy #"),
        "subject.apparmor: no profile is called 'nginy'; the scenario's files have: nginx",
    ),
    (
        ("selinux: httpd_t #", "selinux: http_t #"),
        "subject.selinux: the policy has no type 'http_t'; did you mean 'httpd_t'?",
    ),
    (("selinux: sshd_key_t #", "selinux: qq_t #"), "object.selinux: the policy has no type 'qq_t' ["),
    (
        ("permissions: [read, open]}", "permissions: [read], selinux_object: shadw_t}"),
        "expected.selinux.denials.0.selinux_object: the policy has no type 'shadw_t'; did you mean 'shadow_t'?",
    ),
    (
        ("booleans: {}", "booleans: {httpd_enable_homes: true}"),
        "selinux.booleans.httpd_enable_homes: the policy has no boolean",
    ),
]


@pytest.mark.parametrize(("change", "words"), NAMES, ids=[w.partition(":")[0] for _, w in NAMES])
def test_a_name_that_the_policy_lacks(image: list[ProfileSet], change: tuple[str, str], words: str) -> None:
    file = made("mine", change)
    line = next(n for n, text in enumerate(file.read_text("utf-8").splitlines(), 1) if change[1] in text)
    (fault,) = entry(found(compiling=True), "mine").faults
    assert fault.startswith(f"{file}:{line}: {words}"), fault
    assert fault.endswith("of debian-13]")


def test_a_profile_of_the_distributions_own_will_do(image: list[ProfileSet]) -> None:
    made("mine", ("apparmor: nginx #", "apparmor: lsb_release #"))
    assert entry(found(compiling=True), "mine").status == "sound"


@pytest.mark.parametrize(
    ("cil", "sound"),
    [
        ("(type my_t)\n(boolean my_bool true)\n", True),
        ("( type  my_t )(boolean my_bool false)", True),
        ("(block x (type y))\n", True),
        ("(typeattribute my_t)\n", False),
        ("", False),
    ],
)
def test_a_module_may_bring_types_and_booleans(image: list[ProfileSet], cil: str, sound: bool) -> None:
    changes = (
        ("selinux: sshd_key_t #", "selinux: my_t #"),
        ("modules: []", "modules: [m.cil]"),
        ("booleans: {}", "booleans: {my_bool: true}"),
    )
    made("mine", *changes).with_name("m.cil").write_text(cil)
    assert (entry(found(compiling=True), "mine").status == "sound") is sound


MESSAGE = """{file}: does not compile:
Failed to resolve allow statement at /var/lib/selinux/default/tmp/modules/400/m/cil:2
Failed to resolve AST
semodule:  Failed!"""
UNCLOSED = """{file}: does not compile:
Open parenthesis without matching close at line 9 of /var/lib/selinux/default/tmp/modules/400/m/cil
libsemanage.semanage_load_files: Error while reading from file /var/lib/selinux/default/tmp/modules/400/m/cil.
semodule:  Failed!"""


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (MESSAGE, "{file}:2: Failed to resolve allow statement: (allow a b (file (read))) [SELinux of debian-13]"),
        (UNCLOSED, "{file}:9: Open parenthesis without matching close [SELinux of debian-13]"),
        ("{file}: does not compile:\nsemodule:  Failed!", "{file}: does not compile [SELinux of debian-13]"),
        ("{file}: does not compile:\nno space\n", "{file}: no space [SELinux of debian-13]"),
    ],
)
def test_a_module_that_does_not_compile(
    image: list[ProfileSet], monkeypatch: pytest.MonkeyPatch, message: str, words: str
) -> None:
    file = made("mine", ("modules: []", "modules: [m.cil]")).with_name("m.cil")
    file.write_text("(type my_t)\n  (allow a b (file (read)))\n")

    def compiled(*_: object) -> bytes:
        raise PolicyError(message.format(file=file))

    monkeypatch.setattr(policy, "compile_modules", compiled)
    assert entry(found(compiling=True), "mine").faults == [words.format(file=file)]


def test_a_module_that_could_not_be_compiled_is_no_fault(
    image: list[ProfileSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiled(*_: object) -> bytes:
        raise HostError("the disk is full")

    monkeypatch.setattr(policy, "compile_modules", compiled)
    made("mine", ("modules: []", "modules: [m.cil]")).with_name("m.cil").write_text("(type my_t)\n")
    assert entry(found(compiling=True), "mine").unchecked == ["not compiled: m.cil: the disk is full"]


def test_two_labs_are_two_answers(image: list[ProfileSet]) -> None:
    made()
    one = entry(found(labs=["debian-13", "debian-12", "debian-13"], compiling=True), "mine")
    assert ("nginx.apparmor", "debian-13") in one.looked_at
    assert "the image of debian-12 is not built" in one.unchecked[0]
    assert len(one.unchecked) == 1


def test_modules_that_several_scenarios_share_are_compiled_once(
    image: list[ProfileSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Sequence[Path]] = []
    monkeypatch.setattr(policy, "compile_modules", lambda _tree, _digest, modules: calls.append(modules))
    made("one", ("modules: []", "modules: [m.cil]")).with_name("m.cil").write_text("(type my_t)\n")
    made("two", ("modules: []", "modules: [../one/m.cil]"))
    assert not found(compiling=True).faulty
    assert len(calls) == 1


def test_an_interrupt_does_not_wait_for_what_is_left_to_compile(
    image: list[ProfileSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []
    stopped = threading.Event()

    def compiled(*modules: object) -> bytes:
        calls.append(modules)
        if len(calls) == 1:
            raise KeyboardInterrupt
        stopped.wait(20)
        return b""

    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(policy, "compile_modules", compiled)
    monkeypatch.setattr(host, "stop_all", stopped.set)
    for number in range(9):
        made(f"s{number}", ("modules: []", "modules: [m.cil]")).with_name("m.cil").write_text("(type my_t)\n")
    with pytest.raises(KeyboardInterrupt):
        found(compiling=True)
    assert stopped.is_set() and len(calls) < 9


# What the parser says


PARSER = """Cache read/write disabled: interface file missing. (Kernel needs AppArmor 2.4 compatibility patch.)
AppArmor parser error for /sets/set-0/base/x.apparmor in profile /sets/set-0/base/x.apparmor at line 33: syntax error
"""


def placed(words: str) -> str:
    return probe.placed(words, "/sets/set-0/base", "x.apparmor", "/home/me/x.apparmor")


def test_the_parsers_words_name_the_file_that_a_person_knows() -> None:
    assert placed(PARSER) == "/home/me/x.apparmor:33: syntax error"
    assert placed("Could not open 'abstractions/none' in /sets/set-0/base/x.apparmor") == (
        "Could not open 'abstractions/none' in /home/me/x.apparmor"
    )
    included = "AppArmor parser error for /sets/set-0/base/x.apparmor in /sets/set-0/base/tunables/y at line 2: no"
    assert placed(included) == "/etc/apparmor.d/tunables/y:2: no"
    assert placed("Cache read/write disabled: interface file missing. (x)\n") == ""


def test_the_answers_are_read_from_the_files_that_the_image_wrote(tmp_path: Path) -> None:
    wanted = ProfileSet((Path("/home/me/x.apparmor"),), ("/etc/apparmor.d/usr.sbin.named", "/etc/apparmor.d/gone"))
    (tmp_path / "log-1").write_text(PARSER.replace("set-0", tmp_path.name))
    (tmp_path / "names-1").write_text("")
    (tmp_path / "log-2").write_text("")
    (tmp_path / "ok-2").touch()
    (tmp_path / "names-2").write_text("named\n")
    (tmp_path / "log-3").write_text("the image has no such profile\n")
    one, two, three = probe._read(tmp_path, wanted)
    assert (one.compiles, one.words, one.names) == (False, "/home/me/x.apparmor:33: syntax error", ())
    assert (two.compiles, two.words, two.names) == (True, "", ("named",))
    assert (three.source, three.compiles, three.words) == (
        "/etc/apparmor.d/gone", False, "the image has no such profile",
    )  # fmt: skip
    (tmp_path / "log-3").unlink()
    with pytest.raises(Exception, match=r"gone: the image's apparmor_parser gave no answer"):
        probe._read(tmp_path, wanted)


def test_findings_as_json(image: list[ProfileSet]) -> None:
    made("mine", ("title:", "titel:"))
    document = found(compiling=True).as_json()
    rows = {(r["kind"], r["id"]): r for r in document["files"]}
    assert document["schema"] == 1 and document["compiled"] is True
    assert "nginx.apparmor (debian-13)" in rows["lab", "debian-13"]["checked"]
    assert rows["scenario", "mine"]["status"] == "faulty" and len(rows["scenario", "mine"]["faults"]) == 2
    assert set(rows["lab", "debian-13"]) == {
        "kind", "id", "file", "status", "checked", "faults", "unchecked", "notes",
    }  # fmt: skip


def test_a_control_character_of_a_file_does_not_reach_the_terminal() -> None:
    one = Checked("scenario", "x", Path("x"), faults=["a\x1b[2Jb"])
    assert "a\\x1b[2Jb" in findings_text(Findings([one], [], [], compiled=True))


@pytest.mark.parametrize(
    ("one", "faulty", "incomplete", "status"),
    [
        (Checked("scenario", "x", Path("x")), False, False, "sound"),
        (Checked("scenario", "x", Path("x"), unchecked=["u"]), False, True, "unchecked"),
        (Checked("scenario", "x", Path("x"), unchecked=["u"], faults=["f"]), True, True, "faulty"),
        (Checked("scenario", "x", Path("x"), notes=["n"]), False, False, "sound"),
    ],
)
def test_a_fault_outranks_what_was_not_looked_at(one: Checked, faulty: bool, incomplete: bool, status: str) -> None:
    findings = Findings([one], [], [], compiled=True)
    assert (findings.faulty, findings.incomplete, one.status) == (faulty, incomplete, status)
    assert Findings([], ["f"], [], compiled=True).faulty


def test_words_of_a_compiler_that_names_no_line() -> None:
    assert policies.compiler_words("a.cil: does not compile:\n", [Path("a.cil")]) == ["a.cil: does not compile"]
