"""Identities of the batched algebra, in float64 unless float32 is the point."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from hf_soap.linalg import decompositions, eigenbases, inverse_roots, matrices

SIZES = (3, 4, 2, 5, 1)
MODES = [(rank, mode) for rank in range(1, 6) for mode in range(rank)]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def blocks_of(rank: int, batch: int = 3) -> Tensor:
    return torch.randn(batch, *SIZES[:rank], dtype=torch.float64)


def spd(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Symmetric matrices of full rank whose eigenvalues are well apart."""
    root = torch.randn(*shape, shape[-1], dtype=torch.float64)
    basis = torch.linalg.qr(root).Q
    values = torch.arange(1, shape[-1] + 1, dtype=torch.float64) ** 2
    return matrices.symmetrize(basis @ values.diag() @ basis.mT).to(dtype)


def orthonormality_error(basis: Tensor) -> float:
    eye = torch.eye(basis.shape[-1], dtype=basis.dtype)
    return float(torch.linalg.matrix_norm(basis.mT @ basis - eye, 2).max())


def same_up_to_signs(one: Tensor, other: Tensor) -> Tensor:
    """`one` with its columns' signs flipped to those of `other`."""
    return one * (one * other).sum(-2, keepdim=True).sign()


def layouts(tensor: Tensor) -> Iterator[Tensor]:
    """The same numbers contiguous, with the memory order of modes reversed, and as every second entry of a buffer."""
    yield tensor
    order = list(range(tensor.dim()))[::-1]
    yield tensor.permute(order).contiguous().permute(order)
    spread = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan, dtype=tensor.dtype)
    spread[..., ::2] = tensor
    yield spread[..., ::2]


@pytest.mark.parametrize(("rank", "mode"), MODES)
def test_unfold_has_the_mode_as_rows(rank: int, mode: int) -> None:
    for tensor in layouts(blocks_of(rank)):
        unfolded = matrices.unfold(tensor, mode)
        for block, matrix in zip(tensor, unfolded, strict=True):
            for row in range(block.shape[mode]):
                assert torch.equal(matrix[row], block.select(mode, row).reshape(-1))


@pytest.mark.parametrize(("rank", "mode"), MODES)
@pytest.mark.parametrize("columns", [None, 1, 6])
def test_mode_product_is_the_einsum(rank: int, mode: int, columns: int | None) -> None:
    tensor = blocks_of(rank)
    matrix = torch.randn(3, SIZES[mode], columns or SIZES[mode], dtype=torch.float64)
    modes = "abcde"[:rank]
    expected = torch.einsum(f"z{modes},z{modes[mode]}y->z{modes.replace(modes[mode], 'y')}", tensor, matrix)
    for laid_out in layouts(tensor):
        result = matrices.mode_product(laid_out, matrix, mode)
        assert result.is_contiguous()
        torch.testing.assert_close(result, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("rank", "mode"), MODES)
@pytest.mark.parametrize("batch", [3, 1, 0])
def test_permute_reorders_the_indices_of_a_mode(rank: int, mode: int, batch: int) -> None:
    tensor = blocks_of(rank, batch)
    order = torch.stack([torch.randperm(SIZES[mode]) for _ in range(batch)]) if batch else torch.empty(0, SIZES[mode])
    order = order.long()
    for laid_out in layouts(tensor):
        permuted = matrices.permute(laid_out, order, mode)
        assert permuted.shape == tensor.shape
        for block, old, own in zip(permuted, tensor, order, strict=True):
            torch.testing.assert_close(block, old.index_select(mode, own), rtol=0, atol=0)


@pytest.mark.parametrize("rank", range(1, 6))
def test_rotating_back_undoes_rotating_and_keeps_norms(rank: int) -> None:
    tensor = blocks_of(rank)
    eigenbases = [torch.linalg.qr(torch.randn(3, n, n, dtype=torch.float64)).Q for n in SIZES[:rank]]
    rotated = tensor
    for mode, basis in enumerate(eigenbases):
        rotated = matrices.mode_product(rotated, basis, mode)
    torch.testing.assert_close(rotated.flatten(1).norm(dim=1), tensor.flatten(1).norm(dim=1))
    for mode, basis in enumerate(eigenbases):
        rotated = matrices.mode_product(rotated, basis.mT, mode)
    torch.testing.assert_close(rotated, tensor, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("rank", "mode"), MODES)
def test_add_gram_accumulates_the_unfolding(rank: int, mode: int) -> None:
    for tensor in layouts(blocks_of(rank)):
        factor = spd(3, SIZES[mode])
        expected = [
            0.9 * old + 0.4 * (rows := block.movedim(mode, 0).reshape(SIZES[mode], -1)) @ rows.T
            for old, block in zip(factor.clone(), tensor, strict=True)
        ]
        assert matrices.add_gram_(factor, tensor, mode, beta=0.9, alpha=0.4) is factor
        torch.testing.assert_close(factor, torch.stack(expected), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("rank", "mode"), MODES)
def test_add_gram_with_beta_zero_ignores_what_was_there(rank: int, mode: int) -> None:
    factor = torch.full((3, SIZES[mode], SIZES[mode]), torch.nan, dtype=torch.float64)
    matrices.add_gram_(factor, blocks_of(rank), mode, beta=0.0, alpha=0.1)
    assert factor.isfinite().all()


@pytest.mark.parametrize(("rank", "mode"), MODES)
def test_the_gram_of_a_rotated_tensor_is_the_rotated_gram(rank: int, mode: int) -> None:
    """The identity behind factors that live in their own eigenbasis: rotations of other modes cancel."""
    tensor = blocks_of(rank)
    eigenbases = [torch.linalg.qr(torch.randn(3, n, n, dtype=torch.float64)).Q for n in SIZES[:rank]]
    rotated = tensor
    for side, basis in enumerate(eigenbases):
        rotated = matrices.mode_product(rotated, basis, side)
    plain, inside = (torch.zeros(3, SIZES[mode], SIZES[mode], dtype=torch.float64) for _ in range(2))
    matrices.add_gram_(plain, tensor, mode, beta=0.0, alpha=1.0)
    matrices.add_gram_(inside, rotated, mode, beta=0.0, alpha=1.0)
    torch.testing.assert_close(inside, eigenbases[mode].mT @ plain @ eigenbases[mode], rtol=1e-12, atol=1e-12)


def test_symmetrize() -> None:
    matrix = torch.randn(2, 5, 5, dtype=torch.float64)
    kept = matrix.clone()
    result = matrices.symmetrize(matrix)
    assert torch.equal(result, result.mT)
    torch.testing.assert_close(result.diagonal(dim1=-2, dim2=-1), matrix.diagonal(dim1=-2, dim2=-1))
    torch.testing.assert_close(result - matrix, matrix.mT - result)
    assert torch.equal(matrix, kept)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_eigenbasis(n: int, dtype: torch.dtype, tolerance: float) -> None:
    matrix = spd(3, n, dtype=dtype)
    values, basis = decompositions.eigenbasis(matrix)
    assert values.dtype == basis.dtype == dtype
    assert (values.diff() <= 0).all()
    assert orthonormality_error(basis) < tolerance
    rebuilt = basis @ torch.diag_embed(values) @ basis.mT
    torch.testing.assert_close(rebuilt / n**2, matrix / n**2, rtol=0, atol=tolerance)


def test_eigenbasis_of_a_rank_deficient_matrix() -> None:
    root = torch.randn(6, 2, dtype=torch.float64)
    values, basis = decompositions.eigenbasis(root @ root.T)
    assert (values[2:].abs() < 1e-12).all()
    assert values[1] > 0.1
    assert orthonormality_error(basis) < 1e-12


def test_a_matrix_that_fails_in_float32_is_decomposed_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """LAPACK's float32 driver gives up on rare matrices, on which nobody can rely to stay rare: it is made to."""
    solve = torch.linalg.eigh
    asked: list[torch.dtype] = []

    def only_float64(matrix: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(matrix.dtype)
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return solve(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", only_float64)
    matrix = spd(2, 5, dtype=torch.float32)
    values, basis = decompositions.eigenbasis(matrix)
    assert asked == [torch.float32] + 2 * [torch.float32, torch.float64]  # the batch, then each by itself
    assert values.dtype == basis.dtype == torch.float32
    torch.testing.assert_close(basis @ torch.diag_embed(values) @ basis.mT, matrix, rtol=1e-5, atol=1e-5)


def test_a_matrix_with_infinities_has_no_basis_and_does_not_stop_the_others() -> None:
    matrix = torch.cat([torch.full((1, 3, 3), torch.inf), spd(2, 3, dtype=torch.float32)])
    values, basis = decompositions.eigenbasis(matrix)
    assert values[0].isnan().all()
    assert basis[0].isnan().all()
    for got, want in zip((values, basis), decompositions.eigenbasis(matrix[1:]), strict=True):
        assert torch.equal(got[1:], want)
    root = inverse_roots.inverse_root(matrix, exponent=-0.25, ridge=1e-6, method="newton")
    assert root[0].isnan().all()
    assert root[1:].isfinite().all()


def nearly_diagonal(n: int, share: float = 0.1) -> Tensor:
    """Factors in their own eigenbasis, as they stand before a refresh: diagonal descending, some of it spilled."""
    values = torch.arange(n, 0, -1, dtype=torch.float64) ** 2
    spill = matrices.symmetrize(torch.randn(3, n, n, dtype=torch.float64))
    return values.diag() + share * spill


@pytest.mark.parametrize("n", [1, 2, 9, 515])
def test_refresh_rotates_the_factor(n: int) -> None:
    factor = nearly_diagonal(n)
    kept = factor.clone()
    rotation, refreshed = eigenbases.refresh(factor)
    assert torch.equal(factor, kept)
    assert orthonormality_error(rotation) < 1e-12
    torch.testing.assert_close(refreshed, rotation.mT @ factor @ rotation, rtol=1e-12, atol=1e-12)
    assert torch.equal(refreshed, refreshed.mT)


@pytest.mark.parametrize("n", [2, 9])
def test_refresh_is_the_textbooks_qr_of_factor_times_basis(n: int) -> None:
    basis = torch.linalg.qr(torch.randn(3, n, n, dtype=torch.float64)).Q
    factor = nearly_diagonal(n)
    rotation, _ = eigenbases.refresh(factor)
    textbook = torch.linalg.qr((basis @ factor @ basis.mT) @ basis).Q
    torch.testing.assert_close(same_up_to_signs(basis @ rotation, textbook), textbook, rtol=1e-11, atol=1e-11)


def test_refreshes_converge_to_the_eigenbasis() -> None:
    original = factor = nearly_diagonal(7, share=1.0)
    basis = torch.eye(7, dtype=torch.float64).expand(3, 7, 7)
    for _ in range(60):
        rotation, factor = eigenbases.refresh(factor)
        basis = basis @ rotation
    values, eigenvectors = decompositions.eigenbasis(original)
    assert float(eigenbases.off_diagonal_share(factor).max()) < 1e-8
    torch.testing.assert_close(factor.diagonal(dim1=-2, dim2=-1), values)
    torch.testing.assert_close(same_up_to_signs(basis, eigenvectors), eigenvectors, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_refresh_of_a_singular_factor_still_gives_a_rotation(rank: int, dtype: torch.dtype) -> None:
    root = torch.randn(2, 6, rank, dtype=dtype)
    rotation, refreshed = eigenbases.refresh(matrices.symmetrize(root @ root.mT))
    assert orthonormality_error(rotation) < (1e-5 if dtype == torch.float32 else 1e-13)
    assert refreshed.isfinite().all()


@pytest.mark.parametrize("error", [1e-2, 1e-4])
def test_orthonormalize_squares_the_error(error: float) -> None:
    exact = torch.linalg.qr(torch.randn(4, 8, 8, dtype=torch.float64)).Q
    drifted = exact + error * torch.randn_like(exact) / 8
    before = orthonormality_error(drifted)
    after = orthonormality_error(eigenbases.orthonormalize(drifted))
    assert error / 10 < before < 10 * error
    assert after < before**2


def test_orthonormalize_goes_to_the_nearest_basis() -> None:
    drifted = torch.linalg.qr(torch.randn(4, 8, 8, dtype=torch.float64)).Q + 1e-3 * torch.randn(
        8, 8, dtype=torch.float64
    )
    kept = drifted.clone()
    left, _, right = torch.linalg.svd(drifted)
    torch.testing.assert_close(eigenbases.orthonormalize(drifted), left @ right, rtol=0, atol=1e-4)
    assert torch.equal(drifted, kept)
    torch.testing.assert_close(eigenbases.orthonormalize(left @ right), left @ right, rtol=0, atol=1e-14)


def test_off_diagonal_share() -> None:
    pairs = torch.tensor(
        [[[2.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]], [[4.0, 3.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]]
    )
    torch.testing.assert_close(eigenbases.off_diagonal_share(pairs), torch.tensor([0.0, 1.0, 0.6, 0.0]))
    tiny = torch.full((1, 2, 2), 1e-30)
    assert eigenbases.off_diagonal_share(tiny).isfinite().all()


BATCHED: dict[str, Callable[[Tensor], Tensor]] = {
    "eigenvalues": lambda a: decompositions.eigenbasis(a)[0],
    "eigenprojector": lambda a: (q := decompositions.eigenbasis(a)[1])[..., :2] @ q[..., :2].mT,
    "refreshed factor": lambda a: eigenbases.refresh(a)[1],
    "orthonormalize": lambda a: eigenbases.orthonormalize(decompositions.eigenbasis(a)[1].abs()),
    "off_diagonal_share": eigenbases.off_diagonal_share,
    "gram": lambda a: matrices.add_gram_(torch.zeros_like(a), a, 1, beta=0.5, alpha=2.0),
    "mode product": lambda a: matrices.mode_product(a, a, 0),
}


@pytest.mark.parametrize("n", [1, 6, 17])
@pytest.mark.parametrize("operation", BATCHED)
def test_a_batch_equals_the_loop_over_its_matrices(operation: str, n: int) -> None:
    batch, function = spd(4, n), BATCHED[operation]
    looped = torch.cat([function(matrix.unsqueeze(0)) for matrix in batch])
    torch.testing.assert_close(function(batch), looped, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["dense", "factor", "rank 3", "zero"])
@pytest.mark.parametrize("n", [6, 512, 700])
def test_qr(n: int, kind: str, dtype: torch.dtype) -> None:
    """Large matrices are worked through in panels; reflections of zero columns must do nothing."""
    matrix = {
        "dense": lambda: torch.randn(2, n, n),
        "factor": lambda: torch.logspace(6, -6, n).diag() + matrices.symmetrize(torch.randn(2, n, n)),
        "rank 3": lambda: torch.randn(2, n, 3) @ torch.randn(2, 3, n),
        "zero": lambda: torch.zeros(2, n, n),
    }[kind]().to(dtype)
    basis, upper = decompositions.qr(matrix)
    error = 30 * torch.finfo(dtype).eps
    assert orthonormality_error(basis) < error
    assert torch.equal(upper, upper.triu())
    assert (basis @ upper - matrix).norm() <= error * matrix.norm()
    if kind == "dense":
        torch.testing.assert_close(upper.abs(), torch.linalg.qr(matrix).R.abs(), rtol=1e-2, atol=1e4 * error)


@pytest.mark.parametrize("kind", ["factor", "full", "rank 3", "zero columns", "zero", "not finite"])
@pytest.mark.parametrize("n", [1, 2, 40])
def test_cholesky_qr_is_the_qr_of_factors(n: int, kind: str) -> None:
    """What GPUs refresh by. Where a factor knows nothing of a direction, any orthonormal one will do."""
    root = torch.randn(3, n, 3 if kind == "rank 3" else 3 * n)
    factor = matrices.symmetrize(root @ root.mT)
    if kind == "factor":
        factor = torch.logspace(4, -4, n).diag() + 1e-4 * factor * torch.logspace(0, -4, n).outer(
            torch.logspace(0, -4, n)
        )
    elif kind == "zero columns":
        factor[:, n // 2 :], factor[:, :, n // 2 :] = 0, 0
    elif kind == "zero":
        factor.zero_()
    elif kind == "not finite":
        factor[1, 0, 0] = torch.nan
    basis = decompositions.cholesky_qr(factor)
    if kind == "not finite":
        assert basis[1].isnan().all()
        factor, basis = factor[::2], basis[::2]
    assert orthonormality_error(basis.double()) < 1e-5
    exact = torch.linalg.qr(factor.double()).Q
    known = {"rank 3": min(n, 3), "zero columns": n // 2, "zero": 0}.get(kind, n)
    error = (same_up_to_signs(basis.double(), exact) - exact)[..., :known].abs()
    assert (error < 1e-2).all()
    assert error[..., : known // 2].numel() == 0 or error[..., : known // 2].max() < 1e-4


@pytest.mark.cuda
@pytest.mark.parametrize("n", [64, 1024])
def test_refresh_on_a_gpu_rotates_the_factor(n: int) -> None:
    factor = nearly_diagonal(n).float().cuda()
    rotation, refreshed = eigenbases.refresh(factor)
    exact, _ = eigenbases.refresh(factor.double())
    assert orthonormality_error(rotation.double().cpu()) < 1e-5
    torch.testing.assert_close(same_up_to_signs(rotation.double(), exact), exact, rtol=0, atol=1e-3)
    torch.testing.assert_close(refreshed, rotation.mT @ factor @ rotation, rtol=1e-4, atol=1e-4 * factor.max().item())
