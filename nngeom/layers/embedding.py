"""Embeddings: rows of a parameter looked up by index, never as one-hot vectors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nngeom.core.layout import Arrangement
from nngeom.layers.adapter import Call, NotStructured, Use, adapts


@adapts(F.embedding, torch.embedding)
def embedding(
    call: Call,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Use:
    """``weight [i, o]``, indices of any shape; the row ``padding_idx`` gets no gradient."""
    if max_norm is not None or call.is_parameter(input):
        raise NotStructured
    size, width = weight.shape
    w = call.whole(weight, Arrangement((1, size, width), (0, 2, 1), (1, width, size)))
    index = call.keep(input).long()
    padding = None if padding_idx is None or (padding_idx == -1 and weight.shape[0] == 0) else padding_idx % size

    def gradients(g: Tensor) -> Tensor:
        if padding is not None:
            g = g * (index != padding).unsqueeze(-1)
        return g.unsqueeze(-2)

    return Use("embedding", w, None, tuple(input.shape), gradients, inputs=lambda: index, lookup=True)
