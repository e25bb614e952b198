"""FSDP2 on gloo, with real processes: two and three of them."""

from pathlib import Path

import pytest
import ranks

FEW = ["soap", "shampoo", "mars"]


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that all processes see."""
    monkeypatch.setenv("SHARED_FOLDER", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("count", [2, 3])
def test_a_resumed_run_equals_the_uninterrupted_one(count: int, shared: Path) -> None:
    """With uneven and empty shards; FULL gave every rank the state of rank 0, SHARDED that of another."""
    ranks.run("sharded", "resumed_equals_uninterrupted", count, shared, dtype="float32", names=FEW)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("count", [2, 3])
def test_every_optimizer_resumes(count: int, dtype: str, shared: Path) -> None:
    ranks.run("sharded", "resumed_equals_uninterrupted", count, shared, dtype=dtype)


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2), (2, 1), (1, 2)])
def test_a_run_goes_on_with_other_ranks(before: int, after: int, shared: Path) -> None:
    ranks.run("sharded", "save_for_others", before, shared, names=FEW)
    ranks.run("sharded", "goes_on_from_others", after, shared, names=FEW)
