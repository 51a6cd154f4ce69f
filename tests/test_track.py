"""The tracker: what it measures, keeps, writes, resumes and refuses; its dashboard and callbacks."""

import copy
import csv
import json
import math
import sys
import types

import pytest
import torch
from cases import build
from torch import nn
from torch.nn import functional as F

import nngeom as nng
from nngeom import analysis, mgs
from nngeom.track import QUANTITIES, Tracker, geometric, huggingface_callback, lightning_callback, quantity
from nngeom.track.tracker import DEFAULT


@pytest.fixture
def case():
    return build("attention")


def train(model, case, tracker, steps, first=0):
    """A few steps of gradient descent under a tracker."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(case.inputs), case.targets)
        loss.backward()
        tracker.step(step, train_loss=loss.detach())
        optimizer.step()


@pytest.mark.parametrize("name", ["mlp", "conv2d", "attention"])
def test_every_quantity_is_what_it_is_called_for(name):
    c = build(name)
    row = Tracker(c.model, c.loader, list(QUANTITIES)).measure(0)
    k = nng.GramMatrix(c.model, c.loader)
    close = lambda key, value: torch.testing.assert_close(row[key], float(value), rtol=1e-8, atol=1e-10, equal_nan=True)
    f = c.model(c.inputs).detach()
    close("probe_loss", F.cross_entropy(f, c.targets))
    close("probe_accuracy", (f.argmax(1) == c.targets).double().mean())
    centred = analysis.center(k)
    values = analysis.spectrum(centred)
    close("eigenvalue_1", values[0])
    close("eigenvalue_10", values[9])
    close("effective_rank", analysis.effective_rank(centred))
    close("trace_ratio_10", values[:10].sum() / values.sum())
    close("alignment", analysis.kernel_label_alignment(k, c.targets))
    for layer, value in analysis.label_alignment(c.model, c.loader, by_layer=True).items():
        close(f"alignment/{layer}", value)
    m = mgs.metrics(c.model, [(c.inputs, c.targets)])
    close("mgs_trace", m.mean_trace[0])
    torch.testing.assert_close(row["mgs_logdet"], float(m.mean_log[0]), rtol=1e-4, atol=1e-4)
    close("mgs_cosine", m.cosine[0])
    close("coherence_ratio", analysis.coherence(c.model, c.loader).ratio)
    close("stiffness_within", analysis.stiffness(c.model, c.loader).within)
    close("geometric_complexity", analysis.geometric_complexity(c.model, c.loader))
    close("sharpness", analysis.sharpness(c.model, c.loader))
    close("non_uniformity", analysis.non_uniformity(c.model, c.loader))
    close("parameter_norm", nng.PVector.from_model(c.model).norm())


def test_complexity_of_the_trajectory_beside_a_tracker(case):
    """What accumulates over every step is handed to ``step`` as a number."""
    model = copy.deepcopy(case.model)
    tracker, measure = Tracker(model, case.loader, ["loss"], every=2), analysis.ComplexityMeasure(model, case.loader)
    for step in range(5):
        tracker.step(step, complexity=measure.value)
        with torch.no_grad():
            for p in model.parameters():
                p += 0.01
        measure.update()
    assert (
        tracker.history["complexity"][0] == 0
        and 0 < tracker.history["complexity"][1] < tracker.history["complexity"][2] < measure.value
    )


def test_history_has_one_entry_a_measurement(case):
    tracker = Tracker(case.model, case.loader, ["loss"], every=2)
    train(case.model, case, tracker, 5)
    assert tracker.history["step"] == [0, 2, 4]
    assert {len(c) for c in tracker.history.values()} == {3} and set(tracker.history) == {
        "step",
        "train_loss",
        "probe_loss",
    }
    tracker.measure(9, other=1.5)
    assert (
        tracker.history["other"][-1] == 1.5
        and math.isnan(tracker.history["other"][0])
        and math.isnan(tracker.history["train_loss"][-1])
    )
    assert tracker.step(11) is None


def test_the_model_is_put_back(case):
    case.model.train()
    case.model.head.eval()
    state = torch.get_rng_state()
    Tracker(case.model, case.loader).step(0)
    assert case.model.training and not case.model.head.training and case.model.attention.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in case.model.parameters())


def test_dropout_and_batch_norm_are_measured_in_evaluation_mode():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)).double().train()
    c = build("mlp")
    first, second = (Tracker(model, c.loader).measure(0) for _ in range(2))
    assert first == second and model.training


def test_own_metrics(case):
    def pair(model, batches):
        return {"a": torch.tensor(1.0), "b": len(batches)}

    def single(model, batches):
        return 3

    row = Tracker(case.model, case.loader, [pair, single]).measure(0)
    assert row == {"step": 0, "a": 1.0, "b": 2.0, "single": 3.0}
    quantity("weight")(lambda look: {"weight": float(look.model.head.weight.detach().sum())})
    try:
        assert "weight" in Tracker(case.model, case.loader, ["weight"]).measure(0)
    finally:
        del QUANTITIES["weight"]
    with pytest.raises(nng.ArgumentError, match="number or a dict"):
        Tracker(case.model, case.loader, [lambda model, batches: "text"]).measure(0)


def test_geometric_schedule():
    schedule = geometric(1.5)
    assert [step for step in range(30) if schedule(step)] == [0, 1, 2, 3, 5, 8, 12, 18, 27]
    with pytest.raises(nng.ArgumentError, match="above 1"):
        geometric(1.0)


def test_overhead_is_a_share_of_time(case, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def slow(model, batches):
        clock[0] += 3
        return 0

    tracker = Tracker(case.model, case.loader, [slow], every=1)
    assert tracker.overhead == 0
    tracker.step(0)
    clock[0] += 9
    assert tracker.overhead == pytest.approx(3 / 12)


def test_save_and_resume(case, tmp_path):
    tracker = Tracker(case.model, case.loader, ["loss", "effective_rank"], every=geometric(2))
    train(case.model, case, tracker, 5)
    tracker.save(tmp_path / "track.json")
    other = Tracker(case.model, case.loader, ["loss", "effective_rank"], every=geometric(2)).load(
        tmp_path / "track.json"
    )
    assert other.history == tracker.history and 0 < other.overhead <= 1
    train(case.model, case, other, 5, first=5)
    assert other.history["step"] == [0, 1, 2, 4, 8]
    assert list(tmp_path.iterdir()) == [tmp_path / "track.json"]


@pytest.mark.parametrize(
    "text", ["", "[]", '{"format": "other"}', '{"format": "nngeom-track-1", "history": 3}', "\x00"]
)
def test_damaged_files(case, tmp_path, text):
    path = tmp_path / "track.json"
    path.write_text(text)
    with pytest.raises(nng.FileError, match=r"track\.json"):
        Tracker(case.model, case.loader).load(path)


def test_files_that_do_not_fit(case, tmp_path):
    tracker = Tracker(case.model, case.loader, ["loss"])
    with pytest.raises(nng.FileError, match="cannot be read"):
        tracker.load(tmp_path / "missing.json")
    ragged = {"format": "nngeom-track-1", "elapsed": 1, "spent": 0, "last": None, "history": {"step": [0, 1], "x": [0]}}
    (tmp_path / "ragged.json").write_text(json.dumps(ragged))
    with pytest.raises(nng.FileError, match="lengths"):
        tracker.load(tmp_path / "ragged.json")
    for write in (tracker.save, tracker.to_csv):
        with pytest.raises(nng.FileError, match="cannot be written"):
            write(tmp_path / "nowhere" / "file")
    assert not (tmp_path / "nowhere").exists()


def test_csv(case, tmp_path):
    tracker = Tracker(case.model, case.loader, ["loss"], every=2, csv=tmp_path / "a.csv")
    train(case.model, case, tracker, 3)
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert [float(r["step"]) for r in rows] == [0, 2]
    assert [float(r["probe_loss"]) for r in rows] == tracker.history["probe_loss"]


def test_tensorboard(case, tmp_path, monkeypatch):
    seen = []

    class SummaryWriter:
        def __init__(self, directory):
            self.directory = directory

        def add_scalar(self, name, value, step):
            seen.append((name, value, step))

        def flush(self):
            pass

        close = flush

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    tracker = Tracker(case.model, case.loader, ["loss"], tensorboard=tmp_path)
    tracker.measure(0)
    tracker.measure(3, extra=2.0)
    live, seen[:] = list(seen), []
    tracker.to_tensorboard(tmp_path)
    assert sorted(live) == sorted(seen) and ("nngeom/extra", 2.0, 3) in seen and len(seen) == 3


def test_extras_are_named(case, tmp_path, monkeypatch):
    for module in (
        "torch.utils.tensorboard",
        "matplotlib",
        "matplotlib.figure",
        "lightning.pytorch",
        "lightning",
        "pytorch_lightning",
        "transformers",
    ):
        monkeypatch.setitem(sys.modules, module, None)
    tracker = Tracker(case.model, case.loader, ["loss"])
    for call, library in (
        (lambda: Tracker(case.model, case.loader, tensorboard=tmp_path), "tensorboard"),
        (lambda: tracker.plot(tmp_path / "a.png"), "matplotlib"),
        (lambda: lightning_callback(tracker), "lightning"),
        (lambda: huggingface_callback(tracker), "transformers"),
    ):
        with pytest.raises(nng.MissingExtraError, match=f"pip install {library}"):
            call()


def test_callbacks(case, monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning", types.ModuleType("lightning"))
    monkeypatch.setitem(sys.modules, "lightning.pytorch", types.SimpleNamespace(Callback=object))
    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(TrainerCallback=object))
    tracker = Tracker(case.model, case.loader, ["loss"], every=2)
    callback = lightning_callback(tracker)
    for step in (1, 1, 2, 2, 3, 4):  # batches; gradients accumulated over some
        trainer = types.SimpleNamespace(
            global_step=step, callback_metrics={"train_loss": torch.tensor(0.5), "name": "x"}
        )
        callback.on_train_batch_end(trainer, case.model, None, None, 0)
    assert tracker.history["step"] == [2, 4] and tracker.history["train_loss"] == [0.5, 0.5]
    tracker = Tracker(case.model, case.loader, ["loss"], every=2)
    callback = huggingface_callback(tracker)
    for step in (1, 2, 3):
        callback.on_step_end(
            None, types.SimpleNamespace(global_step=step, log_history=[{"loss": 0.25, "step": step}]), None
        )
    assert tracker.history["step"] == [2] and tracker.history["loss"] == [0.25]


def test_dashboard(case, tmp_path):
    tracker = Tracker(case.model, case.loader, every=1)
    train(case.model, case, tracker, 4)
    figure = tracker.plot(tmp_path / "dashboard.png", title="attention")
    assert (tmp_path / "dashboard.png").stat().st_size > 20_000
    titles = [ax.get_title(loc="left") for ax in figure.axes if ax.get_title(loc="left")]
    assert len(titles) == 6 and "Effective rank" in titles
    empty = Tracker(case.model, case.loader, ["parameter_norm"])
    empty.measure(0)
    assert len(empty.plot(tmp_path / "empty.png").axes) == 6
    with pytest.raises(nng.FileError, match="cannot be written"):
        tracker.plot(tmp_path / "nowhere" / "a.png")


def test_refusals(case):
    with pytest.raises(nng.ArgumentError, match="effective_rank"):
        Tracker(case.model, case.loader, ["rank"])
    with pytest.raises(nng.ArgumentError, match="at least 1"):
        Tracker(case.model, case.loader, every=0)
    with pytest.raises(nng.LoaderError, match="empty"):
        Tracker(case.model, [])
    with pytest.raises(nng.LoaderError, match="labels"):
        Tracker(case.model, [case.inputs], ["alignment"]).measure(0)
    assert set(DEFAULT) <= set(QUANTITIES)
