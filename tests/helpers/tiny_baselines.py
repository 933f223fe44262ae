"""Small, randomly initialised models of the baselines' classes, with processors made on the spot, as folders."""

import string
from pathlib import Path

import transformers
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from tokenizers import decoders as token_decoders
from transformers import PreTrainedTokenizerFast

from nanovlm_hf.data.tokenizer import train_tokenizer

LETTERS = string.ascii_lowercase + string.digits + string.punctuation
IMAGE = {"height": 32, "width": 32}


def bert_tokenizer(folder: Path) -> transformers.BertTokenizerFast:
    """Word pieces: every letter, alone and within a word."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words))
    return transformers.BertTokenizerFast.from_pretrained(folder)


def blip(folder: Path) -> Path:
    tokenizer = bert_tokenizer(folder)
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "encoder_hidden_size": 32, "intermediate_size": 64}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.BlipConfig(text_config=text, vision_config=vision | {"image_size": 32})
    transformers.BlipForConditionalGeneration(config).save_pretrained(folder)
    transformers.BlipProcessor(transformers.BlipImageProcessor(size=IMAGE), tokenizer).save_pretrained(folder)
    return folder


def git(folder: Path) -> Path:
    tokenizer = bert_tokenizer(folder)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.GitConfig(
        vision_config=vision | {"image_size": 32, "patch_size": 16},
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=2,
        eos_token_id=3,
    )
    transformers.GitForCausalLM(config).save_pretrained(folder)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=IMAGE)
    transformers.GitProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def kosmos2(folder: Path) -> Path:
    letters = [(f"{mark}{letter}", -float(place)) for place, letter in enumerate(LETTERS) for mark in ("", "▁")]
    tokenizer = Tokenizer(
        models.Unigram(
            [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -50.0), ("▁", -20.0), *letters], unk_id=3
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = token_decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    fast = transformers.XLMRobertaTokenizerFast(tokenizer_object=tokenizer, **special)
    processor = transformers.Kosmos2Processor(
        transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=IMAGE), fast, num_patch_index_tokens=4
    )
    text = {"vocab_size": len(processor.tokenizer), "embed_dim": 32, "layers": 2, "ffn_dim": 64, "attention_heads": 4}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Kosmos2Config(
        text_config=text, vision_config=vision | {"image_size": 32, "patch_size": 16}, latent_query_num=64
    )
    transformers.Kosmos2ForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def smolvlm(folder: Path) -> Path:
    """SmolVLM-256M is an Idefics3 model."""
    tokens = ["<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>"]
    base = train_tokenizer(["a dog sees the red ball and a cat on the green grass"], vocab_size=290)
    special = {"pad_token": "<pad>", "bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>"}
    special |= {"model_input_names": ["input_ids", "attention_mask"]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base.backend_tokenizer, **special)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in tokens], special_tokens=True)
    template = (
        "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:"
        "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
        "{% else %}<image>{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}Assistant:"
    )
    images = transformers.Idefics3ImageProcessor(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}, do_image_splitting=False
    )
    processor = transformers.Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template)
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "model_type": "llama"}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Idefics3Config(
        text_config=text,
        vision_config=vision | {"image_size": 32, "patch_size": 8},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    transformers.Idefics3ForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
