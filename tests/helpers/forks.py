"""Processes that start at once: forks of a server that has imported what takes seconds to import."""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "transformers.models.gpt2.modeling_gpt2",
        "transformers.trainer",
        "hf_soap.trainer.trainer",
        "torch.distributed.fsdp",
    ]
)


def start(function: Callable[..., None], *arguments: Any, log: Path, environment: dict[str, str]) -> BaseProcess:
    """Starts ``function(*arguments)`` in a process of its own, with what it says appended to ``log``."""
    process = SERVER.Process(target=_work, args=(function, arguments, log, environment), daemon=True)
    process.start()
    return process


def _work(function: Callable[..., None], arguments: tuple[Any, ...], log: Path, environment: dict[str, str]) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.clear()  # what the server has is of the time when it started
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    code = 0
    try:
        function(*arguments)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo's threads sometimes abort at a regular exit
