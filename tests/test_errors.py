"""Every refusal says what was given, what was expected and what to do; all are NNGeomErrors and a fitting builtin."""

import pytest
import torch
from cases import build
from torch import nn

import nngeom as nng


def mlp():
    return build("mlp")


CASES = {
    "empty loader": (lambda c: nng.FIM(c.model, []), nng.LoaderError, ValueError, "empty.*at least one batch"),
    "used-up generator": (lambda c: nng.FIM(c.model, iter(())), nng.LoaderError, ValueError, "generator"),
    "three items": (
        lambda c: nng.FIM(c.model, [(c.inputs, c.inputs, c.targets)]),
        nng.LoaderError,
        ValueError,
        "3 items.*function=",
    ),
    "list as one batch": (lambda c: nng.FIM(c.model, [c.inputs, c.targets]), nng.ArgumentError, ValueError, "tuple"),
    "number as loader": (lambda c: nng.FIM(c.model, 3), nng.ArgumentTypeError, TypeError, "int.*DataLoader"),
    "model is a function": (
        lambda c: nng.FIM(lambda x: x, c.loader),
        nng.ArgumentTypeError,
        TypeError,
        "torch.nn.Module",
    ),
    "scalar outputs": (
        lambda c: nng.FIM(c.model, c.loader, function=lambda x, y: c.model(x).sum()),
        nng.OutputError,
        ValueError,
        "single number",
    ),
    "averaged outputs": (
        lambda c: nng.FIM(c.model, c.loader, function=lambda x, y: c.model(x).mean(0, True)),
        nng.OutputError,
        ValueError,
        r"\(1, 3\)",
    ),
    "tuple outputs": (
        lambda c: nng.FIM(c.model, c.loader, function=lambda x, y: (1, 2)),
        nng.OutputError,
        ValueError,
        "tuple.*function=",
    ),
    "integer outputs": (
        lambda c: nng.FIM(c.model, c.loader, function=lambda x, y: c.model(x).argmax(1)),
        nng.OutputError,
        ValueError,
        "int64",
    ),
    "detached outputs": (
        lambda c: nng.FIM(c.model, c.loader, function=lambda x, y: c.model(x).detach()),
        nng.CoverageError,
        RuntimeError,
        "no_grad",
    ),
    "one class": (lambda c: nng.FIM(nn.Linear(4, 1), [torch.randn(3, 4)]), nng.OutputError, ValueError, "bernoulli"),
    "unknown likelihood": (
        lambda c: nng.FIM(c.model, c.loader, likelihood="cauchy"),
        nng.ArgumentError,
        ValueError,
        "cauchy.*categorical",
    ),
    "likelihood of a type": (
        lambda c: nng.FIM(c.model, c.loader, likelihood=3),
        nng.ArgumentTypeError,
        TypeError,
        "expected one of",
    ),
    "likelihood off the axes": (
        lambda c: nng.FIM(c.model, c.loader, likelihood=nng.Categorical(dim=3)),
        nng.OutputError,
        ValueError,
        "dim=3",
    ),
    "bad variance": (lambda c: nng.Gaussian(-1.0), nng.ArgumentError, ValueError, "positive"),
    "variance of a shape": (
        lambda c: nng.FIM(c.model, c.loader, likelihood=nng.Gaussian(torch.ones(5))),
        nng.OutputError,
        ValueError,
        "broadcast",
    ),
    "unknown representation": (
        lambda c: nng.FIM(c.model, c.loader, "kfac"),
        nng.ArgumentTypeError,
        TypeError,
        "PMatKFAC",
    ),
    "unknown option": (
        lambda c: nng.FIM(c.model, c.loader, nng.PMatKFAC, share="reduce"),
        nng.ArgumentError,
        ValueError,
        "share.*sharing",
    ),
    "bad sharing": (
        lambda c: nng.FIM(c.model, c.loader, nng.PMatKFAC, sharing="sum"),
        nng.ArgumentError,
        ValueError,
        "expand.*reduce",
    ),
    "mixture misses": (
        lambda c: nng.FIM(c.model, c.loader, nng.PMatMixed({"0": nng.PMatDiag})),
        nng.ArgumentError,
        ValueError,
        "default",
    ),
    "mixture matches nothing": (
        lambda c: nng.FIM(c.model, c.loader, nng.PMatMixed({"z*": nng.PMatDiag}, default=nng.PMatKFAC)),
        nng.ArgumentError,
        ValueError,
        "z",
    ),
    "mixture of nothing": (lambda c: nng.PMatMixed(nng.PMatKFAC), nng.ArgumentTypeError, TypeError, "dict"),
    "no parameter": (
        lambda c: nng.LayerCollection.from_model(c.model.requires_grad_(False)),
        nng.CollectionError,
        ValueError,
        "frozen",
    ),
    "pattern matches nothing": (
        lambda c: nng.LayerCollection.from_model(c.model, include="head.*"),
        nng.CollectionError,
        ValueError,
        r"head\.\*.*0\.weight",
    ),
    "pattern of a type": (
        lambda c: nng.LayerCollection.from_model(c.model, include=3),
        nng.ArgumentTypeError,
        TypeError,
        "glob",
    ),
    "collection of another model": (
        lambda c: nng.FIM(
            nn.Linear(4, 3), [torch.randn(2, 4)], layer_collection=nng.LayerCollection.from_model(c.model)
        ),
        nng.CollectionError,
        ValueError,
        "another model",
    ),
    "negative damping": (
        lambda c: nng.FIM(c.model, c.loader).solve(vector(c), -1.0),
        nng.DampingError,
        ValueError,
        "-1.0.*>= 0",
    ),
    "nan damping": (
        lambda c: nng.FIM(c.model, c.loader).solve(vector(c), float("nan")),
        nng.DampingError,
        ValueError,
        "finite",
    ),
    "damping of a type": (
        lambda c: nng.FIM(c.model, c.loader).solve(vector(c), "small"),
        nng.ArgumentTypeError,
        TypeError,
        "Cutoff",
    ),
    "singular solve": (
        lambda c: nng.FIM(c.model, c.loader, nng.PMatDense).solve(vector(c)),
        nng.SingularError,
        ArithmeticError,
        "use a damping above",
    ),
    "singular low rank": (
        lambda c: nng.FIM(c.model, c.loader, nng.PMatLowRank).solve(vector(c)),
        nng.SingularError,
        ArithmeticError,
        "rank",
    ),
    "tensor as vector": (
        lambda c: nng.FIM(c.model, c.loader).mv(torch.randn(43)),
        nng.ArgumentTypeError,
        TypeError,
        "PVector.from_flat",
    ),
    "matrix plus number": (
        lambda c: nng.FIM(c.model, c.loader) + 1,
        nng.ArgumentTypeError,
        TypeError,
        "cannot add int",
    ),
    "matrix times matrix": (
        lambda c: nng.FIM(c.model, c.loader) * nng.FIM(c.model, c.loader),
        nng.ArgumentTypeError,
        TypeError,
        "M @ N",
    ),
    "other norms": (lambda c: nng.FIM(c.model, c.loader).norm("nuc"), nng.ArgumentError, ValueError, "eigh"),
    "cutoff for a logdet": (
        lambda c: nng.FIM(c.model, c.loader).logdet(nng.Cutoff(1.0)),
        nng.ArgumentError,
        ValueError,
        "number",
    ),
    "too large to be dense": (
        lambda c: nng.FIM(c.model, c.loader).to_dense(limit=10),
        nng.SizeError,
        MemoryError,
        r"limit=43",
    ),
    "block limit": (
        lambda c: nng.FIM(build("weight-norm").model, build("weight-norm").loader, nng.PMatKFAC, block_limit=11),
        nng.StructureError,
        ValueError,
        "block_limit=11.*PMatMixed",
    ),
    "process group": (
        lambda c: nng.FIM(c.model, c.loader, process_group=object()),
        nng.ArgumentTypeError,
        TypeError,
        "process_group",
    ),
    "memory budget": (
        lambda c: nng.FIM(c.model, c.loader, memory_budget=-5),
        nng.ArgumentError,
        ValueError,
        "-5.*positive",
    ),
    "samples": (
        lambda c: nng.FIM_MonteCarlo(c.model, c.loader, samples=0),
        nng.ArgumentError,
        ValueError,
        "at least 1",
    ),
    "targets missing": (
        lambda c: nng.EmpiricalFIM(c.model, [c.inputs], loss="mse"),
        nng.LoaderError,
        ValueError,
        "targets.*labels",
    ),
    "targets of a shape": (
        lambda c: nng.EmpiricalFIM(c.model, [(c.inputs, torch.randn(7, 2))], loss="mse"),
        nng.OutputError,
        ValueError,
        r"\(7, 2\)",
    ),
    "unknown loss": (
        lambda c: nng.GGN(c.model, c.loader, loss="hinge"),
        nng.ArgumentError,
        ValueError,
        "cross_entropy",
    ),
    "averaged loss": (
        lambda c: nng.GGN(c.model, c.loader, loss=lambda f, y: f.mean()),
        nng.OutputError,
        ValueError,
        "one number an example",
    ),
    "loss not convex": (
        lambda c: nng.GGN(c.model, c.loader, loss=lambda f, y: f.sin().sum(1)),
        nng.ArgumentError,
        ValueError,
        "convex",
    ),
    "flat of a shape": (
        lambda c: nng.PVector.from_flat(nng.LayerCollection.from_model(c.model), torch.zeros(5)),
        nng.ArgumentError,
        ValueError,
        "43",
    ),
    "no gradients": (lambda c: nng.PVector.from_grad(c.model), nng.ArgumentError, ValueError, "backward"),
    "vector with a missing name": (lambda c: vector(c)["head"], nng.CollectionError, ValueError, "head"),
    "batch to a model": (
        lambda c: nng.PVector.randn(nng.LayerCollection.from_model(c.model), 2).copy_to(c.model),
        nng.ArgumentError,
        ValueError,
        "batch",
    ),
    "vector plus tensor": (lambda c: vector(c) + torch.zeros(43), nng.ArgumentTypeError, TypeError, "PVector"),
    "pickled implicit": (
        lambda c: __import__("pickle").dumps(nng.FIM(c.model, c.loader, nng.PMatImplicit)),
        nng.UnsupportedError,
        NotImplementedError,
        "save",
    ),
    "built by hand": (lambda c: nng.PMatKFAC(), nng.ArgumentTypeError, TypeError, "FIM"),
}


def vector(c):
    return nng.PVector.randn(nng.LayerCollection.from_model(c.model), dtype=torch.float64)


@pytest.mark.parametrize("name", CASES)
def test_errors_say_what_to_do(name):
    call, kind, builtin, text = CASES[name]
    assert issubclass(kind, nng.NNGeomError) and issubclass(kind, builtin)
    with pytest.raises(kind, match=text):
        call(mlp())


def test_a_small_budget_warns_and_goes_on():
    c = mlp()
    with pytest.warns(nng.MemoryWarning, match="one output of one batch"):
        m = nng.FIM(c.model, c.loader, nng.PMatDiag, memory_budget=1)
    torch.testing.assert_close(m.diag().flat(), nng.FIM(c.model, c.loader, nng.PMatDiag).diag().flat())


def test_parameters_on_two_devices():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(nng.DeviceError, match="several devices"):
        nng.FIM(model, [torch.randn(2, 2)])
