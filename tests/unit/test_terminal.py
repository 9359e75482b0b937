"""Nothing of a guest acts on a terminal: every text that a guest can choose, in every place where one is printed."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from builders import denial, outcome
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from rich.console import Console, RenderableType

from lsmlab import cli, discovery, facts
from lsmlab.channel.base import CommandResult
from lsmlab.cli.base import ERROR, write_json
from lsmlab.dac import DacExplanation, DacStep
from lsmlab.errors import ChannelError, LsmlabError, SetupError
from lsmlab.outcome import Falsification, Outcome, Report
from lsmlab.pytest_plugin import Lines
from lsmlab.report import tables, text, trials
from lsmlab.report.progress import LiveProgress
from lsmlab.terminal import clean, clean_json
from lsmlab.terms import Arm, Verdict
from lsmlab.trial import Question, TrialArm

NASTY = "\x1b[2J\x1b]0;owned\x07[bold red]hello[/] :smile: \x9b31m\u202egnp.exe\r\x00\x7f\u2028"
HARMLESS = r"\x1b[2J\x1b]0;owned\x07[bold red]hello[/] :smile: \x9b31m\u202egnp.exe\r\x00\x7f\u2028"
ACTS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def nasty(value: Any) -> Any:
    """`value` with every text that it holds replaced: what is no name of ours, a guest may have chosen."""
    if isinstance(value, Enum):
        return value
    if isinstance(value, str):
        return NASTY
    if isinstance(value, tuple):
        return tuple(nasty(one) for one in value)
    if isinstance(value, dict):
        return {nasty(key): nasty(one) for key, one in value.items()}
    if isinstance(value, BaseModel):
        return value.model_copy(update={name: nasty(getattr(value, name)) for name in type(value).model_fields})
    return value


def explained() -> DacExplanation:
    return DacExplanation(permitted=True, rule="x", steps=(DacStep(path="x", needs="read", permitted=True, rule="x"),))


def nasty_outcome(verdict: Verdict) -> Outcome:
    falsification = Falsification(rules=("a",), verdict=verdict, reason="x")
    (arm,) = outcome().arms
    (made,) = arm.attempts
    arms = (
        arm.model_copy(update={"setup_denials": (denial(),), "service_active": False, "error": "x"}),
        arm.model_copy(update={"arm": Arm.DAC, "attempts": (made.model_copy(update={"dac": explained()}),)}),
        arm.model_copy(update={"arm": Arm.SELINUX_PERMISSIVE, "attempts": ()}),
    )
    found: Outcome = nasty(outcome(verdict=verdict, falsification=falsification, arms=arms))
    return found.model_copy(update={"id": "0" * 12})  # which is made on the host


def render(part: RenderableType) -> str:
    """As the command line prints it into a pipe."""
    file = io.StringIO()
    Console(file=file, width=4000, highlight=False).print(part)
    return file.getvalue()


def trial_answer(arm: Arm, result: str, **changes: Any) -> TrialArm:
    whole: dict[str, Any] = {
        "arm": arm, "result": result, "by": "x", "domain": "x", "reason": "x", "output": "x", "dac": explained(),
        "denials": (denial(),), **changes,
    }  # fmt: skip
    known = {name: value for name, value in whole.items() if name in TrialArm.model_fields}
    found: TrialArm = nasty(TrialArm.model_construct(**known))
    return found.model_copy(update={"result": result})


def shown_trial() -> str:
    answers = [trial_answer(Arm.DAC, "ran"), trial_answer(Arm.SELINUX_ENFORCING, "refused")]
    question = Question("nginx", ("cat",), (), False, None, "read")
    return render(trials.trial_table(question, discovery.load_lab("debian-13"), answers))


PLACES: dict[str, Callable[[Verdict], str]] = {
    "run": lambda verdict: render(text.outcome_summary(nasty_outcome(verdict))),
    "show": lambda verdict: render(text.outcome_detail(nasty_outcome(verdict))),
    "the list of outcomes": lambda verdict: render(text.outcomes_table([(1, nasty_outcome(verdict))])),
    "falsify": lambda verdict: render(text.falsification_summary(nasty_outcome(verdict))),
    "a failed test": lambda verdict: text.failure_text(nasty_outcome(verdict)),
    "try": lambda _: shown_trial(),
    "a plain table": lambda _: tables.plain(["a"], [[NASTY]]),
    "a table of a page": lambda _: tables.markdown(["a"], [[NASTY]]),
}


@pytest.mark.parametrize("verdict", list(Verdict))
@pytest.mark.parametrize("place", list(PLACES))
def test_a_guests_words_do_not_act(place: str, verdict: Verdict) -> None:
    shown = PLACES[place](verdict)
    assert HARMLESS in shown, "shown, and as they are"
    assert ACTS.findall(shown) == []


@given(st.text(st.characters(categories=["Cc", "Cf", "Cs", "Zl", "Zp", "L", "Zs"])))
def test_cleaned_is_clean_and_stays_so(words: str) -> None:
    assert ACTS.findall(clean(words)) == []
    assert clean(clean(words)) == clean(words)
    assert clean(words).encode() or not words


# Errors: what a guest answered is in many of them

ERRORS: dict[str, Callable[[], object]] = {
    "a message": lambda: (_ for _ in ()).throw(SetupError(NASTY, hint=NASTY)),
    "a key that nobody knows": lambda: facts.read(facts.ModeFacts, {NASTY: 1, "lsm": [], "selinux_enforcing": None}),
    "a long key": lambda: facts.read(facts.ModeFacts, {NASTY + "x" * 100_000: 1}),
    "a command's output": lambda: CommandResult(("x",), 1, None, NASTY.encode(), b"", 0.1).check(),
    "a command's errors": lambda: CommandResult(("x",), 1, None, b"", NASTY.encode(), 0.1).check(),
}


@pytest.mark.parametrize("what", list(ERRORS))
def test_an_error_does_not_act(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(LsmlabError) as caught:
        ERRORS[what]()
    assert ACTS.findall(str(caught.value)) == []
    assert len(str(caught.value)) < 3000
    assert cli._explained(caught.value) == ERROR
    said = capsys.readouterr().err
    assert r"\x1b[2J" in said or "Field required" in said
    assert ACTS.findall(said) == []


def test_what_nobody_foresaw_does_not_act(capsys: pytest.CaptureFixture[str]) -> None:
    error = ValueError(NASTY)
    error.__cause__ = ChannelError(NASTY)
    assert cli._explained(error) == ERROR
    said = capsys.readouterr().err
    assert "report it with the lines above" in said
    assert HARMLESS in said
    assert ACTS.findall(said) == []


def test_a_missing_file_does_not_act(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli._explained(FileNotFoundError(2, NASTY, NASTY)) == ERROR
    said = capsys.readouterr().err
    assert HARMLESS in said
    assert ACTS.findall(said) == []


# JSON


def test_json_on_a_terminal_does_not_act_and_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    content = Report(outcomes=(nasty_outcome(Verdict.CONTAINED),)).to_json()
    write_json(content, Path("-"))
    said = capsys.readouterr().out
    assert ACTS.findall(said) == []
    assert json.loads(said) == json.loads(content)
    assert NASTY in json.loads(said)["outcomes"][0]["title"]


@given(st.recursive(st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8))
def test_cleaned_json_is_the_same(value: Any) -> None:
    for content in (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=1)):
        assert json.loads(clean_json(content)) == value
        assert ACTS.findall(clean_json(content)) == []


# Progress


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["a pipe", "a terminal"])
def test_progress_does_not_act(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    progress = LiveProgress(stream)
    with progress:
        progress.step(NASTY, NASTY)
        progress.note(NASTY)
        if progress._live is not None:
            progress._live.refresh()
    said = stream.getvalue()
    assert r"\x1b]0;owned" in said
    for one in ("\x1b]0;", "\x1b[2J\x1b", "\x07", "\x9b", "\u202e", "\x00", "\x7f", "\u2028"):
        assert one not in said


def test_progress_of_pytest_does_not_act() -> None:
    written: list[str] = []
    lines = Lines(cast("pytest.TerminalReporter", SimpleNamespace(write_line=written.append)))
    lines.step(NASTY, NASTY)
    lines.note(NASTY)
    assert written == [f"{HARMLESS}: {HARMLESS}", HARMLESS]
