"""Eigenvalue-corrected Kronecker factorisation: KFAC's eigenbasis with the exact second moments in it (George et al. 2018)."""

from __future__ import annotations

from nngeom.core.errors import ArgumentError
from nngeom.pmat.kfac import EigenBlock, factor_statistic, kronecker_block
from nngeom.pmat.pmat import PMat
from nngeom.pmat.recipe import Scope


def scaling_statistic(bases: dict):
    """``chunk -> {layout: {"d"}}``: squares of the rows in the kept eigenbases."""

    def statistic(chunk):
        return {
            layout: {"d": j.rotate(bases[layout].ua, bases[layout].ug).square()}
            for layout, j in chunk.jacobians.items()
        }

    return statistic


class PMatEKFAC(PMat):
    """KFAC's eigenvectors, and the mean squares of the rows along them: never farther from the exact block than KFAC."""

    passes = 2

    @classmethod
    def recipe(cls, scope: Scope, sharing: str = "expand", sua: bool = False, block_limit: int = 4096):
        if sua:
            raise ArgumentError("sua=True is not available yet; use sua=False")
        means = yield factor_statistic(sharing, block_limit)
        bases = {layout: kronecker_block(t).eigen() for layout, t in means.items()}
        means = yield scaling_statistic(bases)
        return {layout: _with_spectrum(bases[layout], t["d"]) for layout, t in means.items()}


def _with_spectrum(basis: EigenBlock, d) -> EigenBlock:
    return EigenBlock(basis.ua, basis.ug, d.to(basis.d.dtype), basis.sa, basis.sg)
