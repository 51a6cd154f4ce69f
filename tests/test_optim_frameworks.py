"""Optimizers in the loops of Lightning, Hugging Face and accelerate: the same parameters as in a plain loop."""

import copy
import logging
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from cases import build
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import nngeom as nng
from nngeom.optim import EKFAC, KFAC, NaturalGradient

KINDS = {
    "kfac": lambda m, **k: KFAC(m, lr=0.05, inverse_every=2, statistics_every=2, **k),
    "ekfac": lambda m, **k: EKFAC(m, lr=0.05, basis_every=2, scalings="batch", **k),
    "ekfac-ra": lambda m, **k: EKFAC(m, lr=0.05, basis_every=2, statistics_every=3, **k),
    "diag": lambda m, **k: NaturalGradient(m, nng.PMatDiag, lr=0.01, **k),
    "monte-carlo": lambda m, **k: KFAC(m, lr=0.05, fisher="monte_carlo", likelihood="categorical", **k),
}


def same(model, other):
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))


def near(model, other):
    return all(torch.allclose(p, q, rtol=1e-9, atol=1e-12) for p, q in zip(model.parameters(), other.parameters()))


def plain_loop(case, model, opt, epochs=2, accumulate=1):
    model.train()
    for _ in range(epochs):
        for j, (x, y) in enumerate(case.loader):
            with opt.observe():
                (F.cross_entropy(model(x), y) / accumulate).backward()
            if (j + 1) % accumulate == 0:
                opt.step()
                opt.zero_grad()


# -- Lightning ---------------------------------------------------------------------------------------------------------


def lightning_module(net, make, *, by_hand=False):
    pl = pytest.importorskip("lightning.pytorch")

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.automatic_optimization = net, not by_hand

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, index):
            loss = F.cross_entropy(self(batch[0]), batch[1])
            if by_hand:
                opt = self.optimizers()
                opt.zero_grad()
                self.manual_backward(loss)
                opt.step()
            return loss

        def validation_step(self, batch, index):
            self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

        def configure_optimizers(self):
            return make(self.net)

    return Module()


def fit(module, case, **options):
    pl = pytest.importorskip("lightning.pytorch")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    loader = torch.utils.data.DataLoader(case.loader, batch_size=None)
    pl.Trainer(**{"max_epochs": 2, "accelerator": "cpu", **silent, **options}).fit(module, loader, loader)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["closure", "automatic", "accumulating", "by hand"])
@pytest.mark.parametrize("kind", KINDS)
def test_lightning(kind, mode):
    case = build("conv2d", sizes=(5, 6, 5, 4))
    plain, net = copy.deepcopy(case.model), copy.deepcopy(case.model)
    accumulate = 2 if mode == "accumulating" else 1
    plain_loop(case, plain, KINDS[kind](plain), accumulate=accumulate)
    net.train()
    make = lambda m: KINDS[kind](m, automatic=mode != "closure")
    options = {"accumulate_grad_batches": accumulate} if accumulate > 1 else {}
    fit(lightning_module(net, make, by_hand=mode == "by hand"), case, **options)
    assert near(plain, net) and not near(net, case.model)


@pytest.mark.filterwarnings("ignore")
def test_lightning_resumes_from_a_checkpoint(tmp_path):
    pl = pytest.importorskip("lightning.pytorch")
    case = build("mlp", sizes=(5, 6, 5, 4))
    nets = [copy.deepcopy(case.model) for _ in range(3)]
    make = lambda m: KINDS["ekfac"](m, automatic=True)
    for net in nets:
        net.train()
    fit(lightning_module(nets[0], make), case, max_epochs=4)
    saved = {
        "enable_checkpointing": True,
        "callbacks": [pl.callbacks.ModelCheckpoint(dirpath=tmp_path, save_last=True)],
        "default_root_dir": str(tmp_path),
    }
    fit(lightning_module(nets[1], make), case, max_epochs=2, **saved)
    module = lightning_module(nets[2], make)
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    loader = torch.utils.data.DataLoader(case.loader, batch_size=None)
    trainer = pl.Trainer(max_epochs=4, accelerator="cpu", **silent)
    trainer.fit(module, loader, loader, ckpt_path=str(tmp_path / "last.ckpt"))
    assert same(nets[0], nets[2])


# -- Hugging Face ------------------------------------------------------------------------------------------------------


def language_model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(vocab_size=13, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    config = transformers.GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model = transformers.GPT2LMHeadModel(config)
    ids = torch.randint(0, 13, (24, 8))
    labels = ids.masked_fill(torch.rand(24, 8) < 0.2, -100)
    return model, [{"input_ids": x, "labels": y} for x, y in zip(ids.split(4), labels.split(4))]


def trainer_of(model, batches, opt, folder, **options):
    transformers = pytest.importorskip("transformers")

    class InOrder(transformers.Trainer):
        """Whose batches come as they are."""

        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(batches, batch_size=None)

    settings = dict(report_to=[], save_strategy="no", lr_scheduler_type="constant", max_grad_norm=0.0, use_cpu=True)
    settings |= dict(disable_tqdm=True, num_train_epochs=2, logging_steps=1, output_dir=str(folder))
    arguments = transformers.TrainingArguments(**{**settings, **options})
    data = torch.utils.data.TensorDataset(torch.zeros(len(batches)))
    return InOrder(model=model, args=arguments, train_dataset=data, optimizers=(opt, None))


MAKE = {
    "ekfac": lambda m, **k: EKFAC(m, lr=0.02, basis_every=2, reduction="token_mean", **k),
    "kfac": lambda m, **k: KFAC(m, lr=0.02, inverse_every=2, statistics_every=1, reduction="token_mean", **k),
    "fallback": lambda m, **k: KFAC(
        m, lr=0.02, inverse_every=2, reduction="token_mean", fallback={"lr": 1e-2},
        layer_collection=nng.LayerCollection.from_model(m, exclude=["transformer.w?e.*", "*ln*"]), **k
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", MAKE)
def test_the_trainer_of_transformers(kind, accumulate, tmp_path):
    plain, batches = language_model()
    model = copy.deepcopy(plain)
    before = copy.deepcopy(plain)
    opt = MAKE[kind](plain)
    plain.train()
    auto = MAKE[kind](model, automatic=True)
    trainer = trainer_of(model, batches, auto, tmp_path, gradient_accumulation_steps=accumulate)
    for _ in range(2):
        stream = iter(batches)
        for _ in range(len(batches) // accumulate):
            some, count = trainer.get_batch_samples(stream, accumulate, torch.device("cpu"))
            for batch in some:
                with opt.observe():
                    plain(**batch, num_items_in_batch=count).loss.backward()
            opt.step()
            opt.zero_grad()
    trainer.train()
    assert auto.clock.steps == opt.clock.steps == 12 // accumulate and auto.skipped == 0
    assert all(torch.allclose(p, q, rtol=1e-5, atol=1e-7) for p, q in zip(plain.parameters(), model.parameters()))
    assert not near(plain, before)


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_with_gradient_checkpointing_clipping_and_a_schedule(tmp_path):
    model, batches = language_model()
    other = copy.deepcopy(model)
    recomputed = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    for net, options in ((model, recomputed), (other, {})):
        opt = MAKE["kfac"](net, automatic=True)
        options |= {"max_grad_norm": 0.5, "lr_scheduler_type": "linear"}
        trainer_of(net, batches, opt, tmp_path, **options).train()
        assert opt.clock.steps == 12 and opt.param_groups[0]["lr"] < 0.02 / 10
    assert all(torch.allclose(p, q, rtol=1e-3, atol=1e-6) for p, q in zip(other.parameters(), model.parameters()))


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_resumes_from_a_checkpoint(tmp_path):
    models = [language_model()[0] for _ in range(3)]
    batches = language_model()[1]

    def train(model, folder, resume=None, **options):
        opt = MAKE["fallback"](model, automatic=True)
        options |= {"save_strategy": "steps", "save_steps": 6, "lr_scheduler_type": "linear"}
        trainer_of(model, batches, opt, tmp_path / folder, **options).train(resume_from_checkpoint=resume)
        assert opt.clock.steps == 12

    train(models[0], "whole")
    train(models[2], "rest", resume=str(tmp_path / "whole" / "checkpoint-6"))
    assert same(models[0], models[2]) and not same(models[0], models[1])


# -- accelerate --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_accelerate(kind, accumulate):
    accelerate = pytest.importorskip("accelerate")
    case = build("conv2d", sizes=(5, 6, 5, 4))
    plain, net = copy.deepcopy(case.model), copy.deepcopy(case.model)
    plain_loop(case, plain, KINDS[kind](plain), accumulate=accumulate)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    opt = KINDS[kind](net, automatic=True)
    model, prepared, loader = accelerator.prepare(net, opt, torch.utils.data.DataLoader(case.loader, batch_size=None))
    model.train()
    for _ in range(2):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(x), y))
                prepared.step()
                prepared.zero_grad()
    assert near(plain, net) and not near(net, case.model)


@pytest.fixture
def afresh():
    """No accelerator of another test, whose settings are those of the process."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.filterwarnings("ignore")
def test_accelerate_in_half_precision(afresh):
    accelerate = afresh
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    net, batches = copy.deepcopy(plain), [(torch.randn(16, 6), torch.arange(16) % 3) for _ in range(4)]
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    opt, auto = KINDS["kfac"](plain), KINDS["kfac"](net, automatic=True)
    model, prepared = accelerator.prepare(net, auto)
    for x, y in batches:
        with opt.observe(), torch.autocast("cpu", torch.bfloat16):
            F.cross_entropy(plain(x).float(), y).backward()
        opt.step()
        opt.zero_grad()
        accelerator.backward(F.cross_entropy(model(x), y))
        prepared.step()
        prepared.zero_grad()
    assert all(torch.allclose(p, q, rtol=1e-3, atol=1e-5) for p, q in zip(plain.parameters(), net.parameters()))


# -- one process of several --------------------------------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    options = dict(init_method=f"file://{tmp_path}/store", rank=0, world_size=1, timeout=timedelta(seconds=30))
    dist.init_process_group("gloo", **options)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", KINDS)
def test_a_replicated_model_of_one_process(kind, alone):
    case = build("conv2d", sizes=(5, 6, 5))
    plain, net = copy.deepcopy(case.model), copy.deepcopy(case.model).train()
    plain_loop(case, plain, KINDS[kind](plain))
    opt = KINDS[kind](net, automatic=True)
    model = DistributedDataParallel(net)
    for _ in range(2):
        for x, y in case.loader:
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
    assert near(plain, net)


class Wide(nn.Module):
    """A model whose outputs stand in a tuple."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x).sum(), self.layer(x)


def test_outputs_that_are_picked():
    torch.manual_seed(0)
    plain = Wide().double()
    model = copy.deepcopy(plain)
    pick = lambda returned: returned[1]
    opt, auto = KFAC(plain, outputs=pick), KFAC(model, outputs=pick, automatic=True)
    x, y = torch.randn(5, 3).double(), torch.tensor([0, 1, 1, 0, 1])
    with opt.observe():
        F.cross_entropy(plain(x)[1], y).backward()
    opt.step()
    F.cross_entropy(model(x)[1], y).backward()
    auto.step()
    assert same(plain, model)
