"""``norm(2)`` of kernels: of one set of examples and of two, small and large, with its gradient."""

from __future__ import annotations

import pytest
import torch

import nngeom as nng

f64 = torch.float64


def entries(c: int, n: int, m: int) -> torch.Tensor:
    return torch.randn(c, n, c, m, generator=torch.Generator().manual_seed(n), dtype=f64)


@pytest.mark.parametrize("n, m", [(3, 5), (5, 3), (1, 4), (300, 260), (200, 400)])
def test_between_two_sets(n, m):
    t = entries(2, n, m)
    dense = t.reshape(2 * n, 2 * m)
    torch.testing.assert_close(nng.FMatDense(t).norm(2), torch.linalg.matrix_norm(dense, 2), rtol=1e-9, atol=0)
    blocks = t[torch.arange(2), :, torch.arange(2)]
    expected = torch.linalg.matrix_norm(blocks, 2).max()
    torch.testing.assert_close(nng.FMatBlockDiag(blocks).norm(2), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("side", [20, 600])
def test_eigenvalues_of_either_sign(side):
    t = entries(1, side, side)
    k = nng.FMatDense(t + t.permute(2, 3, 0, 1))
    torch.testing.assert_close(k.norm(2), k.eigh()[0].abs().max(), rtol=1e-9, atol=0)
    diagonal = nng.FMatDiag(t[0, :, 0])
    torch.testing.assert_close(diagonal.norm(2), t.abs().max())


@pytest.mark.parametrize("side", [20, 600])
def test_has_a_gradient(side):
    t = entries(1, side, side)
    t = (t + t.permute(2, 3, 0, 1)).requires_grad_()
    nng.FMatDense(t).norm(2).backward()
    values, vectors = torch.linalg.eigh(t.detach()[0, :, 0])
    top = values.abs().argmax()
    expected = values[top].sign() * torch.outer(vectors[:, top], vectors[:, top])
    torch.testing.assert_close(t.grad[0, :, 0], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("side", [4, 600])
def test_of_nothing_but_zeros(side):
    assert float(nng.FMatDense(torch.zeros(1, side, 1, side)).norm(2)) == 0
