"""A model without weights, and the param groups that the Trainer would create for it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import transformers
import typer
from torch import nn

HEADS = (
    "SpeechSeq2Seq",
    "ImageTextToText",
    "MultimodalLM",
    "Seq2SeqLM",
    "TextToWaveform",
    "CTC",
    # Decoders of the above, and encoders, are among the causal language models too.
    "MaskedLM",
    "CausalLM",
    "ObjectDetection",
    "SemanticSegmentation",
    "MaskGeneration",
    "DepthEstimation",
    "ZeroShotImageClassification",
    "ZeroShotObjectDetection",
    "ImageClassification",
    "VideoClassification",
    "AudioClassification",
    "TimeSeriesPrediction",
    "PreTraining",
)
"""Heads of ``AutoModelFor...`` in the order of preference: a whole model comes before its parts."""


class MetaModel(NamedTuple):
    """A model on the meta device, and how its class was chosen if none was named."""

    model: nn.Module
    chosen: str


def model_without_weights(
    source: str,
    *,
    model_class: str | None = None,
    dtype: str = "float32",
    lora_r: int | None = None,
    lora_targets: str | None = None,
) -> MetaModel:
    """Builds a model on the meta device from its config.

    Args:
        source: A config.json, a folder with one, or the name of a model on the Hub.
        model_class: A class of transformers. None uses the class that the config names, or else the first of
            :data:`HEADS` that can be built from the config, or else the model without a head.
        dtype: Dtype of the weights.
        lora_r: Rank of LoRA adapters, which are trained instead of the weights.
        lora_targets: Regular expression, or ``"all-linear"``, for the layers that get an adapter; None uses peft's
            default.

    Returns:
        The model and how its class was chosen.

    Raises:
        typer.BadParameter: If the config, the class or the dtype does not exist, transformers cannot build the class
            from the config, peft is not installed, or peft finds no layers to adapt.
    """
    try:
        config: Any = transformers.AutoConfig.from_pretrained(source)
    except Exception as error:  # transformers raises many kinds of errors for configs
        raise typer.BadParameter(
            f"got {source!r}, wanted a config.json, a folder with one, or the name of a model on the Hub: {error}"
        ) from error
    kind = getattr(torch, dtype, None)
    if not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise typer.BadParameter(f"got the dtype {dtype!r}, wanted float32, bfloat16 or float16")
    with torch.device("meta"):
        model, chosen = _build(config, model_class)
        model.to(kind)
        return MetaModel(model if lora_r is None else _with_adapters(model, lora_r, lora_targets), chosen)


def _build(config: Any, wanted: str | None) -> tuple[nn.Module, str]:
    named = wanted or next(iter(config.architectures or ()), None)
    cls = None if named is None else getattr(transformers, named, None)
    if wanted is not None and cls is None:
        raise typer.BadParameter(f"transformers has no class {wanted!r}; name another with --model-class")
    chosen = ""
    for candidate in _auto_classes(config) if cls is None else [cls]:
        if cls is None:
            names = "names no class" if named is None else f"names {named}, which transformers does not have"
            chosen = f"by {candidate.__name__}, because the config {names}; use --model-class for another"
        try:
            return (candidate.from_config if hasattr(candidate, "from_config") else candidate)(config), chosen
        except Exception as error:  # a model's code may raise anything for another model's config
            problem = f"transformers cannot build {candidate.__name__} from this config ({type(error).__name__}: "
            problem += f"{str(error).strip()[:300]}); name another class with --model-class"
    raise typer.BadParameter(problem)


def _auto_classes(config: Any) -> list[Any]:
    decodes = getattr(config, "is_decoder", False) and not getattr(config, "is_encoder_decoder", False)
    # Many encoders can be configured as decoders, and are then complete models.
    heads = ("CausalLM", *HEADS) if decodes else HEADS
    classes = [getattr(transformers, f"AutoModelFor{head}", None) for head in heads]
    return [*(auto for auto in classes if auto and type(config) in auto._model_mapping), transformers.AutoModel]


def _with_adapters(model: Any, r: int, targets: str | None) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError as error:
        raise typer.BadParameter("--lora-r needs peft: pip install 'hf-soap[peft]'") from error
    try:
        adapted: nn.Module = get_peft_model(model, LoraConfig(r=r, target_modules=targets))
    except Exception as error:  # of many kinds, if it cannot adapt a layer
        raise typer.BadParameter(f"{error} (--lora-targets all-linear takes every linear layer)") from error
    return adapted


def trainer_groups(model: Any) -> list[dict[str, Any]]:
    """Returns the param groups that the Trainer creates: parameters with weight decay, and those without."""
    # The method uses only the model, and a Trainer would need a model with weights.
    decaying = set(transformers.Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    trained = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    return [
        # Any decay but 0: only whether a group decays matters here.
        {"params": [param for name, param in trained if name in decaying], "weight_decay": 0.01},
        {"params": [param for name, param in trained if name not in decaying], "weight_decay": 0.0},
    ]
