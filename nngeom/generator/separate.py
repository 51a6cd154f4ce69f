"""Whether a model treats the examples of a batch separately: else no per-example derivative exists."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nngeom.core.errors import CoverageError
from nngeom.generator.task import Batch, Task, gradients_on, take

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}


def require_separate(task: Task, batch: Batch, outputs: Tensor) -> None:
    """Run the first example alone; where its outputs change, raise :class:`CoverageError`.

    A change is not proof: a table with as many rows as the batch has examples was cut too. Where the inputs are real
    numbers the proof is a gradient of the first output in another example's input.
    """
    n = outputs.shape[0]
    if n == 1:
        return
    try:
        with torch.no_grad():
            alone = task.run(take(batch, slice(0, 1), n))
    except Exception:  # a model that cannot run on one example of this batch says nothing either way
        return
    tolerance = _TOLERANCE.get(outputs.dtype, 0.1)
    close = torch.allclose(alone, outputs[:1], rtol=tolerance, atol=tolerance * float(outputs.abs().max())) if alone.shape == outputs[:1].shape else True
    if close or _inputs_are_separate(task, batch, n):
        return
    raise CoverageError(
        "the model mixes the examples of a batch: the outputs of the first example change when it is run alone; per-example derivatives "
        "do not exist then, so expected a model that treats examples separately (check=False skips this test)"
    )


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
