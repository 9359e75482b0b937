"""Known-bad pieces of the harness. With any of them in, the sabotage suite has to turn red.

A pytest plugin: `-p teeth --tooth NAME` puts one in. scripts/teeth.py does so for each, with the cases that are to
catch it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest

from lsmlab import attempt, evidence, verdict
from lsmlab.attempt import Closed
from lsmlab.facts import AuditState, SourceReading
from lsmlab.terms import Result, SourceState, Verdict
from lsmlab.verdict import Attribution, Conclusion, Judgement

PutIn = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Tooth:
    """One bad piece: what it does, the cases that catch it, and how it is put in."""

    what: str
    cases: tuple[str, ...]
    put_in: PutIn


def always(module: ModuleType, name: str, answer: object) -> PutIn:
    """A function that gives the same answer, whatever it is asked."""
    return lambda patch: patch.setattr(module, name, lambda *_, **__: answer)


def _verdict(said: Verdict) -> PutIn:
    return always(verdict, "conclude", Conclusion(verdict=said, reason="as always"))


def _unavailable_is_empty(patch: pytest.MonkeyPatch) -> None:
    read = attempt.read_window

    def bad(closed: Closed, opened: AuditState, sentinel: str) -> tuple[SourceReading, str]:
        source, log = read(closed, opened, sentinel)
        if source.state is SourceState.UNAVAILABLE:
            source = source.model_copy(update={"state": SourceState.EMPTY})
        return source, log

    patch.setattr(attempt, "read_window", bad)


def _failed_is_blocked(patch: pytest.MonkeyPatch) -> None:
    judge = verdict.judge

    def bad(*arguments: Any) -> Judgement:
        found = judge(*arguments)
        return found if found.result is Result.ALLOWED else found.model_copy(update={"result": Result.BLOCKED})

    patch.setattr(verdict, "judge", bad)


def _canary_not_looked_for(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(verdict, "_proof_of_allowed", lambda _, seen: "it answered" if seen.http_status == 200 else "")


def _logged_is_denied(patch: pytest.MonkeyPatch) -> None:
    denials = evidence.denials

    def bad(records: Any) -> Any:
        return tuple(d.model_copy(update={"effective": True, "logged_only": False}) for d in denials(records))

    patch.setattr(evidence, "denials", bad)


def _contradictions_not_seen(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(verdict, "settle", lambda judgement, _: judgement)


TEETH = {
    "always-contained": Tooth(
        "the verdict is always CONTAINED", ("service-stopped", "permissive-domain"), _verdict(Verdict.CONTAINED)
    ),
    "always-error": Tooth("the verdict is always ERROR", ("permissive",), _verdict(Verdict.ERROR)),
    "matcher-always": Tooth(
        "every denial in the window accounts for the block",
        ("denial-of-a-stranger", "denial-of-a-namesake"), always(verdict, "_misfit", ""),
    ),
    "matcher-never": Tooth(
        "no denial accounts for a block", ("clock-set-back",),
        always(verdict, "attribute", Attribution(denial=None, misses=())),
    ),
    "unavailable-is-empty": Tooth(
        "a log that could not be read counts as one with nothing in it", ("log-rotated", "audit-off"),
        _unavailable_is_empty,
    ),
    "mode-not-read-back": Tooth(
        "the mode is not read back", ("permissive", "framework-in-control"), always(verdict, "mode_problem", "")
    ),
    "mode-changes-not-seen": Tooth(
        "records of changed modes and policies are passed over", ("policy-reloaded",),
        always(evidence, "mode_changes", ()),
    ),
    "subject-not-proved": Tooth(
        "who acted is not looked at", ("wrong-domain", "profile-too-late"), always(verdict, "_subject_problem", "")
    ),
    "unready-not-seen": Tooth(
        "service and object are not looked at before the attempt", ("service-stopped", "effect-there-before"),
        always(verdict, "_unready", ""),
    ),
    "failed-is-blocked": Tooth(
        "what does not succeed counts as blocked", ("service-crashes-in-window", "tool-missing"), _failed_is_blocked
    ),
    "canary-not-looked-for": Tooth(
        "HTTP 200 counts as success, whatever was read", ("object-emptied", "canary-wrong"), _canary_not_looked_for
    ),
    "logged-is-denied": Tooth(
        "a denial that was only logged counts", ("permissive-domain-and-application", "denied-then-granted"),
        _logged_is_denied,
    ),
    "contradictions-not-seen": Tooth(
        "a success beside the kernel's own refusal counts", ("canary-on-another-page",), _contradictions_not_seen
    ),
}  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--tooth`."""
    parser.addoption("--tooth", choices=sorted(TEETH), help="the bad piece to put in")


@pytest.fixture(scope="session", autouse=True)
def bad_piece(request: pytest.FixtureRequest) -> Any:
    """Put the bad piece in, for the whole session."""
    name = request.config.getoption("--tooth")
    with pytest.MonkeyPatch.context() as patch:
        if name:
            TEETH[name].put_in(patch)
        yield
