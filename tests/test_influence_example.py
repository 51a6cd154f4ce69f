"""The example that judges scores: its nets trained together are what they are as modules, and it runs."""

import sys
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import influence_of_digits as example


def test_nets_trained_together_are_those_of_modules():
    nets, data = example.Nets(3, torch.Generator().manual_seed(0)), example.digits(example.QUICK)
    nets.train(data[0], data[1], torch.ones(3, len(data[1])), 5)
    for r in range(3):
        losses = F.cross_entropy(nets.module(r)(data[2]), data[3], reduction="none")
        torch.testing.assert_close(losses, nets.losses(data[2], data[3])[r])


def test_parts_keep_to_themselves():
    """A net that was trained on some images alone is the one trained on those with the others masked."""
    nets, alone = (example.Nets(1, torch.Generator().manual_seed(0)) for _ in range(2))
    x, y, *_ = example.digits(example.QUICK)
    part = torch.zeros(1, len(y))
    part[:, :20] = 1
    nets.train(x, y, part, 5)
    alone.train(x[:20], y[:20], torch.ones(1, 20), 5)
    for p, q in zip(nets.parameters, alone.parameters):
        torch.testing.assert_close(p, q)


def test_quick(capsys):
    quality = example.main(["--quick"])
    printed = capsys.readouterr().out
    assert quality.keys() == example.REPRESENTATIONS.keys()
    assert all(-1 <= float(s.mean) <= 1 for row in quality.values() for s in row.values())
    assert all(name in printed for name in quality) and "halves" in printed
