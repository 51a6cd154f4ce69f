"""Measures: ``f(wrapped, loader, truth, generator, **options)`` gives ``(got, want)``, ours and autograd's.

Those with second derivatives stand in ``SECOND``: they are compared with differences, to 1e-5; those in ``FIRST`` are
of one batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import nngeom as nng

from .net import Truth
from .wrappers import Wrapped

Pair = tuple[Tensor, Tensor]


def fim(representation: Any, read: Callable[[Any], Tensor], want: Callable[[Truth], Tensor]) -> Callable[..., Pair]:
    """The exact Fisher matrix in a representation, and what is exact in it."""

    def measure(w: Wrapped, loader, truth: Truth, generator, **options) -> Pair:
        return read(nng.FIM(w.model, loader, representation, function=w.function, **options)), want(truth)

    return measure


def vector(m: Any, generator: torch.Generator, like: Tensor) -> tuple[Any, Tensor]:
    """A random vector of parameter space, as an object and flat."""
    v = nng.PVector.randn(m.layer_collection, generator=generator, dtype=like.dtype)
    return v, v.flat()


def implicit(w, loader, truth, generator, **options) -> Pair:
    m = nng.FIM(w.model, loader, nng.PMatImplicit, function=w.function, **options)
    v, flat = vector(m, generator, truth.rows)
    return m.mv(v).flat(), truth.fisher @ flat


def empirical(w, loader, truth, generator, **options) -> Pair:
    m = nng.EmpiricalFIM(w.model, loader, nng.PMatDense, loss="cross_entropy", function=w.function, **options)
    return m.to_dense(), truth.loss_rows.T @ truth.loss_rows / truth.n


def empirical_diag(w, loader, truth, generator, **options) -> Pair:
    m = nng.EmpiricalFIM(w.model, loader, nng.PMatDiag, loss="cross_entropy", function=w.function, **options)
    return m.diag().flat(), truth.loss_rows.square().mean(0)


def ggn(w, loader, truth, generator, **options) -> Pair:
    m = nng.GGN(w.model, loader, nng.PMatBlockDiag, loss="cross_entropy", function=w.function, **options)
    return m.trace(), truth.fisher.trace()


def layers(w, loader, truth, generator, **options) -> Pair:
    """Kernels of the layers, summed."""
    kernels = nng.GramMatrices(w.model, loader, function=w.function, **options)
    return sum(k.tensor for k in kernels.values()), torch.einsum("cnd,emd->cnem", truth.rows, truth.rows)


def rectangular(w, loader, truth, generator, **options) -> Pair:
    """The first batch against all."""
    k = nng.GramMatrix(w.model, loader[:1], other=loader, function=w.function, **options)
    return k.tensor, torch.einsum("cnd,emd->cnem", truth.rows[:, : len(loader[0][0])], truth.rows)


def jacobian(w, loader, truth, generator, **options) -> Pair:
    return nng.Jacobian(w.model, loader, function=w.function, **options).tensor, truth.rows


def push(w, loader, truth, generator, **options) -> Pair:
    j = nng.Jacobian(w.model, loader, nng.PushForwardImplicit, function=w.function, **options)
    v, flat = vector(j, generator, truth.rows)
    return j.mv(v).tensor, truth.rows @ flat


def pull(w, loader, truth, generator, **options) -> Pair:
    j = nng.Jacobian(w.model, loader, nng.PushForwardImplicit, function=w.function, **options)
    u = torch.randn(truth.rows.shape[:2], generator=generator, dtype=torch.float64).to(truth.rows)
    return j.T.mv(nng.FVector(u)).flat(), torch.einsum("cn,cnd->d", u, truth.rows)


def gram(w, loader, truth, generator, **options) -> Pair:
    k = nng.GramMatrix(w.model, loader, function=w.function, **options)
    return k.tensor, torch.einsum("cnd,emd->cnem", truth.rows, truth.rows)


def gram_diag(w, loader, truth, generator, **options) -> Pair:
    k = nng.GramMatrix(w.model, loader, nng.FMatDiag, function=w.function, **options)
    return k.tensor, truth.rows.square().sum(-1)


def gram_differentiable(w, loader, truth, generator, **options) -> Pair:
    k = nng.GramMatrix(w.model, loader, function=w.function, differentiable=True, **options)
    with torch.enable_grad():
        return with_slopes(k.trace(), loader, w, generator)


def hessian(w, loader, truth, generator, **options) -> Pair:
    m = nng.Hessian(w.model, loader, loss="cross_entropy", function=w.function, **options)
    v, flat = vector(m, generator, truth.rows)
    return m.mv(v).flat(), truth.along("loss_gradient", flat)


def covariance(w, loader, truth, generator, **options) -> Pair:
    m = nng.GradientCovariance(w.model, loader, nng.PMatDiag, loss="cross_entropy", function=w.function, **options)
    return m.diag().flat(), truth.loss_rows.var(0, unbiased=False)


def penalty(w, loader, truth, generator, **options) -> Pair:
    """The trace and its gradient."""
    value = nng.mgs.trace_penalty(w.model, loader[0][0], function=w.function)
    return with_slopes(value, loader, w, generator)


def with_slopes(value: Tensor, loader, w: Wrapped, generator: torch.Generator) -> Pair:
    """A differentiable trace and its derivatives in three random directions, by its graph and by differences."""
    truth = Truth(w.call, w.model, loader)
    grads: Any = [None] * len(truth.parameters)
    if value.requires_grad:
        grads = torch.autograd.grad(value, truth.parameters, allow_unused=True, retain_graph=True)
    flat = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, truth.parameters)])
    directions = torch.randn(3, len(flat), generator=generator, dtype=torch.float64)
    want = [truth.trace.double(), *(truth.along("trace", v) for v in directions)]
    return torch.cat([value.detach().double().reshape(1), directions @ flat.double()]), torch.stack(want)


MEASURES: dict[str, Callable[..., Pair]] = {
    "Jacobian": jacobian,
    "FIM Dense": fim(nng.PMatDense, lambda m: m.to_dense(), lambda truth: truth.fisher),
    "FIM Diag": fim(nng.PMatDiag, lambda m: m.diag().flat(), lambda truth: truth.fisher.diagonal()),
    "FIM EKFAC trace": fim(nng.PMatEKFAC, lambda m: m.trace(), lambda truth: truth.fisher.trace()),
    "FIM Eye trace": fim(nng.PMatEye, lambda m: m.trace(), lambda truth: truth.fisher.trace()),
    "FIM LowRank": fim(nng.PMatLowRank, lambda m: m.to_dense(), lambda truth: truth.fisher),
    "FIM Implicit": implicit,
    "GGN BlockDiag trace": ggn,
    "EmpiricalFIM Dense": empirical,
    "EmpiricalFIM Diag": empirical_diag,
    "GramMatrix": gram,
    "GramMatrix Diag": gram_diag,
    "GramMatrices": layers,
    "GramMatrix with another": rectangular,
    "GramMatrix differentiable": gram_differentiable,
    "J v": push,
    "J^T u": pull,
    "Hessian v": hessian,
    "GradientCovariance Diag": covariance,
    "trace penalty": penalty,
}
SECOND = ("GramMatrix differentiable", "Hessian v", "trace penalty")
FIRST = ("GramMatrix differentiable", "trace penalty")  # of the first batch only
