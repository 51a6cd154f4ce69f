"""Sums of stored matrices, block by block: every pair of representations against the dense sum."""

import functools
import itertools

import pytest
import torch
from cases import STORED, build, representation

import nngeom as nng
from nngeom.pmat import sum_block

f64 = torch.float64
MODELS = ("mlp", "conv2d", "layer-norm", "language-model")
PAIRS = list(itertools.combinations_with_replacement(STORED, 2))


@functools.cache
def matrix(name, kind, seed=0):
    torch.set_num_threads(1)
    case = build(name, sizes=(3, 4) if not seed else (5,))
    return nng.FIM(case.model, case.loader, representation(kind, case.model))


@pytest.fixture(params=[False, True], ids=["direct", "iterated"])
def iterated(request, monkeypatch):
    """Whether all blocks are taken to be too large to be factorised at once."""
    if request.param:
        monkeypatch.setattr(sum_block, "ITERATED", 1)
        monkeypatch.setattr("nngeom.pmat.partitioned.ITERATED", 1)
    return request.param


def close(x, y, tol=1e-8):
    torch.testing.assert_close(x, y, rtol=tol, atol=tol * float(y.abs().max()))


def damping_of(dense):
    return 0.1 + 1.1 * max(0.0, -float(torch.linalg.eigvalsh(dense).min()))


def vectors(m, *batch):
    return nng.PVector.randn(m.layer_collection, *batch, dtype=f64, generator=torch.Generator().manual_seed(3))


def require_all(m, dense, damping):
    """Every operation against the dense sum."""
    v, eye = vectors(m, 2), torch.eye(len(dense), dtype=f64)
    damped = dense + damping * eye
    close(m.mv(v).flat(), v.flat() @ dense)
    close(m.vTMv(v), ((v.flat() @ dense) * v.flat()).sum(-1))
    close(m.trace(), dense.trace())
    close(m.diag().flat(), dense.diagonal())
    close(m.norm(), dense.norm())
    close(m.to_dense(), dense)
    expected = torch.linalg.solve(damped, v.flat().T).T
    close(m.solve(v, damping).flat(), expected)
    close(m.inverse(damping).mv(v).flat(), expected)
    close(m.logdet(damping), torch.linalg.slogdet(damped)[1])
    values, basis = m.eigh()
    close(values, torch.linalg.eigvalsh(dense))
    u = basis.to_dense()
    close(u.T @ u, eye)
    close((u * values) @ u.T, dense)
    require_covariance(m, damped, damping)


def require_covariance(m, damped, damping):
    """Draws are a linear map of white noise: read it off, and multiply it by its transpose."""
    d, calls = len(damped), []

    def unit(*args, **kwargs):
        calls.append(None)
        return nng.PVector.from_flat(m.layer_collection, torch.zeros(args[1], d, dtype=f64))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nng.PVector, "randn", unit)
        m.sample(1, damping)
    many = len(calls)

    def columns(*args, **kwargs):
        calls.append(None)
        rows = torch.zeros(many * d, d, dtype=f64)
        rows[(len(calls) - 1) * d : len(calls) * d] = torch.eye(d, dtype=f64)
        return nng.PVector.from_flat(m.layer_collection, rows)

    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nng.PVector, "randn", columns)
        root = m.sample(many * d, damping).flat()
    assert len(calls) == many
    close(root.T @ root, torch.linalg.inv(damped), 1e-6)


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
@pytest.mark.parametrize("name", MODELS)
def test_pairs(name, pair, iterated):
    x, y = matrix(name, pair[0]), matrix(name, pair[1], 1)
    dense = x.to_dense() + 0.5 * y.to_dense()
    require_all(x + 0.5 * y, dense, damping_of(dense))


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
@pytest.mark.parametrize("name", MODELS[:2])
def test_differences(name, pair, iterated):
    x, y = matrix(name, pair[0]), matrix(name, pair[1], 1)
    dense = x.to_dense() - 2 * y.to_dense()
    m = x - 2 * y
    require_all(m, dense, damping_of(dense))
    least = float(torch.linalg.eigvalsh(dense).min())
    assert least < 0
    for solve in (lambda x: m.solve(vectors(m), x), lambda x: m.inverse(x), lambda x: m.sample(1, x)):
        with pytest.raises(nng.SingularError) as error:
            solve(-0.5 * least)
        if error.value.needed is not None:
            assert error.value.needed == pytest.approx(-least, rel=1e-6)
