"""Checkpoint folders that somebody has changed, and checkpoints of other optimizers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny
import torch
from helpers import assert_same, mostly_slow
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel, Trainer

from hf_soap import SOAP
from hf_soap.engine.optimizer import unwrapped
from hf_soap.trainer.resume import find_problem, last_complete_checkpoint

ADAMW = {"optim": "adamw_torch", "optim_args": None}
INDEX = "model.safetensors.index.json"


def run(folder: Path, resume: Any = None, model: Any = None, **changes: Any) -> Trainer:
    """Trains four steps; without dropout, whose random numbers a checkpoint may lack."""
    args = tiny.arguments(folder, **{"save_strategy": "steps", "save_steps": 2, "max_steps": 4, **changes})
    trainer = Trainer(model or tiny_model(), args, train_dataset=tiny.Counting())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def tiny_model() -> GPT2LMHeadModel:
    return tiny.gpt2(n_layer=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: param.detach() for name, param in trainer.model.named_parameters()}


def steps(trainer: Trainer) -> set[int]:
    return {int(state["step"]) for state in unwrapped(trainer.optimizer).state.values()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A run with the checkpoints 2 and 4, and the weights that six steps come to."""
    folder = tmp_path_factory.mktemp("run")
    run(folder)
    ended = run(folder.parent / "ended", resume=str(folder / "checkpoint-4"), max_steps=6)
    return folder, weights(ended)


@pytest.fixture
def copied(whole: tuple[Path, Any], tmp_path: Path) -> Path:
    """The checkpoint 4 of a copy."""
    return shutil.copytree(whole[0], tmp_path / "run") / "checkpoint-4"


def cut_into_shards(folder: Path) -> None:
    model = GPT2LMHeadModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1


def put_together(folder: Path) -> None:
    model = GPT2LMHeadModel.from_pretrained(folder)
    for path in (*folder.glob("model-*-of-*.safetensors"), folder / INDEX):
        path.unlink()
    model.save_pretrained(folder)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("with_index", mostly_slow([True, False], fast={True}))
def test_weights_in_other_files_are_resumed(
    with_index: bool, named: bool, whole: Any, copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Weights cut into shards, or put together again, were refused as damaged, where AdamW went on."""
    cut_into_shards(copied)
    trainer = run(copied.parent, resume=str(copied) if named else True, max_steps=6)
    assert_same(weights(trainer), whole[1])
    assert f"{copied} no longer has model.safetensors: weights are loaded from other files" in caplog.text
    assert "is skipped" not in caplog.text

    again = shutil.copytree(copied, copied.parent / "again" / "checkpoint-4")
    (again / "checksums_0.json").write_text(
        (again / "checksums_0.json").read_text().replace('"model.safetensors"', '"model-00001-of-00009.safetensors"')
    )  # as if it had been saved in shards
    if with_index:
        shutil.copy(again / INDEX, again.parent / INDEX)
    put_together(again)
    if with_index:
        shutil.move(again.parent / INDEX, again / INDEX)  # which the Trainer does not read then
    trainer = run(again.parent, resume=str(again) if named else True, max_steps=6)
    assert_same(weights(trainer), whole[1])


def test_shards_of_another_size_are_resumed(whole: Any, tmp_path: Path) -> None:
    """The index of other shards was not what had been written."""

    class Cuts(Trainer):
        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            super()._save(output_dir, state_dict)
            cut_into_shards(Path(output_dir or self.args.output_dir))

    args = tiny.arguments(tmp_path, save_strategy="steps", save_steps=4, max_steps=4)
    Cuts(tiny_model(), args, train_dataset=tiny.Counting()).train()
    folder = tmp_path / "checkpoint-4"
    assert INDEX in json.loads((folder / "checksums_0.json").read_text())["files"]
    model = GPT2LMHeadModel.from_pretrained(folder)
    index = (folder / INDEX).read_bytes()
    model.save_pretrained(folder, max_shard_size="60KB")
    assert (folder / INDEX).read_bytes() != index
    assert_same(weights(run(tmp_path, resume=True, max_steps=6)), whole[1])


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def without_a_tensor(path: Path) -> None:
    tensors = load_file(path)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [(Path.unlink, "is missing"), (cut_off, "is cut off"), (without_a_tensor, "is without the tensor ")],
)
def test_shards_that_are_not_whole_are_refused(change: Any, problem: str, copied: Path) -> None:
    """The Trainer looks only at the index, and trains on from weights that were never loaded."""
    cut_into_shards(copied)
    shard = max(copied.glob("model-*-of-*.safetensors"))
    change(shard)
    assert find_problem(copied).startswith(f"{shard.name} {problem}")
    assert last_complete_checkpoint(copied.parent) == copied.parent / "checkpoint-2"


@pytest.mark.parametrize("gone", ["model.safetensors", INDEX])
def test_a_checkpoint_that_lost_its_weights_is_passed_over(gone: str, copied: Path) -> None:
    if gone == INDEX:
        cut_into_shards(copied)
        noted = json.loads((copied / "checksums_0.json").read_text())
        noted["files"].pop("model.safetensors")
        (copied / "checksums_0.json").write_text(json.dumps({**noted, "files": {**noted["files"], INDEX: [1, 1]}}))
    (copied / gone).unlink()
    assert find_problem(copied) == f"{gone} is missing"
    assert last_complete_checkpoint(copied.parent) == copied.parent / "checkpoint-2"


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("noted", [True, False])
def test_a_missing_random_state_is_a_warning(
    noted: bool, named: bool, whole: Any, copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It was refused as damage, where AdamW went on."""
    (copied / "rng_state.pth").unlink()
    if not noted:
        (copied / "checksums_0.json").unlink()
    trainer = run(copied.parent, resume=str(copied) if named else True, max_steps=6)
    assert f"{copied} has no rng_state.pth: random numbers, such as those of dropout, differ" in caplog.text
    assert steps(trainer) == {6}
    assert_same(weights(trainer), whole[1])


class Rates(Trainer):
    """Notes the learning rate of each step."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        vars(self).setdefault("rates", []).append(self.optimizer.param_groups[0]["lr"])
        return super().training_step(*args, **kwargs)


def rates_of(folder: Path, resume: Any, **changes: Any) -> tuple[list[float], Trainer]:
    trainer = Rates(
        tiny_model(), tiny.arguments(folder, max_steps=6, logging_steps=1, **changes), train_dataset=tiny.Counting()
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer.rates, trainer


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    ("gone", "said"),
    [("scheduler.pt", "scheduler.pt, without which the Trainer loads no optimizer"), ("optimizer.pt", "optimizer")],
)
def test_what_begins_anew_does_so_as_with_adamw(
    gone: str, said: str, named: bool, copied: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without one of them the Trainer loads neither for AdamW; here it was damage, and an older folder was taken."""
    run(tmp_path / "adamw", **ADAMW)
    adamw = tmp_path / "adamw" / "checkpoint-4"
    (copied / gone).unlink()
    (adamw / gone).unlink()
    want, other = rates_of(adamw.parent, str(adamw) if named else True, **ADAMW)
    got, trainer = rates_of(copied.parent, str(copied) if named else True)
    assert f"{copied} has no {said} (was it removed, or saved with save_only_model=True?): SOAP starts" in caplog.text
    assert "is skipped" not in caplog.text
    assert got == want == [3e-3, 3e-3 * 5 / 6]
    assert steps(trainer) == steps(other) == {2}
    assert trainer.state.global_step == 6


def test_other_missing_files_are_warnings(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Files of a program's own, and checksums that other machines wrote, which AdamW does not miss."""
    noted = json.loads((copied / "checksums_0.json").read_text())
    noted = {"ranks": [0, 2], "files": {**noted["files"], "averaged.pt": [1, 1], "scaler.pt": [1, 1]}}
    (copied / "checksums_0.json").write_text(json.dumps(noted))
    run(copied.parent, resume=True)
    assert f"{copied} no longer has checksums_1.json, averaged.pt, scaler.pt: the run continues without" in caplog.text


def test_parts_without_the_checksums_of_a_rank_are_refused(copied: Path) -> None:
    """torch.distributed.checkpoint keeps none, and without the list nobody knows which parts there were."""
    noted = json.loads((copied / "checksums_0.json").read_text())
    (copied / "checksums_0.json").write_text(json.dumps({**noted, "ranks": [0, 2]}))
    (copied / "optimizer_0").mkdir()
    (copied / "optimizer_0" / ".metadata").touch()
    assert find_problem(copied) == "checksums_1.json is missing"


def test_files_of_other_names_may_be_cut_off(copied: Path) -> None:
    """A broken file of the user's own made a checkpoint damaged, though nobody reads it on resuming."""
    (copied / "averaged.safetensors").write_bytes(b"half")
    assert find_problem(copied) is None


def test_weights_in_the_older_form_of_torch_are_resumed(whole: Any, copied: Path) -> None:
    """No zip was taken for one that was cut off."""
    saved = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    torch.save(saved, copied / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_same(weights(run(copied.parent, resume=True, max_steps=6)), whole[1])
    cut_off(copied / "pytorch_model.bin")
    assert find_problem(copied).startswith("pytorch_model.bin is unreadable")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adapters_in_folders_of_their_own_are_resumed(tmp_path: Path) -> None:
    """peft saves adapters of other names than `default` in folders, and the checkpoint seemed to hold no weights."""

    def adapted() -> Any:
        torch.manual_seed(1)
        config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
        return get_peft_model(tiny_model(), config, adapter_name="mine")

    want = weights(run(tmp_path, model=adapted(), max_steps=6))
    shutil.rmtree(tmp_path / "checkpoint-6")
    resumed = run(tmp_path, model=adapted(), resume=True, max_steps=6)
    assert_same(weights(resumed), want)
    (tmp_path / "checkpoint-6" / "mine" / "adapter_model.safetensors").unlink()
    assert find_problem(tmp_path / "checkpoint-6") == "mine/adapter_model.safetensors is missing"


@pytest.mark.parametrize("settings", [{}, ADAMW], ids=["soap", "adamw"])
def test_an_empty_folder_is_answered_in_the_trainers_words(settings: Any, tmp_path: Path) -> None:
    """Programs that start anew where they find these words stopped instead."""
    with pytest.raises(ValueError, match=r"^No valid checkpoint found in output directory"):
        run(tmp_path, resume=True, **settings)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "SOAP"),
        pytest.param({"optim": "shampoo"}, "Shampoo", marks=pytest.mark.slow),
        ({"optim": "mars_adamw"}, "MARS"),
        pytest.param({"optim": "kl_soap"}, "SOAP", marks=pytest.mark.slow),
    ],
)
def test_adamw_does_not_take_a_checkpoint_of_ours(settings: Any, name: str, tmp_path: Path) -> None:
    """It loaded SOAP's state and ended in an error of torch about shapes; that of MARS it took without a word."""
    run(tmp_path, **settings)
    with pytest.raises(ValueError) as error:
        run(tmp_path, resume=True, max_steps=6, **ADAMW)
    said = str(error.value)
    assert said.startswith(f"got a checkpoint of {name}, wanted one of AdamW, in {tmp_path / 'checkpoint-4'}. ")
    assert f"resume with the optim (such as optim='{name.lower()}') and the optim_args that wrote it" in said
    assert "remove optimizer.pt from the folder" in said
    assert steps(run(tmp_path, resume=True, max_steps=5, **settings)) == {5}
    shutil.rmtree(tmp_path / "checkpoint-5")

    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    got, trainer = rates_of(tmp_path, True, **ADAMW)
    assert got == [3e-3, 3e-3 * 5 / 6]  # from the beginning of the schedule
    assert steps(trainer) == {2}
    assert trainer.state.global_step == 6
    at_rest = run(
        tmp_path, resume=str(tmp_path / "checkpoint-4"), max_steps=5, learning_rate=1e-30, save_strategy="no", **ADAMW
    )
    saved, held = load_file(tmp_path / "checkpoint-4" / "model.safetensors"), at_rest.model.state_dict()
    assert_same({name: held[name] for name in saved}, saved)


def test_soap_does_not_take_a_checkpoint_of_adamw(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever removed optimizer.pt, as the error says, met the next one: that it is missing."""
    run(tmp_path, **ADAMW)
    for resume in (True, str(tmp_path / "checkpoint-4")):
        with pytest.raises(ValueError, match=r"does not fit the current settings.* remove the optimizer's state"):
            run(tmp_path, resume=resume)
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    for resume in (True, str(tmp_path / "checkpoint-4")):
        caplog.clear()
        at_rest = run(tmp_path, resume=resume, max_steps=5, learning_rate=1e-30, save_strategy="no")
        assert "SOAP starts without state, and the learning rate from the beginning" in caplog.text
        assert steps(at_rest) == {1}
        got = at_rest.model.state_dict()
        assert_same({name: got[name] for name in saved}, saved)


def test_another_sort_of_soap_follows_its_error(tmp_path: Path) -> None:
    """With checksums beside it, a folder without the optimizer that the error had one remove was refused too."""
    run(tmp_path, optim="shampoo")
    with pytest.raises(ValueError, match="remove the optimizer's state from the checkpoint"):
        run(tmp_path, resume=True)
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    for resume in (True, str(tmp_path / "checkpoint-4")):
        assert steps(run(tmp_path, resume=resume, max_steps=5, save_strategy="no")) == {1}


def test_a_wrapper_around_ours_loads_its_state(tmp_path: Path) -> None:
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner: SOAP) -> None:
            self.inner = inner
            super().__init__(inner.param_groups, {})
            self.param_groups, self.state = inner.param_groups, inner.state

        def step(self, closure: Any = None) -> Any:
            return self.inner.step(closure)

        def state_dict(self) -> Any:
            return self.inner.state_dict()

        def load_state_dict(self, state_dict: Any) -> None:
            self.inner.load_state_dict(state_dict)
            self.param_groups, self.state = self.inner.param_groups, self.inner.state

    def trained(last: int, resume: Any = None) -> Trainer:
        model, args = tiny_model(), tiny.arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=last)
        optimizer = Wrapper(SOAP(model.parameters(), lr=3e-3))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        trainer = Trainer(model, args, train_dataset=tiny.Counting(), optimizers=(optimizer, schedule))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    want = weights(trained(4))
    assert_same(weights(trained(4, str(tmp_path / "checkpoint-2"))), want)


@pytest.mark.parametrize("kind", mostly_slow(["FULL_STATE_DICT", "SHARDED_STATE_DICT"], fast={"SHARDED_STATE_DICT"}))
def test_adamw_takes_none_under_fsdp(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch missed keys that it listed by the thousand."""
    monkeypatch.setenv("SHARED_FOLDER", str(tmp_path))
    ranks.run("sharded_trainer.adamw_takes_none_of_ours", 2, tmp_path / "meeting", state_dict_type=kind)
