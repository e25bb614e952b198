"""Which parameter follows which rule."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import Parameter
from transformers import Trainer

from hf_soap import SOAP, SoapConfig
from hf_soap.optimizers.grouping import routing_table, with_overrides
from hf_soap.optimizers.names import ENTRIES


def optimizer_for(model: nn.Module, folder: Path, **changes: Any) -> Any:
    return Trainer(model=model, args=tiny.arguments(folder, weight_decay=0.1, **changes)).create_optimizer()


def settings(optimizer: Any, model: nn.Module, *keys: str) -> dict[str, tuple[Any, ...]]:
    """What holds for each parameter of `keys`, by the parameter's first name; AdamW has it in its groups."""
    if not hasattr(optimizer, "members"):
        found = {p: tuple(group[key] for key in keys) for group in optimizer.param_groups for p in group["params"]}
    else:
        found = {member.param: tuple(member.settings[key] for key in keys) for member in optimizer.members()}
    return {name: found[param] for name, param in model.named_parameters() if param in found}


def bases(optimizer: Any, model: nn.Module) -> dict[str, set[tuple[int, ...]]]:
    """Shapes of each parameter's bases after a step."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    optimizer.step()
    return {
        name: {tuple(value.shape[1:]) for role, value in optimizer.state[param].items() if role.startswith("basis")}
        for name, param in model.named_parameters()
        if param.requires_grad
    }


def lora(rank: int = 4, **config: Any) -> nn.Module:
    peft = LoraConfig(r=rank, target_modules=["c_attn"], fan_in_fan_out=True, **config)
    return get_peft_model(tiny.gpt2(), peft)


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("optim_args", [None, "adam_modules=attn|ln_f"])
def test_decay_is_the_trainers(name: str, optim_args: str | None, tmp_path: Path) -> None:
    model = tiny.gpt2()
    theirs = settings(optimizer_for(model, tmp_path, optim="adamw_torch"), model, "weight_decay")
    mine = settings(optimizer_for(model, tmp_path, optim=name, optim_args=optim_args), model, "weight_decay")
    assert mine == theirs
    assert len(set(theirs.values())) == 2


def test_decay_groups_of_a_trainers_subclass_are_kept(tmp_path: Path) -> None:
    class Undecayed(Trainer):
        def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
            return [name for name in super().get_decay_parameter_names(model) if "mlp" not in name]

    model = tiny.gpt2()
    optimizer = Undecayed(model=model, args=tiny.arguments(tmp_path, weight_decay=0.1)).create_optimizer()
    decay = settings(optimizer, model, "weight_decay")
    assert decay["transformer.h.0.mlp.c_fc.weight"] == (0.0,)
    assert decay["transformer.h.0.attn.c_attn.weight"] == (0.1,)


def test_every_parameter_is_in_one_group_under_its_name(tmp_path: Path) -> None:
    model = tiny.gpt2()
    optimizer = optimizer_for(model, tmp_path, optim_args=r"adam_modules=wte,one_sided_modules=h\.0")
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    expected = dict(model.named_parameters())
    assert sorted(names) == sorted(expected)
    assert all(expected[name] is param for name, param in zip(names, params, strict=True))


def test_patterns_pick_rules_and_the_first_match_wins(tmp_path: Path) -> None:
    model = tiny.gpt2()
    optimizer = optimizer_for(model, tmp_path, optim_args=r"adam_modules=wte|attn,one_sided_modules=h\.0\.")
    chosen = settings(optimizer, model, "rule", "one_sided")
    assert chosen["transformer.wte.weight"] == ("adam", False)
    assert chosen["transformer.h.0.attn.c_attn.weight"] == ("adam", False)
    assert chosen["transformer.h.0.mlp.c_fc.weight"] == ("soap", True)
    assert chosen["transformer.h.1.mlp.c_fc.weight"] == ("soap", False)
    shapes = bases(optimizer, model)
    assert shapes["transformer.wte.weight"] == set()
    assert shapes["transformer.h.0.attn.c_attn.weight"] == set()
    assert shapes["transformer.h.0.mlp.c_fc.weight"] == {(32, 32)}
    assert shapes["transformer.h.1.mlp.c_fc.weight"] == {(32, 32), (128, 128)}


@pytest.mark.parametrize("pattern", ["lm_head", "wte"])
def test_a_tied_weight_is_found_under_each_of_its_names(pattern: str, tmp_path: Path) -> None:
    """GPT-2's head is its embedding; named_parameters() says only the embedding's name."""
    model = tiny.gpt2()
    optimizer = optimizer_for(model, tmp_path, optim_args=f"adam_modules={pattern}")
    rules = settings(optimizer, model, "rule")
    assert {name for name, (rule,) in rules.items() if rule == "adam"} == {"transformer.wte.weight"}


@pytest.mark.parametrize("key", ["adam_modules", "one_sided_modules"])
def test_a_pattern_that_matches_nothing_is_an_error(key: str, tmp_path: Path) -> None:
    """A mistyped pattern trained the output head with factors of its vocabulary's size."""
    match = rf"{key}='lm_haed' matches no trainable parameter; names look like transformer\.wte\.weight"
    with pytest.raises(ValueError, match=match):
        optimizer_for(tiny.gpt2(), tmp_path, optim_args=f"{key}=lm_haed")


def test_a_pattern_that_matches_only_frozen_parameters_is_an_error(tmp_path: Path) -> None:
    model = tiny.gpt2()
    model.transformer.wpe.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"adam_modules='wpe' matches no trainable parameter"):
        optimizer_for(model, tmp_path, optim_args="adam_modules=wpe")


def test_a_pattern_without_a_model_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"adam_modules='x' needs parameter names; build the optimizer with its model"
    ):
        with_overrides([Parameter(torch.ones(2, 2))], None, SoapConfig(adam_modules="x"))


@pytest.mark.parametrize("dims", [1, 2], ids=["nothing that decays", "nothing that does not"])
@pytest.mark.parametrize("name", ENTRIES)
def test_groups_are_the_trainers_in_number_and_order(name: str, dims: int, tmp_path: Path) -> None:
    """A group for each rule, and none for the empty ones, let schedules of the groups hit the wrong weights."""
    model = tiny.gpt2()
    for param in model.parameters():
        param.requires_grad_(param.dim() == dims)
    theirs, ours = (
        [group["params"] for group in optimizer_for(model, tmp_path, optim=optim, optim_args=args).param_groups]
        for optim, args in (("adamw_torch", None), (name, f"adam_modules={'wte' if dims == 2 else 'ln_f'}"))
    )
    assert len(theirs) == len(ours) == 2
    for one, other in zip(theirs, ours, strict=True):
        assert len(one) == len(other)
        assert all(a is b for a, b in zip(one, other, strict=True))


def test_each_group_follows_its_own_lambda(tmp_path: Path) -> None:
    """With LoRA and a trained head, the head silently got the lambda of the empty no-decay group."""
    model = lora(modules_to_save=["lm_head"])
    optimizer = optimizer_for(model, tmp_path, optim="mars", optim_args="adam_modules=lm_head")
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda t: 0.5, lambda t: 0.25])
    scheduler.step()
    (lr,) = {group["lr"] / group["initial_lr"] for group in optimizer.param_groups if group["params"]}
    assert lr == 0.5
    assert len(optimizer.param_groups) == 2


def test_a_rule_of_a_whole_group_holds_for_what_has_no_other() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    optimizer = SOAP(with_overrides(model.parameters(), model, SoapConfig(one_sided_modules=r"0\.weight")))
    optimizer.param_groups[0]["rule"] = "adam"
    chosen = settings(optimizer, model, "rule", "one_sided")
    assert chosen["0.weight"] == ("adam", True)
    assert chosen["1.weight"] == ("adam", False)


def test_overrides_stay_with_their_parameters_when_a_group_is_given_others() -> None:
    """Training block by block puts other parameters of the model into a group."""
    layers = [nn.Linear(6, 4), nn.Linear(4, 3), nn.Linear(3, 6)]
    model = nn.Sequential(*layers)
    optimizer = SOAP(with_overrides(model.parameters(), model, SoapConfig(adam_modules=r"1\.weight")))
    for layer in (layers[1], layers[2], layers[1], layers[0]):
        optimizer.param_groups[0]["params"] = list(layer.parameters())
        rules = {member.param: member.settings["rule"] for member in optimizer.members()}
        assert rules == {p: "adam" if p is layers[1].weight else "soap" for p in layer.parameters()}


@pytest.mark.parametrize("overrides", [[{}], [{"rule": "adam"}, {"frequency": 3}], [{}, {"lr": -1.0}], [1, 2]])
def test_wrong_overrides_are_refused(overrides: Any) -> None:
    params = [Parameter(torch.ones(4, 4)) for _ in range(2)]
    with pytest.raises(ValueError, match=r"overrides|frequency|lr"):
        SOAP([{"params": params, "overrides": overrides}])


def test_sides_of_lora_without_a_model_are_decided_by_shape(caplog: pytest.LogCaptureFixture) -> None:
    """LoRA+ asks for class and keywords without a model, and its matrices silently got both sides."""
    params = [Parameter(torch.zeros(8, 512)), Parameter(torch.zeros(512, 8))]
    optimizer = SOAP(with_overrides(params, None, SoapConfig()))
    assert optimizer.state_bytes() <= 3 * 2 * 4 * 2 * 8 * 512
    assert not caplog.records
    with_overrides(params, None, SoapConfig(lora_sides="both"))
    assert "lora_sides=both has no effect without the model" in caplog.text


def generator(params: list[Parameter]) -> Iterator[Parameter]:
    yield from params


@pytest.mark.parametrize("given", [list, generator, tuple], ids=["list", "generator", "tuple"])
@pytest.mark.parametrize("grouped", [True, False])
def test_params_come_as_torch_takes_them(given: Any, grouped: bool) -> None:
    """A group that held a generator, model.parameters(), lost all of its parameters without a word."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    params = list(model.parameters())
    split = with_overrides(
        [{"params": given(params), "lr": 0.5}] if grouped else given(params), model, SoapConfig(adam_modules="bias")
    )
    optimizer = SOAP(split)
    found = {id(member.param): member.settings["rule"] for member in optimizer.members()}
    assert found == {id(param): "soap" if param.dim() == 2 else "adam" for param in params}
    assert {group["lr"] for group in optimizer.param_groups} == ({0.5} if grouped else {3e-3})


def test_a_group_may_be_a_single_tensor() -> None:
    model = nn.Linear(3, 4, bias=False)
    (group,) = with_overrides([{"params": model.weight}], model, SoapConfig())
    assert group["params"] == [model.weight]
    assert group["param_names"] == ["weight"]


def test_named_parameters_come_as_torch_takes_them() -> None:
    model = nn.Linear(3, 4)
    split = with_overrides(model.named_parameters(), model, SoapConfig(adam_modules="bias"))
    (group,) = split
    assert group["param_names"] == ["weight", "bias"]
    assert group["overrides"] == [{}, {"rule": "adam"}]


def test_parameters_that_the_model_does_not_name_are_kept_nameless() -> None:
    model, other = nn.Linear(3, 4), Parameter(torch.ones(3, 3))
    optimizer = SOAP(with_overrides([*model.parameters(), other], model, SoapConfig(adam_modules="weight")))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 3
    assert any(param is other for group in optimizer.param_groups for param in group["params"])
    assert settings(optimizer, model, "rule") == {"weight": ("adam",), "bias": ("soap",)}


# ---------------------------------------------------------------------------------------------------------------------
# LoRA
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sides", "down", "up"),
    [("rank", {(4, 4)}, {(4, 4)}), ("both", {(4, 4), (32, 32)}, {(4, 4), (96, 96)}), ("none", set(), set())],
)
def test_lora_matrices_get_the_sides_asked_for(
    sides: str, down: set[tuple[int, ...]], up: set[tuple[int, ...]], tmp_path: Path
) -> None:
    model = lora()
    found = bases(optimizer_for(model, tmp_path, optim_args=f"lora_sides={sides}"), model)
    assert len(found) == 4
    for name, shapes in found.items():
        assert shapes == (down if "lora_A" in name else up), name


def test_lora_matrices_are_never_merged(tmp_path: Path) -> None:
    """Merging (4, 32) to a vector would give it one factor of 128 x 128."""
    model = lora()
    found = bases(optimizer_for(model, tmp_path, optim_args="lora_sides=both,merge_dims=true"), model)
    assert {shape for shapes in found.values() for shape in shapes} == {(4, 4), (32, 32), (96, 96)}


def test_patterns_come_before_lora(tmp_path: Path) -> None:
    model = lora()
    found = bases(optimizer_for(model, tmp_path, optim_args=r"adam_modules=h\.0\..*lora_A"), model)
    assert {name.split(".h.")[1][0] + name.split("lora_")[1][0] for name, shapes in found.items() if not shapes} == {
        "0A"
    }


def test_doras_magnitudes_and_trained_modules_are_no_lora_matrices(tmp_path: Path) -> None:
    model = lora(use_dora=True, modules_to_save=["ln_f", "c_proj"])
    optimizer = optimizer_for(model, tmp_path, optim_args="lora_sides=none")
    for name, (rule,) in settings(optimizer, model, "rule").items():
        assert rule == ("adam" if "lora_A" in name or "lora_B" in name else "soap"), name


def test_lora_embeddings_are_lora_matrices(tmp_path: Path) -> None:
    model = get_peft_model(tiny.gpt2(), LoraConfig(r=4, target_modules=["wte"]))
    found = bases(optimizer_for(model, tmp_path), model)
    assert {name.split(".")[-2] for name in found} == {"lora_embedding_A", "lora_embedding_B"}
    assert all(shapes == {(4, 4)} for shapes in found.values())


def test_a_resumed_run_may_drop_its_adam_modules() -> None:
    """The saved settings of single parameters stayed in the groups, and refused the state that was loaded."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    saved = SOAP(with_overrides(model.parameters(), model, SoapConfig(adam_modules="bias|0.weight")))
    bases(saved, model)
    optimizer = SOAP(with_overrides(model.parameters(), model, SoapConfig()))
    optimizer.load_state_dict(saved.state_dict())
    assert set(settings(optimizer, model, "rule").values()) == {("soap",)}
    assert bases(optimizer, model)["0.weight"] == {(4, 4)}


# ---------------------------------------------------------------------------------------------------------------------
# What it says
# ---------------------------------------------------------------------------------------------------------------------


def test_the_routing_table_adds_up() -> None:
    params = [Parameter(torch.ones(shape)) for shape in [(512, 256), (512, 256), (64, 20000), (100,)]]
    frozen = Parameter(torch.ones(3, 3), requires_grad=False)
    heading, *rows = routing_table(SOAP([*params, frozen])).splitlines()
    assert heading.split() == ["rule", "tensors", "parameters", "factors", "and", "bases"]
    cells = {row[:13].strip(): row[13:].split() for row in rows}
    both, one = 2 * 2 * 4 * (512**2 + 256**2) / 2**20, 2 * 4 * 64**2 / 2**20
    assert cells == {
        "SOAP, 2 sides": ["2", "262,144", f"{both:.1f}", "MiB"],
        "SOAP, 1 side": ["1", "1,280,000", f"{one:.1f}", "MiB"],
        "Adam": ["1", "100", "0.0", "MiB"],
    }
    assert len({len(line) for line in (heading, *rows)}) == 1


def test_the_routing_table_counts_state_in_float32_for_bf16() -> None:
    low, full = (
        routing_table(SOAP([Parameter(torch.ones(512, 512, dtype=d))])) for d in (torch.bfloat16, torch.float32)
    )
    assert low == full
