"""Arguments of plain kinds, checked: numbers, tensors, functions, paths."""

from __future__ import annotations

import math
import numbers
import os
from typing import Any

import torch
from torch import Tensor

from nngeom.core.errors import ArgumentError, ArgumentTypeError, NonFiniteError


def described(x: Any) -> str:
    """What was given, short."""
    if isinstance(x, Tensor):
        return f"a tensor {tuple(x.shape)} of {x.dtype}"
    return repr(x) if x is None or isinstance(x, (str, numbers.Number)) else f"a {type(x).__name__}"


def require_real(x: Any, what: str, *, finite: bool = True) -> None:
    """Raise where ``x``, called ``what``, is no real number, nor a tensor that is one, or not ``finite``."""
    one = isinstance(x, Tensor) and x.ndim == 0 and not x.is_complex()
    if not one and not isinstance(x, numbers.Real):
        raise ArgumentTypeError(f"{what} is {described(x)}; expected a number")
    value = float(x.detach() if isinstance(x, Tensor) else x)
    if finite and not math.isfinite(value):
        raise ArgumentError(f"{what} is {value}; expected a finite number")


def require_at_least(x: Any, what: str, least: float = 0.0, *, above: bool = False) -> None:
    """Raise where ``x``, called ``what``, is no finite number of at least ``least``, or ``above`` it."""
    require_real(x, what)
    if float(x) < least or (above and float(x) <= least):
        kind = (
            f"number of at least {least:g}" if not above else f"number above {least:g}" if least else "positive number"
        )
        raise ArgumentError(f"{what} is {float(x):g}; expected a {kind}")


def require_whole(x: Any, what: str, least: int = 1) -> None:
    """Raise where ``x``, called ``what``, is no whole number of at least ``least``."""
    if isinstance(x, bool) or not isinstance(x, numbers.Integral):
        raise ArgumentTypeError(f"{what} is {described(x)}; expected a whole number of at least {least}")
    if x < least:
        raise ArgumentError(f"{what} is {x}; expected a whole number of at least {least}")


def require_real_tensor(x: Any, what: str) -> None:
    """Raise where ``x``, called ``what``, is no tensor of finite real numbers."""
    if not isinstance(x, Tensor) or x.is_complex():
        raise ArgumentTypeError(f"{what} is {described(x)}; expected a tensor of real numbers")
    if not bool(torch.isfinite(x.detach()).all()):
        raise NonFiniteError(f"{what} holds NaN or infinity; expected finite numbers")


def require_callable(f: Any, what: str) -> None:
    """Raise where ``f``, called ``what``, cannot be called."""
    if not callable(f):
        raise ArgumentTypeError(f"{what} is {described(f)}; expected a function")


def as_path(path: Any) -> str:
    """The text of a ``path``."""
    if not isinstance(path, (str, bytes, os.PathLike)):
        raise ArgumentTypeError(f"the path is {described(path)}; expected a str or a pathlib.Path")
    return os.fsdecode(path)
