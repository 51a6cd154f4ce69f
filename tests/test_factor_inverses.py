"""Inverses of several factors at once are those of one by one, and the same are refused."""

import pytest
import torch

from nngeom.core.errors import SingularError
from nngeom.core.factor_inverses import factor_inverses
from nngeom.core.linalg import factor_inverse

f64 = torch.float64


def positive(s, p, dtype=f64, seed=0):
    x = torch.randn(s, 2 * p, p, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    return x.mT @ x / (2 * p)


@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_they_are_those_of_one_by_one(dtype):
    factors = [positive(1, 5, dtype), positive(3, 2, dtype, 1), positive(1, 40, dtype, 2), positive(1, 1, dtype, 3)]
    found = factor_inverses(factors, "abcd")
    for factor, inverse in zip(factors, found):
        assert torch.equal(inverse, factor_inverse(factor, ""))
        one = torch.eye(factor.shape[-1], dtype=dtype).expand_as(factor)
        torch.testing.assert_close(inverse @ factor, one, atol=1e-10 if dtype == f64 else 1e-3, rtol=0)


def test_diagonal_ones_and_other_dtypes_too():
    factors = [positive(1, 4), torch.rand(1, 6, dtype=f64) + 1, positive(1, 3, torch.float32)]
    for factor, inverse in zip(factors, factor_inverses(factors, "abc")):
        assert torch.equal(inverse, factor_inverse(factor, ""))


BAD = {
    "indefinite": lambda m: m - 2 * m.diagonal(dim1=-2, dim2=-1).amax() * torch.eye(m.shape[-1], dtype=f64),
    "of lower rank": lambda m: m[..., :1] @ m[..., :1].mT,
    "zero": torch.zeros_like,
    "not finite": lambda m: m / 0,
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("place", [0, 1])
def test_the_first_that_has_none_is_named(name, place):
    factors = [positive(1, 5), positive(2, 4, seed=1)]
    factors[place] = BAD[name](factors[place])
    with pytest.raises(SingularError, match=["first", "second"][place]) as told:
        factor_inverses(factors, ("first", "second"))
    with pytest.raises(SingularError) as alone:
        factor_inverse(factors[place], ("first", "second")[place])
    assert str(told.value) == str(alone.value)


def test_pivots_near_what_counts_as_zero_are_asked_one_by_one():
    p = 6
    eps = p * torch.finfo(f64).eps
    for root, regular in ((0.5, False), (1.5, True), (4.0, True)):
        m = torch.eye(p, dtype=f64).unsqueeze(0)
        m[0, -1, -1] = root * eps
        if regular:
            assert torch.equal(factor_inverses([m, positive(1, 3)], "ab")[0], factor_inverse(m, ""))
        else:
            with pytest.raises(SingularError):
                factor_inverses([m, positive(1, 3)], "ab")


def test_gradients_pass():
    m = positive(1, 3).requires_grad_()
    (got,) = torch.autograd.grad(sum(x.square().sum() for x in factor_inverses([m, positive(1, 2)], "ab")), m)
    (expected,) = torch.autograd.grad(torch.linalg.inv(m).square().sum(), m)
    torch.testing.assert_close(got, expected)
