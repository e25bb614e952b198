"""What may stand in a param group, and schedulers that change it at every step."""

import copy
from typing import Any

import pytest
import torch
from family import STEPS, TABLE, Row, parameters_and, rows, rows_with_betas
from helpers import assert_same, parameters, snapshot, train
from torch.nn import Parameter
from torch.optim import AdamW
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from hf_soap import MARS, SOAP, Muon, Shampoo
from hf_soap.config.checks import check_group_keys


@rows
@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("weight_dacay", "did you mean weight_decay"),
        ("beta", "did you mean betas"),
        ("beta2", "write betas"),
        ("beta1", "write betas"),
        ("learning_rate", "write lr"),
        ("weight__decay", "did you mean weight_decay"),
        ("amsgrad", "a setting that a group may have"),
        ("adam_modules", "a setting that a group may have"),
        ("state_dtyp", "did you mean state_dtype"),
        ("precondition_freq", "did you mean precondition_frequency"),
    ],
)
def test_a_key_that_would_be_passed_over_is_refused(row: Row, key: str, message: str) -> None:
    """{"params": ..., "precondition_frequencyy": 5} trained with the default, and nobody was told."""
    params, optimizer = parameters_and(row)
    if (meant := message.split()[-1]) in ("betas", "precondition_frequency") and meant not in optimizer.defaults:
        pytest.skip(f"{meant} is no setting of it")
    with pytest.raises(ValueError, match=rf"got {key!r} in a param group, wanted .*{message}"):
        row([{"params": parameters(), key: 1}])
    with pytest.raises(ValueError, match=rf"got {key!r} in a param group"):
        optimizer.add_param_group({"params": [Parameter(torch.ones(2))], key: 1})
    train(optimizer, params, range(2))
    assert len(optimizer.param_groups) == 1


MAKERS = [SOAP, Shampoo, MARS]


def slips(name: str) -> set[str]:
    """A name with one letter left out, doubled or exchanged with the next. Single letters are anybody's."""
    found: set[str] = set()
    for at in range(len(name)):
        found |= {name[:at] + name[at + 1 :], name[: at + 1] + name[at:]}
        found.add(name[:at] + name[at + 1 : at + 2] + name[at] + name[at + 2 :])
    return {slip for slip in found if len(slip) > 1}


@pytest.mark.parametrize("make", MAKERS)
def test_any_slip_of_the_hand_is_refused(make: Any) -> None:
    settings = make([Parameter(torch.ones(2, 2))]).defaults
    tried = {slip: name for name in settings for slip in slips(name) if slip not in settings}
    assert len(tried) > 500
    for slip in tried:
        with pytest.raises(ValueError, match="in a param group, wanted a setting that a group may have: did you mean"):
            check_group_keys({slip: 1}, settings)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("decay", "write weight_decay"),
        ("wd", "write weight_decay"),
        ("frequency", "write precondition_frequency"),
        ("momentum", "write betas"),
        ("epsilon", "write eps"),
        ("precond_freq", "did you mean precondition_frequency"),
        ("precond_frequency", "did you mean precondition_frequency"),
        ("max_preconditioner_dim", "did you mean max_precond_dim"),
        ("weight-decay", "did you mean weight_decay"),
        ("Betas", "did you mean betas"),
        ("LR", "did you mean lr"),
    ],
)
@pytest.mark.parametrize("make", MAKERS)
def test_other_words_for_a_setting_are_refused(make: Any, key: str, meant: str) -> None:
    """{"params": ..., "decay": 0.1} and "frequency" trained with the defaults."""
    if make is Shampoo and key == "momentum":  # a setting of its own
        return
    with pytest.raises(ValueError, match=rf"got {key!r} in a param group, wanted .*: {meant}"):
        make([{"params": parameters(), key: 1}])


def test_keys_that_others_put_there_are_left_alone() -> None:
    """Names of groups, single words, layer-wise rates, what schedulers, GaLore and other optimizers of torch write."""
    others = {"name": "backbone", "lr_scale": 0.5, "initial_lr": 1.0, "max_lr": 1.0, "min_lr": 0.0, "swa_lr": 0.1}
    others |= {"base_momentum": 0.8, "max_momentum": 0.9, "rank": 8, "scale": 0.25, "is_expert": True, "group_id": 3}
    others |= {"initial_weight_decay": 0.1, "weight_decay_end": 0.0, "module_name": "attn", "layer": 3, "fix_step": 1}
    # Words that begin a setting, or are an option of another optimizer of the family, were refused.
    # Near to stagger and betas, and none of them.
    others |= {
        "stage": 2,
        "beta3": 0.99,
        "tag": "head",
        "scaling": 1.0,
        "r": 8,
        "warmup_steps": 10,
        "layer_decay": 0.9,
    }
    others |= {"lr_mult": 1.0, "group_name": "a", "decoupled_weight_decay": True, "max_grad_norm": 1.0, "role": "head"}
    words = "block normalize state weight shard merge correct matmul precondition refresh factor root"
    others |= dict.fromkeys(words.split(), 1)
    adamw = {key: value for key, value in AdamW(parameters(), fused=True).param_groups[0].items() if key != "params"}
    for make in (SOAP, Shampoo, MARS):
        params = parameters()
        optimizer = make([{"params": params, **adamw, **others}])
        train(optimizer, params, range(2))
        assert optimizer.param_groups[0]["name"] == "backbone"
        make(optimizer.param_groups)  # groups of another of its kind, MARS's base_lr among them


SCHEDULES = {
    "one cycle": lambda optimizer: OneCycleLR(optimizer, max_lr=0.1, total_steps=STEPS),
    "cyclic": lambda optimizer: CyclicLR(optimizer, 0.01, 0.1, step_size_up=3, cycle_momentum=True),
}


@rows_with_betas
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
def test_cycled_betas_are_those_of_each_step(row: Row, schedule: str, tensor: bool) -> None:
    """A copy whose buckets are built anew at every step goes the same way as one that keeps them."""
    sides = []
    for anew in (False, True):
        params = parameters()
        lr = torch.tensor(0.01, dtype=torch.float64) if tensor else 0.01
        optimizer = row([{"params": params[:4], "betas": (0.7, 0.99)}, {"params": params[4:]}], lr=lr)
        scheduler, seen = SCHEDULES[schedule](optimizer), set()
        for step in range(STEPS - 1):
            if anew:
                optimizer._engine.bucketing.clear()
            train(optimizer, params, [step])
            scheduler.step()
            seen.add(optimizer.param_groups[0]["betas"])
        assert len(seen) > 3
        sides.append(snapshot(optimizer, params)[0])
    assert_same(*sides)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_cycled_momentum_comes_from_the_checkpoint(schedule: str) -> None:
    """It was that of the constructor until the scheduler's next step, unlike betas."""
    optimizers = []
    for _ in range(2):
        params = parameters()
        optimizers.append(Muon(params, lr=0.01))
    scheduler = SCHEDULES[schedule](optimizers[0])
    for _ in range(2):
        optimizers[0].step()
        scheduler.step()
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    assert optimizers[1].param_groups[0]["momentum"] == optimizers[0].param_groups[0]["momentum"] != 0.95


@pytest.mark.parametrize("name", ["soap", "shampoo", "mars", "mars-soap"])
def test_cycled_betas_copy_no_state(name: str) -> None:
    """All state was copied at every step of a scheduler that cycles betas, which took longer than many a step."""
    params, optimizer = parameters_and(TABLE[name])
    train(optimizer, params, range(3))
    before = {id(param): [value.data_ptr() for value in optimizer.state[param].values()] for param in params}
    optimizer.param_groups[0]["betas"] = (0.8, 0.85)
    train(optimizer, params, range(3, 4))
    assert before == {id(param): [value.data_ptr() for value in optimizer.state[param].values()] for param in params}


# ---------------------------------------------------------------------------------------------------------------------
# Groups and overrides that change
# ---------------------------------------------------------------------------------------------------------------------


def ones(*shape: int) -> Parameter:
    param = Parameter(torch.ones(shape))
    param.grad = torch.ones(shape)
    return param


def test_a_list_in_overrides_may_change_in_place() -> None:
    """The copy to which overrides are compared held the same list, and the old betas went on."""
    moved = []
    for betas in ([0.9, 0.9], [0.5, 0.9]):
        param = ones(4)
        optimizer = SOAP([{"params": [param], "overrides": [{"betas": [0.9, 0.9]}]}], weight_decay=0)
        for step in range(3):
            if step == 2:
                optimizer.param_groups[0]["overrides"][0]["betas"][:] = betas
                param.grad = -torch.ones(4)
            optimizer.step()
        moved.append(param.detach().clone())
    assert not torch.equal(*moved)


def test_a_parameter_that_moves_to_another_group_follows_its_rates() -> None:
    """Groups were remembered by the order of the parameters alone, and the old group's learning rate went on."""
    one, other = ones(4), ones(4)
    optimizer = SOAP([{"params": [one], "lr": 0.1}, {"params": [other], "lr": 0.0}], weight_decay=0)
    for _ in range(2):
        optimizer.step()
    assert torch.equal(other, torch.ones(4))
    optimizer.param_groups[0]["params"] = [one, other]
    optimizer.param_groups[1]["params"] = []
    optimizer.step()
    assert not torch.equal(other, torch.ones(4))
    before = one.detach().clone()
    optimizer.param_groups.insert(0, {**optimizer.param_groups[0], "params": [], "lr": 0.0})
    optimizer.step()
    assert not torch.equal(one, before)


def test_settings_that_are_changed_in_place_are_seen() -> None:
    """They were compared with themselves."""
    param = ones(4, 4)
    optimizer = SOAP([{"params": [param], "overrides": [{}]}], betas=[0.9, 0.9])  # type: ignore[arg-type]
    optimizer.members()
    optimizer.param_groups[0]["overrides"][0]["rule"] = "adam"
    optimizer.step()
    assert set(optimizer.state[param]) == {"exp_avg", "exp_avg_sq", "step"}
    optimizer.param_groups[0]["betas"][0] = 0.5
    optimizer.step()
    assert optimizer._engine.bucketing.caches()[0].buckets[0].plan.rule.beta1 == 0.5  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["lr", "nonfinite", "shard_mode", "exact", "nonsense"])
def test_overrides_of_what_a_group_shares_are_refused(name: str) -> None:
    """They were accepted, and the group's value went on."""
    with pytest.raises(ValueError, match=rf"overrides of a param group got {name}, wanted"):
        MARS([{"params": [ones(4)], "overrides": [{name: 0.0}]}])


def test_a_pruned_parameter_keeps_the_overrides_of_its_place() -> None:
    optimizer = SOAP([{"params": [ones(8, 8), ones(6, 6)], "overrides": [{"rule": "adam"}, {"one_sided": True}]}])
    optimizer.step()
    group = optimizer.param_groups[0]
    group["params"] = [ones(4, 8), group["params"][1]]
    assert [member.settings["rule"] for member in optimizer.members()] == ["adam", "soap"]
    assert optimizer.members()[1].settings["one_sided"]
    group["params"], group["overrides"] = [ones(3, 8)], [{"rule": "soap"}]  # given together
    assert [member.settings["rule"] for member in optimizer.members()] == ["soap"]
    copied = copy.deepcopy(optimizer)
    copied.param_groups[0]["params"] = []
    copied.param_groups[0]["params"] = [ones(2, 2), ones(2, 2)]
    with pytest.raises(ValueError, match="overrides of param group 0 has 1 mappings, wanted one for each of its 2"):
        copied.step()


def test_a_group_that_is_refused_is_not_added() -> None:
    optimizer = SOAP([ones(4, 4)])
    for wrong in (5, [1], [{}, {}], [{"lr": 0.1}]):
        with pytest.raises((TypeError, ValueError)):
            optimizer.add_param_group({"params": [ones(3, 3)], "overrides": wrong})
        assert len(optimizer.param_groups) == 1


def test_frozen_parameters_do_not_keep_the_stack_of_the_others() -> None:
    """The state of each stayed a view of the stack that it was in, and freezing one after the other kept them all."""
    params = [ones(16, 16) for _ in range(8)]
    optimizer = SOAP(params)
    optimizer.step()

    def held() -> int:
        values = [value for state in optimizer.state.values() for value in state.values()]
        return sum({v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in values}.values())

    before = held()
    for param in params[:-1]:
        param.requires_grad_(False)
        param.grad = None
        optimizer.step()
        assert held() == before
