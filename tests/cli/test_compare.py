"""``hf-soap compare``: real training runs of a tiny model, and what is made of their losses."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comparing import SETTINGS, TINY, ends_with, run_compare
from paths import ROOT

from hf_soap.cli.compare import report
from hf_soap.cli.compare.contenders import Contender, per_contender, read_contenders
from hf_soap.cli.compare.corpus import build_corpus
from hf_soap.cli.compare.results import EvalPoint, RunLog, RunResult, RunSettings, present_conditions
from hf_soap.cli.compare.summary import Spread, crossing, equal_loss, summarize
from hf_soap.cli.compare.sweep import MAX_WIDER, Case, run_case
from hf_soap.cli.compare.training import train_once


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for name in ("cli/compare/command.py", "cli/run.py", "cli/compare/corpus.py"):
        (folder / Path(name).name).write_bytes((ROOT / "hf_soap" / name).read_bytes())
    (folder / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    return folder


@pytest.fixture(scope="session")
def corpus(text):
    return build_corpus(text, vocab_size=256, seq_len=16, max_held_out=8)


def test_compare_reports_what_it_trained(text, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_soap.cli.compare.command.DEFAULT_STEPS", 6)
    result = run_compare(
        "adamw", "soap:precondition_frequency=2,block_size=8",
        "--steps", "soap=4", "--lr", "adamw=1e-3", "--lr", "soap=1e-2",
        "--eval-every", 4, "--data", text, "--output-dir", tmp_path, *TINY,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "compare.json").read_text())
    adamw, soap = report["runs"]
    assert [point["step"] for point in adamw["evals"]] == [0, 4, 6]
    assert [point["step"] for point in soap["evals"]] == [0, 4]
    assert (len(adamw["train_losses"]), len(soap["train_losses"])) == (6, 4)
    # Equal weights and an equal first batch, before any update.
    assert adamw["evals"][0]["loss"] == soap["evals"][0]["loss"]
    assert adamw["train_losses"][0] == soap["train_losses"][0]
    assert adamw["train_losses"][2:] != soap["train_losses"][2:]

    for row, run in zip(report["table"], report["runs"], strict=True):
        assert row["final_loss"] == dict.fromkeys(("mean", "low", "high"), run["evals"][-1]["loss"]) | {"std": 0}
        assert 0 < row["optimizer_seconds"] < row["seconds"]
        assert f"{row['final_loss']['mean']:.4f}" in result.output
        assert row["checkpoint"] in result.output
    assert [run["settings"]["adam_beta2"] for run in report["runs"]] == [0.95, 0.999]
    first, second = report["table"]
    assert first["state_bytes_per_parameter"] == pytest.approx(8, rel=0.01)
    assert second["state_bytes_per_parameter"] > 8
    assert first["steps_to_first"] == 6
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(second["checkpoint"])
    tokenizer = AutoTokenizer.from_pretrained(second["checkpoint"])
    blocks = build_corpus(text, vocab_size=256, seq_len=16, max_held_out=256).held_out
    assert tokenizer.decode(blocks[0]) in "".join(path.read_text() for path in text.glob("*.py"))
    with torch.no_grad():
        loss = model(input_ids=blocks, labels=blocks).loss.item()
    assert loss == pytest.approx(second["final_loss"]["mean"], rel=1e-5)


def test_train_once_repeats_bit_for_bit(corpus, tmp_path):
    settings = replace(SETTINGS, optimizer="soap")
    one, two = (train_once(settings, corpus, tmp_path, lambda step: None) for _ in range(2))
    assert one.train_losses == two.train_losses
    assert [point.loss for point in one.evals] == [point.loss for point in two.evals]
    other = train_once(replace(settings, seed=1), corpus, tmp_path, lambda step: None)
    assert one.train_losses != other.train_losses


def test_every_optimizer_sees_the_same_batches(corpus, tmp_path):
    """With a learning rate of zero the losses of the steps depend on weights and batches alone."""
    runs = [
        train_once(replace(SETTINGS, optimizer=name, lr=0.0, steps=steps), corpus, tmp_path / name, lambda step: None)
        for name, steps in (("adamw_torch_fused", 6), ("soap", 4))
    ]
    assert runs[0].train_losses[:4] == runs[1].train_losses
    assert len(set(runs[1].train_losses)) == 4


def test_a_schedule_takes_options(corpus, tmp_path):
    """Each of two cycles has the rates of every other step of one cycle."""
    rates = []
    for cycles in (2, 1):
        settings = replace(SETTINGS, schedule=f"cosine_with_restarts:num_cycles={cycles}")
        run = train_once(settings, corpus, tmp_path, lambda step: None)
        history = json.loads((run.checkpoint / "trainer_state.json").read_text())["log_history"]
        rates.append([entry["learning_rate"] for entry in history if "learning_rate" in entry])
    assert rates[0] == pytest.approx([*rates[1][::2], *rates[1][::2]])


def test_exact_mars_is_one_of_the_contenders(corpus, tmp_path):
    """It needs a second backward pass, which the Trainer of transformers does not make."""
    settings = replace(SETTINGS, optimizer="mars", steps=4)
    exact, approximate = (
        train_once(replace(settings, optim_args=f"exact={given}"), corpus, tmp_path / given, lambda step: None)
        for given in ("true", "false")
    )
    assert exact.train_losses[0] == approximate.train_losses[0]
    assert exact.train_losses[2:] != approximate.train_losses[2:]


def test_averages_count_as_state_and_raw_weights_do_not(corpus, tmp_path):
    """After training the model has the averages, and the optimizer keeps the raw weights beside them."""
    sizes = [
        train_once(replace(SETTINGS, optimizer="mars", optim_args=given, steps=4), corpus, tmp_path, lambda step: None)
        for given in ("", "average_horizon=2")
    ]
    assert sizes[1].state_bytes - sizes[0].state_bytes == 4 * sizes[0].parameters


def test_diverged_run_is_reported_as_such(text, tmp_path):
    """The Trainer replaces a loss that is NaN by an average of earlier ones, unless told otherwise."""
    arguments = ["--steps", 6, "--lr", 1e30, "--max-grad-norm", 0, "--data", text, "--output-dir", tmp_path, *TINY]
    result = run_compare("sgd", *arguments)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "compare.json").read_text())
    assert report["runs"][0]["train_losses"][-1] is None
    assert report["table"][0]["final_loss"]["mean"] is None
    assert report["table"][0]["steps_to_first"] is None


def test_a_run_that_is_given_up_has_diverged(corpus, tmp_path):
    settings = replace(SETTINGS, optimizer="soap", optim_args="max_skipped_in_a_row=2", lr=1e30, max_grad_norm=0.0)
    run = train_once(replace(settings, steps=12), corpus, tmp_path, lambda step: None)
    assert run.final_loss == math.inf
    assert len(run.train_losses) < 12


def test_compare_goes_on_without_matplotlib(text, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run_compare("adamw", "--steps", 1, "--data", text, "--output-dir", tmp_path, *TINY)
    assert result.exit_code == 0, result.output
    assert "pip install 'hf-soap[plot]'" in result.output
    assert (tmp_path / "compare.json").exists()
    assert not (tmp_path / "compare.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sopa"], "soap"),
        (["adamw", "adamw_torch_fused"], "got adamw_torch_fused twice"),
        (["adafactor"], "--lr adafactor=1e-3"),
        (["muon"], "--lr muon=2e-2"),
        (["soap", "--lr", "adamw=1"], "--lr adamw=1 is for adamw_torch_fused, wanted one of soap"),
        (["soap", "--lr", "soap:eps=1=1"], "--lr soap:eps=1=1 is for soap:eps=1, wanted one of soap"),
        (["soap", "--widen"], "add --lr-sweep 3"),
        (["soap", "--steps", "5", "--horizons", "5,10"], "wanted one of them"),
        (["soap", "--horizons", "5,1e1"], "split whole numbers by commas"),
        (["soap", "--seeds", "0"], "must be >= 1, got 0"),
        (["soap", "--model", "absent", "--lr", "1"], "got the model 'absent'"),
        (["soap", "--model", "gpt2"], "--lr soap=1e-3"),
        (["soap", "--steps", "0"], "must be >= 1, got 0"),
        (["soap", "--steps", "5", "--steps", "6"], "remove one of them"),
        (["soap:precondition_frequenzy=5"], "precondition_frequency"),
        (["soap", "--data", "absent"], "got absent; check the path"),
        (["soap", "--schedule", "absent"], "got the schedule 'absent', wanted one of the Trainer's: linear, cosine"),
        (["soap", "--schedule", "cosine_with_restarts:cycles=2"], "unexpected keyword argument 'cycles'"),
        (["soap", "--schedule", "cosine_with_restarts:num_cycles=two"], "whose options are wrong"),
        (["soap", "--width", "15"], "must be divisible"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_settings_are_refused_before_anything_is_trained(arguments, message, text, tmp_path):
    defaults = [] if "--data" in arguments else ["--data", text]
    tiny = [*TINY, "--width", "15"] if "--width" in arguments else TINY
    result = run_compare(*arguments[:1], *tiny, *defaults, *arguments[1:], "--output-dir", tmp_path)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


def test_what_is_said_of_one_contender_wins() -> None:
    soap, variant, sgd = contenders = read_contenders(["soap", "soap:one_sided=true,eps=1e-6", "sgd"])
    given = ["9", "soap=5", "soap:one_sided=true,eps=1e-6=4"]
    assert per_contender("--steps", given, contenders, int) == {soap.label: 5, variant.label: 4, sgd.label: 9}
    assert per_contender("--steps", ["soap=5"], contenders, int) == {soap.label: 5, variant.label: 5}
    assert read_contenders(["adamw"]) == [Contender("adamw_torch_fused")]
    assert per_contender("--lr", ["adamw=1e-3"], [Contender("adamw_torch_fused")], float) == {
        "adamw_torch_fused": 1e-3
    }


def test_steps_to_a_loss_are_interpolated(tmp_path):
    evals = [EvalPoint(step, 0.0, loss) for step, loss in ((0, 8.0), (10, 4.0), (20, 5.0), (30, 2.0))]
    result = RunResult(SETTINGS, evals, [], 1.0, 0.5, 0, 1, tmp_path)
    assert result.steps_to(6.0) == 5
    assert result.steps_to(4.0) == 10
    assert result.steps_to(3.5) == 25
    assert result.steps_to(9.0) == 0
    assert result.steps_to(1.0) is None
    assert result.steps_to(math.nan) is None


def parabola(best: float, tried: list[float]) -> Callable[[RunSettings], RunResult]:
    """Makes runs of which those at one learning rate are best, and notes the rates."""

    def train(settings: RunSettings) -> RunResult:
        tried.append(settings.lr)
        return ends_with(settings, 3 + math.log2(settings.lr / best) ** 2 + settings.seed / 10)

    return train


@pytest.mark.parametrize(
    ("best", "widen", "swept", "edge"),
    [
        (0.01, False, [0.005, 0.01, 0.02], None),
        (0.08, False, [0.005, 0.01, 0.02], "largest"),
        (0.001, False, [0.005, 0.01, 0.02], "smallest"),
        (0.02, True, [0.005, 0.01, 0.02, 0.04], None),
        (0.0025, True, [0.00125, 0.0025, 0.005, 0.01, 0.02], None),
        (1e9, True, [0.005 * 2**power for power in range(3 + MAX_WIDER)], "largest"),
    ],
)
def test_a_sweep_finds_the_best_rate_or_says_that_it_may_lie_beyond(
    best: float, widen: bool, swept: list[float], edge: str | None
) -> None:
    tried: list[float] = []
    case = run_case(replace(SETTINGS, lr=0.01), parabola(best, tried), rates=3, widen=widen, seeds=[0, 1, 2])
    assert [run.settings.lr for run in case.sweep] == swept
    assert case.edge == edge
    assert case.best.settings.lr == min(swept, key=lambda lr: abs(math.log2(lr / best)))
    assert [(run.settings.lr, run.settings.seed) for run in case.runs] == [
        (case.best.settings.lr, seed) for seed in (0, 1, 2)
    ]
    assert len(tried) == len(swept) + 2


def test_a_sweep_goes_down_where_all_rates_diverge() -> None:
    case = run_case(SETTINGS, lambda settings: ends_with(settings, math.nan), rates=2, widen=True, seeds=[0])
    assert case.best.settings.lr == SETTINGS.lr / 2 ** (1 + MAX_WIDER)
    (row,) = summarize([case])
    assert (row.lr_edge, row.final_loss.mean, row.steps_to_first) == ("smallest", None, None)


def test_spread_over_seeds() -> None:
    assert Spread.of([3.0, 4.0, 8.0]) == Spread(mean=5.0, std=pytest.approx(7**0.5), low=3.0, high=8.0)
    assert Spread.of([3.0]) == Spread(3.0, 0.0, 3.0, 3.0)
    assert Spread.of([3.0, math.inf]) == Spread(None, None, None, None)
    assert report.spread(Spread(5.0, 0.5, 4.0, 6.0), ".1f") == "5.0 ± 0.5 (4.0..6.0)"
    assert report.spread(Spread.of([3.0]), ".1f") == "3.0"


def test_where_a_curve_crosses_a_loss() -> None:
    """Losses that fall by one for each doubling are a straight line over the logarithm."""
    curve = [(60, 5.0), (120, 4.0), (240, 3.0)]
    assert crossing(curve, 4.0) == (120, "")
    assert crossing(curve, 3.5) == (pytest.approx(120 * 2**0.5), "")
    assert crossing(curve, 2.9) == (240, ">")
    assert crossing(curve, 5.0) == (60, "")
    assert crossing(curve, 6.0) == (60, "<")
    assert crossing([(60, math.inf), (120, 4.0)], 4.5) == (120, "<")
    assert crossing([(60, math.inf), (120, math.inf)], 4.5) == (120, ">")


def horizon_cases(optimizer: str, losses: dict[int, float], seeds: int = 1) -> list[Case]:
    settings = [replace(SETTINGS, optimizer=optimizer, steps=steps) for steps in losses]
    runs = [
        [ends_with(replace(base, seed=seed), losses[base.steps] + seed) for seed in range(seeds)] for base in settings
    ]
    return [Case([own[0]], own) for own in runs]


def test_steps_to_equal_loss_come_from_whole_runs() -> None:
    """Beyond the lengths that were run there is a bound, no number."""
    first = horizon_cases("adamw_torch_fused", {60: 6.0, 120: 5.0, 240: 4.0}, seeds=2)
    other = horizon_cases("soap", {60: 5.0, 120: 4.0, 240: 3.5}, seeds=2)
    found = {(entry.optimizer, entry.horizon): entry for entry in equal_loss([*first, *other])}
    assert len(found) == 6
    assert {found["adamw_torch_fused", steps].percent for steps in (60, 120, 240)} == {100.0}
    assert (found["soap", 120].steps, found["soap", 120].percent) == (60, 50.0)
    # Seeds shift both alike here, so that each seed by itself says the same.
    assert found["soap", 120].percent_by_seed == Spread(50.0, 0.0, 50.0, 50.0)
    assert (found["soap", 60].bound, found["soap", 60].percent_by_seed) == ("<", None)
    assert report.equal_loss_cell(found["soap", 60]) == "<60, <100 %"
    backwards = equal_loss([*other, *first])
    assert [(entry.bound, entry.steps) for entry in backwards if entry.optimizer != "soap"] == [
        ("", 120), ("", 240), (">", 240),
    ]  # fmt: skip


def test_reports_of_sweeps_and_horizons() -> None:
    cases = [
        run_case(
            replace(SETTINGS, optimizer=name, steps=steps), parabola(best, []), rates=3, widen=False, seeds=[0, 1]
        )
        for name, best in (("adamw_torch_fused", 0.01), ("soap", 0.02))
        for steps in (6, 12)
    ]
    rows = summarize(cases)
    assert [row.steps_to_first for row in rows] == [6, 12, 6, 12]
    text = report.markdown(rows, equal_loss(cases))
    adamw, soap = "3.050 ± 0.071 (3.000..3.100) | 0.005: 4.000, 0.02: 4.000", "0.02 (largest tried) | 6"
    assert f"| `adamw_torch_fused` | 0.01 | 6 | {adamw} | 8.0 |" in text
    assert f"| `soap` | {soap}" in text
    assert "Steps to the loss of `adamw_torch_fused` at\n\n| optimizer | 6 (3.050) | 12 (3.050) |" in text


@pytest.mark.parametrize("damage", [pytest.param("", marks=pytest.mark.slow), '{"conditions": {"data"'])
def test_a_later_call_makes_only_the_runs_that_are_missing(text: Path, tmp_path: Path, damage: str) -> None:
    """A sweep that was killed lost all of its runs."""
    shared = ["--steps", 4, "--data", text, "--output-dir", tmp_path, *TINY]
    assert run_compare("adamw", *shared).exit_code == 0
    log = tmp_path / "runs.jsonl"
    first = log.read_text()
    with log.open("a") as file:
        file.write(damage)  # what a process leaves that is killed while it writes
    result = run_compare("adamw", "soap", "--lr-sweep", 2, "--seeds", "0,3", *shared)
    assert result.exit_code == 0, result.output
    assert "has runs of this code on this text: 1." in " ".join(result.output.split())
    assert log.read_text().startswith(first)
    runs = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
    assert len(runs) == 1 + 2 * 3 - 1, "of AdamW one rate was there, and each has two rates and a second seed"
    again = run_compare("adamw", "soap", "--lr-sweep", 2, "--seeds", "0,3", *shared)
    assert "text: 6." in " ".join(again.output.split())
    assert len([line for line in log.read_text().splitlines() if line.endswith("}")]) == 6
    saved = json.loads((tmp_path / "compare.json").read_text())
    assert [row["seeds"] for row in saved["table"]] == [[0, 3], [0, 3]]
    assert all(len(row["swept"]) == 2 for row in saved["table"])
    # Of each optimizer one checkpoint is left, that of the run in the table.
    left = {str(path) for path in tmp_path.glob("*/*/checkpoint-*")}
    assert left <= {row["checkpoint"] for row in saved["table"]}


def test_runs_of_other_data_or_code_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = ends_with(SETTINGS, math.nan)
    RunLog(tmp_path / "runs.jsonl", present_conditions("text")).add(done)
    log = RunLog(tmp_path / "runs.jsonl", present_conditions("text"))
    found = log.get(SETTINGS)
    assert found is not None
    assert json.dumps(found.to_json()) == json.dumps(done.to_json())
    assert math.isnan(found.evals[-1].loss)
    assert log.get(replace(SETTINGS, lr=1.0)) is None
    assert RunLog(tmp_path / "runs.jsonl", present_conditions("another text")).get(SETTINGS) is None
    monkeypatch.setattr("hf_soap.cli.compare.results.code_digest", lambda: "edited")
    assert RunLog(tmp_path / "runs.jsonl", present_conditions("text")).get(SETTINGS) is None


@pytest.mark.slow
def test_a_killed_comparison_goes_on(text: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hf_soap", "compare", "adamw", "soap", "--lr-sweep", "3", "--steps", "40"]
    command += [*map(str, ["--data", text, "--output-dir", tmp_path]), *TINY]
    log = tmp_path / "runs.jsonl"
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not log.exists() or log.read_text().count("\n") < 2:
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = log.read_text().splitlines()[0]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, check=True)
    assert log.read_text().splitlines()[0] == kept
    assert sum(line.endswith("}") for line in log.read_text().splitlines()) == 6


def test_fine_tuning_a_model_with_lora(text: Path, tmp_path: Path) -> None:
    """Starts from the weights that another comparison left, on its tokens, and trains adapters alone."""
    base = run_compare("soap", "--steps", 6, "--data", text, "--output-dir", tmp_path / "base", *TINY)
    assert base.exit_code == 0, base.output
    (before,) = json.loads((tmp_path / "base" / "compare.json").read_text())["table"]
    arguments = ["--model", before["checkpoint"], "--lora-r", 2, "--lr", 1e-2, "--steps", 4, "--seq-len", 16]
    result = run_compare(
        "adamw", "soap", *arguments, "--batch-size", 4, "--data", text, "--output-dir", tmp_path / "tuned"
    )
    assert result.exit_code == 0, result.output
    saved = json.loads((tmp_path / "tuned" / "compare.json").read_text())
    linear = 16 * (48 + 16 + 64 + 64)
    for row, run in zip(saved["table"], saved["runs"], strict=True):
        assert 0 < run["parameters"] < linear
        assert run["evals"][0]["loss"] == pytest.approx(before["final_loss"]["mean"], rel=1e-5)
        assert run["evals"][-1]["loss"] != run["evals"][0]["loss"]
        assert (Path(row["checkpoint"]) / "adapter_model.safetensors").exists()


def test_corpus_holds_text_out_and_is_the_same_every_time(tmp_path):
    """The last twentieth of a single file, or of many files every twentieth, is never trained on."""
    one = tmp_path / "one.txt"
    one.write_text("a" * 950 + "b" * 50)
    corpus = build_corpus(one, vocab_size=256, seq_len=10, max_held_out=3)
    letters = [corpus.tokenizer.decode(part.flatten()) for part in (corpus.train, corpus.held_out)]
    assert letters == ["a" * 950, "b" * 30]

    many = tmp_path / "many"
    many.mkdir()
    for i in range(40):
        (many / f"{i:02}.txt").write_text(("held out " if i % 20 == 19 else "trained ") * 10)
    corpus = build_corpus(many, vocab_size=300, seq_len=4, max_held_out=100)
    assert "held" not in corpus.tokenizer.decode(corpus.train.flatten())
    assert "trained" not in corpus.tokenizer.decode(corpus.held_out.flatten())
    assert corpus.digest == build_corpus(many, vocab_size=300, seq_len=4, max_held_out=100).digest


def test_corpus_refuses_what_it_cannot_cut(tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(ValueError, match="more than 20 blocks of 64 tokens, got 0 to train on"):
        build_corpus(tmp_path, vocab_size=256, seq_len=64, max_held_out=1)
    with pytest.raises(ValueError, match="vocab_size must be >= 256, got 10"):
        build_corpus(tmp_path, vocab_size=10, seq_len=64, max_held_out=1)
