"""A likelihood: counts of failures before a success."""

import torch
from torch.nn import functional as F

import nngeom as nng


class Geometric(nng.Likelihood):
    """``p(y) = p (1 - p)**y``; outputs ``(n, *shape)`` are logits of the probability ``p`` of success.

    The score is ``(1 - p) - y p`` and its variance ``1 - p``.
    """

    def square_root(self, outputs, targets=None):
        """For the exact Fisher matrix: ``v [k, n, *shape]`` with ``sum_k v_k v_k^T`` that of the outputs."""
        root = torch.sigmoid(-outputs).sqrt().flatten(1)
        return torch.diag_embed(root).transpose(0, 1).reshape(-1, *outputs.shape)

    def sample(self, outputs, uniform):
        """For Monte-Carlo ones: counts, drawn with the stream ``uniform`` of numbers in (0, 1) and nothing else."""
        u = uniform(*outputs.shape[1:])
        return (u.log() / F.logsigmoid(-outputs.double())).floor().to(outputs)

    def log_prob(self, outputs, targets):
        """``(n,)``, differentiable in the outputs."""
        return (F.logsigmoid(outputs) + targets * F.logsigmoid(-outputs)).flatten(1).sum(1)
