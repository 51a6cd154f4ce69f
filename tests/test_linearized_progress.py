"""Curves at equal progress, groups of difficulty, C-scores, synthetic tasks."""

from __future__ import annotations

import math

import pytest
import torch

import nngeom as nng
from nngeom.linearized import (
    Curves,
    Grid,
    add_spurious_feature,
    c_scores,
    equal_progress,
    flip_labels,
    groups_by_attribute,
    groups_by_flag,
    groups_by_score,
    in_disks,
    yin_yang,
    yin_yang_label,
)


def fast_and_slow() -> tuple[Curves, dict]:
    """Two runs on one path, at different speeds."""
    fast, slow = Curves(), {"loss": [], "hard": [], "map": []}
    for t in range(6):
        fast.record(loss=1 - 0.2 * t, hard=3 - 0.2 * t, map=torch.arange(4.0, dtype=torch.float64) * (1 - 0.2 * t))
    for t in range(40):
        loss = 1 - 0.025 * t
        slow["loss"].append(loss)
        slow["hard"].append(2 + loss)
        slow["map"].append([0.0, loss, 2 * loss, 3 * loss])
    return fast, slow


def test_speed_does_not_matter():
    result = equal_progress(*fast_and_slow(), [0.9, 0.5, 0.31])
    assert torch.allclose(result.a["hard"], result.b["hard"]) and torch.allclose(
        result.a["hard"], 2 + result.thresholds
    )
    assert result.difference("map").shape == (3, 4) and result.difference("map").abs().max() < 1e-12
    assert torch.allclose(result.index_a, torch.tensor([0.5, 2.5, 3.45], dtype=torch.float64))
    assert torch.allclose(result.index_b, torch.tensor([4.0, 20.0, 27.6], dtype=torch.float64))


def test_never_reached_is_nan_and_first_record_past_it_without_interpolation():
    fast, slow = fast_and_slow()
    result = equal_progress(fast, slow, torch.tensor([0.5, 0.01, -1.0]), interpolate=False)
    assert torch.allclose(result.a["hard"][:2], torch.tensor([2.4, 2.0], dtype=torch.float64))
    assert (
        math.isnan(result.b["hard"][1])
        and bool(result.a["map"][2].isnan().all())
        and math.isnan(result.difference("hard")[2])
    )


def test_first_crossing_of_a_curve_that_comes_back_and_of_one_that_grows():
    run = {"loss": [3.0, 1.0, 2.0, 0.5], "x": [0.0, 1.0, 2.0, 3.0], "accuracy": [0.1, 0.6, 0.4, 0.9]}
    result = equal_progress(run, run, [2.0, 0.75, 5.0])
    assert result.a["x"].tolist() == pytest.approx([0.5, 2 + 1.25 / 1.5, 0.0])
    rising = equal_progress(run, run, [0.35, 0.8], progress="accuracy", falling=False)
    assert rising.a["x"].tolist() == pytest.approx([0.5, 2.8])
    smooth = equal_progress(run, run, [2.2], smoothing=0.5, interpolate=False)  # averages 3, 2, 2, 1.25
    assert smooth.a["x"].tolist() == [1.0]
    assert equal_progress(run, run, [1.9], smoothing=0.5, interpolate=False).a["x"].tolist() == [3.0]


def test_an_object_with_a_history_is_a_run():
    class Tracker:
        history = {"train_loss": torch.tensor([2.0, 1.0]), "z": torch.tensor([0.0, 1.0])}

    assert equal_progress(Tracker(), Tracker(), [1.5]).a["z"].item() == 0.5
    records = [{"loss": 2.0, "z": 0.0}, {"loss": 1.0, "z": 1.0}]
    assert equal_progress(records, records, [1.25]).a["z"].item() == 0.75


def test_run_errors():
    run = {"loss": [1.0], "x": [1.0]}
    bad = [
        lambda: Curves().record() or Curves({"loss": []}).record(x=1),
        lambda: equal_progress(run, {"a": [1.0]}, [1.0]),
        lambda: equal_progress(run, {"loss": [1.0, 2.0], "x": [1.0]}, [1.0]),
        lambda: equal_progress(run, run, [1.0], smoothing=1.0),
        lambda: equal_progress(run, run, [1.0], progress="y"),
        lambda: equal_progress(run, {}, [1.0]),
    ]
    for call in bad:
        with pytest.raises(nng.ArgumentError, match="expected"):
            call()
    with pytest.raises(nng.ArgumentTypeError, match="mapping"):
        equal_progress([1.0], run, [1.0])


def test_grid():
    grid = Grid(-1, 1, 5)
    image = grid.image(torch.stack([grid.points[:, 0], grid.points[:, 1]]))
    assert image.shape == (2, 5, 5)
    assert image[0, 0].tolist() == [-1, -0.5, 0, 0.5, 1] and image[1, :, 0].tolist() == [-1, -0.5, 0, 0.5, 1]


def test_groups():
    labels = torch.randint(0, 10, (200,))
    noisy, flag = flip_labels(labels, 0.15, 10, torch.Generator().manual_seed(0))
    assert int(flag.sum()) == 30 and torch.equal(noisy != labels, flag)
    groups = groups_by_flag(flag)
    assert groups.sizes() == {"clean": 170, "noisy": 30}
    means = groups.means((noisy != labels).float())
    assert means["clean"] == 0 and means["noisy"] == 1
    scores = torch.arange(10.0).flip(0)
    deciles = groups_by_score(scores, 5)
    assert deciles.members["q1"].tolist() == [0, 1] and deciles.means(scores)["q5"] == 0.5
    pair = groups_by_attribute(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]))
    assert pair.members["without"].tolist() == [2]
    bad = [
        lambda: groups_by_flag(labels),
        lambda: groups_by_score(scores, 11),
        lambda: groups_by_score(scores * float("nan")),
        lambda: flip_labels(labels, 2.0, 10),
        lambda: groups_by_attribute(labels, labels[:3]),
        lambda: groups_by_score(scores, 2, ["one"]),
    ]
    for call in bad:
        with pytest.raises(nng.ArgumentError):
            call()


def constant(inputs, labels, held_out, seed):
    """Always the most frequent label of the training set."""
    return labels.mode().values.expand(len(held_out))


def test_c_scores_of_a_constant_predictor_are_its_label():
    labels = torch.tensor([0] * 30 + [1] * 6)
    result = c_scores(torch.randn(36, 2), labels, [12, 20], 10, learner=constant)
    assert torch.equal(result.score, (labels == 0).to(result.score.dtype))
    assert torch.allclose(
        result.held_out.double().mean(1), torch.tensor([10 * 24 / 36, 10 * 16 / 36], dtype=torch.float64)
    )


def test_c_scores_find_the_wrong_labels_whatever_the_workers():
    g = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(3, 8, generator=g)
    labels = torch.arange(60) % 3
    x = centres[labels] + 0.5 * torch.randn(60, 8, generator=g)
    noisy, flag = flip_labels(labels, 0.1, 3, g)
    one = c_scores(x, noisy, [20, 40], 8)
    assert one.score[flag].max() < 0.2 and one.score[~flag].min() > 0.8
    two = c_scores(x, noisy, [20, 40], 8, workers=2)
    assert torch.equal(one.by_size, two.by_size)


CALLS = []


def counting(inputs, labels, held_out, seed):
    """Counts models; stops at the 25th while told to."""
    CALLS.append(seed)
    if len(CALLS) == 25:
        raise KeyboardInterrupt
    return constant(inputs, labels, held_out, seed)


def test_c_scores_resume(tmp_path):
    CALLS.clear()
    x, y, path = torch.randn(10, 2), torch.tensor([0, 1] * 5), tmp_path / "scores.npz"
    with pytest.raises(KeyboardInterrupt):
        c_scores(x, y, [4], 30, learner=counting, path=path)
    resumed = c_scores(x, y, [4], 30, learner=counting, path=path)
    assert len(CALLS) == 25 + 10  # 20 were on file
    CALLS.clear()
    again = c_scores(x, y, [4], 20, learner=counting, path=path)  # fewer repeats: all known
    assert not CALLS and again.held_out.sum() < resumed.held_out.sum()
    with pytest.raises(nng.FileError, match="other data"):
        c_scores(x, 1 - y, [4], 30, learner=counting, path=path)
    path.write_text("damaged")
    with pytest.raises(nng.FileError, match="not a file"):
        c_scores(x, y, [4], 30, learner=counting, path=path)
    with pytest.raises(nng.ArgumentError, match="sizes"):
        c_scores(x, y, [10])


def test_yin_yang():
    x, y = yin_yang(4000, torch.Generator().manual_seed(0))
    assert abs(float(in_disks(x).double().mean()) - 2 * math.pi * 0.09 / 4) < 0.02
    assert yin_yang_label(torch.tensor([[0.0, 0.9], [0.0, -0.9], [0.5, -0.5], [-0.5, 0.5]])).tolist() == [0, 1, 0, 1]
    assert abs(float(y.double().mean()) - 0.5) < 0.03


def test_spurious_feature():
    x, y = torch.zeros(400, 3), torch.randint(0, 2, (400,))
    more, attribute = add_spurious_feature(x, y, 0.95, 0.1, 0.3, torch.Generator().manual_seed(0))
    assert more.shape == (400, 4) and int((attribute == y).sum()) == 380
    means = [float(more[attribute == a, 3].mean()) for a in (0, 1)]
    assert abs(means[0] + 0.1) < 0.06 and abs(means[1] - 0.1) < 0.06
    with pytest.raises(nng.ArgumentError, match="labels 0 or 1"):
        add_spurious_feature(x, y + 1, 0.95, 0.1, 0.3)
