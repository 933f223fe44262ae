"""The same model through Transformers' own `Trainer`, where its conveniences count for more than speed.

`python training/with_trainer.py --dataset data --output_dir runs/trainer [any field of TrainingArguments]`
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from datasets import load_dataset
from on_cpu import write_out_attention
from transformers import AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments, set_seed

from nanovlm_hf import NanoVLMConfig, NanoVLMForConditionalGeneration, NanoVLMImageProcessor, NanoVLMProcessor
from nanovlm_hf.checkpoints import SHIPPED


@dataclass
class DataArguments:
    dataset: str = field(metadata={"help": "folder or Hub id of a dataset that `nanovlm data build` wrote"})
    variant: str = field(default="short", metadata={"help": "short or long"})
    preset: str = field(default="mini", metadata={"help": "mini, base or large"})


def collate(processor: NanoVLMProcessor, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Photos and descriptions as model inputs with labels."""
    images, texts = [row["image"] for row in rows], [row["description"] for row in rows]
    return dict(processor(images=images, text=texts, return_labels=True, return_tensors="pt"))


def main() -> Trainer:
    data, settings = HfArgumentParser((DataArguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(settings.seed)
    settings.remove_unused_columns = False  # the collator needs the photos, which are no argument of the model
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED["mini-short"])
    config = NanoVLMConfig.from_preset(data.preset, vocab_size=len(tokenizer))
    processor = NanoVLMProcessor(NanoVLMImageProcessor(), tokenizer, image_seq_length=config.image_seq_length)
    dataset = load_dataset(data.dataset, data.variant)
    model = NanoVLMForConditionalGeneration(config)
    if settings.bf16 and settings.device.type == "cpu":
        write_out_attention(model)
    trainer = Trainer(
        model=model,
        args=settings,
        data_collator=partial(collate, processor),
        train_dataset=dataset["train"],
        eval_dataset=dataset["validation"],
        processing_class=processor,
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
