"""Optimizers in other people's loops: what a wrapper's methods change reaches them, and a tracker sees their steps."""

import copy
import logging

import pytest
import torch
from cases import build
from torch.nn import functional as F

import nngeom as nng
from nngeom.optim import EKFAC, KFAC, NaturalGradient, WinsorizedSGD
from nngeom.track import Tracker, lightning_callback

pl = pytest.importorskip("lightning.pytorch")
MAKERS = {
    "kfac": lambda m: KFAC(m, lr=0.05),
    "ekfac": lambda m: EKFAC(m, lr=0.05, basis_every=2),
    "sum": lambda m: NaturalGradient(m, nng.PMatDiag, lr=0.05, reduction="sum"),
    "winsorized": lambda m: WinsorizedSGD(m, lr=0.05),
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.05),
}


def passes(opt, model, x, y, backward=torch.Tensor.backward):
    """One step of a loop written by hand."""
    opt.zero_grad()
    if hasattr(opt, "observe"):
        with opt.observe():
            backward(F.cross_entropy(model(x), y))
    else:
        backward(F.cross_entropy(model(x), y))
    opt.step()


class Loop(pl.LightningModule):
    """A loop by hand under Lightning; ``how`` says through which object the optimizer is stepped."""

    def __init__(self, net, make, how):
        super().__init__()
        self.net, self.make, self.how, self.automatic_optimization = net, make, how, False

    def training_step(self, batch, index):
        opt = self.optimizers(use_pl_optimizer=self.how != "itself")
        passes(opt.optimizer if self.how == "inner" else opt, self.net, *batch, self.manual_backward)

    def configure_optimizers(self):
        return self.make(self.net)


def fit(module, case, tracker, **options):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(max_epochs=2, accelerator="cpu", callbacks=[lightning_callback(tracker)], **silent, **options)
    trainer.fit(module, torch.utils.data.DataLoader(case.loader, batch_size=None))
    return trainer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["wrapper", "inner", "itself"])
@pytest.mark.parametrize("kind", MAKERS)
def test_lightning_by_hand_is_the_plain_loop_and_every_step_is_tracked(kind, how):
    case = build("mlp", sizes=(5, 6, 5))
    plain, model = copy.deepcopy(case.model), copy.deepcopy(case.model)
    opt = MAKERS[kind](plain)
    for _ in range(2):
        for x, y in case.loader:
            passes(opt, plain, x, y)
    tracker = Tracker(model, case.loader, ["loss"], every=1)
    module = Loop(model, MAKERS[kind], how)
    fit(module, case, tracker)
    assert tracker.history["step"] == [1, 2, 3, 4, 5, 6]
    assert all(torch.allclose(p, q, rtol=1e-12) for p, q in zip(plain.parameters(), model.parameters()))
    inner = module.optimizers(use_pl_optimizer=False)
    assert not inner._optimizer_step_post_hooks and not inner._optimizer_step_pre_hooks


@pytest.mark.filterwarnings("ignore")
def test_lightning_steps_its_own_optimizers():
    class Automatic(pl.LightningModule):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def training_step(self, batch, index):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.1)

    case = build("mlp", sizes=(5, 6, 5, 4))
    tracker = Tracker(case.model, case.loader, ["loss"], every=1)
    trainer = fit(Automatic(case.model), case, tracker, accumulate_grad_batches=2)
    assert tracker.history["step"] == [1, 2, 3, 4] and trainer.global_step == 4


class Wrapper:
    """Imitates the class of what it holds: methods run on the wrapper, attributes come from inside."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.__class__ = type("Wrapped", (Wrapper, type(optimizer)), {})

    def __getattr__(self, name):
        return getattr(object.__getattribute__(self, "optimizer"), name)

    def step(self):
        return self.optimizer.step()


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "sum", "winsorized"])
def test_nothing_is_assigned_to_a_wrapper(kind):
    case = build("mlp", sizes=(5, 6))
    plain = copy.deepcopy(case.model)
    opt, wrapped = MAKERS[kind](plain), Wrapper(MAKERS[kind](case.model))
    names = set(vars(wrapped))
    for x, y in case.loader:
        passes(opt, plain, x, y)
        passes(wrapped, case.model, x, y)
    assert set(vars(wrapped)) == names
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), case.model.parameters()))


def test_skipped_steps_are_counted_through_a_wrapper():
    case = build("mlp", sizes=(5,))
    inner = KFAC(case.model)
    wrapped = Wrapper(inner)
    with pytest.warns(nng.optim.SkippedStepWarning, match="0.weight"):
        passes(wrapped, case.model, case.inputs * float("nan"), case.targets)
    assert inner.skipped == wrapped.skipped == 1 and isinstance(wrapped, KFAC)
