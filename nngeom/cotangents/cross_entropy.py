"""Softmax cross-entropy, with positions, class weights, label smoothing and probabilities for labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from nngeom.core.errors import ArgumentError, ArgumentTypeError, OutputError
from nngeom.core.given_plainly import described, require_real
from nngeom.core.output_metric import OutputMetric
from nngeom.cotangents import softmax
from nngeom.cotangents.categorical import Categorical
from nngeom.cotangents.likelihood import as_columns
from nngeom.cotangents.output_metrics import SoftmaxMetric
from nngeom.cotangents.per_example import Loss
from nngeom.cotangents.slope import slope
from nngeom.cotangents.softmax import Labels
from nngeom.sweep.columns import Columns


class CrossEntropy(Loss):
    """Softmax cross-entropy, summed over positions; axis ``dim`` of the outputs holds the classes.

    Without ``dim`` it is the axis that labels ``(n, *positions)`` lack; where two would do, it must be said.
    ``weight`` (one number a class), ``label_smoothing`` in [0, 1] and ``ignore_index`` mean what they mean in
    ``torch.nn.functional.cross_entropy`` with ``reduction="none"``. Targets are class labels, whole numbers of any
    type, one a position, or probabilities in the shape of the outputs.

    Raises :class:`ArgumentError` on a smoothing or weight out of range, :class:`OutputError` on targets that do not
    fit.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        dim: int | None = None,
    ):
        require_real(label_smoothing, "label_smoothing")
        if not 0 <= label_smoothing <= 1:
            raise ArgumentError(f"label_smoothing is {label_smoothing}; expected a number in [0, 1]")
        if weight is not None and not isinstance(weight, Tensor):
            raise ArgumentTypeError(f"the class weight is {described(weight)}; expected a tensor, one number a class")
        if weight is not None and not bool((weight >= 0).all()):
            raise ArgumentError(
                "the class weight has entries that are negative or NaN; expected non-negative numbers, one a class"
            )
        self.weight, self.label_smoothing = weight, label_smoothing
        self.categorical = Categorical(dim, ignore_index)

    def __call__(self, outputs: Tensor, targets: Any) -> Tensor:
        z, labels, _ = self._fitted(outputs, targets)
        return softmax.cross_entropy(z, labels).view(outputs.shape[0], -1).sum(1)

    def gradient(self, outputs: Tensor, targets: Any) -> Tensor:
        z, labels, categorical = self._fitted(outputs, targets)
        return categorical.unmove(softmax.residual(z, labels), outputs)

    def slope(self, outputs: Tensor, targets: Any) -> Tensor | None:
        if type(self).__call__ is not CrossEntropy.__call__:
            return None
        z, labels, categorical = self._fitted(outputs, targets)
        return categorical.unmove(slope(z, labels), outputs)

    def square_root(self, outputs: Tensor, targets: Any) -> Columns:
        """The categorical root of ``outputs``, times the root of the total weight of each position's (smoothed) label
        in ``targets``.
        """
        z, labels, categorical = self._fitted(outputs, targets)
        totals, columns = labels.totals(z), as_columns(categorical.square_root(outputs))
        if totals is None:
            return columns
        root = categorical.unmove(totals.sqrt().unsqueeze(-1).expand(z.shape), outputs)
        return Columns(columns.count, lambda lo, hi: columns.make(lo, hi) * root)

    def metric(self, outputs: Tensor, targets: Any) -> OutputMetric | None:
        if type(self).square_root is not CrossEntropy.square_root:
            return None
        z, labels, categorical = self._fitted(outputs, targets)
        plain = categorical.metric(outputs)
        return None if plain is None else SoftmaxMetric(z, labels.totals(z))

    def times(self, outputs: Tensor, tangent: Tensor, targets: Any) -> Tensor:
        z, labels, categorical = self._fitted(outputs, targets)
        return categorical.unmove(softmax.times(z, categorical.rows(tangent), labels.totals(z)), outputs)

    def root_times(self, outputs: Tensor, noise: Callable[..., Tensor], targets: Any) -> Tensor:
        z, labels, categorical = self._fitted(outputs, targets)
        totals, product = labels.totals(z), categorical.root_times(outputs, noise)
        return (
            product
            if totals is None
            else product * categorical.unmove(totals.sqrt().unsqueeze(-1).expand(z.shape), outputs)
        )

    def _fitted(self, outputs: Tensor, targets: Any) -> tuple[Tensor, Labels, Categorical]:
        """Logits ``[r, c]`` of all positions, their labels, and the likelihood that knows the axis of the classes."""
        if not isinstance(targets, Tensor):
            raise OutputError(
                f"targets are {type(targets).__name__}; expected a tensor of class labels, or of probabilities in "
                "the shape of the outputs"
            )
        soft = targets.is_floating_point() and targets.shape == outputs.shape
        categorical = self.categorical.fit(outputs, targets)
        categorical.check(outputs, targets)
        z = categorical.rows(outputs)
        if self.weight is not None and self.weight.shape != z.shape[1:]:
            raise OutputError(
                f"the class weight has {self.weight.numel()} entries; outputs {tuple(outputs.shape)} have "
                f"{z.shape[1]} classes"
            )
        y = self._probabilities(categorical.rows(targets)) if soft else self._classes(categorical, outputs, targets)
        return z, Labels(y.to(z.device), self.weight, self.label_smoothing, categorical.ignore_index), categorical

    def _probabilities(self, y: Tensor) -> Tensor:
        if not bool((y >= 0).all()):
            raise OutputError(
                "targets have the shape of the outputs, so they are read as probabilities, but some are negative or NaN"
            )
        return y

    def _classes(self, categorical: Categorical, outputs: Tensor, targets: Tensor) -> Tensor:
        y, ignored = categorical.labels(outputs, targets), categorical.ignore_index
        r, c = categorical.rows(outputs).shape
        if y is None:
            kind = "whole numbers" if targets.numel() == r and targets.is_floating_point() else f"one a position, {r}"
            raise OutputError(
                f"targets have shape {tuple(targets.shape)} and dtype {targets.dtype}; outputs "
                f"{tuple(outputs.shape)} with {c} classes need labels that are "
                f"{kind}, or probabilities {tuple(outputs.shape)}"
            )
        counted = y[y != ignored]
        if counted.numel() and (int(counted.min()) < 0 or int(counted.max()) >= c):
            raise OutputError(
                f"targets hold labels from {int(counted.min())} to {int(counted.max())}; expected from 0 to {c - 1}, "
                f"or ignore_index={ignored}"
            )
        return y
