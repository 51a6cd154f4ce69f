"""One process of two, for test_optim_replicas.py: every optimizer refuses a model replicated over both."""

from __future__ import annotations

import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import nngeom as nng
from nngeom.optim import EKFAC, KFAC, LevenbergMarquardt, NaturalGradient, WinsorizedSGD
from nngeom.optim.robust import median_of_means_gradient, winsorized_gradient

OPTIMIZERS = {
    "KFAC": KFAC,
    "EKFAC": EKFAC,
    "WinsorizedSGD": WinsorizedSGD,
    "NaturalGradient": lambda m: NaturalGradient(m, nng.PMatDiag),
    "LevenbergMarquardt": lambda m: KFAC(m, damping=LevenbergMarquardt()),
}


def refused(call) -> bool:
    """Whether a call says that replicas would drift apart."""
    try:
        call()
    except nng.UnsupportedError as error:
        return "2 processes" in str(error)
    return False


def answers(rank: int) -> dict[str, bool]:
    """What every optimizer said, by name."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x, y = torch.randn(4, 3) + rank, torch.tensor([0, 1, 0, 1])
    early = {name: make(inner) for name, make in OPTIMIZERS.items()}  # made before the model was replicated
    ddp = DistributedDataParallel(inner)
    holder = nn.ModuleDict({"inside": ddp})
    said = {name: refused(lambda make=make: make(ddp)) for name, make in OPTIMIZERS.items()}
    said |= {f"{name} of a part": refused(lambda make=make: make(holder)) for name, make in OPTIMIZERS.items()}
    said["winsorized"] = refused(lambda: winsorized_gradient(ddp, (x, y), "cross_entropy", 10.0))
    said["median"] = refused(lambda: median_of_means_gradient(ddp, (x, y), "cross_entropy", 2))
    for name, opt in early.items():

        def passes(opt=opt):
            with opt.observe():
                F.cross_entropy(ddp(x), y).backward()

        said[f"{name} made before"] = refused(passes)
    said["the module itself, called as such"] = not refused(lambda: step(KFAC(inner), inner, x, y))
    said["nothing is left on the model"] = not inner._forward_pre_hooks
    return said


def step(opt, model, x, y) -> None:
    """One step."""
    with opt.observe():
        F.cross_entropy(model(x), y).backward()
    opt.step()


if __name__ == "__main__":
    rank, store = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    said = answers(rank)
    dist.barrier()
    dist.destroy_process_group()
    wrong = [name for name, right in said.items() if not right]
    print("wrong:", wrong)
    sys.exit(1 if wrong else 0)
