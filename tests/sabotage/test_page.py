"""docs/verdicts.md says what the cases say."""

from __future__ import annotations

from page import PAGE, names, renewed

from lsmlab.terms import Verdict


def test_the_page_has_the_cases_and_every_verdict() -> None:
    text = PAGE.read_text("utf-8")
    assert text == renewed(text), "python tests/sabotage/page.py writes it anew"
    assert names(text) == {verdict.value for verdict in Verdict}
