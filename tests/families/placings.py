"""Placings ``f(block, h (n, 4), key (n,)) -> (n, 4)``: a block run on examples that the data placed.

In ``SEPARATE`` examples are put back afterwards, in ``MIXING`` an example's output depends on others.

``key`` is a number an example, made from its inputs: on other data the same operations place examples elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Placing = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]


class Permuted(torch.autograd.Function):
    """Rows in another order, by a function that autograd's graph does not describe."""

    @staticmethod
    def forward(ctx, h, order):
        ctx.save_for_backward(order)
        return h[order]

    @staticmethod
    def backward(ctx, g):
        return g[ctx.saved_tensors[0].argsort()], None


def matrix(key: Tensor, h: Tensor) -> Tensor:
    """A permutation made from data, as a matrix."""
    return torch.eye(len(key), dtype=h.dtype)[key.argsort()]


def sort(block, h, key):
    order = key.argsort()
    return block(h[order])[order.argsort()]


def gather(block, h, key):
    order = key.argsort()
    index = order[:, None].expand_as(h)
    return torch.zeros_like(h).scatter(0, index, block(h.gather(0, index)))


def dispatch(block, h, key, capacity=None):
    """Two experts with slots, one-hot, as in mixtures of experts; what finds no slot is left out."""
    expert = F.one_hot((key > 0).long(), 2)
    slot = (expert.cumsum(0) - 1).masked_fill(expert == 0, -1)
    slots = torch.arange(capacity or len(h))
    one_hot = (slot[:, :, None] == slots).to(h.dtype)
    y = block(torch.einsum("nec,nm->ecm", one_hot, h))
    return torch.einsum("nec,ecm->nm", one_hot, y)


def where_flipped(block, h, key):
    """Pairs of examples change places, or do not; back again afterwards."""
    stays = (key + key.flip(0) > 0)[:, None]
    y = block(torch.where(stays, h, h.flip(0)))
    return torch.where(stays, y, y.flip(0))


def roll(block, h, key):
    by = int(key.argmax())
    return block(h.roll(by, 0)).roll(-by, 0)


def masked(block, h, key):
    some, out = key > 0, torch.zeros_like(h)
    out[some] = block(h[some])
    out[~some] = block(2 * h[~some])
    return out


def selected(block, h, key):
    some = (key > 0)[:, None].expand_as(h)
    return h.masked_scatter(some, block(h.masked_select(some).view(-1, 4)))


def copies(block, h, key):
    """Each example once or twice, averaged afterwards: ragged."""
    counts = 1 + (key > 0).long()
    owner = torch.arange(len(h)).repeat_interleave(counts)
    return torch.zeros_like(h).index_add(0, owner, block(h[owner])) / counts[:, None]


def bag(block, h, key):
    order, at = key.argsort(), torch.arange(len(h))
    return F.embedding_bag(order.argsort(), block(F.embedding_bag(order, h, at, mode="sum")), at, mode="sum")


def sparse(block, h, key):
    p = matrix(key, h).to_sparse()
    return torch.sparse.mm(p.t(), block(torch.sparse.mm(p, h)))


def topk(block, h, key):
    """Half of the batch goes through the block; which half depends on all."""
    at = key.topk(max(1, len(h) // 2)).indices
    return h.index_add(0, at, block(h[at]))


def pairs(block, h, mask):
    """All pairs, ``(n, n, 4)``, weighted by a mask."""
    return (block(h[:, None] - 0.3 * h[None]) * mask.to(h.dtype)[:, :, None]).sum(1)


def custom(block, h, key):
    order = key.argsort()
    return Permuted.apply(block(Permuted.apply(h, order)), order.argsort())


def parts(block, h, key):
    """Two halves by the sign of the key, one after the other, put together."""
    low, high = (key <= 0).nonzero()[:, 0], (key > 0).nonzero()[:, 0]
    return torch.cat([block(h[low]), block(h[high])]).index_select(0, torch.cat([low, high]).argsort())


def transposed(block, h, key):
    """Examples along the last axis of a product with the block's values."""
    p = matrix(key, h)
    return (block((h.T @ p.T).T).T @ p).T


def wide(block, h, key):
    """As many positions as examples: shapes leave open which axis is which."""
    return block(h[:, None].expand(-1, len(h), -1)).mean(1)


SEPARATE: dict[str, Placing] = {
    "none": lambda block, h, key: block(h),
    "sort": sort,
    "gather": gather,
    "index_copy": lambda block, h, key: torch.zeros_like(h).index_copy(0, key.argsort(), block(h[key.argsort()])),
    "dispatch": dispatch,
    "permutation matrix": lambda block, h, key: matrix(key, h).T @ block(matrix(key, h) @ h),
    "batched product": lambda block, h, key: (matrix(key, h).T[None] @ block(matrix(key, h)[None] @ h[None]))[0],
    "where and flip": where_flipped,
    "flip": lambda block, h, key: block(h.flip(0)).flip(0),
    "roll": roll,
    "masked": masked,
    "masked_scatter": selected,
    "copies": copies,
    "embedding_bag": bag,
    "sparse": sparse,
    "custom function": custom,
    "parts": parts,
    "transposed": transposed,
    "front": lambda block, h, key: block(torch.stack([h, h.sin()])).sum(0),
    "wide": wide,
    "own pairs": lambda block, h, key: pairs(block, h, torch.eye(len(h))),
    "cumsum": lambda block, h, key: block(h).cumsum(0).diff(dim=0, prepend=h.new_zeros(1, 4)),
}
MIXING: dict[str, Placing] = {
    "capacity": lambda block, h, key: dispatch(block, h, key, 2),
    "where and flip for good": lambda block, h, key: block(torch.where((key > 0)[:, None], h, h.flip(0))),
    "topk": topk,
    "neighbours": lambda block, h, key: pairs(block, h, (key[:, None] - key).abs() < 1),
    "batch mean": lambda block, h, key: block(h - h.mean(0)),
    "batch statistics": lambda block, h, key: block((h - h.mean(0).detach()) / (1 + h.var(0, unbiased=False))),
    "largest": lambda block, h, key: block(h) * (key / (key.abs().max() + 1))[:, None],
    "batch softmax": lambda block, h, key: (block(h) * key[:, None]).softmax(0),
    "next example": lambda block, h, key: block(h) + 0.1 * block(h.roll(1, 0)) * (key > 1)[:, None],
}
PLACINGS = SEPARATE | MIXING
