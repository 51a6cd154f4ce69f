"""Small models of attention, as torch has it."""

from __future__ import annotations

from torch import nn


class Attention(nn.Module):
    """Multi-head self-attention, batch first."""

    def __init__(self, **options):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True, **options), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class CrossAttention(nn.Module):
    """Attention with separate query, key and value projections, sequence first."""

    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, kdim=3, vdim=2), nn.Linear(4, 3)

    def forward(self, x):
        x = x.transpose(0, 1)
        return self.head(self.attention(x, x[..., :3], x[..., 2:])[0].mean(0))


class EncoderDecoder(nn.Module):
    """A standard decoder layer with a causal mask, looking at its input."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(4, 2, 5, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype, device=x.device)
        return self.head(self.layer(x, x.flip(1), tgt_mask=mask)).mean(1)


def transformer() -> nn.Module:
    """A standard encoder layer."""
    return nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True)
