"""Small random configurations of the architectures of ``transformers``: from config classes, nothing is downloaded.

A new one is a line in ``ZOO``: family, kind of batch, model class and options of its config; sizes are drawn.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import transformers as T
from torch import Tensor, nn

from examples.architecture_sizes import (
    CLASSES,
    VOCABULARY,
    Size,
    captioned,
    filterbank,
    griffin,
    image,
    pair,
    pyramid,
    rwkv,
    spectrogram,
    spectrum,
    text,
    two_towers,
    unmasked,
    wave,
    windows,
    xlnet,
)

SHARED = {"moe_intermediate_size": 6, "shared_expert_intermediate_size": 6}
EXPERTS = {"num_local_experts": 3, "num_experts": 3, "n_routed_experts": 3, "num_experts_per_tok": 2}
CNN = {"num_labels": CLASSES, "embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1]}
STATE = {"state_size": 4, "expand": 2, "conv_kernel": 3, "time_step_rank": 2}
SCAN = {"n_groups": 1, "num_heads": 4, "head_dim": 4, "chunk_size": 4}
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
MEL = {"num_mel_bins": 6, "max_source_positions": 8, "max_target_positions": 8}
LATENT = {
    "q_lora_rank": 6,
    "kv_lora_rank": 6,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 6,
    "first_k_dense_replace": 0,
}

Options = Callable[[Size], dict[str, Any]]
Make = Callable[[Size], tuple[str, str, dict[str, Any]]]


def of(name: str, head: str, options: Options, **more: Any) -> Make:
    """``<name>Config`` and ``<name><head>``."""
    return lambda size: (f"{name}{head}", f"{name}Config", {**options(size), **more})


CLASSIFIER, CAUSAL = "ForSequenceClassification", "ForCausalLM"
CONDITIONAL, IMAGE = "ForConditionalGeneration", "ForImageClassification"
no_inner: Options = lambda s: {k: v for k, v in s.text.items() if k != "intermediate_size"}
one_key: Options = lambda s: {**s.text, "num_key_value_heads": 1}
all_keys: Options = lambda s: {**s.text, "num_key_value_heads": s.heads}
plain_text, grouped, bart, t5, pixels, speech = (
    lambda s: s.text,
    lambda s: s.grouped,
    lambda s: s.bart,
    lambda s: s.t5,
    lambda s: s.image,
    lambda s: s.speech,
)
ZOO: dict[str, tuple[str, Callable[[Size], dict[str, Tensor]], Make]] = {
    "BERT": ("encoder", text, of("Bert", CLASSIFIER, plain_text)),
    "RoBERTa": ("encoder", text, of("Roberta", CLASSIFIER, plain_text)),
    "ALBERT": ("encoder", text, of("Albert", "ForMaskedLM", plain_text, embedding_size=6)),
    "DistilBERT": ("encoder", text, of("DistilBert", CLASSIFIER, plain_text, hidden_dim=10)),
    "ELECTRA": ("encoder", text, of("Electra", "ForTokenClassification", plain_text, embedding_size=6)),
    "DeBERTa v2": ("encoder", text, of("DebertaV2", CLASSIFIER, plain_text, **RELATIVE)),
    "ConvBERT": ("encoder", text, of("ConvBert", CLASSIFIER, plain_text, embedding_size=8, head_ratio=1)),
    "ModernBERT": ("encoder", text, of("ModernBert", CLASSIFIER, plain_text, cls_token_id=1, sep_token_id=2)),
    "FNet": ("encoder", unmasked, of("FNet", CLASSIFIER, plain_text)),
    "XLNet": ("encoder", text, of("XLNet", CLASSIFIER, xlnet)),
    "GPT-2": ("decoder", text, of("GPT2", "LMHeadModel", no_inner)),
    "GPT-NeoX": ("decoder", text, of("GPTNeoX", CAUSAL, plain_text)),
    "GPT-J": ("decoder", text, of("GPTJ", CAUSAL, no_inner, rotary_dim=4)),
    "OPT": ("decoder", text, of("OPT", CAUSAL, plain_text, word_embed_proj_dim=8, ffn_dim=10)),
    "BLOOM": ("decoder", text, of("Bloom", CAUSAL, plain_text)),
    "Llama": ("decoder", text, of("Llama", CAUSAL, grouped)),
    "Qwen 3": ("decoder", text, of("Qwen3", CAUSAL, grouped)),
    "Gemma 2": ("decoder", text, of("Gemma2", CAUSAL, grouped, query_pre_attn_scalar=4)),
    "Phi": ("decoder", text, of("Phi", CAUSAL, plain_text)),
    "Falcon": ("decoder", text, of("Falcon", CAUSAL, plain_text)),
    "Mixtral": ("mixture of experts", text, of("Mixtral", CAUSAL, grouped, **EXPERTS)),
    "Qwen 2 MoE": ("mixture of experts", text, of("Qwen2Moe", CAUSAL, grouped, **EXPERTS, **SHARED)),
    "OLMoE": ("mixture of experts", text, of("Olmoe", CAUSAL, one_key, **EXPERTS)),
    "GPT-OSS": ("mixture of experts", text, of("GptOss", CAUSAL, grouped, **EXPERTS)),
    "DeepSeek v3": ("mixture of experts", text, of("DeepseekV3", CAUSAL, all_keys, **EXPERTS, **LATENT)),
    "Switch": ("mixture of experts", pair, of("SwitchTransformers", CONDITIONAL, t5, num_experts=3, expert_capacity=4)),
    "Mamba": ("state space", text, of("Mamba", CAUSAL, plain_text, **STATE)),
    "Mamba 2": ("state space", text, of("Mamba2", CAUSAL, lambda s: {**s.text, "hidden_size": 8}, **STATE, **SCAN)),
    "RWKV": ("state space", unmasked, of("Rwkv", CAUSAL, rwkv)),
    "RecurrentGemma": ("state space", text, of("RecurrentGemma", CAUSAL, griffin)),
    "T5": ("encoder-decoder", pair, of("T5", CONDITIONAL, t5)),
    "BART": ("encoder-decoder", pair, of("Bart", CONDITIONAL, bart)),
    "Marian": ("encoder-decoder", pair, of("Marian", "MTModel", bart)),
    "M2M-100": ("encoder-decoder", pair, of("M2M100", CONDITIONAL, bart)),
    "Pegasus": ("encoder-decoder", pair, of("Pegasus", CONDITIONAL, bart)),
    "ViT": ("vision", image(8), of("ViT", IMAGE, pixels)),
    "BEiT": ("vision", image(8), of("Beit", IMAGE, pixels, vocab_size=VOCABULARY, use_relative_position_bias=True)),
    "Swin": ("vision", image(16), of("Swin", IMAGE, windows)),
    "ConvNeXt v2": ("vision", image(16), of("ConvNextV2", IMAGE, lambda s: {**CNN, "num_stages": 2, "patch_size": 2})),
    "ResNet": ("vision", image(16), of("ResNet", IMAGE, lambda s: CNN, layer_type="basic")),
    "SegFormer": ("vision", image(16), of("Segformer", "ForSemanticSegmentation", pyramid)),
    "wav2vec 2.0": ("speech", wave, of("Wav2Vec2", "ForCTC", speech)),
    "HuBERT": ("speech", wave, of("Hubert", CLASSIFIER, speech)),
    "Whisper": ("speech", spectrum, of("Whisper", CONDITIONAL, bart, **MEL)),
    "AST": ("speech", filterbank, of("AST", "ForAudioClassification", spectrogram)),
    "CLIP": ("multimodal", captioned(8), of("CLIP", "Model", two_towers)),
    "CLIP, similarities": ("multimodal", captioned(8), of("CLIP", "Model", two_towers)),
    "SigLIP": ("multimodal", captioned(8), of("Siglip", "Model", two_towers)),
    "ViLT": ("multimodal", captioned(8), of("Vilt", "ForQuestionAnswering", lambda s: {**s.text, **s.image})),
    "GIT": ("multimodal", captioned(8), of("Git", CAUSAL, lambda s: {**s.text, "vision_config": s.image})),
}


def build(name: str, seed: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model in float64 and evaluation mode, with random weights, and a batch; the same for the same seed."""
    torch.manual_seed(seed)
    size = Size.draw(random.Random(f"{name} {seed}"))
    _, batch, make = ZOO[name]
    model_class, config_class, options = make(size)
    model = getattr(T, model_class)(getattr(T, config_class)(**options)).double().eval()
    for config in (model.config, *(getattr(model.config, k, None) for k in ("text_config", "vision_config"))):
        if config is not None:
            config.use_cache, config._experts_implementation = False, "eager"  # the fused experts have no float64
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model, batch(size)
