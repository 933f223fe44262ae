"""Train a NanoVLM: `accelerate launch training/train.py --config mini_short --dataset data`."""

import sys

from nanovlm_hf.training.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
