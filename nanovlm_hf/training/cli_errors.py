"""Error reports of the command-line programs in this package."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import report


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """If the block fails, exit with one line on stderr and the exit code that the `nanovlm` command uses."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(report(program, error))
