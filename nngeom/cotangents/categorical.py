"""Categorical labels, with positions: classification, segmentation, tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nngeom.core.errors import ArgumentTypeError, OutputError
from nngeom.core.given_plainly import described
from nngeom.core.output_metric import OutputMetric
from nngeom.cotangents import softmax
from nngeom.cotangents.likelihood import Likelihood
from nngeom.cotangents.output_metrics import SoftmaxMetric
from nngeom.cotangents.softmax import Labels, wide
from nngeom.sweep.columns import Columns


class Categorical(Likelihood):
    """Outputs are logits; axis ``dim`` holds the classes, every other axis but the first is a position.

    ``dim=1`` for segmentation ``(n, c, h, w)``, ``dim=-1`` for tokens ``(n, t, V)``. Without ``dim`` it is the axis
    that labels ``(n, *positions)`` lack; where there are no labels, or two axes would do, it must be said. Positions
    whose target is ``ignore_index`` count for nothing; targets that are no label a position are not looked at.
    """

    def __init__(self, dim: int | None = None, ignore_index: int = -100) -> None:
        if dim is not None and (isinstance(dim, bool) or not isinstance(dim, int)):
            raise ArgumentTypeError(f"dim is {described(dim)}; expected the axis of the classes, or None")
        self.dim, self.ignore_index = dim, ignore_index

    def fit(self, outputs: Tensor, targets: Any = None) -> Categorical:
        if self.dim is not None or outputs.ndim == 2:
            return self
        shape = targets.shape if isinstance(targets, Tensor) else None
        lacking = [j for j in range(1, outputs.ndim) if shape == (*outputs.shape[:j], *outputs.shape[j + 1 :])]
        if len(lacking) == 1:
            return Categorical(lacking[0], self.ignore_index)
        given = "no targets" if shape is None else f"targets {tuple(shape)}"
        raise OutputError(
            f"outputs have shape {tuple(outputs.shape)} with {given}; say which axis holds the classes, the others "
            "are positions: Categorical(dim=1) or "
            "CrossEntropy(dim=1) for (n, c, ...), dim=-1 for (n, ..., c); for tokens (n, t, V) that predict the next "
            "one CausalLM()"
        )

    def _axis(self, outputs: Tensor) -> int:
        dim = 1 if self.dim is None else self.dim
        axis = dim if dim >= 0 else outputs.ndim + dim
        if not 1 <= axis < outputs.ndim:
            raise OutputError(
                f"Categorical(dim={self.dim}) does not fit outputs of shape {tuple(outputs.shape)}; expected an axis "
                "of classes behind the examples"
            )
        return axis

    def check(self, outputs: Tensor, targets: Any = None) -> None:
        axis = self._axis(outputs)
        if outputs.shape[axis] < 2:
            raise OutputError(
                f"a categorical likelihood needs at least two classes, outputs have shape {tuple(outputs.shape)} "
                f"with {outputs.shape[axis]} along axis {axis}; "
                "use likelihood='bernoulli' or loss='bce' for one logit"
            )

    def rows(self, outputs: Tensor) -> Tensor:
        """``[n * positions, c]``: the ``outputs (n, *shape)``, a row a position."""
        return outputs.movedim(self._axis(outputs), -1).flatten(0, -2)

    def _positions(self, outputs: Tensor) -> list[int]:
        axis = self._axis(outputs)
        return [size for j, size in enumerate(outputs.shape) if j not in (0, axis)]

    def unmove(self, v: Tensor, outputs: Tensor) -> Tensor:
        """``v [*b, n * positions, c]`` back to ``[*b, *outputs.shape]``, the axes of ``outputs``."""
        if outputs.ndim == 2:
            return v
        sizes = (*v.shape[:-2], outputs.shape[0], *self._positions(outputs), v.shape[-1])
        return v.reshape(sizes).movedim(-1, v.ndim - 2 + self._axis(outputs))

    def labels(self, outputs: Tensor, targets: Any) -> Tensor | None:
        """One class a position of ``outputs``, ``[n * positions]`` int64, if that is what ``targets`` are, whole
        numbers of any type; else ``None``.
        """
        size = outputs.numel() // outputs.shape[self._axis(outputs)]
        if (
            not isinstance(targets, Tensor)
            or targets.is_complex()
            or targets.numel() != size
            or targets.shape[:1] != outputs.shape[:1]
        ):
            return None
        if targets.is_floating_point() and not bool((targets == targets.round()).all()):
            return None
        return targets.reshape(size).long()

    def counted(self, outputs: Tensor, targets: Any) -> Tensor | None:
        """``[n * positions]`` of ``outputs``: 0 where ``targets`` are ``ignore_index``; ``None`` where nothing is
        ignored.
        """
        y = self.labels(outputs, targets)
        if y is None:
            return None
        keep = y != self.ignore_index
        return None if bool(keep.all()) else keep.to(outputs.dtype)

    def square_root(self, outputs: Tensor, targets: Any = None) -> Columns:
        """``c - 1`` columns a position, ``v_j = sqrt(p_j q_{j+1} / q_j) (e_j - p / q_{j+1} on l > j)``, and
        ``q_j = sum_{l >= j} p_l``.

        The closed-form Cholesky factor of ``diag(p) - p p^T`` (Tanabe & Sagae 1992): products and sums of positive
        numbers, nothing cancels. Positions of ``outputs`` whose entry of ``targets`` is ignored have zeros. Made some
        columns at a time; nothing has ``c`` by ``c`` numbers unless that is asked for.
        """
        axis = self._axis(outputs)
        n, c = outputs.shape[0], outputs.shape[axis]
        z = outputs.movedim(axis, -1).reshape(n, -1, c)
        positions, counted = z.shape[1], self.counted(outputs, targets)
        keep = None if counted is None else counted.view(n, positions)
        dtype = torch.float32 if outputs.dtype in (torch.float16, torch.bfloat16) else outputs.dtype

        def parts(position: int, lo: int, hi: int) -> tuple[Tensor, Tensor, Tensor]:
            """``p [n, c]``, and of some columns the entries on the diagonal ``[n, k]`` and what ``p`` is multiplied
            by behind it ``[n, k, 1]``.
            """
            p = softmax.probabilities(z.select(1, position))
            q = p.flip(-1).cumsum(-1).flip(-1)
            inverse = q.clamp_min(4 * torch.finfo(p.dtype).tiny).reciprocal()  # finite: below, columns are as small
            own, behind = (lo, hi - lo), (lo + 1, hi - lo)
            size = (p.narrow(1, *own) * q.narrow(1, *behind) * inverse.narrow(1, *own)).sqrt()
            if keep is not None:
                size = size * keep[:, position, None]
            return p, size, (size * inverse.narrow(1, *behind)).neg().unsqueeze(-1)

        def at(position: int, lo: int, hi: int, v: Tensor) -> None:
            p, size, slope = parts(position, lo, hi)
            group = max(1, softmax.NUMBERS // (n * c))
            for first in range(0, hi - lo, group):
                last = min(first + group, hi - lo)
                v[first:last] = (p.unsqueeze(1) * slope[:, first:last]).triu_(lo + first + 1).transpose(0, 1)
            v.diagonal(lo, 0, 2).copy_(size)

        def make(lo: int, hi: int) -> Tensor:
            if positions == 1 and (hi - lo) * n * c <= softmax.NUMBERS:
                p, size, slope = parts(0, lo, hi)
                v = (p * slope.transpose(0, 1)).mul_(_behind(lo, hi, c, p.dtype, p.device))
                v.diagonal(lo, 0, 2).copy_(size)
                return self.unmove(v, outputs).to(outputs.dtype)
            v = z.new_zeros(hi - lo, n, positions, c, dtype=dtype)
            for position in range(lo // (c - 1), (hi - 1) // (c - 1) + 1):
                first, last = max(lo, position * (c - 1)), min(hi, (position + 1) * (c - 1))
                at(
                    position,
                    first - position * (c - 1),
                    last - position * (c - 1),
                    v[first - lo : last - lo, :, position],
                )
            return self.unmove(v.flatten(1, 2), outputs).to(outputs.dtype)

        return Columns(positions * (c - 1), make)

    def metric(self, outputs: Tensor, targets: Any = None) -> OutputMetric | None:
        if type(self).square_root is not Categorical.square_root or self._axis(outputs) != outputs.ndim - 1:
            return None
        return SoftmaxMetric(self.rows(outputs), self.counted(outputs, targets))

    def root_times(self, outputs: Tensor, noise: Callable[..., Tensor], targets: Any = None) -> Tensor:
        """``sqrt(p) r - p <sqrt(p), r>`` at every position: the root ``diag(sqrt(p)) - p sqrt(p)^T`` of ``c``
        columns, never formed.

        ``outputs (n, *shape)``; ``noise(*size)`` gives ``r (k, n, *size)``; positions that ``targets`` ignore have
        zeros.
        """
        z, counted = self.rows(outputs), self.counted(outputs, targets)
        r = noise(len(z) // outputs.shape[0], z.shape[-1])
        v = [softmax.root_times(z, one.reshape(z.shape), counted) for one in r]
        return self.unmove(torch.stack(v), outputs)

    def sample(self, outputs: Tensor, uniform: Callable[..., Tensor]) -> Tensor:
        z = self.rows(outputs)
        u = uniform(len(z) // outputs.shape[0]).reshape(len(z), 1)

        def some(part: slice) -> Tensor:
            cumulative = wide(z[part]).softmax(-1).cumsum(-1)
            drawn = torch.searchsorted(cumulative, u[part].to(cumulative) * cumulative[:, -1:], right=True)
            return drawn.squeeze(-1).clamp_max(z.shape[-1] - 1)

        return softmax.in_rows(z, some).view(outputs.shape[0], -1)

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        z = self.rows(outputs)
        return (
            -softmax.cross_entropy(z, Labels(self._required(outputs, targets), None, 0.0, self.ignore_index))
            .view(outputs.shape[0], -1)
            .sum(1)
        )

    def score(self, outputs: Tensor, labels: Tensor, targets: Any = None) -> Tensor:
        """``d log p(labels | outputs) / d outputs``: ``labels`` are drawn ones, so that ``ignore_index`` among them is
        a class; positions of ``outputs`` whose entry of ``targets`` it is count for nothing.
        """
        y, counted = self._required(outputs, labels).clamp_min(-1), self.counted(outputs, targets)
        y = y if counted is None else y.masked_fill(counted == 0, -1)
        return -self.unmove(softmax.residual(self.rows(outputs), Labels(y, None, 0.0, -1)), outputs)

    def fisher_times(self, outputs: Tensor, tangent: Tensor, targets: Any = None) -> Tensor:
        return self.unmove(
            softmax.times(self.rows(outputs), self.rows(tangent), self.counted(outputs, targets)), outputs
        )

    def _required(self, outputs: Tensor, labels: Any) -> Tensor:
        y = self.labels(outputs, labels)
        if y is None:
            given = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise OutputError(
                f"labels are {given}; expected a whole number a position, "
                f"{(outputs.shape[0], *self._positions(outputs))}, "
                f"for outputs {tuple(outputs.shape)} with classes on axis {self._axis(outputs)}"
            )
        return y


@functools.lru_cache(8)
def _behind(lo: int, hi: int, c: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[k, 1, c]``: ones where a class comes behind that of the column, ``lo`` to ``hi``."""
    with torch.inference_mode(mode=False):  # it is kept for later calls
        return torch.ones(hi - lo, c, dtype=dtype, device=device).triu(lo + 1).unsqueeze(1)
