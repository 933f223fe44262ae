"""train.py with FSDP on CPUs, which Accelerate itself runs as DDP: the sharding is PyTorch's own, through gloo."""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "training"))

import loop
import train
from accelerate import PartialState
from accelerate.utils import DistributedType

loop.refuse_fsdp_on_cpus = lambda: None
PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU

sys.exit(train.main())
