"""Sums whose parts commute: their one eigenbasis in product form, and those that have none."""

import pytest
import torch
from test_sum_algebra import MODELS, close, f64, matrix, shift_of, vector

import nngeom as nng
from nngeom.pmat import sum_block
from nngeom.pmat.sums import PMatSum


def alike(name, kind):
    """Sums whose parts have one eigenbasis in product form."""
    k, e = matrix(name, "kfac"), matrix(name, "ekfac")
    return {
        "multiples": 2.0 * k + k,
        "a difference": k - 0.3 * k,
        "with its own eigenbasis": k + e,
        "less its own eigenbasis": k - 2.0 * e,
        "many": PMatSum((k, e, k, e), (1.0, 0.5, 2.5, -0.25)),
    }[kind]


ALIKE = ("multiples", "a difference", "with its own eigenbasis", "less its own eigenbasis", "many")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ALIKE)
def test_parts_that_commute_are_never_dense(name, kind, monkeypatch):
    m = alike(name, kind)
    dense, x = m.to_dense(), shift_of(m)
    damped, v = dense + x * torch.eye(len(dense), dtype=f64), vector(m)
    monkeypatch.setattr(sum_block.SumBlock, "grouped", None)
    monkeypatch.setattr(sum_block.SumBlock, "iterate", None)
    values, basis = m.eigh(limit=1)
    close(values, torch.linalg.eigvalsh(dense))
    u = basis.to_dense()
    close((u * values) @ u.T, dense)
    close(m.solve(v, x, limit=1).flat(), torch.linalg.solve(damped, v.flat()))
    close(m.inverse(x, limit=1).to_dense(), damped.inverse())
    close(m.logdet(x, limit=1), damped.logdet())
    close(m.norm(2), values.abs().max())
    close(m.power(0.5, x, limit=1).to_dense() @ m.power(0.5, x, limit=1).to_dense(), damped)
    assert m.sample(2, x, limit=1).flat().shape == (2, len(dense))


@pytest.mark.parametrize("apart", [1e-3, 1e-6, 1e-9])
def test_parts_that_nearly_commute_are_not_taken_to(apart):
    m = matrix("mlp", "kfac")
    torch.manual_seed(0)
    near = {}
    for layer, (a, g) in m.factors().items():
        q, p = torch.randn_like(a), torch.randn_like(g)
        near[layer] = a + apart * a.norm() * (q + q.T), g + apart * g.norm() * (p + p.T)
    other = nng.PMatKFAC.from_factors(m.layer_collection, near)
    total = m + other
    close(total.eigh()[0], torch.linalg.eigvalsh(total.to_dense()), 1e-13)
    v = vector(m)
    close(
        total.solve(v, 1e-2).flat(),
        torch.linalg.solve(total.to_dense() + 1e-2 * torch.eye(m.shape[0], dtype=f64), v.flat()),
        1e-10,
    )


def test_parts_that_commute_in_float32():
    m = alike("mlp", "with its own eigenbasis")
    small = m.to(torch.float32)
    close(small.eigh(limit=1)[0].double(), torch.linalg.eigvalsh(m.to_dense()), 1e-5)


def test_parts_that_commute_keep_their_derivatives():
    m = matrix("mlp", "kfac")
    w = torch.tensor(0.7, dtype=f64, requires_grad=True)
    v = vector(m)
    total = PMatSum((m, matrix("mlp", "ekfac")), (1.0, w))
    loss = (total.solve(v, 1e-1) @ v).sum()
    loss.backward()
    inverse = torch.linalg.inv(total.to_dense().detach() + 1e-1 * torch.eye(len(v.flat()), dtype=f64))
    x = inverse @ v.flat()
    close(w.grad, -(x @ matrix("mlp", "ekfac").to_dense() @ x))
