"""Checkpoints that are damaged, hostile or of another model: an error of one line, no code executed, no hang."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovlm_hf import InputError, NanoVLMForConditionalGeneration
from nanovlm_hf.completion import complete, stream
from nanovlm_hf.errors import UsageError
from nanovlm_hf.evaluation.generators import load_generator, public_name, short_name
from nanovlm_hf.export.runtime import OnnxModel
from nanovlm_hf.loading import load_config, load_model

from helpers.memory import measured
from helpers.models import random_image, tiny_model
from helpers.output import only_line

EMBEDDING, NORM = "model.language_model.embed_tokens.weight", "model.language_model.norm.weight"


@pytest.fixture
def folder(tmp_path, saved) -> Path:
    path = tmp_path / "odd"
    shutil.copytree(saved, path)
    return path


def edit(file: str, *place, value=None):
    """Return a function that sets one value in a JSON file of a folder."""

    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        holder = content
        for key in place[:-1]:
            holder = holder[key]
        holder[place[-1]] = value
        (folder / file).write_text(json.dumps(content))

    return change


def write(file: str, content: str | bytes):
    def change(folder: Path) -> None:
        (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def weights(change):
    """A function that changes the tensors of a folder."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def fill(key: str, value: float):
    return weights(lambda tensors: tensors[key].view(-1)[3:4].fill_(value))


def header_of(length: int):
    return write("model.safetensors", length.to_bytes(8, "little") + b"{}")


def instead(file: str, make):
    def change(folder: Path) -> None:
        (folder / file).unlink()
        make(folder / file)

    return change


def index(folder: Path, names: dict[str, str]) -> None:
    (folder / "model.safetensors").rename(folder / "all.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def cut_the_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


REPLACE = {"type": "Replace", "pattern": {"String": "x"}, "content": "x" * 1000}
SPLIT = {"type": "Split", "pattern": {"Regex": "(?<!x"}, "behavior": "Isolated", "invert": False}
ADDS = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 2, "special_tokens": {}}
VISION, TEXT = "vision_config", "text_config"
HUGE = {"height": 100_000, "width": 100_000}
ODD = {
    "config: empty file": (write("config.json", ""), "config.json: not JSON"),
    "config: empty object": (write("config.json", "{}"), "this is a model of type None"),
    "config: list": (write("config.json", "[]"), "config.json: not a JSON object"),
    "config: deep": (write("config.json", "[" * 100_000), "config.json: JSON nested too deeply"),
    "config: not UTF-8": (write("config.json", b"\xff\xfe\x00"), "config.json: not UTF-8"),
    "config: large": (write("config.json", " " * 2**21), "config.json: 2,097,152 bytes"),
    "config: folder": (instead("config.json", Path.mkdir), "config.json: this is a folder"),
    "config: FIFO": (instead("config.json", os.mkfifo), "config.json: not a regular file"),
    "config: device": (instead("config.json", lambda path: path.symlink_to("/dev/zero")), "not a regular file"),
    "config: layers": (edit("config.json", VISION, "num_hidden_layers", value=10**6), "num_hidden_layers=1000000"),
    "config: more layers": (edit("config.json", TEXT, "num_hidden_layers", value=900), "the weights have"),
    "config: fewer layers": (edit("config.json", TEXT, "num_hidden_layers", value=1), "does not ask for weight"),
    "config: vocabulary": (edit("config.json", TEXT, "vocab_size", value=9_000_000), "the weights have"),
    "config: width": (edit("config.json", TEXT, "hidden_size", value=65_536), "the limit is 1,000,000,000"),
    "config: image": (edit("config.json", VISION, "image_size", value=4096), "the limit is 1024 x 1024"),
    "config: patches": (edit("config.json", VISION, "image_size", value=48), "the model takes 48 x 48"),
    "config: channels": (edit("config.json", VISION, "num_channels", value=1), "takes 1 channels, an image has 3"),
    "config: text_config": (edit("config.json", TEXT, value=[]), "text_config is a list"),
    "config: image token": (edit("config.json", "image_token_id", value=5), "<image> at 3, config.json at 5"),
    "config: image token far": (edit("config.json", "image_token_id", value=10**6), "image_token_id=1000000"),
    "config: quantized": (edit("config.json", "quantization_config", value={"quant_method": "x"}), "quantized"),
    "weights: none": (lambda folder: (folder / "model.safetensors").unlink(), "there is no model.safetensors"),
    "weights: empty": (write("model.safetensors", ""), "not a safetensors file"),
    "weights: Git LFS pointer": (
        write("model.safetensors", "version https://git-lfs.github.com/"),
        "not a safetensors",
    ),
    "weights: header": (header_of(2**62), "not a safetensors file"),
    "weights: cut": (cut_the_weights, "not a safetensors file"),
    "weights: folder": (instead("model.safetensors", Path.mkdir), "not a regular file"),
    "weights: FIFO": (instead("model.safetensors", os.mkfifo), "not a regular file"),
    "weights: NaN": (fill(EMBEDDING, float("nan")), "embed_tokens.weight holds NaN or infinity"),
    "weights: infinity": (
        fill("model.vision_tower.embeddings.cls_token", float("-inf")),
        "cls_token holds NaN or infinity",
    ),
    "weights: integers": (
        weights(lambda t: t.update({EMBEDDING: t[EMBEDDING].long()})),
        "is I64, not a floating point",
    ),
    "weights: one more": (weights(lambda t: t.update(extra=torch.zeros(3))), "does not ask for weight extra"),
    "weights: many more": (weights(lambda t: t.update(extra=torch.zeros(10**6))), "take both from one model"),
    "weights: many tensors": (weights(lambda t: t.update({f"x{n}": torch.zeros(1) for n in range(999)})), "tensors"),
    "weights: one less": (weights(lambda t: t.pop(NORM)), f"the weights lack {NORM}"),
    "weights: shape": (weights(lambda t: t.update({EMBEDDING: torch.zeros(10, 32)})), "has another shape"),
    "weights: another head": (
        weights(lambda t: t.update({"lm_head.weight": t[EMBEDDING] + 1})),
        "config.json ties them",
    ),
    "index: outside": (lambda folder: index(folder, {"a": "../all.safetensors"}), "is not a file of this folder"),
    "index: absolute": (lambda folder: index(folder, {"a": "/etc/passwd"}), "is not a file of this folder"),
    "index: missing": (lambda folder: index(folder, {"a": "none.safetensors"}), "there is no none.safetensors"),
    "index: no map": (lambda folder: index(folder, []), "weight_map: Input should be a valid dictionary"),
    "adapter": (write("adapter_config.json", "{}"), "this folder holds an adapter"),
    "tokenizer: not JSON": (write("tokenizer.json", "{"), "tokenizer.json: not JSON"),
    "tokenizer: large": (write("tokenizer.json", " " * (2**24 + 1)), "tokenizer.json: 16,777,217 bytes"),
    "tokenizer: normalizer": (edit("tokenizer.json", "normalizer", value=REPLACE), "tokenizer.json: normalizer"),
    "tokenizer: regex": (edit("tokenizer.json", "pre_tokenizer", value=SPLIT), "tokenizer.json: pre_tokenizer.type"),
    "tokenizer: template": (edit("tokenizer.json", "post_processor", value=ADDS), "tokenizer.json: post_processor"),
    "tokenizer: suffix": (edit("tokenizer.json", "model", "end_of_word_suffix", value="é"), "end_of_word_suffix"),
    "tokenizer: dropout": (edit("tokenizer.json", "model", "dropout", value=0.5), "model.dropout"),
    "tokenizer: long token": (
        edit("tokenizer.json", "model", "vocab", "a" * 201, value=9999),
        "at most 200 characters",
    ),
    "tokenizer: kind": (edit("tokenizer.json", "model", value={"type": "WordLevel", "vocab": {}}), "model.type"),
    "tokenizer: hole": (
        edit("tokenizer.json", "model", "vocab", "a", value=9999),
        "ids of its vocabulary are not 0 to",
    ),
    "tokenizer: merges": (
        edit("tokenizer.json", "model", "merges", value=[["zz", "zzz"]]),
        "tokenizer.json: cannot be",
    ),
    "tokenizer: added": (edit("tokenizer.json", "added_tokens", value=[{"id": -1, "content": ""}]), "added_tokens"),
    "tokenizer_config: list": (write("tokenizer_config.json", "[1]"), "tokenizer_config.json: not a JSON object"),
    "tokenizer_config: pad": (
        edit("tokenizer_config.json", "pad_token", value=None),
        "tokenizer_config.json: pad_token",
    ),
    "tokenizer_config: other": (
        edit("tokenizer_config.json", "eos_token", value="</s>"),
        "tokenizer.json: no token </s>",
    ),
    "preprocessor: none": (lambda folder: (folder / "preprocessor_config.json").unlink(), "there is no preprocessor_"),
    "preprocessor: processor's length": (edit("processor_config.json", "image_seq_length", value=196), "asks for 1"),
    "decoding: wrong type": (
        edit("generation_config.json", "num_beams", value="4"),
        "generation_config.json: num_beams",
    ),
    "decoding: beams": (edit("generation_config.json", "num_beams", value=10**6), "generation_config.json: num_beams"),
    "decoding: NaN": (edit("generation_config.json", "temperature", value=float("nan")), "temperature"),
    "decoding: list": (write("generation_config.json", "[]"), "generation_config.json: not a JSON object"),
    "decoding: token": (edit("generation_config.json", "suppress_tokens", value=[320]), "names token 320"),
}
IDS = list(range(320))
for _kind in ("pad", "bos", "eos"):
    for _token in ("A", "<image>"):
        ODD[f"tokenizer_config: {_kind} {_token}"] = (
            edit("tokenizer_config.json", f"{_kind}_token", value=_token),
            f"tokenizer_config.json: {_kind}_token is",
        )
    _field = f"{_kind}_token_id"
    for _value in ([], [0, 320], "0", -1, 320, True, *([] if _kind == "eos" else [[0, 1], [1]])):
        ODD[f"config: {_field} {_value}"] = (edit("config.json", _field, value=_value), f"config.json: {_field}=")
        _message = f"generation_config.json: {_field}"
        ODD[f"decoding: {_field} {_value}"] = (edit("generation_config.json", _field, value=_value), _message)
for _field, _value in (
    *(("bad_words_ids", value) for value in ([], [[]], [[1], []], [1], [[320]])),
    *(("temperature", 1e-30), ("repetition_penalty", 1e-30), ("length_penalty", 1e30), ("num_beams", 1000)),
    *(("max_new_tokens", 0), ("max_length", 0), ("begin_suppress_tokens", [[1]]), ("suppress_tokens", [True])),
):
    ODD[f"decoding: {_field} {_value}"] = (
        edit("generation_config.json", _field, value=_value),
        f"config.json: {_field}",
    )
for _field, _value in (
    *(("suppress_tokens", IDS), ("begin_suppress_tokens", IDS), ("bad_words_ids", [[one] for one in IDS])),
    ("suppress_tokens", [one for one in IDS if one != 2]),
):
    _message = "generation_config.json: suppress_tokens and begin_suppress_tokens and bad_words_ids leave no token"
    ODD[f"decoding: {_field} {len(_value)}"] = (edit("generation_config.json", _field, value=_value), _message)
for _name, _field, _value in (
    *(("size", "size", {"height": size, "width": size}) for size in (0, 64, 100_000, -1, "32")),
    *(("mean", "image_mean", mean) for mean in ("abc", [0.5, 0.5], [0.5, 0.5, float("nan")], None, [1, 1, True])),
    *(("std", "image_std", std) for std in ([0, 1, 1], [1e-300] * 3)),
    *((name, name, value) for name, value in (("resample", 9), ("do_resize", False), ("do_convert_rgb", False))),
):
    ODD[f"preprocessor: {_name} {_value}"] = (edit("preprocessor_config.json", _field, value=_value), _field)


@pytest.mark.parametrize(("change", "message"), ODD.values(), ids=ODD.keys())
def test_an_invalid_checkpoint_is_refused_in_one_line(folder, change, message):
    change(folder)
    with pytest.raises(InputError) as refusal:
        load_model(str(folder))
    text = str(refusal.value)
    assert message in text
    assert text.startswith(str(folder))
    assert "\n" not in text


def test_settings_that_exclude_all_tokens_are_not_called_damaged_weights(folder):
    edit("generation_config.json", "no_repeat_ngram_size", value=1)(folder)
    edit("generation_config.json", "suppress_tokens", value=[one for one in IDS if one not in (2, 70, 71)])(folder)
    edit("generation_config.json", "min_new_tokens", value=20)(folder)
    model, processor = load_model(str(folder))
    with pytest.raises(InputError, match="no token is left to generate"):
        list(stream(model, processor, random_image()))


@pytest.mark.parametrize("token", ["<eos>", "<pad>", "<bos>", "<image>", "<sep>"])
def test_special_tokens_in_a_prefix_are_refused(folder, token):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"].append(content["added_tokens"][2] | {"id": 70, "content": "<sep>"})
    vocabulary = content["model"]["vocab"]
    old = next(text for text, number in vocabulary.items() if number == 70)
    content["model"]["vocab"] = {"<sep>" if text == old else text: number for text, number in vocabulary.items()}
    content["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(content))
    model, processor = load_model(str(folder))
    exported = OnnxModel.__new__(OnnxModel)
    exported.tokenizer, exported.image_token_id, exported.image_tokens = processor.tokenizer.backend_tokenizer, 3, 1
    prefix = f"A {token} dog"
    for use in (lambda: list(stream(model, processor, random_image(), prefix)), lambda: exported._prompt(prefix)):
        with pytest.raises(UsageError, match=f"prefix: {token} .* must not be part of the text"):
            use()
    assert exported._prompt("A dog < eos > pad")[0] == 3


@pytest.mark.parametrize("odd", ["config: layers", "config: FIFO", "weights: NaN", "tokenizer: normalizer"])
def test_every_command_reports_it(run, toy, tmp_path, folder, odd):
    change, message = ODD[odd]
    change(folder)
    random_image().save(tmp_path / "photo.png")
    commands = {
        "complete": ("complete", tmp_path / "photo.png", "--model", folder),
        "evaluate": (
            "evaluate",
            "--model",
            folder,
            "--dataset",
            toy / "data",
            "--variant",
            "short",
            "--out",
            tmp_path / "o",
        ),
    }
    if odd.startswith("config"):
        commands["info"] = ("info", folder)
    for command, arguments in commands.items():
        code, _, errors = run(*arguments)
        assert code == 1, command
        assert message in only_line(errors), command


def test_names_that_are_not_checkpoints(run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    (tmp_path / "dir").mkdir()
    monkeypatch.chdir(tmp_path)
    for name, message in (
        ("file", "this is a file"),
        ("dir/", "there is no config.json in this folder"),
        (".", "there is no config.json in this folder"),
        ("a" * 5000, "cannot be opened (File name too long)"),
        ("a\0b", "not a local folder, a Hub id"),
        ("~nosuchuser/x", "cannot be opened"),
        ("../a/b", "not a local folder, a Hub id"),
        ("a/b/c", "not a local folder, a Hub id"),
        ("nobody/nothing", "cannot be downloaded from the Hub"),
    ):
        code, lines, errors = run("info", name)
        assert (code, lines) == (1, []), name
        assert message in only_line(errors), name


def test_huge_files_are_not_downloaded(monkeypatch, folder):
    sizes = {"config.json": 2**21, "model-00001-of-00001.safetensors": 10**12, "model-quantized.safetensors": 10**13}

    class Hub:
        def model_info(self, name, revision=None, files_metadata=False):
            assert files_metadata
            return SimpleNamespace(
                siblings=[SimpleNamespace(rfilename=file, size=size) for file, size in sizes.items()]
            )

    monkeypatch.setattr("nanovlm_hf.loading.HfApi", Hub)
    monkeypatch.setattr("nanovlm_hf.loading.snapshot_download", lambda *_, **__: str(folder))
    monkeypatch.setattr("nanovlm_hf.loading.hf_hub_download", lambda *_, **__: str(folder / "config.json"))
    with pytest.raises(InputError, match=r"a/b: config\.json: 2,097,152 bytes, the limit is 1,048,576"):
        load_model("a/b")
    sizes["config.json"] = 1000
    with pytest.raises(InputError, match=r"a/b: its files: 1,000,000,001,000 bytes, the limit is 5,000,000,000"):
        load_model("a/b")
    sizes["model-00001-of-00001.safetensors"] = 10**7
    assert load_model("a/b")[0].num_parameters() > 0


def test_unknown_fields_are_ignored(folder):
    """Fields of other classes and unused options do not change the model."""
    plain = load_model(str(folder))[0]
    for file in ("config.json", "generation_config.json", "tokenizer_config.json", "preprocessor_config.json"):
        for field, value in (
            *(("is_encoder_decoder", True), ("attribute_map", {"a": "b"}), ("num_labels", 10**9), ("to_dict", 1)),
            *(("auto_map", {"AutoConfig": "evil.C"}), ("tokenizer_file", "/etc/passwd"), ("return_dict", False)),
            *(("custom_generate", "org/evil"), ("cache_implementation", "x"), ("return_dict_in_generate", True)),
            *(("chat_template", "{% for i in range(10) %}{% endfor %}"), ("stop_strings", ["x"]), ("dtype", "float16")),
        ):
            edit(file, field, value=value)(folder)
    write("chat_template.jinja", "{{ 1/0 }}")(folder)
    write("special_tokens_map.json", "[")(folder)
    model, processor = load_model(str(folder))
    assert model.dtype == torch.float32
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])
    inputs = processor(images=random_image(), text="There", return_tensors="pt")
    assert torch.equal(model.generate(**inputs, max_new_tokens=4), plain.generate(**inputs, max_new_tokens=4))


def test_a_sharded_checkpoint_loads(tmp_path, saved):
    model = tiny_model()
    shutil.copytree(saved, tmp_path / "parts")
    (tmp_path / "parts" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "parts", max_shard_size="100KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    loaded, _ = load_model(str(tmp_path / "parts"))
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name])


def test_an_untied_checkpoint_loads(folder):
    config = load_config(str(folder))
    config.text_config.tie_word_embeddings = False
    model = NanoVLMForConditionalGeneration(config)
    model.save_pretrained(folder)
    loaded, _ = load_model(str(folder))
    assert loaded.config.tie_word_embeddings is False
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(loaded.lm_head.weight, loaded.get_input_embeddings().weight)


@pytest.mark.parametrize("temperature", [0, 1])
def test_non_finite_logits_are_reported(run, tmp_path, folder, temperature):
    weights(lambda tensors: tensors[EMBEDDING].fill_(3e38))(folder)
    random_image().save(tmp_path / "photo.png")
    code, lines, errors = run("complete", tmp_path / "photo.png", "--model", folder, "--temperature", temperature)
    assert (code, lines) == (1, [])
    assert "the model's logits are NaN or infinite" in only_line(errors)
    model, processor = load_model(str(folder))
    with pytest.raises(InputError, match="logits"):
        list(stream(model, processor, random_image()))
    with pytest.raises(InputError, match="logits"):
        load_generator(str(folder)).complete(random_image(), "A")


@pytest.mark.parametrize("end", [" ", "\n", "\t "])
def test_whitespace_around_a_prefix_does_not_change_the_completion(saved, tmp_path, end):
    model, processor = load_model(str(saved))
    random_image().save(tmp_path / "photo.png")
    settings = {"max_new_tokens": 6, "do_sample": False}
    plain, odd = (
        next(complete(model, processor, [tmp_path / "photo.png"], prefix, **settings)).texts
        for prefix in ("There is", f"{end}There is{end}")
    )
    assert odd == plain
    assert list(stream(model, processor, random_image(), f"There is{end}")) == list(
        stream(model, processor, random_image(), "There is")
    )


HOSTILE = """
import sys
from nanovlm_hf import cli
photo, *folders = sys.argv[1:]
for folder in folders:
    sys.argv = ["nanovlm", "complete", photo, "--model", folder]
    try:
        cli.main()
    except SystemExit as end:
        print(end.code)
"""


@pytest.mark.slow
def test_hostile_sizes_neither_exhaust_memory_nor_end_the_process(saved, tmp_path):
    names = ("tokenizer: normalizer", "tokenizer: regex", "config: vocabulary", "config: more layers", "config: device")
    odd = {name: ODD[name] for name in names} | {"size": (edit("preprocessor_config.json", "size", value=HUGE), "size")}
    random_image().save(tmp_path / "photo.png")
    for name, (change, _) in odd.items():
        shutil.copytree(saved, tmp_path / name)
        change(tmp_path / name)
    code, output, errors, peak = measured(HOSTILE, tmp_path / "photo.png", *(tmp_path / name for name in odd))
    assert code == 0, errors
    assert output.split() == ["1"] * len(odd)
    for line, (_, message) in zip(errors.splitlines(), odd.values(), strict=True):
        assert message in line
    assert peak < 1536


def test_a_model_has_the_name_of_its_folder(tmp_path, monkeypatch):
    run_folder = tmp_path / "runs" / "mini" / "best"
    (run_folder / "states").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(run_folder)
    for name in (
        ".",
        "./",
        "../best",
        "states/..",
        str(run_folder),
        f"{run_folder}/",
        "~/runs/mini/best",
        "~/runs/mini/best/",
    ):
        assert short_name(name) == public_name(name) == "mini-best", name
    for name in ("..", "../", "../../mini/"):
        assert short_name(name) == public_name(name) == "mini", name
    assert short_name("/") == "model"
    assert short_name("org/model") == "model"
    assert public_name("org/model") == "org/model"


def test_evaluate_accepts_the_current_folder(run, toy, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    options = (
        "--variant",
        "short",
        "--split",
        "validation",
        "--limit",
        1,
        "--max-new-tokens",
        2,
        "--grounding-images",
        0,
    )
    code, _, errors = run("evaluate", "--model", ".", "--dataset", toy / "data", *options, "--out", tmp_path / "report")
    assert code == 0, errors
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert results["models"] == {"odd": {"model": "odd"}}
    twice = ("evaluate", "--model", ".", "--model", folder, "--dataset", toy / "data", "--out", tmp_path / "other")
    code, _, errors = run(*twice, *options)
    assert code == 1
    assert "two models have the short name odd" in only_line(errors)
