"""Signals that end a run after its state is saved."""

from __future__ import annotations

import os
import signal
import stat
import sys
from types import FrameType


class StoppedError(Exception):
    """The run was told to end, and its state is saved. The argument is the signal's number."""


class StopSignals:
    """Note SIGTERM, SIGHUP and Ctrl-C within the block instead of ending the process.

    Attributes:
        received: number of the last of these signals, or 0.
    """

    def __init__(self) -> None:
        self.received = 0

    def __enter__(self) -> StopSignals:
        self._previous = {number: signal.signal(number, self._note) for number in _numbers()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if signal.SIGINT in self._previous:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C does not wait
        if number == getattr(signal, "SIGHUP", None):
            _detach_from_terminal()


def _numbers() -> list[int]:
    """Return the signals that end a run, except those that its parent ignores: nohup SIGHUP, and `script &` Ctrl-C."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
    return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]


def _detach_from_terminal() -> None:
    """Discard output to a terminal from now on: writing to one that was closed fails."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            if stat.S_ISCHR(os.fstat(stream.fileno()).st_mode):
                os.dup2(nowhere, stream.fileno())
        except (OSError, ValueError, AttributeError):
            pass  # closed, or replaced by an object without a file
    os.close(nowhere)
