"""Runs a function in several processes that talk by gloo."""

import faulthandler
import importlib
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import forks


def run(
    function: str, ranks: int, meet_in: Path, *, seconds: int = 300, patience: int = 1800, **arguments: Any
) -> None:
    """Calls MODULE.FUNCTION(**arguments) in ``ranks`` processes; an assertion that fails in one fails here.

    A process that has not ended after ``seconds`` says where it waits, and fails; a collective gives up after
    ``patience`` seconds.
    """
    meet_in.mkdir(parents=True, exist_ok=True)
    meeting = meet_in / f"meeting-{function}-{ranks}-{len(list(meet_in.iterdir()))}"
    logs = [meeting.with_name(f"{meeting.name}-log-{rank}") for rank in range(ranks)]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "RANKS_SECONDS": str(seconds),
        "RANKS_PATIENCE": str(patience),
    }
    workers = [
        forks.start(
            _work,
            *(function, rank, ranks, meeting, arguments),
            log=log,
            environment={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, log in enumerate(logs)
    ]
    end = time.monotonic() + seconds + 30
    for worker in workers:
        worker.join(max(0, end - time.monotonic()))
    late = [worker.exitcode is None for worker in workers]
    for worker in workers:
        worker.kill()
        worker.join()
    failed = [
        f"rank {rank}, {f'no end within {seconds} s' if slow else f'exit code {worker.exitcode}'}:\n{log.read_text()}"
        for rank, (worker, slow, log) in enumerate(zip(workers, late, logs, strict=True))
        if worker.exitcode
    ]
    assert not failed, "\n".join(failed)


def _work(function: str, rank: int, ranks: int, meeting: Path, arguments: dict[str, Any]) -> None:
    """Is one of the processes."""
    import torch.distributed as dist

    faulthandler.enable()  # gloo aborts where messages do not match
    faulthandler.dump_traceback_later(int(os.environ["RANKS_SECONDS"]), exit=True)
    patience = timedelta(seconds=int(os.environ["RANKS_PATIENCE"]))
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks, timeout=patience)
    module, _, name = function.partition(".")
    getattr(importlib.import_module(module), name)(**arguments)
    dist.barrier()
