"""As test_reference.py, for the loops of Shampoo, MARS, AdamW and Lion."""

import math

import pytest
import torch
from textbook import assert_close, gradients, normal, run, run_torch_adamw

from hf_soap.reference.mars import (
    MarsCorrection,
    ReferenceAdamW,
    ReferenceLion,
    ReferenceMARS,
    ReferenceMarsInFront,
    newton_schulz_5,
)
from hf_soap.reference.shampoo import (
    ReferenceKLShampoo,
    ReferenceShampoo,
    idealized_adafactor_in_eigenbasis,
    idealized_shampoo,
    inverse_root,
)
from hf_soap.reference.soap import ReferenceSOAP, gram

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
