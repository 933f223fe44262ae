"""Run train.py with FSDP on CPUs, for which Accelerate runs DDP: PyTorch shards the weights and uses gloo."""

import sys

from accelerate import PartialState
from accelerate.utils import DistributedType

from nanovlm_hf.training import __main__, accelerator

accelerator.check_fsdp_device = lambda: None
PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU

sys.exit(__main__.main())
