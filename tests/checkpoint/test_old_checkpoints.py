"""Checkpoints of earlier versions, on disk as those wrote them; versions/make.py says how they were made."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import old_checkpoints
import pytest
import ranks
import torch
import torch.distributed as dist
from helpers import assert_same
from old_checkpoints import FOLDER, MORE, OPTIMIZERS, SHARDED, STEPS, TRAINED, TRAINED_MORE, go, made, sharded_run
from packaging import version
from sharded import put, same_gradients, whole
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

from hf_soap.checkpoint import files
from hf_soap.trainer import resume

VERSIONS = sorted(path.name for path in FOLDER.glob("v*"))
versions = pytest.mark.parametrize("old", VERSIONS)

needs_fsdp_on_cpus = pytest.mark.skipif(
    version.parse(torch.__version__) < version.parse("2.8"), reason="fully_shard did not run on CPUs before"
)


def read(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def assert_close(got: Iterable[Tensor], want: Iterable[Tensor], tolerance: float = 1e-9) -> None:
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), rtol=0, atol=tolerance)


@versions
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_old_state_dict_goes_on(old: str, name: str) -> None:
    """Weights in float64 agree with those of the old version; all other state is read as it was saved."""
    weights, saved = read(FOLDER / old / f"{name}.weights.pt"), read(FOLDER / old / f"{name}.pt")
    params, optimizer = made(name)
    with torch.no_grad():
        for param, value in zip(params, weights["at_save"], strict=True):
            param.copy_(value)
    optimizer.load_state_dict(saved)
    assert_same(optimizer.state_dict()["state"], saved["state"])
    assert all(entry["step"] == len(STEPS) for entry in saved["state"].values())

    go(optimizer, params, MORE)
    if "bfloat16" in name:  # another order of a sum rounds to another neighbour, 1/256 away
        assert all(param.isfinite().all() for param in params)
        assert_close(params, weights["after"], 2e-3)
    else:
        assert_close(params, weights["after"])
    for before, after in zip(weights["at_save"], params, strict=True):
        assert not torch.equal(before, after)


@versions
def test_an_old_checkpoint_of_the_trainer_goes_on(old: str, tmp_path: Path) -> None:
    """0.1.0 split the Trainer's groups by rule; names say which parameter is which."""
    folder = FOLDER / old / "trainer" / f"checkpoint-{TRAINED}"
    trainer, saved = old_checkpoints.trainer(tmp_path), read(folder / "optimizer.pt")
    trainer._load_from_checkpoint(str(folder))
    optimizer, params = trainer.create_optimizer(), list(trainer.model.parameters())
    assert len(optimizer.param_groups) < len(saved["param_groups"])
    optimizer.load_state_dict(saved)

    loaded = optimizer.state_dict()
    by_name = [
        {
            name: contents["state"][key]
            for group in contents["param_groups"]
            for name, key in zip(group["param_names"], group["params"], strict=True)
        }
        for contents in (loaded, saved)
    ]
    assert_same(*by_name)
    go(optimizer, params, range(TRAINED_MORE))
    assert_close(params, read(folder.parent / "weights.pt")["after"])


@versions
def test_the_trainer_resumes_from_an_old_checkpoint(old: str, tmp_path: Path) -> None:
    """Its scheduler has a rate for each of the old groups, and ended the run by an IndexError."""
    folder = tmp_path / f"checkpoint-{TRAINED}"
    shutil.copytree(FOLDER / old / "trainer" / folder.name, folder)
    assert resume.find_problem(folder) is None
    trainer = old_checkpoints.trainer(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == TRAINED + TRAINED_MORE
    want = read(FOLDER / old / "trainer" / "weights.pt")["uninterrupted"]
    # The model computes its loss in float32.
    assert_close((trainer.model.state_dict()[name] for name in want), want.values(), 1e-5)


@versions
@needs_fsdp_on_cpus
@pytest.mark.parametrize("kind", [resume.FULL, resume.SHARDED])
@pytest.mark.parametrize("name", [name for name in SHARDED if "owner" in name])
def test_what_owners_saved_goes_on_in_one_process(old: str, name: str, kind: str) -> None:
    folder = FOLDER / old / name
    weights = read(folder / "weights.pt")
    model, optimizer = sharded_run(name, split=False)
    put(model, weights["at_save"])
    optimizer.load_state_dict(files.read(folder / kind))
    same_gradients(model, optimizer, MORE)
    assert_close(whole(model).values(), weights["after"].values())


@versions
@needs_fsdp_on_cpus
def test_old_sharded_state_goes_on(old: str, tmp_path: Path) -> None:
    ranks.run("test_old_checkpoints.goes_on", 2, tmp_path, old=old)


def goes_on(old: str) -> None:
    """Loads both formats as a resume does, and read whole as one in another format; in every process, see ranks.py."""
    for name in SHARDED:
        folder = FOLDER / old / name
        weights = read(folder / "weights.pt")
        for kind, in_parts in ((k, t) for k in (resume.FULL, resume.SHARDED) for t in (True, False)):
            model, optimizer = sharded_run(name)
            put(model, weights["at_save"])
            if not in_parts:
                optimizer.load_state_dict(files.read(folder / kind))
            elif kind == resume.FULL:
                options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=True)
                state = read(folder / kind) if dist.get_rank() == 0 else {}
                set_optimizer_state_dict(model, optimizer, state, options=options)
            else:
                assert not files.has_settings(folder / kind, optimizer.param_groups)
                optimizer.load_state_dict(files.read_part(folder / kind, model, optimizer))
            same_gradients(model, optimizer, MORE)
            assert_close(whole(model).values(), weights["after"].values())


@pytest.mark.slow
@needs_fsdp_on_cpus
def test_a_sharded_checkpoint_may_lack_a_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch asks a sharded checkpoint for every entry of the groups, and one of 0.1.0 has no max_aspect_ratio.

    Nor has this one the rule of each bias; they follow Adam either way.
    """
    monkeypatch.setenv("SHARED_FOLDER", str(tmp_path))
    settings = {"run": "a", "state_dict_type": "SHARDED_STATE_DICT", "dropout": False}
    ranks.run("sharded_trainer.trainer_resumes", 2, tmp_path, **settings)
    settings |= {"optim_args": "precondition_frequency=2,adam_modules=bias", "tolerance": 1e-6}
    ranks.run("sharded_trainer.trainer_goes_on", 2, tmp_path, **settings)
