"""Pools ``(values (N, 4), owner (N,) ascending, n) -> (n, 4)``: rows gathered into examples, as readouts of graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def membership(owner: Tensor, n: int, like: Tensor) -> Tensor:
    """``(n, N)``, one where the value belongs to the example."""
    return (owner == torch.arange(n)[:, None]).to(like.dtype)


def sparse(values: Tensor, owner: Tensor, n: int) -> Tensor:
    """A sparse membership times the values."""
    at, ones = torch.stack([owner, torch.arange(len(owner))]), torch.ones(len(owner), dtype=values.dtype)
    return torch.sparse.mm(torch.sparse_coo_tensor(at, ones, (n, len(owner)), check_invariants=False), values)


def segments(values: Tensor, owner: Tensor, n: int) -> Tensor:
    """``segment_reduce`` by lengths; empty segments are zero."""
    return torch.segment_reduce(values, "sum", lengths=owner.bincount(minlength=n), axis=0, initial=0)


def bags(values: Tensor, owner: Tensor, n: int) -> Tensor:
    """An ``embedding_bag`` whose table is the values."""
    counts = owner.bincount(minlength=n)
    return F.embedding_bag(torch.arange(len(owner)), values, counts.cumsum(0) - counts, mode="sum")


def differences(values: Tensor, owner: Tensor, n: int) -> Tensor:
    """A running sum, read at the ends of the examples."""
    ends = owner.bincount(minlength=n).cumsum(0)
    total = torch.cat([values.new_zeros(1, 4), values.cumsum(0)])
    return total[ends].diff(dim=0, prepend=values.new_zeros(1, 4))


def padded(values: Tensor, owner: Tensor, n: int) -> Tensor:
    """Written into a padded table, then summed."""
    counts = owner.bincount(minlength=n)
    place = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]
    table = values.new_zeros(n, int(counts.max()) + 1, 4)
    return table.index_put((owner, place), values).sum(1)


def attention(values: Tensor, owner: Tensor, n: int) -> Tensor:
    """A softmax among all values, masked to the example's own."""
    own = membership(owner, n, values).bool() | (membership(owner, n, values).sum(1, keepdim=True) == 0)
    return torch.where(own, values.sum(-1), -torch.inf).softmax(-1) @ values


POOLS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "index_add": lambda v, owner, n: v.new_zeros(n, 4).index_add(0, owner, v),
    "scatter_add": lambda v, owner, n: v.new_zeros(n, 4).scatter_add(0, owner[:, None].expand_as(v), v),
    "scatter_reduce": lambda v, owner, n: v.new_zeros(n, 4).scatter_reduce(0, owner[:, None].expand_as(v), v, "amax"),
    "index_put": lambda v, owner, n: v.new_zeros(n, 4).index_put((owner,), v, accumulate=True),
    "segment_reduce": segments,
    "membership": lambda v, owner, n: membership(owner, n, v) @ v,
    "one-hot einsum": lambda v, owner, n: torch.einsum("vn,vm->nm", F.one_hot(owner, n).to(v.dtype), v),
    "embedding_bag": bags,
    "sparse": sparse,
    "cumsum": differences,
    "padded": padded,
    "split": lambda v, owner, n: torch.stack([part.sum(0) for part in v.split(owner.bincount(minlength=n).tolist())]),
    "masked attention": attention,
}
