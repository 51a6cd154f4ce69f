"""``.grad`` as one vector: a parameter whose gradient is gone counts as zero, whatever it had before."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nngeom as nng
from nngeom.optim import EKFAC, KFAC, NaturalGradient, WinsorizedSGD
from nngeom.optim.gradients import Gradients

f64 = torch.float64


class TwoHeads(nn.Module):
    """One of two heads is used at a time."""

    def __init__(self):
        super().__init__()
        self.body, self.heads, self.chosen = nn.Linear(4, 3), nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)]), 0

    def forward(self, x):
        return self.heads[self.chosen](self.body(x).tanh())


def parameters(*shapes):
    return [nn.Parameter(torch.zeros(shape, dtype=f64)) for shape in shapes]


def test_read_and_write_follow_what_there_is():
    ps = parameters((2, 3), (4,), (1, 2))
    held = Gradients(ps, f64)
    generator = torch.Generator().manual_seed(0)
    for there in ([0, 1, 2], [0, 2], [1], [], [2], [0, 1, 2]):
        for j, p in enumerate(ps):
            p.grad = torch.randn(p.shape, dtype=f64, generator=generator) if j in there else None
        flat = held.read()
        expected = torch.cat([torch.zeros(p.numel(), dtype=f64) if p.grad is None else p.grad.flatten() for p in ps])
        assert torch.equal(flat, expected)
        flat.mul_(-2).add_(1)
        held.write()
        assert [p.grad is not None for p in ps] == [j in there for j in range(3)]
        for p, piece in zip(ps, expected.mul(-2).add(1).split([6, 4, 2])):
            assert p.grad is None or torch.equal(p.grad.flatten(), piece)


def test_sparse_gradients_become_dense():
    table = nn.Embedding(5, 2, sparse=True, dtype=f64)
    table(torch.tensor([1, 3, 3])).sum().backward()
    assert torch.equal(Gradients([table.weight], f64).read().view(5, 2)[:, 0], torch.tensor([0, 1, 0, 2, 0], dtype=f64))


@pytest.mark.parametrize("kind", [nng.PMatDense, nng.PMatKFAC, nng.PMatDiag, nng.PMatEKFAC, nng.PMatBlockDiag])
def test_a_step_without_a_gradient_knows_nothing_of_an_older_one(kind):
    """Dense couples the heads: a stale gradient of one would turn the step of the other parameters."""
    torch.manual_seed(0)
    x, y = torch.randn(6, 4, dtype=f64), torch.tensor([0, 1, 1, 0, 1, 0])
    model = TwoHeads().double()
    opt = NaturalGradient(model, kind, lr=1.0, momentum=0.0, kl_clip=None, damping=1e-2, statistics_decay=0.5)

    def observed():
        opt.zero_grad()
        with opt.observe():
            F.cross_entropy(model(x), y).backward()

    observed()
    opt.step()
    model.chosen = 1
    observed()
    gone = model.heads[0].weight
    assert gone.grad is None
    before, left = nng.PVector.from_model(model), gone.detach().clone()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    opt.step()
    step = before - nng.PVector.from_model(model)
    assert torch.equal(gone, left) and gone.grad is None
    gradient = nng.PVector.from_dict(opt.collection, grads)
    if kind in (nng.PMatDense, nng.PMatBlockDiag, nng.PMatDiag):
        matrix = average(opt, kind)
        expected = matrix.solve(gradient, 1e-2)
        for name in ("body.weight", "body.bias", "heads.1.weight", "heads.1.bias"):
            torch.testing.assert_close(step[name], expected[name], rtol=1e-9, atol=1e-12)
    else:  # layer by layer: the heads do not meet
        assert torch.isfinite(step.flat()).all() and float(step["body.weight"].norm()) > 0


def average(opt, kind):
    """The running average as a matrix."""
    recipe = opt.representation.recipe(next(iter(opt.partition)).selection)
    next(recipe)
    try:
        recipe.send(next(iter(opt.partition)).averages.read())
    except StopIteration as end:
        return kind.of_blocks(opt.collection, end.value, 6)


@pytest.mark.parametrize("make", [KFAC, EKFAC, lambda m: NaturalGradient(m, nng.PMatDense), WinsorizedSGD])
def test_head_by_head_is_a_model_of_that_head(make):
    """Steps on one head after another leave the other where it is, momentum included once it has a gradient again."""
    torch.manual_seed(0)
    x, y = torch.randn(6, 4, dtype=f64), torch.tensor([0, 1, 1, 0, 1, 0])
    model = TwoHeads().double()
    opt = make(model)
    for chosen in (0, 1, 0, 1):
        model.chosen = chosen
        other = [p.detach().clone() for p in model.heads[1 - chosen].parameters()]
        opt.zero_grad()
        with opt.observe():
            F.cross_entropy(model(x), y).backward()
        opt.step()
        assert all(torch.equal(p, q) for p, q in zip(other, model.heads[1 - chosen].parameters()))
