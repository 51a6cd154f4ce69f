"""Optimizers by name, and one observed step of any of them."""

from __future__ import annotations

import torch
from cases import STORED, representation
from torch.nn import functional as F

import nngeom as nng
from nngeom.optim import EKFAC, KFAC, NaturalGradient

EXACT = dict(lr=1.0, momentum=0.0, kl_clip=None)


def natural(kind):
    """Natural gradients in a representation of the list."""
    return lambda m, **k: NaturalGradient(m, representation(kind, m), **k)


PRESETS = {
    "ekfac": (
        nng.PMatEKFAC,
        1e-2,
        lambda m, **k: EKFAC(m, damping=1e-2, basis_every=1, scalings="batch", **EXACT, **k),
    ),
    "ekfac-additive": (
        nng.PMatEKFAC,
        nng.FactoredTikhonov(1e-3),
        lambda m, **k: EKFAC(m, basis_every=1, scalings="batch", **EXACT, **k),
    ),
    "kfac": (nng.PMatKFAC, 1e-2, lambda m, **k: KFAC(m, damping=1e-2, inverse_every=1, **EXACT, **k)),
    "kfac-factored": (
        nng.PMatKFAC,
        nng.FactoredTikhonov(1e-2, balanced=False),
        lambda m, **k: KFAC(m, inverse_every=1, **EXACT, **k),
    ),
    "kfac-balanced": (
        nng.PMatKFAC,
        nng.FactoredTikhonov(1e-3),
        lambda m, **k: KFAC(m, damping=nng.FactoredTikhonov(1e-3), inverse_every=1, **EXACT, **k),
    ),
    "kfac-reduce": (
        nng.PMatKFAC.options(sharing="reduce"),
        1e-2,
        lambda m, **k: KFAC(m, damping=1e-2, sharing="reduce", inverse_every=1, **EXACT, **k),
    ),
    "ekfac-sua": (
        nng.PMatEKFAC.options(sua=True),
        1e-2,
        lambda m, **k: EKFAC(m, damping=1e-2, sua=True, basis_every=1, scalings="batch", **EXACT, **k),
    ),
    "kfac-sua": (
        nng.PMatKFAC.options(sua=True),
        1e-2,
        lambda m, **k: KFAC(m, damping=1e-2, sua=True, inverse_every=1, **EXACT, **k),
    ),
    "kfac-blocks": (
        nng.PMatKFAC.options(factor_limit=5, factor_form="block"),
        1e-2,
        lambda m, **k: NaturalGradient(
            m, nng.PMatKFAC.options(factor_limit=5, factor_form="block"), damping=1e-2, **EXACT, **k
        ),
    ),
}

TRAINED = [kind for kind in STORED if kind != "low-rank"]  # rows have no running average
DAMPING = dict.fromkeys(TRAINED, 1e-2) | {"quasi-diag": 10.0}  # which need not be positive definite
PRESETS |= {
    kind: (kind, DAMPING[kind], lambda m, kind=kind, **k: natural(kind)(m, damping=DAMPING[kind], **EXACT, **k))
    for kind in TRAINED
    if kind not in PRESETS
}
MAKERS = {
    "kfac": lambda m: KFAC(m, lr=0.05, inverse_every=3, statistics_every=2),
    "kfac-exact": lambda m: KFAC(m, lr=0.05, damping=0.1, weight_decay=0.01, kl_clip=1e-3),
    "ekfac-ra": lambda m: EKFAC(m, lr=0.05, basis_every=3),
    "ekfac": lambda m: EKFAC(m, lr=lambda t: 0.1 / (1 + t), basis_every=3, scalings="batch", statistics_decay=0.5),
    "ekfac-sua": lambda m: EKFAC(m, lr=0.05, basis_every=3, sua=True, scalings="batch"),
    "monte-carlo": lambda m: EKFAC(m, lr=0.05, basis_every=3, fisher="monte_carlo", likelihood="categorical"),
}
MAKERS |= {
    kind: lambda m, kind=kind: natural(kind)(m, lr=0.01, damping=0.1, every=2) for kind in TRAINED if kind not in MAKERS
}


def gradient(opt):
    """``.grad`` as a vector."""
    parameters = opt.collection.parameters(opt.observer.network.model)
    return nng.PVector.from_dict(
        opt.collection, {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in parameters.items()}
    )


def one_step(opt, x, y, reduction="mean"):
    """Observe and step; the gradient, and what was subtracted from the parameters."""
    model = opt.observer.network.model
    opt.zero_grad()
    with opt.observe(reduction):
        F.cross_entropy(model(x), y, reduction=reduction).backward()
    g, before = gradient(opt), nng.PVector.from_model(model)
    opt.step()
    return g, before - nng.PVector.from_model(model)


def close(x, y, tolerance=1e-6):
    return float((x - y).norm()) <= tolerance * float(y.norm()) and float(y.norm()) > 0
