"""Coherence: how much of the per-example gradients points the same way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nngeom.core.errors import ArgumentError
from nngeom.core.given_plainly import described, require_at_least, require_real, require_real_tensor, require_whole
from nngeom.core.totals import totals
from nngeom.cotangents.loss import EmpiricalFisher, as_loss
from nngeom.fmat.tiles import require_finite
from nngeom.space.collection import LayerCollection
from nngeom.sweep.agreement import agree
from nngeom.sweep.run import Function, Run
from nngeom.sweep.sweep import Policy, Sweep, require_examples


@dataclass(frozen=True)
class Coherence:
    """``alpha = |E g|^2 / E |g|^2`` of ``examples`` gradients, in [0, 1], and ``ratio = m alpha``.

    ``ratio`` is 1 for orthogonal gradients (of any norms) and ``m`` for equal ones. NaN where all gradients are zero.
    ``by_layer``: the same for the gradients of each layer. ``by_batch``: ``alpha`` of each batch by itself.
    """

    alpha: Tensor
    ratio: Tensor
    examples: int
    by_layer: dict[str, Coherence] = field(default_factory=dict)
    by_batch: Tensor | None = None


def coherence(
    model: nn.Module,
    loader: Any,
    loss: Any = "cross_entropy",
    *,
    function: Function = None,
    layer_collection: LayerCollection | None = None,
    memory_budget: int | None = None,
    check: bool = True,
    process_group: Any = None,
) -> Coherence:
    """m-coherence of the per-example loss gradients, whole, by layer and by batch, in one sweep and ``O(d)`` memory.

    ``alpha = E_{z,z'} g.g' / E g.g`` (pairs include ``z = z'``): the part of a step on one example that helps the
    average one. Squared norms come from the factored rows, no ``n x d`` gradients are formed where that is cheaper.

    ``loss``: as for :func:`nngeom.EmpiricalFIM`.

    Raises :class:`LoaderError` without targets, and what the sweep raises. Source: Chatterjee and Zielinski 2020.
    """
    run = Run.of(
        model,
        loader,
        function=function,
        layer_collection=layer_collection,
        memory_budget=memory_budget,
        check=check,
        process_group=process_group,
    )
    cotangents = EmpiricalFisher(as_loss(loss, model))
    agree(run, "coherence", metric=cotangents)
    collection = run.network.collection
    layers = dict.fromkeys(collection.by_layer(), 0.0)
    with run.within(), run.team.together("coherence") as note, torch.no_grad():
        total, batches, count = _summed(Sweep(run, cotangents, Policy("coherence")), layers)
        note.mine = layers, [float(alpha) for alpha in batches], count
    run.team.sum_([total])
    layers = {layer: sum(theirs[layer] for theirs, _, _ in note.all) for layer in layers}
    count = require_examples(sum(n for _, _, n in note.all))
    assembled = _split(collection, total)
    by_layer = {layer: _result(_alpha(v, layers[layer], count), count) for layer, v in assembled.items()}
    whole = _alpha(sum(assembled.values()), sum(layers.values()), count)
    by_batch = total.new_tensor([alpha for _, alphas, _ in note.all for alpha in alphas])
    return Coherence(whole, count * whole, count, by_layer, by_batch)


def _summed(sweep: Sweep, layers: dict[str, float]) -> tuple[Tensor, list[Tensor], int]:
    """The sum of all gradients ``(d,)``, the coherence of each batch, and the number of examples; to ``layers`` their
    squared norms are added.
    """
    network, collection = sweep.run.network, sweep.run.network.collection
    total = torch.zeros(collection.numel, dtype=torch.float64, device=network.device)
    batches, count = [], 0
    for chunk in sweep.chunks():
        some = next(iter(chunk.jacobians.values()))
        sum_g = torch.zeros(collection.numel, dtype=some.dtype, device=some.device)
        batch_squares = 0.0
        for layout, j in chunk.jacobians.items():
            layout.scatter_(sum_g, totals(j)[0])
            squares = float(j.squared_norms().double().sum())
            layers[network.layer_of(layout.names[0])] += squares
            batch_squares += squares
        batches.append(_alpha(sum_g.double().square().sum(), batch_squares, chunk.examples))
        require_finite([sum_g, sum_g.new_tensor(batch_squares, dtype=torch.float64)])
        total += sum_g
        count += chunk.examples
    return total, batches, count


def gradient_coherence(gradients: Tensor) -> Coherence:
    """:func:`coherence` of ``gradients (m, d)`` at hand, one an example; raises :class:`NonFiniteError` on NaN or
    infinity.
    """
    require_real_tensor(gradients, "gradients")
    if gradients.ndim != 2 or gradients.shape[0] == 0:
        raise ArgumentError(f"gradients have shape {tuple(gradients.shape)}; expected (m, d) with at least one row")
    m = gradients.shape[0]
    return _result(_alpha(gradients.sum(0).square().sum(), gradients.square().sum(), m), m)


def coherence_from_batch_gradients(
    gradients: Tensor | Sequence[Tensor], batch_size: int, examples: int | None = None, scheme: str = "partition"
) -> Coherence:
    """The coherence of single examples from the mean ``gradients`` of batches of ``batch_size = k``, ``(batches, d)``
    or a list of them.

    ``scheme="partition"``: the batches partition ``examples = m`` points (default ``batches * k``), and
    ``alpha = a (m - k) / (k (m - 1) - a (k - 1) m)``; ``"iid"``: independent draws, ``alpha = a / (k - (k - 1) a)``,
    with ``a`` the coherence of the batch gradients. The i.i.d. inverse is biased upwards on a partition (on ``m``
    orthogonal gradients it gives a ratio of ``m / (m - k + 1)`` instead of 1). A single batch that is the whole set
    says nothing of single examples: NaN. Raises :class:`ArgumentError`. Source: Chatterjee and Zielinski 2020, theorem
    on batches.
    """
    if scheme not in ("partition", "iid"):
        raise ArgumentError(f"scheme is {scheme!r}; expected 'partition' or 'iid'")
    require_whole(batch_size, "batch_size")
    for x in gradients if isinstance(gradients, (tuple, list)) else [gradients]:
        require_real_tensor(x, "a gradient")
    g: Any = gradients
    if not isinstance(gradients, Tensor) and len({x.numel() for x in gradients}) == 1:
        g = torch.stack([x.flatten() for x in gradients])
    if not isinstance(g, Tensor) or g.ndim != 2 or len(g) == 0:
        raise ArgumentError(
            f"got gradients {described(g)} and batch_size {batch_size}; expected (batches, d) and at least one "
            "example a batch"
        )
    k, m = batch_size, examples if examples is not None else batch_size * len(g)
    require_whole(m, "examples")
    if scheme == "partition" and m < k:
        raise ArgumentError(f"examples is {m} but a batch holds {k}; expected at least one batch")
    a = gradient_coherence(g).alpha
    if k == 1:
        return _result(a, m)
    if scheme == "iid":
        return _result(a / (k - (k - 1) * a), m)
    return _result(a * (m - k) / (k * (m - 1) - a * (k - 1) * m), m)


def batch_coherence(alpha: float | Tensor, batch_size: int, examples: int | None = None) -> Any:
    """The expected coherence of batch means from ``alpha``, that of single examples: i.i.d. draws, or a partition of
    ``examples``.

    ``batch_size``: examples a batch.
    """
    require_whole(batch_size, "batch_size")
    given = alpha if isinstance(alpha, Tensor) else torch.tensor(_number(alpha), dtype=torch.float64)
    require_real_tensor(given, "alpha")
    if examples is not None:
        require_whole(examples, "examples", max(batch_size, 2))
    if bool(((given < 0) | (given > 1)).any()):
        raise ArgumentError(f"alpha is {given.tolist()}; expected a coherence, in [0, 1]")
    k, m = batch_size, examples
    return k * alpha / (1 + (k - 1) * (alpha if m is None else (m * alpha - 1) / (m - 1)))


def _number(alpha: Any) -> float:
    require_real(alpha, "alpha")
    return float(alpha)


def generalization_gap_bound(
    coherences: Sequence[float],
    learning_rates: Sequence[float],
    examples: int,
    lipschitz: float = 1.0,
    smoothness: float = 0.0,
) -> float:
    """``(L^2/m) sum_t [prod_{k>t} (1 + lr_k beta)] lr_t sqrt(2 (1 - alpha_t))``: the expected gap after the given
    steps.

    ``lipschitz`` is ``L``, ``smoothness`` ``beta``, ``examples`` ``m``; ``coherences[t]`` is ``alpha`` before step
    ``t``, ``learning_rates[t]`` its ``lr``. Zero where every coherence is 1. Raises :class:`ArgumentError`. Source:
    Chatterjee and Zielinski 2020, theorem on stability.
    """
    if len(coherences) != len(learning_rates):
        raise ArgumentError(
            f"got {len(coherences)} coherences and {len(learning_rates)} learning rates; expected one of each a step"
        )
    require_whole(examples, "examples")
    for x, what in ((lipschitz, "lipschitz"), (smoothness, "smoothness"), *((lr, "a rate") for lr in learning_rates)):
        require_at_least(x, what)
    if not all(isinstance(alpha, (int, float, Tensor)) and 0 <= alpha <= 1 for alpha in coherences):
        raise ArgumentError(
            f"coherences are {list(coherences)}; expected numbers in [0, 1] (NaN: all gradients were zero, leave "
            "that step out)"
        )
    total, growth = 0.0, 1.0
    for alpha, lr in zip(reversed(coherences), reversed(learning_rates)):
        total += growth * lr * math.sqrt(2 * max(0.0, 1 - alpha))
        growth *= 1 + lr * smoothness
    return lipschitz**2 * total / examples


def _alpha(sum_square: Any, squares: Any, m: int) -> Tensor:
    """``|sum g|^2 / (m sum |g|^2)``."""
    top = sum_square if isinstance(sum_square, Tensor) else torch.tensor(sum_square, dtype=torch.float64)
    bottom = torch.as_tensor(squares, dtype=top.dtype, device=top.device)
    return (top / (m * bottom)).clamp(0, 1) if bool(bottom > 0) else torch.full_like(top, float("nan"))


def _result(alpha: Tensor, m: int) -> Coherence:
    return Coherence(alpha, m * alpha, m)


def _split(collection: LayerCollection, flat: Tensor) -> dict[str, Tensor]:
    """Squared norm of each layer's part of a flat vector."""
    squares: dict[str, Tensor] = {}
    at = 0
    for layer, shape in zip(collection.layers, collection.shapes):
        size = math.prod(shape)
        squares[layer] = squares.get(layer, 0) + flat[at : at + size].square().sum()
        at += size
    return squares
