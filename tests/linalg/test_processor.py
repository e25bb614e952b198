"""Kernels are chosen by what the processor can do, and each choice is logged."""

import logging
import os
import subprocess
import sys

import pytest
import torch
from bench_step import ISA
from paths import PYTHONPATH

from hf_soap import SOAP
from hf_soap.linalg import precision, processor

CODE = """
import logging, torch
from hf_soap import SOAP
from hf_soap.linalg import precision, processor

logging.basicConfig(level=logging.DEBUG, format="%(levelname)s %(message)s")
assert processor.instructions(torch.device("cpu")) == "AVX2"
assert not precision.prefers_onednn()
torch.manual_seed(0)
start = torch.randn(128, 16)
params = [torch.nn.Parameter(start.clone()) for _ in range(3)]
dtypes = ("float32", "bfloat16", "bfloat16")
optimizers = [SOAP([p], precondition_frequency=1, matmul_dtype=dtype) for p, dtype in zip(params, dtypes)]
for _ in range(3):
    grad = torch.randn_like(start)
    for param, optimizer in zip(params, optimizers):
        param.grad = grad.clone()
        optimizer.step()
assert not torch.equal(params[0], start)
assert torch.equal(params[0], params[1]) and torch.equal(params[0], params[2])
"""


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="the CPU has no AVX2")
def test_without_instructions_for_bfloat16_rotations_are_float32() -> None:
    """With torch's own loop over bfloat16, a step took more than ten times as long as in float32."""
    environment = {**os.environ, **ISA["avx2"], "PYTHONPATH": PYTHONPATH}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.endswith(": AVX2") or line.startswith("WARNING")]
    assert len(lines) == len(set(lines)), "each is said once"
    (warning,) = [line for line in lines if line.startswith("WARNING")]
    assert "matmul_dtype='bfloat16' computes in float32 here" in warning
    assert set(lines) - {warning} == {
        "DEBUG float32 products of (128, 16) by torch's default kernel: AVX2",
        "DEBUG Adam on rotated blocks of (128, 16) by the fused kernel: AVX2",
        "DEBUG QR of (128, 128) by torch's default kernel: AVX2",
        "DEBUG QR of (16, 16) by torch's default kernel: AVX2",
    }


@pytest.mark.skipif(not processor.multiplies_bfloat16(), reason="the CPU has no instructions for bfloat16 products")
def test_with_instructions_for_bfloat16_rotations_are_bfloat16(caplog: pytest.LogCaptureFixture) -> None:
    precision.allows_bfloat16.cache_clear()
    caplog.set_level(logging.DEBUG, "hf_soap")
    torch.manual_seed(0)
    start, grads = torch.randn(64, 32), torch.randn(3, 64, 32)
    ends = []
    for dtype in ("float32", "bfloat16"):
        param = torch.nn.Parameter(start.clone())
        optimizer = SOAP([param], lr=1e-2, matmul_dtype=dtype)
        for grad in grads:
            param.grad = grad.clone()
            optimizer.step()
        ends.append(param.detach())
    assert "bfloat16 products on" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not torch.equal(*ends)


@pytest.mark.cuda
def test_a_gpu_is_named() -> None:
    device = torch.device("cuda")
    assert processor.name(device) == torch.cuda.get_device_name()
    assert processor.instructions(device).startswith("compute capability ")
