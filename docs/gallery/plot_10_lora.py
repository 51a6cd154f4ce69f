"""
Curvature of adapters alone: LoRA
=================================

A net trained on digits is adapted to the same digits turned by half a turn, by low-rank adapters beside its frozen
weights. Frozen parameters are left out by themselves: a KFAC matrix of the adapters is small, and natural-gradient
steps in it are cheap. The learning rates are the best of five for Adam and of three for KFAC.
"""

import matplotlib.pyplot as plt
import torch
from digits import accuracy, digits, mlp, train
from torch import nn
from torch.nn import functional as F

import nngeom as nng


class Adapter(nn.Module):
    """A frozen linear map plus ``up @ down`` of rank 4."""

    def __init__(self, base, rank=4):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = (
            nn.Linear(base.in_features, rank, bias=False),
            nn.Linear(rank, base.out_features, bias=False),
        )
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


natural = {"lr": 0.3, "momentum": 0.0, "kl_clip": 0.01, "damping": nng.FactoredTikhonov(1e-2)}
natural |= {"fisher": "exact", "likelihood": "categorical"}
x, y, x_test, y_test = digits()
base, flipped, flipped_test = train(mlp(width=64), x, y), x.flip(-1), x_test.flip(-1)
for name in ("Adam", "KFAC"):
    torch.manual_seed(0)
    model = nn.Sequential(*(Adapter(layer) if isinstance(layer, nn.Linear) else layer for layer in mlp(base)))
    opt = torch.optim.Adam(model.parameters(), 0.1) if name == "Adam" else nng.optim.KFAC(model, **natural)
    losses = []
    for _ in range(60):
        with opt.observe() if name == "KFAC" else torch.enable_grad():
            loss = F.cross_entropy(model(flipped), y)
            loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    print(f"{name}: test accuracy {accuracy(model, flipped_test, y_test):.3f}")
    plt.semilogy(losses, label=name)
matrix = nng.FIM(model, (flipped, y), nng.PMatKFAC)
print(
    f"{matrix.shape[0]} of {sum(p.numel() for p in model.parameters())} parameters; {matrix.nbytes()} bytes of factors"
)
plt.xlabel("steps on all examples")
plt.ylabel("training loss")
plt.legend()
plt.show()
