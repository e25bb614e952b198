"""Runs of the Trainer that are killed again and again."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import forks

SAVE_STEPS = 3


def life(folder: Path, rank: int, ranks: int, meeting: Path, settings: dict[str, Any]) -> None:
    """Trains from the newest whole checkpoint to the end, if it lives so long, and leaves ``end-RANK.pt``."""
    import torch

    if ranks > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    from hf_soap.trainer.resume import last_complete_checkpoint

    trainer = trainer_for(folder, ranks, **settings)
    resume = last_complete_checkpoint(folder) is not None
    if ranks > 1:
        torch.distributed.barrier()  # what one finds, the other has found before anything is written
    trainer.train(resume_from_checkpoint=resume)
    torch.save(weights(trainer), folder / f"end-{rank}.pt")
    if ranks > 1:
        torch.distributed.barrier()


def trainer_for(folder: Path, ranks: int, *, soap_trainer: bool = False, fsdp: str = "", **settings: Any) -> Any:
    """A Trainer on the tiny model."""
    import tiny
    from transformers import Trainer

    from hf_soap import SoapTrainer

    if fsdp:
        from sharded_trainer import let_accelerate_shard_on_cpus

        let_accelerate_shard_on_cpus()
        wrapped = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["GPT2Block"]}
        settings |= {"fsdp": "full_shard auto_wrap"}
        settings |= {"fsdp_config": {"version": 2, "state_dict_type": fsdp, **wrapped}}
        os.environ |= {"FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": fsdp}
    if ranks > 1:
        settings |= {"ddp_backend": "gloo"}
    saving = {"save_strategy": "steps", "save_steps": SAVE_STEPS, "save_total_limit": 3}
    args = tiny.arguments(folder, **{**saving, "logging_strategy": "no", **settings})
    # Behind the first epoch transformers 4 goes on with the data in another order, whatever the optimizer.
    data = tiny.Counting(rows=4 * ranks * args.max_steps) if tiny.TRANSFORMERS_4 else tiny.Counting()
    trainer = (SoapTrainer if soap_trainer else Trainer)(tiny.gpt2(), args, train_dataset=data)
    for callback in trainer.callback_handler.callbacks:
        if manager := getattr(callback, "jit_manager", None):
            manager.kill_wait = 0.05  # seconds; in its three a run as small as this comes to its end
    return trainer


def weights(trainer: Any) -> dict[str, Any]:
    """This rank's part of the weights."""
    from hf_soap.distributed.dtensor import local

    return {name: local(param.detach()).clone() for name, param in trainer.model.named_parameters()}


class Run:
    """A run in a folder, in as many lives as it takes.

    Args:
        folder: Its output folder, which is made.
        ranks: Number of processes.
        **settings: For :func:`trainer_for`.
    """

    def __init__(self, folder: Path, *, ranks: int = 1, **settings: Any) -> None:
        folder.mkdir()
        self.folder, self.ranks, self.settings = folder, ranks, settings
        self.lives = 0

    @contextlib.contextmanager
    def living(self) -> Iterator[list[BaseProcess]]:
        """Starts a life; whatever is left of it at the end is killed."""
        self.lives += 1
        meeting = self.folder / f"meeting-{self.lives}"
        ranks: list[BaseProcess] = []
        try:
            for rank in range(self.ranks):
                place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if self.ranks > 1 else {}
                arguments = (self.folder, rank, self.ranks, meeting, self.settings)
                log = self.folder / f"log-{rank}"
                ranks.append(forks.start(life, *arguments, log=log, environment={**os.environ, **place}))
            yield ranks
        finally:
            for process in ranks:
                process.kill()
                process.join()

    def to_the_end(self) -> list[Any]:
        """Lets it live, and returns the weights of each rank, and the optimizer state of its last checkpoint."""
        import torch

        from hf_soap.checkpoint.files import read

        with self.living() as ranks:
            for process in ranks:
                process.join(timeout=120)
            assert [process.exitcode for process in ranks] == [0] * self.ranks, self.log()
        last = self.folder / f"checkpoint-{self.settings['max_steps']}"
        saved = last / "optimizer.pt"
        state = read(saved if saved.is_file() else last / "optimizer_0")["state"]
        return [*(torch.load(self.folder / f"end-{rank}.pt") for rank in range(self.ranks)), state]

    def killed(self, rng: random.Random, *, saving: bool) -> None:
        """Lets it live until one of its processes is killed: while it saves, or anywhere."""
        before = self.saved()
        with self.living() as ranks:
            victim = rng.choice(ranks)
            if saving or rng.random() < 0.5:  # the rest is somewhere behind a save, or on the way to the first
                self.wait(ranks, lambda: self.saved() > before)
            time.sleep(rng.uniform(0, 0.015 if saving else 0.1))
            victim.kill()
            victim.join()
            assert victim.exitcode == -9, f"it ended before it was killed: {victim.exitcode}\n{self.log()}"

    def terminated(self, rng: random.Random) -> int:
        """Lets it get SIGTERM behind some step that it logs, and make its end; returns the step it reached."""
        before = self.log().count("'loss'")
        with self.living() as ranks:
            self.wait(ranks, lambda: self.log().count("'loss'") > before)
            for process in rng.sample(ranks, len(ranks)):
                time.sleep(rng.uniform(0, 0.05))
                process.terminate()
            for process in ranks:
                process.join(timeout=120)
            assert [process.exitcode for process in ranks] == [0] * self.ranks, self.log()
        return self.saved()

    def wait(self, ranks: list[BaseProcess], done: Any) -> None:
        """Waits for something, at most two minutes, and no longer than all processes live."""
        end = time.monotonic() + 120
        while not done():
            assert time.monotonic() < end, f"nothing happened\n{self.log()}"
            assert all(process.is_alive() for process in ranks), f"a process ended\n{self.log()}"
            time.sleep(0.0005)

    def saved(self) -> int:
        """Number of the newest checkpoint folder, whole or not."""
        return max((int(path.name.partition("-")[2]) for path in self.folder.glob("checkpoint-*")), default=0)

    def log(self) -> str:
        """What all lives said."""
        return "".join(path.read_text() for path in sorted(self.folder.glob("log-*")))
