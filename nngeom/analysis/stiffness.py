"""Stiffness: does a step on one example help another? Signs and cosines of per-example loss gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nngeom.analysis.labels import class_labels, described
from nngeom.analysis.rows import all_row_norms, all_targets, row_products
from nngeom.core.errors import ArgumentError
from nngeom.core.given_plainly import require_real_tensor
from nngeom.cotangents.loss import EmpiricalFisher, as_loss
from nngeom.fmat.side import Side
from nngeom.space.collection import LayerCollection
from nngeom.sweep.agreement import agree
from nngeom.sweep.run import Function, Run


@dataclass(frozen=True)
class Stiffness:
    """Pairwise stiffness of two sets of examples (or of one with itself).

    ``matrix`` ``(n, m)``: sign or cosine of ``g_i . g_j``; pairs with a zero gradient count 0. ``distance`` ``(n, m)``:
    ``1 - cosine``, in [0, 2]. ``mean``: over pairs of distinct points, NaN where there is none (a single example).

    Class labels are ``(n,)`` or ``(n, 1)``, of any dtype in whole numbers. Without any labels there are no classes;
    where the targets are no class labels (of a regression, or of positions), ``classes``, ``by_class``, ``within`` and
    ``between`` raise :class:`ArgumentError`.
    """

    matrix: Tensor
    distance: Tensor
    mean: Tensor
    _grouped: tuple[Tensor, Tensor] | str  # classes and means by class, or what the targets are instead of labels

    @property
    def classes(self) -> Tensor:
        """The labels present, ascending."""
        return self._by_class()[0]

    @property
    def by_class(self) -> Tensor:
        """``(classes, classes)``: means over pairs of distinct points, NaN where there is none (a class of one)."""
        return self._by_class()[1]

    @property
    def within(self) -> Tensor:
        """The mean of the diagonal of ``by_class``, ignoring NaN; NaN where nothing is left."""
        return self.by_class.diagonal().nanmean()

    @property
    def between(self) -> Tensor:
        """The mean of ``by_class`` off its diagonal, ignoring NaN; NaN where nothing is left."""
        classes, means = self._by_class()
        return means[~torch.eye(len(classes), dtype=torch.bool, device=means.device)].nanmean()

    @property
    def has_classes(self) -> bool:
        """Whether every example has a class label."""
        return not isinstance(self._grouped, str) and len(self._grouped[0]) > 0

    def _by_class(self) -> tuple[Tensor, Tensor]:
        if isinstance(self._grouped, str):
            raise ArgumentError(
                "stiffness by class takes one class label an example, (n,) or (n, 1) in whole numbers; got "
                f"{self._grouped}: see .matrix and .mean, or gradient_stiffness(gradients, labels=...)"
            )
        return self._grouped


def stiffness(
    model: nn.Module,
    loader: Any,
    kind: str = "cosine",
    loss: Any = "cross_entropy",
    other: Any = None,
    *,
    function: Function = None,
    layer_collection: LayerCollection | None = None,
    memory_budget: int | None = None,
    check: bool = True,
    process_group: Any = None,
) -> Stiffness:
    """Stiffness of the examples of ``loader`` with each other, or with those of ``other`` (train against validation).

    ``kind``: ``"cosine"`` (suits pairs within a class) or ``"sign"`` (between classes). ``loss``: as for
    :func:`nngeom.EmpiricalFIM`. A step ``-e g_1`` changes the loss of example 2 by ``-e g_1 . g_2``: positive stiffness
    helps. Per-example gradients stay in factored form, ``n x d`` numbers are formed only where that is cheaper.
    Examples whose label the loss ignores have no gradient, cosine 0 with all, and are no class. Equal examples in
    ``loader`` and ``other`` are not recognised: leave ``other`` out to compare a set with itself. With a
    ``process_group`` those of all processes, in rank order.

    Raises :class:`ArgumentError` for another ``kind``, :class:`LoaderError` without targets, and what the sweep raises.
    Source: Fort et al. 2019, definitions of sign, cosine and class stiffness.
    """
    require_kind(kind)
    measured = as_loss(loss, model)
    cotangents, ignored = (
        EmpiricalFisher(measured),
        getattr(getattr(measured, "categorical", None), "ignore_index", None),
    )
    run = Run.of(
        model,
        loader,
        function=function,
        layer_collection=layer_collection,
        memory_budget=memory_budget,
        check=check,
        process_group=process_group,
    )
    agree(run, "stiffness", kind=kind, loss=measured, other=other is not None)
    with run.within(), torch.no_grad():
        with run.team.together("batches"):
            sides = [Side.of(run.on(data), cotangents) for data in ((loader,) if other is None else (loader, other))]
        gram = row_products(sides[0], None if other is None else sides[1])[0, :, 0]
        norms = [gram.diagonal()] if other is None else [all_row_norms(side, run) for side in sides]
    labels = [all_targets(side.run) for side in sides]
    return _summary(gram, (norms[0], norms[-1]), (labels[0], labels[-1]), kind, same=other is None, ignored=ignored)


def gradient_stiffness(
    gradients: Tensor,
    other: Tensor | None = None,
    kind: str = "cosine",
    labels: Tensor | None = None,
    other_labels: Tensor | None = None,
) -> Stiffness:
    """:func:`stiffness` of ``gradients`` at hand, ``(n, d)`` (and ``other`` ``(m, d)``), with class labels where given:
    ``labels (n,)``, ``other_labels (m,)``.

    Raises :class:`ArgumentError` for another ``kind`` or labels of other examples, :class:`NonFiniteError` on NaN or
    infinity.
    """
    require_kind(kind)
    right = gradients if other is None else other
    for g in (gradients, right):
        require_real_tensor(g, "gradients")
        if g.ndim != 2 or g.shape[1] != gradients.shape[-1]:
            shapes = f"{tuple(gradients.shape)} and {tuple(right.shape)}" if g is other else f"{tuple(g.shape)}"
            raise ArgumentError(f"gradients have shape {shapes}; expected (n, d), one an example, of equal d")
    right_labels = labels if other is None else other_labels
    if (labels is None) != (right_labels is None):
        raise ArgumentError("labels and other_labels go together; expected both or none of them")
    for y, g, name in ((labels, gradients, "labels"), (right_labels, right, "other_labels")):
        if y is not None and len(y) != len(g):
            raise ArgumentError(f"{name} are {tuple(y.shape)} for {len(g)} gradients; expected one an example")
    gram = gradients @ right.T
    norms = gradients.square().sum(-1), right.square().sum(-1)
    return _summary(gram, norms, (labels, right_labels), kind, same=other is None)


def require_kind(kind: str) -> None:
    """Raise :class:`ArgumentError` for an unknown kind."""
    if kind not in ("cosine", "sign"):
        raise ArgumentError(f"kind is {kind!r}; expected 'cosine' or 'sign'")


def _summary(
    gram: Tensor,
    norms: tuple[Tensor, Tensor],
    labels: tuple[Tensor | None, Tensor | None],
    kind: str,
    *,
    same: bool,
    ignored: int | None = None,
) -> Stiffness:
    """Of the inner products ``(n, m)`` of two sets of gradients, with the squared norms and labels of both."""
    left, right = norms
    scale = left.sqrt()[:, None] * right.sqrt()[None, :]
    live = scale > 0
    cosine = torch.where(live, gram / torch.where(live, scale, torch.ones_like(scale)), torch.zeros_like(gram)).clamp(
        -1, 1
    )
    matrix = cosine if kind == "cosine" else cosine.sign()
    distinct = torch.ones_like(matrix)
    if same:
        distinct.fill_diagonal_(0)
    mean = (matrix * distinct).sum() / distinct.sum()  # 0/0: NaN for a single example
    return Stiffness(matrix, 1 - cosine, mean, _grouped(matrix, distinct, *labels, ignored))


def _grouped(
    matrix: Tensor, distinct: Tensor, a: Tensor | None, b: Tensor | None, ignored: int | None
) -> tuple[Tensor, Tensor] | str:
    if a is None and b is None:
        return torch.zeros(0, dtype=torch.long, device=matrix.device), matrix.new_zeros(0, 0)
    rows, columns = class_labels(a), class_labels(b)
    if rows is None or columns is None:
        return described(a if rows is None else b)
    classes = torch.cat([rows, columns]).unique()
    classes = classes if ignored is None else classes[classes != ignored]
    x, y = ((labels.to(classes)[:, None] == classes[None, :]).to(matrix) for labels in (rows, columns))
    return classes, (x.T @ (matrix * distinct) @ y) / (x.T @ distinct @ y)
