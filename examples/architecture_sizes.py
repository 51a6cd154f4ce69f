"""What is drawn for a small model, as the families of ``transformers`` name it, and the batches that go with it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

VOCABULARY, EXAMPLES, CLASSES = 24, 3, 3


@dataclass(frozen=True)
class Size:
    """What is drawn for one model."""

    width: int
    heads: int
    layers: int
    inner: int
    tokens: int

    @staticmethod
    def draw(rng: random.Random) -> Size:
        """Small."""
        return Size(*map(rng.choice, ((8, 16), (1, 2), (1, 2), (10, 14, 20), (4, 5, 7))))

    @property
    def text(self) -> dict[str, Any]:
        """Options that nearly all configurations of language models know, under these or their own names."""
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        return {**self.plain, **ids, "vocab_size": VOCABULARY, "max_position_embeddings": 16, "num_labels": CLASSES}

    @property
    def plain(self) -> dict[str, Any]:
        """Options of a stack of attention layers."""
        stack = {"num_hidden_layers": self.layers, "num_attention_heads": self.heads}
        return {**stack, "hidden_size": self.width, "intermediate_size": self.inner}

    @property
    def grouped(self) -> dict[str, Any]:
        """The same with one group of keys and values, as newer decoders have."""
        return {**self.text, "num_key_value_heads": 1, "head_dim": 4}

    @property
    def bart(self) -> dict[str, Any]:
        """Encoder and decoder, as the BART family names them."""
        both = lambda name, value: {f"encoder_{name}": value, f"decoder_{name}": value}
        stacks = both("layers", self.layers) | both("attention_heads", self.heads) | both("ffn_dim", self.inner)
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
        return {"d_model": self.width, **stacks, **ids, "vocab_size": VOCABULARY, "max_position_embeddings": 16}

    @property
    def t5(self) -> dict[str, Any]:
        """As T5 names it."""
        ids = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 1}
        sizes = {"d_model": self.width, "d_ff": self.inner, "num_layers": self.layers, "num_heads": self.heads}
        return {**sizes, **ids, "d_kv": 4, "vocab_size": VOCABULARY}

    @property
    def image(self) -> dict[str, Any]:
        """Patches of small images."""
        return {**self.plain, "image_size": 8, "patch_size": 4, "num_labels": CLASSES}

    @property
    def speech(self) -> dict[str, Any]:
        """Convolutions over a waveform, then attention."""
        layers = {"conv_dim": (8, 8), "conv_kernel": (4, 3), "conv_stride": (4, 2), "num_feat_extract_layers": 2}
        positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
        return {**self.text, **layers, **positions, "apply_spec_augment": False, "classifier_proj_size": 6}


def text(size: Size) -> dict[str, Tensor]:
    """Token ids and a mask that hides the end of one sequence."""
    mask = torch.ones(EXAMPLES, size.tokens, dtype=torch.long)
    mask[1, size.tokens - 1 :] = 0
    return {"input_ids": torch.randint(3, VOCABULARY, mask.shape), "attention_mask": mask}


def pair(size: Size) -> dict[str, Tensor]:
    """A source and a target."""
    return {**text(size), "decoder_input_ids": torch.randint(3, VOCABULARY, (EXAMPLES, 4))}


def unmasked(size: Size) -> dict[str, Tensor]:
    """Token ids alone."""
    return {"input_ids": torch.randint(3, VOCABULARY, (EXAMPLES, size.tokens))}


def filterbank(size: Size) -> dict[str, Tensor]:
    """A spectrogram of twelve frames."""
    return {"input_values": torch.randn(EXAMPLES, 12, 8, dtype=torch.float64)}


def image(side: int) -> Callable[[Size], dict[str, Tensor]]:
    """Normal pixels."""
    return lambda size: {"pixel_values": torch.randn(EXAMPLES, 3, side, side, dtype=torch.float64)}


def wave(size: Size) -> dict[str, Tensor]:
    """A short waveform."""
    return {"input_values": torch.randn(EXAMPLES, 90, dtype=torch.float64)}


def spectrum(size: Size) -> dict[str, Tensor]:
    """Mel features and a transcript."""
    features = torch.randn(EXAMPLES, 6, 16, dtype=torch.float64)
    return {"input_features": features, "decoder_input_ids": torch.randint(3, VOCABULARY, (EXAMPLES, 4))}


def captioned(side: int) -> Callable[[Size], dict[str, Tensor]]:
    """An image and a text."""
    return lambda size: {**text(size), **image(side)(size)}


def two_towers(size: Size) -> dict[str, Any]:
    """A text and an image encoder."""
    return {"text_config": size.text, "vision_config": size.image, "projection_dim": 6}


def xlnet(size: Size) -> dict[str, Any]:
    """As XLNet names it."""
    sizes = {"d_model": size.width, "n_head": size.heads, "n_layer": size.layers, "d_inner": size.inner}
    return {**sizes, "vocab_size": VOCABULARY, "pad_token_id": 0, "num_labels": CLASSES}


def rwkv(size: Size) -> dict[str, Any]:
    """At least two layers: their depth is divided by."""
    return {**size.text, "attention_hidden_size": size.width, "num_hidden_layers": 2}


def windows(size: Size) -> dict[str, Any]:
    """Two stages of shifted windows."""
    stages = {"embed_dim": 4, "depths": [1, 2], "num_heads": [1, 2], "window_size": 2}
    return {"image_size": 16, "patch_size": 2, "num_labels": CLASSES, **stages}


def pyramid(size: Size) -> dict[str, Any]:
    """Two stages of overlapping patches."""
    stages = {"depths": [1, 1], "hidden_sizes": [8, 8], "sr_ratios": [2, 1], "patch_sizes": [3, 3], "strides": [2, 2]}
    heads = {"num_encoder_blocks": 2, "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 8}
    return {**stages, **heads, "num_labels": CLASSES}


def spectrogram(size: Size) -> dict[str, Any]:
    """Patches of a spectrogram."""
    patches = {"patch_size": 4, "frequency_stride": 4, "time_stride": 4, "max_length": 12, "num_mel_bins": 8}
    return {**size.plain, **patches, "num_labels": CLASSES}


def griffin(size: Size) -> dict[str, Any]:
    """A recurrent block and one of local attention."""
    blocks = {"num_hidden_layers": 2, "block_types": ["recurrent", "attention"], "attention_window_size": 4}
    return {**size.text, **blocks, "lru_width": size.width, "head_dim": 4, "num_key_value_heads": 1}
