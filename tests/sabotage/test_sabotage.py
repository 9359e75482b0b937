"""Whatever is broken, the verdict is the right one, for the right reason; and what is not broken is contained."""

from __future__ import annotations

import contextlib
import re
import zlib
from collections.abc import Iterator
from typing import cast

import pytest
from cases import CASES

from lsmlab import discovery
from lsmlab.bench import guest_pool, open_bench
from lsmlab.progress import Silent
from lsmlab.terms import Framework, Verdict
from sabotage import Role, Sabotage, Suite

pytestmark = [pytest.mark.lsmlab_vm, pytest.mark.sabotage]


def _is_slow(case: Sabotage, framework: Framework) -> bool:
    """`make test` breaks half of the things, each under one framework, on one lab, and all that only one framework has;
    `make test-all` breaks each under both, on both labs. Which, a case's name says, whatever others there are."""
    if case.lab != discovery.DEFAULT_LAB:
        return True
    number = zlib.crc32(case.id.encode()) >> 5  # the first bit by which the half has each role and each verdict
    return len(case.frameworks) > 1 and (number % 2 == 0 or framework is case.frameworks[number // 2 % 2])


PAIRS = [
    pytest.param(
        case, framework, id=f"{case.id}-{framework}",
        marks=pytest.mark.slow if _is_slow(case, framework) else (),
    )
    for case in CASES
    for framework in case.frameworks
]  # fmt: skip


@pytest.fixture(scope="module")
def suite(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Suite]:
    """The experiments of all the cases that were selected; they run side by side."""
    chosen: list[tuple[Sabotage, Framework]] = [
        (cast(Sabotage, item.callspec.params["case"]), cast(Framework, item.callspec.params["framework"]))
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.module is request.module and hasattr(item, "callspec")
    ]
    with contextlib.ExitStack() as held:
        labs = sorted({case.lab for case, _ in chosen})
        benches = {lab: held.enter_context(open_bench(discovery.load_lab(lab), Silent())) for lab in labs}
        pools = {lab: held.enter_context(guest_pool(benches[lab], f"sabotage-{lab}")) for lab in labs}
        found = Suite(benches, pools, tmp_path_factory.mktemp("sabotage"), CASES)
        for case, framework in chosen:
            found.begin(case, framework)
        yield found


@pytest.mark.parametrize(("case", "framework"), PAIRS)
def test_a_sabotaged_experiment_says_what_is_right(suite: Suite, case: Sabotage, framework: Framework) -> None:
    twin = suite.twin(case, framework)
    unsabotaged = suite.outcome(case, framework, twin)
    assert unsabotaged.verdict is Verdict.CONTAINED, f"the unsabotaged twin: {unsabotaged.reason}"
    arm = case.role.arm(framework)
    assert not case.took_effect(twin[arm]), f"the proof sees a sabotage where there is none: {twin[arm].said}"
    trace = suite.sabotaged(case, framework)
    found = suite.outcome(case, framework, {**twin, arm: trace})
    words = f"{found.verdict}: {found.reason}"
    assert case.took_effect(trace), f"no sabotage: {trace.said}; {words}"
    assert found.verdict is case.verdict, f"wrong verdict: {words}"
    assert re.search(case.reason, found.reason), f"wrong reason: {words}"


def test_there_are_cases_enough() -> None:
    assert len(CASES) >= 80
    assert len({case.id for case in CASES}) == len(CASES)
    assert {case.role for case in CASES} == set(Role)
    assert {case.verdict for case in CASES} == set(Verdict)
    daily = [cast(Sabotage, pair.values[0]) for pair in PAIRS if not pair.marks]
    assert len(daily) >= 40
    assert {case.role for case in daily} == set(Role)
    assert {case.verdict for case in daily} == set(Verdict)
