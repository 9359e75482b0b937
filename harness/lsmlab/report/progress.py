"""Where long work is, on standard error: a live display on a terminal, one plain line a step elsewhere."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from lsmlab.report.tables import duration
from lsmlab.terminal import clean

REFRESHES = 8
"""A second."""


@dataclass(frozen=True, slots=True)
class _Step:
    text: str
    since: float


class LiveProgress:
    """`progress.Progress` for people; called from several threads.

    Results that are printed while it runs belong inside `paused()`, or both write over each other on a terminal.
    What cannot be written (standard error is a closed pipe) is dropped: the experiment goes on.
    """

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream or sys.stderr
        self._clock = clock
        self._start = clock()
        self._lock = threading.Lock()
        self._steps: dict[str, _Step] = {}
        self._console = Console(file=self._stream, highlight=False, markup=False, emoji=False)
        # Not rich's own guess: FORCE_COLOR, which CI sets for colours, would make it draw into a log file.
        self._live = self._new_live() if self._stream.isatty() and not self._console.is_dumb_terminal else None
        self._spinner = Spinner("line" if self._console.options.ascii_only else "dots")

    def __enter__(self) -> Self:
        self._start = self._clock()
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The live display is off the screen meanwhile; steps and notes go on being taken."""
        running = self._live is not None and self._live.is_started
        if self._live is not None and running:
            self._live.stop()
        try:
            yield
        finally:
            if running:
                self._live = self._new_live()  # a stopped one would first move over what was printed meanwhile
                self._live.start()

    def step(self, task: str, text: str) -> None:
        """See `Progress.step`."""
        with self._lock:
            self._steps[task] = _Step(text, self._clock())
            if self._live is None:
                self._line(f"{task}: {text}")

    def done(self, task: str) -> None:
        """See `Progress.done`."""
        with self._lock:
            self._steps.pop(task, None)

    def note(self, text: str) -> None:
        """See `Progress.note`."""
        if self._live is None:
            with self._lock:
                self._line(text)
        else:  # without our lock: rich takes its own and then, to draw, ours
            self._console.print(Text(clean(text)))

    def _line(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a closed pipe; a closed file
            self._stream.write(f"[{self._clock() - self._start:6.1f}s] {clean(text)}\n")
            self._stream.flush()

    def _new_live(self) -> Live:
        return Live(
            console=self._console,
            get_renderable=self._picture,
            refresh_per_second=REFRESHES,
            transient=True,
            redirect_stdout=False,  # results are another stream's, even where both are one terminal
            redirect_stderr=False,
        )

    def _picture(self) -> Table:
        now = self._clock()
        with self._lock:
            steps = list(self._steps.items())
        cut = self._console.options.ascii_only
        grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
        grid.add_column(no_wrap=True)
        grid.add_column(no_wrap=True, overflow="crop" if cut else "ellipsis")
        grid.add_column(no_wrap=True, overflow="crop" if cut else "ellipsis", ratio=1)
        grid.add_column(no_wrap=True, justify="right")
        for task, step in steps:
            grid.add_row(
                self._spinner, Text(clean(task), style="bold"), Text(clean(step.text)), _since(step.since, now)
            )
        grid.add_row("", Text("total", style="dim"), "", _since(self._start, now))
        return grid


def _since(start: float, now: float) -> Text:
    return Text(duration(now - start), style="dim")
