"""The keys of a recipe and their values: fields of TrainingArguments, and options of training scripts."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import fields
from enum import Enum
from functools import cache
from typing import Any, Literal

from hf_soap.config import options
from hf_soap.hub.safety import PROVENANCE, problem_of_key
from hf_soap.optimizers.names import ENTRIES

SCRIPT_KEYS: dict[str, Any] = {
    # the model
    "model_name_or_path": str,
    "model_revision": str,
    "model_type": str,
    "config_name": str,
    "config_overrides": str,
    "dtype": str,
    "torch_dtype": str,
    "attn_implementation": str,
    "load_in_4bit": bool,
    "load_in_8bit": bool,
    "bnb_4bit_quant_type": str,
    "use_bnb_nested_quant": bool,
    # its tokenizer
    "tokenizer_name": str,
    "train_tokenizer_vocab": int,
    "use_fast_tokenizer": bool,
    "chat_template_path": str,
    "eos_token": str,
    "pad_token": str,
    # its adapters
    "use_peft": bool,
    "lora_r": int,
    "lora_alpha": int,
    "lora_dropout": float,
    "lora_target_modules": list[str],
    "lora_target_parameters": list[str],
    "lora_modules_to_save": list[str],
    "lora_task_type": str,
    "use_rslora": bool,
    "use_dora": bool,
    # the data
    "dataset_name": str,
    "dataset_config": str,
    "dataset_config_name": str,
    "dataset_train_split": str,
    "dataset_test_split": str,
    "dataset_text_field": str,
    "dataset_streaming": bool,
    "dataset_num_proc": int,
    "train_files": list[str],
    "eval_files": list[str],
    "train_file": str,
    "validation_file": str,
    "validation_split_percentage": int,
    "eval_split": str,
    "eval_share": float,
    "eval_blocks": int,
    "text_column": str,
    "block_size": int,
    "mlm_probability": float,
    "image_column": str,
    "label_column": str,
    "streaming": bool,
    "keep_linebreaks": bool,
    "max_train_samples": int,
    "max_eval_samples": int,
    "preprocessing_num_workers": int,
    # what TRL's SFTConfig adds
    "max_length": int,
    "truncation_mode": str,
    "shuffle_dataset": bool,
    "packing": bool,
    "packing_strategy": str,
    "padding_free": bool,
    "eval_packing": bool,
    "completion_only_loss": bool,
    "assistant_only_loss": bool,
    "loss_type": str,
    "pad_to_multiple_of": int | str,
    "router_aux_loss_coef": float,
    "activation_offloading": bool,
}
"""Options of training scripts that are not in TrainingArguments: of ``scripts/run_*.py``, of transformers'
``run_clm.py`` and of TRL's ``sft``."""

_Range = tuple[float, float]
_COUNT: _Range = (1, 1e9)

RANGES: dict[str, _Range] = {
    "learning_rate": (0, 1e3),
    "weight_decay": (0, 1e3),
    "max_grad_norm": (0, 1e9),
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "adam_epsilon": (0, 1),
    "label_smoothing_factor": (0, 1),
    "warmup_steps": (0, 1e9),
    "warmup_ratio": (0, 1),
    "num_train_epochs": (0, 1e6),
    "max_steps": (-1, 1e9),
    "seed": (0, 2**32 - 1),
    "data_seed": (0, 2**32 - 1),
    "per_device_train_batch_size": (1, 1e6),
    "per_device_eval_batch_size": (1, 1e6),
    "gradient_accumulation_steps": (1, 1e6),
    "dataloader_num_workers": (0, 256),
    "dataset_num_proc": (1, 256),
    "preprocessing_num_workers": (1, 256),
    "lora_r": (0, 1e5),
    "lora_alpha": (0, 1e6),
    "lora_dropout": (0, 1),
    "eval_share": (0, 1),
    "mlm_probability": (0, 1),
    "block_size": _COUNT,
    "max_length": _COUNT,
    "eval_blocks": _COUNT,
    "train_tokenizer_vocab": _COUNT,
}
"""Smallest and largest values of keys for which others would harm the machine or are certainly a mistake."""


def mistakes(recipe: Mapping[str, Any], allowed: Iterable[str] = ()) -> list[str]:
    """Lists the keys of a recipe that the Trainer would refuse: unknown keys, wrong types, values out of range.

    Args:
        recipe: A recipe in which :func:`hf_soap.hub.safety.refusals` finds nothing.
        allowed: Additional keys to accept, which are options of the user's script.

    Returns:
        One line per key: what was got, what is wanted, and the remedy.
    """
    known = key_types()
    allowed = set(allowed)
    found = []
    for key, value in recipe.items():
        if key == PROVENANCE or (key in allowed and key not in known):
            continue
        if key not in known:
            problem = f"unknown key; {options.nearest(key, known)}An option of your own script needs --allow-key {key}"
        else:
            problem = _misfit(value, known[key]) or _out_of_range(key, value)
        if problem:
            found.append(f"{key}: {problem}")
    return found + _in_optimizer(recipe)


@cache
def key_types() -> dict[str, Any]:
    """Returns the type of every key: the fields of TrainingArguments, and :data:`SCRIPT_KEYS`."""
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    names = [entry.name for entry in fields(TrainingArguments) if entry.init]
    return SCRIPT_KEYS | {name: hints[name] for name in names if not name.startswith("_") and not problem_of_key(name)}


def _misfit(value: Any, hint: Any) -> str:
    alternatives = _alternatives(hint)
    if any(_fits(value, kind) for kind in alternatives):
        return ""
    choices = [str(member.value) for kind in alternatives if _is_enum(kind) for member in kind]
    if choices:
        near = options.nearest(str(value), choices)
        return f"got {options.shown(value)}, wanted one of {', '.join(choices)}; {near}".rstrip("; ")
    wanted = " or ".join(dict.fromkeys(_type_name(kind) for kind in alternatives if kind is not type(None)))
    quote = "; put it in quotes" if "text" in wanted and not isinstance(value, (str, list)) else ""
    return f"got {options.shown(value)}, wanted {wanted}{quote}"


def _alternatives(hint: Any) -> list[Any]:
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    kinds = list(typing.get_args(hint)) if union else [hint]
    # In "an enumeration or text" the text names a member; in "a dictionary or text" it is JSON.
    closed = any(_is_enum(kind) or _origin(kind) is dict for kind in kinds)
    return [kind for kind in kinds if not (closed and kind is str)]


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def _origin(kind: Any) -> Any:
    return typing.get_origin(kind) or kind


def _fits(value: Any, kind: Any) -> bool:
    origin = _origin(kind)
    if origin is Literal:
        return value in typing.get_args(kind)
    if _is_enum(kind):
        return value in [member.value for member in kind]
    if isinstance(value, bool) or origin is bool:
        return isinstance(value, bool) and origin is bool
    if origin is dict:
        return isinstance(value, str) and value.startswith("{")
    accepted = {float: (int, float), list: (str, list)}
    return isinstance(value, accepted.get(origin, origin))


def _type_name(kind: Any) -> str:
    names = {bool: "true or false", str: "text", int: "a whole number", float: "a number"}
    names |= {list: "a list of text", dict: "a JSON object as text"}
    return names.get(_origin(kind), str(kind))


def _out_of_range(key: str, value: Any) -> str:
    if key in RANGES and isinstance(value, (int, float)):
        low, high = RANGES[key]
        if not low <= value <= high:
            return f"got {value!r}, wanted {low:g} to {high:g}"
    return ""


def _in_optimizer(recipe: Mapping[str, Any]) -> list[str]:
    name, text = recipe.get("optim"), recipe.get("optim_args")
    if name not in ENTRIES or not isinstance(text, str):
        return []
    try:
        options.parse_optim_args(text, ENTRIES[str(name)].config)
    except ValueError as error:
        return [f"optim_args: {error}"]
    return []
