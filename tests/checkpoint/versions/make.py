"""Makes the checkpoints of an old version, which tests/checkpoint/test_old_checkpoints.py loads with the present code.

Those in v0_1_0/ were made from a checkout of version 0.1.0 in OLD, with torch 2.13 and transformers 5.23 on a CPU:

    PYTHONPATH=OLD:tests/helpers HF_SOAP_SOURCE=OLD OMP_NUM_THREADS=1 python tests/checkpoint/versions/make.py v0_1_0

They are not made again when the code changes: they stand for the files that users have. What was trained, and with
which gradients, is said in tests/helpers/old_checkpoints.py, so that another version needs no more than a folder of
its own.

- NAME.pt: the state dict of each of OPTIMIZERS after STEPS. NAME.weights.pt: the weights at that time, and after MORE.
- trainer/checkpoint-6: what the Trainer saved, but for its pickled arguments. trainer/weights.pt: the weights after
  TRAINED_MORE steps with the gradients of helpers.gradient, and at the end of the uninterrupted run.
- The names of SHARDED: both kinds of state dict that two ranks save with FSDP2, and the weights as above, by name.

Every random number has a seed: a second run writes the same bytes, but for an id that torch draws for each folder of
torch.distributed.checkpoint.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import old_checkpoints
import ranks
import torch
from old_checkpoints import MORE, OPTIMIZERS, STEPS, TRAINED, TRAINED_MORE, go, made, values

import hf_soap


def save_plain(folder: Path) -> None:
    """Writes the state of optimizers on their own."""
    for name in OPTIMIZERS:
        params, optimizer = made(name)
        go(optimizer, params, STEPS)
        weights = {"at_save": values(params)}
        torch.save(optimizer.state_dict(), folder / f"{name}.pt")
        go(optimizer, params, MORE)
        torch.save({**weights, "after": values(params)}, folder / f"{name}.weights.pt")


def save_trainer(folder: Path) -> None:
    """Writes a checkpoint of the Trainer."""
    saved = folder / "trainer" / f"checkpoint-{TRAINED}"
    with tempfile.TemporaryDirectory() as output:
        trainer = old_checkpoints.trainer(Path(output))
        trainer.train()
        shutil.copytree(
            Path(output) / saved.name, saved, ignore=shutil.ignore_patterns("training_args.bin"), dirs_exist_ok=True
        )
        weights = {"uninterrupted": dict(trainer.model.state_dict())}
    trainer = old_checkpoints.trainer(folder)
    trainer._load_from_checkpoint(str(saved))
    optimizer, params = trainer.create_optimizer(), list(trainer.model.parameters())
    optimizer.load_state_dict(torch.load(saved / "optimizer.pt", weights_only=True))
    go(optimizer, params, range(TRAINED_MORE))
    torch.save({**weights, "after": values(params)}, saved.parent / "weights.pt")


def main() -> None:
    os.chdir(old_checkpoints.FOLDER)
    folder = Path(sys.argv[1])  # relative, since torch.distributed.checkpoint notes where it saves
    folder.mkdir()
    print(f"{folder}: by {hf_soap.__file__}")
    save_plain(folder)
    save_trainer(folder)
    with tempfile.TemporaryDirectory() as meeting:
        ranks.run("old_checkpoints.save_sharded", 2, Path(meeting), folder=str(folder))


if __name__ == "__main__":
    main()
