import pytest
import torch
from conftest import picture, tiny_processor

from nanovlm_hf import NanoVLMImageProcessor, NanoVLMProcessor

PAD, EOS, IMAGE = 0, 2, 3


def test_the_picture_comes_first(processor, tokenizer):
    inputs = processor(images=picture(), text="There is", return_tensors="pt")
    length = processor.image_seq_length
    assert inputs["input_ids"][0, :length].tolist() == [IMAGE] * length
    assert tokenizer.decode(inputs["input_ids"][0, length:]) == "There is"
    assert inputs["attention_mask"].all()
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}


def test_for_generation_padding_is_on_the_left(processor):
    inputs = processor(images=[picture(0), picture(1)], text=["There is a big", "A"], return_tensors="pt")
    mask = inputs["attention_mask"]
    assert mask[1].tolist() == sorted(mask[1].tolist())
    assert not mask[1].all()
    assert (inputs["input_ids"][mask == 0] == PAD).all()


def test_for_training_padding_is_on_the_right_and_only_the_text_is_learned(processor):
    length = processor.image_seq_length
    batch = processor(
        images=[picture(0), picture(1)], text=["There is a big", "A"], return_labels=True, return_tensors="pt"
    )
    ids, labels, mask = batch["input_ids"], batch["labels"], batch["attention_mask"]
    assert mask[1].tolist() == sorted(mask[1].tolist(), reverse=True)
    for row in range(2):
        end = int(mask[row].sum())
        assert ids[row, end - 1] == EOS
        assert (labels[row, :length] == -100).all()
        assert torch.equal(labels[row, length:end], ids[row, length:end])
        assert (labels[row, end:] == -100).all()


def test_a_placeholder_in_the_text_is_not_doubled(processor):
    want = processor(images=picture(), text=" A", return_tensors="pt")["input_ids"]
    for text in ("<image> A", "<image>" * processor.image_seq_length + " A"):
        assert torch.equal(processor(images=picture(), text=text, return_tensors="pt")["input_ids"], want)


def test_no_text_lets_the_model_begin(processor):
    inputs = processor(images=[picture(0), picture(1)], return_tensors="pt")
    assert inputs["input_ids"].tolist() == [[IMAGE] * processor.image_seq_length] * 2
    empty = processor(images=[picture(0), picture(1)], text=["", ""], return_tensors="pt")
    assert torch.equal(empty["input_ids"], inputs["input_ids"])


def test_text_alone_gets_no_placeholder(processor):
    assert IMAGE not in processor(text="There is")["input_ids"][0]


def test_a_text_may_go_without_a_picture(processor):
    inputs = processor(images=[[], [picture()]], text=["A", "A"], return_tensors="pt")
    assert inputs["pixel_values"].shape[0] == 1
    assert (inputs["input_ids"] == IMAGE).sum(1).tolist() == [0, processor.image_seq_length]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give images, text or both"),
        ({"images": [picture(0), picture(1)], "text": "A"}, "2 images and 1 texts"),
        ({"images": picture(), "text": "A <image> <image>"}, "one picture a text"),
        ({"images": [[picture(0), picture(1)]], "text": ["A"]}, "one picture a text"),
        ({"images": [[]], "text": ["<image> A"]}, "one picture a text"),
        ({"images": picture(), "text": [["A"]]}, "a string or a list of strings"),
    ],
)
def test_wrong_inputs(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


def test_truncation_may_not_cut_the_picture(processor):
    if processor.image_seq_length == 1:
        assert processor(images=picture(), text="A big", truncation=True, max_length=2)["input_ids"][0][0] == IMAGE
        return
    with pytest.raises(ValueError, match="max_length cuts into"):
        processor(images=picture(), text="A", truncation=True, max_length=2)


def test_a_tokenizer_without_image_token_is_refused():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])))
    with pytest.raises(ValueError, match="has no <image> token"):
        NanoVLMProcessor(NanoVLMImageProcessor(), other)


@pytest.mark.parametrize(
    "text", ["A  big\tdog!\n", "Ünïcödé 🐶 漢字", "CAPITALS and don't", " leading", "<b>bold</b> & more"]
)
def test_the_tokenizer_gives_every_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_have_the_ids_of_the_configs(tokenizer):
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<bos>", "<eos>", "<image>"]) == [0, 1, 2, 3]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


def test_round_trip(tmp_path, processor):
    processor.save_pretrained(tmp_path)
    loaded = NanoVLMProcessor.from_pretrained(tmp_path)
    assert loaded.image_seq_length == processor.image_seq_length
    arguments = {"images": [picture(0), picture(1)], "text": ["There is a big", "A"], "return_tensors": "pt"}
    for name, value in processor(**arguments).items():
        assert torch.equal(loaded(**arguments)[name], value)


def test_decoding(tokenizer):
    processor = tiny_processor(tokenizer)
    ids = processor(images=picture(), text="A big dog")["input_ids"]
    assert processor.batch_decode(ids, skip_special_tokens=True) == ["A big dog"]
    assert processor.decode(ids[0]) == "<image>A big dog"
    assert processor.post_process_image_text_to_text(ids) == ["A big dog"]


def test_tokens_of_a_picture_for_serving_engines(processor):
    counts = processor._get_num_multimodal_tokens(image_sizes=[[480, 640], [10, 10]])
    assert counts["num_image_tokens"] == [processor.image_seq_length] * 2
