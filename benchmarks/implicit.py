"""``python -m benchmarks.implicit``: products of many vectors at once, and Lanczos beside ARPACK on the same ones."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

import nngeom as nng
from benchmarks.timing import clock, interleaved
from nngeom.solve.lanczos import lanczos

VECTORS = 32
COUNTS = (5, 20, 50)


class _Sequences(nn.Module):
    """A layer over sequences, the mean or last of its outputs, and a head."""

    def __init__(self, layer: nn.Module, width: int):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        """``(n, t, in)`` to ``(n, 5)``."""
        out = self.layer(x)
        return self.head(out[0][:, -1] if isinstance(out, tuple) else out.mean(1))


def nets() -> dict[str, tuple[nn.Module, Tensor]]:
    """Small nets, and inputs."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    small = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 5))
    wide = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 10))
    images = nn.Sequential(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(216, 10))
    return {
        "MLP 20-32-5, 64 examples": (small, torch.randn(64, 20)),
        "LSTM of width 16, 16 x 10 positions": (
            _Sequences(nn.LSTM(8, 16, batch_first=True), 16),
            torch.randn(16, 10, 8),
        ),
        "encoder layer of width 32, 16 x 10 positions": (_Sequences(encoder, 32).eval(), torch.randn(16, 10, 32)),
        "convolution, 32 images of 28 x 28": (images, torch.randn(32, 1, 28, 28)),
        "MLP 256-512-10, 128 examples": (wide, torch.randn(128, 256)),
    }


def objects(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """What has products."""
    labelled = [(x, torch.arange(len(x)) % 5)]
    return {
        "Fisher": nng.FIM(model, [x], nng.PMatImplicit),
        "Hessian": nng.Hessian(model, labelled, loss="cross_entropy"),
        "kernel": nng.GramMatrix(model, [x], nng.FMatImplicit),
    }


def products() -> None:
    """The time of ``VECTORS`` single products in multiples of one of all of them."""
    for name, (model, x) in nets().items():
        ratios = []
        for kind, m in objects(model, x).items():
            size = (m.outputs, m.columns) if kind == "kernel" else m.shape[:1]
            v = torch.randn(VECTORS, *size)
            one, many = (lambda m=m, v=v: m.product(v[0])), (lambda m=m, v=v: m.product(v))
            series = interleaved(one, {"many": many}, 5)["many"]
            ratios.append(f"{kind} {VECTORS / statistics.median(series.ratios):.1f}")
        print(f"{name}: {', '.join(ratios)}", flush=True)


class Counted:
    """A product, and how often it was taken."""

    def __init__(self, product: Callable[[Tensor], Tensor]):
        self.product, self.count = product, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.product(x)


def spectra(d: int = 1500) -> dict[str, Tensor]:
    """Eigenvalues."""
    g = torch.Generator().manual_seed(0)
    bulk = torch.rand(d, generator=g, dtype=torch.float64)
    several = torch.tensor([10.0] * 5 + [9.0] * 7 + [8.0] * 20, dtype=torch.float64)
    return {
        "j^-1.5": torch.arange(1, d + 1, dtype=torch.float64) ** -1.5,
        "10 outliers, a bulk": torch.cat([torch.linspace(2, 50, 10, dtype=torch.float64), bulk[10:] / 5 - 0.1]),
        "normal": torch.randn(d, generator=g, dtype=torch.float64),
        "5, 7 and 20 times the same": torch.cat([several, bulk[32:]]),
    }


def _dense(values: Tensor) -> Callable[[Tensor], Tensor]:
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=values.dtype))
    m = (q * values) @ q.T
    return lambda x: m @ x


def eigenvalues() -> None:
    """Products and time of :func:`lanczos` in multiples of those of ``eigsh``, and the error of both."""
    cases = {name: (_dense(values), values) for name, values in spectra().items()}
    model, x = nets()["MLP 20-32-5, 64 examples"]
    for kind, m in list(objects(model.double(), x.double()).items())[:2]:
        cases[f"{kind} of the small MLP"] = (m.product, torch.linalg.eigvalsh(m.to_dense()))
    for name, (product, values) in cases.items():
        for k in COUNTS:
            print(f"{name}, k = {k}: {_beside_arpack(product, values, k)}", flush=True)


def _beside_arpack(product: Callable[[Tensor], Tensor], values: Tensor, k: int) -> str:
    ours, theirs, d = Counted(product), Counted(product), len(values)
    start = torch.randn(d, dtype=torch.float64)
    act = lambda x: theirs(torch.from_numpy(x.ravel().copy())).numpy()
    operator = LinearOperator((d, d), matvec=act, dtype="float64")
    found: dict[str, Tensor] = {}

    def mine() -> None:
        found["ours"] = lanczos(ours, start, k)[0]

    def other() -> None:
        found["theirs"] = torch.from_numpy(eigsh(operator, k, which="LA", tol=1e-6, v0=start.numpy())[0])

    times = [(clock(mine, "cpu"), clock(other, "cpu")) for _ in range(3)]
    ratio = statistics.median(a / b for a, b in times)
    truth = values.sort(descending=True)[0][:k]
    errors = [float((found[n].sort(descending=True)[0] - truth).abs().max() / values.abs().max()) for n in found]
    return (
        f"{ours.count // 3} products, eigsh {theirs.count // 3}; time {ratio:.2f} of eigsh's; "
        f"errors {errors[0]:.0e} and {errors[1]:.0e}"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    products()
    eigenvalues()
