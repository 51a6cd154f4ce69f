"""Whether a model treats the examples of a batch separately, and the same way every time: parts of it against the
whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nngeom.capture.batch import rows
from nngeom.capture.network import Batch, Network, gradients_on, take
from nngeom.capture.recorder import Capture
from nngeom.core.errors import CoverageError, ModeError, OutputError
from nngeom.pullback.added_up import AddedUp

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}  # parts of a float64 model may compute in float32
_GOLDEN = 0.5 * (5**0.5 - 1)  # its multiples fall into no pattern
CHANGES = (
    "the model changes from one call to the next, on the same batch: it draws random numbers, keeps a state, or writes "
    "into its inputs, so a measure of it would be random; call model.eval(), fix what it draws, or work on copies"
)
MIXES = (
    "the model mixes the examples of a batch: the outputs of some change with the inputs of others, which leaves no "
    "derivatives of their own; expected a model that treats examples separately. A batch that is one example, such as "
    "the nodes of a graph, is passed as one: x.unsqueeze(0) with function=lambda x: model(x[0]).unsqueeze(0). Tensors "
    "with a row for each example are taken for theirs, but for what function= closes over. check=False skips this test"
)


def require_separate(
    network: Network,
    batch: Batch,
    outputs: Tensor,
    parts: Sequence[list[int]] = (),
    *,
    placed: bool = True,
    capture: Capture | None = None,
) -> bool:
    """Raise :class:`CoverageError` where outputs depend on the inputs of other examples.

    A part of the batch (default: each of two interleaved halves) run by itself must have the outputs that it has in the
    batch. Other outputs alone are no proof, as constants may depend on an example's place or on their number: then all
    are asked with the inputs of others in their places. So are they where the graph does not tell where examples lie
    (``placed``), or the model does not run on parts; then it must give the same on the whole again, too.

    A factor of zero, of a gate or a branch that is to be trained, hides others in the outputs, and not in its gradient:
    with the ``capture`` of the batch, gradients are asked as outputs are. Returns whether they could tell.
    """
    sums = None if capture is None else AddedUp(capture)
    whole = _require_outputs(network, batch, outputs.detach(), parts, sums, placed=placed)
    if sums is None:
        return True
    if not (whole and sums.are_of(outputs, sums.capture.leaves.tensors.values())):
        sums = _require_own_gradients(sums.capture)
    return sums.answered


def _require_outputs(
    network: Network,
    batch: Batch,
    outputs: Tensor,
    parts: Sequence[list[int]],
    sums: AddedUp | None,
    *,
    placed: bool,
) -> bool:
    """What outputs tell; gradients of the parts are added to ``sums``. Returns whether parts give what the whole
    does.
    """
    n, whole = outputs.shape[0], True
    for part in parts or interleaved(n):
        try:
            with gradients_on():
                given = take(batch, part, n) if n > 1 else batch
                alone, leaves = (network.run(given), []) if sums is None else sums.capture.leaves.of_a_run(given)
        except Exception:
            _require_axis(batch, outputs)
            _require_same(network, batch, outputs)
            _require_own(network, batch, outputs)
            return False
        within = rows(outputs, part)
        fits = alone.shape == within.shape
        if fits and not same_outputs(alone.detach(), within, outputs):
            _require_same(network, batch, outputs)
            _require_own(network, batch, outputs, runs=True)
            return False
        whole = whole and fits
        if sums is not None and whole:
            sums.add(alone, leaves, part)
    if not placed:
        _require_own(network, batch, outputs)
    return whole


def interleaved(n: int) -> list[list[int]]:
    """Two halves of ``n`` places, neither of which holds whole pairs or groups of the usual kinds alone: neighbours,
    opposites, a shift or a stride apart, or with some binary digits exchanged (six places and more).
    """
    scattered = [_GOLDEN * j % 1 for j in range(n)]
    side = [(j.bit_count() + (n > 5 and scattered[j] >= 0.5)) % 2 for j in range(n)]
    order = sorted(range(n), key=lambda j: (side[j], scattered[j]))
    return [sorted(half) for half in (order[: n // 2], order[n // 2 :]) if half]


def _require_own(network: Network, batch: Batch, outputs: Tensor, *, runs: bool = False) -> None:
    """Raise :class:`CoverageError` where outputs change with the inputs of others, in their places; with ``runs`` also
    where the model does not run then.

    For every two examples there is a run in which one is there, and the other has given way to one that is there.
    """
    n = len(outputs)
    for digit in range((n - 1).bit_length()):
        for side in (0, 1):
            kept = [j for j in range(n) if (j >> digit) % 2 == side]
            instead = [j if (j >> digit) % 2 == side else kept[j % len(kept)] for j in range(n)]
            try:
                with gradients_on():
                    others = network.run(take(batch, instead, n)).detach()
            except Exception:
                if runs:
                    raise CoverageError(MIXES) from None
                return
            if others.shape == outputs.shape and not same_outputs(others[kept], outputs[kept], outputs):
                raise CoverageError(MIXES)


def _require_same(network: Network, batch: Batch, outputs: Tensor) -> None:
    """Raise :class:`ModeError` where the batch has other outputs now."""
    with gradients_on():
        again = network.run(batch).detach()
    if not same_outputs(again, outputs, outputs):
        raise ModeError(CHANGES)


def answers(outputs: Tensor) -> bool:
    """Whether outputs could show what examples have to do with each other: not where all are the same, as of a head of
    zeros.
    """
    outputs = outputs.detach() if len(outputs) > 1 else outputs.detach().flatten()
    return not same_outputs(outputs, outputs[:1].expand_as(outputs), outputs)


def _require_own_gradients(capture: Capture) -> AddedUp:
    """Raise :class:`CoverageError` where gradients of outputs change with the inputs of others, in their places, or
    :class:`ModeError` where those of the batch are others now; returns these.
    """
    n = capture.outputs.shape[0]
    again = AddedUp(capture)
    with gradients_on():
        again.add(*capture.leaves.of_a_run(capture.batch))
        if not again.are_of(
            *capture.leaves.of_a_run(capture.batch)
        ):  # a graph may be changed by its first backward pass
            raise ModeError(CHANGES)
    for kept in interleaved(n) if n > 1 else ():
        instead = [j if j in set(kept) else kept[j % len(kept)] for j in range(n)]
        try:
            with gradients_on():
                others, leaves = capture.leaves.of_a_run(take(capture.batch, instead, n))
        except Exception:
            break
        if others.shape == capture.outputs.shape:
            own = AddedUp(capture, kept)
            own.add(others, leaves)
            with gradients_on():
                if not own.are_of(*capture.leaves.of_a_run(capture.batch)):
                    raise CoverageError(MIXES)
    return again


def parts_make_the_whole(network: Network, capture: Capture, parts: Sequence[Batch], *, gradients: bool) -> bool | None:
    """Whether the parts of a batch, one after the other, have its outputs, and with ``gradients`` its gradient of a
    random combination of them: where a factor is zero, outputs do not show what parts lack. ``None`` where a part does
    not run.
    """
    lo, whole = 0, capture.outputs.detach()
    sums = AddedUp(capture) if gradients else None
    for part in parts:
        try:
            with gradients_on():
                out, leaves = capture.leaves.of_a_run(part)
        except Exception:  # a model for one size of batch
            return None
        if lo + len(out) > len(whole) or out.shape[1:] != whole.shape[1:]:
            return None
        hi = lo + out.shape[0]
        if not same_outputs(out.detach(), whole[lo:hi], whole):
            return False
        if sums is not None:
            sums.add(out, leaves, slice(lo, hi))
        lo = hi
    return sums is None or sums.are_of(capture.outputs, capture.leaves.tensors.values())


def _require_axis(batch: Batch, outputs: Tensor) -> None:
    """Raise where the batch looks like one example without an axis of examples."""
    x = _first_tensor(batch)
    if outputs.shape == (len(outputs), 1) and x is not None and x.ndim == 1 and x.is_floating_point():
        raise OutputError(
            f"the batch holds inputs of shape {tuple(x.shape)}, of which the model cannot run a part: it looks "
            "like one example without an axis "
            "of examples; expected (n, ...): pass x.unsqueeze(0), or a DataLoader with batch_size=1"
        )


def same_outputs(part: Tensor, expected: Tensor, whole: Tensor) -> bool:
    """Whether some examples run by themselves gave what they gave in the batch, whose outputs are ``whole``."""
    tolerance = _TOLERANCE.get(whole.dtype, 0.1)
    most = float(whole.abs().nan_to_num(posinf=0.0).max()) if whole.numel() else 0.0
    return part.shape == expected.shape and torch.allclose(
        part, expected, rtol=tolerance, atol=tolerance * most, equal_nan=True
    )


def _first_tensor(batch: Batch) -> Tensor | None:
    """The first tensor of a batch, however deep."""
    if isinstance(batch, Tensor):
        return batch
    items = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (tuple, list)) else ()
    return next((x for x in map(_first_tensor, items) if x is not None), None)
