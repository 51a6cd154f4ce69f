"""Iterations with an implicit kernel run a batch once, not once a product; their numbers are those of the entries."""

import pytest
import reference
import torch
from torch import nn
from torch.testing import assert_close

import nngeom as nng


class Swelling(torch.autograd.Function):
    """A square whose backward pass multiplies in place what it saved, as fused losses do."""

    @staticmethod
    def forward(ctx, x):
        ctx.slope = 2 * x.detach()
        return x.square()

    @staticmethod
    def backward(ctx, g):
        return ctx.slope.mul_(g)


class Square(nn.Module):
    def __init__(self, fused):
        super().__init__()
        self.fused = fused

    def forward(self, x):
        return Swelling.apply(x) if self.fused else x.square()


class Hooked(nn.Module):
    def forward(self, x):
        y = x * 1.0
        if y.requires_grad:
            y.register_hook(lambda g: 2 * g)
        return y


def net(middle=None):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), *([] if middle is None else [middle]), nn.Linear(6, 2)).double()


def batches():
    torch.manual_seed(4)
    return [torch.randn(n, 4).double() for n in (3, 4, 2)]


def passes(model, act):
    """How often the model runs in ``act``."""
    seen = []
    handle = model.register_forward_pre_hook(lambda *_: seen.append(1))
    act()
    handle.remove()
    return len(seen)


ACTS = {
    "lanczos": lambda k: k.lanczos(3, generator=torch.Generator().manual_seed(0))[0],
    "solve": lambda k: k.solve(nng.FVector(torch.ones(2, 9).double()), 0.1, tol=1e-10).tensor,
    "norm": lambda k: k.norm(2, generator=torch.Generator().manual_seed(0)),
}
EXACT = {
    "lanczos": lambda k: torch.linalg.eigvalsh(k).flip(0)[:3],
    "solve": lambda k: torch.linalg.solve(k + 0.1 * torch.eye(18).double(), torch.ones(18).double()).view(2, 9),
    "norm": lambda k: torch.linalg.matrix_norm(k, 2),
}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize(
    ("middle", "plain"),
    [(None, None), (Square(fused=True), Square(fused=False)), (Hooked(), Hooked())],
    ids=["plain", "changes what it saved", "hooked"],
)
def test_numbers_are_those_of_the_entries(act, middle, plain):
    model, data = net(middle), batches()
    rows = reference.jacobian(net(plain), torch.cat(data)).flatten(0, 1)
    dense = rows @ rows.T
    found = ACTS[act](nng.GramMatrix(model, data, nng.FMatImplicit))
    assert_close(found, EXACT[act](dense), rtol=1e-5, atol=1e-7)


def test_a_batch_runs_once_where_there_is_room():
    model, data = net(), batches()
    runs = {}
    for budget in (None, 1):
        kernel = nng.GramMatrix(model, data, nng.FMatImplicit, memory_budget=budget)
        runs[budget] = passes(model, lambda kernel=kernel: ACTS["lanczos"](kernel))
    assert runs[None] < 0.6 * runs[1]  # half of them are those of tangents


def test_the_next_call_sees_what_the_model_became():
    model, data = net(), batches()
    kernel = nng.GramMatrix(model, data, nng.FMatImplicit)
    ACTS["lanczos"](kernel)
    with torch.no_grad():
        model[0].weight.mul_(0.5)
    assert_close(ACTS["lanczos"](kernel), EXACT["lanczos"](nng.GramMatrix(model, data).to_dense()))
