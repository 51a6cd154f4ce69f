"""Influence beside kronfluence's, under the EKFAC matrix of the same gradients: the same, no constant between."""

import pytest
import torch
from torch import nn

pytest.importorskip("kronfluence")

from benchmarks.against_kronfluence import Both

f64 = torch.float64
MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)), (6,)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)), (1, 6, 6)),
    "tokens": (
        lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 6), nn.Flatten(), nn.Linear(24, 4)),
        (4, 3),
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_kronfluence(name):
    torch.manual_seed(0)
    make, shape = MODELS[name]
    train, queries = ((torch.randn(n, *shape, dtype=f64), torch.randint(0, 4, (n,))) for n in (40, 5))
    assert Both(make().double(), train, queries, batch=16).error() < 1e-9
