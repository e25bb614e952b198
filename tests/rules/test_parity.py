"""SOAP against the textbook loop of hf_soap/reference, in float64, where two correct implementations must agree.

They need not agree everywhere: a factor that is rank-deficient leaves the basis of its null space open. So each layer
has gradients of full rank in every factored mode from the first step on (square shapes, or shapes merged or cut to
square); other shapes start from one injected state of full rank.
"""

from typing import Any

import pytest
import torch
from problems import Problem, largest_difference
from torch import Tensor

from hf_soap import SOAP
from hf_soap.engine.buckets import CHUNK_BYTES
from hf_soap.reference.soap import ReferenceSOAP

STEPS = 60
TOLERANCE = 1e-10
OFFICIAL: dict[str, Any] = {"max_aspect_ratio": None, "stacked_matrices": False, "refresh_growth": 0.0}
"""What the textbook does: a factor for every side, however the tensor is shaped, and refreshes at equal distances."""

SETTINGS = {"lr": 1e-2, "weight_decay": 0.01, "betas": (0.9, 0.95)}


def inject_full_rank(optimizer: SOAP, params: list[Tensor], reference: ReferenceSOAP) -> None:
    """Gives both the same well-conditioned factors and their bases, as if many gradients had been seen."""
    generator = torch.Generator().manual_seed(3)
    for param, theirs in zip(params, reference.state, strict=True):
        for number, block in enumerate(theirs.blocks):
            for mode, factor in enumerate(block.factors):
                if factor is None:
                    continue
                root = torch.randn(factor.shape, generator=generator, dtype=torch.float64)
                block.factors[mode] = root @ root.T + torch.eye(len(factor), dtype=torch.float64)
                values, vectors = torch.linalg.eigh(block.factors[mode])
                block.bases[mode] = vectors.flip(1)
                optimizer.state[param][f"factor_{mode}"][number] = values.flip(0).diag()
                optimizer.state[param][f"basis_{mode}"][number] = vectors.flip(1)


def soap_difference(shapes: list[tuple[int, ...]], *, inject: bool = False, **options: Any) -> float:
    options = {**SETTINGS, **options}
    return largest_difference(
        shapes,
        lambda params: SOAP(params, **{**OFFICIAL, **options}),
        lambda weights: ReferenceSOAP(weights, **options),
        steps=STEPS,
        after_first=inject_full_rank if inject else None,
    )


@pytest.mark.parametrize("frequency", [1, 5, 10])
@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        pytest.param([(25,), (7,)], {}, id="vectors"),
        pytest.param([(25, 25)], {}, id="square"),
        pytest.param([(25, 25), (25, 25), (11, 11), (25,), (25, 25)], {}, id="buckets of many"),
        pytest.param([(4, 6, 4, 6)], {"max_precond_dim": 24, "merge_dims": True}, id="4-D merged"),
        pytest.param([(5, 4, 5, 4)], {}, id="4-D"),
        pytest.param([(6, 6, 6)], {}, id="3-D"),
        pytest.param([(12, 30)], {"max_precond_dim": 12}, id="right side cut"),
        pytest.param([(30, 12)], {"max_precond_dim": 12}, id="left side cut"),
        pytest.param([(25, 25), (9,)], {"normalize_grads": True}, id="normalized"),
        pytest.param([(25, 25)], {"correct_bias": False, "shampoo_beta": 0.8}, id="no bias correction"),
        pytest.param([(16, 16), (16, 16), (16, 16)], {"stagger": True}, id="staggered"),
        pytest.param([(16, 16), (16, 16)], {"refresh_growth": 0.3}, id="growing"),
        pytest.param([(16, 16)] * 3, {"refresh_growth": 0.3, "stagger": True}, id="growing, staggered"),
        pytest.param([(12, 30), (30, 12), (15, 15)], {"one_sided": True}, id="one side"),
        pytest.param([(20, 30), (30, 30)], {"block_size": 10}, id="even blocks"),
        pytest.param([(20, 40), (36, 12)], {"square_blocks": True}, id="square blocks"),
        pytest.param([(25, 25), (9,)], {"factorized": True}, id="factorized"),
        pytest.param([(12, 30), (30, 12), (15, 15)], {"one_sided": True, "factorized": True}, id="both"),
        pytest.param([(25, 25), (25, 25), (9,)], {"kl": True}, id="KL"),
        pytest.param([(6, 6, 6)], {"kl": True}, id="KL, 3-D"),
        pytest.param([(12, 30)], {"kl": True, "max_precond_dim": 12}, id="KL, right side cut"),
        pytest.param([(25, 25), (16, 16), (16, 16)], {"include_current": True}, id="current gradient included"),
        pytest.param([(25, 25), (16, 16), (16, 16)], {"refresh_tol": 0.35}, id="adaptive refresh"),
        pytest.param([(20, 30), (30, 30)], {"block_size": 10, "normalize_grads": True}, id="normalized blocks"),
        pytest.param([(25, 25), (6, 6, 6)], {"rotate_second_moment": True}, id="rotated V"),
        pytest.param([(25, 25)], {"rotate_second_moment": True, "factorized": True}, id="rotated factorized V"),
        pytest.param(
            [(12, 30), (15, 15)], {"rotate_second_moment": True, "one_sided": True}, id="rotated V, one side"
        ),
    ],
)
def test_soap_equals_the_textbook(shapes: list[tuple[int, ...]], options: dict[str, object], frequency: int) -> None:
    assert soap_difference(shapes, precondition_frequency=frequency, **options) < TOLERANCE


@pytest.mark.parametrize("frequency", [1, 5, 10])
@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        pytest.param([(25,), (7,)], {"precondition_1d": True, "shampoo_beta": 0.99}, id="factored vectors"),
        pytest.param([(16, 12), (12, 16), (16, 12)], {}, id="rectangles"),
        pytest.param([(13, 24), (24, 7)], {"block_size": 8}, id="padded blocks"),
        pytest.param([(13, 24), (24, 7)], {"block_size": 8, "normalize_grads": True}, id="normalized padded blocks"),
        pytest.param([(16, 12), (12, 16)], {"factorized": True, "include_current": True}, id="factorized rectangles"),
        pytest.param([(16, 12), (12, 16)], {"kl": True, "normalize_grads": True}, id="KL rectangles"),
        pytest.param([(7, 24), (9, 4)], {"square_blocks": True, "factorized": True}, id="padded square blocks"),
        pytest.param([(6, 3, 5, 5)], {}, id="convolution"),
        pytest.param([(6, 3, 5, 5)], {"merge_dims": True, "max_precond_dim": 20}, id="merged convolution"),
        pytest.param([(1, 9), (9, 1), (5, 1, 4)], {}, id="sides of one entry"),
    ],
)
def test_soap_equals_the_textbook_from_a_full_rank_state(
    shapes: list[tuple[int, ...]], options: dict[str, object], frequency: int
) -> None:
    assert soap_difference(shapes, inject=True, precondition_frequency=frequency, **options) < TOLERANCE


@pytest.mark.parametrize("frequency", [1, 5])
def test_kl_starts_a_block_at_its_own_first_gradient_and_follows_a_sudden_growth(frequency: int) -> None:
    """The first quarter of the matrix has no gradient in two steps; all gradients grow a thousandfold at step 20."""
    options: dict[str, Any] = {**SETTINGS, "kl": True, "block_size": 10, "precondition_frequency": frequency}
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.randn(20, 20, generator=generator, dtype=torch.float64))
    reference = ReferenceSOAP([param.detach()], **options)
    optimizer = SOAP([param], **{**OFFICIAL, **options})
    for step in range(STEPS):
        grad = torch.randn(20, 20, generator=generator, dtype=torch.float64) * (1e3 if step >= 20 else 1)
        if step < 2:
            grad[:10, :10] = 0
        param.grad = grad
        optimizer.step()
        reference.step([grad])
    assert (param - reference.weights[0]).abs().max() < TOLERANCE


@pytest.mark.parametrize("first", [0.0, 1e-4, 1.0])
def test_kl_finds_the_eigenbasis_whatever_the_size_of_the_first_gradient(first: float) -> None:
    """Of four experts, one has such a first gradient; its basis was off by .5 for hundreds of steps."""
    generator = torch.Generator().manual_seed(0)
    size = 16
    roots = [
        torch.linalg.qr(torch.randn(size, size, generator=generator))[0] @ torch.logspace(0, -1.5, size).diag()
        for _ in range(2)
    ]
    param = torch.nn.Parameter(torch.randn(4, size, size, generator=generator))
    optimizer = SOAP([param], lr=1e-3, betas=(0.9, 0.9), kl=True)
    for step in range(100):
        grad = roots[0] @ torch.randn(4, size, size, generator=generator) @ roots[1].T
        grad[3] *= first if step == 0 else 1
        param.grad = grad
        optimizer.step()
    covariance = roots[0] @ roots[0].T
    rotated = optimizer.state[param]["basis_0"].mT @ covariance @ optimizer.state[param]["basis_0"]
    off_diagonal = (rotated - torch.diag_embed(rotated.diagonal(dim1=-2, dim2=-1))).flatten(1).norm(dim=1)
    assert (off_diagonal < 0.2 * covariance.norm()).all()


def test_one_bucket_and_many_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(params: list[torch.nn.Parameter]) -> list[Tensor]:
        optimizer = SOAP(params, precondition_frequency=3, **SETTINGS)
        problem = Problem(*[tuple(p.shape) for p in params])
        for _ in range(20):
            for param, grad in zip(params, problem.gradients([p.detach() for p in params]), strict=True):
                param.grad = grad
            optimizer.step()
        return [p.detach() for p in params]

    def fresh() -> list[torch.nn.Parameter]:
        return [torch.nn.Parameter(w) for w in Problem((9, 9), (9, 9), (5, 7), (9, 9), (4,)).weights]

    stacked = train(fresh())
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 1)
    for chunked, whole in zip(train(fresh()), stacked, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-12)
