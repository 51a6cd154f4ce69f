"""On a GPU the numbers of the CPU: run by ``make gpu``, or with ``NNGEOM_DEVICE=cpu`` to try it; skipped elsewhere."""

import copy
import os

import pytest
import torch
from cases import CASES, FUNCTION_SPACE, PARAMETER_SPACE, build, representation

import nngeom as nng

DEVICE = os.environ.get("NNGEOM_DEVICE") or ("cuda" if torch.cuda.is_available() else None)
pytestmark = pytest.mark.skipif(DEVICE is None, reason="no GPU; NNGEOM_DEVICE=cpu tries these tests")


def both(name):
    """A case on the CPU, and the same on the device."""
    case = build(name)
    return case, (copy.deepcopy(case.model).to(DEVICE), [(x.to(DEVICE), y.to(DEVICE)) for x, y in case.loader])


def close(found, wanted):
    assert found.device.type == torch.device(DEVICE).type
    size = float(wanted.abs().max())
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-6, atol=1e-9 * size)


@pytest.mark.parametrize("name", CASES)
def test_diagonals_and_kernels(name):
    case, (model, loader) = both(name)
    close(
        nng.FIM(model, loader, nng.PMatDiag).diag().flat(), nng.FIM(case.model, case.loader, nng.PMatDiag).diag().flat()
    )
    close(nng.GramMatrix(model, loader).tensor, nng.GramMatrix(case.model, case.loader).tensor)


@pytest.mark.parametrize("kind", PARAMETER_SPACE)
@pytest.mark.parametrize("name", ["mlp", "conv2d", "transformer", "language-model", "gru"])
def test_every_representation(name, kind):
    case, (model, loader) = both(name)
    mine, wanted = (
        nng.FIM(m, data, representation(kind, m)) for m, data in ((model, loader), (case.model, case.loader))
    )
    close(mine.trace(), wanted.trace())
    v = nng.PVector.randn(wanted.layer_collection, dtype=wanted.dtype)
    close(mine.mv(v.to(DEVICE)).flat(), wanted.mv(v).flat())


@pytest.mark.parametrize("kind", FUNCTION_SPACE)
def test_every_kernel(kind):
    case, (model, loader) = both("conv2d")
    mine, wanted = (
        nng.GramMatrix(m, data, FUNCTION_SPACE[kind]) for m, data in ((model, loader), (case.model, case.loader))
    )
    close(mine.trace(), wanted.trace())


@pytest.mark.parametrize("kind", [nng.PMatDiag, nng.PMatKFAC, nng.PMatEKFAC, nng.PMatDense])
def test_solves(kind):
    case, (model, loader) = both("mlp")
    v = nng.PVector.from_model(case.model)
    wanted = nng.FIM(case.model, case.loader, kind).solve(v, 0.1).flat()
    close(nng.FIM(model, loader, kind).solve(v.to(DEVICE), 0.1).flat(), wanted)


def test_draws_are_those_of_the_cpu():
    case, (model, loader) = both("mlp")
    drawn = [
        nng.FIM_MonteCarlo(m, data, nng.PMatDiag, generator=torch.Generator().manual_seed(3)).diag().flat()
        for m, data in ((model, loader), (case.model, case.loader))
    ]
    close(*drawn)


def test_an_optimizer_steps_alike():
    case, (model, loader) = both("mlp")
    steps = []
    for m, data in ((model, loader), (case.model, case.loader)):
        optimizer = nng.optim.NaturalGradient(m, nng.PMatKFAC, lr=0.1, damping=0.1)
        x, y = data[0]
        for _ in range(2):
            optimizer.zero_grad()
            with optimizer.observe():
                torch.nn.functional.cross_entropy(m(x), y).backward()
            optimizer.step()
        steps.append(torch.cat([p.detach().flatten() for p in m.parameters()]))
    close(*steps)
