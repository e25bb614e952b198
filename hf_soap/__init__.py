"""SOAP, Shampoo and MARS for the Transformers Trainer.

Importing this package makes ``TrainingArguments(optim="soap")`` valid. The optimizers also work without a Trainer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_soap.config.configs import (
    CommonOptions,
    FactorOptions,
    KlShampooConfig,
    KlSoapConfig,
    MarsAdamWConfig,
    MarsConfig,
    MarsLionConfig,
    MarsMConfig,
    MarsShampooConfig,
    MarsSoapConfig,
    MuonConfig,
    ShampooConfig,
    SoapConfig,
    SoapMuonConfig,
)
from hf_soap.config.options import OptimizerConfig, option
from hf_soap.optimizers.base import ConfiguredOptimizer
from hf_soap.optimizers.mars import MARS
from hf_soap.optimizers.muon import Muon, SoapMuon
from hf_soap.optimizers.names import register
from hf_soap.optimizers.shampoo import Shampoo
from hf_soap.optimizers.soap import SOAP
from hf_soap.trainer import patches

if TYPE_CHECKING:
    from hf_soap.trainer.callbacks import SoapMetricsCallback
    from hf_soap.trainer.trainer import SoapTrainer, SoapTrainerMixin

__version__ = "0.1.0"
__all__ = [
    "MARS",
    "SOAP",
    "CommonOptions",
    "ConfiguredOptimizer",
    "FactorOptions",
    "KlShampooConfig",
    "KlSoapConfig",
    "MarsAdamWConfig",
    "MarsConfig",
    "MarsLionConfig",
    "MarsMConfig",
    "MarsShampooConfig",
    "MarsSoapConfig",
    "Muon",
    "MuonConfig",
    "OptimizerConfig",
    "Shampoo",
    "ShampooConfig",
    "SoapConfig",
    "SoapMetricsCallback",
    "SoapMuon",
    "SoapMuonConfig",
    "SoapTrainer",
    "SoapTrainerMixin",
    "option",
    "register",
]

patches.install()


def __getattr__(name: str) -> Any:
    # Importing the Trainer takes seconds, and an optimizer alone does not need it.
    if name in ("SoapTrainer", "SoapTrainerMixin"):
        try:
            from hf_soap.trainer import trainer
        except ModuleNotFoundError as error:
            if error.name != "jinja2":
                raise
            raise ModuleNotFoundError(f"{name} needs jinja2: pip install 'hf-soap[trainer]'", name="jinja2") from error

        return getattr(trainer, name)
    if name == "SoapMetricsCallback":
        from hf_soap.trainer.callbacks import SoapMetricsCallback

        return SoapMetricsCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
