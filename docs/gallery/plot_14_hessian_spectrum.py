"""
A landscape in numbers: the Hessian's spectrum through training
===============================================================

Never formed: Lanczos steps on products with the Hessian give a density of its eigenvalues and its largest ones, at
the start, on the way, and at the end of training.
"""

import matplotlib.pyplot as plt
import torch
from digits import digits, mlp, train

import nngeom as nng

x, y, *_ = digits()
model, points = mlp(), []
for done, steps in ((0, 0), (30, 30), (400, 370)):
    train(model, x, y, steps=steps)
    H = nng.Hessian(model, (x[:400], y[:400]), loss="cross_entropy")
    density = H.spectral_density(steps=40, samples=2, generator=torch.Generator().manual_seed(0))
    values = H.lanczos(3)[0]
    print(f"step {done:3d}: largest eigenvalues {[round(v, 2) for v in values.tolist()]}")
    grid = torch.linspace(-0.6, 2.1, 400)
    plt.semilogy(grid, density.on(grid, 0.05).clamp(min=1e-5), label=f"step {done}")
plt.xlabel("eigenvalue")
plt.ylabel("density")
plt.ylim(1e-4)
plt.legend()
plt.show()
