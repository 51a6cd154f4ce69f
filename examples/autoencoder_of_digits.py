"""A deep auto-encoder of digits, trained by KFAC, EKFAC, EKFAC-ra, SGD with momentum and batch normalisation, and Adam.

The experiment of George et al. 2018 (figure 3), small: layers 64-100-50-25-6 and back with sigmoids, weights
N(0, 1 / fan-in), logistic outputs, half the squared error summed over pixels, batches of 200. Every method gets 50
settings on one seed (5 lr x 5 dampings, or 25 lr, each with momentum 0 and 0.9), the best of which is run on three.

    python examples/autoencoder_of_digits.py            # all of it: docs/data/autoencoder.json,
    docs/images/autoencoder.png python examples/autoencoder_of_digits.py --quick    # one setting of each, 20 epochs
    python examples/autoencoder_of_digits.py --plot     # the image from the data python
    examples/autoencoder_of_digits.py --mnist FOLDER    # the paper's own size, 784-1000-500-250-30, on MNIST's files:
    out/autoencoder_mnist.json
"""

from __future__ import annotations

import argparse
import functools
import gzip
import itertools
import warnings
from pathlib import Path

import numpy as np
import torch
from optimizer_race import DOCS, Setting, Training, experiment, grid, plot, train
from torch import Tensor, nn

import nngeom as nng

WIDTHS = (64, 100, 50, 25, 6, 25, 50, 100, 64)
MNIST_WIDTHS = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
MOMENTA = (0.0, 0.9)
DAMPED = grid((3e-3, 0.01, 0.03, 0.1, 0.3), (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), MOMENTA)
GRIDS = {
    "SGD + batch norm": grid([10 ** (-3 + 0.15 * j) for j in range(25)], momenta=MOMENTA),
    "Adam": grid([10 ** (-4 + 0.125 * j) for j in range(25)], momenta=MOMENTA),
    "EKFAC-ra": DAMPED,
    "EKFAC": DAMPED,
    "KFAC": DAMPED,
    "KFAC, every 1": DAMPED,
    "KFAC balanced, every 1": DAMPED,
}
QUICK = {
    "SGD + batch norm": Setting(0.18),
    "Adam": Setting(0.01),
    "EKFAC-ra": Setting(0.03, 3e-3),
    "EKFAC": Setting(3e-3, 3e-4),
    "KFAC, every 1": Setting(0.01, 1e-4),
}


def digits() -> Tensor:
    """``(1797, 64)``, pixels in [0, 1]."""
    from sklearn.datasets import load_digits

    return torch.tensor(load_digits().data / 16, dtype=torch.float32)


def mnist(folder: Path) -> Tensor:
    """``(60000, 784)``, pixels in [0, 1], from ``train-images-idx3-ubyte`` or its ``.gz``."""
    name = folder / "train-images-idx3-ubyte"
    raw = name.read_bytes() if name.exists() else gzip.decompress((folder / f"{name.name}.gz").read_bytes())
    shape = np.frombuffer(raw, ">u4", 4)
    if shape[0] != 0x803:
        raise SystemExit(f"{name} is not a file of images in the IDX format")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=16).reshape(shape[1], -1) / np.float32(255))


def autoencoder(seed: int, batch_norm: bool = False, widths: tuple[int, ...] = WIDTHS) -> nn.Sequential:
    """Logits of the pixels."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for j, (fan_in, width) in enumerate(itertools.pairwise(widths)):
        linear = nn.Linear(fan_in, width)
        linear.weight.data.normal_(0, fan_in**-0.5, generator=generator)
        linear.bias.data.zero_()
        layers.append(linear)
        if j < len(widths) - 2:
            layers += [nn.BatchNorm1d(width), nn.Sigmoid()] if batch_norm else [nn.Sigmoid()]
    return nn.Sequential(*layers)


def loss_of(logits: Tensor, x: Tensor) -> Tensor:
    """Half the squared error, summed over pixels, averaged over examples."""
    return 0.5 * (logits.sigmoid() - x).square().sum(1).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one setting of each method, one seed, few epochs")
    parser.add_argument("--plot", action="store_true", help="only draw docs/data/autoencoder.json")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--mnist", type=Path, help="a folder with MNIST's files: the paper's network on them")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", nng.optim.SkippedStepWarning)  # settings that diverge
    x = digits() if options.mnist is None else mnist(options.mnist)
    model = autoencoder if options.mnist is None else functools.partial(autoencoder, widths=MNIST_WIDTHS)
    task = Training(model, loss_of, x, x, 200)
    if options.quick:
        for method, setting in QUICK.items():
            run = train(task, method, setting, 0, min(options.epochs, 20))
            print(
                f"{method:18s} loss {run['loss'][-1]:.3f} after {len(run['loss'])} epochs, {run['seconds'][-1]:.2f} s"
            )
        return
    data, images, name = (
        (DOCS / "data", DOCS / "images", "autoencoder")
        if options.mnist is None
        else (Path("out"), Path("out"), "autoencoder_mnist")
    )
    if not options.plot:
        experiment(task, GRIDS, options.epochs, data / f"{name}.json")
    plot(data / f"{name}.json", images / f"{name}.png")


if __name__ == "__main__":
    main()
