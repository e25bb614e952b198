"""Optimizers from outside: what registering one brings, and what it refuses; Muon, which joined in the same way."""

import importlib.metadata
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import pytest
import ranks
import torch
from helpers import parameters
from third_party import SPlus, SPlusConfig, SPlusRule
from torch import Tensor, nn
from torch.nn import Parameter
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from typer.testing import CliRunner

import hf_soap
from hf_soap import Muon
from hf_soap.__main__ import app
from hf_soap.config.options import option_table
from hf_soap.engine.plan import Plan
from hf_soap.optimizers import names
from hf_soap.optimizers.names import ENTRIES, register
from hf_soap.rules.base import Rule, StateSpec, Traits, moment
from hf_soap.rules.elementwise import AdamWRule
from hf_soap.rules.layout import Layout, uncut
from hf_soap.rules.storage import is_own
from hf_soap.rules.wrapping import WrappingRule
from hf_soap.trainer.metrics import diagnostics

Number = TypeVar("Number")


@pytest.fixture
def entries() -> Iterator[dict[str, Any]]:
    before = dict(ENTRIES)
    yield ENTRIES
    ENTRIES.clear()
    ENTRIES.update(before)


# ---------------------------------------------------------------------------------------------------------------------
# What registering brings
# ---------------------------------------------------------------------------------------------------------------------


class Tokens(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.arange(index, index + 8) % 32
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize(
    ("name", "optim_args"),
    [
        ("splus", "precondition_frequency=2,pack_factors=true,state_dtype=bfloat16"),
        ("muon", "scale=rms,lr_1d=1e-3"),
        ("soap_muon", ""),
    ],
)
def test_the_trainer_trains_and_resumes(name: str, optim_args: str, tmp_path: Path) -> None:
    def trainer(**more: Any) -> Trainer:
        torch.manual_seed(0)
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
        )
        arguments = TrainingArguments(
            str(tmp_path), optim=name, optim_args=optim_args, learning_rate=1e-2, max_steps=6, save_steps=3,
            report_to="none", use_cpu=True, per_device_train_batch_size=4, disable_tqdm=True, **more,
        )  # fmt: skip
        return Trainer(model=model, args=arguments, train_dataset=Tokens())

    first = trainer()
    first.train()
    again = trainer()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for one, other in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_options_are_listed_and_checked() -> None:
    assert "| `covariance_decay` | float, in [0, 1) | `0.999` |" in option_table(SPlusConfig)
    with pytest.raises(ValueError, match="smoothing must be in"):
        SPlus(parameters(), smoothing=1.5)
    with pytest.raises(ValueError, match="unknown option 'smooth'"):
        SPlus(parameters(), smooth=0.5)
    with pytest.raises(ValueError, match="did you mean smoothing"):
        SPlus([{"params": parameters(), "smoothin": 0.5}])


def test_its_state_is_packed_and_rounded() -> None:
    def kept(**options: Any) -> dict[str, Tensor]:
        (param,) = params = [Parameter(torch.randn(8, 8))]
        optimizer = SPlus(params, **options)
        param.grad = torch.randn(8, 8)
        optimizer.step()
        return dict(optimizer.state[param])

    plain, small = kept(), kept(pack_factors=True, state_dtype="bfloat16")
    assert plain["covariance_0"].shape == (1, 8, 8)
    assert small["covariance_0"].shape == (1, 5, 8)
    assert small["eigenvectors_0"].shape == (1, 8, 8)
    assert {value.dtype for role, value in small.items() if role != "step"} == {torch.bfloat16}


def test_it_is_planned_and_measured(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=128).to_json_string())
    said = CliRunner().invoke(app, ["plan", str(config), "--optim", "splus", "--fsdp", "2"], catch_exceptions=False)
    assert said.exit_code == 0, said.output
    assert "splus" in said.output
    params = parameters()
    optimizer = SPlus(params)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert diagnostics(optimizer)["optimizer/skipped_steps"] == 0


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_it_goes_on_with_other_ranks(before: int, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARED_FOLDER", str(tmp_path))
    ranks.run("sharded.save_for_others", before, tmp_path, names=["third party"])
    ranks.run("sharded.goes_on_from_others", after, tmp_path, names=["third party"])


def test_owners_equal_one_process(tmp_path: Path) -> None:
    ranks.run("sharded_owners.owners_equal_one_process", 2, tmp_path, names=["muon", "soap_muon", "third party"])


def test_an_optimizer_of_an_installed_package_is_found(
    entries: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    del entries["splus"]
    points = [
        importlib.metadata.EntryPoint("splus", "third_party:SPlus", names.ENTRY_POINTS),
        importlib.metadata.EntryPoint("gone", "nowhere:Gone", names.ENTRY_POINTS),
    ]
    monkeypatch.setattr(names, "entry_points", lambda group: points if group == names.ENTRY_POINTS else [])
    names.load_entry_points.cache_clear()
    with caplog.at_level(logging.WARNING, "hf_soap"):
        said = CliRunner().invoke(app, ["options", "splus", "--markdown"], catch_exceptions=False)
    assert "covariance_decay" in said.output
    assert entries["splus"].optimizer is SPlus
    assert [record.getMessage() for record in caplog.records] == [
        "the optimizer nowhere:Gone of the entry points could not be registered: No module named 'nowhere'"
    ]


# ---------------------------------------------------------------------------------------------------------------------
# What it refuses
# ---------------------------------------------------------------------------------------------------------------------


def with_rule(rule_class: type[Any], **options: Any) -> type[SPlus]:
    """SPlus under another name, with another rule."""

    @dataclass(frozen=True, kw_only=True)
    class Config(SPlusConfig):
        name: ClassVar[str] = "other"

    class Other(SPlus):
        config = Config

        def plan(self, group: Any, shape: Any, *, part: Any = None) -> Plan:
            plan = super().plan(group, shape, part=part)
            return Plan(rule_class(smoothing=0.9, covariance_decay=0.9, every=1, **options), plan.layout)

    return Other


class WithoutSpec(SPlusRule):
    state_spec = hf_soap.rules.base.Rule.state_spec  # type: ignore[assignment]


class WithoutRebuild(SPlusRule):
    rebuild = hf_soap.rules.base.Rule.rebuild  # type: ignore[assignment]


class WithoutRoles(SPlusRule):
    roles = ("average", "covariance")


class WithoutSeed(SPlusRule):
    def traits(self, layout: Layout) -> Traits:
        return Traits(first_grad_seeds=True)


class WithoutFusedStep(SPlusRule):
    def traits(self, layout: Layout) -> Traits:
        return Traits(has_fused_step=True)


class WithoutRefresh(SPlusRule):
    def traits(self, layout: Layout) -> Traits:
        return Traits(refreshes_last=True)


class WithoutMode(SPlusRule):
    def state_spec(self, layout: Layout) -> dict[str, StateSpec]:
        return {"average": moment(layout), "covariance": StateSpec("factor", (3, 3))}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (WithoutSpec, "state_spec"),
        (WithoutRebuild, "must define rebuild"),
        (WithoutRoles, "'eigenvectors_0', wanted 'eigenvectors' in WithoutRoles.roles"),
        (WithoutSeed, "must define seed"),
        (WithoutFusedStep, "must define fused_step"),
        (WithoutRefresh, "must define refresh"),
        (WithoutMode, "'covariance' as a factor with mode=None"),
    ],
)
def test_a_rule_that_lacks_something_is_refused(rule: type[Any], message: str, entries: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=message):
        register(with_rule(rule))
    assert "other" not in entries


def test_classes_of_another_kind_are_refused(entries: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"wanted a subclass of hf_soap\.ConfiguredOptimizer"):
        register(torch.optim.AdamW, SPlusConfig)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="wanted a frozen dataclass"):
        register(SPlus, dict)  # type: ignore[arg-type]

    @dataclass(frozen=True, kw_only=True)
    class Taken(SPlusConfig):
        name: ClassVar[str] = "soap"

    with pytest.raises(ValueError, match="the name 'soap' belongs to SOAP"):
        register(SPlus, Taken)


@pytest.mark.parametrize("taken", ["adamw_torch", "lion"])  # a value, and the name of the member "lion_32bit"
def test_names_of_transformers_are_refused(taken: str, entries: dict[str, Any]) -> None:
    """The default optimizer of the Trainer was replaced, and "lion_32bit" no longer worked."""

    @dataclass(frozen=True, kw_only=True)
    class Taken(SPlusConfig):
        name: ClassVar[str] = taken

    with pytest.raises(ValueError, match=f"the name '{taken}' belongs to transformers"):
        register(SPlus, Taken)
    assert taken not in entries


def test_a_class_that_is_defined_again_takes_the_place_of_the_old_one(entries: dict[str, Any]) -> None:
    """A cell of a notebook that registers an optimizer failed when it ran again."""
    for _ in range(2):
        register(latest := with_rule(SPlusRule))
    assert entries["other"].optimizer is latest


@dataclass(frozen=True, kw_only=True)
class Halved(WrappingRule):
    inner: Any

    def update(self, grad: Tensor, state: Any, context: Any) -> Tensor:
        return self.inner.update(grad / 2, state, context)


def test_a_wrapper_forwards_all_that_it_does_not_change() -> None:
    inner = SPlusRule(smoothing=0.9, covariance_decay=0.9, every=1)
    layout = uncut((4, 3))
    rule = Halved(inner=inner)
    assert rule.state_spec(layout) == inner.state_spec(layout)
    # What it does to the gradient may depend on all entries.
    assert rule.traits(layout) == replace(inner.traits(layout), is_elementwise=False)
    assert rule.describe(layout) == f"Halved {inner.describe(layout)}"
    names.check_rule(Plan(rule, layout))


def test_a_wrapper_is_not_left_out_by_the_fused_step_of_the_rule_in_it() -> None:
    """The fused kernels of AdamW were announced for the wrapper, which has none, and each step failed."""

    class HalvedAdamW(SPlus):
        def plan(self, group: Any, shape: Any, *, part: Any = None) -> Plan:
            return Plan(Halved(inner=AdamWRule(beta1=0.9, beta2=0.95, eps=1.0)), uncut(shape))

    ours, theirs = parameters([(4, 3)]), parameters([(4, 3)])
    optimizer = HalvedAdamW(ours, lr=0.1)
    reference = torch.optim.AdamW(theirs, lr=0.1, betas=(0.9, 0.95), eps=1.0, weight_decay=0.0)
    for step in range(3):
        ours[0].grad = torch.full((4, 3), 1.0 + step)
        theirs[0].grad = ours[0].grad / 2
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours[0], theirs[0])


def test_a_wrapper_that_announces_a_fused_step_must_define_it() -> None:
    class Announcing(Halved):
        def traits(self, layout: Layout) -> Traits:
            return Traits(has_fused_step=True)

    rule = Announcing(inner=AdamWRule(beta1=0.9, beta2=0.95, eps=1.0))
    with pytest.raises(TypeError, match="Announcing must define fused_step"):
        names.check_rule(Plan(rule, uncut((4, 3))))


def test_rules_may_be_generic() -> None:
    class Parametrized(Rule, Generic[Number]):
        roles = ("of_a_generic_rule",)

    assert Parametrized[int] is not Parametrized
    assert is_own("of_a_generic_rule")


# ---------------------------------------------------------------------------------------------------------------------
# Muon
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("scale", "theirs"), [("aspect", "original"), ("rms", "match_rms_adamw")])
def test_muon_is_that_of_torch(nesterov: bool, scale: str, theirs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, where torch rounds to bfloat16 before it orthogonalizes: here it is kept from that."""
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.clone)
    shapes, runs = [(6, 6), (9, 4), (4, 9)], []
    for make in (
        lambda p: Muon(p, lr=0.02, weight_decay=0.1, momentum=0.9, nesterov=nesterov, scale=scale, eps=0.0),
        lambda p: torch.optim.Muon(
            p, lr=0.02, weight_decay=0.1, momentum=0.9, nesterov=nesterov, adjust_lr_fn=theirs, eps=1e-30
        ),
    ):
        params = parameters(shapes, torch.float64)
        optimizer = make(params)
        generator = torch.Generator().manual_seed(0)
        for _ in range(6):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
            optimizer.step()
        runs.append(params)
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_muon_leaves_vectors_to_adamw_with_rates_of_its_own() -> None:
    ours, theirs = (parameters([(5,), (3, 4, 5, 2)], torch.float64) for _ in range(2))
    optimizer = Muon(ours, lr=0.02, lr_1d=0.003, betas_1d=(0.8, 0.9), weight_decay_1d=0.1)
    reference = torch.optim.AdamW(theirs, lr=0.003, betas=(0.8, 0.9), weight_decay=0.1)
    for step in range(5):
        for one, other in zip(ours, theirs, strict=True):
            generator = torch.Generator().manual_seed(step)
            one.grad = torch.randn(one.shape, generator=generator, dtype=torch.float64)
            other.grad = one.grad.clone()
        optimizer.step()
        reference.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("name", "label"), [("muon", "Muon"), ("soap_muon", "SOAP, 2 sides, Newton-Schulz")])
def test_the_trainer_leaves_embeddings_and_head_to_adamw(name: str, label: str) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2))
    arguments = TrainingArguments("unused", optim=name, report_to="none", use_cpu=True)
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    optimizer = cls(model.parameters(), **kwargs)
    rules = {m.param: optimizer.plan_of(m.settings, m.param).label for m in optimizer.members()}
    assert rules[model.transformer.wte.weight] == "AdamW"
    assert rules[model.transformer.h[0].attn.c_attn.weight] == label
    assert isinstance(model.transformer.wpe, nn.Embedding)
    assert rules[model.transformer.wpe.weight] == "AdamW"
