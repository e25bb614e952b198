"""The reference loops are themselves held to what can be known without them: analytic cases, identities, torch."""

import math

import pytest
import torch
from reference import ReferenceSOAP, block_grid, gram, merged_shape, rotate, rotate_back
from reference_family import (
    MarsCorrection,
    ReferenceAdamW,
    ReferenceKLShampoo,
    ReferenceLion,
    ReferenceMARS,
    ReferenceMarsInFront,
    ReferenceShampoo,
    idealized_adafactor_in_eigenbasis,
    idealized_shampoo,
    inverse_root,
    newton_schulz_5,
)
from torch import Tensor


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(shape: tuple[int, ...], steps: int) -> list[Tensor]:
    return [normal(*shape, seed=100 + step) for step in range(steps)]


def run(optimizer, grads: list[Tensor]) -> Tensor:
    """Step a single-parameter optimizer through `grads`; return the weights reached."""
    for grad in grads:
        optimizer.step([grad])
    return optimizer.weights[0]


def run_torch_adamw(weight: Tensor, grads: list[Tensor], **options: object) -> Tensor:
    param = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.AdamW([param], **options)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    return param.detach()


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# --- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "limit", "expected"),
    [
        ((64, 3, 7, 7), 10000, (9408,)),
        ((128, 64, 3, 3), 10000, (8192, 9)),
        ((20, 3, 4), 12, (20, 12)),  # the running product is 1: the long dimension is emitted itself
        ((4, 2, 4, 2), 8, (8, 8)),
        ((2, 3, 4, 5), 6, (6, 4, 5)),
        ((1, 1, 1), 10, (1,)),
        ((8, 1024), 10000, (8, 1024)),  # two dimensions never merge
        ((5,), 10000, (5,)),
    ],
)
def test_dimensions_merge_greedily_from_the_left(shape, limit, expected):
    assert merged_shape(shape, limit) == expected


@pytest.mark.parametrize(
    ("shape", "block_size", "block_shape", "pieces"),
    [((7,), 3, (3,), 3), ((10,), 4, (4,), 3), ((9,), 8, (5,), 2), ((4, 10), 5, (4, 5), 2), ((6, 6), None, (6, 6), 1)],
)
def test_blocks_cover_the_tensor_once(shape, block_size, block_shape, pieces):
    size, slices = block_grid(shape, block_size)
    assert size == block_shape
    assert len(slices) == pieces
    count = torch.zeros(shape)
    for cut in slices:
        count[cut] += 1
    assert (count == 1).all()


# --- SOAP ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 5), (7,)])
def test_soap_with_identity_bases_is_adamw_one_gradient_later(shape):
    grads = gradients(shape, 12)
    soap = ReferenceSOAP([normal(*shape)], lr=0.01, betas=(0.9, 0.95), eps=0.0, weight_decay=0.0, max_precond_dim=1)
    expected = run_torch_adamw(normal(*shape), grads[1:], lr=0.01, betas=(0.9, 0.95), eps=0.0, weight_decay=0.0)
    assert_close(run(soap, grads), expected)


def test_soap_turns_with_its_problem():
    """Rotating weights and gradients on both sides turns the whole trajectory: bases, V and carried M fit together."""
    u, _ = torch.linalg.qr(normal(8, 8, seed=1))
    v, _ = torch.linalg.qr(normal(8, 8, seed=2))
    grads = gradients((8, 8), 25)
    options = {"lr": 0.02, "precondition_frequency": 3}
    plain = run(ReferenceSOAP([normal(8, 8)], **options), grads)
    turned = run(ReferenceSOAP([u @ normal(8, 8) @ v.T], **options), [u @ grad @ v.T for grad in grads])
    assert_close(turned, u @ plain @ v.T)


def test_soap_seeds_first_and_then_counts_updates():
    soap = ReferenceSOAP([normal(4, 4)], weight_decay=0.1)
    state = soap.state[0]
    soap.step([torch.zeros(4, 4)])
    assert not state.seeded
    soap.step([None])
    soap.step([normal(4, 4, seed=1)])
    assert state.seeded
    assert state.t == 0
    assert torch.equal(soap.weights[0], normal(4, 4))
    assert not state.blocks[0].exp_avg.any()
    assert_close(state.blocks[0].factors[0], 0.05 * gram(normal(4, 4, seed=1), 0))
    basis = state.blocks[0].bases[0]
    assert ((basis.T @ state.blocks[0].factors[0] @ basis).diag().diff() < 0).all()
    soap.step([torch.zeros(4, 4)])
    assert state.t == 1
    soap.step([normal(4, 4, seed=2)])
    assert state.t == 2


def test_soap_factors_are_averages_and_bases_are_orthonormal_and_settle_on_the_eigenvectors():
    scale = torch.diag(torch.tensor([1.0, 5.0, 2.0, 9.0, 0.3], dtype=torch.float64))
    turn, _ = torch.linalg.qr(normal(5, 5, seed=3))
    grads = [turn @ scale @ grad for grad in gradients((5, 5), 60)]
    soap = ReferenceSOAP([normal(5, 5)], shampoo_beta=0.99, precondition_frequency=1)
    run(soap, grads)
    block = soap.state[0].blocks[0]
    expected = sum((0.01 * 0.99 ** (len(grads) - 1 - age)) * gram(grad, 0) for age, grad in enumerate(grads))
    assert_close(block.factors[0], expected)
    basis = block.bases[0]
    assert_close(basis.T @ basis, torch.eye(5, dtype=torch.float64), 1e-12)
    in_basis = basis.T @ block.factors[0] @ basis
    assert (in_basis.diag().diff() < 0).all()
    assert (in_basis - torch.diag(in_basis.diag())).norm() < 0.02 * in_basis.norm()


def test_soap_update_and_decay_by_hand():
    """Diagonal first gradient: the bases are signed identities, so the first update is known. Decay comes after it."""
    soap = ReferenceSOAP([normal(2, 2)], lr=0.1, betas=(0.9, 0.8), eps=0.5, weight_decay=0.2)
    soap.step([torch.diag(torch.tensor([2.0, 1.0]))])
    grad = normal(2, 2, seed=1)
    soap.step([grad])
    adam = 0.1 * grad / ((0.2 * grad**2).sqrt() + 0.5)
    updated = normal(2, 2) - 0.1 * math.sqrt(0.2) / 0.1 * adam
    assert_close(soap.weights[0], updated - 0.1 * 0.2 * updated)


def test_soap_refresh_moves_v_with_the_columns_it_belongs_to():
    """Bases that are exact but out of order only get reordered: in the original space neither V nor M may change."""
    soap = ReferenceSOAP([normal(4, 4)])
    soap.step([normal(4, 4, seed=1)])
    soap.step([normal(4, 4, seed=2)])
    block = soap.state[0].blocks[0]
    scrambled = [torch.tensor([2, 0, 3, 1]), torch.tensor([1, 3, 0, 2])]
    for mode, order in enumerate(scrambled):
        vectors = torch.linalg.eigh(block.factors[mode]).eigenvectors
        block.bases[mode] = vectors[:, order]
    direction = block.exp_avg / (block.exp_avg_sq.sqrt() + 1e-8)
    before = rotate_back(direction, block.bases), rotate_back(block.exp_avg, block.bases), block.exp_avg_sq.clone()
    soap._refresh(block)
    direction = block.exp_avg / (block.exp_avg_sq.sqrt() + 1e-8)
    assert_close(rotate_back(direction, block.bases), before[0], 1e-8)
    assert_close(rotate_back(block.exp_avg, block.bases), before[1])
    assert not torch.equal(block.exp_avg_sq, before[2])


def test_soap_staggers_refreshes():
    weights = [normal(3, 3, seed=seed) for seed in range(3)]
    soap = ReferenceSOAP(weights, precondition_frequency=4, stagger=True)
    soap.step(weights)
    refreshed = []
    for step in range(1, 9):
        bases = [state.blocks[0].bases[0].clone() for state in soap.state]
        soap.step([normal(3, 3, seed=10 * step + index) for index in range(3)])
        moved = [
            not torch.equal(state.blocks[0].bases[0], basis) for state, basis in zip(soap.state, bases, strict=True)
        ]
        refreshed.append([index for index, flag in enumerate(moved) if flag])
    assert refreshed == [[], [2], [1], [0], [], [2], [1], [0]]


def test_soap_normalizes_the_update_of_the_whole_tensor():
    soap = ReferenceSOAP(
        [normal(6, 6)], lr=0.1, weight_decay=0.0, correct_bias=False, normalize_grads=True, block_size=3
    )
    soap.step([normal(6, 6, seed=1)])
    soap.step([normal(6, 6, seed=2)])
    assert (soap.weights[0] - normal(6, 6)).square().mean().sqrt().item() == pytest.approx(0.1, rel=1e-12)


def test_soap_one_sided_factors_the_shorter_side_only():
    grads = gradients((4, 9), 10)
    one_sided = ReferenceSOAP([normal(4, 9)], one_sided=True, precondition_frequency=2)
    short_only = ReferenceSOAP([normal(4, 9)], max_precond_dim=4, precondition_frequency=2)
    assert_close(run(one_sided, grads), run(short_only, grads), 1e-14)
    square = ReferenceSOAP([normal(4, 4)], one_sided=True)
    square.step([normal(4, 4, seed=1)])
    assert [factor is not None for factor in square.state[0].blocks[0].factors] == [True, False]


@pytest.mark.parametrize("one_sided", [False, True])
def test_soap_factorized_keeps_the_row_and_column_means_of_v(one_sided):
    """Row and column means of the product equal those of the full V, whatever happened to it on the way."""
    grads = gradients((5, 5), 9)
    options = {"one_sided": one_sided, "precondition_frequency": 4}
    full = ReferenceSOAP([normal(5, 5)], **options)
    factorized = ReferenceSOAP([normal(5, 5)], factorized=True, **options)
    run(full, grads)
    run(factorized, grads)
    second_moment = full.state[0].blocks[0].exp_avg_sq
    block = factorized.state[0].blocks[0]
    assert block.exp_avg_sq is None
    assert_close(block.row, second_moment.mean(dim=1))
    assert_close(block.col, second_moment.mean(dim=0))
    assert not torch.equal(full.weights[0], factorized.weights[0])


def test_soap_blocks_are_matrices_of_their_own():
    """A 5 x 5 weight in blocks of 3 is cut into 3 + 2; its square blocks move as if they stood alone."""
    grads = gradients((5, 5), 12)
    options = {"lr": 0.01, "precondition_frequency": 2}
    cut = ReferenceSOAP([normal(5, 5)], block_size=3, **options)
    whole = run(cut, grads)
    for part in (slice(0, 3), slice(3, 5)):
        alone = ReferenceSOAP([normal(5, 5)[part, part]], **options)
        assert_close(whole[part, part], run(alone, [grad[part, part] for grad in grads]))
    assert len(cut.state[0].blocks) == 4


def test_soap_preconditions_every_mode_of_a_tensor():
    soap = ReferenceSOAP([normal(3, 1, 4)], precondition_frequency=1)
    run(soap, gradients((3, 1, 4), 6))
    factors = soap.state[0].blocks[0].factors
    assert [None if factor is None else tuple(factor.shape) for factor in factors] == [(3, 3), None, (4, 4)]
    merged = ReferenceSOAP([normal(2, 3, 4)], merge_dims=True, max_precond_dim=6)
    assert merged.state[0].shape == (6, 4)
    vector = ReferenceSOAP([normal(4)], precondition_1d=True)
    vector.step([normal(4, seed=1)])
    assert_close(vector.state[0].blocks[0].factors[0], 0.05 * torch.outer(normal(4, seed=1), normal(4, seed=1)))


def test_soap_kl_factors_by_hand():
    """Right after seeding the bases are exact, so the whitening is by the true inverses of the plain factors."""
    first, second = normal(4, 4, seed=1), normal(4, 4, seed=2)
    soap = ReferenceSOAP([normal(4, 4)], shampoo_beta=0.9, kl=True, eps_kl=1e-12)
    soap.step([first])
    soap.step([second])
    left, right = 0.1 * first @ first.T, 0.1 * first.T @ first
    block = soap.state[0].blocks[0]
    kl_left = 0.9 * left + 0.1 * second @ torch.linalg.inv(right) @ second.T / 4
    kl_right = 0.9 * right + 0.1 * second.T @ torch.linalg.inv(left) @ second / 4
    torch.testing.assert_close(block.factors[0], kl_left, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(block.factors[1], kl_right, rtol=1e-7, atol=1e-7)


def test_soap_kl_clamps_small_eigenvalues():
    soap = ReferenceSOAP([normal(2, 2)], shampoo_beta=0.5, kl=True, eps_kl=0.25)
    soap.step([torch.diag(torch.tensor([2.0, 0.0]))])
    soap.step([torch.eye(2)])
    # the plain factors are diag(2, 0), and 0 is raised to a quarter of 2
    assert_close(soap.state[0].blocks[0].factors[0], torch.diag(torch.tensor([1 + 0.125, 0.5], dtype=torch.float64)))


def test_soap_include_current_uses_the_basis_that_the_gradient_shaped():
    first, second = normal(4, 4, seed=1), normal(4, 4, seed=2)
    late = ReferenceSOAP([normal(4, 4)], precondition_frequency=1)
    early = ReferenceSOAP([normal(4, 4)], precondition_frequency=1, include_current=True)
    for soap in (late, early):
        soap.step([first])
    assert torch.equal(early.weights[0], normal(4, 4))
    old_bases = list(late.state[0].blocks[0].bases)
    for soap in (late, early):
        soap.step([second])
    bases = early.state[0].blocks[0].bases
    for ours, theirs in zip(bases, late.state[0].blocks[0].bases, strict=True):
        assert_close(ours, theirs, 1e-14)
    assert_close(early.state[0].blocks[0].exp_avg_sq, 0.05 * rotate(second, bases) ** 2, 1e-14)
    order_free = (0.05 * rotate(second, old_bases) ** 2).flatten().sort().values
    assert_close(late.state[0].blocks[0].exp_avg_sq.flatten().sort().values, order_free, 1e-14)


def test_soap_skips_a_refresh_within_tolerance():
    grads = gradients((4, 4), 6)
    always = run(ReferenceSOAP([normal(4, 4)], precondition_frequency=1), grads)
    strict = run(ReferenceSOAP([normal(4, 4)], precondition_frequency=1, refresh_tol=1e-9), grads)
    assert torch.equal(always, strict)
    lax = ReferenceSOAP([normal(4, 4)], precondition_frequency=1, refresh_tol=1.0)
    never = ReferenceSOAP([normal(4, 4)], precondition_frequency=1000)
    assert_close(run(lax, grads), run(never, grads), 1e-14)


# --- Shampoo ---------------------------------------------------------------------------------------------------------


def test_inverse_root_of_a_known_matrix():
    matrix = torch.tensor([[1195, -944, -224], [-944, 746, 177], [-224, 177, 42]], dtype=torch.float64)
    root = torch.tensor([[1, 1, 1], [1, 2, -3], [1, -3, 18]], dtype=torch.float64)
    assert_close(inverse_root(matrix, 2), root, 1e-6)


@pytest.mark.parametrize("p", [2, 2.5, 4, 6])
def test_inverse_root_inverts_the_ridged_matrix(p):
    matrix = gram(normal(5, 7), 0)
    ridged = matrix + 0.01 * torch.linalg.eigvalsh(matrix).max() * torch.eye(5, dtype=torch.float64)
    root = inverse_root(matrix, p, 0.01)
    values, vectors = torch.linalg.eigh(root)
    assert_close(vectors @ torch.diag(values ** (-p)) @ vectors.T, ridged, 1e-9)


def test_shampoo_after_the_same_orthogonal_gradient_twice():
    grad = torch.eye(3, dtype=torch.float64) / math.sqrt(2)
    shampoo = ReferenceShampoo([torch.zeros(3, 3)], lr=1.0, eps=0.0)
    shampoo.step([grad])
    assert_close(shampoo.weights[0], -torch.eye(3, dtype=torch.float64), 1e-12)
    shampoo.step([grad])
    assert_close(shampoo.weights[0], -(1 + 1 / math.sqrt(2)) * torch.eye(3, dtype=torch.float64), 1e-12)


@pytest.mark.parametrize(("shape", "size"), [((4, 4), None), ((3, 3, 3), None), ((4, 4), 0)])
def test_shampoo_forgets_the_scale_of_its_gradients(shape, size):
    """Exponents of all modes sum to -1/2 for every order, so scaling the gradients changes nothing."""
    options = {"lr": 0.1, "eps": 1e-6, "beta": 0.9, "max_precond_dim": 10000 if size is None else size}
    grads = gradients(shape, 5)
    plain = run(ReferenceShampoo([normal(*shape)], **options), grads)
    scaled = run(ReferenceShampoo([normal(*shape)], **options), [1000 * grad for grad in grads])
    assert_close(plain, scaled, 1e-8)


def test_shampoo_of_a_vector_is_adagrad_or_full_matrix_adagrad():
    grads = gradients((5,), 8)
    diagonal = run(ReferenceShampoo([normal(5)], lr=0.1, eps=0.0), grads)
    param = torch.nn.Parameter(normal(5))
    adagrad = torch.optim.Adagrad([param], lr=0.1, eps=0.0)
    for grad in grads:
        param.grad = grad.clone()
        adagrad.step()
    assert_close(diagonal, param.detach())
    full = ReferenceShampoo([torch.zeros(5)], lr=1.0, eps=1e-3, precondition_1d=True)
    full.step([grads[0]])
    assert_close(full.weights[0], -inverse_root(torch.outer(grads[0], grads[0]), 2, 1e-3) @ grads[0])


def test_shampoo_keeps_the_diagonal_of_a_long_side():
    grad = normal(3, 6, seed=1)
    shampoo = ReferenceShampoo([torch.zeros(3, 6)], lr=1.0, eps=0.0, max_precond_dim=3)
    shampoo.step([grad])
    expected = inverse_root(grad @ grad.T, 4) @ grad @ torch.diag((grad.T @ grad).diag() ** -0.25)
    assert_close(shampoo.weights[0], -expected)


def test_shampoo_with_averaged_statistics_and_an_exponent_of_its_own():
    first, second = normal(4, 4, seed=1), normal(4, 4, seed=2)
    shampoo = ReferenceShampoo([torch.zeros(4, 4)], lr=1.0, beta=0.9, exponent=-1 / 2.5, eps=1e-8)
    shampoo.step([first])
    before = shampoo.weights[0]
    shampoo.step([second])
    left = 0.09 * first @ first.T + 0.1 * second @ second.T
    right = 0.09 * first.T @ first + 0.1 * second.T @ second
    assert_close(before - shampoo.weights[0], inverse_root(left, 2.5, 1e-8) @ second @ inverse_root(right, 2.5, 1e-8))


def test_shampoo_keeps_roots_until_they_are_due():
    shampoo = ReferenceShampoo([normal(3, 3)], precondition_frequency=4)
    renewed = []
    for step, grad in enumerate(gradients((3, 3), 9), start=1):
        roots = shampoo.state[0].blocks[0].roots
        shampoo.step([grad])
        if roots is not shampoo.state[0].blocks[0].roots:
            renewed.append(step)
    assert renewed == [1, 4, 8]


@pytest.mark.parametrize("graft", ["sgd", "adagrad", "rmsprop", "adam"])
def test_shampoo_takes_its_direction_from_shampoo_and_its_length_from_the_grafted_rule(graft):
    grads = gradients((4, 4), 5)
    options = {"lr": 1.0, "graft": graft, "graft_eps": 0.0}
    grafted = ReferenceShampoo([torch.zeros(4, 4)], block_size=2, **options)
    alone = ReferenceShampoo([torch.zeros(4, 4)], start_step=100, **options)
    plain = ReferenceShampoo([torch.zeros(4, 4)], lr=1.0, block_size=2)
    for grad in grads:
        before = [optimizer.weights[0] for optimizer in (grafted, alone, plain)]
        for optimizer in (grafted, alone, plain):
            optimizer.step([grad])
        steps = [o.weights[0] - old for o, old in zip((grafted, alone, plain), before, strict=True)]
        assert_close(steps[0].norm(), steps[1].norm())
        assert_close(steps[0] / steps[0].norm(), steps[2] / steps[2].norm())


def test_shampoo_before_its_start_step_is_the_grafted_rule():
    grads = gradients((4, 4), 6)
    options = {"lr": 0.1, "graft": "adam", "beta1": 0.9, "graft_beta2": 0.99, "weight_decay": 0.1}
    shampoo = ReferenceShampoo([normal(4, 4)], start_step=6, **options)
    adam = run_torch_adamw(normal(4, 4), grads[:5], lr=0.1, betas=(0.9, 0.99), weight_decay=0.1)
    assert_close(run(shampoo, grads[:5]), adam)
    assert shampoo.state[0].blocks[0].roots is None
    shampoo.step([grads[5]])
    assert shampoo.state[0].blocks[0].roots is not None


def test_shampoo_momentum_is_a_heavy_ball():
    grads = gradients((3, 3), 2)
    plain = ReferenceShampoo([torch.zeros(3, 3)], lr=1.0)
    heavy = ReferenceShampoo([torch.zeros(3, 3)], lr=1.0, momentum=0.5)
    first = run(plain, grads[:1])
    second = run(plain, grads[1:]) - first
    assert_close(run(heavy, grads), first + (second + 0.5 * first))


def test_shampoo_of_no_gradient_at_all_stays_finite():
    shampoo = ReferenceShampoo([normal(3, 3)], eps=0.0)
    shampoo.step([torch.zeros(3, 3)])
    assert torch.equal(shampoo.weights[0], normal(3, 3))
    assert shampoo.state[0].t == 0


def test_kl_shampoo_follows_its_equations():
    first, second = normal(4, 4, seed=1), normal(4, 4, seed=2)
    shampoo = ReferenceKLShampoo([torch.zeros(4, 4)], lr=1.0, beta=0.9, eps_kl=1e-12)
    shampoo.step([first])
    assert not shampoo.weights[0].any()
    shampoo.step([second])
    scale = first.square().mean().sqrt()
    eye = torch.eye(4, dtype=torch.float64)
    kl_left = 0.9 * scale * eye + 0.1 * second @ second.T / scale / 4
    kl_right = 0.9 * scale * eye + 0.1 * second.T @ second / scale / 4
    assert_close(shampoo.weights[0], -inverse_root(kl_left, 2) @ second @ inverse_root(kl_right, 2), 1e-7)


def test_kl_shampoo_whitens_a_kronecker_covariance():
    """For G = A Z B, L (x) R settles near the covariance, so that the directions have unit entries on average.

    Its smallest entry is 1e-4 of its mean: what the start has put there must have decayed below that, 0.99^1000.
    """
    a, b = torch.diag(torch.tensor([1.0, 10.0, 0.1])).double(), torch.diag(torch.tensor([3.0, 0.2, 1.0])).double()
    shampoo = ReferenceKLShampoo([torch.zeros(3, 3)], lr=1.0, beta=0.99)
    squares = []
    for step, z in enumerate(gradients((3, 3), 2500)):
        before = shampoo.weights[0]
        shampoo.step([a @ z @ b])
        if step >= 1000:
            squares.append((shampoo.weights[0] - before) ** 2)
    assert (torch.stack(squares).mean(dim=0) - 1).abs().max() < 0.2


def test_shampoo_with_power_one_half_is_adafactor_in_the_eigenbasis():
    """Claim 1 of the SOAP paper, arXiv:2409.11321."""
    sample = [normal(6, 4, seed=seed) * (1 + seed) for seed in range(12)]
    grad = normal(6, 4, seed=99)
    assert_close(idealized_shampoo(sample, grad), idealized_adafactor_in_eigenbasis(sample, grad))


# --- AdamW, Lion, MARS -----------------------------------------------------------------------------------------------


def test_adamw_is_that_of_torch():
    grads = gradients((4, 3), 10)
    options = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.1}
    assert_close(
        run(ReferenceAdamW([normal(4, 3)], **options), grads), run_torch_adamw(normal(4, 3), grads, **options)
    )


def test_lion_by_hand():
    lion = ReferenceLion([torch.tensor([1.0, 1.0])], lr=0.1, betas=(0.5, 0.9), weight_decay=0.1)
    lion.step([torch.tensor([2.0, -3.0])])
    lion.step([torch.tensor([-0.1, -3.0])])
    # m is (0.2, -0.3) after the first step, so the second one's signs are (+, -)
    first = torch.tensor([1 - 0.1 * 1.1, 1 + 0.1 * 0.9], dtype=torch.float64)
    assert_close(lion.weights[0], first - 0.1 * (torch.tensor([1.0, -1.0], dtype=torch.float64) + 0.1 * first), 1e-7)


@pytest.mark.parametrize("shape", [(4, 3), (5,)])
def test_mars_without_gamma_is_adamw(shape):
    grads = [0.01 * grad for grad in gradients(shape, 10)]  # short enough not to be clipped
    options = {"lr": 0.01, "betas": (0.95, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    mars = ReferenceMARS([normal(*shape)], gamma=0.0, optimize_1d=True, **options)
    assert_close(run(mars, grads), run_torch_adamw(normal(*shape), grads, **options))


def test_mars_first_correction_and_clip():
    correct = MarsCorrection(beta1=0.95, gamma=0.025, clip=True, exact=False)
    small = 0.1 * torch.ones(3, dtype=torch.float64)
    assert_close(correct(small, None), 1.475 * small)
    assert_close(correct(2 * small, None), 2 * small + 0.475 * small)
    assert correct(100 * small, None).norm().item() == pytest.approx(1.0)


def test_mars_exact_compares_with_the_gradient_that_it_is_given():
    correct = MarsCorrection(beta1=0.95, gamma=0.025, clip=False, exact=True)
    first, second, other = gradients((3,), 3)
    assert_close(correct(first, other), 1.475 * first)
    assert_close(correct(second, other), second + 0.475 * (second - other))
    with pytest.raises(ValueError, match="exact MARS"):
        correct(first, None)


def test_mars_remembers_a_copy_of_the_gradient():
    """A trainer that zeroes gradients in place must not zero what the next step compares with."""
    mars = ReferenceMARS([normal(3, 3)])
    grad = normal(3, 3, seed=1)
    mars.step([grad])
    grad.zero_()
    assert torch.equal(mars.corrections[0].previous_grad, normal(3, 3, seed=1))


def test_mars_leaves_vectors_to_adamw_whose_rate_follows_the_schedule():
    grads = gradients((4,), 6)
    mars = ReferenceMARS([normal(4)], lr=0.1, lr_1d=0.02, betas_1d=(0.9, 0.95), weight_decay_1d=0.1, rule="lion")
    adamw = ReferenceAdamW([normal(4)], betas=(0.9, 0.95), weight_decay=0.1)
    for step, grad in enumerate(grads, start=1):
        mars.step([grad], lr=0.1 / step)
        adamw.step([grad], lr=0.02 / step)
    assert_close(mars.weights[0], adamw.weights[0], 1e-14)


def test_mars_lion_steps_along_signs():
    mars = ReferenceMARS([normal(4, 4)], rule="lion", lr=0.1, weight_decay=0.5)
    grad = normal(4, 4, seed=1)
    mars.step([grad])
    assert_close(mars.weights[0], normal(4, 4) - 0.1 * (grad.sign() + 0.5 * normal(4, 4)), 1e-14)


@pytest.mark.parametrize("shape", [(6, 6), (8, 3), (3, 8)])
def test_newton_schulz_brings_singular_values_near_one(shape):
    matrix = normal(*shape)
    singular_values = torch.linalg.svdvals(newton_schulz_5(matrix))
    assert singular_values.max() < 1.3
    assert singular_values.min() > 0.3
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    in_frame = u.T @ newton_schulz_5(matrix) @ vh.T
    assert_close(in_frame, torch.diag(in_frame.diag()), 1e-9)


@pytest.mark.parametrize(("rule", "scale"), [("shampoo", math.sqrt(8 / 3)), ("m", 0.2 * math.sqrt(8))])
def test_mars_shampoo_and_mars_m_scale_by_shape(rule, scale):
    mars = ReferenceMARS([torch.zeros(8, 3)], rule=rule, lr=1.0)
    grad = normal(8, 3, seed=1)
    mars.step([grad])
    assert_close(mars.weights[0], -scale * newton_schulz_5(grad), 1e-5)


def test_mars_in_front_of_soap_is_soap_of_the_corrected_gradients():
    grads = gradients((4, 4), 8)
    options = {"lr": 0.01, "betas": (0.9, 0.95), "precondition_frequency": 2}
    mars_soap = ReferenceMarsInFront(ReferenceSOAP([normal(4, 4)], **options), beta1=0.9, gamma=0.1, clip=False)
    previous = [torch.zeros(4, 4, dtype=torch.float64), *grads]
    corrected = [grad + 0.1 * 9 * (grad - old) for grad, old in zip(grads, previous, strict=False)]
    assert_close(run(mars_soap, grads), run(ReferenceSOAP([normal(4, 4)], **options), corrected))
    without = ReferenceMarsInFront(ReferenceSOAP([normal(4, 4)], **options), beta1=0.9, gamma=0.0, clip=False)
    assert_close(run(without, grads), run(ReferenceSOAP([normal(4, 4)], **options), grads), 1e-14)
