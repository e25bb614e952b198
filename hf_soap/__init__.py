"""SOAP, Shampoo and MARS for the Transformers Trainer.

Importing this package makes ``TrainingArguments(optim="soap")`` valid; the optimizers also work on their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_soap import extension
from hf_soap.configs import (
    KlShampooConfig,
    KlSoapConfig,
    MarsAdamWConfig,
    MarsConfig,
    MarsLionConfig,
    MarsMConfig,
    MarsShampooConfig,
    MarsSoapConfig,
    ShampooConfig,
    SoapConfig,
)
from hf_soap.optimizers import MARS, SOAP, Shampoo
from hf_soap.schema import OptimizerConfig

if TYPE_CHECKING:
    from hf_soap.callbacks import SoapMetricsCallback
    from hf_soap.trainer import SoapTrainer, SoapTrainerMixin

__version__ = "0.1.0"
__all__ = [
    "MARS",
    "SOAP",
    "KlShampooConfig",
    "KlSoapConfig",
    "MarsAdamWConfig",
    "MarsConfig",
    "MarsLionConfig",
    "MarsMConfig",
    "MarsShampooConfig",
    "MarsSoapConfig",
    "OptimizerConfig",
    "Shampoo",
    "ShampooConfig",
    "SoapConfig",
    "SoapMetricsCallback",
    "SoapTrainer",
    "SoapTrainerMixin",
]

extension.install()


def __getattr__(name: str) -> Any:
    # The Trainer takes seconds to import, and an optimizer alone does not need it.
    if name in ("SoapTrainer", "SoapTrainerMixin"):
        try:
            from hf_soap import trainer
        except ModuleNotFoundError as error:
            if error.name != "jinja2":
                raise
            raise ModuleNotFoundError(f"{name} needs jinja2: pip install 'hf-soap[trainer]'", name="jinja2") from error

        return getattr(trainer, name)
    if name == "SoapMetricsCallback":
        from hf_soap.callbacks import SoapMetricsCallback

        return SoapMetricsCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
