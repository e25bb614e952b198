"""A model without weights, and the param groups that the Trainer would make of it."""

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
    # Decoders of the above are among the causal language models too, and so are encoders.
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
"""Heads of ``AutoModelFor...`` in the order in which one is chosen: the whole model before a part of it."""


class MetaModel(NamedTuple):
    """A model of which nothing is allocated, and how its class was chosen where nobody named one."""

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
        model_class: A class of transformers; None takes the one that the config names, else the first of
            :data:`HEADS` that can be built from such a config, else the model without a head.
        dtype: Dtype of the weights.
        lora_r: Rank of the LoRA adapters that are trained in place of the weights.
        lora_targets: Regular expression, or ``"all-linear"``, for the layers that get one; None takes peft's choice.

    Returns:
        The model and how its class was chosen.

    Raises:
        typer.BadParameter: If there is no such config, class or dtype, transformers cannot build the class from the
            config, or peft is missing or knows no layers of this model.
    """
    try:
        config: Any = transformers.AutoConfig.from_pretrained(source)
    except Exception as error:  # transformers checks configs in many ways
        raise typer.BadParameter(
            f"got {source!r}, wanted a config.json, a folder with one, or the name of a model on the Hub: {error}"
        ) from error
    kind = getattr(torch, dtype, None)
    if not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise typer.BadParameter(f"got the dtype {dtype!r}, wanted float32, bfloat16 or float16")
    with torch.device("meta"):
        model, chosen = _built(config, model_class)
        model.to(kind)
        return MetaModel(model if lora_r is None else _with_adapters(model, lora_r, lora_targets), chosen)


def _built(config: Any, wanted: str | None) -> tuple[nn.Module, str]:
    named = wanted or next(iter(config.architectures or ()), None)
    cls = None if named is None else getattr(transformers, named, None)
    if wanted is not None and cls is None:
        raise typer.BadParameter(f"transformers has no class {wanted!r}; name another with --model-class")
    chosen = ""
    for candidate in _autos(config) if cls is None else [cls]:
        if cls is None:
            names = "names no class" if named is None else f"names {named}, which transformers does not have"
            chosen = f"by {candidate.__name__}, since the config {names}; --model-class takes another"
        try:
            return (candidate.from_config if hasattr(candidate, "from_config") else candidate)(config), chosen
        except Exception as error:  # whatever the code of a model raises for a config that is not its own
            problem = f"transformers cannot build {candidate.__name__} from this config ({type(error).__name__}: "
            problem += f"{str(error).strip()[:300]}); name another class with --model-class"
    raise typer.BadParameter(problem)


def _autos(config: Any) -> list[Any]:
    decodes = getattr(config, "is_decoder", False) and not getattr(config, "is_encoder_decoder", False)
    # Many an encoder may be made a decoder, which is then one by itself.
    heads = ("CausalLM", *HEADS) if decodes else HEADS
    autos = [getattr(transformers, f"AutoModelFor{head}", None) for head in heads]
    return [*(auto for auto in autos if auto and type(config) in auto._model_mapping), transformers.AutoModel]


def _with_adapters(model: Any, r: int, targets: str | None) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError as error:
        raise typer.BadParameter("--lora-r needs peft: pip install 'hf-soap[peft]'") from error
    try:
        adapted: nn.Module = get_peft_model(model, LoraConfig(r=r, target_modules=targets))
    except Exception as error:  # of many kinds, for layers that it cannot adapt
        raise typer.BadParameter(f"{error} (--lora-targets all-linear takes every linear layer)") from error
    return adapted


def trainer_groups(model: Any) -> list[dict[str, Any]]:
    """Returns the param groups that the Trainer makes: weights that decay, and those that do not."""
    # The method looks at the model alone, and a Trainer would want the model to have weights.
    decaying = set(transformers.Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    trained = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    return [
        # Any decay but none: the argument that says how much is the Trainer's.
        {"params": [param for name, param in trained if name in decaying], "weight_decay": 0.01},
        {"params": [param for name, param in trained if name not in decaying], "weight_decay": 0.0},
    ]
