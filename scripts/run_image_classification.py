"""Trains an image classifier with the Hugging Face Trainer and any optimizer it knows.

From scratch on the handwritten digits that scikit-learn ships:

    python scripts/run_image_classification.py --dataset_name digits --model_type vit \
        --config_overrides image_size=8,patch_size=2,num_channels=1,hidden_size=64,num_attention_heads=4 \
        --optim soap --learning_rate 3e-3 --output_dir outputs/digits

``--dataset_name`` may also be a folder with one folder of pictures per class, or a dataset on the Hub. For arguments
from a file, continued runs and the content of the output folder, see run_clm.py.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from _training import ModelArguments, fit, new_config, option, parse, start
from datasets import ClassLabel, Dataset, Features, Image, load_dataset
from transformers import AutoModelForImageClassification, EvalPrediction, default_data_collator

from hf_soap import SoapTrainer

logger = logging.getLogger("run_image_classification")


@dataclass
class ScriptArguments(ModelArguments):
    """Arguments for the model and the pictures; those for training are in TrainingArguments."""

    dataset_name: str = option("digits", "digits, a folder of folders of pictures, or a name for load_dataset.")
    dataset_config: str | None = option(None, "Configuration of the dataset.")
    image_column: str = option("image", "Column of the dataset with the pictures.")
    label_column: str = option("label", "Column of the dataset with the labels, a ClassLabel.")
    eval_split: str | None = option(None, "Split of the dataset to evaluate on.")
    eval_share: float = option(0.2, "Share of the pictures to hold out, at random, if no split is given.")


def load_digits() -> Dataset:
    """Returns the 1797 handwritten digits of scikit-learn, 8 × 8 pixels in 17 shades of gray."""
    from sklearn import datasets

    digits = datasets.load_digits()
    columns = {"image": list((digits.images * (255 / 16)).round().astype(np.uint8)), "label": digits.target}
    return Dataset.from_dict(columns, features=Features({"image": Image(), "label": ClassLabel(10)}))


def load_pictures(script: ScriptArguments) -> tuple[Dataset, Dataset]:
    """Returns datasets of pictures to train and to evaluate on; the split does not depend on the seed."""
    if script.dataset_name == "digits":
        train = load_digits()
    else:
        train = load_dataset(script.dataset_name, script.dataset_config, split="train")
    if script.eval_split:
        return train, load_dataset(script.dataset_name, script.dataset_config, split=script.eval_split)
    split = train.train_test_split(script.eval_share, seed=0, stratify_by_column=script.label_column)
    return split["train"], split["test"]


def to_pixels(pictures: Dataset, script: ScriptArguments, config: Any) -> Dataset:
    """Converts pictures to float32 pixels in [-1, 1], with the model's size and number of channels."""
    mode = "L" if config.num_channels == 1 else "RGB"

    def convert(batch: dict[str, list[Any]]) -> dict[str, Any]:
        sized = [image.convert(mode).resize((config.image_size,) * 2) for image in batch[script.image_column]]
        pixels = np.stack([np.asarray(image, dtype=np.float32) for image in sized]) / 127.5 - 1
        channels_first = pixels[:, None] if mode == "L" else pixels.transpose(0, 3, 1, 2)
        return {"pixel_values": list(channels_first), "labels": batch[script.label_column]}

    return pictures.with_transform(convert)


def accuracy(predicted: EvalPrediction) -> dict[str, float]:
    """Returns the share of pictures that were classified correctly."""
    return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Trains, evaluates, saves and writes the model card; returns the metrics of training and evaluation."""
    script, args = parse(ScriptArguments, argv)
    args.remove_unused_columns = False  # pictures are converted to pixels only when they enter a batch
    checkpoint = start(args)
    train, held_out = load_pictures(script)
    classes = train.features[script.label_column].names
    labels = {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
    if script.model_name_or_path:
        model = AutoModelForImageClassification.from_pretrained(
            script.model_name_or_path, dtype=script.dtype, ignore_mismatched_sizes=True, **labels
        )
    else:
        config = new_config(script)
        config.update(labels)
        model = AutoModelForImageClassification.from_config(config, dtype=script.dtype)
    logger.info("training %s parameters on %d pictures", f"{model.num_parameters():,}", len(train))
    trainer = SoapTrainer(
        model=model,
        args=args,
        train_dataset=to_pixels(train, script, model.config),
        eval_dataset=to_pixels(held_out, script, model.config),
        data_collator=default_data_collator,
        compute_metrics=accuracy,
    )
    return fit(trainer, checkpoint)


if __name__ == "__main__":
    main()
