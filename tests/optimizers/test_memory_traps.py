"""Shapes that make factors outweigh what they precondition: adapters, heads, small convolutions, experts."""

from functools import partial
from typing import Any

import pytest
import tiny
import torch
from helpers import gradient, train
from peft import PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn
from torch.nn import Parameter
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from hf_soap import MARS, SOAP, MarsConfig, Shampoo, ShampooConfig, SoapConfig
from hf_soap.optimizers.grouping import routing_table, with_overrides

# ---------------------------------------------------------------------------------------------------------------------
# Adapters
# ---------------------------------------------------------------------------------------------------------------------

TARGETS: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
VIRTUAL: dict[str, Any] = {"num_virtual_tokens": 20}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10, **TARGETS},
    "ADAPTION_PROMPT": {"adapter_len": 10, "adapter_layers": 2},
    "CARTRIDGE": VIRTUAL,
    "CPT": {},
    "LN_TUNING": {},
    "MULTITASK_PROMPT_TUNING": VIRTUAL,
    "POLY": {"r": 8, **TARGETS},
    "PREFIX_TUNING": VIRTUAL,
    "PROMPT_TUNING": VIRTUAL,
    "P_TUNING": VIRTUAL,
    "SHADOW": {},
    "TRAINABLE_TOKENS": {"token_indices": [1, 2, 3]},
}
"""Arguments of methods that need others than the modules to adapt."""

NEEDS_NUMBERS = {"ADAMSS", "BOFT", "FROD", "SHIRA", "UNILORA"}
"""Methods that read numbers of the weights when they adapt a model: on an eighth of the sizes, on the CPU."""

NOT_ALONE = {"XLORA"}
"""Methods that only mix trained LoRA adapters, which another row has."""


def adapted(kind: str) -> nn.Module:
    real = kind in NEEDS_NUMBERS
    sizes = (
        {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 4, "vocab_size": 500} if real else {}
    )
    with torch.device("cpu" if real else "meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes))
        config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[kind]]
        return get_peft_model(model, config(task_type="CAUSAL_LM", **ARGUMENTS.get(kind, TARGETS)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", sorted({str(kind.value) for kind in PEFT_TYPE_TO_CONFIG_MAPPING} - NOT_ALONE))
def test_adapters_take_at_most_three_times_the_state_of_adamw(kind: str) -> None:
    """On Llama-2-7B IA3 took 8 GiB of state and LoHa 64 GiB: only LoRA was known, by its name."""
    model = adapted(kind)
    params = [param for param in model.parameters() if param.requires_grad]
    adamw = 8 * sum(param.numel() for param in params)
    assert adamw > 0
    for make, config in ((SOAP, SoapConfig()), (Shampoo, ShampooConfig()), (MARS, MarsConfig())):
        optimizer = make(with_overrides(params, model, config))
        # AdamW's count of steps is left aside, as ours is: of 40 vectors it is as much as a small adapter's state.
        assert optimizer.state_bytes() - 8 * len(params) <= 3.01 * adamw, (make.__name__, routing_table(optimizer))


@pytest.mark.parametrize(
    "shapes", [[(8, 4096), (4096, 8)], [(1, 4096)], [(4096, 1)], [(2048, 1)], [(20, 4096)]], ids=str
)
def test_flat_matrices_take_little_state_without_names(shapes: list[tuple[int, ...]]) -> None:
    """LoRA+ makes its optimizer without a model, and a head of one label got a factor of 2048 x 2048."""
    params = [Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    adamw = 8 * sum(param.numel() for param in params)
    for make in (SOAP, Shampoo):
        assert make(params).state_bytes() <= 1.6 * adamw
    assert SOAP(params, max_aspect_ratio=None).state_bytes() > (20 * adamw if min(shapes[0]) > 1 else 0)


def test_the_routing_table_says_which_matrices_are_too_flat() -> None:
    params = [Parameter(torch.ones(shape)) for shape in [(8, 512), (64, 512), (1, 512)]]
    rules = {row.split("  ")[0] for row in routing_table(SOAP(params)).splitlines()[1:]}
    assert rules == {"SOAP, 1 side, the others too long", "SOAP, 2 sides", "Adam"}


# ---------------------------------------------------------------------------------------------------------------------
# Convolutions
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(32, 16, 8), (64, 3, 7, 7), (8, 1, 3, 3), (16, 16, 3, 3), (768, 1, 31)], ids=str)
def test_merging_makes_no_factor_that_outweighs_the_tensor(shape: tuple[int, ...]) -> None:
    """A convolution of 16 KiB became one vector with a factor of 128 MiB."""
    param = Parameter(torch.empty(shape, device="meta"))
    assert SOAP([param], merge_dims=True).state_bytes() <= (2 + 2 * 2 * 8) * 4 * param.numel() + 8
    merged = SOAP([param], merge_dims=True).plan_of(SOAP([param], merge_dims=True).members()[0].settings, param).layout
    assert all(merged.block[side] ** 2 <= 8 * param.numel() for side in merged.sides)


# ---------------------------------------------------------------------------------------------------------------------
# Experts
# ---------------------------------------------------------------------------------------------------------------------

EXPERTS = [
    pytest.param(lambda p, **kw: SOAP(p, **kw), id="soap"),
    pytest.param(lambda p, **kw: SOAP(p, one_sided=True, factorized=True, **kw), id="one-sided"),
    pytest.param(lambda p, **kw: SOAP(p, kl=True, **kw), id="kl"),
    pytest.param(lambda p, **kw: Shampoo(p, start_step=1, graft="sgd", **kw), id="shampoo"),
    pytest.param(lambda p, **kw: MARS(p, variant="soap", gamma=0.0, **kw), id="mars-soap"),
]


def stack_and_parts(dtype: torch.dtype = torch.float64) -> tuple[Parameter, list[Parameter]]:
    generator = torch.Generator().manual_seed(0)
    stack = Parameter(torch.randn(3, 6, 5, generator=generator, dtype=dtype))
    return stack, [Parameter(one.clone()) for one in stack.detach()]


def steps_on_stack_and_parts(make: Any) -> tuple[Tensor, Tensor]:
    """The weights of a stack of matrices and of the same matrices as parameters of their own, after the same steps."""
    stack, parts = stack_and_parts()
    one, many = make([stack]), make(parts)
    for step in range(8):
        grad = 0.01 * gradient(stack, 0, step)  # MARS clips what a tensor, and so a stack, has beyond a norm of 1
        stack.grad = grad.clone()
        for part, own in zip(parts, grad, strict=True):
            part.grad = own.clone()
        one.step()
        many.step()
    return stack.detach(), torch.stack([part.detach() for part in parts])


@pytest.mark.parametrize("make", EXPERTS)
def test_each_expert_of_a_stack_is_a_matrix_of_its_own(make: Any) -> None:
    """Experts that are stored as one tensor shared their bases, and had a third one across experts."""
    stack, parts = steps_on_stack_and_parts(partial(make, lr=0.01, precondition_frequency=2))
    torch.testing.assert_close(stack, parts, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", ["shampoo", "m"])
def test_newton_schulz_treats_each_expert_by_itself(variant: Any) -> None:
    stack, parts = steps_on_stack_and_parts(partial(MARS, lr=0.01, variant=variant, gamma=0.0))
    torch.testing.assert_close(stack, parts, rtol=1e-9, atol=1e-9)


def test_a_stack_may_be_taken_for_one_tensor() -> None:
    stack, _ = stack_and_parts()
    optimizer = SOAP([stack], stacked_matrices=False)
    train(optimizer, [stack], range(2))
    assert {role for role in optimizer.state[stack] if role.startswith("basis")} == {"basis_0", "basis_1", "basis_2"}


def test_a_mixtures_experts_are_routed_as_matrices() -> None:
    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        vocab_size=64,
    )
    model = MixtralForCausalLM(config)
    optimizer = SOAP(with_overrides(model.parameters(), model, SoapConfig(precondition_frequency=2)))
    for _ in range(4):
        model(input_ids=torch.arange(32).view(2, 16), labels=torch.arange(32).view(2, 16)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    experts = {name: param for name, param in model.named_parameters() if "experts" in name and param.dim() == 3}
    assert experts, "transformers stores experts in another way"
    for param in experts.values():
        assert optimizer.state[param]["basis_0"].shape == (4, param.shape[1], param.shape[1])
        assert optimizer.state[param]["basis_1"].shape == (4, param.shape[2], param.shape[2])
    assert all(param.isfinite().all() for param in model.parameters())


def test_tiny_models_keep_both_sides() -> None:
    """The ratio leaves the matrices of language models alone: up to 8 to 1, as queries have with shared keys."""
    model = tiny.gpt2()
    optimizer = SOAP(with_overrides(model.parameters(), model, SoapConfig()))
    for member in optimizer.members():
        if member.param.dim() == 2:
            assert len(optimizer.plan_of(member.settings, member.param).layout.sides) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Gradients that come late
# ---------------------------------------------------------------------------------------------------------------------


def test_state_of_a_late_parameter_moves_nothing_of_the_others() -> None:
    """Growing the stacks of all for an expert that is first routed to would hold the state twice for a moment."""
    params = [Parameter(torch.randn(8, 8)) for _ in range(6)]
    optimizer = SOAP(params)
    train(optimizer, params[:4], range(3))
    assert set(optimizer.state) == set(params[:4])
    before = {param: optimizer.state[param]["factor_0"].data_ptr() for param in params[:4]}
    train(optimizer, params, range(3, 6))
    assert set(optimizer.state) == set(params)
    assert before == {param: optimizer.state[param]["factor_0"].data_ptr() for param in params[:4]}
    assert [int(optimizer.state[param]["step"]) for param in params] == [6, 6, 6, 6, 3, 3]


def test_a_group_for_each_parameter_keeps_their_stack() -> None:
    """Layer-wise learning rates undid the stacking: 96 matrices took 96 buckets, and 5.7 times as long."""
    params = [Parameter(torch.randn(8, 8)) for _ in range(12)]
    for make in (SOAP, Shampoo, MARS):
        optimizer = make(
            [{"params": [param], "lr": 1e-3 * (1 + i), "weight_decay": 0.1 * i} for i, param in enumerate(params)]
        )
        train(optimizer, params, range(2))
        (bucket,) = optimizer._engine.bucketing.caches()[0].buckets
        assert len(bucket.params) == 12
