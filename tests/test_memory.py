"""Memory of builds, watched from outside: each runs in a process of its own, whose high-water mark is read."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from cases import STORED, representation
from torch import nn

import nngeom as nng

LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="high-water marks are read from /proc")
MIB = 2**20

PRELUDE = f"""
import sys; sys.path.append({str(Path(__file__).parent)!r})
import json, resource, torch, nngeom as nng
from cases import representation
from torch import nn
torch.set_num_threads(1)
torch.manual_seed(0)

def peak(run):
    "MiB above the start that a call takes at its peak, its result included."
    status = lambda key: next(int(x.split()[1]) / 1024 for x in open("/proc/self/status") if x.startswith(key + ":"))
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    kept = run()
    return status("VmHWM") - before

def batches(n, size, *shape):
    "Batches made as they are asked for, so that the data take no memory."
    class Batches:
        def __iter__(self):
            g = torch.Generator().manual_seed(0)
            y = torch.zeros(size, dtype=torch.long)
            return ((torch.randn(size, *shape, generator=g), y) for _ in range(n // size))
    return Batches()
"""


def measured(code):
    """What a fresh process prints as JSON; blocks of 64 KiB are given back when they are freed, so that the mark shows
    what is in use.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@LINUX
@pytest.mark.slow
def test_a_jacobian_of_forty_gigabytes_in_two():
    """690 010 parameters, 10 outputs, 1536 examples: rows of 42 GB; the process stays under 2 GB, everything in it
    counted.
    """
    result = measured(
        """
        sizes = [784] + [300] * 6
        hidden = [m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), nn.ReLU())]
        model = nn.Sequential(*hidden, nn.Linear(300, 10))
        d, n = sum(p.numel() for p in model.parameters()), 1536
        data = batches(n, 128, 784)
        for kind in "diag", "quasi-diag", "kfac", "ekfac":
            m = nng.FIM(model, data, representation(kind, model))
            assert m.examples == n
        nng.FIM(model, data, nng.PMatImplicit).mv(nng.PVector.from_model(model))
        print(json.dumps([4 * 10 * n * d, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
        """
    )
    explicit, process = result
    assert explicit > 40e9
    assert process < 2e9


@LINUX
def test_peaks_are_flat_in_the_number_of_examples():
    """Eight times the data, the same peak; the second sweep of EKFAC reads the data again once rows no longer fit the
    budget.
    """
    few, many = measured(
        """
        features = nn.Conv2d(1, 8, 5), nn.ReLU(), nn.MaxPool2d(2)
        model = nn.Sequential(*features, nn.Flatten(), nn.Linear(1152, 64), nn.ReLU(), nn.Linear(64, 10))
        def peaks(n):
            data = batches(n, 32, 1, 28, 28)
            kinds = nng.PMatDiag, nng.PMatKFAC, nng.PMatEKFAC
            return [peak(lambda k=k: nng.FIM(model, data, k, memory_budget=2**24)) for k in kinds]
        peaks(32)
        print(json.dumps([peaks(64), peaks(512)]))
        """
    )
    for a, b in zip(few, many):
        assert b < a + 24, (few, many)


@LINUX
@pytest.mark.slow
def test_budget_bounds_the_peak():
    """Many outputs of one large batch: unlimited work takes several times what a budget of 32 MiB allows."""
    free, bound = measured(
        """
        features = nn.Conv2d(1, 8, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3)
        model = nn.Sequential(*features, nn.Flatten(), nn.Linear(400, 100))
        data = [(torch.randn(64, 1, 28, 28), torch.zeros(64, dtype=torch.long))]
        nng.FIM(model, [(data[0][0][:2], data[0][1][:2])], nng.PMatKFAC)
        kinds = (nng.PMatDiag, nng.PMatKFAC, nng.PMatEKFAC)
        bound = [peak(lambda k=k: nng.FIM(model, data, k, memory_budget=2**25)) for k in kinds]
        free = [peak(lambda k=k: nng.FIM(model, data, k, memory_budget=2**33)) for k in kinds]
        print(json.dumps([free, bound]))
        """
    )
    for a, b in zip(free, bound):
        assert b < 0.5 * a and b < 150, (free, bound)


@LINUX
def test_budget_bounds_the_peak_of_kernels():
    """One batch whose forward pass takes 25 MiB: it is run in parts."""
    peaks, calls = measured(
        """
        model = nn.Sequential(nn.Conv2d(1, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2304, 4))
        x = torch.randn(256, 1, 28, 28)
        sizes = []
        model.register_forward_pre_hook(lambda m, inputs: sizes.append(len(inputs[0])))
        nng.GramMatrix(model, [x[:2]])
        kernels = lambda b: nng.GramMatrix(model, [x], memory_budget=b)
        peaks = [peak(lambda b=b: kernels(b)) for b in (2**24, 2**30)]
        assert torch.allclose(kernels(2**24).tensor, kernels(2**30).tensor, rtol=1e-4, atol=1e-3)
        print(json.dumps([peaks, min(sizes[1:])]))
        """
    )
    assert peaks[0] < 0.6 * peaks[1], peaks
    assert calls < 128


@LINUX
@pytest.mark.parametrize("name", ["W2", "W3", "W4"])
def test_the_peak_of_a_kernel_is_a_tenth_of_the_jacobian(name):
    """The result, the gradients of all outputs at some layers and one tile: of a convolutional net, a deeper one, a
    transformer.
    """
    taken, jacobian = measured(
        f"""
        from benchmarks.workloads import for_job, workload
        w, small = for_job({name!r}, "J6"), workload({name!r}, 2, 2)
        w.floor()
        nng.GramMatrix(small.model, small.batches)
        taken = peak(lambda: nng.GramMatrix(w.model, w.batches))
        print(json.dumps([taken, 10 * w.n * sum(p.numel() for p in w.model.parameters()) * 4 / 2**20]))
        """
    )
    assert taken < 0.12 * jacobian  # a hundredth or two for what a process holds by accident


@pytest.mark.filterwarnings("ignore::nngeom.MemoryWarning")
@pytest.mark.parametrize("kind", STORED)
def test_numbers_do_not_depend_on_the_budget(kind):
    """Cut over outputs and examples down to one at a time."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(18, 4)).double()
    data = [(torch.randn(n, 1, 5, 5, dtype=torch.float64), torch.zeros(n, dtype=torch.long)) for n in (4, 4, 3)]
    r = representation(kind, model)
    whole = nng.FIM(model, data, r).to_dense()
    for budget in (10_000, 1):
        torch.testing.assert_close(
            nng.FIM(model, data, r, memory_budget=budget).to_dense(), whole, rtol=1e-9, atol=1e-12
        )


LARGE = ("dense", "low-rank", "block-diag", "ekfac", "mixed-sweeps")  # cubic, or quadratic, in a layer of thousands


@pytest.mark.parametrize("kind", STORED)
def test_reused_memory_is_not_read_late(kind):
    """Equal batches, large enough that their gradients overwrite those of the batch before; the same as one batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Tanh(), nn.GroupNorm(2, 8), nn.Flatten(1), nn.Linear(2592, 3)).double()
    if kind in LARGE:
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.Tanh(), nn.GroupNorm(2, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
        ).double()
    x = torch.randn(24, 1, 20, 20, dtype=torch.float64)
    y = torch.zeros(24, dtype=torch.long)
    v, r = nng.PVector.from_model(model), representation(kind, model)
    whole = nng.FIM(model, [(x, y)], r).mv(v).flat()
    cut = nng.FIM(model, list(zip(x.split(8), y.split(8))), r).mv(v).flat()
    tolerance = 1e-6 if STORED[kind].passes > 1 else 1e-9
    torch.testing.assert_close(cut, whole, rtol=tolerance, atol=tolerance * float(whole.abs().max()))


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize("size", [100, 3000])
def test_influence_of_three_thousand_on_fifty(size):
    """600 010 parameters: rows of 7.2 GB, those of the queries 120 MB; and the kernel of 1000 in the same metric."""
    scores, kernel = measured(
        f"""
        model = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 380), nn.ReLU(), nn.Linear(380, 10))
        data, queries = batches(3000, {size}, 784), batches(50, 50, 784)
        matrix = nng.EmpiricalFIM(model, batches(200, 100, 784), nng.PMatEKFAC, loss="cross_entropy")
        options = {{"loss": "cross_entropy", "damping": 1e-3}}
        nng.influence(model, batches(8, 8, 784), batches(2, 2, 784), matrix, **options)
        metric = matrix.inverse(1e-3)
        print(json.dumps([
            peak(lambda: nng.influence(model, data, queries, matrix, **options)),
            peak(lambda: nng.GramMatrix(model, batches(1000, min(1000, {size}), 784), metric=metric, loss="mse",
                                        function=lambda x, y: model(x).sum(1, keepdim=True))),
        ]))
        """
    )
    assert scores < 300
    assert kernel < 150
