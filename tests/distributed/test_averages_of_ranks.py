"""Averages of the weights over two ranks, under DDP and FSDP2, for both ways of sharing the work."""

from pathlib import Path
from typing import Any

import pytest
import ranks
from test_sharding import FULL, SHARDED, pytestmark, shared, skip_where_transformers_4_loads_nothing

__all__ = ["pytestmark", "shared"]

LOCAL = {"optim_args": "precondition_frequency=2,average_horizon=3"}
OWNER = {"optim_args": "precondition_frequency=2,average_horizon=3,shard_mode=owner"}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (SHARDED, {**LOCAL, "plain": True}),
        (SHARDED, OWNER),
        (None, LOCAL),
        pytest.param(FULL, LOCAL, marks=pytest.mark.slow),
        pytest.param(FULL, OWNER, marks=pytest.mark.slow),
        pytest.param(None, OWNER, marks=pytest.mark.slow),
        pytest.param(SHARDED, {**LOCAL, "dtype": "bfloat16"}, marks=pytest.mark.slow),
        pytest.param(SHARDED, {**LOCAL, "lora": True}, marks=pytest.mark.slow),
        pytest.param(SHARDED, {**LOCAL, "reshard_after_forward": False}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_ranks_evaluate_averages_and_resume(kind: str | None, settings: dict[str, Any], shared: Path) -> None:
    skip_where_transformers_4_loads_nothing(2, kind, lora="lora" in settings)
    ranks.run("sharded_trainer.trainer_averages", 2, shared, run="a", state_dict_type=kind, **settings)
