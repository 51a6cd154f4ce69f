"""The Fisher matrix of a net on data that is split over processes.

    torchrun --nproc-per-node 2 examples/torchrun_fisher.py            (or, in one process: python ...)

Every process passes its own examples and has the whole matrix; rank 0 says what it is and writes
``out/torchrun_fisher.safetensors``.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import nngeom as nng


def main() -> float:
    """The trace of the matrix."""
    group = None
    if "RANK" in os.environ:  # torchrun's
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        group = dist.group.WORLD
    device = f"cuda:{os.environ['LOCAL_RANK']}" if group is not None and torch.cuda.is_available() else "cpu"

    torch.manual_seed(0)  # the same model and data everywhere
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 3)).to(device)
    dataset = TensorDataset(torch.randn(401, 8))

    mine = nng.shard(dataset, group)  # this process's examples: no padding, no repeats
    fisher = nng.FIM(model, DataLoader(mine, batch_size=64), nng.PMatEKFAC, process_group=group)
    trace = float(fisher.trace())  # whole on every process: no communication in reading it
    if group is None or dist.get_rank() == 0:
        print(f"{fisher.examples} examples, trace {trace:.6f}")
    Path("out").mkdir(exist_ok=True)
    nng.save(fisher, "out/torchrun_fisher.safetensors", process_group=group)  # one writes, all wait
    if group is not None:
        dist.destroy_process_group()
    return trace


if __name__ == "__main__":
    main()
