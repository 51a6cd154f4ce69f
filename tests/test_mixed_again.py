"""Mixtures measured again in the eigenbases that they keep, and their parts."""

import pytest
import torch
from cases import build

import nngeom as nng

f64 = torch.float64


def close(x, y, tol=1e-10):
    torch.testing.assert_close(x, y, rtol=tol, atol=tol * float(y.abs().max()))


def halves(model):
    names = [name for name, _ in model.named_parameters()]
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    return layers[0], layers[1:]


@pytest.mark.parametrize("name", ["mlp", "transformer"])
@pytest.mark.parametrize("rest", [nng.PMatDiag, nng.PMatEye, nng.PMatKFAC], ids=lambda r: r.__name__)
def test_rescaled(name, rest):
    case, other = build(name, sizes=(3, 4)), build(name, sizes=(5,))
    first, _ = halves(case.model)
    mixture = nng.PMatMixed({f"{first}.*": nng.PMatEKFAC}, default=rest)
    m = nng.FIM(case.model, case.loader, mixture)
    for measure, options in ((nng.FIM, {}), (nng.EmpiricalFIM, {"loss": "cross_entropy"})):
        again = m.rescaled(case.model, other.loader, measure, **options)
        assert isinstance(again, nng.PMatMixed) and again.examples == 5
        exact = measure(case.model, other.loader, nng.PMatDense, **options).to_dense()
        if rest is nng.PMatDiag:
            whole = nng.FIM(case.model, case.loader, nng.PMatEKFAC).rescaled(
                case.model, other.loader, measure, **options
            )
            close(again[f"{first}.*"].to_dense(), whole[f"{first}.*"].to_dense())
            close(again[lambda n: not n.startswith(f"{first}.")].diag().flat(), rest_of(exact, m, first).diagonal())
        if rest is nng.PMatEye:
            part = rest_of(exact, m, first)
            close(again[lambda n: not n.startswith(f"{first}.")].trace(), part.trace())
        if rest is nng.PMatKFAC:  # the diagonal of the exact matrix in the eigenbasis of the factors
            bases = nng.FIM(case.model, case.loader, nng.PMatEKFAC)
            close(again.to_dense(), bases.rescaled(case.model, other.loader, measure, **options).to_dense())


def rest_of(dense, m, first):
    lc = m.layer_collection
    keep = [j for n, (lo, shape) in lc.offsets().items() if not n.startswith(f"{first}.") for j in span(lo, shape)]
    return dense[keep][:, keep]


def span(lo, shape):
    return range(lo, lo + torch.Size(shape).numel())


def test_rescaled_by_a_hessian():
    case = build("mlp", sizes=(3, 4))
    first, _ = halves(case.model)
    m = nng.FIM(case.model, case.loader, nng.PMatMixed({f"{first}.*": nng.PMatEKFAC}, default=nng.PMatDiag))
    again = m.rescaled(case.model, case.loader, nng.Hessian, loss="cross_entropy")
    exact = nng.Hessian(case.model, case.loader, nng.PMatDense, loss="cross_entropy")
    close(again[lambda n: not n.startswith(f"{first}.")].diag().flat(), rest_of(exact.to_dense(), m, first).diagonal())
    whole = nng.FIM(case.model, case.loader, nng.PMatEKFAC).rescaled(
        case.model, case.loader, nng.Hessian, loss="cross_entropy"
    )
    close(again[first].to_dense(), whole[first].to_dense())


def test_parts_of_a_mixture():
    case = build("mlp", sizes=(3, 4))
    first, others = halves(case.model)
    m = nng.FIM(case.model, case.loader, nng.PMatMixed({f"{first}.*": nng.PMatKFAC}, default=nng.PMatDense))
    assert isinstance(m[first], nng.PMatMixed) and set(m.by_layer()) == {first, *others}
    close(m[first].to_dense(), nng.FIM(case.model, case.loader, nng.PMatKFAC)[first].to_dense())
    with pytest.raises(nng.StructureError, match="keeps no eigenbasis"):
        m.rescaled(case.model, case.loader)
