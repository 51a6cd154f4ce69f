"""What stood in front of what examples may have to do with each other when they were asked: small factors hide it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from nngeom.capture.network import Network

SMALL = 1e-2  # of an entry: outputs that change by that show in float32, too
GROWTH = 2.0  # of small ones, until it is asked again


@dataclass(frozen=True)
class Factors:
    """Tensors of a model that the answer of a look depends on: those that were ``small``, as long as they do not grow,
    and ``others``, as long as they are what they were, by two numbers of each, ``marks``.
    """

    small: tuple[Tensor, ...] = ()
    most: tuple[float, ...] = ()
    others: tuple[Tensor, ...] = ()
    marks: tuple[float, ...] = ()

    @staticmethod
    def of(network: Network, *, answered: bool) -> Factors:
        """Buffers and parameters that are not selected where they are small: no gradient asks these. Selected ones
        where gradients did not answer, ``answered``: some factor is zero.
        """
        if network.distributed is not None:
            return Factors()
        selected = {id(p) for p in network.parameters.values()}
        every = {id(x): x for x in (*network.every.values(), *network.model.buffers()) if id(x) not in selected}
        unasked, others = _numbers(every.values()), () if answered else _numbers(network.parameters.values())
        found = [(x, norm) for x, norm in zip(unasked, _norms(unasked)) if norm <= SMALL * x.numel() ** 0.5]
        most = tuple(GROWTH * norm for _, norm in found)
        return Factors(tuple(x for x, _ in found), most, others, _marks(others))

    @property
    def matter(self) -> bool:
        """Whether there are any."""
        return bool(self.small or self.others)

    def hold(self) -> bool:
        """Whether what was seen under them is believed still."""
        if not self.matter:
            return True
        grown = any(norm > most for norm, most in zip(_norms(self.small), self.most))
        return not grown and _marks(self.others) == self.marks


def _numbers(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Those with real or complex entries."""
    return tuple(x for x in tensors if x.numel() and (x.is_floating_point() or x.is_complex()) and not x.is_sparse)


def _norms(tensors: Iterable[Tensor]) -> tuple[float, ...]:
    """In float32, which every device has, asked of a device once."""
    return _asked([x.norm().float() for x in map(torch.detach, tensors)])


def _marks(tensors: Iterable[Tensor]) -> tuple[float, ...]:
    """Norms, and sums with weights that tell signs and places apart."""
    return _norms(tensors) + _asked([_weighted(x) for x in map(torch.detach, tensors)])


def _weighted(x: Tensor) -> Tensor:
    flat = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    return flat.reshape(-1).float() @ torch.linspace(1, 2, flat.numel(), device=x.device, dtype=torch.float32)


def _asked(numbers: list[Tensor]) -> tuple[float, ...]:
    return tuple(torch.stack([x.to(numbers[0].device) for x in numbers]).tolist()) if numbers else ()
