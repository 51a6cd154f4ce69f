"""A residual convolutional net without batch normalisation on 8 x 8 digits: EKFAC-ra, EKFAC, KFAC, SGD with momentum,
Adam.

Initialisation of George et al. 2018, appendix A.3 (``n`` the fan-in): N(0, 2/n) behind a ReLU, N(0, 1/n) where no
activation precedes, N(0, 0.2/n) for the last convolution of a residual block, biases 0. Bases and inverses every 50
steps, batches of 100, 18 settings a method on one seed, the best on three.

    python examples/residual_digits.py           # docs/data/residual.json and docs/images/residual.png
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch
from autoencoder_of_digits import MOMENTA, digits
from optimizer_race import DOCS, Training, experiment, grid, plot
from torch import Tensor, nn
from torch.nn import functional as F

import nngeom as nng

DAMPED = grid((3e-3, 0.01, 0.03), (3e-4, 1e-3, 1e-2), MOMENTA)
GRIDS = {
    "SGD": grid([10 ** (-2.5 + 0.25 * j) for j in range(9)], momenta=MOMENTA),
    "Adam": grid([10 ** (-4 + 0.25 * j) for j in range(9)], momenta=MOMENTA),
    "EKFAC-ra": DAMPED,
    "EKFAC": DAMPED,
    "KFAC": DAMPED,
    "KFAC, every 1": DAMPED,
    "KFAC balanced": DAMPED,
}


class Block(nn.Module):
    """Two convolutions around which the input is carried, by a 1 x 1 convolution where the shape changes."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.first, self.last = nn.Conv2d(inputs, width, 3, stride, 1), nn.Conv2d(width, width, 3, 1, 1)
        self.skip = nn.Conv2d(inputs, width, 1, stride) if stride != 1 or inputs != width else None

    def forward(self, x: Tensor) -> Tensor:
        carried = x if self.skip is None else self.skip(x)
        return carried + self.last(F.relu(self.first(F.relu(x))))


def network(seed: int, batch_norm: bool = False) -> nn.Sequential:
    """Two residual blocks of 8 and 16 channels; there is none with batch normalisation."""
    generator = torch.Generator().manual_seed(seed)
    blocks = [Block(8, 8, 1), Block(8, 16, 2)]
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, 1, 1),
        *blocks,
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    last, bare = {block.last for block in blocks}, {block.skip for block in blocks} | {model[1]}
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            gain = 0.2 if module in last else 1.0 if module in bare else 2.0
            module.weight.data.normal_(0, (gain / module.weight[0].numel()) ** 0.5, generator=generator)
            module.bias.data.zero_()
    return model


def labels() -> Tensor:
    """``(1797,)``."""
    from sklearn.datasets import load_digits

    return torch.tensor(load_digits().target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--out", type=Path, default=DOCS, help="where data/residual.json and images/residual.png go")
    parser.add_argument("--plot", action="store_true", help="only draw docs/data/residual.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", nng.optim.SkippedStepWarning)
    path = options.out / "data" / "residual.json"
    if not options.plot:
        experiment(Training(network, F.cross_entropy, digits(), labels(), 100), GRIDS, options.epochs, path)
    plot(path, options.out / "images" / "residual.png")


if __name__ == "__main__":
    main()
