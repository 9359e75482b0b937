"""The command line: parse, call, print, exit. Results go to standard output, everything else to standard error."""

# ruff: noqa: E402 - see gc below
from __future__ import annotations

import gc

gc.disable()  # what is loaded now stays until the end: looking through it, and at the end once more, takes 0.06 s

import io
import os
import signal
import sys
import traceback
from typing import Any, NoReturn

import typer

from lsmlab.cli import experiment, guests, library, machine  # noqa: F401 - each brings its commands, in this order
from lsmlab.cli.base import AS_EXPECTED, ERROR, INTERRUPTED, USAGE, app, say
from lsmlab.errors import DefinitionError, LsmlabError
from lsmlab.machine import qemu
from lsmlab.terminal import clean

gc.freeze()
gc.enable()

_ClickException: Any = typer.BadParameter.__mro__[2]
"""click's ClickException, from wherever this typer takes its click."""


class Interrupted(BaseException):  # no KeyboardInterrupt, which typer makes an exit code of
    """The program was asked to stop."""


def _interrupt(number: int, _frame: object) -> NoReturn:
    signal.signal(number, lambda *_: os._exit(INTERRUPTED))  # asked twice: at once; the kernel ends what we started
    raise Interrupted


def main() -> NoReturn:
    """The program. Ends the process with an exit code of `EPILOG`."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # Windows, where the help and the like work, has no SIGHUP
            signal.signal(getattr(signal, name), _interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an ASCII console shows a guest's text all the same
    try:
        code = app(standalone_mode=False) or AS_EXPECTED
        sys.stdout.flush()  # a reader that went away is noticed here, and not when the interpreter ends
    except (Exception, Interrupted, KeyboardInterrupt) as error:  # noqa: BLE001 - explained, or raised again
        code = _explained(error)
    finally:
        qemu.stop_all()
    sys.exit(code)


def _explained(error: BaseException) -> int:
    """Say what happened, in one message, and give the exit code; what nobody foresaw keeps its traceback."""
    if isinstance(error, (Interrupted, KeyboardInterrupt, typer.Abort)):
        say("interrupted; outcomes recorded so far are kept")
        return INTERRUPTED
    if isinstance(error, typer.Exit):
        return error.exit_code
    if isinstance(error, _ClickException):
        error.show()
        return USAGE
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader went away: nothing to flush to
        return ERROR
    if isinstance(error, LsmlabError):
        say(str(error))
        return USAGE if isinstance(error, DefinitionError) else ERROR
    if isinstance(error, OSError):
        say(f"{error.filename or 'this machine'}: {error.strerror or error}")
        return ERROR
    print(clean("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    say("this is a defect of lsmlab; please report it with the lines above")
    return ERROR
