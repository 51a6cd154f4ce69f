"""
Your own likelihood, layer and representation
=============================================

Counts of blank pixels under a geometric likelihood, and a representation with one number a unit. Each is a class in
a file of its own, as is a layer (:doc:`/extending` shows all three), and works with everything that is there.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from digits import digits
from torch import nn

import nngeom as nng

sys.path.insert(0, str(Path(nng.__file__).parent.parent / "tests" / "extending"))
from geometric import Geometric
from unit_eye import PMatUnitEye

x, *_ = digits()
counts = (x.view(-1, 8, 8) < 0.1).float().sum(1)  # of every column, (n, 8)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 8))
optimizer, mine = torch.optim.Adam(model.parameters(), 1e-2), Geometric()
for _ in range(150):
    loss = -mine.log_prob(model(x), counts).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

exact = nng.FIM(model, (x, counts), PMatUnitEye, likelihood=mine)
drawn = nng.FIM_MonteCarlo(model, (x, counts), PMatUnitEye, likelihood=mine, samples=20)
print(f"loss {loss.item():.2f}; trace {exact.trace().item():.2f}, from drawn counts {drawn.trace().item():.2f}")
plt.loglog(exact.diag().flat(), drawn.diag().flat(), ".")
plt.xlabel("Fisher information of a unit's parameters, exact")
plt.ylabel("from twenty draws an example")
plt.show()
