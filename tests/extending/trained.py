"""One observed step of an optimizer, for the tests of this folder."""

import torch
from torch.nn import functional as F

import nngeom as nng

EXACT = dict(lr=1.0, momentum=0.0, damping=1e-2, statistics_decay=0.0, kl_clip=None)


def cross_entropy(outputs, targets):
    """One number an example."""
    return F.cross_entropy(outputs, targets, reduction="none")


def step(opt, model, x, y, loss=cross_entropy, reduction="mean"):
    """The gradient of the mean loss, and what the step subtracted from the parameters."""
    opt.zero_grad()
    with opt.observe(reduction):
        total = loss(model(x), y).sum()
        (total / len(x) if reduction == "mean" else total).backward()
    before = nng.PVector.from_model(model)
    gradient = nng.PVector.from_grad(model)
    opt.step()
    return gradient, before - nng.PVector.from_model(model)


def close(x, y, tolerance=1e-9):
    """Equal to rounding, relative to the largest entry."""
    x, y = (v.flat() if isinstance(v, nng.PVector) else torch.as_tensor(v) for v in (x, y))
    torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance * float(y.abs().max()))
