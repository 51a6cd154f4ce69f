"""The nearest Kronecker product of every block, against the singular value decomposition of its rearranged entries."""

import functools
import warnings

import pytest
import torch
from cases import build

import nngeom as nng
from nngeom.core import linalg

f64 = torch.float64
MODELS = ("mlp", "conv2d", "depthwise", "embedding", "tied", "transformer")


@functools.cache
def measured(name):
    torch.set_num_threads(1)
    case = build(name)
    exact = nng.FIM(case.model, case.loader, nng.PMatDense)
    default = nng.FIM(case.model, case.loader, nng.PMatKFAC)
    return case, exact, default, nng.FIM(case.model, case.loader, nng.PMatKFAC, fit="nearest", fit_steps=2000)


def block_of(dense, layout, s):
    """``[s, o, i, o, i]``: the exact entries of a block, group by group."""
    at = layout.indices().flatten()
    whole = dense[at][:, at].view(*layout.sizes, *layout.sizes)
    return whole[s, :, :, s]


def kron(block, s):
    a, g = (torch.diag_embed(f) if linalg.is_diagonal(f) else f for f in (block.a, block.g))
    return torch.einsum("op,ij->oipj", g[s], a[s])


@pytest.mark.parametrize("name", MODELS)
def test_against_the_rearranged_block(name):
    _, exact, default, nearest = measured(name)
    dense = exact.to_dense()
    for layout, block in nearest.blocks.items():
        if not hasattr(block, "a"):
            continue
        for s in range(layout.sizes[0]):
            m, start = block_of(dense, layout, s), default.blocks[layout]
            rearranged = m.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)  # [(o p) (i j)]
            if linalg.is_diagonal(block.a):
                i = m.shape[1]
                rearranged = rearranged.view(-1, i, i).diagonal(dim1=1, dim2=2)
            best = m.square().sum() - torch.linalg.svdvals(rearranged)[0].square()
            distance = (kron(block, s) - m).square().sum()
            size = m.square().sum()
            assert distance <= best + 1e-8 * size
            assert distance <= (kron(start, s) - m).square().sum() + 1e-12 * size
            for f in (block.a, block.g):
                values = linalg.factor_eigh(f)[0]
                assert float(values.min()) >= -1e-9 * float(values.abs().max())


@pytest.mark.parametrize("name", ["mlp", "conv2d", "tied"])
def test_ekfac_in_its_basis(name):
    case, exact, _, nearest = measured(name)
    m = nng.FIM(case.model, case.loader, nng.PMatEKFAC, fit="nearest", fit_steps=2000)
    dense = exact.to_dense()
    assert float((m.to_dense() - dense).norm()) <= float((nearest.to_dense() - dense).norm()) * (1 + 1e-9)
    torch.testing.assert_close(m.trace(), exact.trace())


def test_cut_and_mixed_and_monte_carlo_are_the_same():
    case, *_, nearest = measured("mlp")
    tight = nng.FIM(case.model, case.loader, nng.PMatKFAC, fit="nearest", fit_steps=2000, memory_budget=20_000)
    torch.testing.assert_close(tight.to_dense(), nearest.to_dense(), rtol=1e-6, atol=1e-9)
    mixed = nng.PMatMixed({"0.*": nng.PMatKFAC.options(fit="nearest", fit_steps=2000)}, default=nng.PMatDiag)
    m = nng.FIM(case.model, case.loader, mixed)
    torch.testing.assert_close(m["0"].to_dense(), nearest["0"].to_dense(), rtol=1e-6, atol=1e-9)
    seeded = lambda: torch.Generator().manual_seed(1)
    draws = {"samples": 2, "generator": seeded()}
    drawn = nng.FIM_MonteCarlo(case.model, case.loader, nng.PMatKFAC, fit="nearest", **draws)
    truth = nng.FIM_MonteCarlo(case.model, case.loader, nng.PMatDense, samples=2, generator=seeded()).to_dense()
    default = nng.FIM_MonteCarlo(case.model, case.loader, nng.PMatKFAC, samples=2, generator=seeded()).to_dense()
    assert (drawn.to_dense() - truth).norm() <= ((default - truth).norm())


def test_warnings_and_errors():
    case, *_ = measured("conv2d")
    with pytest.warns(nng.FitWarning, match="fit_steps=2"):
        nng.FIM(case.model, case.loader, nng.PMatKFAC, fit="nearest", fit_steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nng.FIM(case.model, case.loader, nng.PMatKFAC, fit="nearest", fit_steps=5000)
    for options, match in (
        ({"fit": "best"}, "fit is 'best'"),
        ({"fit": "nearest", "fit_steps": 1}, "fit_steps is 1"),
        ({"fit": "nearest", "sua": True}, "sua=False"),
    ):
        for kind in (nng.PMatKFAC, nng.PMatEKFAC):
            with pytest.raises(nng.ArgumentError, match=match):
                nng.FIM(case.model, case.loader, kind, **options)
