"""Loaders of every kind, read to the end and left as they were."""

import pytest
import reference
import torch
from cases import PARAMETER_SPACE, build, representation
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import nngeom as nng


def test_the_count_is_of_examples_seen():
    case = build("mlp")
    data = TensorDataset(case.inputs, case.targets)
    loader = DataLoader(data, batch_size=3, drop_last=True)
    m = nng.FIM(case.model, loader, nng.PMatDense)
    assert m.examples == 6
    torch.testing.assert_close(m.to_dense(), reference.fisher(case.model, case.inputs[:6]))
    sampler = DataLoader(data, batch_sampler=[[0, 1], [4]])
    torch.testing.assert_close(
        nng.FIM(case.model, sampler, nng.PMatDense).to_dense(), reference.fisher(case.model, case.inputs[[0, 1, 4]])
    )


@pytest.mark.parametrize("kind", ["list", "generator", "iterable", "dict", "tensors", "pair", "shuffled"])
@pytest.mark.parametrize("representation", [nng.PMatDense, nng.PMatEKFAC])
def test_loaders_of_every_kind(kind, representation):
    case = build("mlp")

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(zip(case.inputs, case.targets))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = case.model

        def forward(self, pixels):
            return self.net(pixels)

    loaders = {
        "list": case.loader,
        "generator": (b for b in case.loader),
        "iterable": DataLoader(Stream(), batch_size=4),
        "dict": [{"pixels": x, "labels": y} for x, y in case.loader],
        "tensors": [x for x, _ in case.loader],
        "pair": (case.inputs, case.targets),
        "shuffled": DataLoader(TensorDataset(case.inputs, case.targets), batch_size=3, shuffle=True),
    }
    model = Net() if kind == "dict" else case.model
    want = nng.FIM(case.model, [case.inputs], representation).to_dense()
    torch.testing.assert_close(nng.FIM(model, loaders[kind], representation).to_dense(), want)


class Refilled:
    """Batches that are all written into the same memory, as loaders with buffers of their own have them."""

    def __init__(self, case, kind):
        self.case, self.kind = case, kind

    def __iter__(self):
        x, y = (t[:3].clone() for t in (self.case.inputs, self.case.targets))
        for lo in (0, 3):
            x.copy_(self.case.inputs[lo : lo + 3])
            y.copy_(self.case.targets[lo : lo + 3])
            yield {"tensors": (x, y), "arrays": (x.numpy(), y.numpy()), "list": [x, y]}[self.kind]


OF_LOADERS = {
    "Dense": lambda m, loader: nng.FIM(m, loader, nng.PMatDense).to_dense(),
    "EKFAC": lambda m, loader: nng.FIM(m, loader, nng.PMatEKFAC).to_dense(),
    "nearest": lambda m, loader: nng.FIM(m, loader, nng.PMatKFAC, fit="nearest").to_dense(),
    "Monte-Carlo": lambda m, loader: nng.FIM_MonteCarlo(m, loader, nng.PMatEKFAC).to_dense(),
    "Implicit": lambda m, loader: nng.FIM(m, loader, nng.PMatImplicit).to_dense(),
    "Hessian": lambda m, loader: nng.Hessian(m, loader, loss="cross_entropy").to_dense(),
    "covariance": lambda m, loader: nng.GradientCovariance(m, loader, nng.PMatDense, loss="cross_entropy").to_dense(),
    "centred": lambda m, loader: nng.FIM(m, loader, nng.PMatDense, centered=True).to_dense(),
    "Jacobian": lambda m, loader: nng.Jacobian(m, loader).tensor,
    "kernel": lambda m, loader: nng.GramMatrix(m, loader).tensor,
    "trace of a kernel": lambda m, loader: nng.GramMatrix(m, loader, nng.FMatDiag).tensor,
    "implicit kernel": lambda m, loader: nng.GramMatrix(m, loader, nng.FMatImplicit).to_dense(),
    "influence": lambda m, loader: (
        nng.influence(m, loader, loader, nng.FIM(m, loader), loss="cross_entropy", damping=0.1).scores
    ),
    "stiffness": lambda m, loader: nng.analysis.stiffness(m, loader).matrix,
    "alignment": lambda m, loader: torch.as_tensor(nng.analysis.label_alignment(m, loader)),
}


@pytest.mark.parametrize("kind", ["tensors", "arrays", "list"])
@pytest.mark.parametrize("measure", OF_LOADERS)
def test_a_loader_that_writes_its_batches_into_the_same_memory(measure, kind):
    """Whether it is read again or its batches are kept; so with a generator, where one can be given."""
    case = build("mlp")
    torch.manual_seed(0)
    want = OF_LOADERS[measure](case.model, [(case.inputs[:3], case.targets[:3]), (case.inputs[3:6], case.targets[3:6])])
    for given in (Refilled(case, kind), iter(Refilled(case, kind)))[: 1 if measure == "influence" else 2]:
        torch.manual_seed(0)
        torch.testing.assert_close(OF_LOADERS[measure](case.model, given), want)


def test_kernels_of_shuffled_loaders_are_symmetric():
    case = build("mlp")
    loader = DataLoader(TensorDataset(case.inputs, case.targets), batch_size=3, shuffle=True)
    k = nng.GramMatrix(case.model, loader).to_dense()
    torch.testing.assert_close(k, k.T)
    assert torch.linalg.eigvalsh(k).min() > -1e-10 * k.norm()
    want = nng.GramMatrix(case.model, [case.inputs]).to_dense()
    torch.testing.assert_close(torch.linalg.eigvalsh(k), torch.linalg.eigvalsh(want))


@pytest.mark.parametrize("kind", PARAMETER_SPACE)
def test_empty_loaders_raise(kind):
    model = build("mlp").model
    with pytest.raises(nng.LoaderError, match="empty"):
        nng.FIM(model, [], representation(kind, model))


def test_an_exception_leaves_nothing_behind():
    case = build("mlp")
    calls = []

    def fails_once(x, y):
        calls.append(1)
        if len(calls) == 4:  # the second batch
            raise ValueError("the user's own")
        return case.model(x)

    with pytest.raises(ValueError, match="own"):
        nng.FIM(case.model, case.loader, nng.PMatDense, function=fails_once)
    torch.testing.assert_close(
        nng.FIM(case.model, case.loader, nng.PMatDense).to_dense(), reference.fisher(case.model, case.inputs)
    )


def test_progress_is_shown_when_asked(capsys):
    case = build("mlp")
    nng.FIM(case.model, case.loader, nng.PMatDiag)
    assert capsys.readouterr().err == ""
    nng.FIM(case.model, case.loader, nng.PMatDiag, progress=True)
    assert "2/2" in capsys.readouterr().err


def test_inputs_are_left_alone():
    case = build("mlp")
    x = case.inputs
    nng.FIM(case.model, [x], nng.PMatKFAC)
    assert not x.requires_grad and x.grad is None
