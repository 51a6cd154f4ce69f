"""Labels in every dtype and shape, empty selections, ambiguous names, NaN: a right value or an error, no nonsense."""

import functools
import math

import pytest
import torch
from cases import build
from torch import nn
from torch.nn import functional as F

import nngeom as nng
from nngeom import analysis, linearized, mgs
from nngeom.analysis.labels import class_labels
from nngeom.linearized import difficulty
from nngeom.linearized.progress import first_crossing
from nngeom.track import Tracker

f64 = torch.float64
WRITTEN = {
    "long": lambda y: y,
    "int32": lambda y: y.int(),
    "uint8": lambda y: y.to(torch.uint8),
    "float": lambda y: y.float(),
    "double": lambda y: y.double(),
    "half": lambda y: y.half(),
    "column": lambda y: y[:, None],
    "float column": lambda y: y.double()[:, None],
    "three axes": lambda y: y[:, None, None],
}
NO_CLASSES = {
    "fractions": torch.tensor([0.5, 1.0, 0.0, 1.0, 2.0, 0.0]),
    "nan": torch.tensor([math.nan, 1, 0, 1, 2, 0]),
    "infinity": torch.tensor([math.inf, 1, 0, 1, 2, 0]),
    "one-hot": F.one_hot(torch.tensor([0, 1, 0, 1, 2, 0])),
    "positions": torch.zeros(6, 4, dtype=torch.long),
    "complex": torch.zeros(6, dtype=torch.complex64),
}


def equal(x, y):
    torch.testing.assert_close(torch.as_tensor(x), torch.as_tensor(y), rtol=1e-12, atol=1e-14, equal_nan=True)


def loss_of(y):
    """A cross-entropy that takes labels however they are written."""
    return lambda f, t: F.cross_entropy(f, t.reshape(len(t)).long(), reduction="none")


# -- stiffness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize("kind", ["cosine", "sign"])
def test_stiffness_by_class_however_labels_are_written(written, kind):
    case = build("mlp")
    as_given = lambda batches: [(x, WRITTEN[written](y)) for x, y in batches]
    truth = analysis.stiffness(case.model, case.loader, kind)
    found = analysis.stiffness(case.model, as_given(case.loader), kind, loss=loss_of(None))
    across = analysis.stiffness(case.model, case.loader, kind, loss=loss_of(None), other=as_given(case.loader[:1]))
    plain = analysis.stiffness(case.model, case.loader, kind, other=case.loader[:1])
    for x, y in ((found, truth), (across, plain)):
        assert torch.equal(x.classes, y.classes) and x.has_classes
        for name in ("matrix", "distance", "mean", "by_class", "within", "between"):
            equal(getattr(x, name), getattr(y, name))
    assert not truth.within.isnan() and not truth.between.isnan()


@pytest.mark.parametrize("given", NO_CLASSES)
def test_stiffness_of_targets_that_are_no_classes(given):
    g = torch.randn(6, 3, dtype=f64)
    found = analysis.gradient_stiffness(g, labels=NO_CLASSES[given])
    assert found.matrix.shape == (6, 6) and not found.mean.isnan() and not found.has_classes
    for name in ("classes", "by_class", "within", "between"):
        with pytest.raises(nng.ArgumentError, match="one class label an example"):
            getattr(found, name)


def test_stiffness_of_a_regression_has_no_classes_and_says_so():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2).double(), torch.randn(6, 3, dtype=f64)
    found = analysis.stiffness(model, [(x, torch.randn(6, 2, dtype=f64))], loss="mse")
    assert torch.isfinite(found.matrix).all()
    with pytest.raises(nng.ArgumentError, match=r"targets \(6, 2\)"):
        _ = found.within
    with pytest.raises(nng.ArgumentError, match="go together"):
        analysis.gradient_stiffness(x, x, labels=torch.zeros(6))
    with pytest.raises(nng.ArgumentError, match="one an example"):
        analysis.gradient_stiffness(x, labels=torch.zeros(5))


def test_class_labels():
    y = torch.tensor([0, 1, -100, 2])
    for write in WRITTEN.values():
        assert class_labels(write(y.clamp_min(0))).tolist() == [0, 1, 0, 2]
    assert class_labels(torch.tensor([True, False])).tolist() == [1, 0] and class_labels(y).tolist() == y.tolist()
    assert all(class_labels(t) is None for t in (*NO_CLASSES.values(), None, [0, 1], torch.tensor(1)))
    assert class_labels(torch.zeros(0)).tolist() == []


# -- alignment with labels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [1, 3])
def test_label_vectors_with_one_output_and_several(c):
    labels = torch.tensor([0, 1, 1, 0])
    expected = analysis.label_vector(labels, c, f64)
    assert expected.shape == (c, 4) and (c > 1 or expected.tolist() == [[-1, 1, 1, -1]])
    for write in (WRITTEN["int32"], WRITTEN["column"], lambda y: y.bool()):
        assert torch.equal(analysis.label_vector(write(labels), c, f64), expected)
    if c == 1:
        assert torch.equal(analysis.label_vector(2 * labels - 1, 1, f64), expected)
        for bad in ([1, 2, 2, 1], [0, 1, 2, 1], [-1, 0, 1, 0]):
            with pytest.raises(nng.OutputError, match="labels 0 and 1, or -1 and 1"):
                analysis.label_vector(torch.tensor(bad), 1)


def test_classes_are_not_read_as_signs_where_a_kernel_has_no_output_axis():
    k = torch.eye(6, dtype=f64) + 1
    with pytest.raises(nng.OutputError, match="labels 0 and 1"):
        analysis.kernel_label_alignment(k, torch.tensor([0, 1, 2, 3, 4, 5]))
    assert analysis.kernel_label_alignment(k, torch.tensor([0, 1, 1, 0, 1, 0])) > 0


class Tokens(nn.Module):
    """``(n, t, i) -> (n, t, c)``, or classes first."""

    def __init__(self, classes_first):
        super().__init__()
        self.map, self.classes_first = nn.Linear(3, 4), classes_first

    def forward(self, x):
        f = self.map(x.sin())
        return f.movedim(-1, 1) if self.classes_first else f


@pytest.mark.parametrize("by_layer", [False, True])
def test_labels_of_positions_are_put_where_the_outputs_have_their_classes(by_layer):
    torch.manual_seed(0)
    first, last = Tokens(True).double(), Tokens(False).double()
    last.load_state_dict(first.state_dict())
    x, y = torch.randn(5, 2, 3, dtype=f64), torch.randint(0, 4, (5, 2))
    one, other = (analysis.label_alignment(m, [(x, y)], by_layer=by_layer) for m in (first, last))
    for a, b in zip(one.values(), other.values()) if by_layer else [(one, other)]:
        equal(a, b)
    k = nng.GramMatrix(last, x)
    v = F.one_hot(y, 4).flatten(1).double()
    v = v - v.mean(0)
    centred = analysis.center(k).permute(1, 0, 3, 2).reshape(40, 40)
    expected = v.flatten() @ centred @ v.flatten() / (centred.norm() * v.square().sum())
    equal(analysis.label_alignment(last, [(x, y)]), expected)
    row = Tracker(last, [(x, y)], ["alignment", "alignment_by_layer", "accuracy", "loss"]).measure(0)
    equal(row["alignment"], expected.item())
    equal(row["alignment/map"], expected.item())
    equal(row["probe_accuracy"], (last(x).argmax(-1) == y).double().mean().item())


def test_groups_of_a_kernel():
    torch.manual_seed(0)
    a, y = torch.randn(6, 2, dtype=f64), torch.tensor([0, 1, 1, 0, 1, 0])
    k, mask = a @ a.T, torch.tensor([True, False, True, True, False, True])
    groups = {
        "mask": mask,
        "index": mask.nonzero().flatten(),
        "list": [0, 2, 3, 5],
        "empty": torch.zeros(6, dtype=torch.bool),
    }
    found = analysis.group_alignment(k, y, {**groups, "nothing": []})
    expected = analysis.kernel_label_alignment(k[mask][:, mask], y[mask])
    for name in ("mask", "index", "list"):
        equal(found[name], expected)
    assert found["empty"].isnan() and found["nothing"].isnan()
    for bad in (mask[:4], mask.to(torch.uint8), mask.double(), torch.tensor([0, 6]), torch.tensor([[0, 1]])):
        with pytest.raises(nng.ArgumentError, match="group 'bad'"):
            analysis.group_alignment(k, y, {"bad": bad})


# -- margins and bounds ------------------------------------------------------------------------------------------------


def test_margins_however_labels_are_written():
    torch.manual_seed(0)
    f, y = torch.randn(4, 3, dtype=f64), torch.tensor([0, 2, 1, 1])
    expected = torch.stack([f[i, y[i]] - max(f[i, j] for j in range(3) if j != y[i]) for i in range(4)])
    for write in WRITTEN.values():
        equal(analysis.margins(f, write(y)), expected)
    signs = torch.tensor([-1.0, 1, 1, -1], dtype=f64)
    for labels in (signs, (signs > 0).long(), (signs > 0)[:, None], signs[:, None]):
        for outputs in (f[:, 0], f[:, :1]):
            equal(analysis.margins(outputs, labels), f[:, 0] * signs)
    for outputs, labels in (
        (f, torch.tensor([0, 3, 1, 1])),
        (f, y[:3]),
        (f[:, 0], y),
        (f[:, 0], y[:1].clamp(0, 1)),
        (f, y.double() + 0.5),
    ):
        with pytest.raises(nng.OutputError):
            analysis.margins(outputs, labels)


def test_bounds_take_labels_output_by_output():
    torch.manual_seed(0)
    a = torch.randn(6, 8, dtype=f64)
    k = (a @ a.T).view(2, 3, 2, 3)
    y = torch.randn(2, 3, dtype=f64)
    for bound in (analysis.rescaled_bound, analysis.interpolation_norm, analysis.interpolation_bound):
        equal(bound(k, y), bound(k, y.flatten()))
        equal(bound(k, nng.FVector(y)), bound(k, y))
        with pytest.raises(nng.ArgumentError, match=r"expected labels \(2, 3\)"):
            bound(k, y.T)


def test_numbers_of_samples_and_shares():
    k = torch.eye(3, dtype=f64)
    one = analysis.rademacher_complexity(k, 1.0, "monte_carlo", samples=1)
    assert one.standard_error == math.inf
    for bad in (0, -1, 1.5):
        with pytest.raises(nng.ArgumentError, match="samples"):
            analysis.rademacher_complexity(k, 1.0, "monte_carlo", samples=bad)
        with pytest.raises(nng.ArgumentError, match="samples"):
            analysis.geometric_complexity(nn.Linear(2, 2), torch.zeros(3, 2), estimator="rademacher", samples=bad)
        with pytest.raises(nng.ArgumentError, match="whole numbers"):
            analysis.trace_ratios(k, [1, bad] if bad else [0.5])
    for a, s in ((math.nan, 1.0), (1.0, torch.tensor(math.nan))):
        with pytest.raises(nng.NonFiniteError, match="neither stable"):
            analysis.sgd_stability(a, s, 0.1, 2, 10)


# -- linearity, difficulty, progress -----------------------------------------------------------------------------------


def test_linearity_of_a_network_without_rectifiers_has_no_signs_and_says_so():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    found = linearized.linearity(model, model, torch.randn(5, 3, dtype=f64))
    assert found.units == 0 and abs(found.kernel_alignment - 1) < 1e-12
    with pytest.raises(nng.ArgumentError, match=r"the model has Linear, Tanh: see \.kernel_alignment"):
        _ = found.sign_similarity
    with torch.no_grad():
        model[2].weight.zero_()
        model[0].weight.zero_()
        model[0].bias.zero_()
    assert math.isnan(linearized.linearity(model, model, torch.zeros(5, 3, dtype=f64)).representation_alignment)


def test_groups_have_names_of_their_own():
    with pytest.raises(nng.ArgumentError, match="different names"):
        difficulty.groups_by_score(torch.rand(6), 3, names=["a", "b", "a"])
    with pytest.raises(nng.ArgumentError, match="different names"):
        difficulty.groups_by_flag(torch.tensor([True, False]), ("x", "x"))
    with pytest.raises(nng.OutputError):
        difficulty.groups_by_attribute(torch.tensor([0.2, 1.0]), torch.tensor([0, 1]))
    groups = difficulty.groups_by_attribute(torch.tensor([0.0, 1.0]), torch.tensor([0, 0]))
    assert groups.members["with"].tolist() == [0] and groups.members["without"].tolist() == [1]


@pytest.mark.parametrize("written", WRITTEN)
def test_flipped_labels_however_they_are_written(written):
    y = WRITTEN[written](torch.randint(0, 3, (20,), generator=torch.Generator().manual_seed(0)))
    noisy, flag = linearized.flip_labels(y, 0.5, 3, torch.Generator().manual_seed(1))
    assert noisy.dtype == y.dtype and noisy.shape == y.shape and int(flag.sum()) == 10
    assert torch.equal((noisy != y).flatten(), flag) and int(noisy.long().min()) >= 0 and int(noisy.long().max()) < 3


def test_labels_that_are_no_classes_are_not_flipped_nor_scored():
    for bad in (torch.tensor([0, 3]), torch.tensor([-1, 1])):
        with pytest.raises(nng.ArgumentError, match="expected 0 to 2"):
            linearized.flip_labels(bad, 0.5, 3)
    for bad in (torch.tensor([0.5, 1]), torch.zeros(2, 3)):
        with pytest.raises(nng.OutputError):
            linearized.flip_labels(bad, 0.5, 3)
    x = torch.randn(6, 2)
    with pytest.raises(nng.ArgumentError, match="labels"):
        linearized.add_spurious_feature(x, torch.zeros(6, 1), 0.5, 1.0, 0.1)
    with pytest.raises(nng.OutputError, match="ridge"):
        linearized.c_scores(x, torch.tensor([0.5, 1, 0, 1, 0, 1]), [3], 2)
    with pytest.raises(nng.ArgumentError, match="held-out inputs"):
        linearized.c_scores(x, torch.zeros(6), [3], 2, learner=lambda x, y, rest, seed: torch.zeros(len(rest), 2))


@pytest.mark.parametrize("falling", [True, False])
def test_records_without_progress_are_passed_over(falling):
    sign = 1 if falling else -1
    known = sign * torch.tensor([4.0, 2.0, 1.0], dtype=f64)
    gaps = torch.full((7,), math.nan, dtype=f64)
    gaps[[0, 3, 5]] = known
    levels = sign * torch.tensor([5.0, 3.0, 1.5, 1.0, 0.5], dtype=f64)
    crossing = lambda p, **options: first_crossing(p, levels, falling=falling, **options)
    equal(crossing(gaps), torch.tensor([0.0, 1.5, 4.0, 5.0, math.nan], dtype=f64))
    equal(crossing(gaps, interpolate=False), torch.tensor([0.0, 3.0, 5.0, 5.0, math.nan], dtype=f64))
    equal(crossing(gaps, smoothing=0.5), torch.tensor([0, 3.0, math.nan, math.nan, math.nan], dtype=f64))
    for bad, at in ((torch.full((3,), math.nan), levels), (known, torch.tensor([math.nan], dtype=f64))):
        with pytest.raises(nng.ArgumentError):
            first_crossing(bad, at)


def test_records_of_unlike_columns_are_refused():
    run = [{"loss": 2.0}, {"loss": 1.0, "late": 3.0}]
    with pytest.raises(nng.ArgumentError, match="late"):
        linearized.equal_progress(run, run, [1.5])


# -- the tracker -------------------------------------------------------------------------------------------------------


def power(model, batches, p=1):
    return 2**p


def test_every_metric_has_a_column_of_its_own():
    case = build("mlp")
    metrics = [
        lambda m, b: 1,
        lambda m, b: 2,
        lambda m, b: {"loss": 3},
        *(functools.partial(power, p=p) for p in (2, 3)),
        power,
        "loss",
        "loss",
    ]
    tracker = Tracker(case.model, case.loader, metrics)
    tracker.measure(0)
    row = tracker.measure(1)
    assert row["<lambda>"] == 1 and row["<lambda>_2"] == 2 and row["loss"] == 3
    assert (row["power"], row["power_2"], row["power_3"]) == (4, 8, 2) and "probe_loss" in row
    assert len(row) == 8 and {len(c) for c in tracker.history.values()} == {2}


@pytest.mark.parametrize(
    "metrics, scalars",
    [
        ([lambda m, b: {"loss": 1}, lambda m, b: {"loss": 2}], {}),
        ([lambda m, b: {"step": 1}], {}),
        (["loss"], {"probe_loss": 1.0}),
        ([lambda m, b: {"probe_loss": 1}, "loss"], {}),
    ],
)
def test_two_numbers_in_one_column_are_refused(metrics, scalars):
    case = build("mlp")
    with pytest.raises(nng.ArgumentError, match="rename one of them"):
        Tracker(case.model, case.loader, metrics).measure(0, **scalars)


@pytest.mark.parametrize("value", ["0.5", None, torch.zeros(2), [1.0], 1j])
def test_what_is_no_number_is_refused(value):
    case = build("mlp")
    for metric, scalars in ((lambda m, b: value, {}), (lambda m, b: {"x": value}, {}), (lambda m, b: 0, {"y": value})):
        with pytest.raises(nng.ArgumentError, match="expected a number"):
            Tracker(case.model, case.loader, [metric]).measure(0, **scalars)
    assert Tracker(case.model, case.loader, [lambda m, b: torch.ones(1, 1)]).measure(0)["<lambda>"] == 1


@pytest.mark.parametrize("written", WRITTEN)
def test_accuracy_however_labels_are_written(written):
    case = build("mlp")
    y = WRITTEN[written](case.targets)
    row = Tracker(case.model, (case.inputs, y), ["accuracy"]).measure(0)
    equal(row["probe_accuracy"], (case.model(case.inputs).argmax(1) == case.targets).double().mean().item())


def test_accuracy_with_one_output_ignored_labels_and_without_classes():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 1).double(), torch.randn(8, 3, dtype=f64)
    right = (model(x)[:, 0] > 0).long()
    right[0] = 1 - right[0]
    for y in (right, 2 * right - 1, right.double()[:, None], right.bool()):
        assert Tracker(model, (x, y), ["accuracy"]).measure(0)["probe_accuracy"] == 7 / 8
    for y in (torch.randn(8, dtype=f64), torch.arange(8)):
        assert math.isnan(Tracker(model, (x, y), ["accuracy"], loss="mse").measure(0)["probe_accuracy"])
    several = nn.Linear(3, 4).double()
    y = several(x).argmax(1)
    y[:2], y[2] = -100, (y[2] + 1) % 4
    assert Tracker(several, (x, y), ["accuracy"]).measure(0)["probe_accuracy"] == pytest.approx(5 / 6)
    row = Tracker(several, (x, torch.randn(8, 4, dtype=f64)), ["accuracy", "stiffness"], loss="mse").measure(0)
    assert (
        math.isnan(row["probe_accuracy"]) and math.isnan(row["stiffness_within"]) and not math.isnan(row["stiffness"])
    )


def test_kernels_of_several_outputs_have_metrics():
    case = build("mlp")
    k = nng.GramMatrix(case.model, case.loader)
    expected = mgs.metrics(case.model, [(case.inputs, case.targets)])
    for given in (k, k.tensor, k.to_dense()):
        equal(mgs.kernel_metrics(given).trace, expected.trace)
    with pytest.raises(nng.ArgumentError, match="one set of points"):
        mgs.kernel_metrics(torch.zeros(2, 3, dtype=f64))
