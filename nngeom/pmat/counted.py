"""Factors of rows whose positions are the data's, more in one batch than in another: tokens sorted to experts.

A mean over positions, that of output gradients (``"expand"``) or of an example's inputs (``"reduce"``), is one over the
positions of all batches, so that it does not depend on how data are cut: the sums are kept as they are, beside the
number of positions and of examples, and divided when they are read.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nngeom.core.factored import FactoredJacobian
from nngeom.core.jacobian import LayerJacobian
from nngeom.core.statistic import Inputs, Moment
from nngeom.core.tied import TiedJacobian

Factors = Mapping[str, Tensor | Moment | Inputs]
ONCE, TWICE, SPREAD = "counted ", "counted twice ", "positions of "


def counted(j: LayerJacobian, sums: Factors, sharing: str) -> dict[str, Tensor | Moment | Inputs]:
    """The ``sums`` of the factors of rows ``j``: those that are to be divided by numbers of positions under other
    names, with these numbers.
    """
    terms = j.terms if isinstance(j, TiedJacobian) else ((False, j),)
    found = dict(sums)
    for q, (transposed, term) in enumerate(terms):
        if isinstance(term, FactoredJacobian) and term.counted:
            side = "ga"[(sharing == "reduce") ^ transposed] + (str(q) if isinstance(j, TiedJacobian) else "")
            for name in [name for name in found if _is_mean(name, side, sharing)]:
                found[(ONCE if sharing == "expand" else TWICE) + name] = found.pop(name)
                found[SPREAD + name] = Inputs(term.spread)
    return found


def _is_mean(name: str, side: str, sharing: str) -> bool:
    """Whether a sum is of means over positions: on this ``side``, or of inputs that have names of their own."""
    return name in (side, f"probes {side}") or (sharing == "reduce" and (name == "c" or name.startswith("rest")))


def divided(means: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The factors from ``means`` of sums, those that :func:`counted` set apart divided, together with those of batches
    in which positions are not counted.

    Where positions are counted in every batch, examples of batches without any count among those of the mean.
    """
    found = {name: t for name, t in means.items() if not name.startswith((ONCE, SPREAD))}
    for name, t in means.items():
        if name.startswith(ONCE):
            twice = name.startswith(TWICE)
            name = name.removeprefix(TWICE if twice else ONCE)
            positions, examples = means[SPREAD + name]
            examples = examples if name in means else torch.ones_like(examples)
            share = torch.where(positions > 0, examples / positions, torch.zeros_like(positions)) ** (1 + twice)
            part = t * share.to(t).view(-1, *[1] * (t.ndim - 1))
            found[name] = found[name] + part if name in found else part
    return found
