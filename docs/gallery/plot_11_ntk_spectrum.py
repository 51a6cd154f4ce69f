"""
What a net learns first: the spectrum of its tangent kernel
===========================================================

The eigenvalues of the tangent kernel before and after training, and how well its leading eigenvectors say the
labels. In training the kernel turns a little towards the labels.
"""

import matplotlib.pyplot as plt
import torch
from digits import digits, mlp, train

import nngeom as nng
from nngeom import analysis

x, y, *_ = digits()
x, y = x[:150], y[:150]
onehot = torch.nn.functional.one_hot(y, 10).T.float() - 0.1  # (c, n)
model = mlp()
figure, (left, right) = plt.subplots(1, 2)
for name, steps in (("at the start", 0), ("after 200 steps", 200)):
    train(model, x, y, steps=steps)
    K = nng.GramMatrix(model, x)
    values, vectors = K.eigh()
    share = (vectors.to_dense().T @ onehot.flatten()).square().flip(0).cumsum(0) / onehot.square().sum()
    print(
        f"{name:16s} effective rank {analysis.effective_rank(K):.0f}, "
        f"alignment with the labels {analysis.label_alignment(model, (x, y)):.3f}"
    )
    left.loglog(values.flip(0).clamp(min=1e-6), label=name)
    right.semilogx(torch.arange(1, len(share) + 1), share, label=name)
left.set_xlabel("number of the eigenvalue")
left.set_ylabel("eigenvalue")
left.legend()
right.set_xlabel("leading eigenvectors")
right.set_ylabel("share of the labels in their span")
plt.show()
