"""One row for every output: what is centred over examples, where any square root of a metric will not do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nngeom.core import linalg
from nngeom.core.errors import SizeError
from nngeom.cotangents.fisher import fitted
from nngeom.cotangents.likelihood import Likelihood, as_columns
from nngeom.cotangents.loss import judged
from nngeom.cotangents.per_example import OUTPUT_LIMIT, Loss
from nngeom.sweep.columns import Columns


@dataclass(frozen=True)
class ByOutput:
    """The columns of the square root of a metric of outputs that belong to one output each.

    ``sqrt(p_y) (e_y - p)`` of class ``y`` for softmaxes, so that rows are ``sqrt(p_y)`` times the score of that class;
    the root of the diagonal for independent outputs; of a metric that defines no ``root_times``, its symmetric root.
    """

    of: Likelihood | Loss

    def columns(self, outputs: Tensor, batch: Any, start: int) -> Columns:
        """One cotangent an output, positions included."""
        judge: Likelihood | Loss
        if isinstance(self.of, Likelihood):
            judge, y = fitted(self.of, outputs, batch)
        else:
            judge, y = judged(self.of, outputs, batch)
        if type(judge).root_times in (Likelihood.root_times, Loss.root_times):
            return _symmetric(as_columns(judge.square_root(outputs, y)), outputs)
        n, width = outputs.shape[0], outputs[0].numel()

        def make(lo: int, hi: int) -> Tensor:
            return judge.root_times(outputs, _units(outputs, n, lo, hi), y)

        return Columns(width, make)


def _units(outputs: Tensor, n: int, lo: int, hi: int) -> Callable[..., Tensor]:
    """In place of noise: of every example the unit vectors ``lo .. hi - 1``."""

    def units(*size: int) -> Tensor:
        r = outputs.new_zeros(hi - lo, n, torch.Size(size).numel())
        k = torch.arange(hi - lo, device=r.device)
        r[k, :, k + lo] = 1
        return r.view(hi - lo, n, *size)

    return units


def _symmetric(root: Columns, outputs: Tensor) -> Columns:
    """The symmetric square root of ``sum_k v_k v_k^T``, which is the same for any root ``v``."""
    width = outputs[0].numel()
    if width > OUTPUT_LIMIT:
        raise SizeError(
            f"the outputs have {width} numbers an example; rows by output of a metric without a root_times take {width}"
            f" x {width} an example, the limit is {OUTPUT_LIMIT}: define root_times(outputs, noise, targets)"
        )
    v = root.make(0, root.count).flatten(2).double().permute(1, 2, 0)  # [n c k]
    values, u = linalg.eigh(v @ v.mT)
    roots = (u * values.clamp_min(0).sqrt().unsqueeze(1)) @ u.mT  # [n c c]
    rows = roots.permute(2, 0, 1).to(outputs)
    return Columns(width, lambda lo, hi: rows[lo:hi].reshape(hi - lo, *outputs.shape))
