"""Options by module: parameters with settings of their own are updated as if they had a param group for them."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from family import Row, rows
from helpers import FULL_RANK, assert_same, mostly_slow, parameters, snapshot, through_a_file, train
from peft import LoraConfig, get_peft_model
from problems import largest_difference
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from hf_soap import MARS, SOAP, Muon, MuonConfig, SoapConfig
from hf_soap.config.options import parse_optim_args
from hf_soap.optimizers.grouping import routing_table, with_overrides
from hf_soap.optimizers.names import ENTRIES
from hf_soap.planning.plan import Run, build
from hf_soap.reference.soap import ReferenceSOAP


def members(optimizer: Any) -> dict[str, dict[str, Any]]:
    """What each parameter overrides, by name."""
    return {member.name: dict(member.own) for member in optimizer.members()}


# ---------------------------------------------------------------------------------------------------------------------
# The update
# ---------------------------------------------------------------------------------------------------------------------

OWN = {"lr_factor": 0.5, "weight_decay": 0.25}
SPLIT = 3


def own_and_group(row: Row, own: dict[str, Any], **options: Any) -> list[tuple[list[Parameter], Any]]:
    """The first parameters with overrides, and in a group with the same settings, in the same order."""
    mixed, split = parameters(dtype=torch.float64), parameters(dtype=torch.float64)
    if "weight_decay_1d" in row(parameters()).defaults:
        own = {**own, "weight_decay_1d": None}
    of_group = {key: value for key, value in own.items() if key != "lr_factor"} | {"lr": 0.01 * own["lr_factor"]}
    if "lr_1d" in row(parameters()).defaults:
        of_group["base_lr"] = 0.01
    overrides = [own if place < SPLIT else {} for place in range(len(mixed))]
    groups = [{"params": split[:SPLIT], **of_group}, {"params": split[SPLIT:]}]
    return [
        (mixed, row([{"params": mixed, "overrides": overrides}], **options)),
        (split, row(groups, **options)),
    ]


@rows
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_own_rates_equal_a_group_of_their_own(row: Row, dtype: str) -> None:
    """Bit for bit, with state in full and in bfloat16, under a schedule that changes both groups."""
    (mixed, one), (split, other) = own_and_group(row, OWN, state_dtype=dtype, weight_decay=0.1)
    for optimizer, params in ((one, mixed), (other, split)):
        scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for step in range(8):
            train(optimizer, params, [step])
            scheduler.step()
    assert_same([p.detach() for p in mixed], [p.detach() for p in split])
    assert not torch.equal(mixed[0], mixed[-1])


@rows
def test_own_rule_and_options_equal_a_group_of_their_own(row: Row) -> None:
    own = {**OWN, "rule": "adam", **({"betas": (0.5, 0.99)} if row.has_betas else {})}
    (mixed, one), (split, other) = own_and_group(row, own)
    for optimizer, params in ((one, mixed), (other, split)):
        train(optimizer, params, range(8))
    assert_same([p.detach() for p in mixed], [p.detach() for p in split])


class InParts:
    """A textbook loop for each part of the weights."""

    def __init__(self, parts: list[ReferenceSOAP]) -> None:
        self.parts = parts

    @property
    def weights(self) -> list[Tensor]:
        return [weight for part in self.parts for weight in part.weights]

    def step(self, grads: list[Tensor]) -> None:
        for part in self.parts:
            part.step(grads[: len(part.weights)])
            grads = grads[len(part.weights) :]


def test_own_settings_equal_the_textbook_loop() -> None:
    model = nn.Module()
    model.a, model.b = (nn.ParameterList([nn.Parameter(torch.empty(25, 25)), torch.empty(7)]) for _ in range(2))
    config = SoapConfig(modules={r"^a\.": {"lr": 2e-2, "weight_decay": 0.5, "beta1": 0.8, "beta2": 0.9}})

    def optimizer_of(params: list[Parameter]) -> SOAP:
        model.a, model.b = nn.ParameterList(params[:2]), nn.ParameterList(params[2:])
        return SOAP(with_overrides(params, model, config, lr=1e-2), lr=1e-2)

    def reference_of(weights: list[Tensor]) -> InParts:
        own = ReferenceSOAP(weights[:2], refresh_growth=0.03, lr=2e-2, weight_decay=0.5, betas=(0.8, 0.9))
        return InParts([own, ReferenceSOAP(weights[2:], refresh_growth=0.03, lr=1e-2)])

    shapes = [(25, 25), (7,), (25, 25), (7,)]
    assert largest_difference(shapes, optimizer_of, reference_of, steps=40) < 1e-10


@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
def test_rates_of_what_adamw_updates(tensor: bool) -> None:
    """Muon's AdamW has a learning rate and a decay of its own: lr replaces it, and lr_factor multiplies it."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    config = MuonConfig(
        modules={r"^0\.": {"lr": 0.08, "weight_decay": 0.5}, r"^1\.": {"lr_factor": 3}},
        lr_1d=1e-3,
        weight_decay_1d=0.1,
    )
    lr = torch.tensor(0.02, dtype=torch.float64) if tensor else 0.02
    optimizer = Muon(with_overrides(model.parameters(), model, config, lr=lr), lr=lr, **config.constructor_kwargs())
    optimizer.param_groups[0]["lr"] = lr / 2
    found = {
        m.name: optimizer.rates_from(m.rates, optimizer.plan_of(m.settings, m.param)) for m in optimizer.members()
    }
    wanted = {
        "0.weight": (0.04, 0.5),
        "0.bias": (0.04, 0.5),
        "1.weight": (0.03, 0.0),
        "1.bias": (1.5e-3, 0.1),
        "2.weight": (0.01, 0.0),
        "2.bias": (5e-4, 0.1),
    }
    assert found.keys() == wanted.keys()
    for name, (rate, decay) in found.items():
        assert float(rate) == pytest.approx(wanted[name][0], rel=1e-12), name
        assert decay == wanted[name][1], name


def test_a_factor_that_is_changed_in_place_holds_at_the_next_step() -> None:
    """Without a copy of the state."""
    params = parameters(FULL_RANK, dtype=torch.float64)
    optimizer = SOAP([{"params": params, "overrides": [{"lr_factor": 1.0} for _ in params]}], weight_decay=0)
    train(optimizer, params, range(3))
    held = optimizer.state[params[0]]["exp_avg"].data_ptr()
    before = [param.detach().clone() for param in params]
    for own in optimizer.param_groups[0]["overrides"][:2]:
        own["lr_factor"] = 1e-300
    train(optimizer, params, [3])
    assert [torch.equal(*pair) for pair in zip(params, before, strict=True)] == [True] * 2 + [False] * 4
    assert optimizer.state[params[0]]["exp_avg"].data_ptr() == held


def test_a_key_of_a_user_is_no_factor() -> None:
    """Schedulers of layer-wise rates put such keys into groups."""
    params = parameters()
    plain, other = SOAP(params), SOAP([{"params": params, "lr_factor": "half", "overrides": [{}] * len(params)}])
    plan = plain.plan_of(plain.members()[0].settings, params[0])
    assert plain.rates_from((0, ()), plan) == other.rates_from(other.members()[0].rates, plan)


@pytest.mark.parametrize("changed", [{}, {"lr_factor": 0.25, "weight_decay": 0.0}, None], ids=str)
def test_a_run_goes_on_with_the_factors_that_it_is_given(changed: dict[str, Any] | None) -> None:
    """Bit for bit as the run that was saved, if its overrides are changed alike."""
    runs = []
    for resumes in (False, True):
        params = parameters(dtype=torch.float64)
        optimizer = SOAP([{"params": params, "overrides": [OWN] * len(params)}])
        train(optimizer, params, range(4))
        new = [{**OWN, **changed} if changed is not None else {}] * len(params)
        if resumes:
            saved = through_a_file(optimizer.state_dict())
            optimizer = SOAP([{"params": params, "overrides": new}])
            optimizer.load_state_dict(saved)
        else:
            optimizer.param_groups[0]["overrides"] = new
        train(optimizer, params, range(4, 8))
        runs.append(snapshot(optimizer, params))
    assert_same(runs[1][0], runs[0][0])
    assert optimizer.param_groups[0]["overrides"] == new


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"lr_factor": 0}, r"lr_factor must be a finite number > 0, got 0"),
        ({"lr_factor": float("inf")}, r"lr_factor must be a finite number > 0, got inf"),
        ({"lr_factor": "2"}, r"lr_factor must be a finite number > 0, got '2'"),
        ({"weight_decay": -1.0}, r"weight_decay must be a finite number >= 0, got -1.0"),
        ({"lr_1d": 1e-3}, r"got lr_1d, wanted settings that may differ .*: lr_factor, weight_decay, betas"),
    ],
    ids=str,
)
def test_wrong_rates_in_overrides(own: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SOAP([{"params": [Parameter(torch.ones(2, 2))], "overrides": [own]}])
    MARS([{"params": [Parameter(torch.ones(2, 2))], "overrides": [{"lr_1d": 1e-3}]}])


# ---------------------------------------------------------------------------------------------------------------------
# Whose settings they are
# ---------------------------------------------------------------------------------------------------------------------


def made(model: nn.Module, lr: float = 1e-2, **options: Any) -> Any:
    config = SoapConfig(**options)
    return SOAP(with_overrides(model.parameters(), model, config, lr=lr), lr=lr, **config.constructor_kwargs())


def chosen(model: nn.Module, selector: str) -> set[str]:
    """Names of the parameters that a pattern or role selects."""
    own = members(made(model, modules={selector: {"eps": 1.0}}))
    return {name for name, settings in own.items() if settings.get("eps") == 1.0}


def test_roles_of_a_model_with_a_tied_head() -> None:
    model = tiny.gpt2()
    tables = {"transformer.wte.weight", "transformer.wpe.weight"}
    names = dict(model.named_parameters())
    assert chosen(model, "@embeddings") == tables
    assert chosen(model, "@head") == chosen(model, "lm_head") == {"transformer.wte.weight"}
    assert chosen(model, "@vectors") == {name for name, param in names.items() if param.dim() < 2}
    assert chosen(model, "@matrices") == {name for name, param in names.items() if param.dim() > 1} - tables


def test_roles_of_adapters() -> None:
    model = get_peft_model(
        tiny.gpt2(), LoraConfig(r=4, target_modules=["c_attn"], modules_to_save=["ln_f"], use_dora=True)
    )
    for name, param in model.named_parameters():
        param.requires_grad_("lora" in name or "modules_to_save" in name)
    trained = [param for param in model.parameters() if param.requires_grad]
    config = SoapConfig(modules={"@adapters": {"lr_factor": 0.5, "eps": 1e-3}})
    optimizer = SOAP(with_overrides(trained, model, config))
    for name, own in members(optimizer).items():
        assert own == ({"eps": 1e-3, "lr_factor": 0.5} if "lora" in name else {}), name


def test_the_first_match_wins_in_the_written_order() -> None:
    model = tiny.gpt2()
    config: dict[str, Any] = {
        "modules": {"attn": {"beta2": 0.5}, r"h\.0": {"lr_factor": 2}, "wte": {}},
        "adam_modules": r"h\.|wte|wpe",
        "one_sided_modules": "wpe|ln_f",
    }
    own = members(made(model, **config))
    assert own["transformer.h.0.attn.c_attn.weight"] == {"betas": (0.95, 0.5)}
    assert own["transformer.h.0.mlp.c_fc.weight"] == {"rule": "adam", "lr_factor": 2}
    assert own["transformer.wte.weight"] == {}
    assert own["transformer.h.1.mlp.c_fc.weight"] == own["transformer.wpe.weight"] == {"rule": "adam"}
    assert own["transformer.ln_f.weight"] == {"one_sided": True}
    config["modules"] = dict(reversed(config["modules"].items()))
    of_both = {"betas": (0.95, 0.5), "lr_factor": 2}
    assert members(made(model, **config))["transformer.h.0.attn.c_attn.weight"] == of_both


@pytest.mark.parametrize(
    ("config", "rule", "rate"),
    [
        (MuonConfig(modules={"@embeddings": {"lr_factor": 0.5}}), "adam", 0.5),
        (MuonConfig(modules={"@head": {"weight_decay": 0}}), "adam", 1.0),
        (SoapConfig.preset("frontier", modules={"wte": {"lr_factor": 0.5}}), "adam", 0.5),
        (SoapConfig(modules={"wte": {"lr_factor": 0.5}, "@head": {"rule": "adam", "lr": 0.02}}), "adam", 0.1),
        (SoapConfig(modules={"wte": {"lr": 0.3}, "@head": {"rule": "adam", "lr_factor": 2}}), "adam", 3.0),
        (SoapConfig(modules={"wte": {"lr_factor": 3}, "@head": {"lr_factor": 2}}), None, 6.0),
    ],
    ids=["Muon", "Muon, decay", "preset", "lr after lr_factor", "lr_factor after lr", "two factors"],
)
def test_rates_alone_do_not_change_the_rule(config: Any, rule: str | None, rate: float) -> None:
    """A rate for Muon's embeddings used to give them to Newton–Schulz, with a learning rate 33 times as large."""
    model = tiny.gpt2()
    (group,) = with_overrides([{"params": model.parameters(), "lr": 0.1}], model, config)
    own = group["overrides"][group["param_names"].index("transformer.wte.weight")]
    assert own.get("rule") == rule
    assert own.get("lr_factor", 1.0) == pytest.approx(rate)


def test_overrides_follow_parameters_that_are_reordered() -> None:
    one, other = Parameter(torch.ones(3, 3)), Parameter(torch.ones(3, 3))
    optimizer = SOAP([{"params": [one, other], "overrides": [{"lr_factor": 0.1}, {}]}])
    optimizer.param_groups[0]["params"] = [other, one]
    assert {member.param: dict(member.own) for member in optimizer.members()} == {one: {"lr_factor": 0.1}, other: {}}


@pytest.mark.parametrize(
    ("optim", "optim_args"),
    [
        ("mars_soap", "precondition_frequency=5,modules={'wte': {rule: adamw}}"),
        ("mars", "preset=frontier,modules={'wte': {rule: lion}}"),
    ],
)
def test_options_of_the_group_do_not_count_against_another_variant(optim: str, optim_args: str) -> None:
    config = parse_optim_args(optim_args, ENTRIES[optim].config)
    model = tiny.gpt2()
    assert "rule" in members(build(model, model.parameters(), config))["transformer.wte.weight"]


@pytest.mark.parametrize(
    ("modules", "lr", "message"),
    [
        ({"lm_haed": {"lr": 1}}, 0.1, r"modules, 'lm_haed' matches no trainable parameter; names look like tran"),
        ({"wte": {"lr": 1e-2}}, 0.0, r"modules got lr=0.01 with a learning rate of 0, wanted one > 0.*set learning_r"),
        ({"wte": {"rule": "sgd"}}, 0.1, r"rule must be one of soap, adam, got 'sgd'"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_had(modules: Any, lr: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(tiny.gpt2(), lr=lr, modules=modules)


def test_a_model_need_not_have_every_role() -> None:
    assert not any(members(made(tiny.gpt2(), modules={"@adapters": {"lr_factor": 2}})).values())


def test_names_need_a_model() -> None:
    with pytest.raises(
        ValueError, match=r"modules, '@vectors' needs parameter names; build the optimizer with its mod"
    ):
        with_overrides([Parameter(torch.ones(2))], None, SoapConfig(modules={"@vectors": {"lr_factor": 2}}))


def test_a_learning_rate_is_in_proportion_to_that_of_its_group() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[1].parameters()}]
    split = with_overrides(groups, model, SoapConfig(modules={"weight": {"lr": 0.4}}), lr=0.2)
    assert [group["overrides"][0]["lr_factor"] for group in split] == [4.0, 2.0]


def test_tables_show_own_settings() -> None:
    model = tiny.gpt2()
    config = SoapConfig(
        modules={
            "wte": {"rule": "adam", "lr": 0.03, "weight_decay": 0},
            "attn": {"beta2": 0.9},
            "mlp": {"one_sided": True},
        }
    )
    text = routing_table(made(model, modules=config.modules))
    assert "Adam, lr ×3, weight decay 0  " in text
    assert "SOAP, 2 sides, betas=(0.95, 0.9)  " in text
    assert "SOAP, 1 side  " in text
    rows = Run(model, [{"params": list(model.parameters()), "weight_decay": 0.1}]).routing(config)
    (table,) = [row for row in rows if row.example == "transformer.wte.weight"]
    assert (table.rule, table.decays) == ("Adam, lr ×10, weight decay 0", False)  # of SoapConfig.lr


# ---------------------------------------------------------------------------------------------------------------------
# The Trainer
# ---------------------------------------------------------------------------------------------------------------------

BY_MODULE = "modules={'wte|lm_head': {rule: adam, lr: 2e-2}, '@vectors': {lr_factor: 0.5, weight_decay: 0.25}}"


def run(folder: Path, optim: str, cls: type[Trainer] = Trainer, **changes: Any) -> Trainer:
    settings = {"learning_rate": 1e-2, "max_steps": 6, "weight_decay": 0.1, "lr_scheduler_type": "linear", **changes}
    args = tiny.arguments(folder, optim=optim, **settings)
    trainer = cls(tiny.gpt2(), args, train_dataset=tiny.Counting())
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
    return trainer


@pytest.mark.parametrize("name", mostly_slow(ENTRIES, fast={"soap", "shampoo", "mars", "muon"}))
def test_the_trainer_trains_as_with_groups(name: str, tmp_path: Path) -> None:
    """The schedule is followed by what has its own learning rate too."""
    options = {"precondition_frequency": 2} if name in ("soap", "mars_soap") else {}

    class Grouped(Trainer):
        def create_optimizer(self, *_: Any, **__: Any) -> Any:
            config = ENTRIES[name].config(**options)
            model: Any = self.model
            head, vectors, rest = [], [], []
            for param in model.parameters():
                kind = head if param is model.lm_head.weight else vectors if param.dim() < 2 else rest
                kind.append(param)
            groups: list[dict[str, Any]] = [
                {"params": head, "rule": "adam", "lr": 2e-2, "weight_decay": 0.1},
                {"params": vectors, "lr": 5e-3, "weight_decay": 0.25},
                {"params": rest, "weight_decay": 0.1},
            ]
            if hasattr(config, "lr_1d"):
                groups[0] |= {"lr_1d": None}
                groups[1] |= {"weight_decay_1d": None, "base_lr": 1e-2}
            if config.adam_embeddings:
                groups[2]["overrides"] = [{"rule": "adam"}, *({} for _ in rest[1:])]  # the positions
            self.optimizer = ENTRIES[name].optimizer(groups, lr=1e-2, **config.constructor_kwargs())
            return self.optimizer

    text = ",".join([f"{key}={value}" for key, value in options.items()] + [BY_MODULE])
    ours = run(tmp_path / "own", name, optim_args=text)
    theirs = run(tmp_path / "groups", "adamw_torch", Grouped)
    assert_same(*(trainer.model.state_dict() for trainer in (ours, theirs)))  # type: ignore[union-attr]


def test_the_trainer_resumes_bit_for_bit(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"optim_args": BY_MODULE, "save_strategy": "steps", "save_steps": 3}
    whole = run(tmp_path / "whole", "soap", **{**changes, "save_strategy": "no"})
    folder = tmp_path / "cut"
    run(folder, "soap", **changes)
    (folder / "checkpoint-6").rename(tmp_path / "last")
    again = run(folder, "soap", **changes)
    assert again.state.global_step == 6
    assert_same(*(trainer.model.state_dict() for trainer in (whole, again)))  # type: ignore[union-attr]
