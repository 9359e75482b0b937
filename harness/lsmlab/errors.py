"""Errors that a person can act on: what, on which object, expected, found, what to do next.

A block is a result, never an exception; an exception means that nothing can be said.
"""

from __future__ import annotations

from lsmlab.terminal import clean


class LsmlabError(Exception):
    """Base of every error that lsmlab raises on purpose.

    `message` says what went wrong and on which object; `hint` says what to do next.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        """Message and hint, fit for a terminal: much of a message may be a guest's words."""
        return clean(f"{self.message}\n  {self.hint}" if self.hint else self.message)


class DefinitionError(LsmlabError):
    """A lab or scenario file is wrong, or a name stands for none: the user's to mend (exit code 4)."""


class HostError(LsmlabError):
    """This machine lacks something: a program, a permission, space."""


class ImageError(LsmlabError):
    """A lab's disk could not be built, or the cached one is damaged."""


class DamagedError(ImageError):
    """What came from elsewhere is not whole, or not what it says it is: it has to be fetched again."""


class DownloadError(LsmlabError):
    """A file could not be fetched from elsewhere."""


class PolicyError(LsmlabError):
    """A policy module or profile does not compile or load; carries the compiler's own words."""


class MachineError(LsmlabError):
    """A guest did not start, died, or a snapshot failed."""


class ChannelError(LsmlabError):
    """A guest did not answer, or answered nonsense."""


class CommandTimeoutError(ChannelError):
    """A command in the guest did not end in time."""


class FrameworkError(LsmlabError):
    """A mode could not be entered, or what was read back is not what was asked for."""


class SetupError(LsmlabError):
    """A scenario's set-up failed in the guest."""


class EngineError(LsmlabError):
    """A container engine is not there, too old, or does not do what it was asked; or a container ended at once."""


class StoreError(LsmlabError):
    """The outcome store cannot be read or written."""
