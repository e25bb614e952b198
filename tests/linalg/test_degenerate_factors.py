"""Factors that are singular, broken, or far from 1 in size: zeros, rank one, equal eigenvalues, spectra over 1e12."""

import logging
from collections.abc import Callable

import numpy as np
import pytest
import torch
from generated import cases
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

from hf_soap import SOAP, Shampoo
from hf_soap.engine.failures import Failures
from hf_soap.linalg import decompositions, eigenbases, inverse_roots, matrices

EPS = torch.finfo(torch.float32).eps
SUBNORMAL = 2.0**-149
"""Spacing of the smallest float32 numbers: no result of that dtype can be nearer."""

seeds = st.integers(0, 2**31)
sizes = st.sampled_from([1, 2, 3, 5, 17, 33, 64, 127, 128, 129])
scales = st.sampled_from([1.0, 1e-38, 1e-30, 1e-20, 1e-12, 1e12, 1e18])


def embedding(rows: int, seen: int, dim: int = 32) -> Tensor:
    """The factor of an embedding after a batch that has ``seen`` of its tokens: the other rows are exactly zero."""
    grad = torch.zeros(rows, dim)
    grad[torch.randperm(rows)[:seen]] = torch.randn(seen, dim) * 10 ** (torch.randn(()) - 2)
    return 0.05 * grad @ grad.T


def of_spectrum(values: Tensor) -> Tensor:
    basis = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64)).Q
    return matrices.symmetrize((basis * values.double()) @ basis.T).float()


def factors(n: int, seed: int, scale: float = 1.0) -> Tensor:
    """One factor of each kind, (kinds, n, n), float32."""
    torch.manual_seed(seed)
    few = int(torch.randint(1, 40, ()))
    nearly, decades = torch.randn(n, n), torch.logspace(0, -12, n)
    graded = torch.randn(n, few) * torch.logspace(0, -int(torch.randint(1, 18, ())), n)[torch.randperm(n), None]
    sparse = torch.randn(n, few) * (torch.rand(n, few) < 0.05)
    vector = torch.randn(n, 1) * (torch.rand(n, 1) < 0.3)
    blocks = torch.block_diag(*[torch.ones(7, 7) * 10.0 ** -int(torch.randint(9, ())) for _ in range(n // 7 + 1)])
    roots_of = {
        "full rank": torch.randn(n, 2 * n),
        "low rank": torch.randn(n, few),
        "rank one": torch.randn(n, 1),
        "rank one, most rows zero": vector,
        "sparse": sparse,
        "rows of many sizes": graded,
        "all entries equal": torch.ones(n, 1),
    }
    kinds = [root @ root.T for root in roots_of.values()]
    kinds += [
        embedding(n, int(torch.randint(1, n + 1, ()))),
        embedding(n, min(n, 5)),
        torch.zeros(n, n),
        torch.eye(n),
        torch.eye(n) + 1e-7 * of_spectrum(torch.rand(n)),
        (10.0 ** torch.randint(-9, 2, (n,))).diag(),
        of_spectrum(decades),
        of_spectrum(10.0 ** torch.randint(-6, 2, (n,))),
        blocks[:n, :n],
        decades.diag() + 1e-3 * matrices.symmetrize(nearly) * decades.sqrt().outer(decades.sqrt()),
    ]
    batch = scale * torch.stack(kinds)
    return batch.tril() + batch.tril(-1).mT


def off_orthonormal(basis: Tensor) -> float:
    """The largest entry of QᵀQ - I, NaN for one that is not finite."""
    exact = basis.double()
    return float((exact.mT @ exact - matrices.eye_like(exact)).abs().max())


def rounding(n: int) -> float:
    return max(4e-6, 4 * n * EPS)


def assert_decomposes(values: Tensor, basis: Tensor, matrix: Tensor) -> None:
    """Says that A = QΛQᵀ with orthonormal Q, as exactly as float32 can."""
    n = matrix.shape[-1]
    assert off_orthonormal(basis) < rounding(n)
    exact = basis.double()
    error = (exact * values.double().unsqueeze(-2)) @ exact.mT - matrix.double()
    norm = matrix.double().norm(dim=(-2, -1))
    assert (error.norm(dim=(-2, -1)) <= rounding(n) * norm + n * SUBNORMAL).all()
    assert (values.diff() <= 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# Eigenbases
# ---------------------------------------------------------------------------------------------------------------------


def test_factors_of_embeddings_have_eigenbases() -> None:
    """Of those whose batch lacked most tokens eigh left a tenth NaN, and raised for more: SOAP kept the identity."""
    torch.manual_seed(0)
    for rows, count in ((64, 1500), (128, 1200), (256, 300), (512, 12)):
        for _ in range(0, count, 12):
            batch = torch.stack([embedding(rows, int(torch.randint(1, 60, ()))) for _ in range(12)])
            assert_decomposes(*decompositions.eigenbasis(batch), batch)


@given(sizes, seeds, scales)
@cases()
def test_eigenbases(n: int, seed: int, scale: float) -> None:
    batch = factors(n, seed, scale)
    assert_decomposes(*decompositions.eigenbasis(batch), batch)
    exact = batch.double()
    values, basis = decompositions.eigenbasis(exact)
    assert off_orthonormal(basis) < 1e-12
    error = ((basis * values.unsqueeze(-2)) @ basis.mT - exact).norm(dim=(-2, -1))
    assert (error <= 1e-13 * n * exact.norm(dim=(-2, -1))).all()


@given(sizes, seeds, scales)
@cases(0.5)
def test_zero_rows_are_known_eigenvectors(n: int, seed: int, scale: float) -> None:
    """Which matrices eigh gives up on differs between machines: here it has given up on all of them."""
    for matrix in factors(n, seed, scale):
        values, basis = decompositions._eigh_of_hard(matrix)
        assert_decomposes(values.flip(-1), basis.flip(-1), matrix)
        empty = ~matrix.any(-1)
        assert int((values == 0).sum()) >= int(empty.sum())
        assert basis[empty].sum() == empty.sum()
        assert (basis[empty].count_nonzero(-1) == 1).all()
        assert (basis[:, basis[empty].any(0)].count_nonzero(0) == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("how", ["raises", "gives NaN"])
def test_a_jitter_helps_where_float64_does_not(how: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """No matrix without zero rows is known on which LAPACK fails in float64, so the test makes it fail."""
    solve, batch = torch.linalg.eigh, factors(33, 0).to(dtype)
    # Zero and the identity have no rows to tell apart but by the jitter; those without empty rows are not cut.
    batch = batch[[i for i, matrix in enumerate(batch) if matrix.any(-1).all()]]
    known = batch.double()

    def fails_on_known(matrix: Tensor) -> tuple[Tensor, Tensor]:
        values, basis = (part.clone() for part in solve(matrix))
        bad = (matrix.double().unsqueeze(-3) == known).flatten(-2).all(-1).any(-1)
        if how == "raises" and bad.any():
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        values[bad], basis[bad] = torch.nan, torch.nan
        return values, basis

    monkeypatch.setattr(torch.linalg, "eigh", fails_on_known)
    values, basis = decompositions.eigenbasis(batch)
    assert_decomposes(values, basis, batch)
    if dtype == torch.float64:
        exact = solve(batch)[0].flip(-1)
        assert ((values - exact).abs() <= 1e-12 * exact[:, :1]).all()
        assert off_orthonormal(basis) < 1e-12


# ---------------------------------------------------------------------------------------------------------------------
# A matrix becomes the same in any batch
# ---------------------------------------------------------------------------------------------------------------------

COMPUTATIONS: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "eigenbasis": decompositions.eigenbasis,
    "refresh": eigenbases.refresh,
    "sorted_refresh": eigenbases.sorted_refresh,
    "qr": decompositions.qr,
    "cholesky_qr": lambda a: (decompositions.cholesky_qr(a),),
    "orthonormalize": lambda a: (eigenbases.orthonormalize(a),),
    "off_diagonal_share": lambda a: (eigenbases.off_diagonal_share(a),),
    "newton_schulz": lambda a: (inverse_roots.newton_schulz(a, eps=1e-7),),
    "spectral_norm": lambda a: (inverse_roots.spectral_norm(a),),
    "coupled_newton": lambda a: inverse_roots.coupled_newton(a, order=4, ridge=1e-6),
    "inverse_root by eigh": lambda a: (inverse_roots.inverse_root(a, exponent=-0.25, ridge=1e-6),),
    "inverse_root by newton": lambda a: (inverse_roots.inverse_root(a, exponent=-0.25, ridge=1e-6, method="newton"),),
    "pseudo-inverse root": lambda a: (inverse_roots.inverse_root(a, exponent=-1 / 6, ridge=0.0),),
    "unpacked": lambda a: (matrices.unpack(matrices.pack(a)),),
}


@pytest.mark.parametrize(
    ("name", "n"),
    [
        *((name, n) for name in COMPUTATIONS for n in (1, 2, 20, 64, 129)),
        *((name, 515) for name in ("qr", "refresh", "sorted_refresh")),
    ],
)
def test_broken_matrices_stay_nan_and_leave_the_others_alone(name: str, n: int) -> None:
    """Bit for bit, also in products: those of another memory layout are rounded in other ways."""
    compute = COMPUTATIONS[name]
    sound = factors(n, n)
    if n > 500:
        sound = sound[[0, 2, 8, 16]]  # what is cut into panels
    broken = sound[[0, 0, 0]].clone()
    broken[0, -1, -1] = torch.inf
    broken[1, n // 2, 0] = broken[1, 0, n // 2] = torch.nan
    broken[2].fill_(torch.nan)
    sound[1] *= 1e-30
    batch = torch.cat([broken[:1], sound[:3], broken[1:], sound[3:]])
    results = compute(batch)
    mixed = [i for i in range(len(batch)) if i not in (0, 4, 5)]
    for place in mixed:
        for result, alone in zip(results, compute(batch[place : place + 1]), strict=True):
            assert torch.equal(result[place], alone[0])
            if result.dim() == 3:
                assert result[place].isfinite().all()
                probe = torch.ones(n, 2).cumsum(0)
                assert torch.equal(result[place] @ probe, alone[0] @ probe)
    if name in ("eigenbasis", "cholesky_qr", "inverse_root by eigh", "inverse_root by newton", "pseudo-inverse root"):
        for result in results:
            assert result[[0, 4, 5]].isnan().all()
    elif name == "coupled_newton":
        assert not results[1][[0, 4, 5]].any()
    elif name in ("refresh", "sorted_refresh", "qr"):
        assert not any(results[-1][place].isfinite().all() for place in (0, 4, 5))
    whole = compute(batch[1:2].squeeze(0)) if name in UNBATCHED else ()
    for result, alone in zip(results, whole, strict=False):
        torch.testing.assert_close(result[1], alone, rtol=1e-4, atol=1e-5)


UNBATCHED = ("eigenbasis", "inverse_root by eigh", "spectral_norm", "newton_schulz", "unpacked")
"""Those that promise (..., n, n)."""


# ---------------------------------------------------------------------------------------------------------------------
# Refreshes
# ---------------------------------------------------------------------------------------------------------------------


def check_refreshes(batch: Tensor) -> None:
    n = batch.shape[-1]
    exact, error = batch.double(), rounding(n)
    room = error * exact.norm(dim=(-2, -1)) + n * n * SUBNORMAL
    basis, upper = decompositions.qr(batch)
    assert off_orthonormal(basis) < error
    assert ((basis.double() @ upper.double() - exact).norm(dim=(-2, -1)) <= room).all()
    assert torch.equal(upper, upper.triu())
    order, rotation, refreshed = eigenbases.sorted_refresh(batch)
    assert off_orthonormal(rotation) < error
    assert torch.equal(refreshed, refreshed.mT)
    rows = order.unsqueeze(-1).expand_as(exact)
    ordered = exact.gather(-2, rows).gather(-1, rows.mT)
    wanted = rotation.double().mT @ ordered @ rotation.double()
    assert ((refreshed.double() - wanted).norm(dim=(-2, -1)) <= room).all()
    plain, again = eigenbases.refresh(ordered.float())
    assert torch.equal(plain, rotation)
    assert torch.equal(again, refreshed)


@given(sizes, seeds, scales)
@cases()
def test_refreshes_rotate(n: int, seed: int, scale: float) -> None:
    check_refreshes(factors(n, seed, scale))


@given(st.sampled_from([511, 512, 513, 515, 639, 641]), seeds, scales, st.integers(0, 2))
@cases(0.05)
def test_refreshes_in_panels_rotate(n: int, seed: int, scale: float, first: int) -> None:
    check_refreshes(factors(n, seed, scale)[first::3])


@given(sizes, seeds, scales)
@cases()
def test_cholesky_qr_rotates(n: int, seed: int, scale: float) -> None:
    batch = factors(n, seed, scale)
    basis = decompositions.cholesky_qr(batch)
    assert off_orthonormal(basis) < 2e-6
    # Up to the shift, which is rounding at the largest entry, R is upper triangular, its diagonal not negative.
    upper = basis.double().mT @ batch.double()
    room = 4 * EPS * n**0.5 * batch.double().diagonal(dim1=-2, dim2=-1).amax(-1) + n * SUBNORMAL
    assert (upper.tril(-1).abs().amax((-2, -1)) <= room).all()
    assert (upper.diagonal(dim1=-2, dim2=-1).amin(-1) >= -room).all()


@given(sizes, seeds, st.sampled_from([1e-38, 1e-12, 1.0, 3.0, 1e12, 1e18]), st.integers(1, 20))
@cases(0.5)
def test_orthonormalize_does_not_lead_away(n: int, seed: int, scale: float, steps: int) -> None:
    """From singular values above √5 each step led further away, and soon to NaN."""
    torch.manual_seed(seed)
    drifted = scale * torch.randn(3, n, n)
    good = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q.float()
    batch = torch.cat([drifted, good[None], torch.zeros(1, n, n)])
    for _ in range(steps):
        batch = eigenbases.orthonormalize(batch)
        assert batch.isfinite().all()
        assert (torch.linalg.svdvals(batch.double()) <= 1 + 1e-4).all()
    assert off_orthonormal(batch[3]) < rounding(n)
    assert not batch[4].any()


@pytest.mark.parametrize("n", [1, 12, 129])
def test_orthonormalize_ends_at_the_nearest_basis_from_afar(n: int) -> None:
    torch.manual_seed(0)
    batch = 50 * torch.randn(4, n, n)
    left, _, right = torch.linalg.svd(batch.double())
    for _ in range(100):
        batch = eigenbases.orthonormalize(batch)
    torch.testing.assert_close(batch.double(), left @ right, rtol=0, atol=1e-4)


@given(sizes, seeds, scales)
@cases()
def test_off_diagonal_share_of_any_factor(n: int, seed: int, scale: float) -> None:
    """Squares left its range: of factors below 1e-19 it made 0, so that a tolerance never refreshed them, or NaN."""
    batch = factors(n, seed, scale)
    got, exact = eigenbases.off_diagonal_share(batch), batch.double()
    norm = exact.norm(dim=(-2, -1))
    off = (exact - torch.diag_embed(exact.diagonal(dim1=-2, dim2=-1))).norm(dim=(-2, -1))
    torch.testing.assert_close(got.double(), off / norm.clamp(min=1e-300), rtol=1e-4, atol=1e-9)
    diagonal = torch.diag_embed(batch.diagonal(dim1=-2, dim2=-1))
    assert not eigenbases.off_diagonal_share(diagonal).any()


@given(sizes, seeds, scales)
@cases(0.5)
def test_packing_keeps_every_bit(n: int, seed: int, scale: float) -> None:
    batch = factors(n, seed, scale)
    batch[1, n // 2, 0] = batch[1, 0, n // 2] = torch.nan
    batch[2, -1, -1] = -torch.inf
    batch[3] = torch.randn(n, n).mul(2.0**-140)
    batch[3] = batch[3].tril() + batch[3].tril(-1).T
    unpacked = matrices.unpack(matrices.pack(batch))
    assert torch.equal(unpacked.isnan(), batch.isnan())
    assert torch.equal(unpacked.nan_to_num(7.0), batch.nan_to_num(7.0))


# ---------------------------------------------------------------------------------------------------------------------
# Roots
# ---------------------------------------------------------------------------------------------------------------------

methods = st.sampled_from(["eigh", "newton"])
orders = st.sampled_from([1, 2, 4, 6, 8])


@given(sizes, seeds, scales, orders, methods)
@cases()
def test_roots_with_a_ridge(n: int, seed: int, scale: float, order: int, method: str) -> None:
    """Newton called roots of factors around 1e-30 converged that had nothing to do with them."""
    batch = factors(n, seed, scale)
    if order == 1 and scale < 1e-20:
        return  # such inverses are not float32 numbers
    exponent, ridge = -1 / order, 1e-3
    got = inverse_roots.inverse_root(batch, exponent=exponent, ridge=ridge, method=method)
    assert got.isfinite().all()
    assert torch.equal(got, got.mT)
    # torch's own eigh gives up on some of them in float64 too.
    exact, basis = map(torch.from_numpy, np.linalg.eigh(batch.double().numpy()))
    values = exact.clamp(min=0) + ridge * exact[:, -1:]
    powers = torch.where(values > 0, values**exponent, 0.0)
    wanted = (basis * powers.unsqueeze(-2)) @ basis.mT
    error = (got.double() - wanted).norm(dim=(-2, -1)) / wanted.norm(dim=(-2, -1)).clamp(min=1e-300)
    # An eigenvalue is off by rounding at the largest, and Newton stops at 1e-3 at the latest.
    room = max(5e-3, rounding(n) / ridge)
    if method == "newton":  # whose ridge is relative to an estimate
        estimate = inverse_roots.spectral_norm(batch).double().clamp(min=1e-300)
        room = room + (exact[:, -1] / estimate - 1).clamp(min=0)
    # Among subnormal numbers a factor is rounded so coarsely that it is not semi-definite any more.
    exactly_held = batch.abs().amax((-2, -1)) >= torch.finfo(torch.float32).tiny
    assert (error < room)[exactly_held | (batch == 0).flatten(1).all(1)].all()


@given(sizes, seeds, scales, st.sampled_from([2, 4, 6, 8]), methods)
@cases()
def test_roots_without_a_ridge_are_pseudo_inverse(n: int, seed: int, scale: float, order: int, method: str) -> None:
    """eigh makes eigenvalues of 1e-45 of exactly zero rows, and those made roots of 1e22."""
    batch = factors(n, seed, scale)
    got = inverse_roots.inverse_root(batch, exponent=-1 / order, ridge=0.0, method=method)
    assert got.isfinite().all()
    assert torch.equal(got, got.mT)
    assert not got[~batch.flatten(1).any(1)].any()
    if method == "eigh":
        largest = torch.linalg.eigvalsh(batch.double())[:, -1]
        bound = (EPS / 2 * largest.clamp(min=1e-300)) ** (-1 / order)
        assert (got.double().abs().amax((-2, -1)) <= bound)[largest > 0].all()


@pytest.mark.parametrize("method", ["eigh", "newton"])
@pytest.mark.parametrize("order", [2, 4])
def test_a_token_that_was_not_seen_has_the_root_zero(order: int, method: str) -> None:
    torch.manual_seed(0)
    for _ in range(60):
        matrix = embedding(64, int(torch.randint(1, 12, ())))
        got = inverse_roots.inverse_root(matrix, exponent=-1 / order, ridge=0.0, method=method)
        seen = matrix.any(-1)
        inner = inverse_roots.inverse_root(matrix[seen][:, seen].double(), exponent=-1 / order, ridge=0.0)
        room = 1e-3 * float(inner.abs().max())
        torch.testing.assert_close(got[seen][:, seen].double(), inner, rtol=0, atol=room)
        assert got[~seen].abs().max() < room


def test_newton_refuses_roots_with_negative_eigenvalues() -> None:
    """An eigenvector was at a right angle to the start of the power iteration, so that the norm came out at 0.4 of
    what it was. Newton then found the root that has -1 where 1 should be, and M was I."""

    def matrix_at(angle: Tensor) -> tuple[Tensor, Tensor]:
        first = torch.stack([angle.cos(), -angle.sin()])
        other = torch.stack([angle.sin(), angle.cos()])
        return first.outer(first) + 0.4 * other.outer(other), first

    start = torch.arange(1, 3, dtype=torch.float64).sin() + 1.5
    low, high = torch.tensor([0.1, 1.4], dtype=torch.float64)
    for _ in range(80):
        middle = (low + high) / 2
        matrix, first = matrix_at(middle)
        low, high = (middle, high) if matrix.diagonal().sqrt() * start @ first > 0 else (low, middle)
    matrix, _ = matrix_at(low)
    assert inverse_roots.spectral_norm(matrix) < 0.5
    for order in (2, 4, 8):
        assert not inverse_roots.coupled_newton(matrix, order=order, ridge=0.0)[1]
        got = inverse_roots.inverse_root(matrix, exponent=-1 / order, ridge=0.0, method="newton")
        torch.testing.assert_close(got, inverse_roots.inverse_root(matrix, exponent=-1 / order, ridge=0.0))


@given(sizes, seeds, st.one_of(scales, st.just(1e30)))
@cases()
def test_spectral_norms_of_any_factor(n: int, seed: int, scale: float) -> None:
    """Squares left the range of float32: of 1e-30 times the identity it made 7e-15, and infinity of 1e19 times it."""
    batch = factors(n, seed, scale)
    got, largest = inverse_roots.spectral_norm(batch).double(), torch.linalg.eigvalsh(batch.double())[:, -1]
    assert (got <= (1 + rounding(n)) * largest + n * SUBNORMAL).all()
    assert (got >= 0.7 * largest - n * SUBNORMAL).all()


@given(sizes, sizes, seeds, st.sampled_from([-100, -60, -45, 45, 60, 100]))
@cases()
def test_newton_schulz_does_not_depend_on_scale(rows: int, cols: int, seed: int, exponent: int) -> None:
    """From 1e19 on, squares in the norm were infinite, and the direction zero."""
    torch.manual_seed(seed)
    one, other = torch.randn(rows, 1), torch.randn(1, cols)
    batch = torch.stack([torch.randn(rows, cols), one @ other, torch.zeros(rows, cols)])
    got = inverse_roots.newton_schulz(batch, eps=0.0)
    assert torch.equal(inverse_roots.newton_schulz(batch * 2.0**exponent, eps=0.0), got)
    assert not got[2].any()
    values = torch.linalg.svdvals(got.double())
    assert values.max() < 1.3
    assert values[1, 0] > 0.6
    assert values[1, 1:].numel() == 0 or values[1, 1:].max() < 1e-4
    cosine = (got[1].double() * (one @ other).double()).sum() / (
        got[1].double().norm() * (one @ other).double().norm()
    )
    assert cosine > 1 - 1e-4
    for factor in (1e-38, 1e-44, 1e18, 1e36):
        for eps in (0.0, 1e-7, 1.0):
            assert inverse_roots.newton_schulz(factor * batch, eps=eps).isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [SOAP, Shampoo])
def test_an_embedding_has_a_basis_after_a_batch_that_lacks_most_tokens(make: type[SOAP] | type[Shampoo]) -> None:
    """In a fifth of runs its first decomposition failed, and it was stepped in the identity until the next refresh."""
    torch.manual_seed(0)
    params = [Parameter(torch.randn(128, 32)) for _ in range(40)]
    optimizer = make(params, precondition_frequency=1)
    for _ in range(2):
        for param in params:
            param.grad = torch.zeros_like(param)
            seen = torch.randperm(128)[: int(torch.randint(4, 60, ()))]
            param.grad[seen] = torch.randn(len(seen), 32) * 10 ** (torch.randn(()) - 2)
        optimizer.step()
    assert optimizer.failed_refreshes == 0
    assert all(param.isfinite().all() for param in params)
    for param in params:
        for role, value in optimizer.state[param].items():
            if role.startswith("basis"):
                assert off_orthonormal(value) < rounding(128)


def test_one_failure_is_reported_in_the_singular(caplog: pytest.LogCaptureFixture) -> None:
    failures = Failures()
    with caplog.at_level(logging.WARNING, logger="hf_soap"):
        failures.add(1, "it is not finite")
        failures.add(9, "it is not finite")
    first, second = caplog.messages
    assert first.startswith("1 decomposition has failed so far; ")
    assert second.startswith("10 decompositions of factors have failed so far; ")
