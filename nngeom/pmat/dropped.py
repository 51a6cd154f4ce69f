"""How much of the norm of factors above a side limit is dropped, told by probes.

Of a factor ``G = mean g g^T`` and random signs ``w``, ``|G w|**2`` is ``|G|_F**2`` in the mean, and
``|(G - kept) w|**2`` what of it is not kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nngeom.core import linalg
from nngeom.core.completed import CompletedBasis
from nngeom.core.factored import FactoredJacobian
from nngeom.core.head import HeadJacobian
from nngeom.core.jacobian import LayerJacobian
from nngeom.core.layout import Layout
from nngeom.core.linalg import Basis
from nngeom.core.sketch import is_sketched, normal_vectors
from nngeom.core.statistic import Inputs
from nngeom.core.tied import TiedJacobian
from nngeom.pmat.block import Block
from nngeom.pmat.long_factors import Cut, long_sides

PROBES = 16


def signs(p: int, like: Tensor) -> Tensor:
    """``[p, m]`` random signs, always the same."""
    generator = torch.Generator().manual_seed(p)
    drawn = torch.randint(0, 2, (p, PROBES), generator=generator)
    return (2 * drawn - 1).to(like)


class Probes:
    """The vectors that long factors are multiplied with, drawn once: random signs, and the test vectors of a sketch."""

    def __init__(self, cut: Cut) -> None:
        self.cut = cut
        self._drawn: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def of(self, p: int, like: Tensor) -> Tensor:
        """``[p, m]`` of a side ``p``."""
        key = p, like.dtype, like.device
        if key not in self._drawn:
            self._drawn[key] = torch.cat([signs(p, like), normal_vectors(p, self.cut.vectors(p), like)], 1)
        return self._drawn[key]

    def probed(self, x: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        """``[s, p, m]``: the sum of ``x x^T w`` over rows ``x [..., s, p]`` and probes ``w``."""
        rows = x.flatten(0, -3).transpose(0, 1).to(linalg.accumulation_dtype(x.dtype))  # [s r p]
        scale = scale.unsqueeze(-1) if isinstance(scale, Tensor) else scale  # [s 1 1]
        return scale * (rows.mT @ (rows @ self.of(x.shape[-1], rows)))


def sketched(means: dict[str, Tensor]) -> dict[str, Tensor]:
    """The factors among ``means``, long ones as sketches where there are test vectors of them."""
    found = {name: t for name, t in means.items() if not name.startswith("probes ")}
    for name, t in found.items():
        products = means.get(f"probes {name}")
        if products is not None and products.shape[-1] > PROBES:
            found[name] = torch.cat([t.unsqueeze(-1), products[..., PROBES:]], -1)
    return found


def dropped(factors: Sequence[Tensor], products: Tensor) -> Tensor:
    """``(share, standard error, side)``: of the Frobenius norm that is not kept, of a whole factor's ``products`` with
    probes.

    ``factors``: its diagonal ``[s, p]``, its sketch, or diagonal blocks ``[b, q, q]``, of all that together make ``p``.
    """
    factor = factors[0]
    products = products[..., :PROBES]
    w = signs(products.shape[1], products)
    if is_sketched(factor):
        values, u = linalg.factor_eigh(factor)
        kept = linalg.left(u, linalg.left(values, linalg.left(u, w.unsqueeze(0), transpose=True)))
    elif linalg.is_diagonal(factor):
        kept = factor.unsqueeze(-1) * w
    else:
        sides = [f.shape[0] * f.shape[1] for f in factors]
        parts = (f @ x.unflatten(0, f.shape[:2]) for f, x in zip(factors, w.split(sides)))
        kept = torch.cat([x.flatten(0, 1) for x in parts]).unsqueeze(0)
    lost, total = ((x.square().sum((0, 1))) for x in (products - kept, products))  # [m]
    if not bool(total.sum() > 0):
        return factor.new_tensor([0, 0, len(w)])
    ratio = lost.sum() / total.sum()
    spread = (lost - ratio * total).square().mean().sqrt() / total.mean() / (PROBES - 1) ** 0.5
    share = ratio.sqrt()
    error = spread / (2 * share).clamp_min(torch.finfo(share.dtype).tiny)
    return torch.stack([share, error, share.new_tensor(len(w))])


WHOLE = -1.0  # in place of a share: the factor is whole


def shares(means: dict[str, Tensor]) -> Tensor | None:
    """``[2, 3]``: of the factors ``a`` and ``g`` the share that was dropped, its standard error, and the side; ``None``
    where both are whole. Of unlike uses that of the first that is not.
    """
    found = {name.removeprefix("probes "): t for name, t in means.items() if name.startswith("probes ")}
    if not found:
        return None
    like = next(iter(found.values()))
    rows, means = {side: like.new_full((3,), WHOLE) for side in "ag"}, sketched(means)
    for name, products in reversed(found.items()):
        rest = [t for part, t in means.items() if part.startswith("rest")] if name[0] == "a" else []
        rows[name[0]] = dropped([means[name], *rest], products)
    return torch.stack([rows["a"], rows["g"]])


def probes_of(j: LayerJacobian, sharing: str, probes: Probes) -> dict[str, Tensor | Inputs]:
    """The products with ``probes`` of the factors of ``j`` that are longer than the limit, but for those of lookups."""
    if isinstance(j, TiedJacobian):
        return {
            f"{_turned(name) if transposed else name}{q}": t
            for q, (transposed, term) in enumerate(j.terms)
            for name, t in probes_of(term, sharing, probes).items()
        }
    sums: dict[str, Tensor | Inputs] = {}
    long = long_sides(j, probes.cut.limit)
    if "a" in long:
        a = j.a if sharing == "expand" else j.share * j.a.sum(1, keepdim=True)  # type: ignore[attr-defined]
        sums["probes a"] = Inputs(lambda: probes.probed(a))
    if "g" in long and isinstance(j, HeadJacobian):
        like = j.a.new_empty(0, dtype=linalg.accumulation_dtype(j.dtype))
        sums["probes g"] = (j.share if sharing == "expand" else 1.0) * j.metric.total_times(
            probes.of(j.shape[3], like)
        ).unsqueeze(0)
    elif "g" in long and isinstance(j, FactoredJacobian):
        g, share = (j.g, j.share) if sharing == "expand" else (j.g.sum(2, keepdim=True), 1.0)
        sums["probes g"] = probes.probed(g, share)
    return sums


def _turned(name: str) -> str:
    return name[:-1] + ("g" if name[-1] == "a" else "a")


@dataclass(frozen=True)
class Dropped:
    """Of a factor ``"A"`` or ``"G"`` of these ``parameters``, with ``side`` rows, what is not kept: ``share`` of its
    Frobenius norm, estimated from probes with a ``standard_error``; ``form``: what is.
    """

    parameters: tuple[str, ...]
    factor: str
    side: int
    form: str
    share: float
    standard_error: float

    def __str__(self) -> str:
        what = {"diagonal": "its diagonal", "block": "diagonal blocks"}.get(self.form, "leading eigenvectors")
        return (
            f"of {self.factor} ({self.side}) of {self.parameters[0]} {what}, without "
            f"{self.share:.2f} +- {self.standard_error:.2f} of its norm"
        )


def all_dropped(blocks: dict[Layout, Block]) -> Iterator[Dropped]:
    """What was dropped of the factors of all blocks."""
    for layout, block in blocks.items():
        found = getattr(block, "dropped", None)
        for (share, error, side), name in zip(() if found is None else found.tolist(), "ag"):
            if share != WHOLE:
                form = _form(getattr(block, name if hasattr(block, name) else f"u{name}"))
                yield Dropped(layout.names, name.upper(), int(side), form, share, error)


def _form(basis: Basis | Tensor | None) -> str:
    """Of a factor of these eigenvectors, or of the factor itself."""
    if isinstance(basis, CompletedBasis):
        return "low_rank"
    return "diagonal" if basis is None or linalg.is_diagonal(basis) else "block"
