"""Measures ask the representation what may enter it: subclasses, and those from outside."""

from dataclasses import dataclass

import pytest
import reference
import torch
from cases import build
from torch.nn import functional as F

import nngeom as nng
from nngeom.pmat.block import Block
from nngeom.pmat.dense import DenseBlock
from nngeom.pmat.diag import DiagBlock
from nngeom.pmat.factors import factors
from nngeom.pmat.pmat import PMat
from nngeom.pmat.quasi_diag import UnitBlock

LOSS = lambda f, y: F.cross_entropy(f, y, reduction="none")


class PMatUnit(PMat):
    """A dense block an output unit, over its incoming weights and bias."""

    @classmethod
    def recipe(cls, selection):
        def statistic(chunk):
            rows = {layout: j.matrix() for layout, j in chunk.jacobians.items()}
            return {layout: {"m": torch.einsum("knsoi,knsoj->soij", m, m)} for layout, m in rows.items()}

        means = yield statistic
        return {layout: UnitBlock(t["m"]) for layout, t in means.items()}


class PMatNamedDiag(nng.PMatDiag):
    """The diagonal, under another name."""


class PMatNamedBlocks(nng.PMatBlockDiag):
    pass


class PMatNamedDense(nng.PMatDense):
    pass


class PMatHalf(nng.PMatDiag):
    """A subclass with a recipe of its own: half the diagonal."""

    @classmethod
    def recipe(cls, selection):
        blocks = yield from super().recipe(selection)
        return {layout: block.scaled(0.5) for layout, block in blocks.items()}


class PMatOwnFactors(PMat):
    """Kronecker factors asked for from outside."""

    @classmethod
    def recipe(cls, selection):
        means = yield lambda chunk: {lay: {"g": factors(j, "expand", 100)["a"]} for lay, j in chunk.jacobians.items()}
        return {lay: DiagBlock(t["g"].diagonal(dim1=-2, dim2=-1)) for lay, t in means.items()}


class PMatNamedKFAC(nng.PMatKFAC):
    pass


def covariance(case):
    g = reference.loss_gradients(case.model, case.inputs, case.targets, LOSS)
    centred = g - g.mean(0)
    return centred.T @ centred / len(g)


def of_layers(matrix, m):
    """The part of a dense matrix that lies in the blocks of ``m``."""
    mask = torch.zeros_like(matrix, dtype=torch.bool)
    eye = torch.eye(len(matrix), dtype=torch.bool)
    for layout, block in m.blocks.items():
        places = layout.gather(torch.arange(len(matrix)).double()).long()
        groups = places.reshape(-1, places.shape[-1]) if isinstance(block, UnitBlock) else places.reshape(1, -1)
        for rows in groups if not isinstance(block, DiagBlock) else []:
            mask[rows[:, None], rows[None, :]] = True
    return torch.where(mask | eye, matrix, torch.zeros_like(matrix))


def close(x, y):
    torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9 * float(y.abs().max()))


MIXED = nng.PMatMixed({"*bias": PMatNamedDiag}, default=PMatUnit)
TAKEN = {
    "unit": PMatUnit,
    "diag": PMatNamedDiag,
    "layers": PMatNamedBlocks,
    "dense": PMatNamedDense,
    "mixed": MIXED,
    "mixed-with-options": nng.PMatMixed({"*weight": nng.PMatQuasiDiag}, default=nng.PMatBlockDiag),
}


@pytest.mark.parametrize("name", ["mlp", "conv2d", "transformer", "reused"])
@pytest.mark.parametrize("kind", TAKEN)
def test_covariances_in_any_second_moment_representation(kind, name):
    case = build(name)
    m = nng.GradientCovariance(case.model, case.loader, TAKEN[kind], loss="cross_entropy")
    truth = covariance(case)
    close(m.diag().flat(), truth.diagonal())
    if kind != "mixed-with-options":
        close(m.to_dense(), of_layers(truth, m))
    own = TAKEN[kind]
    assert type(m) is (own if isinstance(own, type) else nng.PMatMixed)


def test_covariances_by_a_recipe_of_ones_own_and_by_the_identity():
    case = build("mlp")
    truth = covariance(case)
    close(
        nng.GradientCovariance(case.model, case.loader, PMatHalf, loss="cross_entropy").diag().flat(),
        truth.diagonal() / 2,
    )
    close(nng.GradientCovariance(case.model, case.loader, nng.PMatEye, loss="cross_entropy").trace(), truth.trace())


@pytest.mark.parametrize(
    "kind", [PMatNamedKFAC, nng.PMatMixed({"*bias": nng.PMatDiag}, default=PMatNamedKFAC), PMatOwnFactors]
)
def test_centred_rows_have_no_factors(kind):
    case = build("mlp")
    with pytest.raises(nng.NNGeomError, match="Kronecker structure"):
        nng.GradientCovariance(case.model, case.loader, kind, loss="cross_entropy")


@pytest.mark.parametrize("name", ["mlp", "conv2d"])
@pytest.mark.parametrize(
    "kind, plain",
    [(PMatNamedDiag, nng.PMatDiag), (PMatNamedBlocks, nng.PMatBlockDiag), (PMatNamedDense, nng.PMatDense)],
)
def test_hessians_in_subclasses(kind, plain, name):
    case = build(name)
    truth = reference.hessian(case.model, case.inputs, case.targets, LOSS)
    m = nng.Hessian(case.model, case.loader, kind, loss="cross_entropy")
    assert type(m) is kind and [type(b) for b in m.blocks.values()] == [
        DiagBlock if plain is nng.PMatDiag else DenseBlock
    ] * len(m.blocks)
    close(m.to_dense(), of_layers(truth, m))


@pytest.mark.parametrize("kind", [PMatHalf, PMatUnit, nng.PMatLowRank, PMatNamedKFAC])
def test_hessians_in_averages_of_products_are_refused(kind):
    case = build("mlp")
    with pytest.raises(nng.UnsupportedError, match="average"):
        nng.Hessian(case.model, case.loader, kind, loss="cross_entropy")


def test_a_recipe_of_ones_own_may_still_say_what_it_keeps():
    class PMatTold(nng.PMatDiag):
        entries = "diagonal"

        @classmethod
        def recipe(cls, selection):
            return (yield from super().recipe(selection))

    case = build("mlp")
    m = nng.Hessian(case.model, case.loader, PMatTold, loss="cross_entropy")
    close(m.diag().flat(), reference.hessian(case.model, case.inputs, case.targets, LOSS).diagonal())
    assert isinstance(next(iter(m.blocks.values())), Block)


def test_kernels_between_two_sets_have_no_diagonal_in_subclasses_either():
    @dataclass(frozen=True, eq=False, repr=False)
    class FMatNamedDiag(nng.FMatDiag):
        """The diagonal, under another name."""

    case = build("mlp")
    assert type(nng.GramMatrix(case.model, case.loader, FMatNamedDiag)) is FMatNamedDiag
    with pytest.raises(nng.ArgumentError, match="no diagonal"):
        nng.GramMatrix(case.model, case.loader, FMatNamedDiag, other=case.loader)
