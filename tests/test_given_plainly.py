"""Arguments of the wrong kind: every entry point says what was given and what it expects."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nngeom as nng
from nngeom import analysis, linearized, mgs, optim, track

f64 = torch.float64
X, Y = torch.randn(5, 3, dtype=f64, generator=torch.Generator().manual_seed(0)), torch.arange(5) % 3
NAN = torch.full((5,), torch.nan, dtype=f64)


SAYS = r"expected|not offered|NaN|no tensor|no curvature|nothing is cast"


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


MODEL = net()
DATA = [(X, Y)]
LC = nng.LayerCollection.from_model(MODEL)
V = nng.PVector.from_model(MODEL)
JACOBIAN = nng.Jacobian(MODEL, DATA)
MATRICES = {
    kind.__name__: nng.FIM(MODEL, DATA, kind)
    for kind in (nng.PMatDense, nng.PMatDiag, nng.PMatKFAC, nng.PMatEKFAC, nng.PMatLowRank, nng.PMatImplicit)
}
KERNELS = {
    kind.__name__: nng.GramMatrix(MODEL, DATA, kind)
    for kind in (nng.FMatDense, nng.FMatDiag, nng.FMatBlockDiag, nng.FMatImplicit)
}


def stepped(opt):
    with opt.observe():
        F.cross_entropy(opt.observer.network.model(X), Y).backward()
    opt.step()


WRONG = {
    "a model that is none": (
        (None, 3, "abc", [1], V, nn.Linear),
        [
            nng.LayerCollection.from_model,
            nng.PVector.from_model,
            nng.PVector.from_grad,
            V.copy_to,
            V.add_to,
            lambda x: nng.FIM(x, DATA),
            optim.KFAC,
            linearized.Linearized,
        ],
    ),
    "a collection that is none": (
        (None, 3, MODEL, [1]),
        [nng.PVector.zeros, nng.PVector.randn, lambda x: nng.PVector.from_dict(x, {})],
    ),
    "numbers of vectors": (
        (None, -1, 1.5, "abc", [2], X, True),
        [
            lambda x: nng.PVector.zeros(LC, x),
            lambda x: nng.PVector.randn(LC, x),
            *(lambda x, M=M: M.sample(x, 0.1) for name, M in MATRICES.items() if name != "PMatImplicit"),
        ],
    ),
    "dicts of tensors": (
        (None, 3, X, [X], {"0.weight": None}, {"0.weight": X[0, 0]}),
        [lambda x: nng.PVector.from_dict(LC, x)],
    ),
    "factors": (
        (None, "abc", float("nan"), float("inf"), torch.tensor(torch.nan), X, [1]),
        [
            *(lambda x, M=M: x * M for M in (*MATRICES.values(), *KERNELS.values(), JACOBIAN)),
            *(lambda x, M=M: M / x for M in (*MATRICES.values(), *KERNELS.values(), JACOBIAN)),
        ],
    ),
    "division by zero": ((0, 0.0), [lambda x, M=M: M / x for M in (*MATRICES.values(), *KERNELS.values(), JACOBIAN)]),
    "norms": (
        (3, "abc", X, NAN, [2], np.ones(3)),
        [lambda x, M=M: M.norm(x) for M in (*MATRICES.values(), *KERNELS.values())],
    ),
    "norms of vectors": ((None, "fro", X, float("nan")), [V.norm, nng.FVector(X.T).norm]),
    "functions": (
        (None, 3, "abc", X),
        [V.apply, *(M.apply for name, M in MATRICES.items() if name != "PMatImplicit")],
    ),
    "powers": (
        (None, "abc", float("nan"), float("inf"), X),
        [lambda x, M=M: M**x for name, M in MATRICES.items() if name != "PMatImplicit"],
    ),
    "paths": (
        (3, 1.5, [1], X),
        [nng.load, lambda x: nng.save(V, x), lambda x: nng.GramMatrix(MODEL, DATA, out=x)],
    ),
    "budgets": (
        ("abc", [1], X, float("nan"), float("inf"), 0, -1),
        [
            lambda x: nng.FIM(MODEL, DATA, memory_budget=x),
            lambda x: nng.GramMatrix(MODEL, DATA, memory_budget=x),
            lambda x: nng.Jacobian(MODEL, DATA, memory_budget=x),
        ],
    ),
    "generators": ((3, "abc", X), [lambda x: nng.FIM_MonteCarlo(MODEL, DATA, generator=x)]),
    "references": ((None, 3, X, V), [lambda x: nng.approximation_report(MATRICES["PMatDense"], x)]),
    "classes": (("abc", X, [1], True, 1.5), [nng.Categorical]),
    "variances": (("abc", None, V, -1.0, 0.0, float("nan")), [nng.Gaussian]),
    "class weights": ((3, "abc", [1.0], -X), [nng.CrossEntropy, lambda x: nng.CrossEntropy(label_smoothing=x)]),
    "labels": (
        (None, 3, "abc", torch.tensor(1), Y + 0j, NAN),
        [lambda x: analysis.label_kernel(x, 1), lambda x: analysis.rescaled_bound(KERNELS["FMatDense"], x)],
    ),
    "numbers": (
        (None, "abc", [1], X, float("nan"), float("inf")),
        [
            lambda x: analysis.rademacher_bound(KERNELS["FMatDense"], x),
            lambda x: analysis.trace_ratios(KERNELS["FMatDense"], [x]),
            lambda x: analysis.SuperNat(X, X[:, 0], x),
            lambda x: analysis.sgd_stability(1.0, 1.0, x, 4, 10),
            lambda x: analysis.sgd_stability(1.0, 1.0, 0.1, x, 10),
            lambda x: analysis.sgd_stability(1.0, 1.0, 0.1, 4, x),
            lambda x: analysis.eigenfunctions(MODEL, X, x),
            lambda x: analysis.coherence_from_batch_gradients(X, x),
            lambda x: mgs.logdet_penalty(MODEL, X, jitter=x),
            lambda x: optim.winsorized_gradient(MODEL, DATA[0], "cross_entropy", x),
            lambda x: optim.WinsorizedSGD(net(), lr=x),
            lambda x: optim.KFAC(net(), drowned=x),
            lambda x: optim.SOAP(net(), betas=(x, 0.9)),
            lambda x: optim.LevenbergMarquardt(x),
            lambda x: optim.LevenbergMarquardt(least=x),
        ],
    ),
    "numbers or infinity": (
        (None, "abc", [1], X, float("nan")),
        [
            lambda x: analysis.sgd_stability(x, 1.0, 0.1, 4, 10),
            lambda x: analysis.sgd_stability(1.0, x, 0.1, 4, 10),
        ],
    ),
    "numbers that are not negative": (
        (None, "abc", [1], X, float("nan"), float("inf"), -0.5),
        [
            lambda x: analysis.rademacher_bound(KERNELS["FMatDense"], x),
            lambda x: analysis.rademacher_complexity(X @ X.T, x),
            lambda x: analysis.generalization_bound(0.1, x, 10),
            lambda x: analysis.generalization_gap_bound([0.5], [x], 10),
            lambda x: analysis.generalization_gap_bound([0.5], [0.1], 10, lipschitz=x),
            lambda x: analysis.generalization_gap_bound([0.5], [0.1], 10, smoothness=x),
            lambda x: analysis.linear_dynamics(X @ X.T, X[:, :1].T, X[:, :1].T, x, 3),
            lambda x: analysis.SuperNat(X, X[:, 0], x),
            lambda x: mgs.fgsm(MODEL, X, Y, x),
            lambda x: mgs.pgd(MODEL, X, Y, x),
            lambda x: mgs.pgd(MODEL, X, Y, 0.1, rate="abc" if x is None else x),
            lambda x: linearized.scaled_lr(x, 2.0),
            lambda x: linearized.yin_yang(3, radius=x),
            lambda x: linearized.add_spurious_feature(X, Y % 2, 0.5, 0.1, x),
        ],
    ),
    "numbers above 0": (
        (None, "abc", [1], X, float("nan"), float("inf"), -0.5, 0),
        [
            lambda x: analysis.ramp_loss(X, x),
            lambda x: analysis.margin_bound(KERNELS["FMatDense"], 1.0, x),
            lambda x: analysis.SuperNat(X, X[:, 0], 0.1, kappa="abc" if x is None else x),
            lambda x: analysis.step_modes(MODEL, DATA, x),
            lambda x: mgs.metrics(MODEL, DATA, x),
            lambda x: mgs.kernel_metrics(KERNELS["FMatDense"], x),
            lambda x: linearized.convergence_times(X, X[:, 0], X[0], x),
            track.geometric,
        ],
    ),
    "whole numbers": (
        (None, "abc", [1], X, float("nan"), 1.5, -1, True),
        [
            lambda x: analysis.rademacher_complexity(X @ X.T, 1.0, "monte_carlo", x),
            lambda x: analysis.flow_bound([1.0], [1.0], x),
            lambda x: analysis.generalization_bound(0.1, 1.0, x),
            lambda x: analysis.generalization_gap_bound([0.5], [0.1], x),
            lambda x: analysis.batch_coherence(0.5, x),
            lambda x: analysis.batch_coherence(0.5, 2, 0 if x is None else x),
            lambda x: analysis.coherence_from_batch_gradients(X, 2, 0 if x is None else x),
            lambda x: analysis.ComplexityMeasure(MODEL, DATA, x),
            lambda x: analysis.kernel_pca(X @ X.T, x),
            lambda x: analysis.linear_dynamics(X @ X.T, X[:, :1].T, X[:, :1].T, 0.1, x),
            lambda x: mgs.trace_penalty(MODEL, X, "rademacher", samples=x),
            lambda x: mgs.pgd(MODEL, X, Y, 0.1, x),
            lambda x: linearized.c_scores(X, Y, [x]),
            lambda x: linearized.c_scores(X, Y, [2], x),
            lambda x: linearized.flip_labels(Y, 0.5, x),
            lambda x: linearized.groups_by_score(X[:, 0], x),
            lambda x: linearized.yin_yang(x),
            lambda x: linearized.label_noise(x),
            lambda x: track.Tracker(MODEL, DATA, ["loss"]).step(x),
            lambda x: track.Tracker(MODEL, DATA, ["loss"]).measure(x),
            lambda x: optim.KFAC(net(), inverse_every=0.5 if x is True else x),
            lambda x: optim.EKFAC(net(), statistics_every=0.5 if x is True else x),
        ],
    ),
    "coherences": (
        (None, "abc", [1], float("nan"), -0.5, 1.5),
        [
            lambda x: analysis.batch_coherence(x, 3),
            lambda x: analysis.batch_coherence(torch.tensor(x) if isinstance(x, float) else x, 3),
            lambda x: analysis.generalization_gap_bound([x], [0.1], 10),
        ],
    ),
    "kernels": (
        (None, 3, "abc", [1], NAN, X @ X.T * float("nan"), X[:, :2], X @ X.T + 0j),
        [
            lambda x: analysis.effective_rank(x) if x is not NAN else analysis.effective_rank(x.outer(x)),
            lambda x: analysis.alignment(x, X @ X.T),
            lambda x: analysis.hsic(X @ X.T, x),
            lambda x: analysis.rademacher_bound(x, 1.0),
            lambda x: analysis.rademacher_complexity(x, 1.0),
            lambda x: analysis.margin_bound(x, 1.0, 1.0),
            lambda x: analysis.interpolation_norm(x, X[:, 0]),
            lambda x: analysis.kernel_label_alignment(x, Y % 2),
            analysis.kernel_pca,
            analysis.normalised_gram,
            mgs.kernel_metrics,
        ],
    ),
    "kernels that are not symmetric": (
        ((X @ X.T).triu(), X @ X.T + 1e-3 * torch.arange(5)),
        [
            analysis.effective_rank,
            analysis.spectrum_summary,
            analysis.kernel_pca,
            lambda x: analysis.rademacher_complexity(x, 1.0),
            lambda x: analysis.interpolation_norm(x, X[:, 0]),
            lambda x: analysis.linear_dynamics(x, X[:, :1].T, X[:, :1].T, 0.1, 3),
            lambda x: analysis.stability_eigenvalue(x[None], 0.1, 1),
            mgs.kernel_metrics,
        ],
    ),
    "gradients of examples": (
        (None, "abc", [1], [[1.0]], NAN, NAN[:, None], X[:, 0], X + 0j),
        [
            analysis.gradient_coherence,
            analysis.gradient_stiffness,
            lambda x: analysis.gradient_stiffness(X, torch.zeros(2, 4) if x is None else x),
        ],
    ),
    "scores and outputs": (
        (None, 3, "abc", [1.0]),
        [
            lambda x: mgs.auroc(x, X[:, 0]),
            lambda x: mgs.auroc(X[:, 0], x),
            lambda x: analysis.margins(x, Y),
            lambda x: analysis.ramp_loss(x, 1.0),
            lambda x: mgs.fgsm(MODEL, x, Y, 0.1),
        ],
    ),
    "inputs that cannot be moved": (
        (None, X.long(), X * float("nan")),
        [lambda x: mgs.fgsm(MODEL, x, Y, 0.1), lambda x: mgs.pgd(MODEL, x, Y, 0.1)],
    ),
    "numbers, one a step": (
        (None, "abc", ["a"], [-1.0], [float("nan")], X + 0j),
        [lambda x: analysis.flow_bound(x, [1.0], 3), lambda x: analysis.flow_bound([1.0], x, 3)],
    ),
    "outputs of a kernel": (
        (None, 3, "abc", NAN[None], X[:2, :1].T, X),
        [
            lambda x: analysis.linear_dynamics(X @ X.T, x, X[:, :1].T, 0.1, 3),
            lambda x: analysis.linear_dynamics(X @ X.T, X[:, :1].T, x, 0.1, 3),
        ],
    ),
    "curves": (
        (None, 3, "abc", {"loss": ["a"]}, {"loss": [[1.0], [1.0, 2.0]]}, {}),
        [lambda x: linearized.equal_progress(x, {"loss": [1.0]}, [1.0])],
    ),
    "thresholds and smoothing": (
        (["a"], "abc", [float("nan")]),
        [
            lambda x: linearized.equal_progress({"loss": [1.0]}, {"loss": [1.0]}, x),
            lambda x: linearized.equal_progress({"loss": [1.0]}, {"loss": [1.0]}, [1.0], smoothing=x),
        ],
    ),
    "numbers in tensors": (
        (None, "abc", NAN, Y + 0j),
        [
            lambda x: analysis.SuperNat(X, x, 0.1),
            lambda x: analysis.coherence_from_batch_gradients(x, 4),
            lambda x: linearized.quadratic_modes(X, x, X[0], [0.0, 1.0]),
            lambda x: linearized.quadratic_modes(X, X[:, 0], X[0], x),
        ],
    ),
    "lists": (
        (None, 3, "abc"),
        [
            lambda x: linearized.equal_progress([{"loss": 1.0}], [{"loss": 1.0}], x),
            lambda x: track.Tracker(MODEL, DATA, metrics=x),
            lambda x: track.Tracker(MODEL, DATA, metrics=[x] if x != "abc" else x),
            lambda x: optim.KFAC(net(), params=[x] if x is None else x),
            lambda x: optim.SOAP(net(), betas=x),
            lambda x: optim.EKFAC(net(), scalings=[x]),
            lambda x: optim.KFAC(net()).load_state_dict(x),
        ],
    ),
    "outputs": ((3, "abc", X), [lambda x: optim.KFAC(net(), outputs=x)]),
    "limits of blocks": (("abc", X, [1]), [lambda x: stepped(optim.KFAC(net(), block_limit=x))]),
    "inputs that are not real": ((X + 0j, X.to("meta")), [lambda x: nng.FIM(MODEL, [(x, Y)])]),
}


@pytest.mark.parametrize("name", WRONG)
def test_arguments_of_the_wrong_kind_say_what_is_expected(name):
    for given in WRONG[name][0]:
        for call in WRONG[name][1]:
            with pytest.raises(nng.NNGeomError, match=SAYS):
                call(given)


def test_what_is_fine_stays_fine():
    dense, kernel = MATRICES["PMatDense"], KERNELS["FMatDense"]
    for half in (2, torch.tensor(2.0), np.float64(2)):
        torch.testing.assert_close((dense / half).to_dense(), dense.to_dense() / 2)
        torch.testing.assert_close((kernel / half).tensor, kernel.tensor / 2)
        torch.testing.assert_close((JACOBIAN / half).tensor, JACOBIAN.tensor / 2)
    c = torch.tensor(2.0, dtype=f64, requires_grad=True)
    (dense / c).trace().backward()
    torch.testing.assert_close(c.grad, -dense.trace() / 4)
    assert nng.PVector.zeros(LC, 0, np.int64(2)).flat().shape == (0, 2, LC.numel)
    assert V.norm(float("inf")) == V.flat().abs().max() and dense.norm(2.0) == dense.norm(2)
    torch.testing.assert_close(analysis.effective_rank(torch.ones(4, dtype=torch.long)), torch.tensor(4.0))
