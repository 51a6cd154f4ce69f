"""A quantity from outside, read off rows, against loops over single examples."""

import pytest
import reference
import torch
from cases import CASES, build
from mix import Mix
from signal_to_noise import signal_to_noise
from torch import nn
from trained import close, cross_entropy

import nngeom as nng

MODELS = ("mlp", "conv2d", "transformer", "decoder", "gru", "reused", "bare")


def expected(model, x, y):
    g = reference.loss_gradients(model, x, y, cross_entropy)
    return g.mean(0).square(), g.var(0, unbiased=False)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("budget", [None, 30_000])
def test_against_loops(name, budget):
    case = build(name)
    signal, noise = expected(case.model, case.inputs, case.targets)
    found = signal_to_noise(case.model, case.loader, "cross_entropy", memory_budget=budget)
    there = noise > 1e-12 * noise.max()
    close(found.ratio.flat()[there], (signal / noise)[there], 1e-7)
    collection = found.ratio.layer_collection
    at = collection.offsets()
    for layer, names in collection.by_layer().items():
        parts = [slice(at[n][0], at[n][0] + torch.Size(at[n][1]).numel()) for n in names]
        total = [float(sum(v[part].sum() for part in parts)) for v in (signal, noise)]
        assert found.by_layer[layer] == pytest.approx(total[0] / total[1], rel=1e-9)


def test_of_some_parameters_by_a_function_and_for_any_loss():
    case = build("mlp")
    some = nng.LayerCollection.from_model(case.model, include="0")
    whole = signal_to_noise(case.model, case.loader, cross_entropy)
    part = signal_to_noise(case.model, case.loader, "cross_entropy", layer_collection=some)
    close(part.ratio["0.weight"], whole.ratio["0.weight"])
    twice = signal_to_noise(case.model, case.loader, "cross_entropy", function=lambda x, y: case.model(x))
    close(twice.ratio, whole.ratio)


def test_with_a_layer_from_outside():
    torch.manual_seed(0)
    model = nn.Sequential(Mix(4, nn.Linear(4, 4)), nn.Linear(4, 3)).double()
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.randint(3, (9,))
    signal, noise = expected(model, x, y)
    close(signal_to_noise(model, [(x, y)], "cross_entropy").ratio, signal / noise)


def test_errors_are_those_of_the_measures():
    case = build("mlp")
    with pytest.raises(nng.ArgumentError, match="cross_entropy"):
        signal_to_noise(case.model, case.loader, "hinge")
    with pytest.raises(nng.LoaderError):
        signal_to_noise(case.model, [], "cross_entropy")
    assert set(MODELS) <= set(CASES)
