"""Whether the captured rows are those of autograd, and whether a model treats the examples of a batch separately.

Both are asked of a few examples of the batch run by themselves, which costs little: their outputs must be those in the
batch, and their rows must add up to autograd's gradients. That the rows of the whole batch belong to the examples they
are said to belong to is proved elsewhere (:mod:`nngeom.generator.axes`). Where a few examples cannot stand for the batch
(a model for one batch size, a table with a row an example) the whole batch is compared.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nngeom.core.errors import CoverageError, OutputError
from nngeom.core.jacobian import LayerJacobian
from nngeom.core.layout import Layout
from nngeom.generator.backward import dense
from nngeom.generator.capture import Capture, capture
from nngeom.generator.task import Batch, Task, gradients_on, take
from nngeom.generator.units import Unit

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}


def spread(n: int) -> list[int]:
    """A few of ``n`` examples, the first and the last among them; one of few."""
    k = max(1, min(3, n // 2))
    return [0] if k == 1 else [j * (n - 1) // (k - 1) for j in range(k)]


def few(task: Task, seen: Capture, index: list[int]) -> Capture | None:
    """The examples ``index`` of a captured batch run by themselves; ``None`` where they tell nothing about the batch.

    Raises :class:`CoverageError` where the model mixes examples. Other outputs are no proof of that: a table with as many
    rows as the batch has examples was cut too. Where the inputs are real numbers the proof is a gradient of the first
    output in another example's input.
    """
    outputs, n = seen.outputs.detach(), seen.outputs.shape[0]
    if n == 1:
        return None
    try:
        alone = capture(task, take(seen.batch, index, n))
    except Exception:  # a model that cannot run on a part of this batch says nothing either way
        x = _first_tensor(seen.batch)
        if outputs.shape == (n, 1) and x is not None and x.ndim == 1 and x.is_floating_point():
            raise OutputError(
                f"the batch holds inputs of shape {tuple(x.shape)}, of which the model cannot run a part: it looks like one example without an axis "
                "of examples; expected (n, ...): pass x.unsqueeze(0), or a DataLoader with batch_size=1"
            ) from None
        return None
    got = alone.outputs.detach()
    if got.shape != outputs[index].shape:
        return None
    if same_outputs(got, outputs[index], outputs):
        return alone
    if _inputs_are_separate(task, seen.batch, n):
        return None
    raise CoverageError(
        "the model mixes the examples of a batch: the outputs of some change when they are run without the others; per-example derivatives "
        "do not exist then, so expected a model that treats examples separately (check=False skips this test)"
    )


def same_outputs(part: Tensor, expected: Tensor, whole: Tensor) -> bool:
    """Whether some examples run by themselves gave what they gave in the batch, whose outputs are ``whole``."""
    tolerance = _TOLERANCE.get(whole.dtype, 0.1)
    return part.shape == expected.shape and torch.allclose(part, expected, rtol=tolerance, atol=tolerance * float(whole.abs().max()))


def _first_tensor(batch: Batch) -> Tensor | None:
    """The first tensor of a batch, however deep."""
    if isinstance(batch, Tensor):
        return batch
    items = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (tuple, list)) else ()
    return next((x for x in map(_first_tensor, items) if x is not None), None)


def _inputs_are_separate(task: Task, batch: Batch, n: int) -> bool:
    """Whether the first output has no gradient in the inputs of the others; ``False`` where inputs are not real numbers."""
    inputs: list[Tensor] = []

    def watch(x: Any) -> Any:
        if isinstance(x, Tensor):
            if x.is_floating_point() and x.ndim and x.shape[0] == n:
                inputs.append(x.detach().requires_grad_())
                return inputs[-1]
            return x
        if isinstance(x, dict):
            return {key: watch(v) for key, v in x.items()}
        return type(x)(watch(v) for v in x) if type(x) in (tuple, list) else x

    with gradients_on():
        watched = watch(batch)
        if not inputs:
            return False
        grads = torch.autograd.grad(task.run(watched)[0].sum(), inputs, allow_unused=True)
    return all(g is None or not bool(g[1:].any()) for g in grads)


def align(small: Capture, seen: Capture) -> bool:
    """Leave in ``small`` the uses that are left in ``seen``; ``False`` where the two passes used parameters differently."""
    at = {use.place: use for use in small.uses}
    small.uses = [at[use.place] for use in seen.uses if use.place in at]
    for ours, theirs in zip(small.uses, seen.uses):
        ours.weight, ours.bias = ours.weight if theirs.weight else None, ours.bias if theirs.bias else None
        if ours.operation != theirs.operation or ours.slots != theirs.slots or len(ours.lead) != len(theirs.lead):
            return False
    return len(small.uses) == len(seen.uses) and small.unstructured == seen.unstructured


def mismatches(task: Task, seen: Capture, units: list[Unit], jacobians: dict[Layout, LayerJacobian], v: Tensor) -> list[str]:
    """Parameters of units whose ``sum u[k, n] J[k, n]`` is not autograd's gradient of ``sum u v f``, ``u`` random."""
    collection = task.collection
    u = torch.randn(v.shape[:2], generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(seen.outputs)
    v = v.to(seen.outputs.dtype)
    combined = (u.view(*u.shape, *[1] * (v.ndim - 2)) * v).sum(0)
    names = [name for unit in units for name in unit.layout.names]
    parameters = [task.parameters[name] for name in names]
    grads = torch.autograd.grad(seen.outputs, parameters, combined, retain_graph=True, allow_unused=True) if names else []
    expected = [dense(g) for g in grads]
    got: dict[str, Tensor] = {}
    for unit in units:
        jacobian = jacobians[unit.layout]
        got |= _by_name(unit.layout, jacobian.vjp(u.to(jacobian.dtype)).detach(), collection.offsets())
    norms = [g.new_zeros(()) if e is None else e.norm().to(g.dtype) for g, e in zip(got.values(), expected)]
    scale = max(float(norm) for norm in norms) if any(e is not None for e in expected) else max((float(g.norm()) for g in got.values()), default=0.0)
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-2}.get(seen.outputs.dtype, 0.1)
    noise = min(200 * torch.finfo(seen.outputs.dtype).eps, 1e-2) * scale  # of gradients that cancel, as of attention's key bias
    wrong = []
    for name, e, norm in zip(names, expected, norms):
        if e is not None:
            got[name] -= e.flatten()
        if not bool(got[name].norm() <= tolerance * norm + noise):
            wrong.append(name)
    return wrong


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
