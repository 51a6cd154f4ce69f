"""Matrices made of one's own tensors are what the tensors say, and what is no matrix is refused."""

import pytest
import torch
from cases import CASES, build
from torch import nn

import nngeom as nng

f64 = torch.float64
SIDES = "do not say how"  # factors that cannot be read again


def measured(name, kind=nng.PMatKFAC, **options):
    case = build(name)
    return nng.FIM(case.model, case.loader, kind, **options)


@pytest.fixture
def lc():
    return nng.LayerCollection.from_model(build("mlp").model)


def symmetric(p, seed=0):
    m = torch.randn(p, p, dtype=f64, generator=torch.Generator().manual_seed(seed))
    return m + m.T


def test_diagonals(lc):
    v = nng.PVector.randn(lc, dtype=f64)
    m = nng.PMatDiag.from_vector(v)
    assert type(m) is nng.PMatDiag and m.examples == 1
    assert torch.equal(m.to_dense(), torch.diag(v.flat()))
    v.flat().zero_()
    assert float(m.norm()) > 0
    assert nng.PMatDiag.from_vector(v, examples=7).examples == 7


def test_dense_ones(lc):
    m = symmetric(lc.numel)
    given = nng.PMatDense.from_tensor(lc, m)
    assert type(given) is nng.PMatDense and torch.equal(given.to_dense(), m)
    rounded = m * (1 + 1e-15 * torch.randn_like(m))
    dense = nng.PMatDense.from_tensor(lc, rounded).to_dense()
    assert torch.equal(dense, dense.T)


def test_blocks(lc):
    blocks = {layer: symmetric(lc.span(names).numel, 1) for layer, names in lc.by_layer().items()}
    m = nng.PMatBlockDiag.from_blocks(lc, dict(reversed(blocks.items())))
    assert type(m) is nng.PMatBlockDiag and torch.equal(m.to_dense(), torch.block_diag(*blocks.values()))


def test_rows(lc):
    r = torch.randn(5, lc.numel, dtype=f64)
    m = nng.PMatLowRank.from_rows(lc, r)
    assert type(m) is nng.PMatLowRank
    torch.testing.assert_close(m.to_dense(), r.T @ r)


def test_factors(lc):
    pairs = {layer: (symmetric(i, i), symmetric(o, o)) for layer, i, o in (("0", 5, 5), ("2", 6, 3))}
    m = nng.PMatKFAC.from_factors(lc, pairs)
    assert type(m) is nng.PMatKFAC
    a, g = pairs["2"]
    v = nng.PVector.randn(lc, dtype=f64)
    w = torch.cat([v["2.weight"], v["2.bias"].unsqueeze(1)], 1)
    product = g @ w @ a
    torch.testing.assert_close(m.mv(v)["2.weight"], product[:, :-1])
    torch.testing.assert_close(m.mv(v)["2.bias"], product[:, -1])
    back = m.factors()
    assert list(back) == ["0", "2"] and torch.equal(back["2"][0], a) and torch.equal(back["2"][1], g)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", CASES)
def test_factors_of_a_measured_matrix_make_it_again(name, sharing):
    m = measured(name, sharing=sharing)
    try:
        factors = m.factors()
    except nng.StructureError as error:
        assert SIDES in str(error) and name in UNREAD
        return
    assert name not in UNREAD
    again = nng.PMatKFAC.from_factors(m.layer_collection, factors, examples=m.examples)
    torch.testing.assert_close(again.to_dense(), m.to_dense(), rtol=1e-14, atol=1e-14)
    assert again.examples == m.examples and len(again.blocks) == len(m.blocks)


UNREAD = {"deconv3d", "einsum"}  # a square transposed kernel, and letters that no shape tells


def test_factors_of_windows_with_uncorrelated_places_are_not_read():
    with pytest.raises(nng.StructureError, match=SIDES):
        measured("conv2d-same", sua=True).factors()


def test_factors_of_groups_of_tables_and_of_unused_parameters():
    grouped = measured("conv2d").factors()["body.0"]
    assert grouped[0].shape == (2, 13, 13) and grouped[1].shape == (2, 2, 2)
    table = measured("embedding").factors()["body.0"]
    assert table[0].shape == (6,) and table[1].shape == (3, 3)
    model = nn.Sequential(nn.Linear(3, 2)).double()
    model.register_parameter("idle", nn.Parameter(torch.ones(4, dtype=f64)))
    m = nng.FIM(model, [torch.randn(5, 3, dtype=f64)], check=False)
    again = nng.PMatKFAC.from_factors(m.layer_collection, m.factors())
    torch.testing.assert_close(again.to_dense(), m.to_dense())


def test_multiples_have_factors():
    m = -2 * measured("mlp")
    again = nng.PMatKFAC.from_factors(m.layer_collection, m.factors())
    torch.testing.assert_close(again.to_dense(), m.to_dense())
    torch.testing.assert_close(again.eigh()[0], torch.linalg.eigvalsh(m.to_dense()))


def test_examples_weigh_merged_matrices(lc):
    a, b = (nng.PMatDiag.from_vector(nng.PVector.randn(lc, dtype=f64), examples=n) for n in (1, 3))
    torch.testing.assert_close(nng.merge(a, b).to_dense(), a.to_dense() / 4 + 3 * b.to_dense() / 4)


def nan(x):
    x = x.clone()
    x.view(-1)[0] = torch.nan
    return x


WRONG = {
    "a tensor for a vector": (lambda lc: nng.PMatDiag.from_vector(torch.ones(43)), "expected a PVector"),
    "a batch": (lambda lc: nng.PMatDiag.from_vector(nng.PVector.randn(lc, 2)), "shape"),
    "NaN on a diagonal": (lambda lc: nng.PMatDiag.from_vector(nng.PVector.randn(lc).apply(nan)), "NaN"),
    "integers": (lambda lc: nng.PMatDense.from_tensor(lc, torch.eye(43).long()), "floating-point"),
    "another size": (lambda lc: nng.PMatDense.from_tensor(lc, torch.eye(42)), r"\(43, 43\)"),
    "asymmetric": (lambda lc: nng.PMatDense.from_tensor(lc, torch.eye(43).roll(1, 0)), "not symmetric"),
    "infinite": (lambda lc: nng.PMatDense.from_tensor(lc, torch.eye(43) / 0), "NaN"),
    "no collection": (lambda lc: nng.PMatDense.from_tensor(build("mlp").model, torch.eye(43)), "LayerCollection"),
    "no tensor": (lambda lc: nng.PMatDense.from_tensor(lc, [1.0]), "expected a tensor"),
    "negative examples": (lambda lc: nng.PMatDense.from_tensor(lc, torch.eye(43), examples=-1), "examples"),
    "half an example": (lambda lc: nng.PMatDense.from_tensor(lc, torch.eye(43), examples=0.5), "examples"),
    "a missing layer": (lambda lc: nng.PMatBlockDiag.from_blocks(lc, {"0": torch.eye(25)}), "nothing is given"),
    "a foreign layer": (lambda lc: nng.PMatBlockDiag.from_blocks(lc, {"1": torch.eye(25)}), "no layer"),
    "a list of blocks": (lambda lc: nng.PMatBlockDiag.from_blocks(lc, [torch.eye(25)]), "expected a dict"),
    "two dtypes": (
        lambda lc: nng.PMatBlockDiag.from_blocks(lc, {"0": torch.eye(25), "2": torch.eye(18).double()}),
        "dtypes",
    ),
    "rows of another length": (lambda lc: nng.PMatLowRank.from_rows(lc, torch.ones(3, 4)), r"\(any, 43\)"),
    "one row": (lambda lc: nng.PMatLowRank.from_rows(lc, torch.ones(43)), "shape"),
}


def factors(lc, **changed):
    pairs = {"0": (torch.eye(5), torch.eye(5)), "2": (torch.eye(6), torch.eye(3))}
    return nng.PMatKFAC.from_factors(lc, {**pairs, **{k.strip("_"): v for k, v in changed.items()}})


WRONG |= {
    "factors turned round": (lambda lc: factors(lc, _2=(torch.eye(3), torch.eye(6))), "A over the inputs"),
    "factors without the bias": (lambda lc: factors(lc, _2=(torch.eye(5), torch.eye(3))), "A over the inputs"),
    "one factor": (lambda lc: factors(lc, _2=torch.eye(6)), "tuple"),
    "a factor that is not square": (lambda lc: factors(lc, _2=(torch.ones(6, 5), torch.eye(3))), "square"),
    "an asymmetric factor": (lambda lc: factors(lc, _2=(torch.eye(6).roll(1, 0), torch.eye(3))), "not symmetric"),
    "NaN in a factor": (lambda lc: factors(lc, _2=(nan(torch.eye(6)), torch.eye(3))), "NaN"),
    "a number as a factor": (lambda lc: factors(lc, _2=(torch.eye(6), torch.tensor(1.0))), "leading axis"),
    "factors of a foreign layer": (lambda lc: factors(lc, _3=(torch.eye(6), torch.eye(3))), "no layer"),
    "a parameter twice": (
        lambda lc: nng.PMatKFAC.from_factors(
            lc,
            {
                "0": (torch.eye(5), torch.eye(5)),
                "2": (torch.eye(6), torch.eye(3)),
                "2.bias": (torch.eye(3), torch.eye(1)),
            },
        ),
        "twice",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_matrix_is_refused(lc, what):
    make, message = WRONG[what]
    with pytest.raises(nng.NNGeomError, match=message):
        make(lc)
