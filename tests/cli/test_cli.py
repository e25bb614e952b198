"""The launcher, by real processes and real training runs."""

import json
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
from paths import HELPERS, PYTHONPATH, ROOT

from hf_soap.checkpoint import files
from hf_soap.cli.run import CHILDREN, prepare


def python(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [environment.pop("PYTHONPATH", ""), str(ROOT)]))
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        check=False,
        text=True,
        timeout=300,
    )


SCRIPT = """
import json, subprocess, sys
import beside
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

child = "from transformers import TrainingArguments as T; print(T('x', optim='soap', report_to='none').optim.value)"
print(json.dumps({
    "name": __name__, "argv": sys.argv, "file": __file__, "path": sys.path[0], "beside": beside.VALUE,
    "known": "soap" in [member.value for member in OptimizerNames],
    "child": subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, cwd="/").stdout.strip(),
}))
sys.exit(7)
"""


def test_run_starts_a_script_as_python_would(tmp_path):
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "train.py").write_text(SCRIPT)
    (folder / "beside.py").write_text("VALUE = 42")
    # What looks like an option of the launcher is the script's, once the script is named.
    arguments = ["project/train.py", "--help", "-m", "json", "--optim=soap", "--"]
    done = python("-m", "hf_soap", "run", *arguments, cwd=tmp_path)
    assert done.returncode == 7, done.stderr
    seen = json.loads(done.stdout)
    assert seen.pop("child") == "soap"
    assert seen == {
        "name": "__main__",
        "argv": arguments,
        "file": "project/train.py",
        "path": str(folder.resolve()),
        "beside": 42,
        "known": True,
    }


def test_run_leaves_tracebacks_alone(tmp_path):
    """An EOFError inside a typer command ends as "Aborted!", and rich draws a box around any other exception."""
    (tmp_path / "train.py").write_text("import sys\n\ndef read():\n    raise EOFError('no more text')\n\nread()\n")
    done = python("-m", "hf_soap", "run", "train.py", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("Traceback (most recent call last):\n")
    last = "  File \"train.py\", line 4, in read\n    raise EOFError('no more text')\nEOFError: no more text\n"
    assert done.stderr.endswith(last)
    assert "typer" not in done.stderr


def test_children_keep_their_own_sitecustomize_and_start_light(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("print('mine')")
    program = f"import sys; print('torch' in sys.modules, {str(CHILDREN)!r} in sys.path)"
    done = python("-c", program, cwd=tmp_path, PYTHONPATH=f"{CHILDREN}{os.pathsep}{tmp_path}")
    assert done.stdout.split() == ["mine", "False", "False"], done.stderr


@pytest.fixture
def interpreter(monkeypatch):
    """Lets ``prepare`` change argv and path for the length of a test."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.usefixtures("interpreter")
def test_module_runs_as_main_with_its_own_options(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "program.py").write_text("import sys; print(__name__, sys.argv[1:], sys.path[0])")
    prepare(["-m", "program", "--help"])()
    assert capsys.readouterr().out == f"__main__ ['--help'] {tmp_path}\n"


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("first", ["/somewhere", ""], ids=["a folder", "the working folder"])
def test_a_program_that_runs_this_one_keeps_its_path(first, monkeypatch, capsys):
    """The first entry was taken out whoever had put it there: under runpy it is the caller's."""
    monkeypatch.setattr(sys, "argv", ["caller.py", "--help"])
    sys.path.insert(0, first or os.getcwd())  # noqa: PTH109
    before = list(sys.path)
    with pytest.raises(SystemExit) as end:
        runpy.run_module("hf_soap", run_name="__main__")
    assert end.value.code == 0
    assert "compare" in capsys.readouterr().out
    assert sys.path == before


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("program", [["trl"], ["-m", "trl"]], ids=" ".join)
def test_installed_command_runs_by_name(program, capsys):
    """``python -m trl`` does not exist: TRL is a package without __main__, its command line is a console script."""
    with pytest.raises(SystemExit) as end:
        prepare([*program, "--help"])()
    assert end.value.code == 0
    assert "sft" in capsys.readouterr().out


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    ("program", "message"),
    [
        (["absent.py"], r"got 'absent.py', wanted an existing script .* working folder"),
        (["-m", "absent.module"], r"got -m absent.module, wanted a module"),
        (["-m", "hf_soap.cli"], r"got -m hf_soap.cli, wanted a module, or a package with a __main__"),
        (["-m"], r"got -m alone, wanted a module"),
        (["--optim", "soap", "train.py"], r"got the option --optim before the program"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_missing_program_is_refused(program, message):
    with pytest.raises(typer.BadParameter, match=message):
        prepare(program)


@pytest.mark.usefixtures("interpreter")
def test_missing_dependency_of_a_module_is_named(tmp_path, monkeypatch):
    """A package that fails to import something else must not be reported as absent itself."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "program").mkdir()
    (tmp_path / "program" / "__init__.py").write_text("import dependency_that_is_not_there")
    (tmp_path / "program" / "__main__.py").write_text("")
    with pytest.raises(ModuleNotFoundError, match="dependency_that_is_not_there"):
        prepare(["-m", "program"])


@pytest.mark.slow
def test_unmodified_run_clm_is_killed_and_resumed_under_fsdp(run_clm, tiny_model, tmp_path):
    """Two processes, killed behind a checkpoint: the resumed run ends with the weights of one that was left alone."""
    config = {"version": 2, "state_dict_type": "SHARDED_STATE_DICT", "transformer_layer_cls_to_wrap": ["GPT2Block"]}
    (tmp_path / "fsdp.json").write_text(json.dumps(config))

    def launch(output, *more):
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", HELPERS / "fsdp_on_cpus.py"]
        data = ["--model_name_or_path", tiny_model, "--train_file", tiny_model / "text.txt", "--block_size", "32"]
        run = ["--do_train", "--output_dir", output, "--max_steps", "8", "--save_steps", "4", "--ddp_backend", "gloo"]
        sharded = ["--fsdp", "full_shard auto_wrap", "--fsdp_config", tmp_path / "fsdp.json"]
        soap = ["--optim", "soap", "--optim_args", "precondition_frequency=2", "--learning_rate", "3e-3"]
        rest = ["--use_cpu", "--report_to", "none", *more]
        environment = {
            **os.environ,
            "PYTHONPATH": PYTHONPATH,
            "OMP_NUM_THREADS": "1",
            "FSDP_VERSION": "2",
            "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        }
        return subprocess.Popen(
            [str(part) for part in [sys.executable, *launcher, "run", run_clm, *data, *run, *sharded, *soap, *rest]],
            env=environment,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    output = launch("alone").communicate(timeout=300)[0]
    assert (tmp_path / "alone" / "checkpoint-8" / "optimizer_0").is_dir(), output
    process = launch("killed")
    try:
        deadline = time.monotonic() + 300
        while not (tmp_path / "killed" / "checkpoint-4" / "trainer_state.json").is_file():
            assert process.poll() is None, "ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    shutil.rmtree(tmp_path / "killed" / "checkpoint-8", ignore_errors=True)
    output = launch("killed", "--resume_from_checkpoint", "killed/checkpoint-4").communicate(timeout=300)[0]
    ends = [tmp_path / name / "checkpoint-8" / "pytorch_model_fsdp_0" for name in ("alone", "killed")]
    assert ends[1].is_dir(), output
    want, got = map(files.read_weights, ends)
    for name, value in want.items():
        assert torch.equal(value, got[name]), name


ACCURACY = """
import datasets
import evaluate


class Accuracy(evaluate.Metric):
    def _info(self):
        ids = datasets.Value("int32")
        features = datasets.Features({"predictions": ids, "references": ids})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        return {"accuracy": sum(p == r for p, r in zip(predictions, references)) / len(references)}
"""


@pytest.mark.slow
def test_unmodified_run_clm_pretrains_evaluates_finetunes_and_resumes(run_clm, tiny_model, tmp_path):
    """Its --do_eval loads the accuracy metric by name: offline that is a folder of this name beside the run."""
    (tmp_path / "accuracy").mkdir()
    (tmp_path / "accuracy" / "accuracy.py").write_text(ACCURACY)
    text = tiny_model / "text.txt"
    shared = ["--train_file", text, "--validation_file", text, "--block_size", "32", "--do_train", "--do_eval"]
    shared += ["--optim", "soap", "--learning_rate", "3e-3", "--use_cpu", "--report_to", "none", "--save_steps", "4"]
    overrides = "n_layer=1,n_head=2,n_embd=16,vocab_size=257,n_positions=64"
    runs = {
        "new": [
            "--model_type",
            "gpt2",
            "--config_overrides",
            overrides,
            "--tokenizer_name",
            tiny_model,
            "--max_steps",
            8,
        ],
        "tuned": ["--model_name_or_path", "./new", "--max_steps", "4"],
        "resumed": [
            "--model_name_or_path",
            "./new",
            "--max_steps",
            8,
            "--resume_from_checkpoint",
            "tuned/checkpoint-4",
        ],
    }
    losses = {}
    for name, arguments in runs.items():
        done = python("-m", "hf_soap", "run", run_clm, *arguments, *shared, "--output_dir", name, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        results = json.loads((tmp_path / name / "all_results.json").read_text())
        assert results["perplexity"] == pytest.approx(math.exp(results["eval_loss"]))
        losses[name] = results["eval_loss"]
    assert losses["resumed"] < losses["tuned"] < losses["new"] < math.log(257)
    assert (
        torch.load(tmp_path / "resumed" / "checkpoint-8" / "optimizer.pt", weights_only=True)["state"][0]["step"] == 8
    )
