"""How linear a training run has been: activation signs, tangent kernel and representation compared with the start."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nngeom.capture.network import Network, as_batches, take
from nngeom.core.errors import ArgumentError, StructureError
from nngeom.linearized.expansion import Expansion, Refusing
from nngeom.linearized.watch import Watch
from nngeom.measures.kernels import GramMatrix
from nngeom.ranks.team import Team
from nngeom.ranks.totals import gathered
from nngeom.space.collection import LayerCollection


@dataclass(frozen=True)
class Linearity:
    """Three measures in [0, 1] (representations of mixed signs included: Gram matrices are positive); all 1 at the
    start.

    ``sign_similarity``, ``kernel_alignment``, ``representation_alignment``: see :func:`linearity`. ``units``: the
    number of (example, unit) pairs behind ``sign_similarity``, 0 for a network without ReLU-like activations, of which
    ``sign_similarity`` raises :class:`ArgumentError`. An alignment is NaN where a kernel or a representation is zero.
    """

    kernel_alignment: float
    representation_alignment: float
    units: int
    _signs: float | str  # or what the model has instead of ReLU-like activations

    @property
    def sign_similarity(self) -> float:
        """The share of pairs whose state is the same."""
        if isinstance(self._signs, str):
            raise ArgumentError(
                "sign_similarity is of the states of ReLU-like activations, and none was called; the model has "
                f"{self._signs}: see .kernel_alignment and .representation_alignment, and .units == 0 beforehand"
            )
        return self._signs


def linearity(
    model: nn.Module,
    reference: nn.Module | None,
    loader: Any,
    *,
    layer: str | None = None,
    function: Callable[..., Tensor] | None = None,
    layer_collection: LayerCollection | None = None,
    process_group: Any = None,
) -> Linearity:
    """Compare a model in training with ``reference``, a copy from the start of the run, on the examples of ``loader``.

    ``sign_similarity``: share of (example, unit) pairs of all ReLU-like activations whose state, input > 0, is the
    same. ``kernel_alignment``: ``<K, K0> / |K| |K0|``, uncentred, of the tangent kernels (``nc x nc``: pass a few
    hundred examples). ``representation_alignment``: the same of the Gram matrices ``(n, n)`` of the inputs of the last
    linear map with parameters, or of the module named ``layer``. A :class:`Scaled` or :class:`Linearized` model stands
    for the network inside it, and its start may be given as ``reference=None``. With a ``process_group`` of the
    examples of all processes, whose kernels are whole on each. Other arguments as in ``GramMatrix``.

    Raises :class:`ArgumentError` for a missing reference, :class:`StructureError` where the layer is not found or the
    models differ. Source: George 2023, thesis, section 5.2.
    """
    if reference is None:
        if not isinstance(model, Expansion):
            raise ArgumentError(
                f"reference is None and model is {type(model).__name__}; expected a copy of the model from the "
                "start of the run"
            )
        reference = model.reference()
    now, start = _network(model), _network(reference)
    team, kept = Team.of(process_group), list[Tensor]()
    with team.together("linearity") as note:
        batches = list(as_batches(loader))
        collection = layer_collection or LayerCollection.from_model(now)
        if batches or team.size == 1:
            same, count, kept = _forward(now, start, batches, layer, function, collection)
            note.mine = same, count
    signs, units = (sum(said[j] for said in note.all if said is not None) for j in (0, 1))
    device = next(now.parameters()).device
    representations = [
        gathered(team, "representations", lambda j=j: kept[j] if kept else None, device)  # type: ignore[misc]
        for j in (0, 1)
    ]
    kernels = [
        GramMatrix(m, batches, function=function, layer_collection=collection, process_group=process_group)
        for m in (now, start)
    ]
    return Linearity(
        _cosine(*(k.to_dense().double() for k in kernels)),
        _cosine(*(r @ r.T for r in representations)),
        units,
        signs / units if units else _leaves(now),
    )


def _leaves(model: nn.Module) -> str:
    return ", ".join(sorted({type(m).__name__ for m in model.modules() if next(m.children(), None) is None}))


def _network(model: nn.Module) -> nn.Module:
    return model.model if isinstance(model, Expansion) else model


def _forward(now, start, batches, layer, function, collection) -> tuple[int, int, list[Tensor]]:
    """Equal signs, their number, and the representations ``(n, p)`` of both models."""
    same, units = 0, 0
    networks = [Network.build(m, function, collection) for m in (now, start)]
    kept: list[list[Tensor]] = [[], []]
    pairs = zip(*(network.batches(batches) for network in networks))
    for pair in pairs:
        watched = [_watched(network, batch, layer) for network, batch in zip(networks, pair)]
        masks, others = (watch.signs for watch in watched)
        if [m.shape for m in masks] != [m.shape for m in others]:
            raise StructureError(
                f"model and reference call different activations ({len(masks)} and {len(others)}); expected two "
                "copies of one model"
            )
        for mask, other in zip(masks, others):
            same += int((mask == other.to(mask.device)).sum())
            units += mask.numel()
        for rows, watch in zip(kept, watched):
            rows.append(watch.representation())
    return same, units, [torch.cat(rows).double() for rows in kept]


def _watched(network: Network, batch: Any, layer: str | None) -> Watch:
    watch = _run(network, batch, layer)
    if len(watch.axes) > 1:  # as many positions or features as examples: a pass with one of these twice tells
        watch.compare(_run(network, take(batch, [*range(watch.examples), 0], watch.examples), layer))
    return watch


def _run(network: Network, batch: Any, layer: str | None) -> Watch:
    watch = Watch(network.model, layer)
    with torch.no_grad(), watch, Refusing():
        watch.examples = network.run(batch).shape[0]
    return watch


def _cosine(k: Tensor, l: Tensor) -> float:
    l = l.to(k.device)
    scale = k.norm() * l.norm()
    return float((k * l).sum() / scale) if scale > 0 else math.nan
