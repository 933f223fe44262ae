"""What Transformers does around a model: pipelines, Trainer."""

import pytest
import torch
from conftest import picture, tiny_model, tiny_processor
from transformers import Trainer, TrainingArguments, pipeline

from nanovlm_hf import NanoVLMForConditionalGeneration


def greedy_text(model, processor, image, prefix):
    inputs = processor(images=image, text=prefix, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return processor.batch_decode(tokens, skip_special_tokens=True)[0]


@pytest.mark.parametrize("by_path", [False, True])
def test_image_text_to_text_pipeline(saved, tokenizer, by_path):
    model, processor = tiny_model(), tiny_processor(tokenizer)
    # Without auto_map in the folder no version asks whether it may run remote code.
    pipe = pipeline(
        "image-text-to-text", **({"model": str(saved)} if by_path else {"model": model, "processor": processor})
    )
    pictures, prefixes = [picture(0), picture(1)], ["There is a big", "A"]
    one = pipe(images=pictures[0], text=prefixes[0], max_new_tokens=8, generate_kwargs={"do_sample": False})
    want = greedy_text(model, processor, pictures[0], prefixes[0])
    assert one[0]["generated_text"] == want
    assert want.startswith(prefixes[0])
    both = pipe(images=pictures, text=prefixes, max_new_tokens=8, generate_kwargs={"do_sample": False})
    texts = [(answer[0] if isinstance(answer, list) else answer)["generated_text"] for answer in both]
    assert texts == [greedy_text(model, processor, *pair) for pair in zip(pictures, prefixes, strict=True)]


def test_trainer_takes_steps_saves_and_goes_on(tmp_path, tokenizer):
    processor = tiny_processor(tokenizer)
    rows = [{"image": picture(seed), "text": f"There is a big {word}."} for seed, word in enumerate(["dog", "bus"] * 4)]

    def collate(batch):
        return processor(
            images=[row["image"] for row in batch],
            text=[row["text"] for row in batch],
            return_labels=True,
            return_tensors="pt",
        )

    def trainer(steps: int) -> Trainer:
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            logging_steps=1,
            save_steps=2,
            remove_unused_columns=False,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        return Trainer(tiny_model(), arguments, data_collator=collate, train_dataset=rows, processing_class=processor)

    first = trainer(4)
    first.train()
    losses = [row["loss"] for row in first.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    loaded = NanoVLMForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-4")
    for name, weight in loaded.state_dict().items():
        torch.testing.assert_close(weight, first.model.state_dict()[name])
    second = trainer(6)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert second.state.global_step == 6
