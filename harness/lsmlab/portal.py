"""One event loop in a thread of its own, for the asynchronous QMP library under a synchronous program.

QEMU is forked from this thread as well: it lives as long as the process, so the kernel's parent-death signal
(prctl(2), PR_SET_PDEATHSIG: sent when the *thread* that forked ends) fires when lsmlab dies and not before.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def _running_loop() -> asyncio.AbstractEventLoop:
    global _loop  # noqa: PLW0603 - one loop a process is the point
    with _lock:
        if _loop is None:
            loop = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="lsmlab-portal", daemon=True).start()
            _loop = loop
        return _loop


def call(coroutine: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
    """Run `coroutine` on the loop and return its result; raises TimeoutError after `timeout` seconds."""
    future = asyncio.run_coroutine_threadsafe(coroutine, _running_loop())
    try:
        return future.result(timeout)
    except concurrent.futures.TimeoutError:
        future.cancel()
        raise TimeoutError from None
    except BaseException:
        future.cancel()
        raise


def in_loop_thread(function: Callable[[], T]) -> T:
    """Run a short synchronous `function` in the loop's thread and return its result."""

    async def run() -> T:
        return function()

    return call(run())
