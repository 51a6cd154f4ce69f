"""Whether the rows of captured uses are autograd's: random gradients put in at the uses, pulled back to the
parameters.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.linalg import vector_norm

from nngeom.capture.graph import operation
from nngeom.capture.network import Network
from nngeom.capture.recorder import Capture
from nngeom.capture.remedies import gradients as gradients_of
from nngeom.core.layout import Layout
from nngeom.core.totals import totals
from nngeom.core.whole import like
from nngeom.pullback.backward import dense
from nngeom.pullback.use_groups import UseGroup

COMPARED = {torch.float64: 1e-7, torch.float32: 2e-3}  # of one operation, in its own dtype


@torch.no_grad()
def compare(
    network: Network, capture: Capture, groups: list[UseGroup], *, keep_inputs: bool
) -> tuple[set[str], set[str]]:
    """Parameters of units that were compared with autograd's gradient, and those whose rows are not autograd's.

    ``keep_inputs``: what was read of the groups is asked for again, of all of them at once.

    Random gradients are put in at the uses and pulled back to their parameters: an adapter is right when what it makes
    of gradients is what autograd makes of them. Parameters of one use are compared by themselves, where nothing else
    has to be pulled back; others together. A parameter whose gradient is below the rounding of what was added up for
    it, or not finite, was not compared.
    """
    times = Counter(slot.name for recorded in capture.uses for slot in recorded.use.slots)
    alone: list[UseGroup] = []
    together: list[UseGroup] = []
    for group in groups:
        once = len(group.uses) == 1 and all(times[name] == 1 for name in group.layout.names)
        (alone if once else together).append(group)
    compared, wrong = set[str](), set[str]()
    for some in [*([group] for group in alone), *([together] if together else [])]:
        gradients, expected = _pulled(network, capture, some)
        for group in some:
            dtype = gradients[group.uses[0][0]].dtype
            total = totals(group.jacobian(gradients, capture.outputs.shape[0]))[0]
            for name, got in _by_name(group.layout, total, network.collection.offsets()).items():
                seen = _agrees(got, expected[name], dtype, functools.partial(_rounding, group, gradients))
                if seen is False:
                    wrong.add(name)
                elif seen:
                    compared.add(name)
            if not keep_inputs or dtype != capture.outputs.dtype:
                group.inputs.clear()
    return compared, wrong


def _pulled(
    network: Network, capture: Capture, groups: list[UseGroup]
) -> tuple[dict[int, Tensor], dict[str, Tensor | None]]:
    """``{use: [1, *out]}``, the gradients that arrive when random ones are put in at all uses, and those of the
    parameters.
    """
    indices = sorted({j for group in groups for j, _, _ in group.uses})
    parameters = {name: capture.leaves.tensors[name] for group in groups for name in group.layout.names}
    edges: list[Any] = [capture.uses[j].edge for j in indices]
    v = [_random(j, capture.uses[j].shape, edge).to(capture.outputs.device) for j, edge in zip(indices, edges)]
    owners = [capture.leaves.tensors[capture.uses[j].use.slots[0].name] for j in indices]
    within = [] if len(edges) == 1 else edges  # those of later uses arrive at earlier ones
    beside = [e for edge in edges for e in _needed(edge.node)]
    asked = [*within, *parameters.values(), *beside]
    given = [like(x, owner) for x, owner in zip(v, owners)]
    pulled = gradients_of(edges, asked, given, retain_graph=True)[: len(asked) - len(beside)]
    arrived = map(dense, pulled[: len(within)]) if within else v
    gradients = {j: g.unsqueeze(0) for j, g in zip(indices, arrived) if g is not None}
    return gradients, {name: dense(g) for name, g in zip(parameters, pulled[len(within) :])}


def _needed(node: Any) -> list[GradientEdge]:
    """What must be asked for with the parameters of an operation: without its input, a group norm of channels-last
    tensors ends the process (torch 2.13, CPU).
    """
    following, number = node.next_functions[0] if operation(node) == "NativeGroupNorm" else (None, 0)
    return [] if following is None else [GradientEdge(following, number)]


PERIOD = 65_521  # a prime: random numbers repeat behind so many, with a period that no axis has


@functools.cache
def _pool(dtype: torch.dtype) -> Tensor:
    return torch.randn(PERIOD + 1024, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def _random(seed: int, sizes: torch.Size, edge: Any) -> Tensor:
    """Random numbers in the dtype of an edge, others for another ``seed``."""
    start, period = 37 * seed % 1024, min(sizes.numel(), PERIOD)
    drawn = _pool(edge.node._input_metadata[edge.output_nr].dtype)[start : start + period]
    return (drawn.repeat(-(-sizes.numel() // period)) if period else drawn)[: sizes.numel()].view(sizes)


def _agrees(got: Tensor, expected: Tensor | None, dtype: torch.dtype, rounding: Callable[[], float]) -> bool | None:
    """Whether a sum of rows, which is overwritten, is autograd's gradient; ``None`` where that is below the
    ``rounding`` of the sum, or not finite: of such inputs nothing follows for others.

    Where both agree in most digits of float32 or float64 they are not rounding, whose digits are random: how large that
    may be is not asked for then.
    """
    length, off = 0.0, got
    if expected is not None:
        length = float(vector_norm(expected, dtype=torch.promote_types(expected.dtype, got.dtype)))
        off = got.sub_(expected.flatten())
    error, allowed = float(vector_norm(off)), COMPARED.get(dtype, 0.1) * length
    if dtype in COMPARED and error <= allowed and length > 0:
        return True
    if not math.isfinite(length):
        return None
    noise = rounding()
    if not error <= allowed + noise:
        return False
    return True if length > noise else None


def _rounding(group: UseGroup, gradients: dict[int, Tensor]) -> float:
    """That of the sum of the rows of a group."""
    eps = torch.finfo(gradients[group.uses[0][0]].dtype).eps
    return 20 * eps * sum(float(_size(group, j, gradients[j])) for j, _, _ in group.uses)


def _size(group: UseGroup, j: int, g: Tensor) -> Tensor:
    """A bound of the sum of the products of gradients and inputs of a use."""
    a = group.inputs.get(j)
    most = a.norm() if a is not None and a.is_floating_point() else g.new_tensor(float(g.numel())).sqrt()
    return g.norm() * most.to(g)


def _by_name(layout: Layout, rows: Tensor, offsets: dict[str, tuple[int, tuple[int, ...]]]) -> dict[str, Tensor]:
    """Entries ``[s, o, i]`` of a block, each parameter's in its own order."""
    parts, column = {}, 0
    for piece in layout.pieces:
        i = piece.arrangement.sizes[2]
        flat = piece.arrangement.write(rows[..., column : column + i])
        column += i
        for name in piece.names:
            lo, shape = offsets[name]
            parts[name] = flat[lo - piece.offset : lo - piece.offset + torch.Size(shape).numel()]
    return parts
