"""The runs of scripts/ladder.py: made by worker processes, each only once."""

from __future__ import annotations

import functools
import multiprocessing
import os
import tempfile
import threading
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import torch
from transformers.utils import logging

from hf_soap.cli.compare.corpus import Corpus, build_corpus
from hf_soap.cli.compare.results import RunLog, RunResult, RunSettings
from hf_soap.cli.compare.training import train_once


class MissingRun(Exception):
    """Raised where a run is needed that is neither in the log nor to be made."""


class Runs:
    """Runs by their settings: read from the log, or made by worker processes and added to it.

    Args:
        log: The finished runs.
        data: Text to train on; None is Python's standard library.
        workers: Processes that train one model each; without any, a run that is not in the log is missing.
        threads: Threads of each.
    """

    def __init__(self, log: RunLog, data: Path | None, workers: int = 0, threads: int = 1) -> None:
        self.log, self.data = log, data
        self.futures: dict[RunSettings, Future[RunResult]] = {}
        self.pool: ProcessPoolExecutor | None = None
        if workers:
            context = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(workers, context, start_worker, (data, threads))

    def __call__(self, settings: RunSettings) -> RunResult:
        """Returns a run after it has ended."""
        return self.start(settings).result()

    def start(self, settings: RunSettings) -> Future[RunResult]:
        """Starts a run, unless there is one, and returns its future."""
        if settings not in self.futures:
            self.futures[settings] = self._new(settings)
        return self.futures[settings]

    def close(self) -> None:
        """Waits until all runs have ended and are in the log."""
        if self.pool:
            self.pool.shutdown()

    def _new(self, settings: RunSettings) -> Future[RunResult]:
        done = self.log.get(settings)
        if self.pool and not done:
            future = self.pool.submit(train, settings, self.data)
            future.add_done_callback(self._record)
            return future
        future: Future[RunResult] = Future()
        if done:
            future.set_result(done)
        else:
            future.set_exception(MissingRun())
        return future

    def _record(self, future: Future[RunResult]) -> None:
        if future.exception() is None:
            run = future.result()
            self.log.add(run)
            name = (
                f"{run.settings.label}, lr {run.settings.lr:g}, {run.settings.steps} steps, seed {run.settings.seed}"
            )
            print(f"{name}: {run.final_loss:.4f} after {run.seconds:.0f} s", flush=True)


def start_worker(data: Path | None, threads: int) -> None:
    """Prepares a process that trains, and ends with the process that started it."""

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    text(data)


def train(settings: RunSettings, data: Path | None) -> RunResult:
    """Makes one run and deletes its checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        return train_once(settings, text(data), Path(folder), lambda step: None)


@functools.cache
def text(data: Path | None) -> Corpus:
    """Reads the text once per process."""
    return build_corpus(data, vocab_size=256, seq_len=64, max_held_out=256)
