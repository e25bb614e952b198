"""Plans against the real thing: what is said before a run is what the run then takes."""

from __future__ import annotations

import json
import logging
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny
import torch
from architectures import MODELS, batch, kept_bytes, model, save_config
from packaging import version
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, Trainer
from typer.testing import CliRunner

from hf_soap import MARS, SOAP, Shampoo, SoapConfig, SoapTrainer
from hf_soap.__main__ import app
from hf_soap.cli.meta_model import model_without_weights, trainer_groups
from hf_soap.engine.optimizer import BlockOptimizer
from hf_soap.planning import plan as planning
from hf_soap.trainer import preflight

GIB = 2**30
AVERAGED = "average_horizon=10"


def plan(*arguments: object) -> dict[str, Any]:
    """The figures of `hf-soap plan`."""
    done = CliRunner().invoke(app, ["plan", *map(str, arguments), "--json"])
    assert done.exit_code == 0, done.output
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def stepped(built: Any, name: str, folder: Path, **settings: Any) -> Any:
    """The optimizer that the Trainer makes, after a step."""
    trainer = SoapTrainer(built, tiny.arguments(folder, **settings))
    optimizer: Any = trainer.create_optimizer()
    built(**batch(name)).loss.backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(("name", "optim_args"), [*((name, "stagger=true") for name in MODELS), ("gpt2", AVERAGED)])
def test_plans_are_what_the_optimizer_keeps(name: str, optim_args: str, tmp_path: Path) -> None:
    """Byte for byte in one process."""
    built: Any = model(name)
    report = plan(save_config(name, tmp_path), "--optim-args", optim_args)
    optimizer = stepped(built, name, tmp_path, weight_decay=0.1, optim_args=optim_args)
    assert report["asked"]["cost"]["state"] == kept_bytes(optimizer) == optimizer.state_bytes()
    assert report["weights"] == report["gradients"] == sum(p.nbytes for p in built.parameters())
    assert report["model"] == type(built).__name__
    assert report["parameters"] == report["trained"] == built.num_parameters()
    rows = report["tensors"]
    assert sum(row["state"] for row in rows) == optimizer.state_bytes()
    assert sum(row["tensors"] for row in rows) == len(list(built.parameters()))
    factors = sum(
        v.nbytes for state in optimizer.state.values() for role, v in state.items() if role[:5] in ("facto", "basis")
    )
    assert sum(row["factors"] for row in rows) == report["asked"]["cost"]["factors"] == factors
    decays = {p: bool(group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    for row in rows:
        example = built.get_parameter(row["example"])
        assert (list(example.shape), decays[example]) == (row["shape"], row["decays"])


@pytest.mark.parametrize(
    ("optim", "optim_args"),
    [
        ("soap", "one_sided=true,factorized=true,adam_modules=embed_tokens"),
        ("kl_soap", "block_size=24,precondition_1d=true"),
        ("shampoo", "max_precond_dim=40,momentum=0.9,start_step=0"),
        ("mars", "exact=true"),
        ("mars_m", ""),
        ("mars_soap", ""),
        ("soap_muon", "one_sided=true"),
    ],
)
def test_plans_hold_for_every_optimizer(optim: str, optim_args: str, tmp_path: Path) -> None:
    built: Any = model("llama").to(torch.bfloat16)
    report = plan(save_config("llama", tmp_path), "--optim", optim, "--optim-args", optim_args, "--dtype", "bfloat16")
    made: Any = SoapTrainer(built, tiny.arguments(tmp_path, optim=optim, optim_args=optim_args)).create_optimizer()
    built(**batch("llama")).loss.backward()
    if optim_args == "exact=true":
        with made.at_previous_weights():
            built(**batch("llama")).loss.backward()
    made.step()
    assert report["asked"]["cost"]["state"] == kept_bytes(made)
    assert report["weights"] == sum(p.nbytes for p in built.parameters())


@pytest.mark.parametrize("mode", ["local", "owner"])
def test_directions_wait_for_the_norms_of_sharded_matrices(mode: Any) -> None:
    """Those of a rank's parts of hidden matrices; with whole matrices none waits."""
    built = tiny.gpt2(tie_word_embeddings=False)
    hidden = [p for name, p in built.named_parameters() if p.dim() == 2 and ".h." in name]

    def temporaries(norm: Any, ranks: int) -> float:
        run = planning.Run(built, trainer_groups(built), ranks=ranks, sharded=True)
        return run.cost(SoapConfig(norm=norm, shard_mode=mode)).temporaries

    assert temporaries("relative", 4) - temporaries(None, 4) == sum(param.nbytes for param in hidden) / 4
    assert temporaries("relative", 1) == temporaries(None, 1)


def test_adapters(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    report = plan(save_config("llama", tmp_path), "--lora-r", 4)
    built: Any = get_peft_model(model("llama"), LoraConfig(r=4))
    optimizer = stepped(built, "llama", tmp_path)
    assert report["asked"]["cost"]["state"] == kept_bytes(optimizer)
    assert report["weights"] == sum(p.nbytes for p in built.parameters())
    assert report["gradients"] == sum(p.nbytes for p in built.parameters() if p.requires_grad)
    assert report["model"] == "LlamaForCausalLM"
    frozen = report["parameters"] - report["trained"]
    assert report["tokens"] == 131_072
    assert report["model_work"] == 131_072 * (4 * frozen + 6 * report["trained"])


def test_experts_count_where_a_token_goes(tmp_path: Path) -> None:
    report = plan(save_config("mixtral", tmp_path), "--batch-tokens", 1000)
    experts = sum(p.numel() for name, p in model("mixtral").named_parameters() if ".experts." in name)
    assert experts > 0
    assert report["model_work"] == 6000 * (report["parameters"] - experts / 2)  # 2 of 4


WITHOUT_A_CLASS = {
    "t5": "T5ForConditionalGeneration",
    "whisper": "WhisperForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
    "bert": "BertForMaskedLM",
    "gpt2": "GPT2LMHeadModel",
    "vit": "ViTForImageClassification",
    "clip": "CLIPModel",
    "resnet": "ResNetForImageClassification",
    "wav2vec2": "Wav2Vec2ForCTC",
    "beit": "BeitForImageClassification",  # as its first choice it lacks an entry of the config
    "layoutlmv3": "LayoutLMv3Model",
}


@pytest.mark.parametrize(("kind", "expected"), WITHOUT_A_CLASS.items(), ids=WITHOUT_A_CLASS.keys())
def test_a_config_without_a_class_gets_the_whole_model(kind: str, expected: str, tmp_path: Path) -> None:
    """All but causal language models ended in a traceback, and of Whisper the decoder alone was planned."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    report = plan(tmp_path)
    assert report["model"] == expected
    assert report["chosen"].startswith("by AutoModel")
    assert report["chosen"].endswith("because the config names no class; use --model-class for another")
    assert sum(row["tensors"] for row in report["tensors"]) > 10


def test_a_class_that_is_no_more_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "architectures": ["T5WithLMHeadModel"]}))
    report = plan(tmp_path)
    assert report["model"] == "T5ForConditionalGeneration"
    assert "the config names T5WithLMHeadModel, which transformers does not have" in report["chosen"]
    assert plan(tmp_path, "--model-class", "T5EncoderModel")["model"] == "T5EncoderModel"


def test_an_encoder_that_is_made_a_decoder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "is_decoder": True}))
    assert plan(tmp_path)["model"] == "BertLMHeadModel"


# Beside AdamW, and at several numbers of tokens


@pytest.mark.parametrize("name", ["llama", "vit"])
@pytest.mark.parametrize("optim", planning.ADAMW)
def test_adamw_takes_what_torch_keeps(name: str, optim: str, tmp_path: Path) -> None:
    """A plan of SOAP said nothing of what it costs more than the optimizer that everybody has."""
    built: Any = model(name).to(torch.bfloat16 if name == "llama" else torch.float32)
    folder = save_config(name, tmp_path)
    dtype = ("--dtype", "bfloat16" if name == "llama" else "float32")
    report = plan(folder, "--optim", optim, *dtype)
    optimizer: Any = Trainer(built, tiny.arguments(tmp_path, optim=optim)).create_optimizer()
    for param in built.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    kept = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    assert report["asked"]["cost"]["state"] == report["adamw"]["cost"]["state"] == kept
    assert sum(row["state"] for row in report["tensors"]) == kept
    assert {row["rule"] for row in report["tensors"]} == {"AdamW"}
    assert report["asked"]["overhead"] == 0
    temporaries = 0 if optim.endswith("fused") else report["gradients"]
    assert report["asked"]["memory"] == 2 * report["weights"] + kept + temporaries
    assert plan(folder, *dtype)["adamw"]["cost"]["state"] == kept


def test_adamw_on_ranks_has_its_part(tmp_path: Path) -> None:
    folder = save_config("llama", tmp_path)
    whole, half = plan(folder, "--ddp", 2), plan(folder, "--fsdp", 2)
    assert whole["adamw"]["cost"]["state"] == plan(folder)["adamw"]["cost"]["state"]
    counts = 4 * sum(row["tensors"] for row in half["tensors"])
    assert half["adamw"]["cost"]["state"] - counts == 2 * half["weights"]


def test_a_plan_says_what_it_costs_at_several_batches(tmp_path: Path) -> None:
    """At half a million tokens a step the overhead of Llama 3 8B was 1 %; at 32,000 it is 15."""
    folder = save_config("llama", tmp_path)
    report = plan(folder)
    assert [step["tokens"] for step in report["batches"]] == [32_768, 131_072, 524_288]
    for step in report["batches"]:
        assert step["model_work"] == 6 * step["tokens"] * report["trained"]
        assert step["overhead"] == report["asked"]["cost"]["work"] / step["model_work"]
    assert report["batches"][1]["overhead"] == report["asked"]["overhead"]
    alone = plan(folder, "--batch-tokens", 1000)
    assert [batch["tokens"] for batch in alone["batches"]] == [1000]
    assert alone["tokens"] == 1000


def test_a_plan_says_how_often_bases_are_refreshed_at_first(tmp_path: Path) -> None:
    folder = save_config("llama", tmp_path)
    report = plan(folder, "--optim-args", "refresh_growth=0.1")
    assert (report["early_updates"], report["early_refreshes"]) == (103, 39)
    report = plan(folder, "--optim", "mars")
    assert (report["early_updates"], report["early_refreshes"]) == (0, 0)


def test_all_of_it_is_printed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    done = CliRunner().invoke(app, ["plan", str(tmp_path)], env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    assert "ViTForImageClassification was chosen by AutoModelForImageClassification, because" in done.output
    for text in ("AdamW (adamw_torch_fused)", "32,768", "131,072", "524,288"):
        assert text in done.output
    done = CliRunner().invoke(app, ["plan", str(tmp_path), "--optim", "adamw_torch"], env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    assert "ViTForImageClassification, 85,800,194 parameters; adamw_torch; one process" in done.output


def _products(*shapes: Any, out_shape: Any = None, **_: Any) -> float:
    (blocks, rows, inner), columns = shapes[1], shapes[2][-1]
    return float(2 * blocks * rows * inner * columns)


COUNTED = {
    torch.ops.aten.baddbmm_: _products,
    torch.ops.aten.linalg_qr: lambda shape, *_, **__: 8 / 3 * shape[0] * shape[-1] ** 3,
    torch.ops.aten._linalg_eigh: lambda shape, *_, **__: 9 * shape[0] * shape[-1] ** 3,
}
"""What torch does not count: its products in place, and decompositions by the textbook."""


@pytest.mark.parametrize(
    "make",
    [
        lambda p: SOAP(p, precondition_frequency=4, refresh_growth=0.0),
        lambda p: SOAP(p, precondition_frequency=4, refresh_growth=0.0, one_sided=True, factorized=True),
        lambda p: SOAP(p, precondition_frequency=4, refresh_growth=0.0, block_size=24, kl=True),
        lambda p: Shampoo(p, precondition_frequency=4),
        lambda p: Shampoo(p, precondition_frequency=4, kl=True, graft=None),
        lambda p: MARS(p, variant="shampoo"),
        lambda p: MARS(p, variant="soap", precondition_frequency=4, refresh_growth=0.0),
    ],
    ids=["soap", "one side", "blocks, kl", "shampoo", "kl_shampoo", "newton-schulz", "mars_soap"],
)
def test_work_is_what_is_computed(make: Callable[[Any], BlockOptimizer]) -> None:
    params = [nn.Parameter(torch.randn(shape) / 8) for shape in ((40, 72), (48, 48))]
    optimizer, total = make(params), 0.0
    for step in range(13):
        for param in params:
            param.grad = torch.randn(param.shape)
        with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
            optimizer.step()
        total += counter.get_total_flops() if step > 8 else 0
    group = optimizer.param_groups[0]
    planned = sum(optimizer.plan_of(group, param).work() for param in params)
    assert planned == pytest.approx(total / 4, rel=0.01)


# Settings that fit


def test_a_suggestion_fits(tmp_path: Path) -> None:
    folder = save_config("llama", tmp_path)
    asked = plan(folder)["asked"]
    for share in (0.9, 0.7, 0.6):
        limit = ("--gpu-memory", share * asked["memory"] / GIB)
        report = plan(folder, *limit)
        assert report["fits"] is False
        assert report["suggestions"]
        for found in report["suggestions"]:
            again = plan(folder, "--optim-args", found["optim_args"], *limit)
            assert again["fits"] is True
            assert again["asked"] == found
            assert again["suggestions"] == []


def test_the_fewest_changes_come_first_and_of_them_the_quickest(tmp_path: Path) -> None:
    empty = model_without_weights(save_config("llama", tmp_path)).model
    run = planning.Run(empty, trainer_groups(empty))
    whole, half, least = (run.cost(SoapConfig(**options)).state for options in ({}, HALF, LEAST))

    def texts(limit: float) -> list[str]:
        found = planning.settings_that_fit(SoapConfig(), run.cost, lambda cost: cost.state <= limit)
        assert [cost.work for _, cost in found] == sorted(cost.work for _, cost in found)
        return [config.to_optim_args() for config, _ in found]

    one_change = {
        "one_sided=true",
        "factorized=true",
        "pack_factors=true",
        "state_dtype=bfloat16",
    }
    assert set(texts(whole - 1)) == one_change
    assert texts(half)[0] == "one_sided=true"
    assert set(texts(half)) < one_change
    assert "one_sided=true,factorized=true" in texts(least)
    assert {text.count("=") for text in texts(least)} == {2}
    assert not planning.settings_that_fit(SoapConfig(), run.cost, lambda cost: False)


HALF: dict[str, Any] = {"one_sided": True}
LEAST: dict[str, Any] = {"one_sided": True, "factorized": True}


def test_owners_are_suggested_to_ranks_alone(tmp_path: Path) -> None:
    folder = save_config("llama", tmp_path)
    args = ("--optim", "mars_shampoo", "--ddp", 2)
    owned = plan(folder, *args, "--optim-args", "shard_mode=owner")["asked"]
    assert owned["memory"] < plan(folder, *args)["asked"]["memory"]
    limit = ("--gpu-memory", owned["memory"] / GIB)
    assert "shard_mode=owner" in [found["optim_args"] for found in plan(folder, *args, *limit)["suggestions"]]
    assert not [found for found in plan(folder, *args[:2], *limit)["suggestions"] if "owner" in found["optim_args"]]


def test_a_limit_on_time_is_met_by_the_frequency_too(tmp_path: Path) -> None:
    folder = save_config("llama", tmp_path)
    overhead = 100 * plan(folder)["asked"]["overhead"]
    report = plan(folder, "--max-overhead", 0.95 * overhead)
    assert report["fits"] is False
    assert "precondition_frequency=50" in [found["optim_args"] for found in report["suggestions"]]


def test_tables_are_printed(tmp_path: Path) -> None:
    folder = save_config("mixtral", tmp_path)
    done = CliRunner().invoke(app, ["plan", folder, "--fsdp", "2", "--gpu-memory", "0.0001"], env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    assert "MixtralForCausalLM" in done.output
    assert "does not fit" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "config.json"),
        (["--optim", "sope"], "did you mean soap"),
        (["--optim-args", "one_side=true"], "did you mean one_sided"),
        (["--optim-args", "adam_modules=nothing"], "matches no trainable parameter"),
        (["--dtype", "int8"], "float32"),
        (["--model-class", "Nothing"], "no class"),
        (["--fsdp", "2", "--ddp", "2"], "one of them"),
        (["--optim", "mars", "--optim-args", "exact=true", "--shard-mode", "owner"], "shard_mode='local'"),
        (["--optim", "adamw"], "did you mean adamw_torch"),
        (["--optim", "adamw_torch", "--optim-args", "eps=1e-6"], "got options for adamw_torch, wanted none"),
        (["--model-class", "ViTForImageClassification"], "transformers cannot build ViTForImageClassification"),
        (["--model-class", "AutoModelForSeq2SeqLM"], "transformers cannot build AutoModelForSeq2SeqLM"),
        (["--lora-r", "4", "--lora-targets", "nothing"], "--lora-targets all-linear"),
    ],
)
def test_errors_say_what_to_do(arguments: list[str], message: str, tmp_path: Path) -> None:
    source = [] if arguments == ["nowhere"] else [save_config("gpt2", tmp_path)]
    done = CliRunner().invoke(app, ["plan", *source, *arguments], env={"COLUMNS": "1000"})
    assert done.exit_code == 2, done.output
    assert message in done.output


LLAMA_70B = {"vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}


@pytest.fixture
def llama_70b(tmp_path: Path) -> str:
    """The config of a model that no machine for tests could hold."""
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8}
    LlamaConfig(**LLAMA_70B, **heads, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    return str(tmp_path)


def test_large_models_are_planned(llama_70b: str) -> None:
    report = plan(llama_70b, "--fsdp", 64)
    assert report["parameters"] == 70_553_706_496
    assert report["weights"] == 4 * 70_553_706_496 / 64
    assert 30 * GIB < report["asked"]["cost"]["state"] < 34 * GIB


@pytest.mark.slow
def test_nothing_is_allocated(llama_70b: str) -> None:
    code = f"""
import atexit, re, sys
status = lambda: open("/proc/self/status").read()  # rusage would count what the parent had before the fork
atexit.register(lambda: print(re.search(r"VmHWM:\\s*(\\d+) kB", status())[1], file=sys.stderr))
sys.argv = ["hf-soap", "plan", {llama_70b!r}, "--fsdp", "64", "--lora-r", "8", "--gpu-memory", "1"]
from hf_soap.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "70,5" in done.stdout
    assert int(done.stderr.split()[-1]) < 2 * 2**20  # KiB


# With ranks

fsdp = pytest.mark.skipif(
    version.parse(torch.__version__) < version.parse("2.8"), reason="fully_shard did not run on CPUs before"
)


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that all processes see."""
    monkeypatch.setenv("SHARED_FOLDER", str(tmp_path))
    return tmp_path


@fsdp
def test_plans_are_what_ranks_keep(shared: Path) -> None:
    ranks.run("sharded_plan.plans_are_what_ranks_keep", 2, shared, names=["gpt2"])


@fsdp
@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_plans_of_all_architectures_are_what_ranks_keep(count: int, shared: Path) -> None:
    ranks.run("sharded_plan.plans_are_what_ranks_keep", count, shared)


@fsdp
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", None])
@pytest.mark.parametrize("mode", ["local", "owner"])
def test_preflight_counts_what_a_rank_has(kind: str | None, mode: str, shared: Path) -> None:
    args = f"shard_mode={mode}"
    ranks.run("sharded_plan.preflight_counts_what_a_rank_has", 2, shared, state_dict_type=kind, optim_args=args)


# Before training


NEEDS = preflight.Needs(weights=10, gradients=10, state=50, missing=50)


def fits_into(room: int) -> str:
    return f"room for {room}"


def test_what_fits_passes() -> None:
    assert preflight.check_memory(NEEDS, free=60, total=70, device="gpu", suggest=fits_into) is None


def test_what_is_there_already_needs_no_room() -> None:
    needs = preflight.Needs(weights=10, gradients=10, state=50, missing=0)
    assert preflight.check_memory(needs, free=10, total=70, device="gpu", suggest=fits_into) is None
    assert preflight.check_memory(needs, free=9, total=70, device="gpu", suggest=fits_into) is not None


def test_what_does_not_fit_is_said() -> None:
    warning = preflight.check_memory(NEEDS, free=59, total=70, device="gpu", suggest=fits_into)
    assert warning is not None
    assert warning.endswith("room for 49")


def test_state_that_is_larger_than_the_device_is_refused() -> None:
    with pytest.raises(ValueError, match="room for 29"):
        preflight.check_memory(NEEDS, free=39, total=49, device="gpu", suggest=fits_into)


def trainer(folder: Path, **options: Any) -> SoapTrainer:
    args = tiny.arguments(folder, max_steps=1)
    return SoapTrainer(tiny.gpt2(), args, train_dataset=tiny.Counting(), **options)


def state_of(config: SoapConfig) -> int:
    built = tiny.gpt2()
    return planning.build(built, built.parameters(), config).state_bytes()


def test_the_trainer_refuses_what_cannot_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full, half = state_of(SoapConfig()), state_of(SoapConfig(one_sided=True))
    gradients = sum(p.nbytes for p in tiny.gpt2().parameters())
    monkeypatch.setattr(preflight, "device_memory", lambda _: (half + gradients, full - 1))
    with pytest.raises(ValueError, match=r"optimizer state on cpu.*use optim_args='one_sided=true'.*preflight=False"):
        trainer(tmp_path).train()
    trainer(tmp_path, optimizer_config=SoapConfig(one_sided=True)).train()
    trainer(tmp_path, preflight=False).train()


def test_the_trainer_warns_of_what_is_not_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(preflight, "device_memory", lambda _: (1000, GIB))
    with caplog.at_level(logging.WARNING, logger="hf_soap"):
        trainer(tmp_path).train()
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "hf_soap.trainer.trainer"]
    assert "optim=soap" in warning
    assert "use LoRA" in warning


def test_this_machine_says_what_it_has() -> None:
    memory = preflight.device_memory(torch.device("cpu"))
    assert memory is not None
    free, total = memory
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < total
    assert 0 < free <= total
    assert preflight.device_memory(torch.device("mps")) is None


@pytest.mark.cuda
def test_a_gpu_says_what_it_has() -> None:
    device = torch.device("cuda", 0)
    before = preflight.device_memory(device)
    held = torch.zeros(GIB, dtype=torch.uint8, device=device)
    during = preflight.device_memory(device)
    del held
    after = preflight.device_memory(device)  # the allocator keeps it, free all the same
    assert before is not None
    assert during is not None
    assert before[0] - during[0] >= GIB
    assert after is not None
    assert after[0] - during[0] >= GIB
