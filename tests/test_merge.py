"""Merging any number of matrices: as two at a time, weighted by examples or by given weights."""

import functools

import pytest
import torch
from cases import STORED, build, representation

import nngeom as nng

ONE_SWEEP = [k for k, r in STORED.items() if r.passes == 1]


@functools.cache
def measured(name, kind):
    """Of three data sets, and of all of them."""
    case = build(name, sizes=(3, 4, 2))
    r = representation(kind, case.model)
    return [nng.FIM(case.model, [batch], r) for batch in case.loader], nng.FIM(case.model, case.loader, r)


@pytest.mark.parametrize("kind", ONE_SWEEP)
@pytest.mark.parametrize("name", ["mlp", "conv2d", "tied"])
def test_many_are_merged_as_two_at_a_time(name, kind):
    (a, b, c), whole = measured(name, kind)
    merged = nng.merge(a, b, c)
    assert type(merged) is type(whole) and merged.examples == 9
    torch.testing.assert_close(merged.to_dense(), whole.to_dense(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(merged.to_dense(), nng.merge(nng.merge(a, b), c).to_dense(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(nng.merge(a).to_dense(), a.to_dense())


@pytest.mark.parametrize("kind", [k for k in ONE_SWEEP if "kfac" not in k and k != "mixed"])  # not linear in the sums
def test_weights_replace_examples(kind):
    matrices, _ = measured("mlp", kind)
    dense = [m.to_dense() for m in matrices]
    for weights in ([3.0, 0.5, 1], (0, 0, 2), [0.0, 1.0, 3.0]):
        expected = sum(w * d for w, d in zip(weights, dense)) / sum(weights)
        merged = nng.merge(*matrices, weights=weights)
        torch.testing.assert_close(merged.to_dense(), expected, rtol=1e-10, atol=1e-12)
        assert merged.examples == 9
    torch.testing.assert_close(
        nng.merge(*matrices, weights=[3, 4, 2]).to_dense(), nng.merge(*matrices).to_dense(), rtol=1e-12, atol=1e-14
    )


def test_weights_of_kronecker_factors():
    (a, b, c), _ = measured("mlp", "kfac")
    merged = nng.merge(a, b, c, weights=[1.0, 0.0, 3.0])
    for layout, block in merged.blocks.items():
        for side in ("a", "g"):
            x, y = (getattr(m.blocks[layout], side) for m in (a, c))
            torch.testing.assert_close(getattr(block, side), (x + 3 * y) / 4)


def test_errors():
    (a, b, _), _ = measured("mlp", "diag")
    with pytest.raises(nng.ArgumentError, match="no matrix"):
        nng.merge()
    with pytest.raises(nng.ArgumentTypeError, match="cannot merge list"):
        nng.merge([a, b])
    with pytest.raises(nng.ArgumentError, match="3 weights for 2"):
        nng.merge(a, b, weights=[1, 1, 1])
    for weights in ([-1.0, 2.0], [0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0]):
        with pytest.raises(nng.ArgumentError, match="finite numbers >= 0"):
            nng.merge(a, b, weights=weights)
    for weights in (1.0, "ab", [None, 1]):
        with pytest.raises(nng.ArgumentTypeError, match="list of numbers"):
            nng.merge(a, b, weights=weights)
    with pytest.raises(nng.CollectionError):
        nng.merge(a, b, measured("conv2d", "diag")[0][0])
    with pytest.raises(nng.StructureError, match="PMatDiag and PMatDense"):
        nng.merge(a, b, measured("mlp", "dense")[0][0])
    eye = nng.PMatEye.build(a.layer_collection, dtype=torch.float64)
    assert torch.equal(nng.merge(eye, 3 * eye, weights=[1, 1]).to_dense(), 2 * eye.to_dense())
