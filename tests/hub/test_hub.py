"""Model cards, and recipes on a Hub: the real client against a Hub on this machine (``hub.py``)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import run_clm
import tiny
import torch
import yaml
from hub import Hub, sha
from huggingface_hub import ModelCard
from paths import PYTHONPATH, ROOT
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import HfArgumentParser, Trainer, TrainerCallback

from hf_soap import SOAP, SoapConfig, SoapMetricsCallback, SoapTrainer, SoapTrainerMixin
from hf_soap.hub import cards, recipes

RUN_CLM = ROOT / "scripts" / "run_clm.py"


def card_of(trainer: Trainer) -> tuple[ModelCard, recipes.Recipe]:
    """The card in the output folder, and the recipe there, which must be the one in the card."""
    return card_in(Path(str(trainer.args.output_dir)))


def card_in(folder: Path) -> tuple[ModelCard, recipes.Recipe]:
    data = (folder / "recipe.yaml").read_bytes()
    assert recipes.embedded((folder / "README.md").read_bytes()) == data
    return ModelCard.load(folder / "README.md"), recipes.read(data, source="the recipe")


def train(cls: Any, folder: Path, model: Any = None, **changes: Any) -> Any:
    settings = {"logging_steps": 2, "eval_strategy": "steps", "eval_steps": 4, **changes}
    config = settings.pop("optimizer_config", None)
    trainer = cls(
        model or tiny.gpt2(),
        tiny.arguments(folder, **settings),
        train_dataset=tiny.Counting(),
        eval_dataset=tiny.Counting(),
        **({"optimizer_config": config} if config else {}),
    )
    trainer.train()
    return trainer


# ---------------------------------------------------------------------------------------------------------------------
# Model cards
# ---------------------------------------------------------------------------------------------------------------------


def test_the_card_of_a_run(tmp_path: Path) -> None:
    trainer = train(
        SoapTrainer, tmp_path, optim="adamw_torch_fused", optimizer_config=SoapConfig(precondition_frequency=2)
    )
    for _ in range(2):  # the second is no longer than the first
        trainer.create_model_card(model_name="tiny", tags="mine", language="en")
    card, recipe = card_of(trainer)
    last = [entry for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    assert card.data.language == ["en"]
    assert {"mine", "generated_from_trainer", "hf_soap", "soap"} <= set(card.data.tags)
    (result,) = card.data.eval_results
    assert (card.data.model_name, result.metric_type, result.metric_value) == ("tiny", "loss", last["eval_loss"])
    assert result.task_type == "text-generation"
    assert card.text.count("## Recipe") == 1
    assert "| `precondition_frequency` | `2` |" in card.text
    assert "`soap` with `precondition_frequency=2`" in card.text
    assert "OptimizerNames" not in card.text
    assert "betas=(0.9,0.999)" not in card.text, "those are AdamW's"
    assert (tmp_path / cards.CURVE).read_bytes().startswith(b"\x89PNG")
    assert f"]({cards.CURVE})" in card.text

    assert recipe["optim"] == "soap"
    assert recipe["optim_args"] == "precondition_frequency=2"
    recipes.check(recipe, source="the recipe")
    ran = recipe["provenance"]
    assert ran["seen"] == {"steps": 8, "epochs": 0.5, "samples": 32}
    assert ran["results"]["eval_loss"] == last["eval_loss"]
    assert ran["packages"].keys() >= {"python", "torch", "transformers", "accelerate"}
    assert ran["hardware"]["processes"] == 1


def test_a_card_names_what_its_recipe_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe without the data repeated the run on none."""
    monkeypatch.setattr(recipes, "LAUNCH", recipes.Launch("train.py", ("--train_files", "/mine/a.txt", "--mode", "x")))
    trainer = train(SoapTrainer, tmp_path, max_steps=2, include_num_input_tokens_seen="all")
    trainer.create_model_card()
    card, recipe = card_of(trainer)
    assert "train_files" not in recipe
    assert recipe["mode"] == "x"
    assert recipe["provenance"]["left_out"] == ["train_files"]
    assert recipe["provenance"]["dataset"] == "a.txt"
    assert recipe["provenance"]["seen"]["tokens"] == 2 * 4 * 12
    assert "hf-soap run train.py --recipe recipe.yaml --train_files ..." in card.text
    assert "/mine" not in card.content


def test_a_curve_needs_losses_and_results_need_not_be_finite(tmp_path: Path) -> None:
    log = [{"loss": 3.0, "step": 1}, {"eval_loss": float("inf"), "eval_runtime": 1.0, "step": 2}]
    assert cards.results(log) == {"eval_loss": float("inf")}
    assert not cards.draw_curve([{"step": 1}], tmp_path / "no.png")
    assert not (tmp_path / "no.png").exists()
    trainer = train(SoapTrainer, tmp_path, max_steps=2)
    trainer.state.log_history += log
    trainer.create_model_card()
    card, recipe = card_of(trainer)
    assert recipe["provenance"]["results"]["eval_loss"] == "inf"
    assert not card.data.eval_results


def test_the_card_of_another_optimizer(tmp_path: Path) -> None:
    trainer = train(SoapTrainer, tmp_path, optim="adamw_torch", max_steps=2, eval_strategy="no")
    trainer.create_model_card()
    card, recipe = card_of(trainer)
    assert recipe["optim"] == "adamw_torch"
    assert "soap" not in card.data.tags
    assert "- optimizer: Use" in card.text


def test_the_card_of_lora(tmp_path: Path) -> None:
    model = get_peft_model(tiny.gpt2(), LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))
    trainer = train(SoapTrainer, tmp_path, model)
    trainer.save_model()  # peft leaves a card of its own
    trainer.create_model_card()
    card, _ = card_of(trainer)
    assert card.data.library_name == "peft"
    assert card.data.eval_results[0].task_type == "text-generation"


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_card_of_trls_sft_trainer(tmp_path: Path) -> None:
    """TRL writes a card of its own, from other arguments."""
    trainer = tiny.sft_trainer(tmp_path, SoapTrainerMixin, max_steps=2, logging_steps=1)
    trainer.train()
    trainer.create_model_card(model_name="tiny", dataset_name="numbers")
    card, recipe = card_of(trainer)
    assert {"trl", "sft", "hf_soap", "soap"} <= set(card.data.tags)
    assert "TRL" in card.text
    assert recipe["max_length"] == 16
    recipes.check(recipe, source="the recipe")
    assert recipe["provenance"]["seen"].keys() & {"tokens", "samples"}


@pytest.fixture
def no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "LAUNCH", None)


def adapted(model: Any) -> dict[str, Any]:
    """What decides how adapters train: their layers, shapes, scales and dropout."""
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    assert layers
    return {
        name: (
            layer.lora_A["default"].weight.shape,
            layer.scaling["default"],
            getattr(layer.lora_dropout["default"], "p", 0.0),
            layer.use_dora.get("default", False),
        )
        for name, layer in layers.items()
    }


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize("targets", [["c_attn"], ["c_attn", "c_fc"], "all-linear"], ids=str)
def test_adapters_made_in_python_are_options_of_our_script(targets: Any, tmp_path: Path) -> None:
    """The recipe of a LoRA run had no word about LoRA, and the card said that it repeats the run bit for bit."""
    lora = LoraConfig(r=4, lora_alpha=12, target_modules=targets, task_type="CAUSAL_LM")
    trainer = train(SoapTrainer, tmp_path / "run", get_peft_model(tiny.gpt2(), lora), max_steps=2)
    trainer.create_model_card()
    card, recipe = card_of(trainer)
    recipes.check(recipe, source="the recipe")
    assert (recipe["lora_r"], recipe["lora_alpha"]) == (4, 12)
    assert "bit for bit" not in card.text.partition("The recipe does not contain")[0].partition("## Recipe")[2]
    assert "- the model, a GPT2LMHeadModel, with its weights before training\n" in card.text

    tiny.gpt2().save_pretrained(tmp_path / "model")
    given = [f"--model_name_or_path={tmp_path / 'model'}", "--train_files=x"]
    given += recipes.to_arguments({key: value for key, value in recipe.items() if key.startswith("lora")})
    (script,) = HfArgumentParser(run_clm.ScriptArguments).parse_args_into_dataclasses(given)
    script.block_size = 8
    assert adapted(run_clm.build_model(script, tiny.tokenizer())) == adapted(trainer.model)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize("case", ["one target", "a pattern", "more"])
def test_adapters_made_in_python_are_options_of_trl(case: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    lora = {
        "one target": LoraConfig(r=4, target_modules=["c_attn"]),
        "a pattern": LoraConfig(r=4, target_modules=r".*\.1\.attn\.c_attn"),
        "more": LoraConfig(
            r=4, lora_dropout=0.25, target_modules=["c_attn", "c_fc"], use_rslora=True, use_dora=True, lora_alpha=7
        ),
    }[case]
    trainer = tiny.sft_trainer(tmp_path, SoapTrainerMixin, max_steps=1, extra={"peft_config": lora})
    trainer.train()
    trainer.create_model_card()
    _, recipe = card_of(trainer)
    recipes.check(recipe, source="the recipe")
    assert recipe["use_peft"] is True
    given = {key: value for key, value in recipe.items() if key in trl.ModelConfig.__dataclass_fields__}
    (options,) = HfArgumentParser(trl.ModelConfig).parse_args_into_dataclasses(recipes.to_arguments(given))
    again = get_peft_model(tiny.gpt2(), trl.get_peft_config(options))
    assert adapted(again) == adapted(trainer.model)


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize(
    ("config", "missing"),
    [
        ({"rank_pattern": {"0.attn.c_attn": 2}}, ["rank_pattern"]),
        ({"bias": "all", "init_lora_weights": False}, ["bias", "init_lora_weights"]),
        ({"target_modules": r".*\.c_attn"}, ["target_modules"]),
    ],
    ids=str,
)
def test_a_card_names_what_no_option_says_of_adapters(config: Any, missing: list[str], tmp_path: Path) -> None:
    model = get_peft_model(tiny.gpt2(), LoraConfig(**{"r": 4, "target_modules": ["c_attn"], **config}))
    trainer = train(SoapTrainer, tmp_path, model, max_steps=2)
    trainer.create_model_card()
    card, recipe = card_of(trainer)
    recipes.check(recipe, source="the recipe")
    assert recipe["lora_r"] == 4
    assert [one for one in recipe["provenance"]["not_in_recipe"] if "LoraConfig" in one] == [
        f"{name} of LoraConfig" for name in missing
    ]
    assert all(f"\n- {name} of LoraConfig\n" in card.text for name in missing)


@pytest.mark.usefixtures("no_launch")
def test_adapters_of_another_method_make_no_options(tmp_path: Path) -> None:
    model = get_peft_model(tiny.gpt2(), IA3Config(target_modules=["c_attn"], feedforward_modules=[]))
    trainer = train(SoapTrainer, tmp_path, model, max_steps=2)
    trainer.create_model_card()
    card, recipe = card_of(trainer)
    assert not [key for key in recipe if "lora" in key or "peft" in key]
    assert "\n- the adapter, which is IA3, not LoRA\n" in card.text


class Nothing(TrainerCallback):
    pass


class HalfLoss(SoapTrainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) / 2


def third_of_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    return torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten()) / 3


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


@pytest.mark.usefixtures("no_launch")
def test_a_card_names_what_was_given_in_python(tmp_path: Path) -> None:
    """The card of an optimizer made by hand named AdamW and said that the recipe repeats the run."""
    model = tiny.gpt2()
    trainer = HalfLoss(
        model,
        tiny.arguments(tmp_path, optim="adamw_torch", max_steps=2, optim_args=None),
        train_dataset=tiny.Counting(),
        data_collator=collate,
        compute_loss_func=third_of_loss,
        callbacks=[Nothing(), SoapMetricsCallback(every=1)],
        optimizers=(SOAP(model.parameters(), lr=1e-3), None),
    )
    for _ in range(2):  # in the second training the optimizer is there, whoever made it
        trainer.train()
    trainer.create_model_card()
    card, recipe = card_of(trainer)
    assert recipe["provenance"]["not_in_recipe"] == [
        "the model, a GPT2LMHeadModel, with its weights before training",
        "the training data",
        "the data collator, collate",
        "the optimizer, a SOAP that the program created: optim and optim_args had no effect",
        "compute_loss_func, third_of_loss",
        "the callback Nothing",
        "the class HalfLoss, which defines compute_loss",
    ]
    assert "`SOAP`, created by the program and not by `optim`" in card.text
    assert "- optimizer: SOAP, see below" in card.text
    assert "It does not repeat this run by itself" in card.text


@pytest.mark.usefixtures("no_launch")
def test_a_card_names_no_more_than_was_given(tmp_path: Path) -> None:
    """The optimizer that a Trainer made for its first training is there at its second, and nobody gave it."""
    trainer = train(SoapTrainer, tmp_path, max_steps=2, optim_args="log_every=1")
    trainer.train()
    trainer.create_model_card()
    card, recipe = card_of(trainer)
    assert recipe["provenance"]["not_in_recipe"] == [
        "the model, a GPT2LMHeadModel, with its weights before training",
        "the training data",
        "the evaluation data",
    ]
    assert "created by the program" not in card.text


# ---------------------------------------------------------------------------------------------------------------------
# The Hub
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hub")
    (path / "text.txt").write_text("\n".join(f"{i} times {j} is {i * j}" for i in range(30) for j in range(30)))
    return path


def python(hub: Hub, folder: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    # The cache is one for all: what one process downloaded the next may have.
    settings = {"PYTHONPATH": str(ROOT), **hub.environment(folder / "home"), "COLUMNS": "200", **environment}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, **settings},
        capture_output=True,
        check=False,
        text=True,
        timeout=600,
    )


TRAINING = {
    "train_files": "text.txt",
    "model_type": "gpt2",
    "config_overrides": "n_layer=1,n_head=2,n_embd=16,n_positions=32,resid_pdrop=0.1",
    "train_tokenizer_vocab": "300",
    "block_size": "16",
    "eval_share": "0.1",
    "max_steps": "6",
    "logging_steps": "1",
    "per_device_train_batch_size": "4",
    "optim": "soap",
    "optim_args": "precondition_frequency=2,adam_modules=wte|wpe",
    "learning_rate": "3e-2",
    "lr_scheduler_type": "cosine",
    "save_strategy": "no",
    "use_cpu": "true",
    "report_to": "none",
    "seed": "3",
}


@pytest.fixture(scope="module")
def pushed(hub: Hub, folder: Path) -> dict[str, bytes]:
    """What a run of scripts/run_clm.py with --push_to_hub leaves in its repository."""
    options = [part for key, value in TRAINING.items() for part in (f"--{key}", value)]
    push = ["--output_dir", "first", "--push_to_hub", "--hub_model_id", "user/tiny"]
    done = python(hub, folder, "-m", "hf_soap", "run", RUN_CLM, *options, *push)
    assert done.returncode == 0, done.stderr
    return hub.files("user/tiny")


def outcome(folder: Path) -> tuple[list[dict[str, float]], bytes]:
    """Losses and norms to the last bit, and the weights."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    kept = [{key: entry[key] for key in ("loss", "eval_loss", "grad_norm") if key in entry} for entry in history]
    return kept, (folder / "model.safetensors").read_bytes()


def test_a_repository_holds_card_curve_and_recipe(pushed: dict[str, bytes]) -> None:
    assert {"README.md", "recipe.yaml", "loss.png", "model.safetensors"} <= pushed.keys()
    assert recipes.embedded(pushed["README.md"]) == pushed["recipe.yaml"]
    recipe = recipes.read(pushed["recipe.yaml"], source="the recipe")
    ran = recipe.pop("provenance")
    assert (
        recipe.items()
        >= {
            "train_files": "text.txt",
            "model_type": "gpt2",
            "train_tokenizer_vocab": 300,
            "optim_args": TRAINING["optim_args"],
            "learning_rate": 0.03,
            "lr_scheduler_type": "cosine",
            "seed": 3,
        }.items()
    )
    assert not {"output_dir", "push_to_hub", "hub_model_id", "report_to"} & recipe.keys()
    assert (ran["program"], ran["dataset"]) == ("run_clm.py", "text.txt")
    metadata = yaml.safe_load(pushed["README.md"].decode().split("---")[1])
    metrics = metadata["model-index"][0]["results"][0]["metrics"]
    assert {metric["type"]: metric["value"] for metric in metrics}["loss"] == ran["results"]["eval_loss"]
    card = pushed["README.md"].decode()
    assert "hf-soap run run_clm.py --recipe user/tiny" in card
    assert "| `adam_modules` | `wte\\|wpe` |" in card  # a bare | would end the cell


def test_a_run_from_the_repository_is_the_first_run(hub: Hub, folder: Path, pushed: dict[str, bytes]) -> None:
    """Bit for bit, dropout and the tokenizer trained on the text included."""
    done = python(hub, folder, "-m", "hf_soap", "run", RUN_CLM, "--recipe", "user/tiny", "--output_dir", "second")
    assert done.returncode == 0, done.stderr
    losses, weights = outcome(folder / "second")
    assert (losses, weights) == outcome(folder / "first")
    assert len([entry for entry in losses if "loss" in entry]) == 6
    assert weights == pushed["model.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "hf_soap"],
        ["-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu", "-m", "hf_soap"],
    ],
    ids=["torchrun", "accelerate"],
)
@pytest.mark.usefixtures("pushed")
def test_a_launcher_runs_a_recipe(launcher: list[str], hub: Hub, folder: Path, tmp_path: Path) -> None:
    """The overrides are said once, not by each rank."""
    given = ["--recipe", "user/tiny", "--output_dir", tmp_path, "--max_steps", "2"]
    done = python(hub, folder, *launcher, "run", RUN_CLM, *given)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("max_steps is 2 instead of 6") == 1
    losses, _ = outcome(tmp_path)
    assert len([entry for entry in losses if "loss" in entry]) == 2
    if "accelerate" in launcher[1]:
        first, _ = outcome(folder / "first")
        assert losses[0] == first[0]


COMMANDS = """
import json, sys
from typer.testing import CliRunner
from hf_soap.__main__ import app

for line in sys.stdin:
    result = CliRunner().invoke(app, ["recipe", *json.loads(line)])
    print(json.dumps([result.exit_code, result.output]))
"""


def commands(hub: Hub, folder: Path, *lines: list[str], **environment: str) -> list[tuple[int, str]]:
    """Runs several ``hf-soap recipe ...`` in one process."""
    settings = {"PYTHONPATH": str(ROOT), **hub.environment(folder / "home"), "COLUMNS": "200", **environment}
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS],
        input="".join(json.dumps(line) + "\n" for line in lines),
        cwd=folder,
        env={**os.environ, **settings},
        capture_output=True,
        check=True,
        text=True,
        timeout=300,
    )
    return [(status, output) for status, output in map(json.loads, done.stdout.splitlines())]


def test_push_pull_and_diff(hub: Hub, tmp_path: Path) -> None:
    text = "# mine\noptim: soap\nlearning_rate: 3e-3\n"
    (tmp_path / "mine.yaml").write_text(text)
    (tmp_path / "bad.yaml").write_text("optim: soap\nhub_token: x\n")
    (tmp_path / "typo.yaml").write_text("optim: soap\nlearning_rat: 1\n")
    hub.repositories["user/model"] = [{"README.md": b"---\nlicense: mit\n---\n# Theirs\n"}]
    hub.repositories["user/card"] = [{"README.md": b"# A\n" + recipes.embed({"seed": 5}).encode()}]
    hub.repositories["user/evil"] = [{"recipe.yaml": b"a: !!python/object/apply:os.system ['touch owned']"}]
    hub.repositories["user/huge"] = [{"recipe.yaml": b"#" * 300_000}]
    hub.repositories["user/empty"] = [{"a": b""}]
    first = sha("user/model", 2)
    results = commands(
        hub,
        tmp_path,
        ["push", "mine.yaml", "user/model", "--message", "A recipe"],
        ["push", "mine.yaml", "user/new", "--private"],
        ["push", "bad.yaml", "user/bad"],
        ["push", "typo.yaml", "user/bad"],
        ["pull", "user/model", "got"],
        ["diff", "user/model", "mine.yaml"],
        ["diff", "user/model", "user/card"],
        ["push", "user/card", "user/model"],
        ["pull", f"user/model@{first}", "old"],
        ["pull", "user/model", "newest"],
        ["pull", "user/evil", "evil"],
        ["pull", "user/huge", "huge"],
        ["pull", "user/empty", "empty"],
        ["pull", "user/absent", "absent"],
        ["pull", "user/../../absent", "absent"],
        ["pull", "user/model@nowhere", "absent"],
    )
    assert [status for status, _ in results] == [0, 0, 2, 2, 0, 0, 1, 0, 0, 0, 2, 2, 2, 2, 2, 2]
    said = [output for _, output in results]
    assert said[0].strip().endswith(f"/user/model/commit/{first}")
    assert hub.files("user/new")["recipe.yaml"] == text.encode(), "comments and all"
    assert "hub_token: refused, because it is a secret" in said[2]
    assert "did you mean learning_rate?" in said[3]
    assert "user/bad" not in hub.repositories
    assert (tmp_path / "got" / "recipe.yaml").read_text() == text
    assert said[5] == "no difference\n"
    assert [line.split()[0] for line in said[6].splitlines() if "-" in line and "learning" in line] == [
        "learning_rate"
    ]
    assert hub.files("user/model")["README.md"] == b"---\nlicense: mit\n---\n# Theirs\n"
    assert (tmp_path / "old" / "recipe.yaml").read_text() == text
    assert (tmp_path / "newest" / "recipe.yaml").read_text() == "seed: 5\n"
    assert "got the tag" in said[10]
    assert "with 300000 bytes" in said[11]
    assert "found neither" in said[12]
    assert "wanted a repository that can be reached" in said[13]
    assert "such as user/name" in said[14]
    assert "wanted a repository that can be reached" in said[15]
    assert {path.name for path in tmp_path.iterdir()} == {
        *("mine.yaml", "bad.yaml", "typo.yaml", "home", "got", "old", "newest"),
    }, "nothing was written for what was refused, and nothing was run"
    assert "GET /user/huge/resolve/main/recipe.yaml" not in hub.requests

    offline = commands(hub, tmp_path, ["show", "user/model"], ["show", "user/absent"], HF_HUB_OFFLINE="1")
    assert offline[0] == (0, "seed: 5\n")
    assert "HF_HUB_OFFLINE is set" in offline[1][1]


# ---------------------------------------------------------------------------------------------------------------------
# Trainers of others, under hf-soap run
# ---------------------------------------------------------------------------------------------------------------------

PLAIN = """
import os, sys
from dataclasses import dataclass
import tiny
from transformers import HfArgumentParser, Trainer, TrainingArguments

@dataclass
class Own:
    rows: int = 64
    card: bool = False

if __name__ == "__main__":
    own, args = HfArgumentParser((Own, TrainingArguments)).parse_args_into_dataclasses()
    for args.output_dir in args.output_dir.split(","):
        trainer = Trainer(tiny.gpt2(), args, train_dataset=tiny.Counting(own.rows), eval_dataset=tiny.Counting(8))
        trainer.train()
        print("written by training:", sorted(os.listdir(args.output_dir)))
        trainer.evaluate()
        trainer.save_model()
        trainer.save_state()
        if args.push_to_hub:
            trainer.push_to_hub()
        elif own.card:
            trainer.create_model_card(language="en")
    print("trained to the end")
"""

QUICK = (
    "--optim soap --learning_rate 1e-2 --max_steps 3 --logging_steps 1 --save_strategy no --report_to none --use_cpu"
)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    (tmp_path / "plain.py").write_text(PLAIN)
    return tmp_path


def run_plain(hub: Hub, folder: Path, *options: str, launcher: tuple[str, ...] = ("-m", "hf_soap")) -> str:
    done = python(hub, folder, *launcher, "run", "plain.py", *options, PYTHONPATH=PYTHONPATH)
    assert done.returncode == 0, done.stderr
    assert "trained to the end" in done.stdout
    return done.stdout + done.stderr


def test_the_trainer_of_transformers_leaves_a_recipe(hub: Hub, plain: Path) -> None:
    """Under hf-soap run only a SoapTrainer left one; and a program need not ask for a card.

    The run is repeated from the Hub, with what the evaluation after training gave, since the program writes its card
    after that.
    """
    push = ["--push_to_hub", "--hub_model_id", "user/plain"]
    run_plain(hub, plain, *QUICK.split(), "--output_dir", "first", *push)
    files = hub.files("user/plain")
    assert recipes.embedded(files["README.md"]) == files["recipe.yaml"]
    assert files["README.md"].count(b"## Recipe") == 1
    assert "eval_loss" in recipes.read(files["recipe.yaml"], source="it")["provenance"]["results"]

    said = run_plain(hub, plain, "--recipe", "user/plain", "--rows", "64", "--output_dir", "again", "--card")
    assert "written by training: ['README.md', 'loss.png', 'recipe.yaml']" in said
    assert outcome(plain / "again") == outcome(plain / "first")
    card, recipe = card_in(plain / "again")
    assert card.data.language == ["en"]
    assert card.text.count("## Recipe") == card.text.count("## Optimizer") == 1
    assert (recipe["rows"], recipe["optim"], recipe["learning_rate"]) == (64, "soap", 1e-2)
    assert "not_in_recipe" not in recipe["provenance"]
    assert recipe["provenance"]["results"].keys() == {"eval_loss", "train_loss"}
    assert "hf-soap run plain.py --recipe recipe.yaml\n```\n\nThis command repeats the run, bit for bit" in card.text
    assert "if plain.py takes these options" not in card.text


def test_no_card_is_worth_a_run(hub: Hub, plain: Path) -> None:
    """Neither one that cannot be written, nor one that somebody else has written."""
    (plain / "first" / "recipe.yaml").mkdir(parents=True)
    (plain / "second").mkdir()
    (plain / "second" / "README.md").write_text("# Mine\n")
    said = run_plain(hub, plain, *QUICK.split(), "--output_dir", "first,second", "--card")
    assert said.count("could not be written; training continues without it: IsADirectoryError") == 2
    assert "was not written by a Trainer and is not changed" in said
    assert recipes.read((plain / "second" / "recipe.yaml").read_bytes(), source="it")["optim"] == "soap"


def test_a_program_without_options_is_not_said_to_take_them(hub: Hub, plain: Path) -> None:
    """It decides by itself about what the recipe holds, and would not repeat the run with other options."""
    program = PLAIN.replace(
        "HfArgumentParser((Own, TrainingArguments)).parse_args_into_dataclasses()",
        'Own(), tiny.arguments("out", max_steps=2)',
    )
    (plain / "plain.py").write_text(program)
    run_plain(hub, plain)
    card, recipe = card_in(plain / "out")
    assert recipe["max_steps"] == 2
    assert "if plain.py takes these options" in card.text


@pytest.mark.slow
def test_one_rank_writes(hub: Hub, plain: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "hf_soap")
    (plain / "out").mkdir()
    (plain / "out" / "README.md").write_text("# Mine\n")
    said = run_plain(hub, plain, *QUICK.split(), "--output_dir", "out", launcher=launcher)
    assert said.count("was not written by a Trainer") == 1
    recipe = recipes.read((plain / "out" / "recipe.yaml").read_bytes(), source="it")
    assert recipe["provenance"]["not_in_recipe"] == ["the number of processes, 2"]
    run_plain(hub, plain, *QUICK.split(), "--output_dir", "two", launcher=launcher)
    card, _ = card_in(plain / "two")
    assert "\n- the number of processes, 2\n" in card.text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_trl_leaves_a_recipe_of_its_file_of_options(hub: Hub, tiny_model: Path, tmp_path: Path) -> None:
    """It held `config: x.yaml`, which no program of the reader has, and nothing of LoRA."""
    pytest.importorskip("trl")
    (tmp_path / "model").symlink_to(tiny_model)
    options = {
        "model_name_or_path": "model",
        "dataset_name": "model/data",
        "max_length": 16,
        "use_peft": True,
        "lora_r": 4,
        "lora_target_modules": ["c_attn", "c_fc"],
        "optim": "soap",
        "learning_rate": 1e-2,
        "max_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "num_processes": 1,
        "logging_steps": 1,
        "save_steps": 1,
        "env": {"MINE": "1"},
    }
    (tmp_path / "options.yaml").write_text(yaml.safe_dump(options))
    start = ["-m", "hf_soap", "run", "-m", "trl.scripts.sft"]
    done = python(hub, tmp_path, *start, "--config", "options.yaml", "--output_dir", "first", "--seed", "3")
    assert done.returncode == 0, done.stderr
    card, recipe = card_in(tmp_path / "first")
    recipes.check(recipe, source="the recipe")
    assert "config" not in recipe
    kept = {"model_name_or_path", "dataset_name", "use_peft", "lora_r", "lora_target_modules", "max_length"}
    assert {key: recipe[key] for key in kept} == {key: options[key] for key in kept}
    assert recipe["provenance"]["adapter"]["lora_alpha"] == 32
    assert recipe["provenance"]["not_in_recipe"] == [
        "the environment variables MINE",
        "num_processes in options.yaml",
    ]
    assert "hf-soap run -m trl.scripts.sft --recipe recipe.yaml" in card.text
    assert card.text.count("## Recipe") == 1
    assert recipe["provenance"]["seen"]["steps"] == 2, "a card of TRL's from the middle of training is renewed"

    done = python(hub, tmp_path, *start, "--recipe", "first", "--output_dir", "again")
    assert done.returncode == 0, done.stderr
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("first", "again")]
    assert weights[0] == weights[1]
