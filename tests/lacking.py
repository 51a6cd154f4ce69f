"""What the oldest torch that is asked for lacks: tests of it are skipped, and say so."""

import pytest
import torch

SHARDS_ON_CPU = hasattr(torch.cpu.Stream, "record_event")  # not in torch 2.6
UNSHARDED = f"fully_shard of torch {torch.__version__} does not run on a CPU"
TELLS_WHOSE_HOOKS = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")  # not in torch 2.6

shards_on_cpu = pytest.mark.skipif(not SHARDS_ON_CPU, reason=UNSHARDED)
