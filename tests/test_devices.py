"""What a device other than the CPU asks for, seen on the CPU: tensors made where the model is, and few waits for
results.
"""

import traceback

import pytest
import torch
from cases import STORED, STORED_KERNELS, build, representation
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode

import nngeom as nng

f64 = torch.float64


class Homeless(TorchFunctionMode):
    """Notes where the library makes a tensor without saying on which device, unless from a generator."""

    def __init__(self):
        super().__init__()
        self.found, self.seen = set(), 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _device_constructors():
            self.seen += 1
            if kwargs.get("device") is None and kwargs.get("generator") is None:
                frame = next(f for f in reversed(traceback.extract_stack()[:-1]) if "site-packages" not in f.filename)
                if "/nngeom/" in frame.filename and "/tests/" not in frame.filename:
                    self.found.add(f"{frame.filename}:{frame.lineno} {frame.line}")
        return func(*args, **kwargs)


OPERATIONS = {
    "fisher": lambda c: [
        nng.FIM(c.model, c.loader, k).solve(nng.PVector.from_model(c.model), 0.1)
        for k in (nng.PMatDiag, nng.PMatKFAC, nng.PMatEKFAC)
    ],
    "stored": lambda c: [nng.FIM(c.model, c.loader, representation(k, c.model)).trace() for k in STORED],
    "drawn": lambda c: nng.FIM_MonteCarlo(c.model, c.loader, nng.PMatKFAC),
    "loss": lambda c: nng.GGN(c.model, c.loader, nng.PMatDiag, loss="cross_entropy"),
    "products": lambda c: nng.FIM(c.model, c.loader, nng.PMatImplicit).mv(nng.PVector.from_model(c.model)),
    "kernels": lambda c: [nng.GramMatrix(c.model, c.loader, k, centered=True) for k in STORED_KERNELS.values()],
    "penalties": lambda c: [nng.mgs.trace_penalty(c.model, c.inputs, kind) for kind in ("exact", "rademacher")],
    "statistics": lambda c: (nng.analysis.stiffness(c.model, c.loader), nng.analysis.coherence(c.model, c.loader)),
    "hessian": lambda c: nng.Hessian(c.model, c.loader, nng.PMatDense, loss="cross_entropy"),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", ["conv2d", "transformer", "language-model", "gru"])
def test_every_tensor_is_told_its_device(name, operation):
    case = build(name)
    with Homeless() as mode:
        OPERATIONS[operation](case)
    assert mode.seen
    assert not mode.found


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten._unique2,
            torch.ops.aten.equal,
        )
        return func(*args, **(kwargs or {}))


COMPUTED = {
    "kfac": lambda m, x, **o: nng.FIM(m, x, nng.PMatKFAC, **o),
    "monte carlo": lambda m, x, **o: nng.FIM_MonteCarlo(m, x, nng.PMatDiag, **o),
    "kernel": lambda m, x, **o: nng.GramMatrix(m, x, **o),
    "squared norms": lambda m, x, **o: nng.GramMatrix(m, x, nng.FMatDiag, **o),
}


@pytest.mark.parametrize("result", COMPUTED)
def test_the_host_waits_once_or_twice_a_batch(result):
    """Whatever the number of layers, and of cotangents that are taken together."""

    def waits(depth, batches, **options):
        layers = [layer for _ in range(depth) for layer in (nn.Conv1d(4, 4, 3, padding=1, dtype=f64), nn.Tanh())]
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(24, 5, dtype=f64))
        x = [(part,) for part in torch.randn(4 * batches, 4, 6, dtype=f64).split(4)]
        COMPUTED[result](model, x, **options)  # proved
        with Waits() as seen:
            COMPUTED[result](model, x, **options)
        return seen.count

    few, deep, long = waits(2, 3), waits(4, 3), waits(2, 6)
    kept = 2 if result == "kfac" else 1  # factors looked at when all is done
    assert deep - few <= 2 * kept  # two more layers
    assert long - few <= 2 * 3


def test_wide_outputs_wait_no_more_often():
    """Pulled back from the inputs of the head, with one column more or less for each."""

    def waits(outputs, width):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, outputs)).double()
        x = [(part, None) for part in torch.randn(12, 5, dtype=f64).split(4)]
        nng.FIM(model, x, nng.PMatKFAC)
        with Waits() as seen:
            nng.FIM(model, x, nng.PMatKFAC)
        return seen.count

    assert waits(80, 16) == waits(40, 16) == waits(40, 8) <= waits(5, 16) + 3 * 3
