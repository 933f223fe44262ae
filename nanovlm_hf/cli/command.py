"""The Typer application and its entry point, which reports every error in one line."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import Annotated

import typer
from typer.exceptions import Abort, Exit, TyperException

from ..errors import Interrupt, UsageError, report, terminate
from ..extras import missing_extra
from . import data, evaluate
from .complete import complete
from .demo import demo
from .export import export
from .info import info
from .push import push
from .serve import serve

INTERRUPTED = 130

app = typer.Typer(add_completion=False, no_args_is_help=True)
app.command()(complete)
app.command()(info)
app.command()(push)
app.command()(export)
app.command()(demo)
app.command()(serve)
app.add_typer(data.app, name="data")
app.add_typer(evaluate.app, name="evaluate")


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Complete sentences about images with tiny vision-language models; build datasets, evaluate and publish."""
    if debug:
        os.environ["NANOVLM_DEBUG"] = "1"


def main() -> None:
    """Run the command and exit: 0 for success, 1 for a failure, 2 for wrong usage, 130 and 143 when stopped.

    An error is reported in one line, without a traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        # A file name that the terminal cannot display is printed escaped instead of ending a batch.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, terminate)
    try:
        code = app(standalone_mode=False) or 0
        if code == INTERRUPTED:  # Typer's exit code for Ctrl-C
            code = report("nanovlm", KeyboardInterrupt())
    except TyperException as error:
        code = report("nanovlm", UsageError(error.format_message()))
    except Exit as stop:
        code = stop.exit_code
    except Abort:
        code = report("nanovlm", KeyboardInterrupt())
    except BrokenPipeError:
        code = 0  # `nanovlm complete folder | head` has read enough
    except SystemExit as stop:
        if not isinstance(stop.__context__, BrokenPipeError):  # Typer turns a broken pipe into a failure
            raise
        code = 0
    except ModuleNotFoundError as error:
        code = report("nanovlm", missing_extra(error) or error)
    except (Exception, *Interrupt) as error:
        code = report("nanovlm", error)
    sys.exit(code)
