"""Sums as matrices like any other: parts, functions, norms, dampings of blocks and parameters, indefinite solves."""

import functools

import pytest
import torch
from cases import build, representation

import nngeom as nng
from nngeom.pmat import sum_block
from nngeom.pmat.sums import PMatSum

f64 = torch.float64
MODELS = ("mlp", "conv2d", "language-model")
PAIRS = [("kfac", "kfac"), ("kfac", "diag"), ("ekfac", "kfac"), ("quasi-diag", "eye"), ("low-rank", "block-diag")]
cases = pytest.mark.parametrize("name", MODELS), pytest.mark.parametrize("pair", PAIRS, ids="+".join)


@functools.cache
def matrix(name, kind, seed=0):
    torch.set_num_threads(1)
    case = build(name, sizes=(3, 4) if not seed else (5,))
    return nng.FIM(case.model, case.loader, representation(kind, case.model))


def total(name, pair, sign=1.0):
    return PMatSum((matrix(name, pair[0]), matrix(name, pair[1], seed=1)), (1.0, sign))


def close(x, y, tol=1e-8):
    torch.testing.assert_close(x, y, rtol=tol, atol=tol * float(y.abs().max()))


def vector(m, *batch):
    return nng.PVector.randn(m.layer_collection, *batch, dtype=f64, generator=torch.Generator().manual_seed(3))


def shift_of(m):
    """Enough that a quasi-diagonal part is positive."""
    return 0.1 + 1.1 * max(0.0, -float(torch.linalg.eigvalsh(m.to_dense()).min()))


def places(lc, names):
    flat = torch.arange(lc.numel)
    table = lc.offsets()
    sizes = {n: torch.Size(table[n][1]).numel() for n in names}
    return torch.cat([flat[table[n][0] : table[n][0] + sizes[n]] for n in lc.names if n in names])


@cases[0]
@cases[1]
def test_parts(name, pair):
    m = total(name, pair, -2.0)
    lc, dense = m.layer_collection, m.to_dense()
    layers = {layer: names for layer, names in lc.by_layer().items()}
    found = m.by_layer()
    assert list(found) == list(layers)
    for layer, names in layers.items():
        at = places(lc, names)
        close(found[layer].to_dense(), dense[at][:, at])
        close(m[list(names)].to_dense(), dense[at][:, at])
        assert found[layer].layer_collection.names == names
    v = vector(found[layer])
    part = dense[at][:, at] + 5 * torch.eye(len(at), dtype=f64)
    close(found[layer].solve(v, 5.0, indefinite=True).flat(), torch.linalg.solve(part, v.flat()))


@cases[0]
@cases[1]
def test_functions_and_norms(name, pair, monkeypatch):
    m = total(name, pair)
    dense, x = m.to_dense(), shift_of(m)
    values, u = torch.linalg.eigh(dense)
    close(m.norm(2), values.abs().max())
    monkeypatch.setattr(sum_block, "ITERATED", 1)
    close(m.norm(2), values.abs().max())
    close(m.apply(lambda s: s.clamp(-1.0, 1.0).exp()).to_dense(), (u * values.clamp(-1, 1).exp()) @ u.T)
    close(m.power(-0.5, x).to_dense(), (u * (values + x).rsqrt()) @ u.T)
    close((m**2).to_dense(), dense @ dense)
    relative = nng.Relative(x / float(dense.trace()) * len(dense))
    half = m.power(-0.5, relative)
    v = vector(m)
    close((half @ (half @ v)).flat(), m.solve(v, relative).flat(), 1e-6)


@cases[0]
@cases[1]
def test_indefinite(name, pair):
    m = total(name, pair, -3.0)
    dense = m.to_dense()
    values = torch.linalg.eigvalsh(dense)
    values = values[: int((values < 0).sum()) + 1]
    k = int(values.diff().argmax())
    x = max(0.0, -float(values[k : k + 2].mean()))  # in the widest gap between the negative ones
    damped = dense + x * torch.eye(len(dense), dtype=f64)
    assert float(torch.linalg.eigvalsh(damped).min()) < 0
    v = vector(m)
    expected = torch.linalg.solve(damped, v.flat())
    close(m.solve(v, x, indefinite=True).flat(), expected)
    close(m.inverse(x, indefinite=True).mv(v).flat(), expected)
    close(m.solve(v, x, indefinite=True, limit=1, max_steps=20_000).flat(), expected, 1e-6)  # by MINRES
    with pytest.raises(nng.SingularError):
        m.solve(v, x)
    with pytest.raises(nng.ArgumentError, match="indefinite"):
        m.solve(v, nng.Cutoff(0.1), indefinite=True)


@pytest.mark.parametrize("name", ["mlp", "conv2d"])
@cases[1]
@pytest.mark.parametrize("kind", ["parameter", "pattern", "tensor", "relative"])
def test_dampings(name, pair, kind):
    m = total(name, pair)
    lc, dense, least = m.layer_collection, m.to_dense(), shift_of(m)
    if kind == "parameter":
        precisions = vector(m).apply(torch.exp) + least * vector(m).apply(torch.ones_like)
        damping, d = precisions, precisions.flat()
    elif kind == "relative":
        blocks = m.partitioned()
        spans = [lc.span()] if blocks.rows is not None else list(blocks.blocks)
        damping, d = nng.Relative(1 + least * len(dense) / float(dense.trace())), torch.zeros(len(dense), dtype=f64)
        for layout in spans:
            mean = float(dense.diagonal()[layout.indices().flatten()].mean())
            d[layout.indices().flatten()] = damping.value * mean
        if bool((torch.linalg.eigvalsh(dense + torch.diag(d)) <= 1e-9).any()):
            with pytest.raises(nng.SingularError):
                m.solve(vector(m), damping)
            return
    else:
        first = next(iter(lc.names))
        number = torch.tensor(least + 0.5, dtype=f64, requires_grad=kind == "tensor")
        damping = {first: number if kind == "tensor" else least + 0.5, "*": least}
        d = torch.full((len(dense),), least, dtype=f64)
        d[places(lc, [first])] = least + 0.5
    damped = dense + torch.diag(d)
    v = vector(m, 2)
    expected = torch.linalg.solve(damped, v.flat().T).T
    solved = m.solve(v, damping)
    close(solved.flat().detach(), expected)
    close(m.inverse(damping).mv(v).flat().detach(), expected)
    close(m.logdet(damping).detach(), torch.linalg.slogdet(damped)[1])
    draws = m.sample(20_000, damping, generator=torch.Generator().manual_seed(0)).flat().detach()
    spread = torch.linalg.inv(damped).diagonal()
    torch.testing.assert_close(draws.var(0), spread, rtol=0.08, atol=0.0)
    if kind == "tensor":
        (slope,) = torch.autograd.grad(m.logdet(damping), number)
        close(slope, torch.linalg.inv(damped).diagonal()[places(lc, [first])].sum())


def test_cutoff_of_the_largest():
    m = total("mlp", ("kfac", "kfac"))
    values, u = torch.linalg.eigh(m.to_dense())
    v = vector(m)
    expected = u[:, -7:] @ ((u[:, -7:].T @ v.flat()) / values[-7:])
    close(m.solve(v, nng.Cutoff(top=7)).flat(), expected)


def test_sums_with_implicit_parts():
    case = build("mlp", sizes=(3, 4))
    implicit = nng.FIM(case.model, case.loader, nng.PMatImplicit)
    m = implicit + matrix("mlp", "diag")
    dense = m.to_dense()
    layer, names = next(iter(m.layer_collection.by_layer().items()))
    at = places(m.layer_collection, names)
    close(m[layer].to_dense(), dense[at][:, at])
    close(implicit[list(names)].to_dense(), implicit.to_dense()[at][:, at])
    close(implicit[lambda name: name in names].to_dense(), implicit.to_dense()[at][:, at])
    v, values = vector(m), torch.linalg.eigvalsh(dense)
    close(m.norm(2), values.abs().max())
    precisions = vector(m).apply(torch.exp)
    close(m.solve(v, precisions).flat(), torch.linalg.solve(dense + torch.diag(precisions.flat()), v.flat()))
    difference = m - 2.0 * matrix("mlp", "kfac")
    shifted = difference.to_dense() + 0.3 * torch.eye(len(dense), dtype=f64)
    close(difference.solve(v, 0.3, indefinite=True).flat(), torch.linalg.solve(shifted, v.flat()))
    with pytest.raises(nng.UnsupportedError, match="materialize"):
        m.power(-1.0)
    with pytest.raises(nng.UnsupportedError, match="stored"):
        m.solve(v, nng.Relative(0.1))


def test_errors():
    m = total("mlp", ("kfac", "diag"))
    with pytest.raises(nng.CollectionError, match="nothing"):
        m["nothing"]
    with pytest.raises(nng.ArgumentError, match="norm"):
        m.norm("nuclear")
    with pytest.raises(nng.DampingError):
        m.solve(vector(m), -1.0 * vector(m).apply(torch.ones_like))
    with pytest.raises(nng.ArgumentError, match="no pattern"):
        m.logdet({m.layer_collection.names[0]: 1.0})
    with pytest.raises(nng.SizeError, match="function"):
        m.apply(torch.exp, limit=1)
    with pytest.raises(nng.UnsupportedError, match="parts"):
        (m @ m)["*"]
    with pytest.raises(nng.UnsupportedError, match="parts"):
        (m @ m).by_layer()
