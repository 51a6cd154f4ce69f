"""Time and memory against the number of examples, outputs, parameters, positions and the batch size, with fitted
exponents.
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import nngeom as nng
from benchmarks.timing import clock, peak_memory
from benchmarks.workloads import mlp


def _data(n: int, batch: int, *shape: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(1))
    return list(zip(x.split(batch), torch.zeros(n, dtype=torch.long).split(batch)))


class _Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(n, t, 64)`` to ``(n, 10)``."""
        return self.down(torch.relu(self.up(x)).mean(1))


def _fim(
    kind: str, n: int = 512, batch: int = 128, outputs: int = 10, width: int = 200, depth: int = 3
) -> Callable[[], Any]:
    model, data = mlp(width, depth, 128, outputs), _data(n, batch, 128)
    return lambda: nng.FIM(model, data, getattr(nng, kind))


def _tokens(kind: str, t: int) -> Callable[[], Any]:
    model, data = _Tokens(), _data(32, 32, t, 64)
    return lambda: nng.FIM(model, data, getattr(nng, kind))


def _gram(n: int) -> Callable[[], Any]:
    model, data = mlp(100, 2, 64), _data(n, n, 64)
    return lambda: nng.GramMatrix(model, data, nng.FMatDense)


# title: (values, what is run, exponent of time predicted at the large end, exponent of memory or None)
STUDIES: dict[str, tuple[list[int], Callable[[int], Callable[[], Any]], float, float | None]] = {
    "KFAC, examples n": ([1024, 2048, 4096, 8192], lambda n: _fim("PMatKFAC", n=n), 1.0, 0.0),
    "diagonal, examples n": ([1024, 2048, 4096, 8192], lambda n: _fim("PMatDiag", n=n), 1.0, 0.0),
    "KFAC, outputs c": ([20, 40, 80, 160], lambda c: _fim("PMatKFAC", n=256, outputs=c), 1.0, None),
    "KFAC, parameters d (width)": (
        [400, 800, 1600],
        lambda w: _fim("PMatKFAC", n=256, outputs=4, width=w, depth=2),
        1.0,
        1.0,
    ),
    "diagonal, positions t": ([64, 128, 256, 512], lambda t: _tokens("PMatDiag", t), 1.0, None),
    "KFAC, batch size": ([16, 64, 256], lambda b: _fim("PMatKFAC", n=1024, batch=b), 0.0, None),
    "Gram matrix, examples n": ([100, 200, 400], _gram, 2.0, 2.0),
}


def studies(repeats: int = 3) -> dict[str, Any]:
    """Every study: sizes, seconds, peak bytes above the start, fitted and predicted exponents."""
    found: dict[str, Any] = {}
    for title, (values, build, time_law, memory_law) in STUDIES.items():
        if title.startswith("Gram") and not hasattr(nng, "GramMatrix"):
            continue
        seconds, peaks, against = [], [], []
        for value in values:
            torch.manual_seed(0)
            run = build(value)
            run()
            seconds.append(statistics.median(clock(run, "cpu") for _ in range(repeats)))
            peaks.append(_peak(title, value) if memory_law is not None else 0)
            against.append(value * value if "width" in title else value)  # parameters grow with the square of the width
        found[title] = {
            "values": against,
            "seconds": seconds,
            "peak_bytes": peaks,
            "time_exponent": exponent(against, seconds),
            "time_predicted": time_law,
            "memory_exponent": exponent(against, peaks) if memory_law is not None else None,
            "memory_predicted": memory_law,
        }
        print(f"{title}: time ~ {found[title]['time_exponent']:.2f} (predicted {time_law})", flush=True)
    return found


def _peak(title: str, value: int) -> int:
    """In a process of its own, which gives every block of a megabyte back when it is freed."""
    code = "import sys; from benchmarks import scaling; scaling.print_peak(sys.argv[1], int(sys.argv[2]))"
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"}
    done = subprocess.run(
        [sys.executable, "-c", code, title, str(value)], capture_output=True, text=True, env=environment, check=True
    )
    return int(done.stdout.split()[-1])


def print_peak(title: str, value: int) -> None:
    """Peak bytes of one run of a study, after a smaller one has loaded what it needs."""
    torch.set_num_threads(1)
    values, build, _, _ = STUDIES[title]
    run = build(value)
    build(values[0] // 2)()
    print(peak_memory(run) or 0)


def exponent(x: list[int], y: list[float]) -> float:
    """The slope of ``log y`` over ``log x`` by least squares."""
    u, v = [math.log(a) for a in x], [math.log(max(b, 1e-12)) for b in y]
    mean_u, mean_v = statistics.fmean(u), statistics.fmean(v)
    return sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v)) / sum((a - mean_u) ** 2 for a in u)


def plot(found: dict[str, Any], path: str) -> None:
    """One panel a study, time and memory on logarithmic axes."""
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter

    figure, axes = plt.subplots(2, 4, figsize=(13, 6))
    for axis, (title, s) in zip(axes.flat, found.items()):
        axis.loglog(s["values"], s["seconds"], "o-", label=f"seconds, exponent {s['time_exponent']:.2f}")
        if s["memory_exponent"] is not None:
            axis.loglog(
                s["values"],
                [b / 2**30 or float("nan") for b in s["peak_bytes"]],  # nothing beyond the result: no point
                "s--",
                label=f"peak GiB, exponent {s['memory_exponent']:.2f}",
            )
        axis.set_title(title, fontsize=10)
        axis.legend(fontsize=8.5)
        axis.margins(y=0.3)
        axis.set_xticks(s["values"], [f"{value:,}".replace(",", " ") for value in s["values"]])
        axis.set_xticks([], minor=True)
        axis.yaxis.set_minor_formatter(NullFormatter())
    for axis in list(axes.flat)[len(found) :]:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
