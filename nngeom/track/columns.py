"""Columns of a history: what metrics are called, and what they return as numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from nngeom.core.errors import ArgumentError


def as_columns(name: str, value: Any) -> dict[str, float]:
    """What a metric returned, as columns."""
    if isinstance(value, dict):
        return {str(column): as_number(f"{name}[{column!r}]", v) for column, v in value.items()}
    return {name: as_number(name, value)}


def as_number(name: str, value: Any) -> float:
    """What a metric returned as a number; raises :class:`ArgumentError` for text, tensors of several, and the like."""
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        given = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise ArgumentError(f"the metric {name!r} returned {given}; expected a number or a dict of numbers") from error


def names_of(metrics: Sequence[str | Callable[..., Any]]) -> list[str]:
    """A name of its own for every metric."""
    names: list[str] = []
    for metric in metrics:
        base = name = metric if isinstance(metric, str) else _name(metric)
        count = 1
        while name in names:
            count += 1
            name = f"{base}_{count}"
        names.append(name)
    return names


def _name(metric: Callable[..., Any]) -> str:
    inner = metric.func if isinstance(metric, functools.partial) else metric
    return getattr(inner, "__name__", type(inner).__name__)
