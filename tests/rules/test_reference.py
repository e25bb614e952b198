"""The reference loop of SOAP is itself held to what can be known without it: analytic cases, identities, torch."""

import math

import pytest
import torch
from textbook import assert_close, gradients, normal, run, run_torch_adamw

from hf_soap.reference.soap import ReferenceSOAP, block_grid, gram, merged_shape, rotate, rotate_back

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
    assert_close(block.means[0], second_moment.mean(dim=1))
    assert_close(block.means[1], second_moment.mean(dim=0))
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
    """The factors start at multiples of the identity; right after seeding, the bases are exact."""
    first, second = normal(4, 4, seed=1), normal(4, 4, seed=2)
    soap = ReferenceSOAP([normal(4, 4)], shampoo_beta=0.9, kl=True, eps_kl=1e-12)
    soap.step([first])
    scale = first.square().mean().sqrt()
    left, right = (
        0.9 * scale * torch.eye(4).double() + 0.1 / (4 * scale) * a for a in (first @ first.T, first.T @ first)
    )
    block = soap.state[0].blocks[0]
    assert_close(block.factors[0], left)
    assert_close(block.factors[1], right)
    soap.step([second])
    kl_left = 0.9 * left + 0.1 * second @ torch.linalg.inv(right) @ second.T / 4
    kl_right = 0.9 * right + 0.1 * second.T @ torch.linalg.inv(left) @ second / 4
    torch.testing.assert_close(block.factors[0], kl_left, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(block.factors[1], kl_right, rtol=1e-7, atol=1e-7)


def test_soap_kl_clamps_small_eigenvalues():
    soap = ReferenceSOAP([normal(2, 2)], shampoo_beta=0.5, kl=True, eps_kl=0.5)
    soap.step([torch.diag(torch.tensor([2.0, 0.0]))])
    soap.step([torch.eye(2)])
    # the seeds are diag(3/2, 1/2), and 1/2 is raised to half of 3/2
    assert_close(soap.state[0].blocks[0].factors[0], torch.diag(torch.tensor([11 / 12, 7 / 12], dtype=torch.float64)))


def test_no_eigenvalue_of_a_kl_factor_outweighs_the_gradients_that_follow():
    """Factors of one gradient are singular: a second one, whitened by them, was 1e8 times as large as later ones."""
    grads = gradients((4, 8), 30)
    soap = ReferenceSOAP([normal(4, 8)], kl=True)
    run(soap, grads)
    traces = [factor.trace() for factor in soap.state[0].blocks[0].factors]
    assert 0.2 < traces[0] / 4 * traces[1] / 8 / torch.stack(grads).square().mean() < 5


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
