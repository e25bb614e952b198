"""What tests of the textbook loops share."""

import torch
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
