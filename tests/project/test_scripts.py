"""scripts/run_clm.py from end to end on a tiny model, and the promises that the shell scripts make."""

import importlib
import json
import math
import os
import random
import shutil
import subprocess
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from paths import ROOT
from safetensors.torch import load_file

SCRIPTS = ROOT / "scripts"
STEPS = 30


@pytest.fixture(scope="module")
def run_clm() -> ModuleType:
    return importlib.import_module("run_clm")


def sentences(path: Path, *, who: str, does: str, what: str) -> Path:
    """Writes a text with something to learn: sentences of a small grammar."""
    rng = random.Random(0)
    words = [choices.split(",") for choices in (who, does, what)]
    path.write_text("".join(" ".join(map(rng.choice, words)) + ".\n" for _ in range(1500)))
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "animals.txt"
    return sentences(path, who="the cat,a dog,my fox,one owl", does="sees,eats,likes", what="fish,milk,corn")


@pytest.fixture(scope="module")
def other_text(text: Path) -> Path:
    return sentences(text.parent / "tools.txt", who="a saw,an axe,the drill", does="cuts,splits", what="wood,steel")


def arguments(output: Path, **changes: Any) -> list[str]:
    """A command line: the settings of a tiny run, changed; None leaves one out."""
    settings = {
        "output_dir": output,
        "optim": "soap",
        "optim_args": "precondition_frequency=2",
        "learning_rate": 3e-2,
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "logging_steps": 1,
        "save_steps": STEPS // 2,
        "block_size": 32,
        "eval_blocks": 8,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 1,
    }
    settings |= changes
    argv: list[str] = []
    for key, value in settings.items():
        if value is not None:
            argv += [f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return argv


def from_scratch(text: Path) -> dict[str, Any]:
    return {
        "train_files": text,
        "model_type": "gpt2",
        "config_overrides": "n_layer=2,n_head=2,n_embd=32,n_positions=64,resid_pdrop=0.1",
        "train_tokenizer_vocab": 300,
    }


def losses(output: Path) -> list[float]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.fixture(scope="module")
def pretrained(run_clm: ModuleType, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("pretrained")
    run_clm.main(arguments(output, **from_scratch(text)))
    return output


def test_pretraining_learns_and_reports_perplexity(pretrained: Path) -> None:
    got = losses(pretrained)
    assert len(got) == STEPS
    assert all(map(math.isfinite, got))
    assert got[-1] < got[0] - 1, got
    metrics = json.loads((pretrained / "all_results.json").read_text())
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))
    history = json.loads((pretrained / "trainer_state.json").read_text())["log_history"]
    assert [entry["eval_perplexity"] for entry in history if "eval_loss" in entry] == [metrics["eval_perplexity"]]


@pytest.mark.parametrize("streaming", [False, True])
def test_resumed_run_equals_uninterrupted(
    run_clm: ModuleType, pretrained: Path, text: Path, tmp_path: Path, streaming: bool
) -> None:
    whole, resumed = pretrained, tmp_path / "resumed"
    settings = from_scratch(text)
    if streaming:
        settings |= {"streaming": True, "max_steps": 6, "save_steps": 3}
        whole = tmp_path / "whole"
        run_clm.main(arguments(whole, **settings))
        assert len(losses(whole)) == 6
    half = min(whole.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    shutil.copytree(half, resumed / half.name)
    run_clm.main(arguments(resumed, **settings))

    assert losses(resumed) == losses(whole)
    expected = load_file(whole / "model.safetensors")
    for name, tensor in load_file(resumed / "model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name


def test_fine_tuning_starts_from_the_checkpoint(
    run_clm: ModuleType, pretrained: Path, text: Path, tmp_path: Path
) -> None:
    run_clm.main(arguments(tmp_path, model_name_or_path=pretrained, train_files=text, learning_rate=1e-3, max_steps=4))
    before = losses(pretrained)
    assert losses(tmp_path)[0] == pytest.approx(before[-1], abs=0.3)
    assert losses(tmp_path)[0] < before[0] - 0.7


def test_lora_learns_another_text_and_saves_the_adapter_alone(
    run_clm: ModuleType, pretrained: Path, text: Path, other_text: Path, tmp_path: Path
) -> None:
    settings = {
        "model_name_or_path": pretrained,
        "train_files": other_text,
        "eval_files": text,
        "lora_r": 4,
        "lora_target_modules": ["c_attn", "c_proj", "c_fc"],
    }
    metrics = run_clm.main(arguments(tmp_path, **settings))
    got = losses(tmp_path)
    assert got[-1] < got[0] - 0.3, got
    assert metrics["eval_loss"] < got[-1] - 0.3, "the pretraining text, still known well, is what was evaluated on"
    adapter = load_file(tmp_path / "adapter_model.safetensors")
    assert all("lora" in name for name in adapter)
    assert not (tmp_path / "model.safetensors").exists()


def test_arguments_from_a_file(run_clm: ModuleType, tmp_path: Path) -> None:
    """To YAML 1.1 1e-3 is a string and no is false; training must get a number and a strategy."""
    config = tmp_path / "recipe.yaml"
    config.write_text(
        "model_type: gpt2\ntrain_tokenizer_vocab: 300\ntrain_files: [a.txt, b.txt]\neval_files: c.txt\n"
        "learning_rate: 1e-3\nseed: 3\nsave_strategy: no\nprovenance: {results: {eval_loss: 3}}\n"
    )
    script, args = run_clm.parse(run_clm.ScriptArguments, [str(config), "--seed", "4", "--optim", "soap"])
    assert (script.train_files, script.eval_files) == (["a.txt", "b.txt"], ["c.txt"])
    assert (args.learning_rate, args.seed, args.optim, args.save_strategy) == (1e-3, 4, "soap", "no")

    config = tmp_path / "recipe.json"
    config.write_text('{"learning_rat": 0.001}')
    with pytest.raises(ValueError, match=r"unknown argument 'learning_rat' in .*recipe\.json; use 'learning_rate'"):
        run_clm.parse(run_clm.ScriptArguments, [str(config)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_files": None}, "wanted one source of text, got neither; use --train_files"),
        ({"train_files": "nowhere/*.txt"}, "no file matches 'nowhere/.*.txt'"),
        ({"model_type": None}, "wanted one of model_name_or_path, model_type and config_name"),
        ({"model_type": "gpt-2"}, "unknown model_type 'gpt-2'; use 'gpt2'"),
        ({"train_tokenizer_vocab": None}, "needs a tokenizer, got none; use --train_tokenizer_vocab"),
        ({"block_size": 65}, "block_size must be <= 64, the positions of the model, got 65"),
        ({"block_size": 10**6}, "does not fill a block of 1000000 tokens; use more text or a smaller --block_size"),
    ],
)
def test_errors_name_the_remedy(
    run_clm: ModuleType, text: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run_clm.main(arguments(tmp_path, **from_scratch(text) | changes))


def test_packing_restores_the_text(run_clm: ModuleType, pretrained: Path, text: Path) -> None:
    pack = importlib.import_module("_text").pack
    given = arguments(pretrained, train_files=text, model_name_or_path=pretrained)
    script, args = run_clm.parse(run_clm.ScriptArguments, given)
    rows = run_clm.load_text(script)
    tokenizer = run_clm.load_tokenizer(script, args, rows, resuming=False)
    blocks = pack(rows, tokenizer, column="text", block_size=32, documents=False)
    assert {len(ids) for ids in blocks["input_ids"]} == {32}
    batch = run_clm.collate([blocks[0], blocks[1]])
    assert batch["labels"].tolist() == batch["input_ids"].tolist() == blocks["input_ids"][:2]
    packed = tokenizer.decode([token for ids in blocks["input_ids"] for token in ids])
    assert text.read_text().startswith(packed)

    documents = pack(rows, tokenizer, column="text", block_size=32, documents=True)
    ends = sum(ids.count(tokenizer.eos_token_id) for ids in documents["input_ids"])
    assert ends == pytest.approx(len(rows), abs=10)


SHELL_SCRIPTS = [*sorted(SCRIPTS.glob("*.sh")), ROOT / ".ci" / "run"]


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_parse(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_ci_runs_what_contributors_run() -> None:
    ci = ROOT / ".ci" / "run"
    assert os.access(ci, os.X_OK)
    assert "bash scripts/test.sh" in ci.read_text()


def test_ci_runs_on_the_oldest_and_the_newest_versions() -> None:
    """Nothing ran on a push: the commands of CONTRIBUTING were all that there was."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["test"]
    runs = {each["name"]: each for each in job["strategy"]["matrix"]["include"]}
    assert project["requires-python"] == f">={runs['oldest']['python']}"
    assert runs["oldest"]["constraints"] == "constraints-oldest.txt"
    assert runs["newest"]["constraints"] == os.devnull
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert "CONSTRAINTS:-constraints.txt" in (SCRIPTS / "test.sh").read_text()


def test_a_bug_report_asks_for_what_is_needed() -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    required = {each["id"] for each in form["body"] if each.get("validations", {}).get("required")}
    assert required == {"what", "versions", "plan", "routing"}


@pytest.fixture
def fake_python(tmp_path: Path) -> Path:
    """Stands in for Python: makes a venv of itself and notes each installation in pip.log."""
    python = tmp_path / "python3.12"
    python.write_text(
        """#!/usr/bin/env bash
        case "$*" in
            --version) echo "Python ${VERSION:-3.12.0}" ;;
            -c*) [ -z "$VERSION" ] ;;
            "-m venv --clear "*) rm -rf "$4"; mkdir -p "$4/bin"; cp "$0" "$4/bin/python" ;;
            "-m pip install"*) echo "$*" >>pip.log; exit "${PIP_STATUS:-0}" ;;
        esac
        """
    )
    python.chmod(0o755)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text(name)
    return python


def ensure_venv(python: Path, what: str = ".[dev]", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-ec", f". '{SCRIPTS}/_venv.sh'; ensure_venv .venv '{what}' constraints.txt"],
        check=False,
        cwd=python.parent,
        env={"PATH": os.environ["PATH"], "PYTHON": str(python)} | environment,
        capture_output=True,
        text=True,
    )


def test_venv_is_installed_once_until_its_inputs_change(fake_python: Path) -> None:
    log = fake_python.parent / "pip.log"

    def installations(what: str = ".[dev]", **environment: str) -> int:
        ensure_venv(fake_python, what, **environment)
        return len(log.read_text().splitlines())

    assert installations(PIP_STATUS="1") == 1, "a failed installation must not count"
    assert [installations(), installations()] == [2, 2]
    assert [installations(".[plot]"), installations()] == [3, 3]
    (fake_python.parent / "constraints.txt").write_text("another pin")
    assert [installations(), installations()] == [4, 4]
    (fake_python.parent / ".venv" / "bin" / "python").unlink()
    assert [installations(), installations()] == [5, 5]


def test_old_python_is_refused_with_a_remedy(fake_python: Path) -> None:
    result = ensure_venv(fake_python, VERSION="3.9.2")
    assert result.returncode != 0
    assert "needs Python 3.11 or newer" in result.stderr
    assert "Python 3.9.2" in result.stderr
    assert "PYTHON=" in result.stderr
    assert not (fake_python.parent / ".venv").exists()
