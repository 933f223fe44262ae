"""Trains a NanoVLM: `accelerate launch training/train.py --config training/configs/mini_short.yaml`."""

import sys

from arguments import read_arguments
from loop import StoppedError, train

from nanovlm_hf import InputError


def main() -> int:
    try:
        arguments = read_arguments(sys.argv[1:])
    except InputError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    try:
        run = train(arguments)
    except InputError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    except StoppedError as stop:
        print("train.py: stopped, the state is saved: --resume auto goes on", file=sys.stderr)
        return 128 + stop.args[0]
    print(f"done: {run.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
