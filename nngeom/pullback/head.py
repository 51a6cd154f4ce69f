"""The last use of a pass, where it makes the outputs: a linear map, of whose inputs all other uses are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from nngeom.capture.recorded import Recorded
from nngeom.core.whole import in_parts
from nngeom.pullback.axes import ExampleAxis
from nngeom.pullback.backward import pull_back
from nngeom.pullback.use_groups import UseGroup
from nngeom.pullback.verify import COMPARED

if TYPE_CHECKING:
    from nngeom.pullback.captured_pass import Pass


@dataclass(frozen=True)
class Head:
    """``outputs = h W^T + b`` along the last axis: the use ``index``, alone in its ``group``."""

    index: int
    recorded: Recorded
    group: UseGroup
    entry: GradientEdge  # of h
    weight: Tensor  # W [c w]

    @property
    def width(self) -> int:
        """Features of ``h``."""
        return self.weight.shape[1]

    @property
    def positions(self) -> int:
        """Positions of an example."""
        return torch.Size(self.shape[1:-1]).numel()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of ``h``: ``(n, *positions, w)``."""
        return *self.recorded.shape[:-1], self.width

    def is_proved(self, run: Pass) -> bool:
        """Whether a random cotangent arrives at ``h`` as its product with ``W``; remembered of the graph."""
        if run.proof.head is None:
            outputs = run.capture.outputs
            v = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(12), dtype=torch.float64).to(outputs)
            (arrived,) = pull_back(outputs, [self.entry], [torch.Size(self.shape)], v.unsqueeze(0), retain=True)
            expected = v @ self.weight
            rounding = COMPARED[outputs.dtype] * expected.norm()
            run.proof.head = bool((arrived[0] - expected).norm() <= rounding)
        return run.proof.head


def head_of(run: Pass, wanted: Callable[[int], bool]) -> Head | None:
    """The head of a resolved pass, if it has one whose parameters are used nowhere else, with a ``wanted`` number of
    inputs at all positions of an example.
    """
    outputs, capture = run.capture.outputs, run.capture
    at_end = (outputs.grad_fn, outputs.output_nr)
    found = [j for j, recorded in enumerate(capture.uses) if (recorded.edge.node, recorded.edge.output_nr) == at_end]
    if len(found) != 1 or run.rest or capture.hooked or outputs.dtype not in COMPARED:
        return None
    (index,) = found
    recorded = capture.uses[index]
    use = recorded.use
    if use.weight is None or not wanted(use.weight.arrangement.sizes[2] * math.prod(recorded.shape[1:-1])):
        return None
    groups = [g for g in run.groups if any(j == index for j, _, _ in g.uses)]
    if len(groups) != 1 or recorded.entry is None or recorded.shape != outputs.shape:
        return None
    (group,) = groups
    arrangement = use.weight.arrangement
    whole = len(group.uses) == 1 and group.with_weight and group.arrangements is None
    plain = use.product and use.lead == tuple(outputs.shape[:-1]) and group.uses[0][2] == ExampleAxis(0)
    fits = arrangement.sizes[:2] == (1, outputs.shape[-1]) and not (use.weight.row or use.weight.column)
    if not (whole and plain and fits) or any(run.network.parameters[s.name]._backward_hooks for s in use.slots):
        return None
    parameter = run.network.parameters[use.weight.name]
    if parameter.dtype != outputs.dtype or in_parts(parameter) or run.network.distributed is not None:
        return None
    return Head(index, recorded, group, recorded.entry, arrangement.read(run.network.value(parameter).flatten())[0])
