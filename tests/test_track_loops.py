"""A tracker of matrices and optimizers, its writers, and its callbacks in the loops and loggers of others."""

import csv
import json
import logging
import math

import pytest
import torch
from cases import build
from reference import fisher, loss_gradients
from torch.nn import functional as F

import nngeom as nng
from nngeom.optim import EKFAC, KFAC
from nngeom.track import (
    CSVWriter,
    MLflowWriter,
    TensorBoardWriter,
    Tracker,
    WandbWriter,
    accelerate_callback,
    huggingface_callback,
    lightning_callback,
    matrix_metric,
    optimizer_metric,
)


@pytest.fixture
def case():
    return build("mlp", sizes=(5, 6))


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dense", "default"])
def test_numbers_of_a_matrix(case, name):
    options = {"representation": nng.PMatDense} if name == "dense" else {}
    metric = matrix_metric(top=2, damping=1e-2, **options)
    row = Tracker(case.model, case.loader, [metric]).measure(0)
    dense = fisher(case.model, case.inputs)
    values = torch.linalg.eigvalsh(dense)
    assert row["fisher_trace"] == pytest.approx(float(dense.trace()), rel=0.2 if name == "default" else 1e-10)
    for layer, at in (("0", slice(0, 25)), ("2", slice(25, 43))):
        expected = float(dense[at, at].trace())
        assert row[f"fisher_trace/{layer}"] == pytest.approx(expected, rel=0.5 if name == "default" else 1e-10)
    if name == "dense":
        assert row["fisher_eigenvalue_1"] == pytest.approx(float(values[-1]))
        assert row["fisher_eigenvalue_2"] == pytest.approx(float(values[-2]))
        logdet = torch.linalg.slogdet(dense + 1e-2 * torch.eye(43, dtype=dense.dtype))[1]
        assert row["fisher_logdet"] == pytest.approx(float(logdet))
    else:
        kfac = nng.FIM(case.model, case.loader, nng.PMatKFAC)
        assert row["fisher_logdet"] == pytest.approx(float(kfac.logdet(1e-2)))
        assert row["fisher_eigenvalue_1"] == pytest.approx(float(kfac.eigh()[0][-1]))


def test_other_measures_and_several_at_once(case):
    ggn = matrix_metric(nng.GGN, nng.PMatDiag, name="ggn", numbers=["trace"], loss="cross_entropy")
    row = Tracker(case.model, case.loader, [ggn, matrix_metric(numbers=["trace"])]).measure(0)
    assert set(row) == {"step", "ggn_trace", "fisher_trace"}
    assert row["ggn_trace"] == pytest.approx(float(fisher(case.model, case.inputs).trace()))
    with pytest.raises(nng.ArgumentError, match="numbers"):
        matrix_metric(numbers=["rank"])


def test_noise_scale(case):
    g = loss_gradients(case.model, case.inputs, case.targets, F.cross_entropy)
    spread = (g - g.mean(0)).square().sum(1).mean()
    row = Tracker(case.model, case.loader, ["noise_scale", "coherence"]).measure(0)
    assert row["noise_scale"] == pytest.approx(float(spread / g.mean(0).square().sum()))


def test_numbers_of_an_optimizer(case):
    opt = KFAC(case.model, lr=lambda t: 0.5 / (1 + t), damping=0.25)
    tracker = Tracker(case.model, case.loader, [optimizer_metric(opt), "loss"])
    assert {k: tracker.measure(0)[k] for k in ("lr", "damping", "skipped_steps")} == {
        "lr": 0.5, "damping": 0.25, "skipped_steps": 0.0
    }  # fmt: skip
    with opt.observe():
        F.cross_entropy(case.model(case.inputs), case.targets).backward()
    opt.step()
    assert tracker.measure(1)["lr"] == 0.25
    sgd = torch.optim.SGD(case.model.parameters(), lr=0.125)
    assert optimizer_metric(sgd)(None, None) == {"lr": 0.125}


# -- writers -----------------------------------------------------------------------------------------------------------


def measured(case, *writers, **options):
    tracker = Tracker(case.model, case.loader, ["loss"], writers=writers, **options)
    tracker.measure(0)
    tracker.measure(3, extra=2.0)
    tracker.close()
    return tracker


def test_any_object_with_three_methods(case):
    said = []

    class Mine:
        def begin(self, history):
            said.append(("begin", dict(history)))

        def add(self, step, row):
            said.append((step, row))

        def close(self):
            said.append("close")

    tracker = measured(case, Mine())
    loss = tracker.history["probe_loss"]
    begin = ("begin", {"step": []})
    assert said[0][0] == "begin" and said[1:] == [
        (0, {"probe_loss": loss[0]}), (3, {"probe_loss": loss[1], "extra": 2.0}), "close"
    ]  # fmt: skip
    assert begin[1].keys() <= said[0][1].keys()


def test_csv(case, tmp_path):
    tracker = measured(case, CSVWriter(tmp_path / "a.csv"))
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert [float(r["step"]) for r in rows] == [0, 3] and math.isnan(float(rows[0]["extra"]))
    assert [float(r["probe_loss"]) for r in rows] == tracker.history["probe_loss"]
    tracker.save(tmp_path / "a.json")
    again = Tracker(case.model, case.loader, ["loss"], csv=tmp_path / "b.csv").load(tmp_path / "a.json")
    again.measure(5)
    rows = list(csv.DictReader((tmp_path / "b.csv").read_text().splitlines()))
    assert [float(r["step"]) for r in rows] == [0, 3, 5]


@pytest.mark.filterwarnings("ignore")
def test_tensorboard(case, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = measured(case, TensorBoardWriter(tmp_path))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    read = [(e.step, e.value) for e in events.Scalars("nngeom/probe_loss")]
    assert read == [(s, pytest.approx(x)) for s, x in zip([0, 3], tracker.history["probe_loss"])]
    assert [(e.step, e.value) for e in events.Scalars("nngeom/extra")] == [(3, 2.0)]


class Run:
    """As ``wandb.init()`` returns, as far as it is used."""

    def __init__(self):
        self.rows, self.defined = [], []

    def define_metric(self, name, step_metric=None):
        self.defined.append((name, step_metric))

    def log(self, data, step=None, commit=None):
        self.rows.append(data)


class Client:
    """As the module ``mlflow``, as far as it is used."""

    def __init__(self):
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))


def test_loggers_of_these_shapes(case):
    run, client = Run(), Client()
    tracker = measured(case, WandbWriter(run), MLflowWriter(client))
    loss = tracker.history["probe_loss"]
    assert run.defined == [("nngeom/*", "nngeom/step")]
    assert run.rows == [
        {"nngeom/probe_loss": loss[0], "nngeom/step": 0},
        {"nngeom/probe_loss": loss[1], "nngeom/extra": 2.0, "nngeom/step": 3},
    ]
    assert client.rows == [
        (0, {"nngeom/probe_loss": loss[0]}),
        (3, {"nngeom/probe_loss": loss[1], "nngeom/extra": 2.0}),
    ]
    for kind, name in ((WandbWriter, "log"), (MLflowWriter, "log_metrics")):
        with pytest.raises(TypeError, match=rf"{name}\(\)"):
            kind(object())


@pytest.mark.filterwarnings("ignore")
def test_weights_and_biases_itself(case, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.init(mode="offline", dir=str(tmp_path), project="nngeom")
    tracker = measured(case, WandbWriter(run))
    assert run.summary["nngeom/probe_loss"] == tracker.history["probe_loss"][-1] and run.summary["nngeom/step"] == 3
    run.finish()


@pytest.mark.filterwarnings("ignore")
def test_mlflow_itself(case, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file://{tmp_path}/runs")
    mlflow.set_experiment("nngeom")
    with mlflow.start_run() as run:
        tracker = measured(case, MLflowWriter(mlflow))
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "nngeom/probe_loss")
    assert [(m.step, m.value) for m in history] == list(zip([0, 3], tracker.history["probe_loss"]))


def test_columns_that_loggers_refuse(case):
    client = Client()
    measured(case, MLflowWriter(client), loss="cross_entropy")
    tracker = Tracker(
        case.model, case.loader, [lambda m, b: {"a(b)": 1.0, "c": math.nan}], writers=[MLflowWriter(client)]
    )
    tracker.measure(7)
    assert client.rows[-1] == (7, {"nngeom/a_b_": 1.0})


# -- loops of others ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("by_hand", [False, True])
def test_lightning_and_its_logger(case, by_hand, tmp_path):
    pl = pytest.importorskip("lightning.pytorch")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    case.model.train()

    class Module(pl.LightningModule):
        def __init__(self, net):
            super().__init__()
            self.net, self.automatic_optimization = net, not by_hand

        def training_step(self, batch, index):
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            if by_hand:
                opt = self.optimizers()
                opt.zero_grad()
                self.manual_backward(loss)
                opt.step()
            return loss

        def configure_optimizers(self):
            return EKFAC(self.net, automatic=True)

    tracker = Tracker(case.model, case.loader, ["loss", matrix_metric(numbers=["trace"])], every=2)
    logger = pl.loggers.CSVLogger(tmp_path)
    silent = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(
        max_epochs=3, accelerator="cpu", logger=logger, callbacks=[lightning_callback(tracker)], **silent
    )
    trainer.fit(Module(case.model), torch.utils.data.DataLoader(case.loader, batch_size=None))
    logger.save()
    rows = list(csv.DictReader((tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()))
    mine = [row for row in rows if row.get("nngeom/probe_loss")]
    assert [int(row["step"]) for row in mine] == tracker.history["step"] == [2, 4, 6]
    for column in ("probe_loss", "fisher_trace"):
        assert [float(row[f"nngeom/{column}"]) for row in mine] == pytest.approx(tracker.history[column])


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_and_its_log(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(vocab_size=7, n_positions=6, n_embd=4, n_layer=1, n_head=1)
    config = transformers.GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model = transformers.GPT2LMHeadModel(config)
    data = [{"input_ids": x, "labels": x} for x in torch.randint(0, 7, (16, 6))]
    probe = [{"input_ids": x, "labels": x} for x in torch.randint(0, 7, (1, 4, 6))]
    opt = KFAC(model, automatic=True, reduction="token_mean")
    tracker = Tracker(model, probe, ["loss", optimizer_metric(opt)], every=2)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        num_train_epochs=1, per_device_train_batch_size=4, logging_steps=1,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data, optimizers=(opt, None))
    trainer.add_callback(huggingface_callback(tracker, trainer))
    trainer.train()
    logged = [row for row in trainer.state.log_history if "nngeom/probe_loss" in row]
    assert [row["step"] for row in logged] == tracker.history["step"] == [2, 4]
    assert [row["nngeom/probe_loss"] for row in logged] == tracker.history["probe_loss"]
    assert not any("nngeom" in column for column in tracker.history)


@pytest.mark.filterwarnings("ignore")
def test_accelerate_and_its_trackers(case, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    from accelerate.tracking import GeneralTracker

    class Book(GeneralTracker):
        name, requires_logging_directory = "book", False

        def __init__(self):
            super().__init__()
            self.rows = []

        @property
        def tracker(self):
            return self.rows

        def store_init_configuration(self, values):
            pass

        def log(self, values, step=None, **kwargs):
            self.rows.append((step, values))

    book = Book()
    accelerator = accelerate.Accelerator(cpu=True, log_with=book)
    accelerator.init_trackers("nngeom")
    case.model.train()
    opt = EKFAC(case.model, automatic=True)
    model, prepared = accelerator.prepare(case.model, opt)
    tracker = Tracker(case.model, case.loader, ["loss"], every=2)
    counter = accelerate_callback(tracker, accelerator, prepared)
    for x, y in case.loader * 2:
        accelerator.backward(F.cross_entropy(model(x), y))
        prepared.step()
        prepared.zero_grad()
    assert book.rows == [(s, {"nngeom/probe_loss": v}) for s, v in zip([2, 4], tracker.history["probe_loss"])]
    counter.remove()
    assert not opt._optimizer_step_post_hooks and not opt._optimizer_step_pre_hooks
    with pytest.raises(TypeError, match="Accelerator"):
        accelerate_callback(tracker, object(), opt)
    assert json.dumps(book.rows)
