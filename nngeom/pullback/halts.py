"""Where a backward pass can be halted: gradients of all outputs at some layers, then at the next, never at all of them.

A *halt* is an edge of the autograd graph that everything behind it is reached through, as the stream between two
blocks of a network. Cotangents are pulled back from halt to halt, all of them over one stretch before the next
begins. Within a stretch, uses that lie behind no product with parameters are reached at little cost; these are pulled
back to first, in a turn of their own, and what they need is free before the rest.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge

from nngeom.capture.recorded import Recorded

Key = tuple[Any, int]  # a node of the graph, and which of its outputs


@dataclass
class Stage:
    """From the halt before (or the outputs) to the halt ``end``: uses by their index, in turns."""

    turns: list[list[int]]
    end: GradientEdge | None = None

    @property
    def uses(self) -> list[int]:
        """All of them."""
        return [j for turn in self.turns for j in turn]


def stages(outputs: Tensor, uses: Sequence[Recorded], sizes: Sequence[int], most: int) -> list[Stage]:
    """Stages that hold at most ``most`` bytes where the graph allows it, ``sizes`` bytes of each use; neighbours of
    less are one.
    """
    whole = Stage([list(range(len(uses)))])
    if sum(sizes) <= most or outputs.grad_fn is None:
        return [whole]
    merged: list[Stage] = []
    first: list[set[int]] = []
    for stage, nearest in _stretches(outputs, uses):
        if merged and sum(sizes[j] for j in merged[-1].uses + stage.uses) <= most:
            merged[-1] = Stage([merged[-1].uses + stage.uses], stage.end)
        else:
            merged.append(stage)
            first.append(nearest)
    if sorted(j for stage in merged for j in stage.uses) != whole.uses:  # a use that the outputs do not depend on
        return [whole]
    for stage, nearest in zip(merged, first):
        if sum(sizes[j] for j in stage.uses) > most:
            turns = [[j for j in stage.uses if j in nearest], [j for j in stage.uses if j not in nearest]]
            stage.turns = [turn for turn in turns if turn]
    return merged


def _stretches(outputs: Tensor, uses: Sequence[Recorded]) -> Iterator[tuple[Stage, set[int]]]:
    """The graph cut at every halt: stages of one turn, and which of their uses lie behind no product."""
    order = _consumers_first(outputs.grad_fn)
    used: dict[Any, list[int]] = {}
    for j, use in enumerate(uses):
        used.setdefault(use.edge.node, []).append(j)
    goes_on: dict[Any, bool] = {}  # whether there is a use behind a node
    for node in reversed(order):
        goes_on[node] = any(f in used or goes_on[f] for f, _ in node.next_functions if f is not None)
    ahead: set[Key] = {(outputs.grad_fn, outputs.output_nr)}
    behind: set[Any] = set()  # nodes behind a product that is in this stretch or starts it
    found: list[int] = []
    nearest: set[int] = set()
    for node in order:
        if node not in used and not goes_on[node]:
            continue
        here = used.get(node, [])
        found += here
        if node not in behind:
            nearest |= set(here)
        if len(ahead) == 1 and goes_on[node] and node is not outputs.grad_fn and found:
            yield Stage([found], GradientEdge(*next(iter(ahead)))), nearest
            found, nearest, behind = [], set(), set()
        ahead = {key for key in ahead if key[0] is not node}
        for following, number in node.next_functions:
            if following is not None and (following in used or goes_on[following]):
                ahead.add((following, number))
                if node in behind or any(not uses[j].use.elementwise for j in here):
                    behind.add(following)
    if found:
        yield Stage([found]), nearest


def _consumers_first(root: Any) -> list[Any]:
    """All nodes, each after those that use its outputs; the latest of the forward pass first."""
    waiting: dict[Any, int] = {root: 0}
    nodes = [root]
    for node in nodes:
        for following, _ in node.next_functions:
            if following is not None:
                if following not in waiting:
                    waiting[following] = 0
                    nodes.append(following)
                waiting[following] += 1
    place = {node: j for j, node in enumerate(nodes)}
    ready = [(-root._sequence_nr(), 0)]
    order = []
    while ready:
        node = nodes[heapq.heappop(ready)[1]]
        order.append(node)
        for following, _ in node.next_functions:
            if following is not None:
                waiting[following] -= 1
                if not waiting[following]:
                    heapq.heappush(ready, (-following._sequence_nr(), place[following]))
    return order
