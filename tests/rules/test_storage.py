"""State in fewer bytes: packing is exact, rounding keeps the mean and depends on step, place and role alone."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_soap import MARS, SOAP, Shampoo
from hf_soap.linalg import matrices
from hf_soap.rules.base import StateSpec
from hf_soap.rules.layout import Layout
from hf_soap.rules.soap import SoapRule
from hf_soap.rules.storage import Storage, decoded, step_keys

SHAPES = [(24, 36), (36, 24), (40,), (30, 30), (6, 5, 4)]


SPECS = {
    **SoapRule(beta1=0.9, beta2=0.9, shampoo_beta=0.9, eps=1e-8, precondition_frequency=1, factorized=True).state_spec(
        Layout((9, 7), (1, 1), (9, 7), (0,))
    ),
    "exp_avg_sq": StateSpec("moment", (9, 7)),
}


def state_of(blocks: int = 4) -> dict[str, Tensor]:
    """State as SOAP has it, of one size and another."""
    torch.manual_seed(0)
    root = torch.randn(blocks, 9, 9)
    return {
        "exp_avg": torch.randn(blocks, 9, 7) * 1e-3,
        "exp_avg_sq": torch.randn(blocks, 9, 7).square() * 1e-6,
        "factor_0": matrices.symmetrize(root @ root.mT),
        "basis_0": torch.linalg.qr(root).Q,
        "exp_avg_sq_row": torch.rand(blocks, 9),
    }


def kept(storage: Storage, state: dict[str, Tensor], keys: list[int] | None = None) -> dict[str, Tensor]:
    """The state in the form in which it is kept."""
    blocks = len(next(iter(state.values())))
    specs = {role: replace(SPECS[role], shape=tuple(value.shape[1:])) for role, value in state.items()}
    stored = storage.allocate(specs, blocks, dtype=torch.float32, device=torch.device("cpu"))
    storage.encode_(stored, {role: value.clone() for role, value in state.items()}, specs, keys)
    return stored


@pytest.mark.parametrize("n", [1, 2, 3, 8, 13])
def test_packing_is_exact(n: int) -> None:
    matrix = matrices.symmetrize(torch.randn(3, n, n))
    folded = matrices.pack(matrix)
    assert folded.shape == (3, n // 2 + 1, n)
    assert torch.equal(matrices.unpack(folded), matrix)


def test_packed_state_comes_back_bit_for_bit() -> None:
    state = state_of()
    stored = kept(Storage(packed=True), state)
    assert stored["factor_0"].shape == (4, 5, 9)
    for role, value in decoded(stored, SPECS, torch.float32).items():
        assert torch.equal(value, state[role]), role


def test_rounding_errs_by_less_than_the_spacing() -> None:
    storage, state = Storage("bfloat16", packed=True), state_of()
    for keys in (None, [1, 2, 3, 4]):
        stored = kept(storage, state, keys)
        for role, value in storage.decode(stored, SPECS, torch.float32).items():
            assert ((value - state[role]).abs() <= 2**-7 * state[role].abs()).all(), role
    assert stored["exp_avg"].dtype == torch.bfloat16
    assert stored["exp_avg_sq_row"].dtype == torch.float32


def test_the_mean_of_many_roundings_is_the_number() -> None:
    storage, state = Storage("bfloat16"), {"exp_avg": torch.full((1, 4000), 1.0 + 1 / 512)}
    total, draws = torch.zeros(1, 4000, dtype=torch.float64), 200
    for step in range(draws):
        total += storage.decode(kept(storage, state, step_keys([step], [7])), SPECS, torch.float32)["exp_avg"]
    error = total / draws - state["exp_avg"].double()
    spread = 2**-7 / 2  # of one draw, at most
    assert abs(error.mean()) < 6 * spread / (4000 * draws) ** 0.5 + 2e-7
    assert error.abs().max() < 6 * spread / draws**0.5


def test_rounding_depends_on_step_place_and_role_alone() -> None:
    """A tensor rounds alike whatever it is stacked with, so that ranks and resumed runs do."""
    storage, state = Storage("bfloat16", packed=True), state_of(4)
    together = kept(storage, state, step_keys([3, 3, 5, 5], [0, 1, 2, 3]))
    alone = kept(storage, {role: value[2:3] for role, value in state.items()}, step_keys([5], [2]))
    later = kept(storage, {role: value[2:3] for role, value in state.items()}, step_keys([6], [2]))
    for role, value in alone.items():
        assert torch.equal(together[role][2:3], value), role
    assert not torch.equal(alone["exp_avg"], later["exp_avg"])


MAKERS = {
    "soap": lambda params, **kw: SOAP(params, precondition_frequency=2, **kw),
    "soap, one side, factorized": lambda params, **kw: SOAP(
        params, precondition_frequency=2, one_sided=True, factorized=True, **kw
    ),
    "shampoo": lambda params, **kw: Shampoo(params, precondition_frequency=2, momentum=0.5, **kw),
    "mars": MARS,
    "mars_soap": lambda params, **kw: MARS(params, variant="soap", precondition_frequency=2, **kw),
}


def train(optimizer: torch.optim.Optimizer, params: list[Tensor], first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = (torch.randn(param.shape, generator=generator) + param.detach()).to(param.dtype)
        optimizer.step()


def fresh(dtype: torch.dtype = torch.float32) -> list[Any]:
    generator = torch.Generator().manual_seed(99)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MAKERS)
def test_resume_is_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    make, options = MAKERS[name], {"lr": 0.01, "state_dtype": "bfloat16", "pack_factors": True}
    if name == "mars":
        del options["pack_factors"]  # it has none
    params = fresh(dtype)
    optimizer = make(params, **options)
    train(optimizer, params, 0, 5)
    saved, weights = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params]
    train(optimizer, params, 5, 9)
    others = [torch.nn.Parameter(weight) for weight in weights]
    again = make(others, **options)
    again.load_state_dict(saved)
    train(again, others, 5, 9)
    assert all(torch.equal(one, other) for one, other in zip(params, others, strict=True))


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "mars"])
def test_packing_changes_rounding_alone(name: str) -> None:
    """A product of a matrix with its own transpose need not be symmetric in its last bit. Square: see test_parity."""
    runs = []
    for packed in (False, True):
        generator = torch.Generator().manual_seed(99)
        params = [torch.nn.Parameter(torch.randn(n, n, generator=generator).double()) for n in (16, 25)]
        train(MAKERS[name](params, lr=0.01, pack_factors=packed), params, 0, 8)
        runs.append(params)
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", MAKERS)
def test_rounded_state_follows_the_exact_one(name: str) -> None:
    """Not closely, entry by entry: but weights go where they go with exact state."""
    start, runs = [p.detach().clone() for p in fresh()], []
    for kind in ("float32", "bfloat16"):
        params = fresh()
        optimizer = MAKERS[name](params, lr=0.01, state_dtype=kind)
        train(optimizer, params, 0, 20)
        runs.append(torch.cat([(p.detach() - s).flatten() for p, s in zip(params, start, strict=True)]))
    assert torch.cosine_similarity(*runs, dim=0) > 0.97


FORMS: list[dict[str, Any]] = [
    {"state_dtype": dtype, "pack_factors": packed} for dtype in ("float32", "bfloat16") for packed in (False, True)
]


@pytest.mark.parametrize("after", FORMS)
@pytest.mark.parametrize("before", FORMS)
def test_state_of_one_form_loads_into_another(before: dict[str, Any], after: dict[str, Any]) -> None:
    params = fresh()
    optimizer = SOAP(params, lr=0.01, **before)
    train(optimizer, params, 0, 4)
    other = SOAP(params, lr=0.01, **after)
    other.load_state_dict(optimizer.state_dict())
    train(other, params, 4, 5)
    basis = decoded({"basis": other.state[params[0]]["basis_0"]}, {}, torch.float32)["basis"][0]
    assert (basis.T @ basis - torch.eye(24)).abs().max() < 0.02
    assert other.state[params[0]]["step"] == 5


def test_rounded_bases_stay_orthonormal() -> None:
    params = fresh()
    optimizer = SOAP(params, lr=0.01, precondition_frequency=1, state_dtype="bfloat16")
    train(optimizer, params, 0, 150)
    for param in params:
        for role, value in optimizer.state[param].items():
            if role.startswith("basis"):
                basis = value.float()
                assert (basis.mT @ basis - torch.eye(basis.shape[-1])).abs().max() < 0.02


def test_state_in_8_bits_is_gone() -> None:
    """It saved 2 of 15.5 bytes a parameter. Read as numbers, its bytes would be moments of up to 255."""
    params = fresh()
    with pytest.raises(ValueError, match="must be float32 or bfloat16, got 'float8'; did you mean bfloat16"):
        SOAP(params, state_dtype="float8")  # type: ignore[arg-type]
    optimizer = SOAP(params, state_dtype="bfloat16")
    train(optimizer, params, 0, 1)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["state_dtype"] = "float8"
    with pytest.raises(ValueError, match=r"saved with state_dtype='float8', .* wanted float32 or bfloat16"):
        optimizer.load_state_dict(saved)


def test_bytes_of_a_gpt() -> None:
    """The targets on 6 layers of width 256: 16 bytes a parameter with rounded and packed state, below AdamW's 8."""
    shapes = 6 * [(256, 768), (256, 256), (256, 1024), (1024, 256)]
    params = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    numel = sum(p.numel() for p in params)

    def num_bytes(**options: Any) -> float:
        return SOAP(params, **options).state_bytes() / numel

    assert num_bytes() == pytest.approx(38.7, abs=0.1)
    assert num_bytes(pack_factors=True) == pytest.approx(31.1, abs=0.2)
    assert num_bytes(state_dtype="bfloat16", pack_factors=True) <= 16
    assert num_bytes(one_sided=True, factorized=True) < 8
