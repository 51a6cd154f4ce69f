"""Categorical labels, with positions: classification, segmentation, tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nngeom.core.errors import OutputError
from nngeom.generator.sweep import Columns
from nngeom.metrics.likelihood import Likelihood


class Categorical(Likelihood):
    """Outputs are logits; axis ``dim`` holds the classes, every other axis but the first is a position.

    ``dim=1`` for segmentation ``(n, c, h, w)``, ``dim=-1`` for tokens ``(n, t, V)``. Without ``dim`` it is the axis that
    labels ``(n, *positions)`` lack; where there are no labels, or two axes would do, it must be said. Positions whose
    target is ``ignore_index`` count for nothing.
    """

    def __init__(self, dim: int | None = None, ignore_index: int = -100):
        self.dim, self.ignore_index = dim, ignore_index

    def fit(self, outputs, targets=None):
        if self.dim is not None or outputs.ndim == 2:
            return self
        shape = targets.shape if isinstance(targets, Tensor) else None
        lacking = [j for j in range(1, outputs.ndim) if shape == (*outputs.shape[:j], *outputs.shape[j + 1 :])]
        if len(lacking) == 1:
            return Categorical(lacking[0], self.ignore_index)
        given = "no targets" if shape is None else f"targets {tuple(shape)}"
        raise OutputError(
            f"outputs have shape {tuple(outputs.shape)} with {given}; say which axis holds the classes, the others are positions: "
            "Categorical(dim=1) or CrossEntropy(dim=1) for (n, c, ...), dim=-1 for (n, ..., c)"
        )

    def _axis(self, outputs: Tensor) -> int:
        dim = 1 if self.dim is None else self.dim
        axis = dim if dim >= 0 else outputs.ndim + dim
        if not 1 <= axis < outputs.ndim:
            raise OutputError(
                f"Categorical(dim={self.dim}) does not fit outputs of shape {tuple(outputs.shape)}; expected an axis of classes behind the examples"
            )
        return axis

    def check(self, outputs, targets=None):
        axis = self._axis(outputs)
        if outputs.shape[axis] < 2:
            raise OutputError(
                f"a categorical likelihood needs at least two classes, outputs have shape {tuple(outputs.shape)} with {outputs.shape[axis]} along axis {axis}; "
                "use likelihood='bernoulli' for one logit"
            )
        if isinstance(targets, Tensor) and not targets.is_floating_point():
            positions = (*outputs.shape[:axis], *outputs.shape[axis + 1 :])
            if targets.shape != positions and targets.numel() == torch.Size(positions).numel() == outputs.shape[0]:
                return
            if outputs.ndim > 2 and targets.shape != positions:
                raise OutputError(
                    f"targets have shape {tuple(targets.shape)} but outputs {tuple(outputs.shape)} with classes on axis {axis} have positions {positions}; "
                    "say which axis holds the classes: likelihood=Categorical(dim=...)"
                )

    @staticmethod
    def labels(targets: Tensor) -> Tensor:
        """Labels of any integer type as int64, in which ``ignore_index`` is itself."""
        return targets.long()

    def logits(self, outputs: Tensor) -> Tensor:
        """``[n, positions, c]``."""
        return outputs.movedim(self._axis(outputs), -1).flatten(1, -2) if outputs.ndim > 2 else outputs.unsqueeze(1)

    def unmove(self, v: Tensor, outputs: Tensor) -> Tensor:
        """``[*b, n, positions, c]`` back to ``[*b, *outputs.shape]``."""
        axis = self._axis(outputs)
        positions = [size for j, size in enumerate(outputs.shape) if j not in (0, axis)]
        b = v.shape[:-3]
        return v.reshape(*b, outputs.shape[0], *positions, outputs.shape[axis]).movedim(-1, len(b) + axis)

    def mask(self, outputs: Tensor, targets: Any) -> Tensor | None:
        """``[n, positions]``: 0 where the target is ``ignore_index``; ``None`` where nothing is ignored."""
        if not isinstance(targets, Tensor) or targets.is_floating_point():
            return None
        n, p = self.logits(outputs).shape[:2]
        if targets.numel() != n * p:
            return None
        keep = self.labels(targets).reshape(n, p) != self.ignore_index
        return None if bool(keep.all()) else keep.to(outputs)

    def square_root(self, outputs, targets=None):
        """``c - 1`` columns a position, ``v_j = sqrt(p_j q_{j+1} / q_j) (e_j - p / q_{j+1} on l > j)``, ``q_j = sum_{l >= j} p_l``.

        The closed-form Cholesky factor of ``diag(p) - p p^T`` (Tanabe & Sagae 1992), in logarithms, so that saturated
        probabilities neither overflow nor divide by zero.
        """
        wide = torch.float32 if outputs.dtype in (torch.float16, torch.bfloat16) else outputs.dtype
        logp = F.log_softmax(self.logits(outputs).to(wide), -1)
        logq = logp.flip(-1).logcumsumexp(-1).flip(-1)
        mask = self.mask(outputs, targets)
        n, positions, c = logp.shape
        above = torch.ones(c, c, dtype=torch.bool, device=outputs.device).triu(1)

        def at(position: int, lo: int, hi: int) -> Tensor:
            p, q = logp[:, position], logq[:, position]
            size = (0.5 * (p[:, lo:hi] + q[:, lo + 1 : hi + 1] - q[:, lo:hi])).exp().T  # [k n]
            v = -(p[None] - q[:, lo + 1 : hi + 1].T.unsqueeze(-1)).masked_fill(~above[lo:hi, None], -torch.inf).exp()
            column = torch.arange(lo, hi, device=v.device)
            v[column - lo, :, column] = 1
            if mask is not None:
                size = size * mask[:, position]
            return v * size.unsqueeze(-1)

        def make(lo: int, hi: int) -> Tensor:
            v = logp.new_zeros(hi - lo, n, positions, c)
            for position in range(lo // (c - 1), (hi - 1) // (c - 1) + 1):
                first, last = max(lo, position * (c - 1)), min(hi, (position + 1) * (c - 1))
                v[first - lo : last - lo, :, position] = at(position, first - position * (c - 1), last - position * (c - 1))
            return self.unmove(v, outputs).to(outputs.dtype)

        return Columns(positions * (c - 1), make)

    def root_times(self, outputs, noise, targets=None):
        """``sqrt(p) r - p <sqrt(p), r>`` at every position: the root ``diag(sqrt(p)) - p sqrt(p)^T`` of ``c`` columns, never formed."""
        wide = torch.float32 if outputs.dtype in (torch.float16, torch.bfloat16) else outputs.dtype
        logp = F.log_softmax(self.logits(outputs).to(wide), -1)
        v = (0.5 * logp).exp() * noise(*logp.shape[1:]).to(wide)
        v = v - logp.exp() * v.sum(-1, keepdim=True)
        mask = self.mask(outputs, targets)
        return self.unmove(v if mask is None else v * mask.unsqueeze(-1), outputs).to(outputs.dtype)

    def sample(self, outputs, uniform):
        logits = self.logits(outputs)
        cumulative = logits.double().softmax(-1).cumsum(-1)
        u = uniform(logits.shape[1]).to(cumulative) * cumulative[..., -1]
        return torch.searchsorted(cumulative, u.unsqueeze(-1), right=True).squeeze(-1).clamp_max(logits.shape[-1] - 1)

    def log_prob(self, outputs, targets):
        logp = F.log_softmax(self.logits(outputs), -1)
        y = self.labels(targets).reshape(logp.shape[:2])
        keep = y != self.ignore_index
        return (logp.gather(-1, y.where(keep, torch.zeros_like(y)).unsqueeze(-1)).squeeze(-1) * keep).sum(1)

    def score(self, outputs, labels, targets=None):
        p = self.logits(outputs).softmax(-1)
        v = -p
        v.scatter_add_(-1, labels.reshape(*p.shape[:2], 1), torch.ones_like(p[..., :1]))
        mask = self.mask(outputs, targets)
        return self.unmove(v if mask is None else v * mask.unsqueeze(-1), outputs)

    def fisher_times(self, outputs, tangent, targets=None):
        p, x = self.logits(outputs).softmax(-1), self.logits(tangent)
        v = p * x - p * (p * x).sum(-1, keepdim=True)
        mask = self.mask(outputs, targets)
        return self.unmove(v if mask is None else v * mask.unsqueeze(-1), outputs)
