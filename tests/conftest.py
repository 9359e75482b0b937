"""For all tests: the same examples each time, so that a change is never red for what it has not changed.

`--hypothesis-profile=explore` tries others. How long an example takes on a busy machine proves nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

from lsmlab import discovery
from lsmlab.bench import Bench, open_bench
from lsmlab.progress import Silent

settings.register_profile("lsmlab", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile("lsmlab")


def pytest_addoption(parser: pytest.Parser) -> None:
    """For CI, as `--require=vm` is; an option of its own, since not every system that boots guests packages Vagrant."""
    parser.addoption(
        "--require-vagrant", action="store_true",
        help="where Vagrant is not installed, tests that need it fail; they are skipped otherwise",
    )  # fmt: skip


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    """The default lab, ready for real guests."""
    with open_bench(discovery.load_lab("debian-13"), Silent()) as opened:
        yield opened
