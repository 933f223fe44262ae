"""Pipelines and Trainer of Transformers."""

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments, pipeline

from nanovlm_hf import NanoVLMForConditionalGeneration

from helpers.models import random_image, tiny_model, tiny_processor


def greedy_text(model, processor, image, prefix):
    inputs = processor(images=image, text=prefix, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return processor.batch_decode(tokens, skip_special_tokens=True)[0]


@pytest.mark.parametrize("by_path", [False, True])
def test_image_text_to_text_pipeline(saved, tokenizer, by_path):
    model, processor = tiny_model(), tiny_processor(tokenizer)
    # Without auto_map in the folder, no version asks about remote code.
    pipe = pipeline(
        "image-text-to-text", **({"model": str(saved)} if by_path else {"model": model, "processor": processor})
    )
    images, prefixes = [random_image(0), random_image(1)], ["There is a big", "A"]
    one = pipe(images=images[0], text=prefixes[0], max_new_tokens=8, generate_kwargs={"do_sample": False})
    want = greedy_text(model, processor, images[0], prefixes[0])
    assert one[0]["generated_text"] == want
    assert want.startswith(prefixes[0])
    both = pipe(images=images, text=prefixes, max_new_tokens=8, generate_kwargs={"do_sample": False})
    texts = [(answer[0] if isinstance(answer, list) else answer)["generated_text"] for answer in both]
    assert texts == [greedy_text(model, processor, *pair) for pair in zip(images, prefixes, strict=True)]


def test_image_text_to_text_pipeline_with_messages(saved, tokenizer):
    model, processor = tiny_model(), tiny_processor(tokenizer)
    pipe = pipeline("image-text-to-text", model=str(saved))

    def answer(*messages, **options):
        settings = {"max_new_tokens": 8, "generate_kwargs": {"do_sample": False}}  # the pipeline changes it
        return pipe(text=list(messages), **settings, **options)[0]["generated_text"]

    user = {
        "role": "user",
        "content": [{"type": "image", "image": random_image()}, {"type": "text", "text": "There is a big"}],
    }
    want = greedy_text(model, processor, random_image(), "There is a big")
    completion = answer(user, return_full_text=False)
    assert "There is a big" + completion == want
    assert answer(user)[-1] == {"role": "assistant", "content": completion}
    begun = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
    want = greedy_text(model, processor, random_image(), "There is a big red")
    assert "There is a big red" + answer(user, begun, return_full_text=False) == want


@pytest.mark.slow
def test_whitespace_after_a_prompt_does_not_change_the_completion(saved, tokenizer):
    """Check the processor, the pipeline and `nanovlm evaluate`."""
    from nanovlm_hf.evaluation.generators import load_generator

    model, processor = tiny_model(), tiny_processor(tokenizer)
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    generator = load_generator(str(saved), max_new_tokens=8)
    prompt = "There is a big"
    want = greedy_text(model, processor, random_image(), prompt)

    def completion(text: str) -> str:
        settings = {"max_new_tokens": 8, "generate_kwargs": {"do_sample": False}, "return_full_text": False}
        return pipe(images=random_image(), text=text, **settings)[0]["generated_text"]

    completed, generated = completion(prompt), generator.complete(random_image(), prompt)
    assert completed
    for end in (" ", "  ", "\n", "\t\n ", "\u00a0"):
        for text in (prompt + end, end + prompt, f"<image>{end}{prompt}{end}"):
            assert greedy_text(model, processor, random_image(), text) == want
            assert completion(text) == completed
        assert generator.complete(random_image(), prompt + end) == generated


@pytest.mark.slow
def test_trainer_trains_saves_and_resumes(tmp_path, tokenizer):
    processor = tiny_processor(tokenizer)
    rows = [
        {"image": random_image(seed), "text": f"There is a big {word}."} for seed, word in enumerate(["dog", "bus"] * 4)
    ]

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


@pytest.mark.slow
def test_sft_trainer_learns_from_messages(tmp_path, tokenizer):
    from trl import SFTConfig, SFTTrainer

    def row(seed: int, word: str) -> dict:
        user = [{"type": "image"}, {"type": "text", "text": "There is a"}]
        assistant = [{"type": "text", "text": f"big {word}."}]
        messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        return {"images": [random_image(seed)], "messages": messages}

    arguments = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=5,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        max_length=None,  # truncation could cut into image tokens
        bf16=False,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    data = Dataset.from_list([row(seed, word) for seed, word in enumerate(["dog", "bus"] * 2)])
    trainer = SFTTrainer(tiny_model(), arguments, train_dataset=data, processing_class=tiny_processor(tokenizer))
    batch = trainer.data_collator([trainer.train_dataset[0]])
    assert tokenizer.decode(batch["input_ids"][0]) == "<image>There is a big dog.<eos>"
    assert tokenizer.decode(batch["labels"][0, -2:]) == ".<eos>", "the model learns to stop"
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 5
    assert losses[-1] < losses[0] - 1
