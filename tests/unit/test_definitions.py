"""Labs and scenarios as files: what loads, what each bad file is told and where, merging, finding, digests."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsmlab import definition, discovery, lab, scenario
from lsmlab.discovery import load_lab, load_scenario_file, load_scenarios
from lsmlab.errors import DefinitionError, LsmlabError
from lsmlab.lab import Lab, Service
from lsmlab.scenario import Scenario
from lsmlab.terms import Arm, Framework, Verdict

SCENARIO = """\
kind: lsmlab/scenario
id: s
title: t
story: x
technique: T1003
subject: {service: nginx, selinux: httpd_t, apparmor: nginx}
object: {path: /etc/shadow}
dac: {opened_by: x}
attempts:
  - id: a
    kind: attack
    http: {path: /x}
    canary: {file: /etc/shadow}
    allowed_if: {output: "{canary}"}
    blocked_if: [{status: 403}]
expected:
  selinux:
    verdict: CONTAINED
    because: x
    denials: [{attempt: a, permissions: [read]}]
"""
LAB = """\
kind: lsmlab/lab
id: l
title: t
backend: qemu
memory_mib: 768
frameworks: [selinux]
kernel_arguments:
  none: security=none
  selinux: security=selinux
image: {suite: trixie, disk_mib: 2048, packages: [nginx]}
services:
  nginx: {unit: nginx.service}
"""
PROOF = '    allowed_if: {output: "{canary}"}\n'
CANARY_LINE = "    canary: {file: /etc/shadow}\n"
BLOCKED_LINE = "    blocked_if: [{status: 403}]\n"


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LSMLAB_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def put(root: Path, name: str, text: str | bytes) -> Path:
    """Write the scenario `name` below `root`; its file."""
    folder = root / "scenarios" / name
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "scenario.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


def put_lab(root: Path, name: str, text: str) -> Path:
    folder = root / "labs"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def load(root: Path, text: str | bytes = SCENARIO, name: str = "s") -> Scenario:
    return load_scenario_file(put(root, name, text), root)


def changed(old: str, new: str, text: str = SCENARIO) -> str:
    assert old in text
    return text.replace(old, new)


def fault(root: Path, text: str | bytes) -> str:
    """What is said of a bad scenario; its file is called FILE."""
    with pytest.raises(DefinitionError) as caught:
        load(root, text)
    return str(caught.value).replace(str(root / "scenarios" / "s" / "scenario.yaml"), "FILE")


# What is in the repository


def test_every_lab_of_the_library_loads() -> None:
    found = discovery.labs()
    assert {"debian-12", "debian-13"} <= set(found.ids)
    labs = {name: load_lab(name) for name in found.ids}
    for name, loaded in labs.items():
        assert loaded.id == name
        assert all(s.apparmor_profile is None or s.apparmor_profile.is_file() for s in loaded.services.values())
    assert labs["debian-13"].arms == tuple(Arm)
    assert load_lab() == labs["debian-13"]


def test_debian_12_extends_debian_13() -> None:
    old, new = load_lab("debian-12"), load_lab("debian-13")
    assert old.image is not None
    assert new.image is not None
    assert (old.image.suite, new.image.suite) == ("bookworm", "trixie")
    assert old.image.model_copy(update={"suite": "trixie"}) == new.image
    assert old.services == {**new.services, "postgresql": Service(unit="postgresql@15-main.service")}
    assert old.service("nginx").unit == "nginx.service"


def test_a_file_is_parsed_once_and_each_reader_has_its_own(tmp_path: Path) -> None:
    definition._parsed.cache_clear()
    loaded = load_scenarios(discovery.scenarios().ids)
    assert definition._parsed.cache_info().misses <= len(loaded) < definition._parsed.cache_info().hits
    file = tmp_path / "s.yaml"
    file.write_text("kind: x\nwords: [a]\n")
    first = definition.read_raw(file)
    first.data["words"].append("b")
    first.origins.clear()
    second = definition.read_raw(file)
    assert second.data == {"kind": "x", "words": ["a"]}
    assert second.origins["words", 0].line == 2
    file.write_text("kind: x\n\nwords: [c]\n")
    assert definition.read_raw(file).data["words"] == ["c"]


def test_every_scenario_of_the_library_loads() -> None:
    found = discovery.scenarios()
    loaded = load_scenarios(found.ids)
    assert [s.id for s in loaded] == found.ids
    assert "nginx-reads-shadow" in found.ids
    for one in loaded:
        assert one.attacks
        assert len(one.digest()) == 64
        for framework, expectation in one.expected.items():
            assert one.subject_name(framework)
            assert expectation.because.strip()


def test_the_flagship_says_what_it_should() -> None:
    (flagship,) = load_scenarios(["nginx-reads-shadow"])
    assert [a.id for a in flagship.attacks] == ["read-shadow"]
    assert [a.id for a in flagship.benign] == ["front-page", "static-file"]
    assert set(flagship.expected) == set(Framework)
    assert all(e.verdict is Verdict.CONTAINED for e in flagship.expected.values())
    assert (flagship.subject_name(Framework.SELINUX), flagship.subject_name(Framework.APPARMOR)) == ("httpd_t", "nginx")
    assert [f.name for f in flagship.files()] == ["site.conf", "nginx.apparmor"]


def test_the_least_scenario_and_lab_load(tmp_path: Path) -> None:
    assert load(tmp_path).id == "s"
    put_lab(tmp_path, "l", LAB)
    arms = (Arm.DAC, Arm.SELINUX_PERMISSIVE, Arm.SELINUX_ENFORCING, Arm.SELINUX_UNCONFINED)
    assert load_lab("l", tmp_path).arms == arms


@pytest.mark.parametrize(
    "text",
    [
        SCENARIO.replace("\n", "\r\n"),
        "\ufeff" + SCENARIO,
        "# " + "x" * 2000 + "\n" + SCENARIO,
        changed("title: t", "title: 2026-01-01"),
    ],
    ids=["CRLF", "byte order mark", "long comment", "a date is a text"],
)
def test_other_ways_to_write_it(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, text).id == "s"


# What is wrong, and where

BAD: dict[str, tuple[str | bytes, str]] = {
    "unknown key": (changed("title: t", "title: t\ntitel: t"), "FILE:4: titel: unknown key; did you mean 'title'?"),
    "unknown key far from any": (
        changed("title: t", "title: t\nzzzqq: 1"),
        "FILE:4: zzzqq: unknown key; expected one of: ",
    ),
    "unknown nested key": (
        changed("{opened_by: x}", "{opened_by: x, acess: read}"),
        "FILE:8: dac.acess: unknown key; did you mean 'access'?",
    ),
    "unknown key behind an alias": (
        changed("{path: /etc/shadow}", "{path: /etc/shadow, clas: file}"),
        "FILE:7: object.clas: unknown key; did you mean 'class'?",
    ),
    "unknown key in a list": (
        changed("kind: attack", "kind: attack\n    kanary: x"),
        "FILE:12: attempts.0.kanary: unknown key; did you mean 'canary'?",
    ),
    "unknown key in a mapping of frameworks": (
        changed("    because: x", "    because: x\n    becuse: x"),
        "FILE:20: expected.selinux.becuse: unknown key; did you mean 'because'?",
    ),
    "a number for a text": (changed("title: t", "title: 3"), "FILE:3: title: expected a string, found a number (3)"),
    "a list for a text": (changed("title: t", "title: [a]"), "FILE:3: title: expected a string, found a list"),
    "nothing for a text": (changed("title: t", "title:"), "FILE:3: title: expected a string, found nothing"),
    "a text for a list": (changed("story: x", "story: x\ntags: web"), "FILE:5: tags: expected a"),
    "a text for a number": (
        changed("403", "'403'"),
        "FILE:15: attempts.0.blocked_if.0.status: expected a",
    ),
    "a number for a mapping": (
        changed("dac: {opened_by: x}", "dac: 5"),
        "FILE:8: dac: expected an object, found a number (5)",
    ),
    "a text for true or false": (
        changed("{status: 403}", "{timeout: maybe}"),
        "FILE:15: attempts.0.blocked_if.0.timeout: expected a boolean, found a text ('maybe')",
    ),
    "an octal mode that is not quoted": (
        changed("attempts:\n", "setup:\n  - write: {path: /x, content: a, mode: 0644}\nattempts:\n"),
        "FILE:10: setup.0.write.mode: expected a string, found a number",
    ),
    "a number out of range": (
        changed("{status: 403}", "{status: 99}"),
        "FILE:15: attempts.0.blocked_if.0.status: Input should be greater than or equal to 100",
    ),
    "a number that is none": (
        changed("    blocked_if", "    timeout: .nan\n    blocked_if"),
        "FILE:15: attempts.0.timeout: expected a",
    ),
    "a number far too large": (
        changed("    blocked_if", f"    timeout: {10**30}\n    blocked_if"),
        "FILE:15: attempts.0.timeout: Input should be less than or equal to 300",
    ),
    "missing key": (changed("title: t\n", ""), "FILE:1: title: is missing and is needed"),
    "missing nested key": (
        changed("{opened_by: x}", "{access: read}"),
        "FILE:8: dac.opened_by: is missing and is needed",
    ),
    "wrong kind": (
        changed("lsmlab/scenario", "lsmlab/lab"),
        "FILE:1: kind: expected 'lsmlab/scenario', found 'lsmlab/lab'\n  A file of this sort starts with",
    ),
    "no kind": (changed("kind: lsmlab/scenario\n", ""), "FILE:1: kind: expected 'lsmlab/scenario', found None"),
    "duplicate key": (changed("title: t", "title: t\ntitle: u"), 'FILE:4: found duplicate key "title"'),
    "duplicate nested key": (changed("{opened_by: x}", "{opened_by: x, opened_by: y}"), "FILE:8: found duplicate key"),
    "tab": (changed("  - id: a", "\t- id: a"), "FILE:10: not valid YAML: found character '\\t'"),
    "open bracket": (changed("title: t", "title: [a"), "FILE:4: not valid YAML: "),
    "undefined alias": (changed("title: t", "title: *zz"), "FILE:3: not valid YAML: found undefined alias 'zz'"),
    "two documents": (SCENARIO + "---\na: b\n", "FILE:21: not valid YAML: but found another document"),
    "far too deep": (changed("title: t", "title: " + "[" * 500 + "]" * 500), "FILE:1: not valid YAML: "),
    "a number of 5000 digits": (changed("title: t", "title: " + "9" * 5000), "FILE:3: "),
    "a NUL": (b"kind: a\0b", "FILE:1: not valid YAML: unacceptable character #x0000"),
    "a list": ("- a\n- b\n", "FILE:1: expected a mapping of keys to values, found a list"),
    "a text": ("hello\n", "FILE:1: expected a mapping of keys to values, found a text"),
    "empty": ("", "FILE:1: expected a mapping of keys to values, found nothing"),
    "only a comment": ("# x\n", "FILE:1: expected a mapping of keys to values, found nothing"),
    "a number as key": (changed("title: t", "title: t\n5: x"), "FILE:4: expected a text as key, found a number (5)"),
    "nothing as key": (changed("title: t", "title: t\n? \n: x"), "FILE:4: expected a text as key, found nothing"),
    "binary": (b"\x7fELF\x80\xff" * 10, "FILE: not UTF-8 text at byte 4"),
    "too large": (SCENARIO + "#" + "x" * definition.MAX_BYTES, "more than 1048576 bytes"),
    "attack without a proof": (
        changed(PROOF, "    allowed_if: {}\n").replace(CANARY_LINE, ""),
        "FILE:10: attempts.0: an attack needs a proof of success",
    ),
    "attack with a status alone": (
        changed(PROOF, "    allowed_if: {status: 200}\n").replace(CANARY_LINE, ""),
        "FILE:10: attempts.0: an attack needs a proof of success",
    ),
    "attack with a text that is no canary": (
        changed('"{canary}"', "hello").replace(CANARY_LINE, ""),
        "FILE:10: attempts.0: an attack needs a proof of success",
    ),
    "benign without a proof": (
        changed(PROOF, "    allowed_if: {status: 200}\n")
        .replace(CANARY_LINE, "")
        .replace("kind: attack", "kind: benign"),
        "FILE:10: attempts.0: allowed_if proves nothing: expected `output` or `effect`",
    ),
    "canary not looked for": (
        changed('"{canary}"', "hello"),
        "FILE:10: attempts.0: a canary is planted, and allowed_if.output",
    ),
    "canary not planted": (changed(CANARY_LINE, ""), "FILE:10: attempts.0: allowed_if.output names {canary}, and no"),
    "canary line without a canary": (
        changed("{file: /etc/shadow}", "{file: /etc/shadow, line: abc}"),
        "FILE:13: attempts.0.canary.line: expected one line with {canary} in it",
    ),
    "canary line of two lines": (
        changed("{file: /etc/shadow}", '{file: /etc/shadow, line: "{canary}\\nx"}'),
        "FILE:13: attempts.0.canary.line: expected one line with {canary} in it",
    ),
    "http without blocked_if": (changed(BLOCKED_LINE, ""), "FILE:10: attempts.0: an http attempt needs `blocked_if`"),
    "blocked_if of nothing": (
        changed("{status: 403}", "{}"),
        "FILE:15: attempts.0.blocked_if.0: expected at least one of: ",
    ),
    "http and run": (
        changed("kind: attack", "kind: attack\n    run: [x]"),
        "FILE:10: attempts.0: expected exactly one of: http, run",
    ),
    "neither http nor run": (
        changed("    http: {path: /x}\n", ""),
        "FILE:10: attempts.0: expected exactly one of: http, run",
    ),
    "a status where there is no http": (
        changed("http: {path: /x}", "run: [x]"),
        "FILE:10: attempts.0: `status` is an HTTP status",
    ),
    "a command of no words": (changed("http: {path: /x}", "run: []"), "FILE:12: attempts.0.run: "),
    "a path that is not absolute": (changed("{path: /etc/shadow}", "{path: etc/shadow}"), "FILE:7: object.path: "),
    "a path that ends in a new line": (
        changed("{file: /etc/shadow}", '{file: "/etc/shadow\\n"}'),
        "FILE:13: attempts.0.canary.file: ",
    ),
    "bad regular expression": (
        changed("{status: 403}", "{output: '('}"),
        "FILE:15: attempts.0.blocked_if.0.output: not a regular expression: missing )",
    ),
    "bad regular expression of an effect": (
        changed(PROOF, "    allowed_if: {effect: {run: [x], output: '[a'}}\n").replace(CANARY_LINE, ""),
        "attempts.0.allowed_if.effect.output: not a regular expression: unterminated character set",
    ),
    "two attempts with one id": (
        changed("expected:\n", "  - {id: a, kind: benign, run: [x], allowed_if: {output: x}}\nexpected:\n"),
        "two attempts are called 'a'",
    ),
    "no attack": (changed("kind: attack", "kind: benign"), "attempts: expected at least one of kind attack"),
    "no attempt": (
        SCENARIO[: SCENARIO.index("attempts:")] + "attempts: []\n" + SCENARIO[SCENARIO.index("expected:") :],
        "FILE:9: attempts: Tuple should have at least 1 item",
    ),
    "CONTAINED without a denial": (
        changed("    denials: [{attempt: a, permissions: [read]}]\n", ""),
        "expected.selinux: CONTAINED needs the denial expected for attack 'a'",
    ),
    "a denial of no attack": (changed("attempt: a,", "attempt: b,"), "expected.selinux.denials: 'b' is no attack"),
    "a denial without permissions": (changed("[read]", "[]"), "FILE:20: expected.selinux.denials.0: expected `permi"),
    "nothing expected": (
        SCENARIO[: SCENARIO.index("expected:")] + "expected: {}\n",
        "expected selinux, apparmor or both",
    ),
    "a framework expected without a subject": (changed("selinux: httpd_t, ", ""), "subject.selinux is missing"),
    "unknown framework": (
        changed("  selinux:\n", "  selinx:\n"),
        "FILE:17: expected.selinx: unknown key; expected 'selinux' or 'apparmor'",
    ),
    "unknown verdict": (
        changed("CONTAINED", "CONTAIND"),
        "FILE:18: expected.selinux.verdict: expected 'NOT_CONTAINED', 'ERROR', ",
    ),
    "a technique that is none": (changed("T1003", "X1003"), "FILE:5: technique: String should match pattern"),
    "a technique that is cut": (changed("T1003", "T1003.8"), "FILE:5: technique: String should match pattern"),
    "a service with a bad name": (
        changed("service: nginx", "service: 'a b'"),
        "FILE:6: subject.service: String should match",
    ),
    "missing `from` file": (
        changed("attempts:\n", "setup:\n  - write: {path: /x, from: nope.conf}\nattempts:\n"),
        "FILE:10: no such file: ",
    ),
    "a folder as `from`": (
        changed("attempts:\n", "setup:\n  - write: {path: /x, from: .}\nattempts:\n"),
        "FILE:10: no such file: ",
    ),
    "missing module": (
        changed("attempts:\n", "selinux:\n  modules:\n    - nope.cil\nattempts:\n"),
        "FILE:11: no such file: ",
    ),
    "`from` and `content`": (
        changed("attempts:\n", "setup:\n  - write: {path: /x, from: a, content: b}\nattempts:\n"),
        "FILE:10: setup.0.write: expected either `from`",
    ),
    "a step of nothing": (
        changed("attempts:\n", "setup:\n  - {}\nattempts:\n"),
        "FILE:10: setup.0: expected exactly one of: run, write, join",
    ),
    "a step of two": (
        changed("attempts:\n", "setup:\n  - {run: [ls], join: {user: a, group: b}}\nattempts:\n"),
        "FILE:10: setup.0: expected exactly one of: run, write, join",
    ),
    "a group of no name": (
        changed("attempts:\n", "setup:\n  - join: {user: www-data, group: 'a:b'}\nattempts:\n"),
        "FILE:10: setup.0.join.group: String should match pattern",
    ),
    "extends unknown": (changed("id: s\n", "extends: zz\nid: s\n"), "FILE:2: extends: no scenario named 'zz'"),
    "extends no name": (changed("id: s\n", "extends: [s]\nid: s\n"), "FILE:2: extends: no scenario named ['s']"),
    "extends itself": (changed("id: s\n", "extends: s\nid: s\n"), "FILE:2: extends: 's' leads back to this file"),
    "id not the folder's name": (
        changed("id: s\n", "id: other\n"),
        "FILE:2: id: expected 's', the folder's name; found 'other'",
    ),
    "bad id": (changed("id: s\n", "id: S!\n"), "FILE:2: id: String should match pattern"),
}


@pytest.mark.parametrize(("text", "words"), list(BAD.values()), ids=list(BAD))
def test_a_bad_scenario_is_told_what_and_where(tmp_path: Path, text: str | bytes, words: str) -> None:
    assert words in fault(tmp_path, text)


def test_every_fault_is_listed_once(tmp_path: Path) -> None:
    found = fault(tmp_path, changed("title: t", "titel: t").replace("story: x", "story: 5")).splitlines()
    assert found == [
        "FILE:1: title: is missing and is needed",
        "FILE:4: story: expected a string, found a number (5)",
        "FILE:3: titel: unknown key; did you mean 'title'?",
    ]


def test_a_fault_inside_an_attempt_is_the_only_one(tmp_path: Path) -> None:
    assert len(fault(tmp_path, changed("{status: 403}", "{status: 99}")).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("two attempts with one id", 16),
        ("CONTAINED without a denial", 17),
        ("a denial of no attack", 20),
        ("a framework expected without a subject", 17),
    ],
)
def test_a_fault_of_several_parts_has_its_line(tmp_path: Path, name: str, line: int) -> None:
    assert fault(tmp_path, BAD[name][0]).startswith(f"FILE:{line}: ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BAD["a text for a list"][0], "expected an array"),
        (BAD["a text for a number"][0], "expected an integer"),
    ],
)
def test_the_article_fits(tmp_path: Path, text: str, words: str) -> None:
    assert words in fault(tmp_path, text)


CRASHES: dict[str, str] = {
    "a tagged list (definition.py _plain: no line data)": changed("title: t", "title: !foo [id]"),
    "a mapping merged into itself (definition.py read_raw)": changed(
        "dac: {opened_by: x}", "dac: &d\n  <<: *d\n  opened_by: x"
    ),
    "a tag that its text does not fit (definition.py read_raw)": changed("title: t", "title: !!set "),
    "another such (definition.py read_raw)": changed("title: t", "title: !!int "),
    "a complex key (definition.py read_raw)": changed("title: t", "title: t\n? - :\n: x"),
    "a list with a mapping as key (definition.py read_raw)": changed("title: t", "title: t\n[[]: ]: x"),
    "NUL in a file's name (definition.py _absolute)": changed(
        "attempts:\n", 'setup:\n  - write: {path: /x, from: "a\\0b"}\nattempts:\n'
    ),
    "a surrogate in a file's name (definition.py _absolute)": changed(
        "attempts:\n", 'setup:\n  - write: {path: /x, from: "a\\ud800b"}\nattempts:\n'
    ),
    "a file's name of 5000 letters (scenario.py load, is_file)": changed(
        "attempts:\n", f"setup:\n  - write: {{path: /x, from: {'a' * 5000}}}\nattempts:\n"
    ),
    "`extends: null` and a missing file (scenario.py _value_at)": changed(
        "attempts:\n", "extends: null\nsetup:\n  - write: {path: /x, from: nope.conf}\nattempts:\n"
    ),
}


@pytest.mark.parametrize("text", list(CRASHES.values()), ids=list(CRASHES))
def test_no_file_makes_a_traceback(tmp_path: Path, text: str) -> None:
    assert fault(tmp_path, text)


def test_an_anchor_is_refused(tmp_path: Path) -> None:
    text = changed("{status: 403}", "{timeout: &yes true}")
    assert "&yes: anchors and aliases are not used here" in fault(tmp_path, text)


@pytest.mark.parametrize("value", ["!foo bar", "!!binary aGVsbG8="])
def test_a_tagged_text_is_refused(tmp_path: Path, value: str) -> None:
    assert "FILE:3" in fault(tmp_path, changed("title: t", f"title: {value}"))


def test_a_missing_file_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DefinitionError, match=r"scenario\.yaml: cannot be read: No such file"):
        load_scenario_file(tmp_path / "scenarios" / "zz" / "scenario.yaml", tmp_path)


YAML_BITS = st.sampled_from([*":{}[]-,&*|>'\"%@`#\n\t =ab0", "kind: lsmlab/scenario\n", "\n  ", "- ", ": ", "~"])
"""Without `!`, `<` and `?`: tags, merge keys and complex keys have their own known crashes, in CRASHES."""


@settings(max_examples=200, derandomize=True)  # `[[]: ]: x`, in CRASHES, is in its reach too
@given(st.lists(YAML_BITS, max_size=25).map("".join))
def test_whatever_is_written_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(text, encoding="utf-8")
    with contextlib.suppress(DefinitionError):
        assert all(isinstance(key, str) for key in definition.read_raw(file).data)


BAD_LABS: dict[str, tuple[str, str]] = {
    "id not the file's name": (
        changed("id: l\n", "id: m\n", LAB),
        "FILE:2: id: expected 'l', the file's name; found 'm'",
    ),
    "unknown backend": (changed("qemu", "vbox", LAB), "FILE:4: backend: expected 'qemu', found a text ('vbox')"),
    "no kernel arguments for a framework": (
        changed("  selinux: security=selinux\n", "", LAB),
        "FILE:7: kernel_arguments: selinux is missing",
    ),
    "no kernel arguments for the control": (
        changed("  none: security=none\n", "", LAB),
        "FILE:7: kernel_arguments: none is missing",
    ),
    "unknown kernel": (
        changed("  none:", "  nome:", LAB),
        "FILE:8: kernel_arguments.nome: unknown key; expected 'none', ",
    ),
    "unknown framework": (
        changed("[selinux]", "[smack]", LAB),
        "FILE:6: frameworks.0: expected 'selinux' or 'apparmor', found",
    ),
    "no framework": (changed("[selinux]", "[]", LAB), "FILE:6: frameworks: "),
    "too little memory": (
        changed("768", "64", LAB),
        "FILE:5: memory_mib: Input should be greater than or equal to 256",
    ),
    "a unit that is no service": (
        changed("nginx.service", "nginx.socket", LAB),
        "FILE:12: services.nginx.unit: String should",
    ),
    "unknown key of a service": (
        changed("nginx.service}", "nginx.service, aparmor_profile: x}", LAB),
        "FILE:12: services.nginx.aparmor_profile: unknown key; did you mean 'apparmor_profile'?",
    ),
    "wrong kind": (changed("lsmlab/lab", "lsmlab/scenario", LAB), "FILE:1: kind: expected 'lsmlab/lab'"),
    "extends unknown": (changed("id: l\n", "extends: zz\nid: l\n", LAB), "FILE:2: extends: no lab named 'zz'"),
}


@pytest.mark.parametrize(("text", "words"), list(BAD_LABS.values()), ids=list(BAD_LABS))
def test_a_bad_lab_is_told_what_and_where(tmp_path: Path, text: str, words: str) -> None:
    file = put_lab(tmp_path, "l", text)
    with pytest.raises(DefinitionError) as caught:
        lab.load(file, lambda _name: None)
    assert words in str(caught.value).replace(str(file), "FILE")


def test_an_unknown_service_is_told_the_nearest(tmp_path: Path) -> None:
    put_lab(tmp_path, "l", LAB)
    with pytest.raises(DefinitionError, match=r"unknown service of lab l 'ngnix'\n  Did you mean 'nginx'\?"):
        load_lab("l", tmp_path).service("ngnix")


# Merging

CHILD = "kind: lsmlab/scenario\nextends: s\nid: child\n"


def load_child(root: Path, text: str, base: str = SCENARIO) -> Scenario:
    put(root, "s", base)
    return load(root, CHILD + text, "child")


def test_mappings_are_merged_and_lists_replaced(tmp_path: Path) -> None:
    base = SCENARIO + "tags: [web, old]\n"
    child = load_child(tmp_path, "dac: {access: write}\ntags: [new]\nexpected: {selinux: {because: y}}\n", base)
    assert (child.id, child.title) == ("child", "t")
    assert (child.dac.opened_by, child.dac.access) == ("x", "write")
    assert child.tags == ("new",)
    assert child.expected[Framework.SELINUX].because == "y"
    assert child.expected[Framework.SELINUX].denials == load(tmp_path).expected[Framework.SELINUX].denials


def test_null_takes_away_what_the_base_has(tmp_path: Path) -> None:
    base = SCENARIO + "  apparmor: {verdict: NOT_CONTAINED, because: x}\n"
    child = load_child(tmp_path, "expected: {selinux: null}\n", base)
    assert set(child.expected) == {Framework.APPARMOR}
    with pytest.raises(DefinitionError, match=r"child/scenario\.yaml:1: title: is missing and is needed"):
        load_child(tmp_path, "title: null\n")


def test_the_kind_of_a_value_may_change(tmp_path: Path) -> None:
    with pytest.raises(DefinitionError, match=r"child/scenario\.yaml:4: dac: expected an object, found a number \(5\)"):
        load_child(tmp_path, "dac: 5\n")


def test_a_grandchild_has_all_of_it(tmp_path: Path) -> None:
    load_child(tmp_path, "title: child's\ndac: {access: write}\n")
    text = "kind: lsmlab/scenario\nextends: child\nid: grandchild\nstory: own\n"
    found = load(tmp_path, text, "grandchild")
    assert (found.title, found.story, found.dac.access, found.dac.opened_by) == ("child's", "own", "write", "x")


def test_lines_point_into_the_file_that_has_the_fault(tmp_path: Path) -> None:
    base = changed("technique: T1003", "technique: X").replace("{opened_by: x}", "{opened_by: 5}")
    with pytest.raises(DefinitionError) as caught:
        load_child(tmp_path, "\ndac: {acess: x}\nobject: {path: x}\n", base)
    folder = tmp_path / "scenarios"
    assert sorted(str(caught.value).splitlines()) == sorted(
        [
            f"{folder}/s/scenario.yaml:5: technique: String should match pattern '^T\\d{{4}}(\\.\\d{{3}})?$'",
            f"{folder}/child/scenario.yaml:6: object.path: String should match pattern '^/[^\\x00\\n]*$'",
            f"{folder}/s/scenario.yaml:8: dac.opened_by: expected a string, found a number (5)",
            f"{folder}/child/scenario.yaml:5: dac.acess: unknown key; did you mean 'access'?",
        ]
    )


def test_paths_stay_those_of_the_base(tmp_path: Path) -> None:
    base = changed("attempts:\n", "setup:\n  - write: {path: /x, from: site.conf}\nattempts:\n")
    put(tmp_path, "s", base).with_name("site.conf").write_text("base", encoding="utf-8")
    own = put(tmp_path, "child", CHILD).with_name("site.conf")
    own.write_text("child", encoding="utf-8")
    assert load_child(tmp_path, "", base).files() == ((tmp_path / "scenarios/s/site.conf").resolve(),)
    replaced = load_child(tmp_path, "setup:\n  - write: {path: /x, from: site.conf}\n", base)
    assert replaced.files() == (own.resolve(),)
    assert replaced.setup[0].write is not None
    assert replaced.setup[0].write.data() == b"child"


def test_a_missing_file_is_told_where_it_was_named(tmp_path: Path) -> None:
    base = changed("attempts:\n", "selinux:\n  modules: [nope.cil]\nattempts:\n")
    with pytest.raises(DefinitionError, match=r"scenarios/s/scenario\.yaml:10: no such file: .*/scenarios/s/nope\.cil"):
        load_child(tmp_path, "", base)


def test_a_circle_is_told(tmp_path: Path) -> None:
    put(tmp_path, "child", CHILD)
    with pytest.raises(DefinitionError, match=r"child/scenario\.yaml:2: extends: 's' leads back to this file"):
        load(tmp_path, "kind: lsmlab/scenario\nextends: child\nid: s\n")


def test_a_base_of_another_kind_is_told(tmp_path: Path) -> None:
    put(tmp_path, "s", LAB)
    with pytest.raises(
        DefinitionError, match=r"s/scenario\.yaml:1: kind: expected 'lsmlab/scenario', found 'lsmlab/lab'"
    ):
        load(tmp_path, CHILD, "child")


def test_a_scenario_may_extend_one_of_the_library(tmp_path: Path) -> None:
    text = "kind: lsmlab/scenario\nextends: nginx-reads-shadow\nid: mine\ntitle: mine\n"
    found = load(tmp_path, text, "mine")
    (flagship,) = load_scenarios(["nginx-reads-shadow"])
    assert found.title == "mine"
    assert found.files() == flagship.files()
    assert all(f.is_file() for f in found.files())


# Finding


def test_the_nearest_name_is_offered(tmp_path: Path) -> None:
    put(tmp_path, "s", SCENARIO)
    with pytest.raises(
        DefinitionError, match=r"unknown scenario 'ngnix-reads-shadow'\n  Did you mean 'nginx-reads-shadow"
    ):
        load_scenarios(["ngnix-reads-shadow"], tmp_path)
    with pytest.raises(DefinitionError, match=r"unknown scenario '0000'\n  Known: .*, nginx-reads-shadow, .*, s, .*\."):
        load_scenarios(["0000"], tmp_path)
    with pytest.raises(DefinitionError, match=r"unknown lab 'debain-13'\n  Did you mean 'debian-1[23]'\?"):
        load_lab("debain-13", tmp_path)


def test_without_names_all_of_ones_own_else_the_librarys(tmp_path: Path) -> None:
    assert "nginx-reads-shadow" in [s.id for s in load_scenarios((), tmp_path)]
    put(tmp_path, "s", SCENARIO)
    assert [s.id for s in load_scenarios((), tmp_path)] == ["s"]


def test_ones_own_come_before_the_librarys(tmp_path: Path) -> None:
    put(tmp_path, "nginx-reads-shadow", changed("id: s", "id: nginx-reads-shadow"))
    put_lab(tmp_path, "debian-13", changed("id: l", "id: debian-13", LAB))
    assert load_scenarios(["nginx-reads-shadow"], tmp_path)[0].title == "t"
    assert load_lab(base=tmp_path).title == "t"
    assert load_lab("debian-12", tmp_path).service("nginx") == load_lab(base=tmp_path).service("nginx")


def test_ids_folders_and_files_name_scenarios(tmp_path: Path) -> None:
    file = put(tmp_path, "s", SCENARIO)
    for name in ("s", str(file), str(file.parent), str(file.parent.parent), "scenarios"):
        assert [s.id for s in load_scenarios([name], tmp_path)] == ["s"]


def test_a_scenario_named_twice_is_loaded_once(tmp_path: Path) -> None:
    file = put(tmp_path, "s", SCENARIO)
    assert len(load_scenarios(["s", "s", str(file), str(file.parent)], tmp_path)) == 1


def test_a_scenario_named_by_a_relative_path_too_is_loaded_once(tmp_path: Path) -> None:
    put(tmp_path, "s", SCENARIO)
    assert len(load_scenarios(["s", "scenarios/s"], tmp_path)) == 1


def test_two_scenarios_with_one_id_are_refused(tmp_path: Path) -> None:
    put(tmp_path, "s", SCENARIO)
    put(tmp_path, "group/s", SCENARIO)
    with pytest.raises(
        DefinitionError, match=r"two scenarios are called 's': .*scenario\.yaml and .*scenario\.yaml\n  Ren"
    ):
        load_scenarios((), tmp_path)


def test_two_scenarios_with_one_id_from_two_places_are_refused(tmp_path: Path) -> None:
    first, other = put(tmp_path / "a", "s", SCENARIO), put(tmp_path / "b", "s", changed("title: t", "title: other"))
    with pytest.raises(DefinitionError, match="two scenarios are called 's'"):
        load_scenarios([str(first.parent), str(other.parent)], tmp_path)


def test_a_folder_without_scenarios_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DefinitionError, match=r"empty: no scenario\.yaml with `kind: lsmlab/scenario` in it"):
        load_scenarios(["empty"], tmp_path)


def test_what_is_not_ours_is_passed_over(tmp_path: Path) -> None:
    put(tmp_path, "s", SCENARIO)
    put(tmp_path, "helm", "kind: Deployment\nid: helm\n")
    put(tmp_path, "molecule", "driver:\n  kind: lsmlab/scenario\n")
    put(tmp_path, ".venv/x", SCENARIO)
    put_lab(tmp_path, "compose", "services: {}\n")
    (tmp_path / "scenarios" / "binary").mkdir()
    (tmp_path / "scenarios" / "binary" / "scenario.yaml").write_bytes(b"\xff\xfe\0")
    assert [s.id for s in load_scenarios((), tmp_path)] == ["s"]
    assert "compose" not in discovery.labs(tmp_path).ids


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("kind: lsmlab/lab\n", "lsmlab/lab"),
        ("# hello\n\nkind: 'lsmlab/lab' # yes\n", "lsmlab/lab"),
        ('id: x\nkind: "lsmlab/lab"\n', "lsmlab/lab"),
        ("kind:\n", None),
        ("  kind: lsmlab/lab\n", None),
        ("a: b\n", None),
        ("", None),
    ],
)
def test_peek_kind(tmp_path: Path, text: str, kind: str | None) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(text, encoding="utf-8")
    assert definition.peek_kind(file) == kind
    assert definition.peek_kind(tmp_path / "absent") is None


# Digests


def with_profile(root: Path, content: str = "profile nginx {}\n", name: str = "nginx.apparmor") -> Scenario:
    text = changed("attempts:\n", f"apparmor: {{profiles: [{name}]}}\nattempts:\n")
    put(root, "s", text).with_name(name).write_text(content, encoding="utf-8")
    return load(root, text)


def test_the_digest_does_not_depend_on_the_folders_place(tmp_path: Path) -> None:
    here = with_profile(tmp_path / "one")
    assert here.digest() == with_profile(tmp_path / "two" / "deeper").digest()
    moved = tmp_path / "three" / "scenarios"
    shutil.copytree(tmp_path / "one" / "scenarios", moved)
    assert load_scenario_file(moved / "s" / "scenario.yaml", tmp_path).digest() == here.digest()


@pytest.mark.parametrize("folder", ['it"s', "back\\slash"])
def test_the_digest_does_not_depend_on_the_letters_of_the_place(tmp_path: Path, folder: str) -> None:
    assert with_profile(tmp_path / "one").digest() == with_profile(tmp_path / folder).digest()


def test_the_digest_changes_with_what_is_used(tmp_path: Path) -> None:
    digests = [
        with_profile(tmp_path / "a").digest(),
        with_profile(tmp_path / "b", "profile nginx { / r, }\n").digest(),
        with_profile(tmp_path / "c", name="other.apparmor").digest(),
        load(tmp_path / "d").digest(),
        load(tmp_path / "e", changed("title: t", "title: u")).digest(),
        load(tmp_path / "f", changed("403", "404")).digest(),
    ]
    assert len(set(digests)) == len(digests)


def test_the_digest_does_not_depend_on_how_it_is_written(tmp_path: Path) -> None:
    text = "# a comment\n" + changed("dac: {opened_by: x}", "dac:\n  access: read\n  opened_by: 'x'")
    assert load(tmp_path / "a", text).digest() == load(tmp_path / "b").digest()


def test_the_digest_of_a_file_that_is_gone_is_an_error(tmp_path: Path) -> None:
    found = with_profile(tmp_path)
    found.files()[0].unlink()
    with pytest.raises(DefinitionError, match=r"nginx\.apparmor: cannot be read: No such file or directory"):
        found.digest()


@given(st.lists(st.binary(max_size=4), max_size=4), st.lists(st.binary(max_size=4), max_size=4))
def test_no_two_lists_of_parts_have_one_digest(left: list[bytes], right: list[bytes]) -> None:
    assert (definition.digest_of(*left) == definition.digest_of(*right)) is (left == right)


def test_models_are_frozen_and_errors_are_ours(tmp_path: Path) -> None:
    found = load(tmp_path)
    with pytest.raises(ValueError, match="frozen"):
        found.title = "other"
    assert issubclass(DefinitionError, LsmlabError)
    assert issubclass(Lab, definition.Definition)
    assert scenario.KIND == "lsmlab/scenario"
