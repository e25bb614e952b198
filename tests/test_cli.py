"""The launcher and ``compare``, by real processes and real training runs."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from hf_soap import checkpoint
from hf_soap.__main__ import app
from hf_soap.cli.compare import per_optimizer, resolve_names
from hf_soap.cli.corpus import build_corpus
from hf_soap.cli.run import CHILDREN, prepare
from hf_soap.cli.training import EvalPoint, RunResult, RunSettings, train_once

ROOT = Path(__file__).parents[1]


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


# The launcher


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


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A folder with a model, its tokenizer, a text file and a dataset of JSON lines, as a user has them on disk."""
    folder = tmp_path_factory.mktemp("tiny")
    lines = [f"{i} times {j} is {i * j}" for i in range(30) for j in range(30)]
    (folder / "text.txt").write_text("\n".join(lines))
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))

    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = build_corpus(folder / "text.txt", vocab_size=256, seq_len=8, max_held_out=1).tokenizer
    tokenizer.add_special_tokens({"eos_token": "<eos>", "pad_token": "<eos>"})
    tokenizer.save_pretrained(folder)
    config = GPT2Config(vocab_size=257, n_positions=64, n_layer=1, n_embd=16, n_head=2, bos_token_id=256)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def soap_state(checkpoint: Path) -> set[str]:
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    return set().union(*saved["state"].values())


COMMON = ["--optim", "soap", "--learning_rate", "3e-3", "--max_steps", "2", "--use_cpu", "--report_to", "none"]


@pytest.mark.slow
def test_trl_command_line_trains_with_soap(tiny_model, tmp_path):
    """``trl sft`` hands over to accelerate's launcher, which trains in a child process of its own."""
    arguments = ["--model_name_or_path", tiny_model, "--dataset_name", tiny_model / "data", "--max_length", "16"]
    done = python("-m", "hf_soap", "run", "-m", "trl", "sft", *arguments, *COMMON, "--output_dir", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "basis_0" in soap_state(tmp_path / "out" / "checkpoint-2")


RUN_CLM_COMMIT = "00d481d18f914b55e65faa31e82321629691eadb"


@pytest.fixture(scope="session")
def run_clm(tmp_path_factory):
    """The example script of transformers, which no package on PyPI holds."""
    path = Path(os.environ.get("HF_SOAP_RUN_CLM") or tmp_path_factory.mktemp("examples") / "run_clm.py")
    if not path.exists():
        repository = f"https://raw.githubusercontent.com/huggingface/transformers/{RUN_CLM_COMMIT}"
        try:
            with urllib.request.urlopen(
                f"{repository}/examples/pytorch/language-modeling/run_clm.py", timeout=20
            ) as answer:
                path.write_bytes(answer.read())
        except urllib.error.URLError as error:
            pytest.skip(f"cannot download run_clm.py ({error.reason}); set HF_SOAP_RUN_CLM to a copy of it")
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["-m", "hf_soap"],
        ["-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "hf_soap"],
        ["-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu", "-m", "hf_soap"],
    ],
    ids=["python", "torchrun", "accelerate"],
)
def test_unmodified_run_clm_trains_with_soap(launcher, run_clm, tiny_model, tmp_path):
    arguments = ["--model_name_or_path", tiny_model, "--train_file", tiny_model / "text.txt", "--block_size", "32"]
    done = python(*launcher, "run", run_clm, *arguments, *COMMON, "--do_train", "--output_dir", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "basis_0" in soap_state(tmp_path / "out" / "checkpoint-2")


@pytest.mark.slow
def test_unmodified_run_clm_is_killed_and_resumed_under_fsdp(run_clm, tiny_model, tmp_path):
    """Two processes, killed behind a checkpoint: the resumed run ends with the weights of one that was left alone."""
    config = {"version": 2, "state_dict_type": "SHARDED_STATE_DICT", "transformer_layer_cls_to_wrap": ["GPT2Block"]}
    (tmp_path / "fsdp.json").write_text(json.dumps(config))
    tests = Path(__file__).parent

    def launch(output, *more):
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", tests / "fsdp_on_cpus.py", "run", run_clm]
        data = ["--model_name_or_path", tiny_model, "--train_file", tiny_model / "text.txt", "--block_size", "32"]
        run = ["--do_train", "--output_dir", output, "--max_steps", "8", "--save_steps", "4", "--ddp_backend", "gloo"]
        sharded = ["--fsdp", "full_shard auto_wrap", "--fsdp_config", tmp_path / "fsdp.json"]
        soap = ["--optim", "soap", "--optim_args", "precondition_frequency=2", "--learning_rate", "3e-3"]
        rest = ["--use_cpu", "--report_to", "none", *more]
        environment = {
            **os.environ,
            "PYTHONPATH": f"{tests.parent}:{tests}",
            "OMP_NUM_THREADS": "1",
            "FSDP_VERSION": "2",
            "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        }
        return subprocess.Popen(
            [str(part) for part in [sys.executable, *launcher, *data, *run, *sharded, *soap, *rest]],
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
    want, got = map(checkpoint.read_weights, ends)
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


# compare


SETTINGS = RunSettings(
    optimizer="adamw_torch_fused",
    optim_args="",
    lr=1e-2,
    adam_beta2=0.999,
    steps=6,
    batch_size=4,
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


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for name in ("cli/compare.py", "cli/run.py", "cli/corpus.py"):
        (folder / Path(name).name).write_bytes((ROOT / "hf_soap" / name).read_bytes())
    (folder / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    return folder


@pytest.fixture(scope="session")
def corpus(text):
    return build_corpus(text, vocab_size=256, seq_len=16, max_held_out=8)


def run_compare(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["compare", *map(str, arguments)], obj=[], env={"COLUMNS": "120"})


def test_compare_reports_what_it_trained(text, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_soap.cli.compare.DEFAULT_STEPS", 6)
    result = run_compare(
        "adamw", "soap", "--steps", "soap=4", "--lr", "adamw=1e-3", "--lr", "soap=1e-2",
        "--optim-args", "soap=precondition_frequency=2,block_size=8",
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
        assert row["final_loss"] == run["evals"][-1]["loss"]
        assert 0 < row["optimizer_share"] < 1
        assert f"{row['final_loss']:.4f}" in result.output
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
    assert loss == pytest.approx(second["final_loss"], rel=1e-5)


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


def test_diverged_run_is_reported_as_such(text, tmp_path):
    """The Trainer replaces a loss that is NaN by an average of earlier ones, unless told otherwise."""
    arguments = ["--steps", 6, "--lr", 1e30, "--max-grad-norm", 0, "--data", text, "--output-dir", tmp_path, *TINY]
    result = run_compare("sgd", *arguments)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "compare.json").read_text())
    assert report["runs"][0]["train_losses"][-1] is None
    assert report["table"][0]["final_loss"] is None
    assert report["table"][0]["steps_to_first"] is None


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
        (["soap", "--lr", "adamw=1"], "--lr adamw=1 is for adamw_torch_fused, wanted one of soap"),
        (["soap", "--steps", "0"], "must be >= 1, got 0"),
        (["soap", "--steps", "5", "--steps", "6"], "give it once"),
        (["soap", "--optim-args", "soap=precondition_frequenzy=5"], "precondition_frequency"),
        (["soap", "--data", "absent"], "got absent; check the path"),
        (["soap", "--schedule", "absent"], "is not a valid SchedulerType"),
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


def test_per_optimizer_options():
    assert per_optimizer("--steps", ["9", "soap=5"], ["soap", "lion_32bit"], int) == {"soap": 5, "lion_32bit": 9}
    assert per_optimizer("--lr", ["adamw=1e-3"], ["adamw_torch_fused"], float) == {"adamw_torch_fused": 1e-3}
    options = per_optimizer("--optim-args", ["soap=a=1,b=2"], ["soap", "sgd"], str)
    assert options == {"soap": "a=1,b=2"}
    assert resolve_names(["adamw", "sgd"]) == ["adamw_torch_fused", "sgd"]


def test_steps_to_a_loss_are_interpolated(tmp_path):
    evals = [EvalPoint(step, 0.0, loss) for step, loss in ((0, 8.0), (10, 4.0), (20, 5.0), (30, 2.0))]
    result = RunResult(SETTINGS, evals, [], 1.0, 0.5, 0, 1, tmp_path)
    assert result.steps_to(6.0) == 5
    assert result.steps_to(4.0) == 10
    assert result.steps_to(3.5) == 25
    assert result.steps_to(9.0) == 0
    assert result.steps_to(1.0) is None
    assert result.steps_to(math.nan) is None


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
