"""What optimizers are given, checked."""

from __future__ import annotations

import functools
import math
from typing import Any

from torch import Tensor

from nngeom.core.damping import Cutoff, Damping, Relative, Tikhonov, as_damping
from nngeom.core.errors import ArgumentError, ArgumentTypeError
from nngeom.cotangents.fisher import ExactFisher, MonteCarloFisher, as_likelihood
from nngeom.pmat.diag import PMatDiag
from nngeom.pmat.eye import PMatEye
from nngeom.pmat.representation import Representation, as_representation
from nngeom.sweep.columns import Cotangents


def number(name: str, x: Any, step: int) -> Any:
    """A number, or a callable of the step; raises :class:`ArgumentError` out of range."""
    if type(x) is int or (type(x) is float and x - x == 0):  # finite
        return _in_range(name, x)
    value = x(step) if callable(x) else x
    if isinstance(value, Tensor) and value.ndim == 0:
        value = value.item()
    if name == "kl_clip" and value is None:
        return None
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ArgumentTypeError(f"{name} is {value!r}; expected a finite number, or a callable of the step")
    return _in_range(name, value)


@functools.lru_cache(256, typed=True)
def _in_range(name: str, value: float) -> float:
    low, high, strict = {
        "lr": (0, math.inf, False),
        "weight_decay": (0, math.inf, False),
        "kl_clip": (0, math.inf, True),
    }.get(name, (0, 1, False))
    if name in ("every", "statistics_every"):
        low, high = 1, math.inf
    if value < low or (strict and value <= low) or (high == 1 and value >= 1):
        raise ArgumentError(
            f"{name} is {value}; expected a number "
            f"{'in [0, 1)' if high == 1 else f'above {low}' if strict else f'of at least {low}'}"
        )
    if low == 1 and value != value // 1:
        raise ArgumentError(f"{name} is {value}; expected a whole number of steps")
    return value


def as_optimizer_damping(damping: Any) -> Damping | Relative:
    """A checked damping object from what an optimizer is given: :class:`Relative` and ``Cutoff(top=k)`` too."""
    if isinstance(damping, Relative):
        as_damping(Tikhonov(damping.value))
        return damping
    if isinstance(damping, Cutoff) and damping.top is not None:
        as_damping(Cutoff(damping.value))
        return damping
    return as_damping(damping)


def as_reduction(reduction: str) -> str:
    """How the loss is reduced over examples, checked."""
    if reduction not in ("mean", "sum", "token_mean"):
        raise ArgumentError(
            f"reduction is {reduction!r}; expected 'mean' or 'sum', how the loss is reduced over examples, or "
            "'token_mean', over all positions of all examples"
        )
    return reduction


def as_rest(rest: Any) -> Representation:
    """The representation of parameters that the chosen one cannot hold."""
    named = {"diag": PMatDiag, "eye": PMatEye}
    if isinstance(rest, str) and rest not in named:
        raise ArgumentError(f"rest is {rest!r}; expected {sorted(named)} or a representation")
    return as_representation(named.get(rest, rest) if isinstance(rest, str) else rest)


def as_metric(fisher: str, likelihood: Any, seed: int) -> Cotangents | None:
    """Which cotangents are pulled back; ``None``: those of the user's own loss."""
    if fisher not in ("empirical", "monte_carlo", "exact"):
        raise ArgumentError(f"fisher is {fisher!r}; expected 'empirical', 'monte_carlo' or 'exact'")
    if fisher == "empirical":
        if likelihood is not None:
            raise ArgumentError(
                "likelihood is for fisher='monte_carlo' or 'exact'; the empirical one comes from your own loss"
            )
        return None
    if likelihood is None:
        raise ArgumentError(f"fisher={fisher!r} needs a likelihood, such as 'categorical' or 'gaussian'")
    return (
        ExactFisher(as_likelihood(likelihood))
        if fisher == "exact"
        else MonteCarloFisher(as_likelihood(likelihood), 1, seed)
    )
