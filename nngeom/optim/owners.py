"""Which process keeps the curvature of which layers, where each keeps that of some and sends their gradients to all."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch

from nngeom.core.errors import ArgumentError, StructureError
from nngeom.core.layout import Layout
from nngeom.ranks.made import assigned
from nngeom.ranks.team import Team
from nngeom.space.collection import LayerCollection

PLACEMENTS = ("replicated", "owned", "auto")
SHARE = 8  # "auto": of the memory of a device, one part in so many that all processes may keep the same of
OVERHEAD = 64**3  # of a layer, in the units of its sides cubed


@dataclass
class Owners:
    """The process that keeps each layer: the most expensive first, each goes to the one with least to do.

    ``placement``: ``"replicated"``, all keep all; ``"owned"``; or ``"auto"``, which of them the first step decides.
    """

    collection: LayerCollection
    team: Team
    placement: str
    _of_name: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.placement not in PLACEMENTS:
            raise ArgumentError(
                f"placement is {self.placement!r}; expected 'replicated' (every process keeps the curvature of all "
                "layers), 'owned' (of its own ones) or 'auto'"
            )
        layers = self.collection.by_layer()
        shapes = dict(zip(self.collection.names, self.collection.shapes))
        costs = {layer: sum(_cost(shapes[name]) for name in names) for layer, names in layers.items()}
        ranks = assigned(costs, self.team.size)
        self._of_name = {name: ranks[layer] for layer, names in layers.items() for name in names}

    @property
    def apart(self) -> bool:
        """Whether every process keeps layers of its own."""
        return self.placement == "owned" and self.team.size > 1

    @property
    def open(self) -> bool:
        """Whether that is not decided yet."""
        return self.placement == "auto" and self.team.size > 1

    def of(self, name: str) -> int:
        """The rank that keeps the layer of a parameter."""
        return self._of_name[name]

    def require_block(self, layout: Layout) -> None:
        """Raise :class:`StructureError` for a block over layers of several processes."""
        if len({self._of_name[name] for name in layout.names}) > 1:
            raise StructureError(
                f"the parameters {list(layout.names)[:4]} share a block and lie in layers that different processes "
                "keep; use placement='replicated'"
            )

    def decide(self, nbytes: int, device: torch.device) -> None:
        """Of ``"auto"``: ``"owned"`` where blocks of so many bytes take more than an eighth of the memory of a
        ``device``, on any process.
        """
        large = self.team.exchange("placement", nbytes * SHARE > memory_of(device))
        self.placement = "owned" if any(large) else "replicated"


def memory_of(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cost(shape: tuple[int, ...]) -> float:
    """About proportional to the time that decomposing the factors of a parameter takes."""
    size = torch.Size(shape).numel()
    if len(shape) < 2 or not size:
        return float(OVERHEAD)
    return OVERHEAD + float(shape[0]) ** 3 + (size / shape[0]) ** 3
