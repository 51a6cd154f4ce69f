"""What stood in front of what examples may have to do with each other when they were asked: factors of zero hide it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from nngeom.capture.network import Network


@dataclass(frozen=True)
class Factors:
    """Tensors of a model that the answer of a look depends on, as long as they are what they were: by their norms."""

    tensors: tuple[Tensor, ...]
    norms: list[float]

    @staticmethod
    def of(network: Network, *, answered: bool) -> Factors:
        """Buffers and parameters that are not selected where they are zero: no gradient asks these. Selected ones where
        gradients did not answer, ``answered``: some factor is zero.
        """
        if network.distributed is not None:
            return Factors((), [])
        selected = {id(p) for p in network.parameters.values()}
        others = {id(x): x for x in (*network.every.values(), *network.model.buffers()) if id(x) not in selected}
        norms = _norms(others.values())
        held = [x for x, norm in zip(_numbers(others.values()), norms) if norm == 0]
        held += [] if answered else _numbers(network.parameters.values())
        return Factors(tuple(held), _norms(held))

    def are_the_same(self) -> bool:
        """Whether they have changed since."""
        return not self.tensors or _norms(self.tensors) == self.norms


def _numbers(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Those with real or complex entries."""
    return [x for x in tensors if x.numel() and (x.is_floating_point() or x.is_complex()) and not x.is_sparse]


def _norms(tensors: Iterable[Tensor]) -> list[float]:
    some = [x.detach() for x in _numbers(tensors)]
    with torch.no_grad():
        return torch.stack([x.norm().double().cpu() for x in some]).tolist() if some else []
