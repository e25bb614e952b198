"""Every optimizer under gradients, parameters and settings that are wrong."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from family import STEPS, Row, parameters_and, rows, trained
from helpers import assert_same, gradient, parameters, snapshot, through_a_file, train
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, distribute_tensor
from torch.nn import Parameter

from hf_soap import MARS, SOAP, Shampoo
from hf_soap.linalg import elementwise
from hf_soap.rules.layout import plan_layout


@rows
def test_zero_gradients_do_nothing(row: Row) -> None:
    """LoRA's A starts behind B = 0, and a checkpoint loader takes a step with zero gradients to make state."""
    params, plain = parameters(), parameters()
    optimizer = row(params, weight_decay=0.1 if row.waits else 0.0)
    for _ in range(3):
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
    assert_same([param.detach() for param in params], [param.detach() for param in plain])
    if row.waits:
        assert not any(value.any() for state in optimizer.state.values() for value in state.values())
        other = row(plain, weight_decay=0.1)
        train(optimizer, params, range(4))
        train(other, plain, range(4))
        assert_same(snapshot(optimizer, params), snapshot(other, plain))


@rows
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("when", [0, 4])
def test_a_nonfinite_gradient_skips_the_whole_step(
    row: Row, bad: float, when: int, caplog: pytest.LogCaptureFixture
) -> None:
    """One NaN in one gradient stayed in the factors for good."""
    params, optimizer = trained(row, steps=when)
    before = snapshot(optimizer, params)
    for attempt in range(2):
        for place, param in enumerate(params):
            param.grad = gradient(param, place, attempt)
        params[-1].grad[1, 2] = bad
        optimizer.step()
    assert_same(snapshot(optimizer, params), before)
    assert optimizer.skipped_steps == 2
    assert sum("the whole step is skipped" in message for message in caplog.messages) == 1
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.skipped_steps == 0
    train(optimizer, params, range(when, STEPS))
    again, other = trained(row)
    assert_same(snapshot(optimizer, params), snapshot(other, again))


@rows
def test_looking_for_nonfinite_gradients_can_be_turned_off(row: Row) -> None:
    params, optimizer = trained(row, steps=4, shapes=[(5,), (6, 6)], nonfinite="off")
    for place, param in enumerate(params):
        param.grad = gradient(param, place, 4)
    params[0].grad[1] = torch.nan
    optimizer.step()
    assert optimizer.skipped_steps == 0
    # The sign of NaN is 0: Lion's moment shows it, its weights do not.
    assert any(value.isnan().any() for value in (params[0], *optimizer.state[params[0]].values()))


@rows
@pytest.mark.parametrize(("dtype", "size"), [(torch.float64, 1e50), (torch.float32, 1e16)])
def test_large_gradients_are_finite(row: Row, dtype: torch.dtype, size: float) -> None:
    """1e50 is finite in float64 and was skipped, since its norm was taken to float32."""
    params = parameters(dtype=dtype)
    optimizer = row(params)
    for step in range(8):
        for place, param in enumerate(params):
            param.grad = gradient(param, place, step) * size
        optimizer.step()
    assert optimizer.skipped_steps == 0
    for param, start in zip(params, parameters(dtype=dtype), strict=True):
        assert param.isfinite().all()
        assert not param.numel() or not torch.equal(param, start)


def test_a_float16_gradient_with_a_norm_beyond_float16_is_used() -> None:
    param = Parameter(torch.zeros(100, 100, dtype=torch.float16))
    optimizer = SOAP([param])
    param.grad = torch.full_like(param, 6e4)
    optimizer.step()
    assert optimizer.skipped_steps == 0


@rows
@pytest.mark.parametrize(("where", "size"), [((1, 2), 1e25), (slice(None), 1e19)], ids=["an entry", "their sum"])
def test_a_gradient_too_large_to_square_is_skipped(
    row: Row, where: Any, size: float, caplog: pytest.LogCaptureFixture
) -> None:
    """One gradient of 1e25 is finite in float32, its square is not: the factors were infinite from then on."""
    params, optimizer = trained(row, steps=4)
    before = snapshot(optimizer, params)
    for place, param in enumerate(params):
        param.grad = gradient(param, place, 4)
    params[0].grad[where] = size
    optimizer.step()
    assert_same(snapshot(optimizer, params), before)
    assert optimizer.skipped_steps == 1
    assert "the whole step is skipped" in caplog.text


@rows
def test_a_frozen_parameters_leftover_gradient_is_not_looked_at(row: Row) -> None:
    params, optimizer = trained(row, steps=4)
    params[0].requires_grad_(False)
    before = params[0].detach().clone()
    for place, param in enumerate(params):
        param.grad = gradient(param, place, 4)
    params[0].grad.fill_(torch.nan)
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert torch.equal(params[0], before)


@rows
def test_complex_parameters_are_refused(row: Row) -> None:
    turned = Parameter(torch.zeros(3, 3, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"complex64 .*view_as_real"):
        row([turned])
    params, optimizer = trained(row, steps=4)
    with pytest.raises(ValueError, match=r"complex64 .*view_as_real"):
        optimizer.add_param_group({"params": [turned]})
    assert len(optimizer.param_groups) == 1
    train(optimizer, params, range(4, STEPS))
    again, other = trained(row)
    assert_same(snapshot(optimizer, params), snapshot(other, again))


@rows
def test_frozen_parameters_may_be_of_any_kind(row: Row) -> None:
    """A quantised base model holds its frozen weights as integers, and model.parameters() hands them over."""
    frozen = Parameter(torch.zeros(3, 3, dtype=torch.uint8), requires_grad=False)
    params, plain = parameters(), parameters()
    optimizer, other = row([*params, frozen]), row(plain)
    train(optimizer, params, range(4))
    train(other, plain, range(4))
    assert_same([param.detach() for param in params], [param.detach() for param in plain])
    assert frozen not in optimizer.state


@rows
def test_a_wrong_setting_of_a_new_group_changes_nothing(row: Row) -> None:
    _, optimizer = trained(row, steps=4)
    for wrong in ({"betas": (0.9, 1.0)}, {"betas": 0.9}, {"lr": -1.0}, {"weight_decay": torch.nan}, {"eps": "small"}):
        if wrong.keys() - optimizer.defaults.keys():
            continue
        with pytest.raises(ValueError, match=r"must be .*got"):
            optimizer.add_param_group({"params": [Parameter(torch.zeros(2))], **wrong})
    assert len(optimizer.param_groups) == 1


@rows
def test_sparse_gradients_are_refused_before_anything_changes(row: Row) -> None:
    table = torch.nn.Embedding(8, 4, sparse=True)
    params = [*parameters(), table.weight]
    optimizer = row(params)
    train(optimizer, params, range(4))
    before = snapshot(optimizer, params)
    for place, param in enumerate(params):
        param.grad = gradient(param, place, 4)
    optimizer.zero_grad()
    (table(torch.tensor([1, 2])).sum() + sum(param.square().sum() for param in params[:-1])).backward()
    with pytest.raises(ValueError, match=r"dense gradients, got torch.sparse_coo .*sparse=False"):
        optimizer.step()
    assert_same(snapshot(optimizer, params), before)


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """A mesh of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_shards_may_come_after_construction(mesh: DeviceMesh) -> None:
    """accelerate puts them into the groups of an optimizer that was made for whole parameters."""
    for make in (SOAP, Shampoo, MARS):
        params = [Parameter(torch.ones(4, 4)), Parameter(torch.ones(4, 4))]
        optimizers = [make([param], lr=0.1) for param in params]
        params[1] = Parameter(distribute_tensor(torch.ones(4, 4), mesh))
        optimizers[1].param_groups[0]["params"][0] = params[1]
        for step in range(3):
            grad = gradient(params[0], 0, step)
            params[0].grad, params[1].grad = grad, distribute_tensor(grad, mesh)
            for optimizer in optimizers:
                optimizer.step()
        assert torch.equal(params[0], params[1].full_tensor())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_flat_parameters_of_fsdp_1_are_refused(mesh: DeviceMesh, use_orig_params: bool) -> None:
    """They are vectors, on which SOAP would silently be Adam."""
    model = FullyShardedDataParallel(
        torch.nn.Linear(4, 4), device_id=torch.device("cpu"), use_orig_params=use_orig_params
    )
    with pytest.raises(ValueError, match=r"that FSDP1 flattened, wanted a tensor or a DTensor.*fully_shard"):
        SOAP(model.parameters())


def test_parameters_of_other_shapes_in_their_place_are_refused() -> None:
    """DeepSpeed's ZeRO puts one flat vector into each group of an optimizer that was made before."""
    optimizer = SOAP([Parameter(torch.ones(4, 4)), Parameter(torch.ones(4))])
    flat = Parameter(torch.ones(20))
    flat.grad = torch.ones(20)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(ValueError, match=r"shape \(20,\) in place of one of shape \(4, 4\).*use FSDP2"):
        optimizer.step()


@pytest.mark.parametrize("saved_by", [torch.optim.AdamW, Shampoo, MARS])
def test_state_of_another_optimizer_is_refused(saved_by: Any) -> None:
    params = [Parameter(torch.ones(4, 4))]
    optimizer = saved_by(params)
    train(optimizer, params, range(2))
    with pytest.raises(ValueError, match=r"basis_0 got nothing, wanted .*Resume with the optimizer"):
        SOAP(params).load_state_dict(through_a_file(optimizer.state_dict()))


def test_a_parameter_whose_parts_are_to_be_summed_is_refused(mesh: DeviceMesh) -> None:
    partial = Parameter(DTensor.from_local(torch.ones(4, 4), mesh, [Partial()]))
    with pytest.raises(ValueError, match=r"shape \(4, 4\) with the placement .*wanted Shard or Replicate"):
        SOAP([partial])


@rows
def test_hooks_run_once_a_step(row: Row) -> None:
    params = parameters()
    optimizer = row(params)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(optimizer, params, range(2))
    assert calls == ["before", "after"] * 2


@rows
def test_the_surroundings_do_not_matter(row: Row) -> None:
    """A step inside autocast, or under another default dtype or device, is the step outside of it."""
    (params, optimizer), (again, other) = trained(row, steps=4), parameters_and(row)
    previous = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.autocast("cpu", torch.bfloat16):
            train(other, again, range(2))
        for step in (2, 3):
            for place, param in enumerate(again):
                param.grad = gradient(param, place, step)
            with torch.device("meta"):
                other.step()
    finally:
        torch.set_default_dtype(previous)
    assert_same(snapshot(optimizer, params), snapshot(other, again))


def test_an_expanded_gradient_is_corrected() -> None:
    """Its entries share one place in memory, which torch refuses to write to: exact MARS corrects in place."""
    weights = []
    for expanded in (False, True):
        param = Parameter(torch.ones(3, 4))
        optimizer = MARS([param], exact=True)
        for step in range(1, 4):
            grad = torch.tensor(0.1 * step).expand(3, 4)
            param.grad = grad if expanded else grad.clone()
            with optimizer.at_previous_weights():
                param.grad = torch.full((3, 4), 0.2 * step)
            optimizer.step()
        weights.append(param.detach())
    assert_same(*weights)


def test_a_first_moment_cannot_come_later() -> None:
    params = parameters()
    optimizer = Shampoo(params, betas=(0.0, 0.9), start_step=1)
    train(optimizer, params, range(2))
    optimizer.param_groups[0]["betas"] = (0.9, 0.9)
    with pytest.raises(ValueError, match="exp_avg got nothing, wanted"):
        train(optimizer, params, range(2, 3))


@pytest.mark.parametrize("shape", [(3, 0, 2), (0, 5), (2, 0, 3, 1)])
def test_empty_tensors_are_cut_and_fitted(shape: tuple[int, ...]) -> None:
    """merge_dims dropped the dimension of size 0, and a part of an empty shard ended in a StopIteration."""
    layout = plan_layout(shape, max_precond_dim=0, merge_dims=True)
    empty = torch.zeros(shape)
    assert layout.from_blocks(layout.to_blocks(empty), shape).shape == shape
    assert layout.fitted(shape, shape) == layout


@rows
def test_state_follows_a_model_to_another_dtype(row: Row) -> None:
    """It stayed in float32 until something was loaded, and was in float64 from there on."""
    params, optimizer = trained(row, steps=3)
    for param in params:
        param.grad, param.data = None, param.data.double()
    train(optimizer, params, range(3, 5))
    for param in params:
        assert {value.dtype for role, value in optimizer.state[param].items() if role != "step"} <= {torch.float64}


def test_counts_for_fused_kernels_are_float32() -> None:
    """On GPUs they read the bytes as that, and 10.0 in float64 as 0: bias corrections of 0 made infinite steps."""
    elementwise.step_count.cache_clear()
    previous = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert elementwise.step_count(10, torch.device("cpu")).dtype == torch.float32
    finally:
        torch.set_default_dtype(previous)
