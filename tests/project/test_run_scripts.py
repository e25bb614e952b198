"""What scripts/run_mlm.py and scripts/run_image_classification.py do in their own way, and files of this Python."""

import json
import sysconfig
from pathlib import Path
from typing import Any

import _text
import numpy as np
import pytest
import run_image_classification
import run_mlm
import torch

QUICK = ["--max_steps=2", "--use_cpu", "--report_to=none", "--disable_tqdm=true", "--save_strategy=no"]
SOAP = ["--optim=soap", "--learning_rate=1e-2", "--optim_args=precondition_frequency=1"]


def test_files_of_this_python() -> None:
    stdlib = Path(sysconfig.get_path("stdlib"))
    assert _text.expand(["stdlib:abc.py"]) == [str(stdlib / "abc.py")]
    (docs,) = _text.expand(["package:torch/_torch_docs.py"])
    assert Path(docs) == Path(torch.__file__).parent / "_torch_docs.py"
    assert _text.locate("C:/texts/*.txt") == "C:/texts/*.txt"
    assert _text.locate("stdlib:/etc/*").startswith(str(stdlib)), "a recipe of a stranger is to reach nothing else"


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("stdlib:../../*", "remove the '..'"),
        (r"package:torch/..\..\*", "remove the '..'"),
        ("package:no_such_package/*", "wanted an installed package"),
        ("package:json.decoder/*", "wanted an installed package"),
        ("package:abc", "wanted an installed package"),
        ("stdlib:nothing*.py", "no file matches"),
    ],
)
def test_files_that_are_not_of_this_python(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _text.expand([pattern])


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("encoder")
    model = "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,intermediate_size=64,max_position_embeddings=32"
    data = ["--train_files=stdlib:ast.py", "--train_tokenizer_vocab=300", "--block_size=32"]
    scratch = ["--model_type=bert", f"--config_overrides={model}"]
    metrics = run_mlm.main([*data, *scratch, *SOAP, *QUICK, f"--output_dir={folder}"])
    return folder, metrics


def test_an_encoder_goes_on_from_its_checkpoint(encoder: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    """The held-out text is masked in the same places in every run: an unchanged model has an unchanged loss."""
    folder, metrics = encoder
    same = [f"--model_name_or_path={folder}", "--train_files=stdlib:ast.py", "--block_size=32", *QUICK, "--seed=9"]
    again = run_mlm.main([*same, "--learning_rate=0", f"--output_dir={tmp_path}"])
    assert again["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-6)
    assert again["train_loss"] != metrics["train_loss"]
    assert metrics["train_state_bytes_per_parameter"] > 12 > again["train_state_bytes_per_parameter"] > 7.9


def test_masking(encoder: tuple[Path, dict[str, float]]) -> None:
    tokenizer = _text.AutoTokenizer.from_pretrained(encoder[0])
    masking = run_mlm.Masking(tokenizer, 0.3)
    blocks = [{"input_ids": torch.randint(5, 300, (32,)).tolist()} for _ in range(64)]
    one, other = masking(blocks), masking(blocks)
    assert not torch.equal(one["labels"], other["labels"])
    chosen = one["labels"] != -100
    assert chosen.float().mean().item() == pytest.approx(0.3, abs=0.05)
    ids = torch.tensor([block["input_ids"] for block in blocks])
    assert torch.equal(one["labels"][chosen], ids[chosen])
    assert torch.equal(one["input_ids"][~chosen], ids[~chosen])
    masked = (one["input_ids"] == tokenizer.mask_token_id) & chosen
    assert masked.sum() / chosen.sum() == pytest.approx(0.8, abs=0.1)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Light and dark pictures in colour, ten of either."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, brightness in (("dark", 0), ("light", 155)):
        (folder / name).mkdir()
        for i in range(10):
            pixels = rng.integers(brightness, brightness + 100, (12, 10, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def test_a_folder_of_pictures(pictures: Path, tmp_path: Path) -> None:
    """Its classes are the names of the folders; a model of other classes gets a new head."""
    model = "image_size=8,patch_size=4,hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32"
    data = [f"--dataset_name={pictures}", "--eval_share=0.4", "--learning_rate=1e-2", "--optim=soap"]
    training = [*QUICK[1:], "--max_steps=12"]
    scratch = ["--model_type=vit", f"--config_overrides={model}", f"--output_dir={tmp_path / 'one'}"]
    metrics = run_image_classification.main([*data, *scratch, *training])
    assert metrics["eval_accuracy"] == 1.0, metrics
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config["label2id"] == {"dark": 0, "light": 1}
    tuned = [f"--model_name_or_path={tmp_path / 'one'}", f"--output_dir={tmp_path / 'two'}"]
    metrics = run_image_classification.main(["--dataset_name=digits", *tuned, *QUICK])
    assert metrics["eval_loss"] == pytest.approx(np.log(10), abs=0.5), "a new head knows nothing yet"


def test_digits_are_pixels_in_range() -> None:
    script = run_image_classification.ScriptArguments(model_type="vit")
    train, held_out = run_image_classification.load_pictures(script)
    assert (len(train), len(held_out)) == (1437, 360)
    config: Any = run_image_classification.new_config(script)
    config.image_size, config.num_channels = 8, 1
    batch = run_image_classification.to_pixels(train, script, config)[:64]
    pixels = np.stack(batch["pixel_values"])
    assert pixels.shape == (64, 1, 8, 8)
    assert (pixels.min(), pixels.max()) == (-1, 1)
    counts = np.bincount(held_out["label"], minlength=10)
    assert counts.min() >= 34, "every digit is held out as often as it occurs"
