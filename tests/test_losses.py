"""Losses as torch has them, as modules, functions and names, and the targets they take; targets that nothing looks
at.
"""

import functools
import subprocess
import sys
import textwrap

import pytest
import reference
import torch
from cases import build
from torch import nn
from torch.nn import functional as F

import nngeom as nng

f64 = torch.float64
N, C = 6, 4
WEIGHT = torch.tensor([0.2, 1.0, 3.0, 0.5], dtype=f64)


def problem(outputs=C):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double()
    return model, torch.randn(N, 3, dtype=f64)


def labels():
    y = torch.randint(0, C, (N,), generator=torch.Generator().manual_seed(1))
    y[2] = -100
    return y


def real(low=0.0, high=1.0):
    return low + (high - low) * torch.rand(N, C, dtype=f64, generator=torch.Generator().manual_seed(2))


COUNTS = lambda: torch.poisson(torch.full((N, C), 2.0, dtype=f64), torch.Generator().manual_seed(3))
KNOWN = {  # what is given, targets, what torch says, summed over outputs
    "cross-entropy": (nn.CrossEntropyLoss(), labels, lambda f, y: F.cross_entropy(f, y, reduction="none")),
    "cross-entropy, all": (
        nn.CrossEntropyLoss(WEIGHT, ignore_index=1, label_smoothing=0.2),
        lambda: labels().clamp_min(0),
        lambda f, y: F.cross_entropy(f, y, WEIGHT, ignore_index=1, label_smoothing=0.2, reduction="none"),
    ),
    "cross-entropy, sum": (
        nn.CrossEntropyLoss(reduction="sum"),
        labels,
        lambda f, y: F.cross_entropy(f, y, reduction="none"),
    ),
    "cross-entropy function": (F.cross_entropy, labels, lambda f, y: F.cross_entropy(f, y, reduction="none")),
    "cross-entropy partial": (
        functools.partial(functools.partial(F.cross_entropy, weight=WEIGHT), reduction="none"),
        labels,
        lambda f, y: F.cross_entropy(f, y, WEIGHT, reduction="none"),
    ),
    "cross-entropy class": (nng.CrossEntropy, labels, lambda f, y: F.cross_entropy(f, y, reduction="none")),
    "mse": (nn.MSELoss(), real, lambda f, y: F.mse_loss(f, y, reduction="none").sum(1)),
    "mse function": (F.mse_loss, real, lambda f, y: F.mse_loss(f, y, reduction="none").sum(1)),
    "mse name": ("mse", real, lambda f, y: 0.5 * (f - y).square().sum(1)),
    "bce": (
        nn.BCEWithLogitsLoss(),
        real,
        lambda f, y: F.binary_cross_entropy_with_logits(f, y, reduction="none").sum(1),
    ),
    "bce, all": (
        nn.BCEWithLogitsLoss(WEIGHT, pos_weight=WEIGHT.flip(0)),
        real,
        lambda f, y: F.binary_cross_entropy_with_logits(f, y, WEIGHT, pos_weight=WEIGHT.flip(0), reduction="none").sum(
            1
        ),
    ),
    "bce name": (
        "bce",
        lambda: (real() > 0.5).long(),
        lambda f, y: F.binary_cross_entropy_with_logits(f, y.double(), reduction="none").sum(1),
    ),
    "bce function": (
        functools.partial(F.binary_cross_entropy_with_logits, pos_weight=WEIGHT),
        real,
        lambda f, y: F.binary_cross_entropy_with_logits(f, y, pos_weight=WEIGHT, reduction="none").sum(1),
    ),
    "poisson": (nn.PoissonNLLLoss(), COUNTS, lambda f, y: F.poisson_nll_loss(f, y, reduction="none").sum(1)),
    "poisson, full": (
        nn.PoissonNLLLoss(full=True),
        COUNTS,
        lambda f, y: F.poisson_nll_loss(f, y, full=True, reduction="none").sum(1),
    ),
    "poisson name": ("poisson", COUNTS, lambda f, y: F.poisson_nll_loss(f, y, reduction="none").sum(1)),
}


def output_hessian(model, x, y, loss):
    blocks = []
    for j in range(len(x)):
        f = model(x[j]).detach()
        blocks.append(torch.autograd.functional.hessian(lambda v, j=j: loss(v[None], y[j : j + 1]).sum(), f))
    return torch.stack(blocks)


def close(x, y, tol=1e-9):
    torch.testing.assert_close(x, y, rtol=tol, atol=tol * float(y.abs().max()))


@pytest.mark.parametrize("name", KNOWN)
def test_losses_of_torch(name):
    loss, draw, plain = KNOWN[name]
    model, x = problem()
    y = draw()
    g = reference.loss_gradients(model, x, y, plain)
    close(nng.EmpiricalFIM(model, [(x, y)], nng.PMatDense, loss=loss).to_dense(), g.T @ g / N)
    close(nng.Hessian(model, [(x, y)], nng.PMatDense, loss=loss).to_dense(), reference.hessian(model, x, y, plain))
    expected = reference.sandwich(reference.jacobian(model, x), output_hessian(model, x, y, plain))
    for representation in (nng.PMatDense, nng.PMatImplicit):
        close(nng.GGN(model, [(x[:2], y[:2]), (x[2:], y[2:])], representation, loss=loss).to_dense(), expected)


@pytest.mark.parametrize("full", [False, True])
def test_poisson_of_rates(full):
    """``log_input=False``: outputs are rates."""
    rates = nn.Sequential(nn.Linear(3, C), nn.Softplus()).double()
    x, y = torch.randn(N, 3, dtype=f64), COUNTS()
    plain = lambda f, y: F.poisson_nll_loss(f, y, log_input=False, full=full, reduction="none").sum(1)
    g = reference.loss_gradients(rates, x, y, plain)
    loss = nn.PoissonNLLLoss(log_input=False, full=full)
    close(nng.EmpiricalFIM(rates, [(x, y)], nng.PMatDense, loss=loss).to_dense(), g.T @ g / N)
    expected = reference.sandwich(reference.jacobian(rates, x), output_hessian(rates, x, y, plain))
    close(nng.GGN(rates, [(x, y)], nng.PMatDense, loss=loss).to_dense(), expected)


def test_the_reduction_of_a_module_is_not_ours():
    """The sum over positions and outputs of an example, the mean over examples, whatever the module says."""
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Tanh()).double()
    x, y = torch.randn(4, 1, 3, 3, dtype=f64), torch.randint(0, 3, (4, 2, 2))
    a, b = (
        nng.GGN(model, [(x, y)], nng.PMatDense, loss=loss).to_dense()
        for loss in (nn.CrossEntropyLoss(reduction="mean"), "cross_entropy")
    )
    close(a, b, 1e-12)


TYPES = {
    "long": lambda y: y,
    "float": lambda y: y.float(),
    "double": lambda y: y.double(),
    "column": lambda y: y[:, None],
    "float column": lambda y: y[:, None].float(),
    "int8": lambda y: y.to(torch.int8),
}


@pytest.mark.parametrize("kind", TYPES)
def test_class_labels_of_any_dtype(kind):
    """Whole numbers, one an example, are classes; also where some are ignored."""
    model, x = problem()
    y = labels()
    given = TYPES[kind](y)
    for loss in ("cross_entropy", nn.CrossEntropyLoss(), nng.CrossEntropy(WEIGHT, 0.1)):
        for measure in (nng.EmpiricalFIM, nng.GGN, nng.Hessian):
            a, b = (measure(model, [(x, t)], nng.PMatDense, loss=loss).to_dense() for t in (given, y))
            close(a, b, 1e-12)
    a, b = (nng.FIM(model, [(x, t)], nng.PMatDense).to_dense() for t in (given, y))
    close(a, b, 1e-12)


BAD = {
    "fractions": (lambda: torch.rand(N, dtype=f64) + 0.1, "cross_entropy", "whole numbers"),
    "negative probabilities": (lambda: torch.randn(N, C, dtype=f64) - 3, "cross_entropy", "probabilities"),
    "too many": (lambda: torch.zeros(N, 2, dtype=torch.long), "cross_entropy", "one a position"),
    "no tensor": (lambda: ["cat"] * N, "cross_entropy", "list"),
    "range": (lambda: torch.full((N,), 9), nn.CrossEntropyLoss(), "from 0 to 3"),
    "bits": (lambda: torch.full((N, C), 2.0, dtype=f64), "bce", r"\[0, 1\]"),
    "counts": (lambda: torch.full((N, C), -1.0, dtype=f64), "poisson", "not negative"),
    "shape": (lambda: torch.zeros(C, N, dtype=f64), nn.MSELoss(), "expected that of the outputs"),
    "one an example": (lambda: torch.rand(N, 1, dtype=f64), "mse", "expected that of the outputs"),
    "one an output": (lambda: torch.rand(C, dtype=f64), "bce", "expected that of the outputs"),
    "weight an example": (real, nn.BCEWithLogitsLoss(torch.ones(N, 1, dtype=f64)), "one an example"),
}


@pytest.mark.parametrize("measure", [nng.EmpiricalFIM, nng.Hessian])
@pytest.mark.parametrize("name", BAD)
def test_targets_that_do_not_fit(name, measure):
    draw, loss, text = BAD[name]
    model, x = problem()
    with pytest.raises(nng.OutputError, match=text):
        measure(model, [(x, draw())], nng.PMatDiag, loss=loss)


@pytest.mark.parametrize("measure", [nng.EmpiricalFIM, nng.GGN, nng.Hessian])
@pytest.mark.parametrize("loss", ["mse", "bce", "poisson"])
def test_one_output_and_a_number_an_example(loss, measure):
    """Targets ``(n,)`` for outputs ``(n, 1)`` are those of shape ``(n, 1)``: nothing broadcasts."""
    model, x = problem(1)
    y = real()[:, :1]
    flat, shaped = (measure(model, [(x, t)], nng.PMatDense, loss=loss).to_dense() for t in (y[:, 0], y))
    close(flat, shaped, 1e-12)


def test_losses_that_are_none():
    model, x = problem()
    for loss, kind, text in (
        (functools.partial(F.poisson_nll_loss, reductoin="none"), nng.ArgumentError, "reductoin"),
        (nn.CrossEntropyLoss, nng.ArgumentTypeError, "CrossEntropyLoss"),
        ("bec", nng.ArgumentError, "'bce'"),
        (nn.HuberLoss(), nng.OutputError, "one number an example"),
    ):
        with pytest.raises(kind, match=text):
            nng.EmpiricalFIM(model, [(x, real())], nng.PMatDiag, loss=loss)
    for make in (lambda: nng.CrossEntropy(-WEIGHT), lambda: nng.CrossEntropy(label_smoothing=-0.1)):
        with pytest.raises(nng.ArgumentError):
            make()


def test_user_losses_differentiate_as_torch_does():
    """The functions that users' losses are run with instead of torch's, twice differentiated, entropies of their own
    outputs included.
    """
    model, x = problem()
    y, t = labels().clamp_min(0), real()
    losses = [
        lambda f, y: F.cross_entropy(f, y, WEIGHT, label_smoothing=0.3, reduction="none"),
        lambda f, y: F.cross_entropy(f, f.softmax(1), reduction="none"),
        lambda f, y: (
            F.cross_entropy(f, t, reduction="none") if len(f) == N else F.cross_entropy(f, t[:1], reduction="none")
        ),
        lambda f, y: F.nll_loss(F.log_softmax(f, dim=-1), y, reduction="none"),
        lambda f, y: torch.logsumexp(f, dim=(1,)) + f.softmax(-1).square().sum(1),
        lambda f, y: F.softplus(f, beta=2).sum(1) + F.logsigmoid(f).square().sum(1),
        lambda f, y: torch.sigmoid(f).sum(1) + f.sigmoid().log().sum(1),
        lambda f, y: (
            torch.logaddexp(f[:, 0], f[:, 1]) + nn.SoftMarginLoss(reduction="none")(f, torch.ones_like(f)).sum(1)
        ),
    ]
    for index, loss in enumerate(losses):
        expected = reference.hessian(model, x, y, loss) if index != 2 else None
        if expected is not None:
            close(nng.Hessian(model, [(x, y)], nng.PMatDense, loss=loss).to_dense(), expected, 1e-8)


# -- targets that nothing looks at -------------------------------------------------------------------------------------

UNUSED = {
    "image labels": torch.tensor([0, 1, 2, 0]),
    "boxes": torch.rand(4, 7, 4),
    "strings": ["a", "b", "c", "d"],
    "dicts": [{"boxes": torch.rand(2, 4)}] * 4,
    "numbers": torch.randn(4, dtype=f64),
    "bits": torch.randint(0, 2, (4, 3)),
}


@pytest.mark.parametrize("kind", UNUSED)
def test_unused_targets_are_not_looked_at(kind):
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Conv2d(3, 3, 1)).double()
    x, y = torch.randn(4, 1, 3, 3, dtype=f64), UNUSED[kind]
    for representation in (nng.PMatDense, nng.PMatImplicit):
        a, b = (
            nng.FIM(model, [batch], representation, likelihood=nng.Categorical(dim=1)).to_dense()
            for batch in ((x, y), (x,))
        )
        close(a, b, 1e-12)
    seed = lambda: torch.Generator().manual_seed(0)
    a, b = (
        nng.FIM_MonteCarlo(
            model, [batch], nng.PMatDense, likelihood=nng.Categorical(dim=1), generator=seed()
        ).to_dense()
        for batch in ((x, y), (x,))
    )
    close(a, b, 1e-12)
    for likelihood in ("gaussian", "bernoulli", "poisson"):
        a, b = (nng.FIM(model, [batch], nng.PMatDense, likelihood=likelihood).to_dense() for batch in ((x, y), (x,)))
        close(a, b, 1e-12)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(9, 3)).double()
    a, b = (nng.FIM(flat, [batch], nng.PMatDense).to_dense() for batch in ((x, y), (x,)))
    close(a, b, 1e-12)


# -- very many classes -------------------------------------------------------------------------------------------------

VOCABULARY = """
import resource, torch, nngeom as nng
from torch import nn

torch.manual_seed(0)
torch.set_num_threads(1)
model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 256_000, bias=False))
x, y = torch.randint(0, 50, ({n}, 64)), torch.randint(0, 256_000, ({n}, 64))
small = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 4))
warm = nng.FIM(small, [torch.randint(0, 5, (2, 3))], nng.PMatImplicit, likelihood=nng.Categorical(-1))
warm.mv(nng.PVector.randn(warm.layer_collection))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if "{measure}" == "FIM":
    m = nng.FIM(model, [(x,)], nng.PMatImplicit, likelihood=nng.Categorical(-1))
else:
    m = nng.GGN(model, [(x, y)], nng.PMatImplicit, loss=nng.CausalLM())
m.mv(nng.PVector.randn(m.layer_collection))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)
"""


@pytest.mark.parametrize(("measure", "n"), [pytest.param("FIM", 1, marks=pytest.mark.slow), ("GGN", 2)])
def test_a_large_vocabulary_takes_no_square_of_it(measure, n):
    """Below 1 GiB above the model; one ``V x V`` of booleans alone would be 61.

    And in one pass, not by 33 million rows: float32 sums of so many terms still agree in both modes.
    """
    code = textwrap.dedent(VOCABULARY).format(n=n, measure=measure)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=240)
    assert float(done.stdout) < 1, done.stdout


def test_certain_probabilities_are_classes():
    """Probabilities of zero and one: what their classes are."""
    case = build("mlp")
    x, c = case.inputs, case.model(case.inputs).shape[1]
    y = torch.arange(len(x)) % c
    hard, soft = (
        nng.EmpiricalFIM(case.model, [(x, t)], nng.PMatDense, loss="cross_entropy").to_dense()
        for t in (y, F.one_hot(y, c).to(x.dtype))
    )
    close(soft, hard, 1e-10)


def test_columns_of_many_classes_are_made_a_few_at_a_time():
    """The columns asked for, and little more, are formed: 20 000 classes, two columns in the middle."""
    f = torch.randn(1, 20_000, dtype=f64)
    columns = nng.Categorical().square_root(f)
    v = columns.make(9_000, 9_002)[:, 0]
    p = f[0].softmax(0)
    q = p.flip(0).cumsum(0).flip(0)
    for j, column in zip((9_000, 9_001), v):
        expected = torch.zeros_like(p)
        size = (p[j] * q[j + 1] / q[j]).sqrt()
        expected[j], expected[j + 1 :] = size, -size * p[j + 1 :] / q[j + 1]
        close(column, expected, 1e-10)


# -- of one example each -----------------------------------------------------------------------------------------------

MIXING = {
    "contrastive": lambda f, y: F.cross_entropy(f @ f.T, torch.arange(len(f)), reduction="none"),
    "batch mean": lambda f, y: (f - f.mean(0)).square().sum(1),
    "largest of the batch": lambda f, y: F.cross_entropy(f, y, reduction="none") * f.abs().max(),
}
SEPARATE = {
    "focal": lambda f, y: (1 - f.softmax(1).gather(1, y[:, None])[:, 0]) * F.cross_entropy(f, y, reduction="none"),
    "weighted by a constant of the batch": lambda f, y: F.cross_entropy(f, y, reduction="none") / y.sum(),
}
TAKERS = {
    "EmpiricalFIM": lambda m, b, loss: nng.EmpiricalFIM(m, b, nng.PMatDiag, loss=loss),
    "Hessian": lambda m, b, loss: nng.Hessian(m, b, nng.PMatDiag, loss=loss),
    "Hessian v": lambda m, b, loss: nng.Hessian(m, b, loss=loss).mv(nng.PVector.from_model(m)),
    "kernel": lambda m, b, loss: nng.GramMatrix(m, b, loss=loss),
    "coherence": lambda m, b, loss: nng.analysis.coherence(m, b, loss=loss),
}
CONVEX = {
    "GGN": lambda m, b, loss: nng.GGN(m, b, nng.PMatDiag, loss=loss),
    "GGN v": lambda m, b, loss: nng.GGN(m, b, nng.PMatImplicit, loss=loss).mv(nng.PVector.from_model(m)),
}


@pytest.mark.parametrize("taker", TAKERS | CONVEX)
@pytest.mark.parametrize("name", MIXING)
def test_losses_that_mix_examples_are_refused(name, taker):
    model, x = problem()
    with pytest.raises(nng.ArgumentError, match="mixes examples"):
        (TAKERS | CONVEX)[taker](model, [(x, labels().clamp_min(0))], MIXING[name])


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize("name", SEPARATE)
def test_losses_of_one_example_each_are_taken(name, taker):
    model, x = problem()
    TAKERS[taker](model, [(x, labels().clamp_min(0))], SEPARATE[name])
