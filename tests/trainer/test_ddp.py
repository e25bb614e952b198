"""Two processes on gloo: the real Trainer under DDP against one process on the same samples."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paths import PYTHONPATH

SCRIPT = """
import os, sys
import torch
torch.set_num_threads(1)
from tiny import Counting, arguments, gpt2
from hf_soap import SoapTrainer

folder, optim, optim_args, batch = sys.argv[1:]
model = gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).double()
args = arguments(folder, optim=optim, optim_args=optim_args or None, per_device_train_batch_size=int(batch),
                 gradient_accumulation_steps=2, max_steps=6, max_grad_norm=0.5,
                 ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None)
trainer = SoapTrainer(model=model, args=args, train_dataset=Counting())
trainer.train()
weights = {name: value.detach().clone() for name, value in model.named_parameters()}
torch.save(weights, f"{folder}/weights-{args.process_index}.pt")
if args.world_size > 1:
    torch.distributed.barrier()
sys.stdout.flush()
os._exit(0)
"""


def weights(folder: Path, processes: int, optim: str, optim_args: str) -> list[dict[str, torch.Tensor]]:
    folder.mkdir()
    script = folder / "train.py"
    script.write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, script, folder, optim, optim_args, str(8 // processes)],
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"weights-{rank}.pt", weights_only=True) for rank in range(processes)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optim", "optim_args"),
    [
        ("soap", "precondition_frequency=2"),
        ("mars", "exact=true"),
        ("shampoo", "start_step=2,precondition_frequency=2"),
    ],
)
def test_ranks_agree_bitwise_and_with_one_process(optim: str, optim_args: str, tmp_path: Path) -> None:
    """Exact MARS runs the second pass under DDP too: its gradients must be averaged over ranks like the first's.

    SOAP is compared between the ranks only: the factors of so small a model are rank-deficient, and rounding chooses
    the bases of their null spaces, with one process as with two.
    """
    first, second = weights(tmp_path / "two", 2, optim, optim_args)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    if optim != "soap":
        (alone,) = weights(tmp_path / "one", 1, optim, optim_args)
        for name, value in first.items():
            # The model computes its loss in float32, which sums over ranks in another order.
            torch.testing.assert_close(value, alone[name], rtol=0, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
