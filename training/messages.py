"""What the tools of this folder say when something is wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from nanovlm_hf import InputError


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Ends the program with one line and exit code 1, where its input will not do."""
    try:
        yield
    except (InputError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        sys.exit(1)
