"""Work beside the training loop: one thread that lives only while it has something to do."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future

import torch

from hf_soap.engine.failures import Failures
from hf_soap.rules.context import Roots


class Background:
    """Computes inverse roots from snapshots, one job after another.

    The thread ends with its last job, so that none is left after training or after an exception. A job that raises is
    counted, and its caller goes on with what it has.

    Args:
        failures: Counts them.
    """

    def __init__(self, failures: Failures) -> None:
        self._failures = failures
        self._jobs: dict[Hashable, Future[Roots]] = {}
        self._queue: deque[tuple[Future[Roots], Callable[[], Roots]]] = deque()
        self._lock = threading.Lock()
        self._running = False

    def pending(self, key: Hashable) -> bool:
        """Whether a job was submitted under this key and not taken yet."""
        return key in self._jobs

    def submit(self, key: Hashable, work: Callable[[Roots], Roots], snapshot: Roots) -> None:
        """Starts ``work(snapshot)``; an earlier job under the same key, whose roots were not taken, is dropped.

        Args:
            key: Whose roots they are.
            work: Runs on the thread, and on a stream of its own where the tensors are on a GPU.
            snapshot: Tensors that nothing changes from here on.
        """
        future: Future[Roots] = Future()
        self._jobs[key] = future
        with self._lock:
            self._queue.append((future, _on_side_stream(work, snapshot)))
            if not self._running:
                self._running = True
                threading.Thread(target=self._drain, name="hf_soap roots", daemon=True).start()

    def take(self, key: Hashable, *, wait: bool) -> Roots | None:
        """Returns the roots of a job that is done, and forgets the job.

        Args:
            key: As submitted.
            wait: Wait for a job that is not done yet.

        Returns:
            None if there is no such job, it is not done, or it failed.
        """
        future = self._jobs.get(key)
        if future is None or not (wait or future.done()):
            return None
        del self._jobs[key]
        error = future.exception()
        if error is None:
            return future.result()
        self._failures.add(1, error)
        return None

    def _drain(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._running = False
                    return
                future, work = self._queue.popleft()
            try:
                future.set_result(work())
            except Exception as error:
                future.set_exception(error)


def _on_side_stream(work: Callable[[Roots], Roots], snapshot: Roots) -> Callable[[], Roots]:
    """On a GPU, lets the work start when the snapshot is complete and return when its kernels are done."""
    device = next(iter(snapshot.values())).device
    if device.type != "cuda":
        return lambda: _without_grad(work, snapshot)
    ready = torch.cuda.current_stream(device).record_event()

    def run() -> Roots:
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            roots = _without_grad(work, snapshot)
        stream.synchronize()
        return roots

    return run


def _without_grad(work: Callable[[Roots], Roots], snapshot: Roots) -> Roots:
    with torch.no_grad():  # the mode is per thread, and this one is new
        return work(snapshot)
