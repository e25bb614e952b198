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


@pytest.mark.parametrize("kind", [SHARDED, pytest.param(FULL, marks=pytest.mark.slow)])
def test_averages_start_and_end_on_resume(kind: str, shared: Path) -> None:
    """The checkpoint lacks what the run has, or has what the run lacks, and FSDP loads neither."""
    ranks.run("sharded_trainer.averages_are_switched", 2, shared, state_dict_type=kind)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"), [((2, SHARDED), (1, None)), ((1, None), (2, SHARDED)), ((2, FULL), (3, SHARDED))], ids=str
)
def test_averages_go_on_with_other_ranks(
    before: tuple[int, str | None], after: tuple[int, str | None], shared: Path
) -> None:
    """Without factors, so that nothing is estimated: from the averages, the losses would differ by a percent."""
    settings = {"run": "a", "optim": "mars", "optim_args": "average_horizon=3", "dropout": False}
    ranks.run("sharded_trainer.trainer_resumes", before[0], shared, state_dict_type=before[1], **settings)
    ranks.run(
        "sharded_trainer.trainer_goes_on", after[0], shared, state_dict_type=after[1], tolerance=1e-3, **settings
    )
