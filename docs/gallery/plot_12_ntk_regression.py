"""
Is the net a kernel machine: regression and training dynamics
=============================================================

Regression with the tangent kernel at the start of training, and the linearised dynamics ``f(t) = y + exp(-t K / n)
(f(0) - y)``, next to gradient descent on the net itself, narrow and wide.
"""

import matplotlib.pyplot as plt
import torch
from digits import digits, mlp

import nngeom as nng

x, y, x_test, y_test = digits(train=120)
onehot = torch.nn.functional.one_hot(y, 10).float()
for width, color in ((16, "C0"), (256, "C1")):
    model = mlp(width=width)
    K = nng.GramMatrix(model, x)
    values, basis = K.eigh()
    U = basis.to_dense()
    start = model(x).detach()
    coordinates = U.T @ (start - onehot).T.flatten()
    lr, steps = 0.5 * len(x) / values[-1].item(), 300
    predicted = [(coordinates * (1 - lr * values / len(x)) ** t).square().sum() / len(x) / 2 for t in range(steps)]
    cross = nng.GramMatrix(model, x_test, other=x)
    kernel = cross.mv(K.solve(nng.FVector((onehot - start).T), 1e-4 * values[-1])).tensor.T + model(x_test).detach()

    losses = []
    for _ in range(steps):
        loss = 0.5 * (model(x) - onehot).square().sum(1).mean()
        losses.append(loss.item())
        for p, g in zip(model.parameters(), torch.autograd.grad(loss, model.parameters())):
            p.data -= lr * g
    right = lambda f: (f.argmax(1) == y_test).float().mean()
    print(f"width {width}: test accuracy of the kernel {right(kernel):.3f}, of the net {right(model(x_test)):.3f}")
    plt.loglog(losses, color=color, label=f"net of width {width}")
    plt.loglog(predicted, "--", color=color, label="predicted by its kernel")
plt.xlabel("steps of gradient descent")
plt.ylabel("training loss")
plt.legend()
plt.show()
