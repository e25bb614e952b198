"""Checkpoints whose files were cut, changed or forged."""

import json
import logging
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny
import torch
from crashing import Run
from helpers import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Trainer

from hf_soap import SoapTrainer
from hf_soap.optimizers.names import ENTRIES
from hf_soap.trainer.resume import find_damage, find_problem, last_complete_checkpoint

FILES = ["optimizer.pt", "model.safetensors", "scheduler.pt", "rng_state.pth"]

UNREADABLE = Path("/proc/self/mem")
"""Reading it from its beginning is an input/output error, as on a bad disk, also for root."""


def run(folder: Path, cls: type[Trainer] = Trainer, resume: Any = None, **changes: Any) -> Trainer:
    args = tiny.arguments(folder, save_strategy="steps", **{"save_steps": 2, "max_steps": 4, **changes})
    trainer = cls(tiny.gpt2(n_layer=1), args, train_dataset=tiny.Counting())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("run")
    run(folder)
    return folder


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "run")


@contextmanager
def flipped(path: Path, place: float, bit: int) -> Iterator[None]:
    """Has one bit of a file wrong; ``place`` is a share of its length, negative from the end in bytes."""
    content = path.read_bytes()
    changed = bytearray(content)
    changed[int(place * (len(content) - 1)) if 0 <= place <= 1 else max(place, -len(content))] ^= 1 << bit
    path.write_bytes(changed)
    try:
        yield
    finally:
        path.write_bytes(content)


ANYWHERE = st.floats(0, 1) | st.integers(-2000, -1)
"""The end holds the directory of a zip, which its tensors outweigh."""


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_noticed(name: str, whole: Path) -> None:
    """One in a tensor loaded without a word: torch.load reads tensors without the checksums that the file holds."""
    folder = whole / "checkpoint-4"
    assert find_problem(folder) is None

    @settings(max_examples=100, deadline=None)
    @given(ANYWHERE, st.integers(0, 7))
    def holds(place: float, bit: int) -> None:
        with flipped(folder / name, place, bit):
            assert find_problem(folder).startswith(f"{name} is ")

    holds()
    assert find_problem(folder) is None


def test_a_misspelt_header_is_noticed(copied: Path) -> None:
    """A flipped bit in a word of the header stopped the search for a whole checkpoint by a KeyError."""
    path = copied / "checkpoint-4" / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b"data_offsets", b"data_offsetr", 1))
    assert find_problem(path.parent).startswith("model.safetensors is cut off or unreadable")


def test_without_checksums_a_flipped_bit_is_noticed_or_changes_nothing(copied: Path) -> None:
    """In checkpoints of other trainers; some bytes of a zip mean nothing. A file in it could turn into a folder."""
    folder = copied / "checkpoint-4"
    (folder / "checksums_0.json").unlink()
    path = folder / "optimizer.pt"
    intact = torch.load(path, weights_only=True)
    outcomes = []

    @settings(max_examples=200, deadline=None)
    @given(ANYWHERE, st.integers(0, 7))
    def holds(place: float, bit: int) -> None:
        with flipped(path, place, bit):
            problem = find_problem(folder)
            outcomes.append(problem)
            if problem is None:
                assert_same(torch.load(path, weights_only=True), intact)
            else:
                assert problem.startswith("optimizer.pt is ")

    holds()
    assert any(outcomes)


@settings(max_examples=50, deadline=None)
@given(name=st.sampled_from(FILES), length=st.floats(0, 1, exclude_max=True), noted=st.booleans())
def test_a_file_that_was_cut_off_is_noticed(name: str, length: float, noted: bool, whole: Path) -> None:
    folder = whole / "checkpoint-4"
    content, checksums = (folder / name).read_bytes(), (folder / "checksums_0.json").read_bytes()
    try:
        (folder / name).write_bytes(content[: int(length * len(content))])
        if not noted:
            (folder / "checksums_0.json").unlink()
        assert find_problem(folder).startswith(f"{name} is ")
    finally:
        (folder / name).write_bytes(content)
        (folder / "checksums_0.json").write_bytes(checksums)


@pytest.mark.parametrize("cls", [Trainer, SoapTrainer])
def test_the_newest_whole_checkpoint_is_resumed(
    cls: type[Trainer], whole: Path, copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The plain Trainer took the newest folder, whatever was in it."""
    want = torch.load(whole / "checkpoint-4" / "optimizer.pt", weights_only=True)
    with flipped(copied / "checkpoint-4" / "optimizer.pt", 0.5, 3), caplog.at_level(logging.INFO, "hf_soap"):
        resumed = run(copied, cls, resume=True, log_level="info")
    assert "checkpoint-4 is incomplete and is skipped: optimizer.pt is damaged or changed" in caplog.text
    assert f"Resuming from {copied / 'checkpoint-2'}, the newest complete checkpoint" in caplog.text
    assert_same(resumed.optimizer.optimizer.state_dict(), want)


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_that_was_named_is_refused(name: str, copied: Path) -> None:
    with flipped(copied / "checkpoint-4" / name, 0.5, 3), pytest.raises(ValueError) as error:
        run(copied, resume=str(copied / "checkpoint-4"))
    assert f"in {copied / 'checkpoint-4'}, {name} is " in str(error.value)
    assert f"; resume from {copied / 'checkpoint-2'}, or" in str(error.value)


def test_a_named_checkpoint_that_was_never_finished_is_refused(copied: Path) -> None:
    """Scripts that look for the last folder themselves name it, and died of a missing file on every restart."""
    folder = copied / "checkpoint-4"
    (folder / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match=r"trainer_state\.json: .*; resume from .*checkpoint-2, or"):
        run(copied, resume=str(folder))
    (folder / "trainer_state.json").write_text("{}")
    (folder / "checkpoint-is-incomplete.txt").touch()
    with pytest.raises(ValueError, match=r"ended while it was being saved; resume from .*checkpoint-2, or"):
        run(copied, resume=str(folder))


def test_a_new_optimizer_in_place_of_a_missing_one_is_said(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = copied / "checkpoint-4"
    for name in ("optimizer.pt", "checksums_0.json"):
        (folder / name).unlink()
    run(copied, resume=str(folder), max_steps=5)
    assert f"{folder} has no optimizer (was it removed" in caplog.text


def test_another_optimizers_checkpoints_are_left_to_the_trainer(tmp_path: Path) -> None:
    run(tmp_path, optim="adamw_torch")
    assert not list(tmp_path.glob("**/checksums_*"))
    run(tmp_path, optim="adamw_torch", resume=True)


def test_a_folder_that_is_written_once_more_is_incomplete_until_its_end(copied: Path) -> None:
    """A run killed while it wrote over a whole checkpoint left new weights with the old optimizer."""

    class Killed(Exception):
        pass

    class Dies(Trainer):
        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            raise Killed

    with pytest.raises(Killed):
        run(copied, Dies, resume=str(copied / "checkpoint-2"))
    assert find_problem(copied / "checkpoint-4").startswith("trainer_state.json")
    assert last_complete_checkpoint(copied) == copied / "checkpoint-2"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda text: text[:-9], "checksums_0.json is unreadable"),
        (lambda text: "[]", "checksums_0.json is unreadable"),
        (
            lambda text: text.replace('"files": {', '"files": {"a/adapter_model.bin": [1, 2],'),
            "a/adapter_model.bin is m",
        ),
    ],
)
def test_damaged_checksums_are_noticed(change: Any, problem: str, copied: Path) -> None:
    path = copied / "checkpoint-4" / "checksums_0.json"
    path.write_text(change(path.read_text()))
    assert find_damage(path.parent).startswith(problem)


@pytest.mark.parametrize("name", ["extra.bin", "checksums_0.json", "model.safetensors.index.json", "optimizer.pt"])
@pytest.mark.skipif(not UNREADABLE.exists(), reason="needs a file that cannot be read, also by root")
def test_a_file_that_the_disk_does_not_give_back_is_a_problem(name: str, copied: Path) -> None:
    """Such an error stopped the run; raised on one of several ranks, it left the others waiting for its share."""
    folder = copied / "checkpoint-4"
    noted = json.loads((folder / "checksums_0.json").read_text())
    noted["files"] |= {"extra.bin": [0, 0]} if name == "extra.bin" else {}
    (folder / "checksums_0.json").write_text(json.dumps(noted))
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(UNREADABLE)
    if name.startswith("model"):
        (folder / "model.safetensors").unlink()  # or nobody reads the index
    assert re.match(rf"{re.escape(name)}( is|:) .*(Input/output error|cut off)", find_problem(folder))
    assert last_complete_checkpoint(copied) == copied / "checkpoint-2"


def test_a_folder_that_the_disk_does_not_give_back_is_a_problem(tmp_path: Path) -> None:
    assert "File name too long" in find_problem(tmp_path / ("x" * 300))  # for any file system


def test_a_save_without_optimizer_leaves_none_of_another_run(copied: Path) -> None:
    """The old optimizer stayed, and with the new weights passed for one checkpoint."""
    folder = copied / "checkpoint-4"
    (folder / "optimizer_0").mkdir()
    for name in ("optimizer_0/__0_0.distcp", "optimizer_0/.metadata", "rng_state_3.pth", "adapter_model.safetensors"):
        (folder / name).touch()
    own = {"notes.txt", "mine.pt", "backup/optimizer.pt", "optimizer_0/notes.txt", "model.old.safetensors"}
    for name in own:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    run(copied, save_only_model=True)
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == own | {
        *("config.json", "generation_config.json", "model.safetensors", "trainer_state.json", "training_args.bin")
    }
    assert find_problem(folder) is None


def test_what_does_not_decide_about_the_run_may_be_edited(copied: Path) -> None:
    """A word in a README made a checkpoint one that is refused."""
    folder = copied / "checkpoint-4"
    for name in ("config.json", "generation_config.json", "training_args.bin"):
        with (folder / name).open("ab") as file:
            file.write(b"\n")
    (folder / "README.md").write_text("Mine.")
    assert find_problem(folder) is None
    assert set(json.loads((folder / "checksums_0.json").read_text())["files"]) == set(FILES)


def test_each_node_reads_all_of_its_own_folder(tmp_path: Path) -> None:
    """With save_on_each_node the ranks of other nodes read a part of other folders."""
    ranks.run("sharded_trainer.nodes_read_their_own", 2, tmp_path / "meeting", folder=str(tmp_path))


def test_shards_of_several_ranks(tmp_path: Path) -> None:
    """torch.distributed.checkpoint keeps no checksums; every rank notes those of what it wrote."""
    shards = {"optim_args": "precondition_frequency=2", "fsdp": "SHARDED_STATE_DICT", "ranks": 2, "max_steps": 6}
    sharded = Run(tmp_path / "run", **shards)
    want = sharded.to_the_end()
    last = sharded.folder / "checkpoint-6"
    assert last_complete_checkpoint(sharded.folder) == last
    listed = {name for path in last.glob("checksums_*") for name in json.loads(path.read_text())["files"]}
    assert listed >= {"optimizer_0/.metadata", "optimizer_0/__1_0.distcp", "pytorch_model_fsdp_0/__0_0.distcp"}
    for name in listed:
        with flipped(last / name, 0.5, 6):
            assert find_problem(last).startswith(f"{name.partition('/')[0]}")
    with flipped(last / "optimizer_0" / "__1_0.distcp", 0.5, 6):
        assert_same(sharded.to_the_end(), want)
    assert "checkpoint-6 is incomplete and is skipped: optimizer_0/__1_0.distcp is damaged or changed" in sharded.log()


@pytest.mark.parametrize("name", ENTRIES)
def test_checkpoints_hold_nothing_but_data(name: str, tmp_path: Path) -> None:
    cls = SoapTrainer if name.startswith("mars") else Trainer
    run(tmp_path, cls, optim=name, max_steps=1, save_steps=1)
    saved = torch.load(tmp_path / "checkpoint-1" / "optimizer.pt", weights_only=True)
    assert len(saved["state"]) == sum(len(group["params"]) for group in saved["param_groups"])


class Touches:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"])
def test_a_forged_file_is_refused_and_runs_nothing(name: str, zipped: bool, copied: Path, tmp_path: Path) -> None:
    """With checksums that fit, as whoever forges a file would see to."""
    folder, touched = copied / "checkpoint-4", tmp_path / "touched"
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    if zipped:
        torch.save({"state": Touches(touched), "param_groups": []}, folder / name)
    else:
        (folder / name).write_bytes(pickle.dumps(Touches(touched)))
    (folder / "checksums_0.json").unlink()
    with pytest.raises((ValueError, pickle.UnpicklingError), match=rf"{name} is |[Ww]eights.only"):
        run(copied, resume=str(folder))
    assert not touched.exists()
    torch.load(folder / name, weights_only=False) if zipped else pickle.loads((folder / name).read_bytes())
    assert touched.exists()  # it would have
