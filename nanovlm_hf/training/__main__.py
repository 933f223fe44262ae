"""Train a NanoVLM: `accelerate launch -m nanovlm_hf.training --config mini_short --dataset data`."""

import sys

from ..errors import InputError, UsageError, report
from .arguments import PROGRAM, read_arguments
from .loop import train
from .signals import StoppedError


def main() -> int:
    try:
        arguments = read_arguments(sys.argv[1:])
    except InputError as error:
        return report(PROGRAM, UsageError(str(error)))
    try:
        run = train(arguments)
    except StoppedError as stop:
        print(f"{PROGRAM}: stopped, the state is saved: --resume auto continues", file=sys.stderr)
        return 128 + stop.args[0]
    except (Exception, KeyboardInterrupt) as error:
        return report(PROGRAM, error)
    print(f"done: {run.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
