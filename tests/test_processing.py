import copy
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from nanovlm_hf import SHIPPED, NanoVLMImageProcessor, NanoVLMProcessor
from nanovlm_hf.processing_nanovlm import CHAT_TEMPLATE

from helpers.models import random_image, tiny_processor

PAD, EOS, IMAGE = 0, 2, 3


def test_the_image_comes_first(processor, tokenizer):
    inputs = processor(images=random_image(), text="There is", return_tensors="pt")
    length = processor.image_seq_length
    assert inputs["input_ids"][0, :length].tolist() == [IMAGE] * length
    assert tokenizer.decode(inputs["input_ids"][0, length:]) == "There is"
    assert inputs["attention_mask"].all()
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}


def test_padding_on_the_left_for_generation(processor):
    inputs = processor(images=[random_image(0), random_image(1)], text=["There is a big", "A"], return_tensors="pt")
    mask = inputs["attention_mask"]
    assert mask[1].tolist() == sorted(mask[1].tolist())
    assert not mask[1].all()
    assert (inputs["input_ids"][mask == 0] == PAD).all()


def test_padding_on_the_right_and_labels_for_training(processor):
    length = processor.image_seq_length
    batch = processor(
        images=[random_image(0), random_image(1)], text=["There is a big", "A"], return_labels=True, return_tensors="pt"
    )
    ids, labels, mask = batch["input_ids"], batch["labels"], batch["attention_mask"]
    assert mask[1].tolist() == sorted(mask[1].tolist(), reverse=True)
    for row in range(2):
        end = int(mask[row].sum())
        assert ids[row, end - 1] == EOS
        assert (labels[row, :length] == -100).all()
        assert torch.equal(labels[row, length:end], ids[row, length:end])
        assert (labels[row, end:] == -100).all()


def test_a_placeholder_in_the_text_is_not_repeated(processor):
    want = processor(images=random_image(), text=" A", return_tensors="pt")["input_ids"]
    for text in ("<image> A", "<image>" * processor.image_seq_length + " A"):
        assert torch.equal(processor(images=random_image(), text=text, return_tensors="pt")["input_ids"], want)


ENDS = ("", " ", "  ", "\n", "\t", " \n\t ", "\r\n", "\u00a0", "\u2003", "\x0b")


@pytest.mark.parametrize("end", ENDS)
def test_whitespace_at_the_ends_of_a_text_is_stripped(processor, end):
    def ids(text, **options):
        return processor(images=random_image(), text=text, **options)["input_ids"]

    want = ids("There is a big")
    placeholders = "<image>" * processor.image_seq_length
    for text in (
        f"There is a big{end}",
        f"{end}There is a big",
        f"<image>{end}There is a big{end}",
        f"{end}<image>There is a big{end}",
        f"{placeholders}{end}There is a big",
    ):
        assert ids(text) == want
    # The same holds for training: no prompt ends with a space that the model could learn.
    assert ids(f"{end}A big dog.{end}", return_labels=True) == ids("A big dog.", return_labels=True)
    assert processor(text=f"{end}A{end}")["input_ids"] == processor(text="A")["input_ids"]
    assert ids(end) == ids(f"<image>{end}") == ids("") == [[IMAGE] * processor.image_seq_length]


def test_whitespace_within_a_text_is_kept(processor, tokenizer):
    for text in ("There  is\ta\nbig", "There is <image> a big", "There is a<image>big"):
        ids = processor(images=random_image(), text=f" {text} ")["input_ids"][0]
        expected = text if "<image>" in text else f"<image>{text}"
        placeholders = "<image>" * processor.image_seq_length
        assert tokenizer.decode(ids) == expected.replace("<image>", placeholders)


@pytest.mark.parametrize("in_text_settings", [False, True])
def test_token_types_are_one_at_the_image(processor, model, in_text_settings):
    asked = {"return_mm_token_type_ids": True}
    settings = {"text_kwargs": asked} if in_text_settings else asked
    images, texts = [random_image(0), random_image(1)], ["There is a big", "A"]
    inputs = processor(images=images, text=texts, return_tensors="pt", **settings)
    assert torch.equal(inputs["mm_token_type_ids"], (inputs["input_ids"] == IMAGE).long())
    assert inputs["mm_token_type_ids"].sum(1).tolist() == [processor.image_seq_length] * 2
    plain = processor(images=images, text=texts, return_tensors="pt")
    assert "mm_token_type_ids" not in plain
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **settings), model.generate(**plain, **settings))


@pytest.mark.parametrize(
    ("text", "replaced"),
    [
        ("<image>There is", (0, 7)),
        (" <image>  There is ", (0, 10)),
        ("There is", (0, 0)),
        ("  There is", (0, 2)),
        ("There is <image> a big", (9, 16)),
        ("", (0, 0)),
        ("<image>", (0, 7)),
    ],
)
def test_replacement_offsets_lead_from_the_text_to_the_prompt(processor, tokenizer, text, replaced):
    inputs = processor(images=random_image(), text=text, return_text_replacement_offsets=True, return_tensors="pt")
    ((offset,),) = inputs["text_replacement_offsets"]
    start, end = offset["span"]
    assert (offset["type"], start, end, offset["text"]) == ("image", *replaced, text[slice(*replaced)])
    prompt = tokenizer.decode(inputs["input_ids"][0])
    assert prompt == (text[:start] + offset["replacement"] + text[end:]).strip()
    assert prompt[slice(*offset["new_span"])] == offset["replacement"] == "<image>" * processor.image_seq_length
    texts = processor(images=[[], [random_image()]], text=["A", text], return_text_replacement_offsets=True)
    assert texts["text_replacement_offsets"] == [[], [offset]]


USER = [{"type": "text", "text": "There is a "}, {"type": "image"}]
ASSISTANT = [{"type": "text", "text": "big dog."}]


@pytest.mark.parametrize(
    ("messages", "prompt"),
    [
        ([("user", USER)], "<image>There is a"),
        ([("user", USER[::-1])], "<image>There is a"),
        ([("system", "Be brief."), ("user", USER)], "<image>There is a"),
        ([("user", USER), ("assistant", ASSISTANT)], "<image>There is a big dog.<eos>"),
        ([("user", USER[1:]), ("assistant", "There is a big dog.")], "<image>There is a big dog.<eos>"),
        ([("user", USER), ("assistant", ASSISTANT), ("user", "It looks")], "<image>There is a big dog. It looks"),
        ([("user", [{"type": "image_url", "image_url": {"url": "a"}}]), ("user", "A")], "<image>A"),
        ([("user", "There is a")], "There is a"),
        ([("user", USER), ("user", USER)], "<image><image>There is a There is a"),
    ],
)
def test_chat_template(tokenizer, messages, prompt):
    messages = [{"role": role, "content": content} for role, content in messages]
    assert tiny_processor(tokenizer).apply_chat_template(messages) == prompt


def test_chat_template_continues_the_last_message(tokenizer):
    messages = [{"role": "user", "content": USER}, {"role": "assistant", "content": ASSISTANT}]
    prompt = tiny_processor(tokenizer).apply_chat_template(messages, continue_final_message=True)
    assert prompt == "<image>There is a big dog."


def test_chat_template_in_tokens(processor):
    def ids(content):
        messages = [{"role": "user", "content": content}]
        return processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")

    image = {"type": "image", "image": random_image()}
    want = processor(images=random_image(), text="There is a", return_tensors="pt")
    found = ids([USER[0], image])
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], want[name]) for name in want)
    with pytest.raises(ValueError, match="2 <image> for 2 images"):
        ids([USER[0], image, image])
    assert ids("There is a")["input_ids"].tolist() == processor(text="There is a")["input_ids"]
    messages = [{"role": "user", "content": [image]}, {"role": "assistant", "content": "There is a"}]
    settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "continue_final_message": True}
    found = processor.apply_chat_template([messages], **settings)
    assert all(torch.equal(found[name], want[name]) for name in want)


@pytest.mark.parametrize("folder", [*SHIPPED.values(), None], ids=[*SHIPPED, "new"])
def test_the_chat_template_is_saved_with_a_checkpoint(folder, saved):
    assert ((folder or saved) / "chat_template.jinja").read_text() == CHAT_TEMPLATE


def test_a_processor_without_template_file_has_the_template(tmp_path, saved):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").unlink()
    assert NanoVLMProcessor.from_pretrained(tmp_path).chat_template == CHAT_TEMPLATE
    (tmp_path / "chat_template.jinja").write_text("own")
    assert NanoVLMProcessor.from_pretrained(tmp_path).chat_template == "own"


@pytest.mark.slow
def test_loading_prints_no_warning(saved):
    code = "import sys, nanovlm_hf, transformers; transformers.AutoProcessor.from_pretrained(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, saved], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def test_images_without_text(processor):
    inputs = processor(images=[random_image(0), random_image(1)], return_tensors="pt")
    assert inputs["input_ids"].tolist() == [[IMAGE] * processor.image_seq_length] * 2
    empty = processor(images=[random_image(0), random_image(1)], text=["", ""], return_tensors="pt")
    assert torch.equal(empty["input_ids"], inputs["input_ids"])


def test_text_without_images_has_no_placeholder(processor):
    assert IMAGE not in processor(text="There is")["input_ids"][0]


def test_texts_may_have_no_image(processor):
    inputs = processor(images=[[], [random_image()]], text=["A", "A"], return_tensors="pt")
    assert inputs["pixel_values"].shape[0] == 1
    assert (inputs["input_ids"] == IMAGE).sum(1).tolist() == [0, processor.image_seq_length]


def test_no_text_has_an_image(processor, model):
    inputs = processor(images=[[], []], text=["A", "A big"], return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[0] == 2


def test_batches_may_be_tuples(processor):
    images, texts = zip(*[(random_image(0), "A"), (random_image(1), "A big")], strict=True)
    inputs = processor(images=images, text=texts, return_tensors="pt")
    want = processor(images=list(images), text=list(texts), return_tensors="pt")
    assert all(torch.equal(inputs[name], want[name]) for name in want)


def test_labels_keep_the_end_of_text_if_it_is_the_pad_token(tokenizer):
    processor = tiny_processor(copy.deepcopy(tokenizer))
    arguments = {"images": [random_image(0), random_image(1)], "text": ["There is a big", "A"], "return_labels": True}
    want = processor(**arguments, return_tensors="pt")
    processor.tokenizer.pad_token = "<eos>"
    got = processor(**arguments, return_tensors="pt")
    assert torch.equal(got["labels"], want["labels"])
    assert (got["labels"] == EOS).sum(1).tolist() == [1, 1]
    bare = processor(**arguments, return_tensors="pt", return_attention_mask=False)
    assert torch.equal(bare["labels"], want["labels"])
    assert "attention_mask" not in bare


@pytest.mark.parametrize("text", ["\ud83d", "a \udc36 dog", "\udc36\ud83d", "<image> \ud800"])
def test_lone_surrogates_are_replaced(processor, text):
    clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    for texts in ((text, clean), ([text, "A"], [clean, "A"])):
        got, want = (processor(images=[random_image()] * (1 + isinstance(one, list)), text=one) for one in texts)
        assert got["input_ids"] == want["input_ids"]


@pytest.mark.parametrize(
    "conversation",
    [
        [],
        (),
        [[]],
        None,
        "hello",
        {},
        [None],
        ["hello"],
        [{}],
        [{"content": "A"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": ["A"]}],
        [{"role": "user", "content": [{"text": "A"}]}],
        [{"role": "user", "content": [{"type": "text", "text": None}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [[{"role": "user", "content": "A"}], [{"role": "user", "content": [{"type": "text", "text": 5}]}]],
    ],
    ids=str,
)
def test_invalid_conversations_are_refused(tokenizer, conversation):
    with pytest.raises(ValueError, match=r"conversation|message"):
        tiny_processor(tokenizer).apply_chat_template(conversation)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give images, text or both"),
        ({"images": [random_image(0), random_image(1)], "text": "A"}, "2 images and 1 texts"),
        ({"images": random_image(), "text": "A <image> <image>"}, "one image for each text"),
        ({"images": [[random_image(0), random_image(1)]], "text": ["A"]}, "one image for each text"),
        ({"images": [[]], "text": ["<image> A"]}, "one image for each text"),
        *(
            ({"images": random_image(), "text": text}, "a string or a list of strings")
            for text in ([["A"]], 5, {"a": 1}, {"A"}, b"A", [None], ["A", 1])
        ),
        ({"text": []}, "text is an empty list"),
        ({"images": [], "text": []}, "images is empty"),
        ({"images": np.zeros((0, 3, 4, 4), np.uint8)}, "images is empty"),
        ({"images": [np.zeros((0, 3, 4, 4), np.uint8)], "text": ["A"]}, "images is empty"),
        *(
            ({"images": images, "text": ["A", "A"]}, "images must be")
            for images in ([random_image(), None], [[random_image()], None], {"a": 1}, b"A", 5, iter([random_image()]))
        ),
        ({"videos": [[random_image()]], "text": "A"}, "videos: this model takes images and text only"),
        ({"images": random_image(), "audio": [0.0]}, "audio: this model takes images and text only"),
    ],
)
def test_invalid_inputs_are_refused(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


def test_images_go_to_the_device_that_is_asked_for(processor):
    inputs = processor(images=random_image(), text="A", return_tensors="pt", device="meta")
    assert inputs["pixel_values"].device.type == "meta"
    assert inputs["input_ids"].device.type == "cpu"
    with pytest.raises(ValueError, match="device"):
        processor(images=random_image(), text="A", device="meta")


def test_truncation_within_the_image_tokens_is_refused(processor):
    if processor.image_seq_length == 1:
        assert processor(images=random_image(), text="A big", truncation=True, max_length=2)["input_ids"][0][0] == IMAGE
        return
    with pytest.raises(ValueError, match="max_length cuts into"):
        processor(images=random_image(), text="A", truncation=True, max_length=2)


def test_a_tokenizer_without_image_token_is_refused():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])))
    with pytest.raises(ValueError, match="has no <image> token"):
        NanoVLMProcessor(NanoVLMImageProcessor(), other)


@pytest.mark.parametrize(
    "text", ["A  big\tdog!\n", "Ünïcödé 🐶 漢字", "CAPITALS and don't", " leading", "<b>bold</b> & more"]
)
def test_the_tokenizer_round_trips_every_text(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_have_the_ids_of_the_configs(tokenizer):
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<bos>", "<eos>", "<image>"]) == [0, 1, 2, 3]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


def test_round_trip(tmp_path, processor):
    processor.save_pretrained(tmp_path)
    loaded = NanoVLMProcessor.from_pretrained(tmp_path)
    assert loaded.image_seq_length == processor.image_seq_length
    arguments = {"images": [random_image(0), random_image(1)], "text": ["There is a big", "A"], "return_tensors": "pt"}
    for name, value in processor(**arguments).items():
        assert torch.equal(loaded(**arguments)[name], value)


def test_decoding(tokenizer):
    processor = tiny_processor(tokenizer)
    ids = processor(images=random_image(), text="A big dog")["input_ids"]
    assert processor.batch_decode(ids, skip_special_tokens=True) == ["A big dog"]
    assert processor.decode(ids[0]) == "<image>A big dog"
    assert processor.post_process_image_text_to_text(ids) == ["A big dog"]


def test_number_of_image_tokens_for_serving_engines(processor):
    counts = processor._get_num_multimodal_tokens(image_sizes=[[480, 640], [10, 10]])
    assert counts["num_image_tokens"] == [processor.image_seq_length] * 2
