"""The documents, held against the code: examples load, commands, options, keys, messages and links are there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from pydantic import BaseModel

from lsmlab import definition, discovery, doctor, pytest_plugin, scenario
from lsmlab.cli.base import app
from lsmlab.errors import DefinitionError
from lsmlab.scenario import Scenario

REPO = Path(__file__).resolve().parents[2]
PAGES = {
    str(path.relative_to(REPO)): path.read_text("utf-8")
    for path in [*sorted(REPO.glob("*.md")), *sorted((REPO / "docs").glob("*.md"))]
}
REFERENCE = PAGES["docs/scenarios.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!\!)\[[^\]]+\]\(([^)\s]+)\)")
on_every_page = pytest.mark.parametrize("page", list(PAGES))


def test_the_documents_are_there() -> None:
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/design.md", "docs/scenarios.md"} <= set(PAGES)


def prose(text: str) -> str:
    """A page without its code blocks."""
    return FENCE.sub("", text)


def code(text: str) -> Iterator[str]:
    """Every line of code on a page: of shell blocks, of blocks that show a terminal, and of inline code."""
    for language, body in FENCE.findall(text):
        if language == "sh":
            yield from (line.strip() for line in body.splitlines())
        else:
            yield from (line.strip().lstrip("#$ ") for line in body.splitlines() if line.startswith(("$ ", "# ")))
    yield from (span.strip() for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(text)))


# Examples


def examples() -> list[Any]:
    """Every scenario that a page shows."""
    return [
        pytest.param(body, id=f"{page}-{number}")
        for page, text in PAGES.items()
        for number, (language, body) in enumerate(FENCE.findall(text))
        if language == "yaml" and body.startswith(f"kind: {scenario.KIND}")
    ]


def stored(body: str, folder: Path) -> Path:
    """The scenario `body` as its file, below `folder`, with an empty file for each that it names."""
    name = re.search(r"^id: (\S+)", body, re.MULTILINE)
    assert name is not None
    path = folder / name[1] / scenario.FILE_NAME
    path.parent.mkdir()
    path.write_text(body, "utf-8")
    for value in named_files(definition.read_raw(path).data):
        file = path.parent / value
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return path


def named_files(node: Any) -> Iterator[str]:
    """The files that a definition's plain data names."""
    if isinstance(node, list):
        for item in node:
            yield from named_files(item)
    if isinstance(node, dict):
        for key, value in node.items():
            if key in scenario.FILE_KEYS:
                yield from [value] if isinstance(value, str) else value
            else:
                yield from named_files(value)


def nothings(node: Any) -> Iterator[str]:
    """The keys that stand with nothing, which takes away what a base has."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if value is None:
            yield str(key)
        yield from nothings(value)


def loaded(path: Path) -> Scenario:
    return scenario.load(path, discovery.scenarios(REPO).get)


@pytest.mark.parametrize("body", examples())
def test_an_example_loads(body: str, tmp_path: Path) -> None:
    path = stored(body, tmp_path)
    assert loaded(path).attacks
    taken_away = set(nothings(definition.read_raw(path).data))
    assert taken_away <= {"selinux", "apparmor"}, "a comma makes a key of nothing of what stands behind it"


def test_readme_and_reference_have_examples() -> None:
    shown = {str(example.id).partition("-")[0] for example in examples()}
    assert shown >= {"README.md", "docs/scenarios.md"}


# The scenario file's reference


SECTIONS = {
    "The file itself": "Scenario",
    "setup and after_start: steps": "Step",
    "http": "HttpRequest",
    "attempts": "Attempt",
    "selinux": "SelinuxPolicy",
    "apparmor": "ApparmorPolicy",
    "allowed_if": "AllowedIf",
    "blocked_if": "BlockedIf",
    "expected: selinux and apparmor": "Expectation",
    "denials": "DenialExpectation",
    "image": "ContainerImage",
    **{
        name: name.capitalize()
        for name in ("subject", "container", "object", "dac", "write", "join", "canary", "effect")
    },
}
"""Heading and model."""
OF_SCENARIOS = {"lsmlab.scenario", "lsmlab.container.spec"}


def rows(heading: str) -> dict[str, str]:
    """Key and default of each row of the table below a heading."""
    section = re.split(r"^##+ ", REFERENCE.split(f"\n### {heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    cells = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    return {key.strip("`"): default for key, _, default, *_ in cells}


def as_written(default: Any) -> str:
    """A model's default, as the reference says it."""
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return f"`{default}`" if isinstance(default, (str, int)) else "none"


@pytest.mark.parametrize(("heading", "name"), list(SECTIONS.items()))
def test_the_reference_has_every_key_and_default(heading: str, name: str) -> None:
    model: type[BaseModel] = getattr(scenario, name)
    keys = {
        field.alias or key: "needed" if field.is_required() else as_written(field.default)
        for key, field in model.model_fields.items()
    }
    if name == "Scenario":
        keys["extends"] = "none"
    assert rows(heading) == keys


def test_the_reference_has_every_model() -> None:
    models = {
        name for name, value in vars(scenario).items()
        if isinstance(value, type) and issubclass(value, BaseModel) and value.__module__ in OF_SCENARIOS
    }  # fmt: skip
    assert models == {*SECTIONS.values(), "LabExpectation"}  # whose keys are those of Expectation


MISTAKES = {
    "slip": ("tags:", "titel: x\ntags:"),
    "missing": ("opened_by: www-data is in the group shadow, which may read the file", "access: read"),
    "number": ("title: a command inside nginx reads /etc/shadow", "title: 7"),
    "mode": ('content: "<h1>Our shop</h1>\\n"', "content: x, mode: 0600"),
    "twice": ("tags:", "title: x\ntags:"),
    "id": ("id: nginx-runs-cat", "id: nginx-cat"),
    "kind": ("kind: lsmlab/scenario", "kind: lsmlab/lab"),
    "base": ("id: nginx-runs-cat", "extends: nginx-read-shadow\nid: nginx-runs-cat"),
    "file": ("[nginx.apparmor]", "[absent.apparmor]"),
    "proof": (
        '{file: /etc/shadow, line: "lsmlab-{canary}:!:20000::::::"}\n    allowed_if: {output: "lsmlab-{canary}:"}',
        'null\n    allowed_if: {output: "root:"}',
    ),
    "canary": ('{output: "lsmlab-{canary}:"}', '{output: "root:"}'),
    "signs": ("run: [cat, /etc/shadow]", "http: {path: /x}"),
    "status": ('{output: "lsmlab-{canary}:"}', '{status: 200, output: "lsmlab-{canary}:"}'),
    "verdict": ("selinux:\n    verdict: CONTAINED", "selinux:\n    verdict: CONTAIND"),
    "denial": ("    denials: [{attempt: read-shadow, permissions: [read, open]}]\n", ""),
    "subject": ("selinux: httpd_t, ", ""),
}
"""What the table of errors speaks of, as changes of the reference's first example."""


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_an_error_says_what_the_reference_says(mistake: str, tmp_path: Path) -> None:
    old, new = MISTAKES[mistake]
    body = next(b for language, b in FENCE.findall(REFERENCE) if language == "yaml")
    path = stored(body, tmp_path)
    assert old in body
    path.write_text(body.replace(old, new, 1), "utf-8")
    with pytest.raises(DefinitionError) as caught:
        loaded(path)
    said = re.sub(r"^\S+:\d+: ", "", caught.value.message.splitlines()[0])
    assert any(said.startswith(words) for words in error_table()), said


def error_table() -> list[str]:
    """The beginning of each message in the table of errors."""
    table = REFERENCE.split("\n## Errors\n", 1)[1]
    cells = [line.strip("| ").split(" | ")[1] for line in table.splitlines() if line.startswith("| ")][2:]
    return [re.sub(r"^(`+)\s?(.*?)\s?\1.*$", r"\2", cell) for cell in cells]


def test_every_error_of_the_table_is_tried() -> None:
    assert len(error_table()) == len(MISTAKES)


# Commands and options


def test_every_command_is_there() -> None:
    spoken = [(page, line) for page, text in PAGES.items() for line in code(text) if is_ours(line)]
    assert len(spoken) > 15
    wrong = [f"{page}: {line}: {problem}" for page, line in spoken if (problem := misuse(line))]
    assert not wrong, "\n".join(wrong)


def is_ours(line: str) -> bool:
    return line.removeprefix(".venv/bin/").startswith("lsmlab ")


def misuse(line: str) -> str:
    """What a line that calls lsmlab names and the program does not have, or an empty text."""
    words = shlex.split(line.replace("<", "").replace(">", ""), comments=True)[1:]
    command: Any = typer.main.get_command(app)
    while words and getattr(command, "commands", None) and not words[0].startswith("-"):
        if words[0] not in command.commands:
            return f"no command {words[0]!r}"
        command = command.commands[words.pop(0)]
    known = options_of(command)
    for word in words:
        if word == "--":
            break
        if word.startswith("-") and word != "-" and word.partition("=")[0] not in known:
            return f"no option {word!r}"
    return ""


def options_of(command: Any) -> set[str]:
    names = {"--help", "-h"}
    for parameter in command.params:
        names |= {*parameter.opts, *parameter.secondary_opts}
    return names


def test_misuse_is_seen() -> None:
    assert misuse("lsmlab fly") == "no command 'fly'"
    assert misuse("lsmlab images burn") == "no command 'burn'"
    assert misuse("lsmlab run x --fast") == "no option '--fast'"
    assert not misuse("lsmlab try --as nginx -- ls --fast")


class Options:
    """Stands in for pytest's parser: takes note of the options that the plugin adds."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def getgroup(self, *_: str) -> Options:
        return self

    def addoption(self, *names: str, **_: Any) -> None:
        self.names |= set(names)


def plugin_options() -> set[str]:
    options: Any = Options()
    pytest_plugin.pytest_addoption(options)
    return set(options.names)


def all_options(command: Any) -> set[str]:
    return options_of(command).union(*(all_options(c) for c in getattr(command, "commands", {}).values()))


@on_every_page
def test_every_option_is_there(page: str) -> None:
    ours = all_options(typer.main.get_command(app)) | plugin_options()
    alone = {line.split()[0].partition("=")[0] for line in code(PAGES[page]) if line.startswith("--")}
    assert not alone - ours
    lines = [line for line in code(PAGES[page]) if re.match(r"(\S+/python -m )?pytest |test_\w+\.py; run with: ", line)]
    used = {word.partition("=")[0] for line in lines for word in shlex.split(line) if word.startswith("--")}
    assert not used - plugin_options()


# Whatever else is named


@on_every_page
def test_every_target_of_make_is_there(page: str) -> None:
    named = {m[1] for line in code(PAGES[page]) if (m := re.match(r"make ([a-z-]+)", line))}
    assert not named - set(re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text("utf-8"), re.MULTILINE))


def test_every_marker_is_registered(pytestconfig: pytest.Config) -> None:
    asked = {m[2] for line in code(PAGES["CONTRIBUTING.md"]) for m in re.finditer(r"-m (\"?)([^\"]+)\1", line)}
    named = {word for words in asked for word in words.split()} - {"and", "or", "not"}
    assert named == {"container", "ssh", "slow"}
    assert named <= {line.partition(":")[0] for line in pytestconfig.getini("markers")}


@on_every_page
def test_every_variable_is_read(page: str) -> None:
    named = set(re.findall(r"\bLSMLAB_[A-Z_]+\b", PAGES[page]))
    sources = "".join(p.read_text("utf-8") for p in (REPO / "harness").rglob("*.py"))
    assert not {name for name in named if f'"{name}"' not in sources}


@on_every_page
def test_every_file_is_there(page: str) -> None:
    named = {line for line in code(PAGES[page]) if re.fullmatch(r"[\w./-]+(\.(py|sh|toml)|/)", line)}
    roots = (REPO, REPO / "harness" / "lsmlab")
    assert not {name for name in named if not any((root / name).exists() for root in roots)}


@on_every_page
def test_every_link_leads_somewhere(page: str) -> None:
    for link in LINK.findall(prose(PAGES[page])):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (REPO / page).parent / name if name else REPO / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text("utf-8")), link


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def test_what_a_cloud_lab_needs_is_named_as_doctor_looks_for_it() -> None:
    (said,) = re.findall(r"Root is not needed, nor anything on\s+this machine but ([^.]+)\.", PAGES["README.md"])
    programs = {name for name, _, _ in (*doctor.TO_RUN, *doctor.TO_PREPARE)}
    assert said.startswith("QEMU")
    assert set(re.findall(r"`(\w+)`", said)) == {name for name in programs if not name.startswith("qemu")}


# A way to be gone


WAY = "docs/write-a-scenario.md"


def test_the_way_to_a_scenario_can_be_gone(tmp_path: Path) -> None:
    """What boots no guest of it, in its order; tests/vm goes all of it."""
    done = []
    shown = ""
    for step in steps(PAGES[WAY]):
        if step.startswith("kind: "):
            (tmp_path / "scenarios" / "my-key" / scenario.FILE_NAME).write_text(step, "utf-8")
            continue
        command, _, target = step.partition(" > ")
        words = shlex.split(command)[1:]
        if words[0] in {"run", "shell"}:
            continue
        more = ["--no-compile"] if words[0] == "check" else []
        ended = subprocess.run(
            [sys.executable, "-m", "lsmlab.cli", *words, *more],
            cwd=tmp_path, capture_output=True, text=True, check=False,
            env={**os.environ, "LSMLAB_HOME": str(tmp_path / "home"), "COLUMNS": "200"},
        )  # fmt: skip
        assert ended.returncode == 0, f"{step}\n{ended.stdout}\n{ended.stderr}"
        shown = ended.stdout
        if target:
            (tmp_path / target).write_text(shown, "utf-8")
        done.append(words[0])
    assert done == ["new", "check", "check", "schema", "scenarios"]
    assert "my-key" in shown
    modeline = re.search(r"^# yaml-language-server: \$schema=(\S+)$", PAGES[WAY], re.MULTILINE)
    assert modeline is not None
    assert (tmp_path / "scenarios" / "my-key" / modeline[1]).is_file()


def steps(text: str) -> Iterator[str]:
    """The commands of a page's shell blocks, one by one, and the scenarios between them, in their order."""
    for language, body in re.findall(r"^ *```(\w*)\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL):
        if language == "sh":
            yield from (line.strip() for line in body.splitlines() if line.strip())
        elif body.startswith("kind: "):
            yield body
