"""Which representation a sum of kernels, or an inverse of a matrix, has."""

from dataclasses import dataclass

import pytest
import torch
from cases import build

import nngeom as nng
from nngeom.fmat.expression import FMatSum
from nngeom.fmat.fmat import FMat

C, N = 3, 4
SHAPES = {nng.FMatDiag: (C, N), nng.FMatBlockDiag: (C, N, N), nng.FMatDense: (C, N, C, N)}


def kernel(kind, dtype=torch.float64):
    return kind(torch.rand(SHAPES[kind], dtype=dtype, generator=torch.Generator().manual_seed(len(SHAPES[kind]))))


@pytest.mark.parametrize("x", SHAPES)
@pytest.mark.parametrize("y", SHAPES)
def test_a_sum_has_the_wider_representation_of_its_terms(x, y):
    total = kernel(x) + kernel(y, torch.float32)
    assert type(total) is max(x, y, key=list(SHAPES).index) and total.dtype == torch.float64
    assert torch.equal(total.to_dense(), kernel(x).to_dense() + kernel(y, torch.float32).to_dense())


def test_a_sum_within_a_subclass_stays_narrow():
    class Mine(nng.FMatDiag):
        pass

    mine = Mine(torch.ones(C, N))
    assert type(mine + kernel(nng.FMatDiag)) is type(kernel(nng.FMatDiag) + mine) is nng.FMatDiag
    assert type(mine + kernel(nng.FMatBlockDiag)) is nng.FMatBlockDiag


@dataclass(frozen=True, eq=False, repr=False)
class Constant(FMat):
    """``tensor[k]`` at every pair of examples: no representation that is known to hold others, or to be held."""

    tensor: torch.Tensor  # [c]
    outputs, rows, columns = C, N, N

    def product(self, f):
        return self.tensor[:, None] * f.sum(-1, keepdim=True).expand(f.shape)

    @property
    def T(self):
        return self

    def diag(self):
        return nng.FVector(self.tensor[:, None].expand(C, N))

    def _symmetric_parts(self):
        return self.tensor[:, None, None].expand(C, N, N)


def test_kernels_that_do_not_say_what_is_wider_add_lazily():
    mine = Constant(torch.rand(C, dtype=torch.float64))
    for other in (kernel(nng.FMatDiag), kernel(nng.FMatBlockDiag), mine):
        for total in (mine + other, other + mine):
            assert type(total) is FMatSum
            torch.testing.assert_close(total.to_dense(), mine.to_dense() + other.to_dense())
    assert type(kernel(nng.FMatDense) + mine) is nng.FMatDense


def test_an_inverse_is_of_the_representation_that_its_blocks_make():
    case = build("mlp")
    kfac, dense = (nng.FIM(case.model, case.loader, kind) for kind in (nng.PMatKFAC, nng.PMatDense))
    assert type(kfac.inverse(1.0)) is nng.PMatEKFAC and type(dense.inverse(1.0)) is nng.PMatDense
    assert type(kfac.inverse(nng.FactoredTikhonov(1.0))) is nng.PMatKFAC
    first = kfac.layer_collection.names[0]
    mixed = nng.PMatMixed({first: nng.PMatDiag}, default=nng.PMatKFAC)
    assert type(nng.FIM(case.model, case.loader, mixed).inverse(1.0)) is nng.PMatMixed
