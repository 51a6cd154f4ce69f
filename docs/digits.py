"""Scikit-learn's digits, a small net, and a training loop: what the examples of the gallery share."""

import copy

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F


def digits(train=1200, dtype=torch.float32):
    """Images ``(n, 64)`` in [0, 1] and labels, for training and for testing, in a fixed random order."""
    data, order = load_digits(), torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(data.data / 16, dtype=dtype)[order], torch.tensor(data.target)[order]
    return x[:train], y[:train], x[train:], y[train:]


def mlp(like=None, width=32, inputs=64, outputs=10):
    """A perceptron with one hidden layer, or a copy of one."""
    if like is not None:
        return copy.deepcopy(like)
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, outputs))


def train(model, x, y, steps=300, lr=1e-2, penalty=lambda model: 0.0, decay=0.0, after=lambda step: None):
    """Adam on random batches of 128; ``after(step)`` is called after every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=decay)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        batch = torch.randint(0, len(x), (128,), generator=generator)
        loss = F.cross_entropy(model(x[batch]), y[batch]) + penalty(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after(step)
    return model


def accuracy(model, x, y):
    """The share of examples that are labelled right."""
    with torch.no_grad():
        return (model(x).argmax(-1) == y).float().mean().item()
