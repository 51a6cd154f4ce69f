"""A sum of matrices as blocks over their common partition, and what is done with it block by block."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nngeom.core.damping import Damping, Tikhonov
from nngeom.core.errors import SingularError
from nngeom.core.layout import Layout
from nngeom.core.linear import differentiated
from nngeom.pmat.basis import Basis
from nngeom.pmat.block import Block, EyeBlock
from nngeom.pmat.border import Bordered, by_eigenvectors
from nngeom.pmat.closed import Weighted
from nngeom.pmat.eigenvalues import by_eigenvalues
from nngeom.pmat.inner import CANCELLED
from nngeom.pmat.low_rank import LowRankBlock
from nngeom.pmat.near import sum_of
from nngeom.pmat.pmat import PMat
from nngeom.pmat.regroup import Rows, moved, regroup
from nngeom.pmat.sum_block import ITERATED, SumBlock
from nngeom.solve.corrected import corrected
from nngeom.space.collection import LayerCollection

Noise = Callable[[], Tensor]  # white, [n d]


@dataclass(frozen=True, eq=False)
class Partitioned:
    """``B + R^T S R``: blocks, and rows of low rank where there are any."""

    collection: LayerCollection
    blocks: dict[Layout, Block]
    rows: Rows | None
    limit: int

    @staticmethod
    def of(
        collection: LayerCollection,
        parts: Sequence[tuple[float | Tensor, PMat]],
        limit: int,
        tol: float | None = None,
        max_steps: int | None = None,
    ) -> Partitioned:
        """The sum of weighted ``parts``; ``limit``, ``tol``, ``max_steps`` as of :class:`SumBlock`."""
        table, rows = regroup(collection, parts)
        if rows is not None and all(isinstance(block, EyeBlock) for terms in table.values() for _, block in terms):
            whole = _low_rank(collection, [t for terms in table.values() for t in terms], rows, len(table))
            if whole is not None:
                return Partitioned(collection, {collection.span(): whole}, None, limit)
        zero = torch.zeros((), dtype=parts[0][1].dtype, device=parts[0][1].device)
        blocks = {
            layout: SumBlock.of(terms or [(1.0, EyeBlock(zero, *layout.sizes))], limit, tol, max_steps)
            for layout, terms in table.items()
        }
        return Partitioned(collection, blocks, rows, limit)

    @property
    def matrix(self) -> PMat:
        """The blocks as a matrix, of the representation that is made of them."""
        kinds = {type(block) for block in self.blocks.values()}
        any_blocks = PMat.makers[Block]
        maker = PMat.makers.get(next(iter(kinds)), any_blocks) if len(kinds) == 1 else any_blocks
        return maker.of_blocks(self.collection, self.blocks, 0)

    def together(self) -> Partitioned:
        """Blocks whose parts commute in the eigenbasis of these."""
        blocks = {lay: b.together() if isinstance(b, SumBlock) else b for lay, b in self.blocks.items()}
        return replace(self, blocks=blocks)

    def whole(self) -> Partitioned:
        """Everything as one block, where rows reach over all of them."""
        if self.rows is None:
            return self
        key = self.collection.span()
        terms: list[Weighted] = [
            (1.0, b if layout == key else moved(b, layout, key)) for layout, b in self.blocks.items()
        ]
        for sign in (1.0, -1.0):
            mine = self.rows.r[self.rows.signs == sign]
            terms += [(1.0, LowRankBlock(mine, sign))] if len(mine) else []
        return Partitioned(self.collection, {key: SumBlock.of(terms, self.limit)}, None, self.limit)

    # -- operations ----------------------------------------------------------------------------------------------------

    def solve(self, b: Tensor, damping: Damping) -> Tensor:
        """``(M + damping I)^-1 b``, ``[*b, d]``."""
        if self.rows is None:
            return self._each(b, lambda block, x: block.solve(x, damping))
        bordered = self.bordered(damping)
        if bordered is None:
            return self.whole().solve(b, damping)
        base = self.base(bordered)

        def inverse(y: Tensor) -> Tensor:
            return bordered.solve(base.solve(y, damping))

        if not isinstance(damping, Tikhonov):
            return inverse(b)
        x = corrected(lambda y: self._times(y) + damping.value * y, inverse, b)
        return self.whole().solve(b, damping) if x is None else x

    def _times(self, x: Tensor) -> Tensor:
        """``M x``, ``[*b, d]``."""
        product = self._each(x, lambda block, y: block.mv(y))
        if self.rows is not None:
            product = product + ((x @ self.rows.r.T) * self.rows.signs) @ self.rows.r
        return product

    def logdet(self, damping: Tikhonov) -> Tensor:
        """``log det(M + damping I)``."""
        if self.rows is None:
            return torch.stack([block.logdet(damping) for block in self.blocks.values()]).sum()
        bordered = self.bordered(damping)
        if bordered is None:
            return self.whole().logdet(damping)
        return self.base(bordered).logdet(damping) + bordered.logdet()

    def draw(self, noise: Noise, damping: Tikhonov) -> Tensor:
        """Of ``N(0, (M + damping I)^-1)``, ``[n, d]``."""
        if self.rows is None:
            return self._drawn(noise, damping)
        bordered = None if bool((self.rows.signs < 0).any()) else self.bordered(damping)
        if bordered is None:
            return self.whole().draw(noise, damping)
        x = self.base(bordered).draw(noise, damping)
        more = [noise() for _ in range(-(-len(self.rows.signs) // self.collection.numel))]
        return bordered.draw(x, torch.cat(more, -1)[..., : len(self.rows.signs)])

    def _drawn(self, noise: Noise, damping: Tikhonov) -> Tensor:
        drawn = [noise()]

        def shared(layout: Layout) -> Noise:
            """Noise at the places of a block: all blocks read the same draws."""
            asked = itertools.count()

            def draw() -> Tensor:
                j = next(asked)
                if j == len(drawn):
                    drawn.append(noise())
                return layout.gather(drawn[j])

            return draw

        def one(block: Block, mine: Noise) -> Tensor:
            return block.draw(mine, damping) if isinstance(block, SumBlock) else block.root_times(mine(), damping)

        out = torch.empty_like(drawn[0])
        _worst([lambda k=k, b=b: k.scatter_(out, one(b, shared(k))) for k, b in self.blocks.items()])  # type: ignore[misc]
        return out

    def inverse(self, damping: Damping) -> PMat:
        """``(M + damping I)^-1``."""
        if self.rows is not None:
            return self.whole().inverse(damping)
        inverses: dict[Layout, Block] = {}
        _worst([lambda k=k, b=b: inverses.update({k: b.inverse(damping)}) for k, b in self.blocks.items()])  # type: ignore[misc]
        return Partitioned(self.collection, inverses, None, self.limit).matrix

    def eigh(self) -> tuple[Tensor, Basis]:
        """Eigenvalues, ascending, and basis."""
        return self.whole().matrix.eigh()

    def norm(self) -> Tensor:
        """The Frobenius norm."""
        squares = [block.squared_norm() for block in self.blocks.values()]
        if self.rows is None:
            return torch.stack(squares).sum().sqrt()
        r, signs = self.rows.r, self.rows.signs
        products = self._each(r, lambda block, x: block.mv(x))
        gram = (r @ r.T) * signs
        squares += [2 * ((products * r).sum(-1) * signs).sum(), (gram * gram.T).sum()]
        total = torch.stack(squares).sum()
        if float(total.detach()) > CANCELLED * sum(abs(float(s.detach())) for s in squares):
            return total.sqrt()
        return torch.stack([b.squared_norm() for b in self.whole().blocks.values()]).sum().sqrt()

    def bordered(self, damping: Damping) -> Bordered | None:
        """The rows beside the blocks under a ``damping``, by Woodbury's identity, where that is cheaper than the dense
        matrix and the blocks are definite.
        """
        d, rows = self.collection.numel, self.rows
        small = d <= min(ITERATED, self.limit) or (rows is not None and len(rows.r) >= d and d <= self.limit)
        if rows is None or small or by_eigenvalues(damping):
            return None
        try:
            return Bordered.of({k: by_eigenvectors(b) for k, b in self.blocks.items()}, rows, damping)
        except SingularError:
            if d > self.limit:
                raise
            return None

    def base(self, bordered: Bordered) -> Partitioned:
        """The blocks without rows."""
        return replace(self, blocks=bordered.blocks, rows=None)

    def _each(self, x: Tensor, f: Callable[[Block, Tensor], Tensor]) -> Tensor:
        out = torch.empty_like(x)
        _worst([lambda k=k, b=b: k.scatter_(out, f(b, k.gather(x))) for k, b in self.blocks.items()])  # type: ignore[misc]
        return out


def _worst(steps: Sequence[Callable[[], None]]) -> None:
    """All steps; where blocks are singular, the error of the one that needs the largest damping."""
    errors: list[SingularError] = []
    for step in steps:
        try:
            step()
        except SingularError as error:
            errors.append(error)
    if errors:
        raise max(errors, key=lambda e: e.needed or 0.0)


def _low_rank(collection: LayerCollection, eyes: list[Weighted], rows: Rows, blocks: int) -> LowRankBlock | None:
    """Rows of one sign and a multiple of the identity."""
    if blocks != 1 or bool((rows.signs != rows.signs[0]).any()):
        return None
    shift = sum_of(w * block.c for w, block in eyes) if eyes else 0.0  # type: ignore[attr-defined]
    return LowRankBlock(rows.r, float(rows.signs[0]), shift if differentiated(shift) else float(shift))
