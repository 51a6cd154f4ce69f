"""Products of a stack of matrices with rows that are sorted by the one they meet, as routed experts use them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nngeom.layers.adapter import Call, NotStructured, Use, adapts
from nngeom.layers.stacked import slot

FUNCTIONS = [f for f in (getattr(torch, "_grouped_mm", None), getattr(F, "grouped_mm", None)) if f is not None]


def _apart(x: Tensor, groups: Tensor, s: int) -> Tensor:
    """``[*lead, r, p] -> [*lead, r, s, p]``, every row in its group; those behind the last are in none."""
    out, row = x.new_zeros(*x.shape[:-1], s, x.shape[-1]), torch.arange(len(groups), device=groups.device)
    out[..., row, groups.clamp(max=s - 1), :] = x.masked_fill((groups >= s).unsqueeze(-1), 0)
    return out


@adapts(*FUNCTIONS)
def grouped_mm(call: Call, input: Tensor, mat2: Tensor, *args: Any, offs: Tensor | None = None, **kwargs: Any) -> Use:
    """``input [r, i]``, of which rows up to ``offs[0]`` meet ``mat2[0] [i, o]``, and so on."""
    if args or offs is None or kwargs.get("bias") is not None or input.ndim != 2 or mat2.ndim != 3:
        raise NotStructured
    if call.is_parameter(input) or call.out.dtype != input.dtype:
        raise NotStructured
    s, kept = len(mat2), call.keep(input)
    groups = torch.searchsorted(offs, torch.arange(len(input), device=offs.device, dtype=offs.dtype), right=True)
    return Use(
        "grouped_mm",
        slot(call, mat2),
        None,
        (len(input),),
        gradients=lambda g: _apart(g, groups, s),
        inputs=lambda: _apart(kept, groups, s),
        counts=lambda: torch.diff(offs, prepend=offs.new_zeros(1)),
    )
