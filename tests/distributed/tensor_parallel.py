"""Tensor-parallel models: the numbers of the whole model, in every process, or why there are none."""

from __future__ import annotations

import copy
from collections.abc import Callable

import cuts
import torch
from cases import representation
from launch import Check, Here, check, raises
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

import nngeom as nng

CHECKS: dict[str, Check] = {}


class Block(nn.Module):
    """An embedding, a norm, and a residual pair of layers that are cut along their hidden features."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(7, 4), nn.LayerNorm(4)
        self.up, self.down, self.head = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.table(x)
        h = h + self.down(torch.tanh(self.up(self.norm(h))))
        return self.head(h.mean(1))


class Slopes(nn.Module):
    """A parameter that is applied to parts of the activations when the layers around it are cut."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.slope, self.down = nn.Linear(3, 4), nn.PReLU(), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.slope(self.up(x)))


PLAN = {
    "table": RowwiseParallel(input_layouts=Replicate()),
    "up": ColwiseParallel(),
    "down": RowwiseParallel(),
    "head": ColwiseParallel(output_layouts=Replicate()),
}


def cut(kind: type[nn.Module] = Block, plan: dict = PLAN, mesh: object = None, size: int = 2) -> tuple:
    """A model in float64 that is whole, and one that is cut."""
    torch.manual_seed(4)
    model = kind().double()
    other = parallelize_module(copy.deepcopy(model), mesh or init_device_mesh("cpu", (size,)), plan)
    return model, other


TOKENS = torch.randint(0, 7, (9, 4), generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(9) % 3
LOADER = [(TOKENS[:4], LABELS[:4]), (TOKENS[4:], LABELS[4:])]
PARALLEL: dict[str, Callable] = {
    **{
        f"FIM {kind}": lambda m, kind=kind: nng.FIM(m, LOADER, representation(kind, m)).to_dense()
        for kind in ("dense", "diag", "kfac", "kfac-reduce", "ekfac", "low-rank", "quasi-diag", "mixed", "implicit")
    },
    "empirical": lambda m: nng.EmpiricalFIM(m, LOADER, nng.PMatDense, loss="cross_entropy").to_dense(),
    "Monte Carlo": lambda m: nng.FIM_MonteCarlo(m, LOADER, nng.PMatDense, generator=seeded()).to_dense(),
    "kernel": lambda m: nng.GramMatrix(m, LOADER).to_dense(),
    "implicit kernel": lambda m: nng.GramMatrix(m, LOADER, nng.FMatImplicit).to_dense(),
    "Jacobian": lambda m: nng.Jacobian(m, LOADER).rows(),
    "implicit Jacobian": lambda m: nng.Jacobian(m, LOADER, nng.PushForwardImplicit).materialize().rows(),
    "solve": lambda m: (
        nng.FIM(m, LOADER, nng.PMatImplicit).solve(nng.PVector.from_model(m), damping=0.1, tol=1e-12).tensor
    ),
}


def seeded() -> torch.Generator:
    """The same draws in every process."""
    return torch.Generator().manual_seed(11)


def parallel(measure: str) -> None:
    def f(here: Here) -> None:
        model, other = cut(size=here.size)
        one, many = PARALLEL[measure](model), PARALLEL[measure](other)
        cuts.close(many, one, 1e-10 if measure in ("FIM ekfac", "solve") else 1e-12)
        here.same(many)
        assert all(p.grad is None for p in other.parameters())

    CHECKS[f"tensor-parallel {measure}"] = f


for measure in PARALLEL:
    parallel(measure)


@check(CHECKS)
def layers_cut_one_by_one(here: Here) -> None:
    for plan in (
        {"up": ColwiseParallel(), "down": RowwiseParallel()},
        {"table": PLAN["table"]},
        {"head": PLAN["head"]},
    ):
        model, other = cut(plan=plan, size=here.size)
        cuts.close(PARALLEL["FIM dense"](other), PARALLEL["FIM dense"](model))


class Sequences(Block):
    """The same with an output at every token, of which the mean is taken."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.table(x)
        return self.head(h + self.down(torch.tanh(self.up(self.norm(h))))).mean(1)


@check(CHECKS)
def activations_cut_along_the_sequence(here: Here) -> None:
    plan = {
        "table": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    model, other = cut(Sequences, plan, size=here.size)
    for measure in ("FIM dense", "FIM kfac", "kernel"):
        cuts.close(PARALLEL[measure](other), PARALLEL[measure](model))


@check(CHECKS)
def what_runs_in_step_must_be_the_same(here: Here) -> None:
    _, other = cut(size=here.size)
    own = torch.Generator().manual_seed(here.rank)
    raises(nng.RankMismatchError, "different batches", lambda: nng.FIM(other, TOKENS.roll(here.rank, 0), nng.PMatDiag))
    raises(nng.CoverageError, "seeds", lambda: nng.FIM_MonteCarlo(other, TOKENS, nng.PMatDiag, generator=own))
    _, slopes = cut(Slopes, {"up": ColwiseParallel(), "down": RowwiseParallel()}, size=here.size)
    x = torch.randn(5, 3, dtype=torch.float64, generator=seeded())
    raises(nng.CoverageError, "gradient of 'slope.weight'", lambda: nng.FIM(slopes, x, nng.PMatDiag))
    rest = nng.LayerCollection.from_model(slopes, exclude="slope")
    assert nng.FIM(slopes, x, nng.PMatDiag, layer_collection=rest).trace() > 0


@check(CHECKS)
def second_derivatives_of_parts_are_refused(here: Here) -> None:
    _, other = cut(size=here.size)
    hessian = lambda kind: nng.Hessian(other, LOADER, kind, loss="cross_entropy")
    raises(nng.UnsupportedError, "tensor parallelism", lambda: hessian(nng.PMatDense))
    raises(nng.UnsupportedError, "tensor parallelism", lambda: hessian(nng.PMatImplicit))
    raises(nng.UnsupportedError, "spread over processes", lambda: nng.GramMatrix(other, LOADER, differentiable=True))
    raises(nng.UnsupportedError, "spread over processes", lambda: nng.optim.KFAC(other))
