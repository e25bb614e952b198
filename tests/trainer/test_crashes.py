"""Runs that die, and go on."""

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from crashing import Run
from helpers import assert_same
from transformers import TrainingArguments

FREQUENT = "precondition_frequency=2"

RUNS: dict[str, dict[str, Any]] = {
    "soap": {"optim_args": f"{FREQUENT},state_dtype=bfloat16,stagger=true"},
    "shampoo": {"optim": "shampoo", "optim_args": f"{FREQUENT},asynchronous=true,delay=1"},
    "exact mars": {"optim": "mars", "optim_args": "exact=true", "soap_trainer": True},
    "owners under DDP": {"optim_args": f"{FREQUENT},shard_mode=owner", "soap_trainer": True, "ranks": 2},
    "FSDP2": {"optim_args": FREQUENT, "fsdp": "SHARDED_STATE_DICT", "ranks": 2},
}

LONG = {name: 90 if name == "FSDP2" else 180 for name in RUNS}
"""Steps in which there is time for twenty lives. A step under FSDP takes ten times as long, so that fewer pass."""


def dies_and_goes_on(name: str, folder: Path, *, kills: int, steps: int) -> Run:
    """Kills a run so often, every second time while it saves, and compares its end with that of an undisturbed run."""
    undisturbed = Run(folder / "undisturbed", **RUNS[name], max_steps=steps).to_the_end()
    run, rng = Run(folder / "killed", **RUNS[name], max_steps=steps), random.Random(name)
    for number in range(kills):
        run.killed(rng, saving=number % 2 == 0)
    assert_same(run.to_the_end(), undisturbed)
    return run


@pytest.mark.parametrize("name", ["shampoo", pytest.param("owners under DDP", marks=pytest.mark.slow)])
def test_a_run_that_is_killed_ends_like_one_that_is_not(name: str, tmp_path: Path) -> None:
    """Bit for bit: weights and state."""
    dies_and_goes_on(name, tmp_path, kills=2, steps=30)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_is_killed_twenty_times_ends_like_one_that_is_not(name: str, tmp_path: Path) -> None:
    run = dies_and_goes_on(name, tmp_path, kills=20, steps=LONG[name])
    assert "is incomplete and is skipped" in run.log()  # some of the kills came while it saved


needs_saving_on_sigterm = pytest.mark.skipif(
    "enable_jit_checkpoint" not in TrainingArguments.__dataclass_fields__, reason="this transformers does not have it"
)


def is_terminated_and_goes_on(name: str, folder: Path, *, times: int, steps: int) -> None:
    """It saves where it stands each time, and ends like an undisturbed run."""
    undisturbed = Run(folder / "undisturbed", **RUNS[name], max_steps=steps).to_the_end()
    on_sigterm = {"enable_jit_checkpoint": True, "save_steps": steps, "logging_strategy": "steps", "logging_steps": 1}
    run, rng = Run(folder / "stopped", **{**RUNS[name], **on_sigterm}, max_steps=steps), random.Random(name)
    reached = [run.terminated(rng) for _ in range(times)]
    assert reached[0] > 0, reached
    assert all(before < after < steps for before, after in pairwise(reached)), reached
    assert "is skipped" not in run.log()
    assert_same(run.to_the_end(), undisturbed)


@needs_saving_on_sigterm
def test_a_run_saves_on_sigterm(tmp_path: Path) -> None:
    """It saved in the middle of a step, with the random numbers of its dropout drawn, and resumed with others."""
    is_terminated_and_goes_on("soap", tmp_path, times=2, steps=120)


@pytest.mark.slow
@needs_saving_on_sigterm
@pytest.mark.parametrize("name", RUNS)
def test_a_run_saves_on_sigterm_again_and_again(name: str, tmp_path: Path) -> None:
    """Under DDP each rank saved at the step that it had come to, and the others waited for it in vain."""
    is_terminated_and_goes_on(name, tmp_path, times=4, steps=LONG[name])
