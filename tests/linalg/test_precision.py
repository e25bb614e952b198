"""Products of float32 matrices are exact in a step, whatever the program has set for its model."""

from collections.abc import Iterator

import pytest
import torch

from hf_soap import SOAP
from hf_soap.linalg.precision import EXACT, float32_products, prefers_onednn

CPU = torch.device("cpu")
LARGE = (256, 256)


@pytest.fixture(params=["highest", "high", "medium"], autouse=True)
def chosen(request: pytest.FixtureRequest) -> Iterator[str]:
    """What the user has set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("shape", [(2, 128, 128, 128), (3, 256, 64, 512), (1, 300, 1000, 200), (2, 40, 50, 60)])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_are_float32(shape: tuple[int, ...], transposed: bool) -> None:
    """oneDNN's bf16 mode is used only where it computes in float32."""
    torch.manual_seed(0)
    batch, m, k, n = shape
    one = torch.rand(batch, k, m).mT if transposed else torch.rand(batch, m, k)
    other = torch.rand(batch, k, n)
    with float32_products((min(m, k, n), max(m, k, n)), CPU):
        got = one @ other
    want = one.double() @ other.double()
    assert ((got - want).abs() <= 1e-5 * want).all()


def test_the_setting_of_the_user_comes_back(chosen: str) -> None:
    with float32_products(LARGE, CPU), float32_products((4, 4), CPU):
        pass
    assert torch.get_float32_matmul_precision() == chosen
    with pytest.raises(ZeroDivisionError), float32_products(LARGE, CPU):
        1 / 0  # noqa: B018
    assert torch.get_float32_matmul_precision() == chosen
    param = torch.nn.Parameter(torch.ones(4, 4))
    param.grad = torch.ones(4, 4)
    SOAP([param]).step()
    assert torch.get_float32_matmul_precision() == chosen


def test_small_blocks_are_multiplied_by_the_exact_setting(chosen: str) -> None:
    settings = getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(settings, "fp32_precision"):
        pytest.skip("this torch has one setting for all devices")
    with float32_products((4, 4), CPU):
        assert settings.fp32_precision == EXACT
    with float32_products(LARGE, CPU):
        assert (settings.fp32_precision == EXACT) != prefers_onednn()


@pytest.mark.cuda
def test_factors_on_a_gpu_never_use_tf32() -> None:
    """At a spread of 1e7 TF32 turned an eigenvalue of 0.1 into -6."""
    device = torch.device("cuda")
    one, other = (torch.rand(512, 512, device=device) for _ in range(2))
    with float32_products(LARGE, device):
        exact = one @ other
    with float32_products(LARGE, device, reduced=True):
        reduced = one @ other
    want = one.double() @ other.double()
    assert ((exact - want).abs() <= 1e-5 * want).all()
    assert ((reduced - want).abs() <= 1e-2 * want).all()
