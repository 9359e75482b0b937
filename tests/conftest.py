"""For all tests: how long an example takes on a busy machine proves nothing."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("lsmlab", deadline=None)
settings.load_profile("lsmlab")
