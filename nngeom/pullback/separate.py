"""Whether a model treats the examples of a batch separately, and the same way every time: parts of it against the
whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nngeom.capture.network import Batch, Network, gradients_on, take
from nngeom.capture.recorder import Capture
from nngeom.capture.remedies import gradients as gradients_of
from nngeom.core.draws import factors, outer
from nngeom.core.errors import CoverageError, ModeError, OutputError
from nngeom.pullback.axes import weights
from nngeom.pullback.backward import dense

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}  # parts of a float64 model may compute in float32
CHANGES = (
    "the model changes from one call to the next, on the same batch: it draws random numbers or keeps a "
    "state, so a measure of "
    "it would be random; call model.eval(), or fix what it draws"
)
ADDED_UP = {torch.float64: 1e-5, torch.float32: 2e-3}  # of a model, parts of which may compute in float32
MIXES = (
    "the model mixes the examples of a batch: the outputs of some change when they are run without the "
    "others; per-example "
    "derivatives do not exist then, so expected a model that treats examples separately (check=False skips this test)"
)


def require_separate(network: Network, batch: Batch, outputs: Tensor, parts: Sequence[tuple[int, int]] = ()) -> bool:
    """Raise :class:`CoverageError` where a part of the batch (default: each half) run by itself has other outputs than
    in it; whether the parts do run.

    Other outputs alone are no proof: a table with as many rows as the batch has examples was cut too. Where the inputs
    are real numbers, gradients of outputs in the inputs of other examples are. Of a model that does not run on a half
    is asked only that it gives the same on the whole again.
    """
    outputs, n = outputs.detach(), outputs.shape[0]
    for lo, hi in parts or ([(0, n)] if n == 1 else [(0, n // 2), (n // 2, n)]):
        try:
            with gradients_on():
                alone = network.run(take(batch, slice(lo, hi), n) if n > 1 else batch).detach()
        except Exception:
            _require_axis(batch, outputs)
            _require_same(network, batch, outputs)
            return False
        if alone.shape == outputs[lo:hi].shape and not same_outputs(alone, outputs[lo:hi], outputs):
            _require_same(network, batch, outputs)
            if n > 1 and not inputs_are_separate(network, batch, n):
                raise CoverageError(MIXES)
    return True


def require_separate_inputs(network: Network, batch: Batch, outputs: Tensor) -> None:
    """Raise :class:`CoverageError` where an output has a gradient in the inputs of another example: mixed within a
    half, they are there in a run of it too. Where inputs have none, every second example is run without the others.
    """
    if len(outputs) > 1:
        apart = inputs_are_separate(network, batch, len(outputs))
        if apart is False or (apart is None and not _second_are_separate(network, batch, outputs.detach())):
            raise CoverageError(MIXES)


def _second_are_separate(network: Network, batch: Batch, outputs: Tensor) -> bool:
    """Whether every second example has the same outputs without the others, or does not run without them."""
    n = len(outputs)
    for places in (list(range(first, n, 2)) for first in (0, 1)):
        try:
            with gradients_on():
                alone = network.run(take(batch, places, n)).detach()
        except Exception:
            return True
        if alone.shape == outputs[places].shape and not same_outputs(alone, outputs[places], outputs):
            return False
    return True


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


def require_separate_gradients(network: Network, capture: Capture) -> None:
    """As :func:`require_separate`, of the gradients of the parameters."""
    n = capture.outputs.shape[0]
    if parts_make_the_whole(network, capture, [capture.batch], gradients=True) is False:
        raise ModeError(CHANGES)
    halves = [take(capture.batch, slice(lo, hi), n) for lo, hi in ((0, n // 2), (n // 2, n))]
    if n > 1 and parts_make_the_whole(network, capture, halves, gradients=True) is False:
        raise CoverageError(MIXES)


def parts_make_the_whole(network: Network, capture: Capture, parts: Sequence[Batch], *, gradients: bool) -> bool | None:
    """Whether the parts of a batch, one after the other, have its outputs, and with ``gradients`` its gradient of a
    random combination of them: where a factor is zero, outputs do not show what parts lack. ``None`` where a part does
    not run.
    """
    whole, lo = capture.outputs.detach(), 0
    parameters = list(capture.leaves.tensors.values())
    v = outer(factors(whole.shape, torch.Generator().manual_seed(8), whole))
    total = [torch.zeros(p.shape, dtype=p.dtype, device=p.device) for p in parameters] if gradients else []
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
        if gradients:
            _add(total, gradients_of(out, leaves, v[lo:hi]))
        lo = hi
    if not gradients:
        return True
    for p, g in zip(total, gradients_of(capture.outputs, parameters, v, retain_graph=True)):
        size = p.norm()
        _add([p], [None if g is None else -g])
        if bool(p.norm() > ADDED_UP.get(whole.dtype, 0.1) * size):
            return False
    return True


def _add(total: list[Tensor], gradients: Sequence[Tensor | None]) -> None:
    for p, g in zip(total, map(dense, gradients)):
        if g is not None:
            p += g


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


def inputs_are_separate(network: Network, batch: Batch, n: int) -> bool | None:
    """Whether no output has a gradient in the inputs of another example; ``None`` where inputs are not real numbers,
    or cannot be differentiated by.
    """
    inputs: list[Tensor] = []

    def watch(x: Any) -> Any:
        if isinstance(x, Tensor):
            if x.is_floating_point() and not x.is_nested and x.ndim and x.shape[0] == n:
                inputs.append(x.detach().requires_grad_())
                return inputs[-1]
            return x
        if isinstance(x, dict):
            return {key: watch(v) for key, v in x.items()}
        return type(x)(watch(v) for v in x) if type(x) in (tuple, list) else x

    with gradients_on():
        watched = watch(batch)
        try:
            return _pulled_apart(lambda: network.run(watched), inputs, n) if inputs else None
        except Exception:  # inputs that are written in place or read as arrays, operations without a derivative, ...
            return None


def _pulled_apart(run: Callable[[], Tensor], inputs: list[Tensor], n: int) -> bool:
    """Whether the gradient of every example is multiplied by the weight of its outputs, drawn for each by itself.

    Each gradient is of a ``run`` of its own: functions that users wrote may change what they saved.
    """
    outputs, generator = run(), torch.Generator().manual_seed(5)
    v = outer(factors(outputs.shape, generator, outputs.detach()))
    plain = _in_inputs(outputs, inputs, v)
    for weight in weights(n, outputs, generator):
        across = (-1, *[1] * (v.ndim - 1))
        for g, h in zip(plain, _in_inputs(run(), inputs, v * weight.view(across))):
            expected = g * weight.to(g).view(-1, *[1] * (g.ndim - 1))
            if not torch.allclose(h, expected, rtol=_TOLERANCE.get(h.dtype, 0.1), atol=0.0):
                return False
    return True


def _in_inputs(outputs: Tensor, inputs: list[Tensor], v: Tensor) -> list[Tensor]:
    grads = torch.autograd.grad(outputs, inputs, v, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs)]
