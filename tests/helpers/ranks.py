"""Runs a function of a test module in several processes that talk by gloo.

python tests/helpers/ranks.py MODULE.FUNCTION RANK RANKS MEETING-FILE JSON
"""

import faulthandler
import importlib
import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any


def run(
    function: str, ranks: int, meet_in: Path, *, seconds: int = 300, patience: int = 1800, **arguments: Any
) -> None:
    """Calls MODULE.FUNCTION(**arguments) in ``ranks`` processes; an assertion that fails in one fails here.

    A process that has not ended after ``seconds`` says where it waits, and fails; a collective gives up after
    ``patience`` seconds.
    """
    meet_in.mkdir(parents=True, exist_ok=True)
    meeting = meet_in / f"meeting-{function}-{ranks}-{len(list(meet_in.iterdir()))}"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),  # the function may stand in a test module, wherever that lies
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "RANKS_SECONDS": str(seconds),
        "RANKS_PATIENCE": str(patience),
    }
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, function, str(rank), str(ranks), str(meeting), json.dumps(arguments)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = []
    for worker in workers:
        try:
            outputs.append(worker.communicate(timeout=seconds + 30)[0])
        except subprocess.TimeoutExpired:
            for other in workers:
                other.kill()
            outputs.append(f"no end within {seconds} s: {worker.communicate()[0]}")
    failed = [
        f"rank {rank}:\n{text}" for rank, (text, w) in enumerate(zip(outputs, workers, strict=True)) if w.returncode
    ]
    assert not failed, "\n".join(failed)


def main() -> None:
    """Is one of the processes."""
    function, rank, ranks, meeting, arguments = sys.argv[1:]
    faulthandler.enable()  # gloo aborts where messages do not match
    faulthandler.dump_traceback_later(int(os.environ["RANKS_SECONDS"]), exit=True)
    module, _, name = function.partition(".")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    patience = timedelta(seconds=int(os.environ["RANKS_PATIENCE"]))
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=int(rank), world_size=int(ranks), timeout=patience
    )
    try:
        getattr(importlib.import_module(module), name)(**json.loads(arguments))
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)  # the others wait in a collective; communicate() ends them
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes abort at a regular exit


if __name__ == "__main__":
    main()
