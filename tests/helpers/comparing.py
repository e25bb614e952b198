"""What the tests of ``hf-soap compare`` share: tiny settings, and runs with losses of our choice."""

from pathlib import Path

from typer.testing import CliRunner, Result

from hf_soap.__main__ import app
from hf_soap.cli.compare.results import EvalPoint, RunResult, RunSettings

SETTINGS = RunSettings(
    optimizer="adamw_torch_fused",
    optim_args="",
    lr=1e-2,
    adam_beta2=0.999,
    steps=6,
    batch_size=4,
    model="",
    lora_r=0,
    layers=1,
    width=16,
    heads=2,
    schedule="cosine",
    warmup=0.0,
    weight_decay=0.01,
    max_grad_norm=1.0,
    eval_every=2,
    seed=0,
)
TINY = [
    *("--layers", "1", "--width", "16", "--heads", "2", "--vocab-size", "256"),
    *("--seq-len", "16", "--batch-size", "4", "--warmup", "0"),
]


def run_compare(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["compare", *map(str, arguments)], obj=[], env={"COLUMNS": "120"})


def ends_with(settings: RunSettings, loss: float) -> RunResult:
    """A run whose loss fell from 8 to this along a straight line."""
    half = settings.steps // 2
    evals = [EvalPoint(0, 0.0, 8.0), EvalPoint(half, 1.0, (8 + loss) / 2), EvalPoint(settings.steps, 2.0, loss)]
    return RunResult(settings, evals, [8.0, loss], 2.0, 0.5, 80, 10, Path(f"{settings.label}-{settings.lr:g}"))
