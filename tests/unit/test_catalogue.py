"""The pages of the catalogue: made from outcomes alone, always the same, and true to the scenarios on disk."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from builders import denial, outcome, scenario
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from lsmlab import catalogue, discovery
from lsmlab.catalogue import Catalogue, Side, pairs
from lsmlab.errors import DefinitionError
from lsmlab.outcome import ArmRecord, AttemptRecord, Outcome, Report
from lsmlab.report import comparison, pages
from lsmlab.store import Store
from lsmlab.terminal import clean
from lsmlab.terms import ENFORCING_ARM, AttemptKind, Framework, Result, Verdict
from lsmlab.verdict import Attribution

REPO = Path(__file__).resolve().parents[2]
FLAGSHIP = "nginx-reads-shadow"
LINK = re.compile(r"\]\(([^)]+)\)")
OUT = Path("docs")


USED = (FLAGSHIP, "nginx-reads-shadow-permissive-domain", "nginx-reads-shadow-wide-profile")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder with a few scenarios of the library: all of them would be read anew by each test."""
    monkeypatch.setenv("LSMLAB_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    for name in USED:
        shutil.copytree(REPO / "scenarios" / name, tmp_path / "scenarios" / name)


def seen(framework: Framework = Framework.SELINUX, number: int = 0, **changes: Any) -> Outcome:
    """An outcome of the flagship as it is on disk, with the denial of one attack in the enforcing arm."""
    (flagship,) = discovery.load_scenarios([FLAGSHIP])
    found = denial(framework=framework)
    attempt = AttemptRecord(
        attempt="read-shadow", kind=AttemptKind.ATTACK, result=Result.BLOCKED, reason="HTTP 403",
        denials=(found,), attribution=Attribution(denial=found, misses=()),
    )  # fmt: skip
    base: dict[str, Any] = {
        "scenario_digest": flagship.digest(),
        "framework": framework,
        "arms": (ArmRecord(arm=ENFORCING_ARM[framework], attempts=(attempt,)),),
        "recorded": f"2026-11-24T08:44:{number:02}+00:00",
    }
    return outcome(number, **{**base, **changes})


def page(*outcomes: Outcome) -> str:
    return pages.catalogue_page(catalogue.collect(outcomes), OUT)


def compared(*outcomes: Outcome) -> str:
    return comparison.comparison_page(catalogue.collect(outcomes), OUT)


def section(text: str, heading: str) -> str:
    """What stands below a heading, to the next of any level."""
    return re.split(r"^#+ ", text.split(f" {heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def row(text: str, first: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {first}")]
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


# Outcomes


def test_without_outcomes_nothing_is_said_to_have_been_seen() -> None:
    text = page()
    assert row(section(text, FLAGSHIP), "SELinux") == ["SELinux", "CONTAINED", "not run", "not run"]
    assert "0 were seen" in text
    assert "both contain" in compared()
    assert "Both contain it" not in compared()


def test_what_was_seen_stands_beside_what_is_expected() -> None:
    text = page(seen(verdict=Verdict.NOT_CONTAINED), seen(Framework.APPARMOR, 1))
    assert row(section(text, FLAGSHIP), "SELinux") == ["SELinux", "CONTAINED", "not run", "**NOT_CONTAINED**"]
    assert row(section(text, FLAGSHIP), "AppArmor") == ["AppArmor", "CONTAINED", "not run", "CONTAINED"]
    assert "2 were seen (1 CONTAINED, 1 NOT_CONTAINED)" in text
    assert "1 of those seen are not as expected." in text


def test_the_newest_outcome_counts_in_whatever_order_they_come() -> None:
    old, new = seen(verdict=Verdict.ERROR, number=1), seen(number=2)
    assert page(old, new) == page(new, old)
    assert row(section(page(new, old), FLAGSHIP), "SELinux")[3] == "CONTAINED"


def test_an_outcome_of_an_older_version_says_so() -> None:
    text = page(seen(scenario_digest="00" * 32))
    assert row(section(text, FLAGSHIP), "SELinux")[3] == "CONTAINED (of an older version)"
    assert "1 of them are of an older version" in text


def test_outcomes_of_scenarios_that_are_not_here_are_named() -> None:
    found = catalogue.collect([seen(scenario="gone"), seen(lab="debian-99")])
    assert found.strays == ("gone",)
    assert "debian-99" in found.labs
    assert "gone" not in pages.catalogue_page(found, OUT)


def test_a_framework_that_is_not_expected_was_not_missed() -> None:
    text = page()
    assert "AppArmor" not in section(text, "nginx-reads-shadow-permissive-domain")
    (line,) = [line for line in text.splitlines() if line.startswith("| [nginx-reads-shadow-permissive-domain]")]
    assert line.endswith("| not run | - |")


def test_a_folder_of_ones_own_has_a_catalogue_of_its_own(tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "scenarios")
    mine = tmp_path / "scenarios" / "mine"
    mine.mkdir(parents=True)
    text = f'kind: lsmlab/scenario\nextends: {FLAGSHIP}\nid: mine\ntitle: "a | b <script> *c*"\ntags: [x y]\n'
    (mine / "scenario.yaml").write_text(text)
    shown = page()
    assert "[a | b \\<script\\> \\*c\\*](../scenarios/mine)" in shown
    assert "## Tag: x y" in shown
    assert FLAGSHIP not in shown


@pytest.mark.parametrize(
    ("tags", "group"),
    [
        ([], "Without a tag"),
        (["web", "shop"], "Tag: web"),
        (["web", "credentials"], "Credentials"),
        (["credentials", "policy-mistake"], "Mistakes in a policy"),
        (["execution"], "To run code"),
        (["code-execution"], "To run code"),
    ],
)
def test_a_scenario_is_listed_under_its_first_lesson(tags: list[str], group: str) -> None:
    assert catalogue.Entry(scenario(tags=tags), Path("x"), {}).group == group


def test_lessons_come_in_their_order_and_the_rest_behind() -> None:
    tags = ("zoo", "credentials", "code-execution", "dac", "alps", "execution")
    entries = tuple(catalogue.Entry(scenario(tags=[tag]), Path("x"), {}) for tag in tags)
    groups = Catalogue(entries, (), ()).groups
    assert list(groups) == ["File permissions decide", "To run code", "Credentials", "Tag: alps", "Tag: zoo"]
    assert sum(map(len, groups.values())) == len(tags)


# SELinux against AppArmor


@pytest.mark.parametrize(
    ("selinux", "apparmor", "side"),
    [
        ("CONTAINED", "CONTAINED", Side.BOTH),
        ("CONTAINED", "NOT_CONTAINED", Side.SELINUX),
        ("NOT_CONTAINED", "CONTAINED", Side.APPARMOR),
        ("NOT_CONTAINED", "NOT_CONTAINED", Side.NEITHER),
        ("CONTAINED", "ERROR", Side.OTHER),
        ("DAC_BLOCKED", "DAC_BLOCKED", Side.OTHER),
        ("OVERBLOCKED", "CONTAINED", Side.OTHER),
    ],
)
def test_who_contains_it(selinux: str, apparmor: str, side: Side) -> None:
    both = (
        seen(verdict=Verdict(selinux), expected=Verdict(selinux)),
        seen(Framework.APPARMOR, 1, verdict=Verdict(apparmor), expected=Verdict(apparmor)),
    )
    (pair,) = pairs(catalogue.collect(both))
    assert pair.side is side
    text = compared(*both)
    heading = comparison.SECTIONS[side][0]
    assert [h for h, _ in comparison.SECTIONS.values() if f"## {h}" in text] == [heading]
    cells = row(section(text, heading), f"[{FLAGSHIP}]")
    assert cells[1] == "debian-13"
    assert cells[2].startswith(f"{selinux}<br>no rule") and cells[3].startswith(f"{apparmor}<br>no rule")
    numbers = row(section(text, "In numbers"), "debian-13")
    assert numbers[1 + list(Side).index(side)] == "1" and numbers[-1] == "1"
    assert row(section(text, "In numbers"), "debian-12")[1:] == ["0"] * 6


def test_the_kernels_record_is_told_in_the_words_of_each() -> None:
    cells = row(section(compared(seen(), seen(Framework.APPARMOR, 1)), "Both contain it"), f"[{FLAGSHIP}]")
    assert "denied: `httpd_t { read } shadow_t:file`" in cells[2]
    assert "denied: `nginx { r } /etc/shadow`" in cells[3]


def test_what_differs_from_run_to_run_is_left_out_of_a_record() -> None:
    found = denial(framework=Framework.APPARMOR).model_copy(update={"name": "/proc/4711/mem"})
    assert comparison.record_words(found) == "`nginx { r } /proc/PID/mem`"
    bare = found.model_copy(update={"name": "", "tclass": "cap", "permissions": ("sys_admin",)})
    assert comparison.record_words(bare) == "`nginx { sys_admin } cap`"


def test_a_reason_is_not_given_for_what_was_not_expected() -> None:
    text = compared(seen(verdict=Verdict.NOT_CONTAINED), seen(Framework.APPARMOR, 1))
    cells = row(section(text, "Only AppArmor contains it"), f"[{FLAGSHIP}]")
    assert cells[2] == "NOT_CONTAINED<br>CONTAINED was expected"


def test_labs_that_answer_alike_share_a_row() -> None:
    both = [
        seen(f, n, lab=lab)
        for n, (f, lab) in enumerate((f, lab) for f in Framework for lab in ("debian-12", "debian-13"))
    ]
    assert row(section(compared(*both), "Both contain it"), f"[{FLAGSHIP}]")[1] == "debian-12, debian-13"


def test_what_is_not_compared_is_said_with_the_reason() -> None:
    found = section(compared(seen()), "Not compared")
    assert (
        row(found, FLAGSHIP + " ")[1] == "not run: SELinux on debian-12, AppArmor on debian-12, AppArmor on debian-13"
    )
    assert row(found, "nginx-reads-shadow-wide-profile")[1] == "it is about AppArmor alone"


# Markdown


@given(st.text(max_size=60))
def test_prose_shows_what_was_written(text: str) -> None:
    """Rendered by a parser of its own, with nothing in it taken for markup."""
    if "`" in text:
        return
    shown = pages.prose(text)
    tokens = MarkdownIt("commonmark").enable("table").enable("strikethrough").parse(f"{shown}\n")
    kinds = {t.type for t in tokens}
    assert kinds <= {"paragraph_open", "inline", "paragraph_close"}, (shown, kinds)
    inline = [child for t in tokens for child in (t.children or [])]
    assert "".join(child.content for child in inline) == " ".join(clean(text).split()), shown


def test_code_stays_code() -> None:
    assert pages.prose("the rule `/etc/** r` matches *all*") == "the rule `/etc/** r` matches \\*all\\*"
    assert pages.prose("httpd_t and _x_ # no heading") == "httpd_t and \\_x\\_ # no heading"
    assert pages.prose("# no heading") == "\\# no heading"
    assert pages.prose("1. no list") == "1\\. no list"


def test_a_cell_does_not_end_its_table() -> None:
    text = pages.table(("a", "b"), [("x | y", "one\ntwo")])
    kinds = [t.type for t in MarkdownIt("commonmark").enable("table").parse(text)]
    assert kinds.count("table_open") == 1 and kinds[-1] == "table_close"
    assert text.splitlines()[2] == r"| x \| y | one<br>two |"


# Reports


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    report = Report(outcomes=(seen(), seen(Framework.APPARMOR, 1)))
    file = tmp_path / "out.json"
    file.write_text(report.to_json())
    assert Report.read(file) == report


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "out.json: no report of outcomes"),
        ("[]", "no report of outcomes"),
        ("{}", "no report of outcomes"),
        ('{"schema": 1, "outcomes": 3}', "no report of outcomes"),
        ('{"schema": 1, "outcomes": ["x"]}', "no report of outcomes"),
        ('{"schema": 2, "outcomes": []}', "a report of version 2; this lsmlab reads 1"),
        ('{"schema": 1, "outcomes": [{"id": "x"}]}', "outcomes that this lsmlab cannot read: recorded: "),
    ],
)
def test_what_is_no_report_is_told_so(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "out.json"
    file.write_text(text)
    with pytest.raises(DefinitionError) as caught:
        Report.read(file)
    assert words in str(caught.value)
    with pytest.raises(DefinitionError, match=r"absent\.json: cannot be read"):
        Report.read(tmp_path / "absent.json")


def test_the_store_gives_the_newest_of_each_kind(tmp_path: Path) -> None:
    store = Store(tmp_path / "outcomes.sqlite")
    assert store.newest() == []
    for one in (seen(number=1), seen(number=2), seen(Framework.APPARMOR, 3), seen(number=4, lab="debian-12")):
        store.add(one)
    assert [o.id for o in store.newest()] == [f"{n:012x}" for n in (2, 3, 4)]


def test_a_lab_of_a_downloaded_image_is_listed_once_something_was_seen_there() -> None:
    assert {"debian-12", "debian-13", "docker-debian-13"} <= set(catalogue.collect([]).labs)
    assert "fedora-44" in discovery.labs().ids and "fedora-44" not in catalogue.collect([]).labs
    assert "fedora-44" in catalogue.collect([seen(lab="fedora-44")]).labs


def test_a_scenario_is_listed_on_the_labs_that_it_is_run_on() -> None:
    shutil.copytree(REPO / "scenarios" / "container-reads-host-shadow", Path("scenarios/container-reads-host-shadow"))
    labs = {e.scenario.id: e.labs for e in catalogue.collect([]).entries}
    assert labs["container-reads-host-shadow"] == ("docker-debian-13",)
    assert labs[FLAGSHIP] == ("debian-12", "debian-13")
    ran = catalogue.collect([seen(lab="docker-debian-13")])
    assert next(e for e in ran.entries if e.scenario.id == FLAGSHIP).labs[-1] == "docker-debian-13"


# The pages of the repository


@pytest.fixture
def committed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.chdir(REPO)
    return {name: (REPO / "docs" / name).read_text("utf-8") for name in ("catalogue.md", "comparison.md")}


def ids() -> set[str]:
    return {p.parent.name for p in (REPO / "scenarios").glob("*/scenario.yaml")}


def test_the_committed_catalogue_has_every_scenario_and_no_other(committed: dict[str, str]) -> None:
    headings = re.findall(r"^### (.+)$", committed["catalogue.md"], re.MULTILINE)
    assert set(headings) == ids() != set()
    assert headings and len(headings) == len(set(headings))


def test_the_committed_pages_name_no_scenario_that_is_not_there(committed: dict[str, str]) -> None:
    for name, text in committed.items():
        linked = set(re.findall(r"\]\(\.\./scenarios/([^)]+)\)", text))
        assert linked <= ids(), name
    listed = {
        row.split(" | ")[0]
        for row in re.findall(r"^\| ([a-z0-9._-]+ \| .*) \|$", committed["comparison.md"], re.MULTILINE)
    }
    assert listed - {"---", "scenario", "lab", *discovery.labs().ids} <= ids()


def test_the_committed_pages_say_what_the_scenarios_say(committed: dict[str, str]) -> None:
    """All but what was seen: a title, a technique, an expectation that was changed and not written anew."""

    def without_what_was_seen(text: str) -> list[str]:
        lines = [
            line for line in text.splitlines() if not line.startswith(("| [", "|---")) and " were seen" not in line
        ]
        return [
            " | ".join(line.split(" | ")[:2]) if re.match(r"\| (SELinux|AppArmor) ", line) else line for line in lines
        ]

    today = pages.catalogue_page(catalogue.collect([]), REPO / "docs")
    assert without_what_was_seen(committed["catalogue.md"]) == without_what_was_seen(today), "run `lsmlab catalogue`"


def test_the_committed_pages_have_no_times(committed: dict[str, str]) -> None:
    for text in committed.values():
        assert not re.search(r"\b20\d\d-\d\d|\b\d\d:\d\d\b|\b\d+(\.\d+)? s\b", text)


def test_the_committed_pages_have_tables_that_are_tables(committed: dict[str, str]) -> None:
    for text in committed.values():
        tokens = MarkdownIt("commonmark").enable("table").parse(text)
        tables = sum(t.type == "table_open" for t in tokens)
        assert tables == len(re.findall(r"^\| --- \|", text, re.MULTILINE)) > 0


def test_the_same_outcomes_give_the_same_pages() -> None:
    both = [seen(), seen(Framework.APPARMOR, 1)]
    assert (page(*both), compared(*both)) == (page(*both[::-1]), compared(*both[::-1]))
    again = [
        Outcome.model_validate_json(json.dumps(json.loads(o.model_dump_json(exclude={"as_expected"})))) for o in both
    ]
    assert page(*again) == page(*both)


def test_an_empty_catalogue_is_no_error() -> None:
    nothing = Catalogue((), ("debian-13",), ())
    assert "0 scenarios" in pages.catalogue_page(nothing, OUT)
    assert "In numbers" in comparison.comparison_page(nothing, OUT)
