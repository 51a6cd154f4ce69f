"""
Know what was never seen: out of distribution
=============================================

Patches of a photograph are no digits. The variance of the linearised outputs under the Laplace posterior, ``J (n F
+ p)^-1 J^T``, is larger on them, and tells them from digits better than the net's own confidence.
"""

import matplotlib.pyplot as plt
import torch
from digits import digits, mlp, train
from sklearn.datasets import load_sample_image
from sklearn.metrics import roc_auc_score

import nngeom as nng

x, y, x_test, y_test = digits()
model = train(mlp(), x, y, steps=300)
photo = torch.tensor(load_sample_image("china.jpg")).float().mean(-1) / 255
patches = photo.unfold(0, 8, 8).unfold(1, 8, 8).reshape(-1, 64)
strange = patches[torch.randperm(len(patches), generator=torch.Generator().manual_seed(0))[: len(x_test)]]

posterior = nng.FIM(model, (x, y), nng.PMatKFAC) * len(x)  # precision of the prior: 0.1


def variance(inputs):
    """The mean variance of the outputs, for each input."""
    J = nng.Jacobian(model, inputs)
    return (posterior.solve(J, 0.1).tensor * J.tensor).sum(-1).mean(0)


seen, new = variance(x_test), variance(strange)
confidence = lambda inputs: model(inputs).softmax(-1).max(-1).values.detach()
unsure = [1 - confidence(x_test), 1 - confidence(strange)]
truth = [0] * len(seen) + [1] * len(new)
for name, (a, b) in {"variance": (seen, new), "1 - confidence": unsure}.items():
    print(f"{name:15s} area under the ROC curve {roc_auc_score(truth, torch.cat([a, b])):.3f}")
bins = torch.logspace(1, 3, 40)
plt.hist(seen, bins, alpha=0.7, label="digits, held out")
plt.hist(new, bins, alpha=0.7, label="patches of a photograph")
plt.xscale("log")
plt.xlabel("variance of the outputs under the posterior")
plt.legend()
plt.show()
