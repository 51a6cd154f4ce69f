"""Matrices measured some layers at a time into a folder: the numbers of one in memory, resumed, read when used."""

import functools
import json
import os
import weakref

import pytest
import torch
from cases import build
from torch import nn

import nngeom as nng
from nngeom import folders
from nngeom.core.files import Lock

f64 = torch.float64
MODELS = ["mlp", "language-model", "transformer"]
KINDS = {
    "kfac": nng.PMatKFAC,
    "reduced": nng.PMatKFAC.options(sharing="reduce"),
    "ekfac": nng.PMatEKFAC,
    "low rank": nng.PMatEKFAC.options(factor_limit=5, factor_form=("low_rank", 2)),
    "block-diag": nng.PMatBlockDiag,
    "quasi-diag": nng.PMatQuasiDiag,
    "diag": nng.PMatDiag,
    "mixed": nng.PMatMixed({"*bias": nng.PMatDiag}, default=nng.PMatEKFAC),
}


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 4)).double()
    return model, [(torch.randn(n, 6, dtype=f64), torch.randint(0, 4, (n,))) for n in (5, 4)]


def close(x, y, tol=1e-9):
    x, y = (z.flat() if isinstance(z, nng.PVector) else z for z in (x, y))
    torch.testing.assert_close(x, y, rtol=tol, atol=tol * float(y.abs().max()))


def in_parts(path, *args, **options):
    """One layer a part: the budget is below the smallest."""
    with pytest.warns(nng.MemoryWarning):
        return nng.to_folder(path, *args, memory_budget=1, **options)


@pytest.mark.filterwarnings("ignore::nngeom.MemoryWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_the_matrix_is_the_one_in_memory(name, kind, tmp_path):
    case = build(name)
    whole = nng.FIM(case.model, case.loader, KINDS[kind])
    m = nng.to_folder(tmp_path / "m", nng.FIM, case.model, case.loader, KINDS[kind], memory_budget=1)
    lc = whole.layer_collection
    assert len(m.parts) == len(lc.by_layer()) > 1 and m.layer_collection == lc and m.examples == whole.examples
    assert m.dtype == whole.dtype and type(m.in_memory()) is type(whole)
    v, x = nng.PVector.randn(lc, 2, dtype=f64), 1.0 if kind == "quasi-diag" else 0.1
    inside = m.in_memory()
    close(inside.to_dense(), whole.to_dense())
    for f in (
        lambda m: m.mv(v), lambda m: m.vTMv(v), lambda m: m.trace(), lambda m: m.diag(), lambda m: m.norm(),
        lambda m: m.norm(2), lambda m: m.logdet(x), lambda m: m.solve(v, x), lambda m: m.inverse(x).mv(v),
        lambda m: (0.5 * m).solve(v, x), lambda m: (m / 2).diag(), lambda m: m.power(2.0).mv(v), lambda m: m.to_dense(),
        lambda m: m.solve(v, {"*bias": x, "*": x}), lambda m: m.solve(v, nng.FactoredTikhonov(x)),
        lambda m: m.to(torch.float32).mv(v.to(torch.float32)).to(f64), lambda m: m.inverse(nng.Cutoff(top=5)).mv(v),
    ):  # fmt: skip
        close(f(m), f(whole))
    for f in (
        lambda m: m.sample(3, x, torch.Generator().manual_seed(0)),
        lambda m: m.solve(v, nng.Relative(10.0)),
    ):
        close(f(m), f(inside))
    for layer, part in whole.by_layer().items():
        close(m.by_layer()[layer].to_dense(), part.to_dense())
    close(
        (m + nng.PMatDiag.from_vector(whole.diag())).to_dense(),
        (whole + nng.PMatDiag.from_vector(whole.diag())).to_dense(),
    )
    again = nng.load(tmp_path / "m")
    close(again.mv(v), whole.mv(v))
    assert repr(again).startswith("PMatInFiles(") and dict(again.by_layer()).keys() == lc.by_layer().keys()


@pytest.mark.parametrize("measure, options", [
    (nng.GGN, {"loss": "cross_entropy"}),
    (nng.EmpiricalFIM, {"loss": "cross_entropy", "factor_limit": 6}),
    (nng.FIM_MonteCarlo, {"samples": 2}),
    (functools.partial, None),
])  # fmt: skip
def test_measures(measure, options, tmp_path):
    model, loader = net()
    if options is None:
        with pytest.raises(nng.ArgumentError, match="gave a"):
            nng.to_folder(tmp_path / "m", lambda model, loader, r, **k: 3, model, loader)
        return
    if measure is nng.FIM_MonteCarlo:
        generators = [torch.Generator().manual_seed(3) for _ in range(2)]
        whole = measure(model, loader, nng.PMatEKFAC, generator=generators[0], **options)
        m = in_parts(tmp_path / "m", measure, model, loader, nng.PMatEKFAC, generator=generators[1], **options)
        assert torch.equal(*(g.get_state() for g in generators))
        torch.manual_seed(5)
        first = in_parts(tmp_path / "n", measure, model, loader, nng.PMatEKFAC, **options)
        os.remove(tmp_path / "n" / "part-00001.safetensors")
        torch.manual_seed(6)  # the folder remembers its own
        second = in_parts(tmp_path / "n", measure, model, loader, nng.PMatEKFAC, **options)
        close(first.trace(), second.trace(), 1e-12)
    else:
        whole = measure(model, loader, nng.PMatEKFAC, **options)
        m = in_parts(tmp_path / "m", measure, model, loader, nng.PMatEKFAC, **options)
    close(m.in_memory().to_dense(), whole.to_dense())


def test_dampings_of_parameters(tmp_path):
    model, loader = net()
    m = in_parts(tmp_path / "m", nng.FIM, model, loader, nng.PMatBlockDiag)
    whole = m.in_memory()
    prior = abs(nng.PVector.randn(m.layer_collection, dtype=f64))
    v = nng.PVector.randn(m.layer_collection, dtype=f64)
    close(m.solve(v, prior), whole.solve(v, prior))
    close(m.logdet(prior), whole.logdet(prior))
    x = torch.tensor(0.1, dtype=f64, requires_grad=True)
    (one,), (other,) = (torch.autograd.grad(y.logdet(x), x) for y in (m, whole))
    close(one, other)
    hessian = nng.Hessian(model, loader, nng.PMatBlockDiag, loss="cross_entropy")
    mine = in_parts(tmp_path / "h", nng.Hessian, model, loader, nng.PMatBlockDiag, loss="cross_entropy")
    close(mine.solve(v, 0.01, indefinite=True), hessian.solve(v, 0.01, indefinite=True))
    with pytest.raises(nng.SingularError):
        mine.solve(v, 0.0)


def test_layers_share_parts_where_they_fit(tmp_path):
    model, loader = net()
    sizes = [len(nng.to_folder(tmp_path / str(b), nng.FIM, model, loader, nng.PMatKFAC, memory_budget=b).parts)
             for b in (10_000, 7_000)]  # fmt: skip
    assert sizes[0] == 1 < sizes[1] <= 3


def test_one_part_is_in_memory(tmp_path):
    model, loader = net()
    m, alive = in_parts(tmp_path / "m", nng.FIM, model, loader), []
    for _, part in m.inverse(0.1).read():
        assert sum(r() is not None for r in alive) <= 1
        alive.append(weakref.ref(part))
    assert len(alive) == 3


class Counted:
    """A measure that says how often it was called, and fails when it is to."""

    def __init__(self, fail=None):
        self.calls, self.fail = 0, fail

    def measure(self):
        def EmpiricalFIM(model, loader, representation, *, loss, layer_collection, memory_budget):
            self.calls += 1
            if self.calls == self.fail:
                raise KeyboardInterrupt
            return nng.EmpiricalFIM(model, loader, representation, loss=loss, layer_collection=layer_collection)

        return EmpiricalFIM


def test_an_interrupted_call_is_gone_on_with(tmp_path):
    model, loader = net()
    first, second, third = Counted(fail=2), Counted(), Counted()
    with pytest.raises(KeyboardInterrupt):
        in_parts(tmp_path / "m", first.measure(), model, loader, nng.PMatEKFAC, loss="cross_entropy")
    with pytest.raises(nng.FileError, match="lacks 2 of 3 parts; call to_folder"):
        nng.load(tmp_path / "m")
    assert not os.path.exists(tmp_path / "m" / "lock")
    (tmp_path / "m" / "part-00001.safetensors.0123456789ab.part").mkdir()  # what a killed process leaves
    m = in_parts(tmp_path / "m", second.measure(), model, loader, nng.PMatEKFAC, loss="cross_entropy")
    assert (first.calls, second.calls) == (2, 2)
    close(m.in_memory().to_dense(), nng.EmpiricalFIM(model, loader, nng.PMatEKFAC, loss="cross_entropy").to_dense())
    nng.to_folder(tmp_path / "m", third.measure(), model, loader, nng.PMatEKFAC, loss="cross_entropy")
    assert third.calls == 0


def test_other_inputs_are_refused(tmp_path):
    model, loader = net()
    call = functools.partial(nng.to_folder, tmp_path / "m", memory_budget=10**6)
    call(nng.GGN, model, loader, nng.PMatKFAC, loss="cross_entropy")
    call(nng.GGN, model, loader, nng.PMatKFAC, loss="cross_entropy", progress=False)
    for changed, match in (
        (lambda: call(nng.GGN, model, loader, nng.PMatEKFAC, loss="cross_entropy"), "the representation"),
        (lambda: call(nng.GGN, model, loader, nng.PMatKFAC, loss="cross_entropy", sharing="reduce"), "representation"),
        (lambda: call(nng.GGN, model, loader, nng.PMatKFAC, loss="mse"), "loss="),
        (lambda: call(nng.FIM, model, loader, nng.PMatKFAC), "the measure"),
        (lambda: call(nng.GGN, model, loader, nng.PMatKFAC, loss="cross_entropy",
                      layer_collection=nng.LayerCollection.from_model(model, exclude="0.*")), "layer_collection"),
    ):  # fmt: skip
        with pytest.raises(nng.ArgumentError, match=f"other inputs, which differ in: .*{match}"):
            changed()
    model[0].bias.data += 0.1
    with pytest.raises(nng.ArgumentError, match=r"parameter '0\.bias'"):
        call(nng.GGN, model, loader, nng.PMatKFAC, loss="cross_entropy")


def test_loaders(tmp_path):
    model, loader = net()
    x, y = (torch.cat(parts) for parts in zip(*loader))
    shuffled = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 4, shuffle=True)
    whole = nng.EmpiricalFIM(model, loader, nng.PMatKFAC, loss="cross_entropy")
    for j, given in enumerate((shuffled, (x, y), iter(loader))):
        m = in_parts(tmp_path / str(j), nng.EmpiricalFIM, model, given, nng.PMatKFAC, loss="cross_entropy")
        close(m.in_memory().to_dense(), whole.to_dense())
    os.remove(tmp_path / "0" / "part-00002.safetensors")
    with pytest.raises(nng.LoaderError, match="other examples every time"):
        in_parts(tmp_path / "0", nng.EmpiricalFIM, model, loader[:1], nng.PMatKFAC, loss="cross_entropy")

    class Noisy:
        def __iter__(self):
            return iter([(x + torch.randn_like(x), y)])

    with pytest.raises(nng.LoaderError, match="without random changes"):
        in_parts(tmp_path / "noisy", nng.EmpiricalFIM, model, Noisy(), nng.PMatKFAC, loss="cross_entropy")


def test_half_precision_is_summed_in_float32(tmp_path):
    model, loader = net()
    model, loader = model.bfloat16(), [(x.bfloat16(), y) for x, y in loader]
    m = in_parts(tmp_path / "m", nng.EmpiricalFIM, model, loader, nng.PMatEKFAC, loss="cross_entropy")
    whole = nng.EmpiricalFIM(model, loader, nng.PMatEKFAC, loss="cross_entropy")
    assert m.dtype == torch.float32 == m.in_memory().dtype
    close(m.in_memory().to_dense(), whole.to_dense(), 1e-6)


def sequences():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return model, [(torch.randn(6, 5, 3, dtype=f64), torch.randint(0, 2, (6,)))], lambda x, *y: model(x).mean(1)


@pytest.mark.parametrize("kind", [nng.PMatKFAC, nng.PMatEKFAC, nng.PMatBlockDiag])
def test_influence_is_a_sum_over_parts(kind, tmp_path):
    model, loader = net()
    m = in_parts(tmp_path / "m", nng.EmpiricalFIM, model, loader, kind, loss="cross_entropy")
    whole, options = m.in_memory(), {"loss": "cross_entropy", "damping": {"*": 0.1}}
    for more in ({}, {"by_layer": True}, {"top": 3}, {"query_function": lambda f, y: f[:, 0]}):
        mine, theirs = (nng.influence(model, loader, loader[:1], x, **options, **more) for x in (m, whole))
        for name in ("scores", "self_scores", "values", "indices"):
            x, y = getattr(mine, name), getattr(theirs, name)
            assert (x is None) == (y is None) and (y is None or torch.allclose(x, y, rtol=1e-9))
        assert mine.by_layer.keys() == theirs.by_layer.keys()
        assert all(torch.allclose(mine.by_layer[k], y) for k, y in theirs.by_layer.items())
    rows = nng.GramMatrix(model, loader, loss="cross_entropy", metric=m.inverse(0.1)).tensor[0, :, 0]
    close(rows[: len(loader[0][0])], nng.influence(model, loader, loader[:1], whole, **options).scores)
    with pytest.raises(nng.ArgumentError, match="expected no out="):
        nng.influence(model, loader, loader, m, out=tmp_path / "scores.npy", **options)
    x, y = (torch.cat(parts) for parts in zip(*loader))
    shuffled = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 4, shuffle=True)
    with pytest.raises(nng.LoaderError, match="expected shuffle=False"):
        nng.influence(model, shuffled, loader, m, **options)


def test_influence_by_position(tmp_path):
    model, loader, function = sequences()
    m = in_parts(tmp_path / "m", nng.FIM, model, loader, nng.PMatEKFAC, function=function)
    options = {"loss": "cross_entropy", "damping": 0.1, "function": function, "by_position": True}
    mine, theirs = (nng.influence(model, loader, loader, x, **options).scores for x in (m, m.in_memory()))
    close(mine, theirs)
    assert mine.shape == (6, 6, 5)


def test_errors(tmp_path):
    model, loader = net()
    for kind in (nng.PMatDense, nng.PMatLowRank, nng.PMatEye, nng.PMatMixed({}, default=nng.PMatDense)):
        with pytest.raises(nng.ArgumentError, match="joins layers"):
            nng.to_folder(tmp_path / "no", nng.FIM, model, loader, kind)
    with pytest.raises(nng.UnsupportedError, match="one process"):
        nng.to_folder(tmp_path / "no", nng.FIM, model, loader, process_group="all")
    with pytest.raises(nng.UnsupportedError, match="no estimator="):
        nng.to_folder(tmp_path / "no", nng.FIM, model, loader, estimator="rademacher")
    with pytest.raises(nng.ArgumentError, match="has no option"):
        nng.to_folder(tmp_path / "no", nng.FIM, model, loader, dampnig=3)
    with pytest.raises(nng.FileError, match="in an existing folder"):
        nng.to_folder(tmp_path / "nowhere" / "m", nng.FIM, model, loader)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("")
    with pytest.raises(nng.FileError, match="not one of to_folder"):
        nng.to_folder(tmp_path / "foreign", nng.FIM, model, loader)
    with pytest.raises(nng.FileError, match=r"no index\.json"):
        nng.load(tmp_path / "foreign")
    m = nng.to_folder(tmp_path / "m", nng.FIM, model, loader)
    with pytest.raises(nng.UnsupportedError, match=r"by_layer\(\)\[layer\].eigh"):
        m.eigh()
    with pytest.raises(KeyError):
        m.by_layer()["none"]
    with pytest.raises(nng.CollectionError):
        m["none"]
    lock = Lock(str(tmp_path / "m" / "lock"))
    with pytest.raises(nng.FileError, match="another process"):
        nng.to_folder(tmp_path / "m", nng.FIM, model, loader)
    lock.release()


def test_damaged_folders(tmp_path):
    model, loader = net()
    m = in_parts(tmp_path / "m", nng.FIM, model, loader)
    index = json.loads((tmp_path / "m" / folders.INDEX).read_text())
    for change in ({"format": 9}, {"parts": [["0.weight"]]}, {"kind": ["PMatNone", None]}, {"dtype": "no"},
                   {"asked": 3}, {"collection": {}}):  # fmt: skip
        (tmp_path / "m" / folders.INDEX).write_text(json.dumps(index | change))
        with pytest.raises(nng.FileError):
            nng.load(tmp_path / "m")
    (tmp_path / "m" / folders.INDEX).write_text(json.dumps(index))
    os.replace(tmp_path / "m" / "part-00001.safetensors", tmp_path / "m" / "part-00000.safetensors")
    with pytest.raises(nng.FileError, match="lacks 1 of 3"):
        nng.load(tmp_path / "m")
    (tmp_path / "m" / "part-00001.safetensors").write_bytes((tmp_path / "m" / "part-00000.safetensors").read_bytes())
    with pytest.raises(nng.FileError, match="not the part"):
        m.trace()
