"""Matrices in parts, measured some layers a sweep, in one process; over several: ``distributed/parted.py``."""

import pickle
import sys
from pathlib import Path

import pytest
import torch
from cases import build
from torch import nn

import nngeom as nng

sys.path.insert(0, str(Path(__file__).parent / "distributed"))

from parted import KINDS, MODELS, ROOM, as_the_whole, close, pair

from nngeom.measures.in_parts import grouped


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_parts_say_what_the_whole_says(kind, name):
    as_the_whole(kind, name)


def test_groups_are_neighbours_that_have_room():
    sizes = {"a": 3, "b": 3, "c": 9, "d": 1, "e": 2}
    assert grouped(sizes, 6) == [["a", "b"], ["c"], ["d", "e"]]
    assert grouped(sizes, 1) == [[layer] for layer in sizes] and grouped(sizes, 100) == [list(sizes)]


@pytest.mark.filterwarnings("ignore::nngeom.MemoryWarning")
def test_layers_that_have_room_are_measured_together():
    """Sweeps over the data, and sums no larger than half of the budget."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6))).double()
    batches = [torch.randn(4, 8, dtype=torch.float64)] * 3
    size = 8 * (9 * 9 + 8 * 8)  # bytes of the factors of a layer
    sweeps = []
    for room in (1, 2, 3, 6):
        read = []

        class Loader:
            def __iter__(self, read=read):
                read.append(1)
                return iter(batches)

        kind = nng.PMatSharded.of(nng.PMatKFAC)
        parted = nng.FIM(model, Loader(), kind, memory_budget=2 * room * size, process_group=None)
        sweeps.append(len(read) - 1)  # the first is a look at the rows
        assert [len(part.layer_collection.by_layer()) for part in parted.parts] == [room] * (6 // room)
    assert sweeps == [6, 3, 2, 1]


@pytest.mark.parametrize("measure", [nng.EmpiricalFIM, nng.GGN])
def test_every_measure(measure):
    whole, parted = pair(nng.PMatEKFAC, "mlp", measure=measure, loss="cross_entropy")
    close(parted.gather().to_dense(), whole.to_dense())


def test_labels_are_drawn_once():
    draw = lambda kind, **options: nng.FIM_MonteCarlo(
        *data, kind, generator=torch.Generator().manual_seed(1), **options
    )
    case = build("mlp")
    data = case.model, iter(case.loader)
    whole = draw(nng.PMatKFAC)
    data = case.model, iter(case.loader)  # read once, gone over several times
    close(draw(nng.PMatSharded.of(nng.PMatKFAC), memory_budget=ROOM).gather().to_dense(), whole.to_dense())


def test_products_are_differentiable():
    whole, parted = pair(nng.PMatKFAC, "mlp")
    x = torch.randn(whole.shape[0], dtype=torch.float64, requires_grad=True)
    (ours,) = torch.autograd.grad(parted.vTMv(nng.PVector(whole.layer_collection, x)), x)
    close(ours, 2 * whole.mv(nng.PVector(whole.layer_collection, x.detach())).flat())


def step(opt, case):
    x, y = case.loader[0]
    with opt.observe():
        nn.functional.cross_entropy(case.model(x), y).backward()


def test_what_is_refused():
    case = build("mlp")
    for kind in (nng.PMatDense, nng.PMatLowRank, nng.PMatDiag):
        with pytest.raises(nng.UnsupportedError, match=f"{kind.__name__} reaches over several"):
            nng.PMatSharded.of(kind)
    with pytest.raises(nng.ArgumentTypeError, match="representation is 3"):
        nng.PMatSharded.of(3)
    with pytest.raises(nng.ArgumentError, match="sharing"):
        nng.FIM(case.model, case.loader, nng.PMatSharded.of(nng.PMatKFAC), sharing="reduce")
    for call in (
        lambda kind: nng.Hessian(case.model, case.loader, kind, loss="cross_entropy"),
        lambda kind: nng.FIM(case.model, case.loader, kind, centered=True),
        lambda kind: nng.FIM(case.model, case.loader, kind, estimator="rademacher"),
        lambda kind: step(nng.optim.NaturalGradient(case.model, kind), case),
        lambda kind: nng.FIM(case.model, case.loader, nng.PMatMixed({"*": kind})),
    ):
        with pytest.raises(nng.UnsupportedError, match="PMat"):
            call(nng.PMatSharded.of(nng.PMatBlockDiag))
    with pytest.raises(nng.LoaderError):
        nng.FIM(case.model, [], nng.PMatSharded.of(nng.PMatKFAC))
    _, parted = pair(nng.PMatKFAC, "mlp")
    x = torch.ones((), dtype=torch.float64, requires_grad=True)
    v = nng.PVector(parted.layer_collection, torch.ones(parted.shape[0], dtype=torch.float64))
    for call in (lambda: x * parted, lambda: parted.solve(v, x), lambda: parted.logdet(x), lambda: parted.inverse(x)):
        with pytest.raises(nng.UnsupportedError, match=r"requires a gradient; detach\(\)"):
            call()
    with pytest.raises(nng.UnsupportedError, match="is not pickled"):
        pickle.dumps(parted)
    with pytest.raises(nng.FileError):
        nng.save(parted, __file__)
