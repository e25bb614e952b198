"""Measures on one GPU what a CPU cannot show, in stages that a cut leaves whole.

python scripts/measure_gpu.py --minutes 25 --out gpu               # all stages, the most valuable first
python scripts/measure_gpu.py --list                               # the stages and their budgets
python scripts/measure_gpu.py --stages steps profile --minutes 8 --out gpu --peers wheels
python scripts/measure_gpu.py --rehearse --out rehearsal           # tiny sizes on a CPU

It needs a checkout, torch and transformers, and neither a network nor an installation: wheels of peers are read from
the folder that --peers names. Every figure goes into OUT/gpu.json as soon as it is known; a stage that has ended there
is not repeated. `python scripts/update_readme.py --gpu OUT/gpu.json` writes the tables of docs/benchmarks.md from it.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import gc
import hashlib
import itertools
import json
import math
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
for place in (ROOT, ROOT / "scripts"):
    sys.path.insert(0, str(place))

import torch
from _gpu_contenders import contenders, unpack_peers
from torch import Tensor
from torch.nn import Parameter
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging as transformers_logging

import hf_soap  # noqa: F401 - registers the optimizers

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Setup:
    """What a stage works with.

    Attributes:
        device: Where it runs.
        rehearse: Whether sizes are tiny.
        deadline: When it will be cut, in seconds of :func:`time.monotonic`.
        put: Takes the name of a figure and its value, and saves both.
        out: Folder for files.
    """

    device: torch.device
    rehearse: bool
    deadline: float
    put: Callable[[str, Any], None]
    out: Path

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()


@dataclass(frozen=True)
class Stage:
    """A part of the measurement.

    Attributes:
        minutes: Its share of 25.
        run: What it does.
        purpose: One line on what it finds out.
    """

    minutes: float
    run: Callable[[Setup], None]
    purpose: str


class Report:
    """The JSON file of all figures: replaced whole at each change, so that a cut never leaves half of one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        """Returns what the file holds; nothing if there is none yet."""
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def put(self, section: str, name: str, value: Any) -> None:
        """Saves a figure."""
        found = self.read()
        found.setdefault(section, {})[name] = value
        with tempfile.NamedTemporaryFile("w", dir=self.path.parent, suffix=".part", delete=False) as file:
            json.dump(found, file, indent=1)
        Path(file.name).replace(self.path)


# ---------------------------------------------------------------------------------------------------------------------
# Time
# ---------------------------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    """Waits for the device to finish what was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], Any], device: torch.device, *, repeats: int = 5, warmup: int = 1) -> float:
    """Returns the median time of a call, until the device has finished it."""
    for _ in range(warmup):
        call()
    taken = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def free(device: torch.device) -> None:
    """Gives back the memory of what was dropped."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ---------------------------------------------------------------------------------------------------------------------
# Stages
# ---------------------------------------------------------------------------------------------------------------------


def run_tests(setup: Setup) -> None:
    """Runs the tests that are marked cuda, and lists the failures."""
    tests = ROOT / "tests"
    files = [str(path) for path in sorted(tests.rglob("test_*.py")) if "mark.cuda" in path.read_text()]
    if setup.rehearse:
        files = [path for path in files if path.endswith("test_cuda.py")]
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
    log = setup.out / "cuda_tests.log"
    with log.open("w") as file:
        ended = subprocess.run([*command, *files], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False)
    lines = log.read_text().splitlines()
    setup.put("exit_status", ended.returncode)
    setup.put("summary", lines[-1].strip("= ") if lines else "")
    setup.put("failures", [line for line in lines if line.startswith(("FAILED", "ERROR"))])


def compare_kernels(setup: Setup) -> None:
    """Times decompositions by size and number of matrices, and says which is the fastest that is accurate."""
    from hf_soap.linalg import decompositions, inverse_roots

    sizes = [16, 32] if setup.rehearse else [64, 256, 768, 1024, 2048, 3072, 8192]
    for n, batch in itertools.product(sizes, [1, 2] if setup.rehearse else [1, 8, 24]):
        if n * batch > 32768 or setup.seconds_left < 30:
            continue
        factor = nearly_diagonal(batch, n, setup.device)
        exact = torch.linalg.qr(factor.double())[0]
        candidates: dict[str, Callable[[Tensor], Tensor]] = {
            "qr": lambda a: torch.linalg.qr(a)[0],
            "cholesky_qr": decompositions.cholesky_qr,
        }
        found: dict[str, Any] = {}
        for name, call in candidates.items():
            with outcome(found, name):
                error = float((align(call(factor).double(), exact) - exact)[..., : n // 2].abs().max())
                found[name] = {"ms": 1e3 * seconds(functools.partial(call, factor), setup.device), "error": error}
        if n * batch <= 8192:
            with outcome(found, "eigh"):
                call = functools.partial(torch.linalg.eigh, factor)
                found["eigh"] = {"ms": 1e3 * seconds(call, setup.device, repeats=2)}
        setup.put(f"basis n={n} batch={batch}", found | {"fastest": fastest(found, limit=1e-2)})
        if n > 2048 or n * batch > 8192:
            continue
        roots: dict[str, Any] = {}
        want = inverse_roots.inverse_root(factor.double(), exponent=-0.25, ridge=1e-6)
        for method in ("eigh", "newton"):
            with outcome(roots, method):
                call = functools.partial(inverse_roots.inverse_root, factor, exponent=-0.25, ridge=1e-6, method=method)
                error = float((call().double() - want).norm() / want.norm())
                roots[method] = {"ms": 1e3 * seconds(call, setup.device, repeats=3), "error": error}
        setup.put(f"root n={n} batch={batch}", roots | {"fastest": fastest(roots, limit=1e-2)})
        free(setup.device)


def nearly_diagonal(batch: int, n: int, device: torch.device) -> Tensor:
    """Factors as refreshes meet them, (batch, n, n): eigenvalues over six decades, off diagonal by a few percent."""
    generator = torch.Generator(device).manual_seed(n)
    scales = torch.logspace(0, -3, n, device=device, dtype=torch.float64)
    noise = torch.randn(batch, n, 2 * n, device=device, generator=generator, dtype=torch.float64) * scales[:, None]
    return (noise @ noise.mT / (2 * n)).float()


def align(one: Tensor, other: Tensor) -> Tensor:
    """Gives columns the signs that they have in another basis."""
    return one * (one * other).sum(-2, keepdim=True).sign()


@contextmanager
def outcome(found: dict[str, Any], name: str) -> Iterator[None]:
    """Records an error in place of a figure."""
    try:
        yield
    except Exception as error:
        found[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}


def fastest(found: dict[str, Any], *, limit: float) -> str | None:
    """Returns the name of the fastest whose error is within the limit."""
    good = {name: row["ms"] for name, row in found.items() if row.get("error", math.inf) <= limit}
    return min(good, key=good.__getitem__, default=None)


def gpt(layers: int, width: int, vocab: int, positions: int) -> list[Shape]:
    """Shapes of a GPT-2."""
    block: list[Shape] = [(width, 3 * width), (3 * width,), (width, width), (width,), (width, 4 * width), (4 * width,)]
    block += [(4 * width, width), (width,), (width,), (width,), (width,), (width,)]
    embeddings: list[Shape] = [(vocab, width), (positions, width)] if vocab else []
    return embeddings + layers * block + [(width,), (width,)]


def llama(layers: int, width: int, key_width: int, hidden: int) -> list[Shape]:
    """Shapes of the layers of a Llama."""
    matrices: list[Shape] = [(width, width), (key_width, width), (key_width, width), (width, width)]
    return layers * [*matrices, (hidden, width), (hidden, width), (width, hidden), (width,), (width,)]


def models(setup: Setup) -> dict[str, list[Shape]]:
    """The sets of shapes that bare steps are timed on."""
    if setup.rehearse:
        return {"tiny": gpt(1, 16, 64, 16)}
    return {
        "GPT-2 124M": gpt(12, 768, 50257, 1024),
        "gpt256": gpt(6, 256, 0, 0),
        "Llama 1B, 2 of 16 layers": llama(2, 2048, 512, 8192),
    }


def time_steps(setup: Setup) -> None:
    """Times bare steps beside fused AdamW, Muon and the peers."""
    frequencies = [1, 2] if setup.rehearse else [10, 1]
    for model, shapes in models(setup).items():
        for name, make in contenders(frequencies).items():
            large = "Llama" in model
            if setup.seconds_left < 15 or (large and not re.search(r"fused|^SOAP, f=10|tf32.*f=10|heavy.*f=10", name)):
                continue
            row: dict[str, Any] = {}
            with outcome(row, "step"):
                row = time_one(make, shapes, setup, period=10 if name.endswith("f=10") else 2)
            setup.put(f"{model}: {name}", row)
            free(setup.device)


def time_one(make: Callable[..., Any], shapes: list[Shape], setup: Setup, *, period: int) -> dict[str, float]:
    """Times one optimizer over whole periods of its refreshes.

    Returns:
        Milliseconds a step until the device is done (``ms``), until the host has queued it (``host_ms``), of the
        slowest step (``worst_ms``), of the first (``first_ms``), and the peak of bytes a parameter in a step.
    """
    device = setup.device
    generator = torch.Generator(device).manual_seed(0)

    def randn(shape: Shape) -> Tensor:
        return torch.randn(shape, device=device, generator=generator) / 16

    params = [Parameter(randn(shape)) for shape in shapes]
    pools = [[randn(shape) for shape in shapes] for _ in range(2 if setup.rehearse else 3)]
    optimizer = make(params)
    pool = itertools.cycle(pools)

    def step() -> None:
        for param, grad in zip(params, next(pool), strict=True):
            param.grad = grad
        optimizer.step()

    first = seconds(step, device, repeats=1, warmup=0)
    for _ in range(2 * period):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    rounds, host = [], []
    for _ in range(3):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(period):
            step()
        host.append((time.perf_counter() - start) / period)
        synchronize(device)
        rounds.append((time.perf_counter() - start) / period)
    worst = max(seconds(step, device, repeats=1, warmup=0) for _ in range(period))
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    found = {
        "ms": 1e3 * statistics.median(rounds),
        "host_ms": 1e3 * statistics.median(host),
        "worst_ms": 1e3 * worst,
        "first_ms": 1e3 * first,
        "peak_bytes_per_parameter": peak / sum(math.prod(shape) for shape in shapes),
    }
    return {name: round(value, 3) for name, value in found.items()}


def profile_step(setup: Setup) -> None:
    """Counts launches and host waits of one step with and without a refresh, and says what the time went to."""
    from hf_soap import MARS, SOAP, Shampoo

    model, shapes = next(iter(models(setup).items()))
    for label, make in {
        "SOAP": functools.partial(SOAP, precondition_frequency=10, refresh_growth=0.0),
        "SOAP, tf32 rotations": functools.partial(
            SOAP, precondition_frequency=10, refresh_growth=0.0, matmul_dtype="tf32"
        ),
        "Shampoo": functools.partial(Shampoo, precondition_frequency=10),
        "MARS": MARS,
    }.items():
        profile_optimizer(setup, f"{model}: {label}", make, shapes)
        free(setup.device)


def profile_optimizer(setup: Setup, name: str, make: Callable[..., Any], shapes: list[Shape]) -> None:
    """Profiles a step of one optimizer without a refresh, and one with it."""
    params = [Parameter(torch.randn(shape, device=setup.device) / 16) for shape in shapes]
    grads = [torch.randn_like(param) / 16 for param in params]
    optimizer = make(params, lr=1e-4)

    def step() -> None:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()

    for _ in range(12):
        step()
    setup.put(f"{name}, a step without a refresh", profiled(step, setup.device))
    last = {"SOAP": 0, "Shampoo": 9}.get(type(optimizer).__name__)  # SOAP's first step only seeds
    if last is not None:
        while int(optimizer.state[params[0]]["step"]) % 10 != last:
            step()
        setup.put(f"{name}, a step with a refresh", profiled(step, setup.device))


def profiled(step: Callable[[], None], device: torch.device) -> dict[str, Any]:
    """Profiles one step."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    synchronize(device)
    with profile(activities=activities) as profiler:
        start = time.perf_counter()
        step()
        queued = time.perf_counter() - start
        synchronize(device)
        wall = time.perf_counter() - start
    events = profiler.events() or []
    on_device = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [event for event in on_device if not event.name.startswith("Optimizer.")]  # a range around all
    busy, end = 0.0, -math.inf
    for kernel in sorted(kernels, key=lambda event: event.time_range.start):
        busy += max(0.0, kernel.time_range.end - max(end, kernel.time_range.start))
        end = max(end, kernel.time_range.end)
    by_name: dict[str, list[float]] = {}
    for kernel in kernels:
        by_name.setdefault(kernel.name[:90], []).append(kernel.time_range.end - kernel.time_range.start)
    top = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:14]
    calls = [event.name for event in events]
    return {
        "wall_ms": round(1e3 * wall, 3),
        "queued_ms": round(1e3 * queued, 3),
        "device_busy_ms": round(busy / 1e3, 3),
        "launches": sum(name.startswith(("cudaLaunchKernel", "cuLaunchKernel")) for name in calls),
        "operators": sum(name.startswith("aten::") for name in calls),
        "host_waits": sum(name in HOST_WAITS for name in calls),
        "kernels": [{"name": name, "ms": round(sum(each) / 1e3, 3), "calls": len(each)} for name, each in top],
    }


HOST_WAITS = {"cudaStreamSynchronize", "cudaEventSynchronize", "aten::item", "aten::_local_scalar_dense"}
"""Calls for which the host waits for the device."""


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------

RUNS: dict[str, dict[str, Any]] = {
    "AdamW, lr 1.8e-3": {"optim": "adamw_torch_fused", "learning_rate": 1.8e-3, "adam_beta2": 0.95},
    "SOAP, preset=frontier, tf32 rotations, lr 3e-3": {
        "optim": "soap",
        "learning_rate": 3e-3,
        "optim_args": "preset=frontier,matmul_dtype=tf32",
    },
    "SOAP, tf32 rotations, lr 3e-3": {"optim": "soap", "learning_rate": 3e-3, "optim_args": "matmul_dtype=tf32"},
    "SOAP, preset=official, lr 3e-3": {"optim": "soap", "learning_rate": 3e-3, "optim_args": "preset=official"},
    "AdamW, lr 6e-4": {"optim": "adamw_torch_fused", "learning_rate": 6e-4, "adam_beta2": 0.95},
    "KL-SOAP, tf32 rotations, lr 3e-3": {
        "optim": "kl_soap",
        "learning_rate": 3e-3,
        "optim_args": "matmul_dtype=tf32",
    },
    "MARS, lr 3e-3": {"optim": "mars", "learning_rate": 3e-3},
    "AdamW, lr 3e-3": {"optim": "adamw_torch_fused", "learning_rate": 3e-3, "adam_beta2": 0.95},
}
"""Arguments of the Trainer for each run that is trained to its end, the most valuable first."""

POLICIES: dict[str, str | None] = {
    "AdamW (fused)": None,
    "SOAP f=10": "refresh_growth=0",
    "SOAP f=10, no finite check": "refresh_growth=0,nonfinite=off",
    "SOAP f=10, tf32 rotations": "refresh_growth=0,matmul_dtype=tf32",
    "SOAP f=1": "precondition_frequency=1",
    "SOAP f=1, tf32 rotations": "precondition_frequency=1,matmul_dtype=tf32",
    "SOAP f=10, staggered": "refresh_growth=0,stagger=true",
    "SOAP f=10, tf32, overlap_refresh": "refresh_growth=0,matmul_dtype=tf32,overlap_refresh=true",
    "AdamW (fused), again": None,
}
"""optim_args of each run that is only timed; None stands for AdamW."""


def time_training(setup: Setup) -> None:
    """Times training steps of GPT-2 124M through the Trainer under each policy, without a wait inside a step."""
    length, micro, accumulation = SIZES["tiny" if setup.rehearse else "full"]
    vocab, period = (512, 2) if setup.rehearse else (50257, 10)
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(vocab, (16 * micro * accumulation, length), generator=generator, dtype=torch.int32)
    base = 0.0
    for name, options in list(POLICIES.items())[: 3 if setup.rehearse else None]:
        if setup.seconds_left < 30:
            break
        arguments: dict[str, Any] = {"optim": "adamw_torch_fused" if options is None else "soap"}
        arguments |= {"optim_args": options} if options else {}
        row: dict[str, Any] = {}
        with outcome(row, "training"):
            trained = train_once(
                setup,
                blocks,
                None,
                {"learning_rate": 3e-4, **arguments},
                vocab=vocab,
                micro=micro,
                accumulation=accumulation,
                steps=3 + 2 * period,
                timed_from=3,
            )
            row = {key: trained[key] for key in ("seconds_per_step", "peak_gib")}
            base = base or row["seconds_per_step"]
            row["over_adamw"] = round(row["seconds_per_step"] / base - 1, 4)
        setup.put(name, row)
        free(setup.device)


SIZES = {"tiny": (32, 2, 1), "full": (1024, 32, 8)}
"""Tokens of a sequence, sequences of a batch, and batches of a step."""


def train_gpt2(setup: Setup) -> None:
    """Trains GPT-2 124M from scratch through the Trainer on the text that Python and its packages ship."""
    length, micro, accumulation = SIZES["tiny" if setup.rehearse else "full"]
    began = time.monotonic()
    blocks, vocab = corpus(
        length=length,
        limit=2_000_000 if setup.rehearse else 150_000_000,
        vocab_size=512 if setup.rehearse else 16384,
        sample=1_000_000 if setup.rehearse else 30_000_000,
    )
    held_out, train = blocks[: 2 * micro], blocks[2 * micro :]
    setup.put(
        "corpus",
        {
            "tokens": train.numel(),
            "held-out tokens": held_out.numel(),
            "vocabulary": vocab,
            "seconds": round(time.monotonic() - began, 1),
        },
    )
    run = functools.partial(train_once, setup, train, vocab=vocab, micro=micro, accumulation=accumulation)
    probe = run(None, RUNS["AdamW, lr 1.8e-3"], steps=2 if setup.rehearse else 5, timed_from=1)
    count = 2 if setup.rehearse else 4
    # A tenth for what takes longer than AdamW, for evaluations and starts.
    steps = int(0.9 * setup.seconds_left / count / probe["seconds_per_step"])
    steps = 3 if setup.rehearse else max(40, min(steps, 400, len(train) // (micro * accumulation)))
    setup.put("length", {"steps": steps, "tokens a step": micro * accumulation * length})
    for name, arguments in list(RUNS.items())[: count if setup.rehearse else None]:
        if setup.seconds_left < 1.2 * steps * probe["seconds_per_step"]:
            break
        row: dict[str, Any] = {}
        with outcome(row, "training"):
            row = run(held_out, arguments, steps=steps)
        setup.put(name, row)
        free(setup.device)


class Clock(TrainerCallback):
    """Takes the time of all steps after the first ones, without evaluations, the device's queue included.

    Args:
        timed_from: The last step that is not timed.
    """

    def __init__(self, timed_from: int) -> None:
        self.timed_from, self.steps, self.seconds = timed_from, 0, 0.0
        self.began: float | None = None

    @property
    def seconds_per_step(self) -> float:
        return self.seconds / max(1, self.steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.began is None and state.global_step >= self.timed_from:
            synchronize(args.device)
            self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.began is None:
            return
        self.steps += 1
        if control.should_evaluate or state.global_step == state.max_steps:
            synchronize(args.device)
            self.seconds += time.perf_counter() - self.began
            self.began = None


def train_once(
    setup: Setup,
    train: Tensor,
    held_out: Tensor | None,
    arguments: dict[str, Any],
    *,
    vocab: int,
    micro: int,
    accumulation: int,
    steps: int,
    timed_from: int = 1,
) -> dict[str, Any]:
    """Trains one model.

    Returns:
        Seconds a step, with those of the evaluations where there are any, and losses by step.
    """

    class Blocks(torch.utils.data.Dataset[dict[str, Tensor]]):
        def __init__(self, blocks: Tensor) -> None:
            self.blocks = blocks

        def __len__(self) -> int:
            return len(self.blocks)

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            block = self.blocks[index].long()
            return {"input_ids": block, "labels": block}

    set_seed(0)
    sizes = {"n_layer": 1, "n_embd": 32, "n_head": 2} if setup.rehearse else {}
    config = GPT2Config(
        vocab_size=vocab,
        n_positions=train.shape[1],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        **sizes,
    )
    clock = Clock(timed_from)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=GPT2LMHeadModel(config),
            args=TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=micro,
                per_device_eval_batch_size=micro,
                gradient_accumulation_steps=accumulation,
                warmup_steps=math.ceil(0.15 * steps),
                lr_scheduler_type="cosine",
                weight_decay=0.1,
                bf16=setup.device.type == "cuda",
                use_cpu=setup.device.type == "cpu",
                logging_steps=max(1, steps // 16) if held_out is not None else steps,
                eval_strategy="no" if held_out is None else "steps",
                eval_steps=max(1, steps // 8),
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=0,
                **arguments,
            ),
            train_dataset=Blocks(train),
            eval_dataset=None if held_out is None else Blocks(held_out),
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        history = trainer.state.log_history
        losses = [(entry["step"], round(entry["loss"], 4)) for entry in history if "loss" in entry]
        evaluated = {entry["step"]: round(entry["eval_loss"], 4) for entry in history if "eval_loss" in entry}
    return {
        "seconds_per_step": round(clock.seconds_per_step, 4),
        "final_eval_loss": list(evaluated.values())[-1] if evaluated else None,
        "eval_losses": evaluated,
        "train_losses": losses,
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if setup.device.type == "cuda" else 0,
    }


def corpus(*, length: int, limit: int, vocab_size: int, sample: int) -> tuple[Tensor, int]:
    """Reads the text of Python and its packages, and encodes it with a BPE that is trained on it.

    Args:
        length: Tokens of a block.
        limit: Bytes to read at most.
        vocab_size: Tokens of the BPE.
        sample: Bytes that it is trained on.

    Returns:
        The blocks, (blocks, length), int32, in a fixed order that mixes files, and the size of the vocabulary.
    """
    from tokenizers import ByteLevelBPETokenizer

    texts = read_texts(limit)
    pieces, size = [], 0
    for text in texts:
        pieces.append(text)
        size += len(text)
        if size > sample:
            break
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(pieces, vocab_size=vocab_size, special_tokens=["<|endoftext|>"], show_progress=False)
    ids: list[int] = []
    for first in range(0, len(texts), 512):
        for encoding in bpe.encode_batch(texts[first : first + 512]):
            ids += [0, *encoding.ids]
    tokens = torch.tensor(ids, dtype=torch.int32)
    blocks = tokens[: len(tokens) // length * length].view(-1, length)
    return blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))], bpe.get_vocab_size()


def read_texts(limit: int) -> list[str]:
    """Returns the sources and documents of Python and its packages, each once, in a fixed and mixed order."""
    folders = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")} | {
        str(Path(torch.__file__).parents[1])
    }
    paths = sorted(
        {path for folder in folders for kind in ("py", "md", "rst") for path in Path(folder).rglob(f"*.{kind}")}
    )
    random.Random(0).shuffle(paths)
    texts, seen, size = [], set(), 0
    for path in paths:
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError):
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if not 500 < len(text) < 500_000 or digest in seen:
            continue
        seen.add(digest)
        texts.append(text)
        size += len(text)
        if size > limit:
            break
    return texts


# ---------------------------------------------------------------------------------------------------------------------
# The whole
# ---------------------------------------------------------------------------------------------------------------------

STAGES: dict[str, Stage] = {
    "tests": Stage(1.5, run_tests, "the tests that are marked cuda"),
    "steps": Stage(5, time_steps, "bare steps beside fused AdamW, Muon and the peers"),
    "timing": Stage(4.5, time_training, "training steps of GPT-2 124M under each policy, beside AdamW"),
    "profile": Stage(1.5, profile_step, "launches, host waits and gaps of a step"),
    "kernels": Stage(2, compare_kernels, "QR, Cholesky-QR and eigh, Newton and eigh, by size and batch"),
    "train": Stage(10.5, train_gpt2, "GPT-2 124M through the Trainer, to its end"),
}


def describe(device: torch.device, *, rehearse: bool, peers: Path | None) -> dict[str, Any]:
    """Says what was measured on, and when."""

    def output(*command: str) -> str:
        try:
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return ""

    def version_of(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    names = ("torch", "transformers", "accelerate", "triton")
    versions = {name: found for name in names if (found := version_of(name))}
    wheels = sorted(peers.glob("*.whl")) if peers else []
    versions |= dict(wheel.name.split("-")[:2] for wheel in wheels)
    is_gpu = device.type == "cuda"
    return {
        "rehearsal": rehearse,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": output("git", "rev-parse", "--short", "HEAD") or os.environ.get("COMMIT", ""),
        "card": torch.cuda.get_device_name(device) if is_gpu else platform.machine(),
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if is_gpu else "",
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "versions": versions,
    }


def run_stage(name: str, args: argparse.Namespace) -> None:
    """Runs one stage in this process."""
    if args.peers:
        unpack_peers(args.peers, args.out / "peers")
    transformers_logging.set_verbosity_error()
    device = torch.device("cpu" if args.rehearse else "cuda")
    report = Report(args.out / "gpu.json")
    setup = Setup(
        device=device,
        rehearse=args.rehearse,
        deadline=time.monotonic() + args.seconds,
        put=functools.partial(report.put, name),
        out=args.out,
    )
    STAGES[name].run(setup)


def main() -> None:
    """Runs the stages one after another, each in a process of its own that ends with its budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25, help="for all stages together")
    parser.add_argument("--out", type=Path, help="folder of gpu.json and the logs")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument(
        "--peers",
        type=Path,
        help="folder with wheels of heavyball, pytorch_optimizer and DASH, and the official soap.py",
    )
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--list", action="store_true", help="print the stages and their budgets")
    parser.add_argument("--in-this-process", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.list:
        for name, stage in STAGES.items():
            print(f"{name:10} {stage.minutes:5.1f} min  {stage.purpose}")
        print(f"{'together':10} {sum(stage.minutes for stage in STAGES.values()):5.1f} min")
        return
    if args.out is None:
        parser.error("wanted --out FOLDER for gpu.json and the logs, got none")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.in_this_process:
        run_stage(args.in_this_process, args)
        return
    if not (args.rehearse or torch.cuda.is_available()):
        parser.error("wanted a CUDA device, got none; --rehearse runs tiny sizes on a CPU")
    report = Report(args.out / "gpu.json")
    device = torch.device("cpu" if args.rehearse else "cuda")
    for key, value in describe(device, rehearse=args.rehearse, peers=args.peers).items():
        report.put("machine", key, value)
    end = time.monotonic() + 60 * args.minutes
    waiting = [name for name in args.stages if report.read().get("status", {}).get(name) != "done"]
    while waiting:
        name = waiting[0]
        share = STAGES[name].minutes / sum(STAGES[one].minutes for one in waiting)
        budget = share * (end - time.monotonic())  # what earlier stages left over goes to all later ones
        waiting.pop(0)
        report.put("status", name, "started")
        status = run_child(name, args, budget)
        report.put("status", name, status)
        print(f"{name}: {status}", flush=True)


def run_child(name: str, args: argparse.Namespace, budget: float) -> str:
    """Runs a stage in a process that is stopped when its time is over; returns how it ended."""
    command = [
        sys.executable,
        __file__,
        "--out",
        str(args.out),
        "--in-this-process",
        name,
        "--seconds",
        str(budget - 5),
    ]
    command += ["--rehearse"] if args.rehearse else []
    command += ["--peers", str(args.peers)] if args.peers else []
    log = args.out / f"{name}.log"
    environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    environment |= {"OMP_NUM_THREADS": "1"} if args.rehearse else {}
    with log.open("w") as file:
        try:
            ended = subprocess.run(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=budget,
                env=os.environ | environment,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return "cut"
    return "done" if ended.returncode == 0 else f"failed: {log.read_text()[-2000:]}"


if __name__ == "__main__":
    main()
