"""Optimizers refuse models that are replicated over several processes, and what is no model."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import nngeom as nng
from nngeom.optim import EKFAC, KFAC, NaturalGradient, WinsorizedSGD, median_of_means_gradient, winsorized_gradient

HERE = Path(__file__).parent
MAKERS = [KFAC, EKFAC, NaturalGradient, WinsorizedSGD]


def test_two_processes_are_refused(tmp_path):
    command = [sys.executable, str(HERE / "replicas.py")]
    paths = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    options = dict(env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True)
    processes = [subprocess.Popen([*command, str(rank), str(tmp_path / "store")], **options) for rank in range(2)]
    try:
        for process in processes:
            said, _ = process.communicate(timeout=120)
            assert process.returncode == 0, said
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    options = dict(init_method=f"file://{tmp_path}/store", rank=0, world_size=1, timeout=timedelta(seconds=30))
    dist.init_process_group("gloo", **options)
    yield
    dist.destroy_process_group()


def test_a_single_process_is_served(alone):
    torch.manual_seed(0)
    x, y = torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 1, 0])
    steps = []
    for wrap in (lambda m: m, DistributedDataParallel):
        torch.manual_seed(1)
        inner = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        model = wrap(inner)
        for make in MAKERS:
            opt = make(model)
            with opt.observe():
                F.cross_entropy(model(x), y).backward()
            opt.step()
            opt.zero_grad()
        winsorized_gradient(model, (x, y), "cross_entropy", 10.0)
        steps.append(nng.PVector.from_model(inner).flat())
    torch.testing.assert_close(*steps)


def test_more_than_one_process_by_the_size_of_the_group(alone, monkeypatch):
    model = nn.Linear(3, 2)
    opt, early = DistributedDataParallel(model), KFAC(model)
    monkeypatch.setattr(type(opt.process_group), "size", lambda group: 3)
    for make in MAKERS:
        with pytest.raises(nng.UnsupportedError, match="3 processes"):
            make(opt)
    with pytest.raises(nng.UnsupportedError, match="3 processes"), early.observe():
        opt(torch.randn(4, 3))
    assert not model._forward_pre_hooks and not model._forward_hooks


@pytest.mark.parametrize("make", MAKERS)
def test_parameters_are_no_model(make):
    model = nn.Linear(3, 2)
    for given in (
        model.parameters(),
        list(model.parameters()),
        [{"params": model.parameters(), "lr": 0.1}],
        model.weight,
        None,
    ):
        with pytest.raises(nng.ArgumentTypeError, match=r"expected the torch.nn.Module itself.*KFAC\(model\)"):
            make(given)
    for gradient, number in ((winsorized_gradient, 10.0), (median_of_means_gradient, 2)):
        with pytest.raises(nng.ArgumentTypeError, match=r"torch\.nn\.Module itself"):
            gradient(model.parameters(), torch.zeros(4, 3), "mse", number)
