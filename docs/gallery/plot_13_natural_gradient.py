"""
Fewer steps: natural gradient against Adam
==========================================

An auto-encoder of digits with a bottleneck of eight units, where first-order methods are slow. Every step of KFAC
and EKFAC costs more; it takes far fewer of them. Learning rates are the best of the few that were tried, and the
natural ones bound the change of the outputs (``kl_clip``).
"""

import time

import matplotlib.pyplot as plt
import torch
from digits import digits
from torch import nn

import nngeom as nng

x = digits()[0]


def encoder():
    """64-32-8-32-64."""
    torch.manual_seed(0)
    layers = [nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 64)]
    return nn.Sequential(*layers)


natural = {"lr": 0.3, "momentum": 0.0, "kl_clip": 0.1, "damping": nng.FactoredTikhonov(1e-2)}
natural |= {"fisher": "exact", "likelihood": "gaussian"}
figure, (left, right) = plt.subplots(1, 2, sharey=True)
makers = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9),
    "Adam": lambda m: torch.optim.Adam(m.parameters(), lr=3e-2),
    "KFAC": lambda m: nng.optim.KFAC(m, inverse_every=5, **natural),
    "EKFAC": lambda m: nng.optim.EKFAC(m, basis_every=20, **natural),
}
for name, make in makers.items():
    model, losses, times, start = encoder(), [], [], time.perf_counter()
    opt, generator = make(model), torch.Generator().manual_seed(0)
    for _ in range(150):
        batch = x[torch.randint(0, len(x), (128,), generator=generator)]
        with opt.observe() if name.endswith("KFAC") else torch.enable_grad():
            loss = 0.5 * (model(batch) - batch).square().sum(1).mean()
            loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
        times.append(time.perf_counter() - start)
    print(f"{name:6s} loss after 150 steps {sum(losses[-10:]) / 10:.3f}")
    left.semilogy(losses, label=name)
    right.semilogy(times, losses)
left.set_xlabel("steps")
left.set_ylabel("training loss")
right.set_xlabel("seconds, when this page was built")
left.legend()
plt.show()
