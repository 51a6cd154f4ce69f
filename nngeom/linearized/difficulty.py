"""Groups of examples by difficulty: wrong labels, a spurious attribute, or anybody's scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nngeom.analysis.labels import require_class_labels
from nngeom.core.errors import ArgumentError
from nngeom.core.given_plainly import require_real, require_whole


@dataclass(frozen=True)
class Groups:
    """Named sets of example indices, ``{name: (members,)}``; they may overlap and need not cover everything."""

    members: dict[str, Tensor]

    def means(self, values: Tensor) -> dict[str, Tensor]:
        """The mean of ``values (n, ...)`` over each group; NaN for an empty one. Ready for ``run.record(**means)``."""
        return {name: values[index.to(values.device)].to(torch.float64).mean(0) for name, index in self.members.items()}

    def sizes(self) -> dict[str, int]:
        """How many examples each group has."""
        return {name: len(index) for name, index in self.members.items()}


def groups_by_flag(flag: Tensor, names: tuple[str, str] = ("clean", "noisy")) -> Groups:
    """Two groups from a boolean ``flag (n,)``: those where it is false, then those where it is true (wrong label, rare
    attribute).

    ``names``: what they are called.
    """
    if flag.ndim != 1 or flag.dtype != torch.bool:
        raise ArgumentError(f"flag is a {flag.dtype} tensor of shape {tuple(flag.shape)}; expected booleans (n,)")
    _require_distinct(names)
    return Groups({names[0]: (~flag).nonzero().flatten(), names[1]: flag.nonzero().flatten()})


def _require_distinct(names: Sequence[str]) -> None:
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise ArgumentError(f"groups {twice} would stand for one another; expected different names, got {list(names)}")


def groups_by_score(scores: Tensor, count: int = 10, names: Sequence[str] | None = None) -> Groups:
    """``count`` groups of nearly equal size by descending ``scores (n,)`` (C-scores: the first group is the easiest).

    Ties are broken by index. ``names``: one a group (``q1``, ``q2``, ... by default). Raises :class:`ArgumentError` for
    scores that are not finite or fewer than groups.
    """
    require_whole(count, "count")
    if scores.ndim != 1 or not count <= len(scores) or not bool(torch.isfinite(scores).all()):
        raise ArgumentError(
            f"scores have shape {tuple(scores.shape)} for {count} groups; expected at least that many finite "
            "numbers (n,)"
        )
    if names is None:
        names = [f"q{i + 1}" for i in range(count)]
    if len(names) != count:
        raise ArgumentError(f"{len(names)} names for {count} groups; expected one each")
    _require_distinct(names)
    order = torch.sort(scores, descending=True, stable=True).indices
    return Groups(dict(zip(names, order.tensor_split(count))))


def groups_by_attribute(label: Tensor, attribute: Tensor) -> Groups:
    """Two groups: ``"with"``, where the spurious attribute agrees with the label, and ``"without"``, where it does not.

    ``label``, ``attribute``: ``(n,)`` both, of the same classes.
    """
    if label.shape != attribute.shape or label.ndim != 1:
        raise ArgumentError(
            f"label has shape {tuple(label.shape)} and attribute {tuple(attribute.shape)}; expected the same (n,)"
        )
    y, a = (require_class_labels(t, len(label), "a group") for t in (label, attribute))
    return groups_by_flag(y != a, ("with", "without"))


def flip_labels(
    labels: Tensor, share: float, classes: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """``(noisy labels, flag)``: a share of the labels replaced by another class each, drawn uniformly; the flag marks
    them.

    ``labels (n,)`` are 0 to ``classes - 1``, in any dtype, which is kept. ``generator``: torch's global one by default.
    Exactly ``round(share * n)`` are wrong. Raises :class:`ArgumentError`, and :class:`OutputError` for labels that are
    no classes.
    """
    require_real(share, "share")
    require_whole(classes, "classes", 2)
    if not 0 <= share <= 1:
        raise ArgumentError(f"share is {share!r}; expected a share of the labels, in [0, 1]")
    n = len(labels)
    y = require_class_labels(labels, n, "flip_labels")
    if n and not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise ArgumentError(f"labels go from {int(y.min())} to {int(y.max())}; expected 0 to {classes - 1}")
    chosen = torch.randperm(n, generator=generator)[: round(share * n)].to(labels.device)
    shift = torch.randint(1, classes, (len(chosen),), generator=generator).to(y)
    flag = torch.zeros(n, dtype=torch.bool, device=labels.device)
    y = y.clone()
    y[chosen] = (y[chosen] + shift) % classes
    flag[chosen] = True
    return y.to(labels.dtype).view(labels.shape), flag
