"""Causal language models: the logits of a token are compared with the label of the next one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nngeom.capture.network import targets as targets_in
from nngeom.core.errors import ArgumentError, OutputError
from nngeom.core.output_metric import OutputMetric
from nngeom.cotangents.categorical import Categorical
from nngeom.cotangents.cross_entropy import CrossEntropy
from nngeom.cotangents.language_models import is_causal_lm, shifts_labels
from nngeom.cotangents.likelihood import Likelihood
from nngeom.cotangents.output_metrics import SoftmaxMetric
from nngeom.cotangents.per_example import Loss
from nngeom.sweep.columns import Columns


class CausalLM(Likelihood, Loss):
    """The next token of a sequence: a likelihood (``FIM``, ``FIM_MonteCarlo``) and a loss (``EmpiricalFIM``, ``GGN``,
    ``Hessian``, ...).

    Logits ``f (n, t, V)``, labels ``y (n, t)``, the tokens themselves: ``f[i, s]`` is compared with ``y[i, s + 1]``.
    Counted are the positions ``P_i`` with ``s < t - 1`` whose ``y[i, s + 1]`` is not ``ignore_index``; in a dict
    batch with an ``"attention_mask"`` ``(n, t)`` those, besides, whose token ``s + 1`` it does not mask (the mask of
    token ``s`` itself, of padding on the left, plays no part). All others, and the last, have no cotangent. The
    log-likelihood of a sequence is

        sum_{s in P_i} log softmax(f[i, s])[y[i, s + 1]]

    and the loss its negative, with ``reduction="mean"`` divided by ``|P_i|`` (zero where nothing is counted). The
    loss of ``transformers`` for a batch is the mean of those of its sequences with weights ``|P_i|``. Labels are
    needed by losses only; without them a likelihood counts every position that predicts an unmasked token.
    ``logits_are_shifted=True``: ``f[i, s]`` belongs to ``y[i, s]`` for labels ``(n, t)`` that were shifted before, or
    to ``y[i, s + 1]`` for labels ``(n, t + 1)``, where the function of the outputs has left the last logits out; the
    mask is that of the tokens, as above.

    Raises :class:`OutputError` where shapes do not fit, :class:`ArgumentError` on another ``reduction``, and for
    ``"mean"`` as a likelihood: the mean over positions is none.
    """

    def __init__(self, ignore_index: int = -100, logits_are_shifted: bool = False, reduction: str = "sum") -> None:
        if reduction not in ("sum", "mean"):
            raise ArgumentError(
                f"reduction is {reduction!r}; expected 'sum' or 'mean' over the counted positions of a sequence"
            )
        self.ignore_index, self.logits_are_shifted, self.reduction = ignore_index, logits_are_shifted, reduction
        self.categorical, self.cross_entropy = (
            Categorical(-1, ignore_index),
            CrossEntropy(ignore_index=ignore_index, dim=-1),
        )

    # -- what is compared with what ------------------------------------------------------------------------------------

    def targets_of(self, outputs: Tensor, batch: Any) -> Any:
        """Labels of a ``batch`` in which tokens that its attention mask leaves out are ignored; without labels, zeros
        for those that count, a token of ``outputs (n, t, V)`` each.
        """
        y = targets_in(batch)
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if not isinstance(mask, Tensor) or mask.ndim != 2 or outputs.ndim != 3:
            return y
        t = outputs.shape[1]
        y = torch.zeros(len(outputs), t, dtype=torch.long, device=outputs.device) if y is None else y
        if not isinstance(y, Tensor) or y.ndim != 2 or len(y) != len(mask):
            return y
        if mask.shape[1] < y.shape[1]:
            raise OutputError(
                f"the attention mask has shape {tuple(mask.shape)} and labels {tuple(y.shape)}; expected a mask "
                "entry for every token"
            )
        before = self.logits_are_shifted and y.shape[1] == t == mask.shape[1]  # labels of the tokens from the second on
        keep = torch.cat([mask[:, 1:], torch.ones_like(mask[:, :1])], 1) if before else mask[:, -y.shape[1] :]
        return y.masked_fill(keep == 0, self.ignore_index)

    def aligned(self, outputs: Tensor, targets: Any) -> Tensor:
        """The label among ``targets`` that each position's logits are compared with, ``(n, t)`` for ``outputs (n, t,
        V)``, ``ignore_index`` where there is none.
        """
        if outputs.ndim != 3:
            raise OutputError(
                f"outputs have shape {tuple(outputs.shape)}; CausalLM expects logits (n, t, V), a position a token"
            )
        n, t, _ = outputs.shape
        if t < 2 and not self.logits_are_shifted:
            raise OutputError(
                f"outputs have shape {tuple(outputs.shape)}: a sequence of one token predicts nothing; expected at "
                "least two"
            )
        y = torch.zeros(n, t, dtype=torch.long, device=outputs.device) if targets is None else targets
        fits = (t, t + 1) if self.logits_are_shifted else (t,)
        if not isinstance(y, Tensor) or y.ndim != 2 or len(y) != n or y.shape[1] not in fits:
            given = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise OutputError(
                f"labels are {given} for logits {tuple(outputs.shape)}; expected "
                f"{' or '.join(str((n, size)) for size in fits)}, a label a token: "
                "logits_are_shifted=True is for logits without the last position, or labels shifted before"
            )
        if y.shape[1] > t:
            return y[:, 1:]
        return y if self.logits_are_shifted else torch.cat([y[:, 1:], torch.full_like(y[:, :1], self.ignore_index)], 1)

    def check(self, outputs: Tensor, targets: Any = None) -> None:
        self.aligned(outputs, targets)
        self.categorical.check(outputs)

    def _shares(self, outputs: Tensor, y: Tensor) -> Tensor | None:
        """``1 / |P_i|``, to be broadcast to the outputs; ``None`` for the sum."""
        if self.reduction == "sum":
            return None
        counted = (y != self.ignore_index).sum(1)
        return torch.where(counted > 0, 1 / counted, 0).to(outputs.dtype).view(-1, 1, 1)

    # -- as a loss -----------------------------------------------------------------------------------------------------

    def __call__(self, outputs: Tensor, targets: Any) -> Tensor:
        y = self.aligned(outputs, targets)
        value, shares = self.cross_entropy(outputs, y), self._shares(outputs, y)
        return value if shares is None else value * shares.view(-1)

    def gradient(self, outputs: Tensor, targets: Any) -> Tensor:
        y = self.aligned(outputs, targets)
        return _shared(self.cross_entropy.gradient(outputs, y), self._shares(outputs, y))

    def times(self, outputs: Tensor, tangent: Tensor, targets: Any) -> Tensor:
        y = self.aligned(outputs, targets)
        return _shared(self.cross_entropy.times(outputs, tangent, y), self._shares(outputs, y))

    # -- as either -----------------------------------------------------------------------------------------------------

    def square_root(self, outputs: Tensor, targets: Any = None) -> Columns:
        """The categorical root at every position of ``outputs`` but those that ``targets`` ignore, and, unless the
        logits are shifted, the last.
        """
        y = self.aligned(outputs, targets)
        columns, shares = self.categorical.square_root(outputs, y), self._shares(outputs, y)
        t, c = outputs.shape[1:]
        count = columns.count if self.logits_are_shifted else (t - 1) * (c - 1)
        return Columns(count, columns.make if shares is None else lambda lo, hi: columns.make(lo, hi) * shares.sqrt())

    def metric(self, outputs: Tensor, targets: Any = None) -> OutputMetric | None:
        if type(self).square_root is not CausalLM.square_root:
            return None
        y = self.aligned(outputs, targets)
        z, counted = self.categorical.rows(outputs), self.categorical.counted(outputs, y)
        shares = self._shares(outputs, y)
        if shares is None:
            return SoftmaxMetric(z, counted)
        share = shares.view(-1, 1).expand(outputs.shape[:2]).flatten()
        return SoftmaxMetric(z, share if counted is None else share * counted)

    def root_times(self, outputs: Tensor, noise: Callable[..., Tensor], targets: Any = None) -> Tensor:
        y = self.aligned(outputs, targets)
        shares = self._shares(outputs, y)
        return _shared(self.categorical.root_times(outputs, noise, y), None if shares is None else shares.sqrt())

    # -- as a likelihood -----------------------------------------------------------------------------------------------

    def fisher_times(self, outputs: Tensor, tangent: Tensor, targets: Any = None) -> Tensor:
        return self.categorical.fisher_times(outputs, tangent, self.aligned(outputs, targets))

    def sample(self, outputs: Tensor, uniform: Callable[..., Tensor]) -> Tensor:
        """Labels of tokens as in a batch, ``(n, t)`` for ``outputs (n, t, V)``, by ``uniform``; nothing is drawn for
        the first, which nothing predicts.
        """
        drawn = self.categorical.sample(outputs, uniform)
        return drawn if self.logits_are_shifted else drawn.roll(1, 1)

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.categorical.log_prob(outputs, self.aligned(outputs, targets))

    def score(self, outputs: Tensor, labels: Tensor, targets: Any = None) -> Tensor:
        drawn = labels if self.logits_are_shifted else labels.roll(-1, 1)
        return self.categorical.score(outputs, drawn, self.aligned(outputs, targets))


def _shared(x: Tensor, shares: Tensor | None) -> Tensor:
    return x if shares is None else x * shares


def by_name(plain: Any, model: nn.Module | None) -> Any:
    """What the name of a likelihood or loss means for a model: ``plain``, but for classes of a causal language
    model.
    """
    classes = isinstance(plain, (Categorical, CrossEntropy)) and model is not None and is_causal_lm(model)
    return CausalByName(model, plain) if classes and model is not None else plain


class CausalByName(CausalLM):
    """What ``"categorical"`` and ``"cross_entropy"`` mean for a causal language model: :class:`CausalLM` where that
    is known, else an error.

    Known it is for a dict batch with labels and a model whose own loss shifts them. Outputs ``(n, c)`` are ``plain``
    classes.
    """

    def __init__(self, model: nn.Module, plain: Categorical | CrossEntropy) -> None:
        super().__init__()
        self.model, self.plain = model, plain

    def resolved(self, outputs: Tensor, batch: Any) -> Any:
        if outputs.ndim != 3:
            return self.plain
        if isinstance(batch, Mapping) and batch.get("labels") is not None and shifts_labels(self.model):
            return CausalLM()
        kind = type(self.plain).__name__
        raise OutputError(
            f"the model is a {type(self.model).__name__}, which is or holds a causal language model, and its outputs "
            f"{tuple(outputs.shape)} may be compared with the label of "
            "the same token or of the next: say CausalLM() for the next, CausalLM(logits_are_shifted=True) for "
            f"labels shifted before, or {kind}(dim=-1) for "
            "the same at all positions (CausalLM() is taken by itself for a dict batch with 'labels' and a model "
            "whose own loss shifts them)"
        )

    def __call__(self, outputs: Tensor, targets: Any) -> Tensor:
        return self.resolved(outputs, {"labels": targets})(outputs, targets)
