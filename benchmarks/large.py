"""``python -m benchmarks.large``: larger nets and a larger kernel, each job in a process with a limit on its memory.

``resnet50``: 24 million parameters, 64 x 64 images, 200 outputs. ``gpt2``: 12 layers of width 768, 50 257 tokens, tied
head, sequences of 64. ``lenet``: 5000 images of 28 x 28. Random weights and data, float32. Time and peak memory are of
one call, after nothing but building model and data.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nngeom as nng
from benchmarks import report
from benchmarks.large_models import Decoder, resnet
from benchmarks.timing import clock, peak_memory
from benchmarks.workloads import lenet

SAMPLES = 5
TOY: dict[str, dict[str, Any]] = {
    "lenet": {},
    "resnet50": {"blocks": (1, 1, 1, 1), "width": 4, "outputs": 10},
    "gpt2": {"depth": 1, "width": 16, "heads": 2, "vocabulary": 50, "positions": 16},
}


@dataclass(frozen=True)
class Large:
    """A model, its batches ``[(inputs, targets), ...]`` and the likelihood of its outputs."""

    model: nn.Module
    batches: list[tuple[Tensor, Tensor]]
    likelihood: Any

    def floor(self) -> tuple[Tensor, ...]:
        """One forward and one backward pass over all batches; gradients are added up as an optimizer's would be."""
        parameters, total = list(self.model.parameters()), None
        for x, y in self.batches:
            outputs = self.model(x)
            grads = torch.autograd.grad(F.cross_entropy(outputs.flatten(0, -2), y.flatten()), parameters)
            total = list(grads) if total is None else [a.add_(b) for a, b in zip(total, grads)]
        return tuple(total or ())

    def monte_carlo(self, representation: Any, samples: int) -> Any:
        """A Fisher matrix from labels drawn from the model."""
        g = torch.Generator().manual_seed(0)
        return nng.FIM_MonteCarlo(
            self.model, self.batches, representation, likelihood=self.likelihood, samples=samples, generator=g
        )

    def fisher_vector(self) -> Callable[[], Any]:
        """A product with the exact Fisher matrix; the operator is built before."""
        m = nng.FIM(self.model, self.batches, nng.PMatImplicit, likelihood=self.likelihood)
        v = nng.PVector.randn(m.layer_collection, generator=torch.Generator().manual_seed(7))
        v = (v / v.norm()).to(next(self.model.parameters()).device)
        return lambda: m.mv(v)


def build(
    model: str, examples: int, batch: int, device: str = "cpu", toy: bool = False, dtype: torch.dtype = torch.float32
) -> Large:
    """One of the nets with random data, seeded."""
    torch.manual_seed(0)
    options: dict[str, Any] = TOY[model] if toy else {}
    if model == "resnet50":
        net, x = resnet(**options), torch.randn(examples, 3, 64, 64, dtype=dtype)
        y, likelihood = torch.randint(0, net[-1].out_features, (examples,)), nng.Categorical()
    elif model == "lenet":
        net, x = lenet(), torch.randn(examples, 1, 28, 28, dtype=dtype)
        y, likelihood = torch.randint(0, 10, (examples,)), nng.Categorical()
    else:
        net = Decoder(**options)
        vocabulary, t = net.tokens.num_embeddings, min(64, net.positions.num_embeddings)
        x, y = torch.randint(0, vocabulary, (2, examples, t))
        likelihood = nng.Categorical(dim=-1)
    pieces = zip(x.to(device).split(batch), y.to(device).split(batch))
    return Large(net.to(device=device, dtype=dtype), list(pieces), likelihood)


@dataclass(frozen=True)
class Job:
    """What is run, ``prepare(large) -> run``; how its result is one number; on how many examples, in batches of which
    size.
    """

    title: str
    prepare: Callable[[Large], Callable[[], Any]]
    value: Callable[[Any], Any]
    examples: int
    batch: int


def _trace(m: Any) -> Any:
    return m.trace()


def _signs(large: Large) -> Callable[[], Any]:
    g = torch.Generator().manual_seed(0)
    return lambda: nng.GramMatrix(
        large.model, large.batches, nng.FMatDiag, estimator="rademacher", samples=SAMPLES, generator=g
    ).trace()


def _kernel_to_file(large: Large) -> Callable[[], Any]:
    folder = tempfile.mkdtemp()
    path = os.path.join(folder, "kernel.npy")

    def run() -> Any:
        try:
            return nng.GramMatrix(large.model, large.batches, out=path).trace()
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    return run


def _kernel_products(large: Large) -> Callable[[], Any]:
    count = min(100, 2 * sum(len(x) for x, _ in large.batches))

    def run() -> Any:
        trace = nng.GramMatrix(large.model, large.batches, nng.FMatDiag).trace()
        values, _ = nng.GramMatrix(large.model, large.batches, nng.FMatImplicit).lanczos(count)
        return torch.cat([trace.view(1), values.flatten()])

    return run


JOBS: dict[str, dict[str, Job]] = {
    "resnet50": {
        "kfac": Job(
            f"KFAC, Monte Carlo, {SAMPLES} samples",
            lambda w: lambda: w.monte_carlo(nng.PMatKFAC, SAMPLES),
            _trace,
            32,
            8,
        ),
        "ekfac": Job(
            f"EKFAC, Monte Carlo, {SAMPLES} samples",
            lambda w: lambda: w.monte_carlo(nng.PMatEKFAC, SAMPLES),
            _trace,
            32,
            8,
        ),
        "fvp": Job(
            "product of the exact Fisher matrix with a vector, matrix-free",
            Large.fisher_vector,
            lambda v: v.norm(),
            32,
            8,
        ),
        "ntk-trace": Job(
            "trace of the NTK, all 200 outputs",
            lambda w: lambda: nng.GramMatrix(w.model, w.batches, nng.FMatDiag),
            _trace,
            8,
            4,
        ),
    },
    "gpt2": {
        "diag": Job(
            "diagonal Fisher, Monte Carlo, 1 sample", lambda w: lambda: w.monte_carlo(nng.PMatDiag, 1), _trace, 8, 2
        ),
        "kfac": Job(
            "KFAC, Monte Carlo, 1 sample, vocabulary side diagonal",
            lambda w: lambda: w.monte_carlo(nng.PMatKFAC, 1),
            _trace,
            8,
            2,
        ),
        "ekfac": Job("EKFAC, Monte Carlo, 1 sample", lambda w: lambda: w.monte_carlo(nng.PMatEKFAC, 1), _trace, 64, 2),
        "mgs-trace": Job(
            f"trace of the kernel of all logits, {SAMPLES} random probes", _signs, lambda e: e.value, 8, 2
        ),
    },
    "lenet": {
        "ntk-file": Job("NTK of all 10 outputs, in tiles to a file", _kernel_to_file, lambda t: t, 5000, 250),
        "ntk-top": Job(
            "its trace and 100 largest eigenvalues, not formed", _kernel_products, lambda v: v.sum(), 5000, 250
        ),
    },
}


@contextlib.contextmanager
def eigendecompositions() -> Iterator[list[float]]:
    """Within: the wall time of every eigendecomposition is noted."""
    plain, spent = torch.linalg.eigh, list[float]()

    def eigh(m: Tensor, *args: Any) -> Any:
        start = time.perf_counter()
        result = plain(m, *args)
        if m.is_cuda:
            torch.cuda.synchronize(m.device)
        spent.append(time.perf_counter() - start)
        return result

    torch.linalg.eigh = eigh
    try:
        yield spent
    finally:
        torch.linalg.eigh = plain


def measured(
    model: str, job: str, examples: int | None, batch: int | None, device: str, toy: bool = False
) -> dict[str, Any]:
    """One job in this process: seconds, multiples of the floor, peak bytes above model and data."""
    what = JOBS[model][job]
    n, size = examples or what.examples, batch or what.batch
    w = build(model, n, size, device, toy)
    run = what.prepare(w)
    found: dict[str, Any] = {}

    def timed() -> Any:
        start, busy = time.perf_counter(), time.process_time()
        with eigendecompositions() as spent:
            result = run()
        found["eigen_seconds"] = sum(spent)
        found["value"] = float(what.value(result))  # also waits for the device
        found["seconds"], found["cpu_seconds"] = time.perf_counter() - start, time.process_time() - busy
        return result

    peak = peak_memory(timed, device)
    w.floor()
    floor = min(clock(w.floor, device) for _ in range(3))
    spent = found["cpu_seconds"] if device == "cpu" and torch.get_num_threads() == 1 else found["seconds"]
    parameters = sum(p.numel() for p in w.model.parameters())
    return {
        "model": model,
        "job": job,
        "title": what.title,
        "device": device.split(":")[0],
        "parameters": parameters,
        "examples": n,
        "batch": size,
        **found,
        "floor_seconds": floor,
        "floors": spent / floor,
        "peak_bytes": peak,
    }


def limit_memory(gib: float, device: str) -> None:
    """An error, not an exhausted machine: addresses of this process, or its part of the device's memory."""
    if device.startswith("cuda"):
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total), device)
        return
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (int(gib * 2**30), resource.getrlimit(resource.RLIMIT_AS)[1]))


def in_own_process(model: str, job: str, options: argparse.Namespace) -> dict[str, Any]:
    """The record that a fresh process prints last; where it fails, its last words."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.large",
        "--inside",
        "--model",
        model,
        "--job",
        job,
        "--device",
        options.device,
    ]
    command += ["--threads", str(options.threads), "--limit-gib", str(options.limit_gib)]
    for name in ("examples", "batch"):
        if getattr(options, name) is not None:
            command += [f"--{name}", str(getattr(options, name))]
    command += ["--toy"] if options.toy else []
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(f"{model} {job} ended with {done.returncode}: {lines[-1] if lines else 'no message'}")
    return json.loads(done.stdout.splitlines()[-1])


def line(r: dict[str, Any]) -> str:
    """One record, for the terminal."""
    peak = "-" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**30:.2f} GiB"
    size = f"{r['examples']} examples in batches of {r['batch']}"
    return (
        f"{r['model']} {r['job']} ({r['device']}, {size}): {r['seconds']:.1f} s, {r['floors']:.1f} floors of "
        f"{r['floor_seconds']:.2f} s, {peak}"
    )


def markdown(results: dict[str, Any]) -> str:
    """The table of the documentation."""
    head = ["model", "job", "device", "examples (batch)", "floor s", "floors", "seconds: processor, wall"]
    head += ["of these eigendecompositions", "peak GiB"]
    rows = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for r in results["jobs"]:
        peak = "-" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**30:.2f}"
        device, size = r["environment"]["device"], f"{r['examples']} ({r['batch']})"
        seconds = f"{r['cpu_seconds']:.1f}, {r['seconds']:.1f}"
        eigen = f"{r['eigen_seconds']:.1f}" if "eigen_seconds" in r else "-"
        cells = [r["model"], r["title"], device, size, f"{r['floor_seconds']:.2f}", f"{r['floors']:.1f}", seconds]
        cells += [eigen, peak]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> None:
    """Parse the options, run every chosen job, write JSON where asked."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.large", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="*", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--job", nargs="*", choices=sorted({job for jobs in JOBS.values() for job in jobs}))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--examples", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--limit-gib", type=float, default=24)
    parser.add_argument("--toy", action="store_true", help="the same jobs on very small nets")
    parser.add_argument("--json", help="write the results here; records of other jobs in the file stay")
    parser.add_argument(
        "--render", action="store_true", help="run nothing; write the table of the file given by --json"
    )
    parser.add_argument("--docs", help="write the table into this Markdown file, between its marks")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.inside:
        torch.set_num_threads(options.threads)
        limit_memory(options.limit_gib, options.device)
        record = measured(
            options.model[0], options.job[0], options.examples, options.batch, options.device, options.toy
        )
        print(json.dumps({**record, "limit_gib": options.limit_gib, "environment": report.environment(options.device)}))
        return
    results = report.load(options.json)
    for model in [] if options.render else options.model:
        for job in JOBS[model]:
            if options.job and job not in options.job:
                continue
            record = in_own_process(model, job, options)
            print(line(record), flush=True)
            jobs = report.replaced(results.get("jobs", []), record, ("model", "job", "device", "parameters"))
            place = lambda r: (list(JOBS).index(r["model"]), list(JOBS[r["model"]]).index(r["job"]), r["device"])
            results = report.merge(options.json, jobs=sorted(jobs, key=place))
    if options.docs:
        report.into(options.docs, "large", markdown(results))


if __name__ == "__main__":
    main()
