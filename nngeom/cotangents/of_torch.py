"""Losses of torch, as modules or functions, read as what they say of one example.

Their ``reduction`` is not ours: a loss here is one number an example, the sum over its outputs or positions, and
measures average over examples. Everything else that they hold is honoured, or refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn import functional as F

from nngeom.core.errors import ArgumentError
from nngeom.cotangents.cross_entropy import CrossEntropy
from nngeom.cotangents.per_example import Loss
from nngeom.cotangents.separable import BinaryCrossEntropy, PoissonLoss, SquaredError

_CROSS_ENTROPY = ("weight", "label_smoothing", "ignore_index")
_BINARY = ("weight", "pos_weight")
_POISSON = ("log_input", "full", "eps")
_SQUARED: tuple[str, ...] = ()

MODULES: dict[type[nn.Module], tuple[Callable[..., Loss], tuple[str, ...]]] = {
    nn.CrossEntropyLoss: (CrossEntropy, _CROSS_ENTROPY),
    nn.MSELoss: (functools.partial(SquaredError, 1.0), _SQUARED),
    nn.BCEWithLogitsLoss: (BinaryCrossEntropy, _BINARY),
    nn.PoissonNLLLoss: (PoissonLoss, _POISSON),
}
FUNCTIONS: dict[Any, tuple[Callable[..., Loss], tuple[str, ...]]] = {
    F.cross_entropy: (CrossEntropy, _CROSS_ENTROPY),
    F.mse_loss: (functools.partial(SquaredError, 1.0), _SQUARED),
    F.binary_cross_entropy_with_logits: (BinaryCrossEntropy, _BINARY),
    F.poisson_nll_loss: (PoissonLoss, _POISSON),
}
_REDUCING = ("reduction", "size_average", "reduce")


def known(loss: Any) -> Loss | None:
    """The loss that a module or a function of torch is, also one with arguments fixed by ``functools.partial``;
    ``None`` for others."""
    if type(loss) in MODULES and not _changed(loss):
        make, settings = MODULES[type(loss)]
        return make(**{name: getattr(loss, name) for name in settings})
    given: dict[str, Any] = {}
    function = loss
    while isinstance(function, functools.partial) and not function.args:
        given, function = {**function.keywords, **given}, function.func
    if not callable(function) or function not in FUNCTIONS:
        return None
    make, settings = FUNCTIONS[function]
    unknown = [name for name in given if name not in settings and name not in _REDUCING]
    if unknown:
        raise ArgumentError(
            f"the loss {function.__name__} was given {unknown}; expected only {[*settings, *_REDUCING]}"
        )
    return make(**{name: x for name, x in given.items() if name in settings})


def _changed(module: nn.Module) -> bool:
    """Whether calls of it are no longer what its class says."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
