"""The part of ``hf-soap run`` that runs in the process of the started program."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from hf_soap.hub import recipes
from hf_soap.trainer import patches

logger = logging.getLogger(__name__)


def start(argv: Sequence[str], *, module: bool = False) -> None:
    """Records the program's command line, and makes every Trainer that trains in this process write its recipe.

    Args:
        argv: The command line, like ``sys.argv``.
        module: Whether its first item is the name of a module, for ``-m``.
    """
    recipes.remember(argv, module=module)
    if _follow not in patches.BEFORE_TRAINING:
        patches.BEFORE_TRAINING.append(_follow)


def _follow(trainer: Any) -> None:
    try:
        from hf_soap.hub import cards  # here: it imports transformers, and most processes of a launcher do not train

        patches.extend_cards(type(trainer))
        cards.follow(trainer)
    except Exception as error:
        logger.warning("no recipe and no model card will be written: %s", error)
