"""Tiny models of the families that plans are checked on, with a batch for each."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

BERT = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {**BERT, "vocab_size": 96, "num_key_value_heads": 1}
T5 = {
    "vocab_size": 96,
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 56,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None}

MODELS: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=96, n_positions=16, n_embd=32, n_layer=2, n_head=2, **NO_TOKENS)),
    "llama": (LlamaForCausalLM, LlamaConfig(**LLAMA)),
    "mixtral": (MixtralForCausalLM, MixtralConfig(**LLAMA, num_local_experts=4)),
    "bert": (BertForMaskedLM, BertConfig(**BERT, vocab_size=96, max_position_embeddings=16)),
    "t5": (T5ForConditionalGeneration, T5Config(**T5)),
    "vit": (ViTForImageClassification, ViTConfig(**BERT, image_size=8, patch_size=4, num_labels=3)),
}


def model(name: str) -> PreTrainedModel:
    """A model with weights."""
    cls, config = MODELS[name]
    torch.manual_seed(0)
    return cls(config)


def batch(name: str) -> dict[str, torch.Tensor]:
    """What one of them is trained on."""
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8), "labels": torch.tensor([0, 2])}
    tokens = torch.arange(24).reshape(2, 12)
    return {"input_ids": tokens, "labels": tokens}


def save_config(name: str, folder: Any) -> str:
    """Writes its config.json, and nothing else, into a folder, whose name is returned."""
    cls, config = MODELS[name]
    config.architectures = [cls.__name__]
    config.save_pretrained(folder)
    return str(folder)


def kept_bytes(optimizer: Any) -> int:
    """Bytes of the storages that an optimizer's state lies in on this rank."""
    kept = {v.untyped_storage().data_ptr(): v for state in optimizer.state.values() for v in state.values()}
    return sum(value.untyped_storage().nbytes() for value in kept.values())
