"""For all tests: the same examples each time, so that a change is never red for what it has not changed.

`--hypothesis-profile=explore` tries others. How long an example takes on a busy machine proves nothing.
"""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("lsmlab", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile("lsmlab")
