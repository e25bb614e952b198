"""The names of the optimizers, and which class and options each means."""

from __future__ import annotations

from dataclasses import dataclass

from hf_soap.config import configs
from hf_soap.config.options import OptimizerConfig
from hf_soap.engine.optimizer import BlockOptimizer
from hf_soap.optimizers.mars import MARS
from hf_soap.optimizers.shampoo import Shampoo
from hf_soap.optimizers.soap import SOAP


@dataclass(frozen=True)
class Entry:
    """One registered name: the optimizer class and the config that its ``optim_args`` are read into."""

    optimizer: type[BlockOptimizer]
    config: type[OptimizerConfig]


MARS_CONFIGS: tuple[type[OptimizerConfig], ...] = (
    configs.MarsConfig,
    configs.MarsAdamWConfig,
    configs.MarsLionConfig,
    configs.MarsShampooConfig,
    configs.MarsSoapConfig,
    configs.MarsMConfig,
)

SOAP_CONFIGS: tuple[type[OptimizerConfig], ...] = (configs.SoapConfig, configs.KlSoapConfig)
SHAMPOO_CONFIGS: tuple[type[OptimizerConfig], ...] = (configs.ShampooConfig, configs.KlShampooConfig)

ENTRIES: dict[str, Entry] = {
    config.name: Entry(optimizer, config)
    for optimizer, listed in ((SOAP, SOAP_CONFIGS), (Shampoo, SHAMPOO_CONFIGS), (MARS, MARS_CONFIGS))
    for config in listed
}
