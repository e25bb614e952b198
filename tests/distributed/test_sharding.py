"""FSDP2 on gloo, with real processes: two and three of them."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from packaging import version
from tiny import TRANSFORMERS_4

pytestmark = pytest.mark.skipif(
    version.parse(torch.__version__) < version.parse("2.8"), reason="fully_shard did not run on CPUs before"
)

FULL, SHARDED = "FULL_STATE_DICT", "SHARDED_STATE_DICT"
FEW = ["soap", "shampoo", "mars"]


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that all processes see."""
    monkeypatch.setenv("SHARED_FOLDER", str(tmp_path))
    return tmp_path


def skip_where_transformers_4_loads_nothing(count: int, kind: str | None, *, lora: bool = False) -> None:
    if TRANSFORMERS_4 and ((count > 1 and kind is None) or (kind == FULL and lora)):
        pytest.skip("transformers 4 loads neither state under DDP on CPUs nor whole adapters under FSDP2, AdamW's too")


@pytest.mark.parametrize("count", [2, 3])
def test_a_resumed_run_equals_the_uninterrupted_one(count: int, shared: Path) -> None:
    """With uneven and empty shards; FULL gave every rank the state of rank 0, SHARDED that of another."""
    ranks.run("sharded.resumed_equals_uninterrupted", count, shared, dtype="float32", names=FEW)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("count", [2, 3])
def test_every_optimizer_resumes(count: int, dtype: str, shared: Path) -> None:
    ranks.run("sharded.resumed_equals_uninterrupted", count, shared, dtype=dtype)


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2), (2, 1), (1, 2)])
def test_a_run_goes_on_with_other_ranks(before: int, after: int, shared: Path) -> None:
    ranks.run("sharded.save_for_others", before, shared, names=FEW)
    ranks.run("sharded.goes_on_from_others", after, shared, names=FEW)


@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_the_trainer_resumes_under_fsdp(kind: str, shared: Path) -> None:
    ranks.run("sharded_trainer.trainer_resumes", 2, shared, run="a", state_dict_type=kind, plain=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT", None])
@pytest.mark.parametrize(
    "settings",
    [
        {"optim": "soap"},
        {"optim": "soap", "dtype": "bfloat16"},
        {"optim": "soap", "lora": True},
        {"optim": "shampoo", "optim_args": "precondition_frequency=2,start_step=2,asynchronous=true,delay=2"},
        {"optim": "mars"},
        {"optim": "mars", "optim_args": "exact=true"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_every_kind_of_run_resumes(kind: str | None, settings: dict[str, Any], shared: Path) -> None:
    skip_where_transformers_4_loads_nothing(3, kind, lora="lora" in settings)
    ranks.run("sharded_trainer.trainer_resumes", 3, shared, run="a", state_dict_type=kind, **settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, FULL), (3, FULL)),
        ((3, SHARDED), (2, SHARDED)),
        ((2, FULL), (2, SHARDED)),
        ((2, SHARDED), (3, FULL)),
        ((1, None), (2, FULL)),
        ((1, None), (2, SHARDED)),
        ((2, FULL), (1, None)),
        ((2, SHARDED), (1, None)),
        ((2, None), (2, SHARDED)),
    ],
    ids=str,
)
@pytest.mark.parametrize("optim", ["soap"])
def test_the_trainer_goes_on_with_other_ranks(
    before: tuple[int, str | None], after: tuple[int, str | None], optim: str, shared: Path
) -> None:
    """Without dropout: its random numbers depend on the rank."""
    skip_where_transformers_4_loads_nothing(*before)
    skip_where_transformers_4_loads_nothing(*after)
    settings = {"run": "a", "optim": optim, "dropout": False}
    ranks.run("sharded_trainer.trainer_resumes", before[0], shared, state_dict_type=before[1], **settings)
    ranks.run("sharded_trainer.trainer_goes_on", after[0], shared, state_dict_type=after[1], **settings)


@pytest.mark.parametrize("count", [2, 3])
def test_owners_equal_one_process(count: int, shared: Path) -> None:
    ranks.run("sharded_owners.owners_equal_one_process", count, shared)


@pytest.mark.parametrize(
    ("preset", "mode"), [("small", "local"), pytest.param("frontier", "owner", marks=pytest.mark.slow)]
)
def test_presets_resume_under_fsdp(preset: str, mode: str, shared: Path) -> None:
    settings = {"optim": "soap", "optim_args": f"preset={preset},shard_mode={mode}"}
    ranks.run("sharded_trainer.trainer_resumes", 2, shared, run="a", state_dict_type=SHARDED, **settings)


FIRST = [((2, "fsdp"), (3, "fsdp")), ((1, "whole"), (2, "fsdp")), ((2, "whole"), (1, "whole"))]
PAIRS = list(itertools.product(((1, "whole"), (1, "fsdp"), (2, "fsdp"), (3, "fsdp"), (2, "whole")), repeat=2))


@pytest.mark.parametrize(
    ("before", "after"), [pair if pair in FIRST else pytest.param(*pair, marks=pytest.mark.slow) for pair in PAIRS]
)
def test_owners_go_on_bit_for_bit(before: tuple[int, str], after: tuple[int, str], shared: Path) -> None:
    """Every number of ranks loads what every other saved; FULL lost what ranks other than the first own."""
    names = ["soap", "shampoo", "soap, blocks", "soap, square blocks", "soap, own settings"]
    ranks.run("sharded_owners.owners_save", before[0], shared, mode=before[1], names=names)
    ranks.run("sharded_owners.owners_go_on", after[0], shared, mode=after[1], names=names)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [((2, FULL), (2, SHARDED)), ((2, SHARDED), (1, None)), ((1, None), (2, FULL)), ((2, None), (3, SHARDED))],
    ids=str,
)
def test_adapters_go_on_too(before: tuple[int, str | None], after: tuple[int, str | None], shared: Path) -> None:
    """Their weights are saved under names without the adapter's, and once were left at their initial values."""
    skip_where_transformers_4_loads_nothing(*before, lora=True)
    skip_where_transformers_4_loads_nothing(*after, lora=True)
    settings = {"run": "a", "optim": "mars", "dropout": False, "lora": True}
    ranks.run("sharded_trainer.trainer_resumes", before[0], shared, state_dict_type=before[1], **settings)
    ranks.run(
        "sharded_trainer.trainer_goes_on", after[0], shared, state_dict_type=after[1], tolerance=1e-3, **settings
    )


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_owners_under_ddp_are_saved_by_soap_trainer(count: int, shared: Path) -> None:
    ranks.run("sharded_trainer.trainer_resumes", count, shared, run="a", optim_args="shard_mode=owner")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [FULL, SHARDED])
def test_owners_under_fsdp_in_the_trainer(kind: str, shared: Path) -> None:
    settings = {"run": "a", "optim_args": "shard_mode=owner,precondition_frequency=2", "dropout": False}
    ranks.run("sharded_trainer.trainer_resumes", 2, shared, state_dict_type=kind, **settings)
    ranks.run("sharded_trainer.trainer_goes_on", 3, shared, state_dict_type=kind, **settings)


def test_owners_under_ddp_are_refused_by_the_plain_trainer(shared: Path) -> None:
    ranks.run("sharded_trainer.owners_save_with_plain_trainer", 2, shared)


@pytest.mark.parametrize(
    ("function", "count"),
    [
        ("sharded_steps.a_nan_on_one_rank_skips_the_step_on_all", 2),
        ("sharded_steps.a_local_step_has_one_collective", 2),
        pytest.param("sharded_steps.meshes_of_two_dimensions", 4, marks=pytest.mark.slow),
        ("sharded_steps.a_split_refresh_equals_one_of_its_own", 2),
        ("sharded_trainer.accelerate_alone", 2),
        ("sharded_owners.owners_keep_their_matrices", 3),
        ("sharded_owners.owners_are_copied", 2),
        ("sharded_owners.owners_equal_one_process_on_data_of_their_own", 3),
        ("sharded_steps.a_rank_without_a_gradient_holds_up_nobody", 2),
        ("sharded_steps.ranks_plan_alike", 2),
        ("sharded_steps.costs_are_those_of_the_optimizer", 2),
        ("sharded_steps.a_first_step_at_no_learning_rate_is_taken_by_all", 3),
    ],
)
def test_steps(function: str, count: int, shared: Path) -> None:
    ranks.run(function, count, shared)


@pytest.mark.slow
def test_owners_on_a_mesh_of_two_dimensions(shared: Path) -> None:
    ranks.run("sharded_owners.owners_equal_one_process", 4, shared, replicas=2)


@pytest.mark.slow
def test_owners_under_ddp_equal_one_process(shared: Path) -> None:
    ranks.run("sharded_owners.owners_equal_one_process", 3, shared, replicas=-1)


@pytest.mark.slow
def test_refreshes_split_in_three_equal_undivided_ones(shared: Path) -> None:
    ranks.run("sharded_steps.a_split_refresh_equals_one_of_its_own", 3, shared)


@pytest.mark.slow
def test_two_owners_equal_one_process_on_data_of_their_own(shared: Path) -> None:
    ranks.run("sharded_owners.owners_equal_one_process_on_data_of_their_own", 2, shared)


@pytest.mark.parametrize("sharded", [True, False], ids=["FSDP2", "DDP"])
def test_exact_mars_equals_a_loop_by_hand(sharded: bool, shared: Path) -> None:
    ranks.run("sharded_owners.exact_mars_equals_a_loop_by_hand", 2, shared, sharded=sharded)


@pytest.mark.parametrize(
    ("function", "count"),
    [
        ("equal_one_process", 2),
        pytest.param("equal_one_process", 3, marks=pytest.mark.slow),
        pytest.param("equal_one_process", 4, marks=pytest.mark.slow),
        ("whole_matrices_equal_one_process", 2),
        ("norms_stay_and_runs_resume", 3),
        pytest.param("norms_stay_and_runs_resume", 4, marks=pytest.mark.slow),
        ("zeros_are_refused_on_all_ranks", 3),
    ],
)
def test_steps_in_proportion_to_norms(function: str, count: int, shared: Path) -> None:
    ranks.run(f"sharded_weight_steps.{function}", count, shared)
