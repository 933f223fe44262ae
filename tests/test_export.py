"""Export to ONNX: the same logits and texts as PyTorch, and the layout that transformers.js reads."""

import contextlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from nanovlm_hf import InputError, cli
from nanovlm_hf.errors import UsageError
from nanovlm_hf.export.onnx import SMALLEST_HALF, export_onnx, write_configuration
from nanovlm_hf.export.runtime import OnnxModel

from helpers.models import random_image, tiny_model, tiny_processor

onnx = pytest.importorskip("onnx")
pytestmark = pytest.mark.slow  # every test needs an export, which takes half a minute


def save(folder, tokenizer, strategy="cls"):
    model = tiny_model(strategy)
    model.generation_config.repetition_penalty = 1.2
    model.generation_config.suppress_tokens = [model.config.image_token_id]
    model.save_pretrained(folder)
    tiny_processor(tokenizer, strategy).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def said(tmp_path_factory, tokenizer):
    """The lines that the command prints, for a checkpoint that it exports beside it."""
    folder = tmp_path_factory.mktemp("export")
    command = ["nanovlm", "export", save(folder / "checkpoint", tokenizer), "--out", folder / "onnx", "--dtype", "fp32"]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", list(map(str, command)))
        with pytest.raises(SystemExit) as stop:
            cli.main()
    assert stop.value.code == 0
    return printed.getvalue().splitlines()


@pytest.fixture(scope="module")
def exported(said):
    folder = Path(said[-1])
    report = json.loads((folder / "onnx" / "export_fp32.json").read_text())
    return folder, report, folder.with_name("checkpoint")


def test_every_completion_equals_pytorchs(exported):
    _, report, _ = exported
    assert report["completions"] == report["same_text"] > 20
    assert report["max_logit_difference"] < 1e-4


def test_layout_and_configuration_are_those_of_transformers_js(exported):
    folder, report, checkpoint = exported
    names = {"vision_encoder.onnx", "embed_tokens.onnx", "decoder_model_merged.onnx"}
    assert set(report["bytes"]) == names
    assert {path.name for path in (folder / "onnx").iterdir()} == names | {"export_fp32.json"}
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llava"
    assert config["image_token_index"] == json.loads((checkpoint / "config.json").read_text())["image_token_id"]
    assert {"num_attention_heads", "num_hidden_layers", "hidden_size"} < config["text_config"].keys()
    assert json.loads((folder / "preprocessor_config.json").read_text())["image_processor_type"] == "ViTImageProcessor"
    decoder = onnx.load(folder / "onnx" / "decoder_model_merged.onnx")
    shapes = {
        value.name: [dimension.dim_param or dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        for value in (*decoder.graph.input, *decoder.graph.output)
    }
    assert shapes["inputs_embeds"] == ["batch_size", "sequence_length", 32]
    assert shapes["past_key_values.1.value"] == ["batch_size", 4, "past_sequence_length", 8]
    assert shapes["present.0.key"] == ["batch_size", 4, "total_sequence_length", 8]
    assert shapes["logits"] == ["batch_size", "sequence_length", 320]


def test_an_export_names_no_path(exported):
    folder, _, _ = exported
    for path in folder.glob("onnx/*.onnx"):
        content = path.read_bytes()
        assert b'File "' not in content, path.name
        assert str(Path(onnx.__file__).parents[1]).encode() not in content


def test_an_export_of_other_weights_removes_the_earlier_graphs(exported, tokenizer, tmp_path):
    folder, _, checkpoint = exported
    copy = tmp_path / "onnx"
    shutil.copytree(folder, copy)
    export_onnx(str(checkpoint), copy, "fp16")
    assert (copy / "onnx" / "decoder_model_merged.onnx").exists(), "of the same weights"
    weights = load_file(checkpoint / "model.safetensors")
    name = next(name for name in weights if name.endswith("fc1.bias"))
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    save_file(weights | {name: weights[name] + 1}, other / "model.safetensors", metadata={"format": "pt"})
    export_onnx(str(other), copy, "int8")
    assert {path.stem for path in copy.glob("onnx/*.json")} == {"export_int8"}
    assert all(path.stem.endswith("_quantized") for path in copy.glob("onnx/*.onnx"))


def test_ngrams_and_several_end_tokens(exported, tmp_path):
    folder, _, _ = exported
    image = random_image()
    text = OnnxModel(folder).complete(image, "There", max_new_tokens=30)
    odd = tmp_path / "odd"
    shutil.copytree(folder, odd)
    path = odd / "generation_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"repetition_penalty": 1.0, "no_repeat_ngram_size": 1}))
    model = OnnxModel(odd)
    tokens = model.generate(model.encode(image), [model.image_token_id], 30)
    assert len(set(tokens)) == len(tokens)
    path.write_text(json.dumps(settings | {"eos_token_id": [settings["eos_token_id"], tokens[0]]}))
    assert OnnxModel(odd).eos_tokens == {settings["eos_token_id"], tokens[0]}
    assert OnnxModel(folder).complete(image, "  There ", max_new_tokens=30) == text


def test_a_hostile_export_is_one_line(exported, tmp_path):
    folder, _, _ = exported
    odd = tmp_path / "odd"
    shutil.copytree(folder, odd)
    merges = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]}
    too_large = "suppress_tokens is not below config.json's vocab_size of 320"
    for name, change, problem in (
        ("generation_config.json", {"suppress_tokens": [999_999]}, too_large),
        ("generation_config.json", {"beam_search": {"num_beams": 10**9}}, r"beam_search\.num_beams"),
        *(
            ("generation_config.json", {"beam_search": {"num_beams": 2, "length_penalty": value}}, "length_penalty")
            for value in (1e308, -1e308, 1e4)
        ),
        ("tokenizer.json", {"normalizer": {"type": "Lowercase"}}, r"tokenizer\.json: normalizer"),
        ("tokenizer.json", {"model": merges}, r"tokenizer\.json: cannot be loaded"),
    ):
        content = (odd / name).read_text()
        (odd / name).write_text(json.dumps(json.loads(content) | change))
        with pytest.raises(InputError, match=problem) as refusal:
            OnnxModel(odd)
        assert "\n" not in str(refusal.value)
        (odd / name).write_text(content)
    config = json.loads((odd / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] += 1
    (odd / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"do not fit config\.json"):
        OnnxModel(odd).complete(random_image(), "There")


def test_decoding_that_the_runtimes_do_not_apply_is_refused(tmp_path, tokenizer):
    checkpoint = save(tmp_path / "checkpoint", tokenizer)
    path = checkpoint / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"begin_suppress_tokens": [5]}))
    with pytest.raises(InputError, match="begin_suppress_tokens: an export cannot apply it"):
        export_onnx(str(checkpoint), tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_decoding_without_beams_is_written_in_full(tmp_path, tokenizer):
    """A tool may merge the file with the checkpoint's own, whose beams have to be replaced by default values."""
    model = tiny_model()
    model.generation_config.update(num_beams=4, no_repeat_ngram_size=3, repetition_penalty=1.1, length_penalty=0.8)
    write_configuration(model, tiny_processor(tokenizer), tmp_path, "digest")
    written = json.loads((tmp_path / "generation_config.json").read_text())
    greedy = {"num_beams": 1, "no_repeat_ngram_size": 0, "repetition_penalty": 1.2, "length_penalty": 1.0}
    assert written.items() >= greedy.items()
    assert written["early_stopping"] is False
    beams = {"num_beams": 4, "no_repeat_ngram_size": 3, "repetition_penalty": 1.1, "length_penalty": 0.8}
    assert written["beam_search"].items() >= beams.items()


def test_the_pixels_are_the_image_processors(exported):
    folder, _, checkpoint = exported
    from nanovlm_hf import NanoVLMImageProcessor

    image = random_image(3, (300, 200))
    expected = NanoVLMImageProcessor.from_pretrained(checkpoint)(image)["pixel_values"][0]
    np.testing.assert_allclose(OnnxModel(folder).pixel_values(image)[0], expected, atol=1e-6)


def test_the_command_line_of_a_completion(exported):
    folder, _, _ = exported
    model = OnnxModel(folder)
    text = model.complete(random_image(), "There is a ", max_new_tokens=5)
    assert text.startswith("There is a")
    assert text == model.complete(random_image(), "There is a", max_new_tokens=5)
    with pytest.raises(InputError, match="prefix: <image> stands for the image"):
        model.complete(random_image(), "a <image>")
    with pytest.raises(UsageError, match="num_beams: 257: an exported model takes 256 at most"):
        model.complete(random_image(), "There", num_beams=257)
    with pytest.raises(InputError, match=r"max_new_tokens: 48 after .* ask for \d+ at most"):
        model.complete(random_image(), "There", max_new_tokens=48)
    with pytest.raises(InputError, match=r"leave no room in the model's 48"):
        model.complete(random_image(), "cat " * 100)


COLD_START = """
import sys, nanovlm_command
sys.argv[0] = "nanovlm"
try:
    nanovlm_command.main()
finally:
    print(sorted({"torch", "transformers", "datasets"} & set(sys.modules)), file=sys.stderr)
"""


def test_an_exported_folder_completes_without_importing_pytorch(exported, tmp_path, run):
    folder, _, checkpoint = exported
    random_image().save(tmp_path / "photo.png")
    options = ["complete", tmp_path, "--prefix", "There is", "--max-new-tokens", "6", "--blind", "--model"]
    command = [sys.executable, "-c", COLD_START, *options, folder]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.stderr.splitlines() == ["[]"], done.stderr
    assert done.stdout.splitlines() == run(*options, checkpoint)[1]
    (tmp_path / "text.png").write_text("no image")
    code, lines, errors = run(*options, folder)
    assert (code, len(lines)) == (1, 2), "the other image is completed"
    assert "text.png" in errors[0]
    (tmp_path / "text.png").unlink()
    beams = ("--num-beams", "3")
    assert run(*options, folder, *beams)[1] == run(*options, checkpoint, *beams)[1]
    for sampling in (("--temperature", "1"), ("--num-return-sequences", "2", "--num-beams", "2")):
        code, _, errors = run(*options, folder, *sampling)
        assert code == 2
        assert "an exported model gives one completion and does not sample" in errors[0]


def test_several_image_tokens(tmp_path, tokenizer):
    report = export_onnx(str(save(tmp_path / "checkpoint", tokenizer, "full")), tmp_path / "onnx", "fp32")
    assert report["completions"] == report["same_text"]
    assert report["max_logit_difference"] < 1e-4


def test_eight_bit_weights_are_smaller(exported, tmp_path, caplog):
    _, report, checkpoint = exported
    small = export_onnx(str(checkpoint), tmp_path / "onnx", "int8")
    assert "pre-processing" not in caplog.text
    vision = onnx.load(tmp_path / "onnx" / "onnx" / "vision_encoder_quantized.onnx")
    kinds = {one.data_type for one in vision.graph.initializer if np.prod(one.dims) >= SMALLEST_HALF}
    assert kinds == {onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT16}
    assert json.loads((tmp_path / "onnx" / "onnx" / "export_int8.json").read_text()) == small
    assert set(small["bytes"]) == {name.replace(".onnx", "_quantized.onnx") for name in report["bytes"]}
    assert sum(small["bytes"].values()) < sum(report["bytes"].values())


def test_what_cannot_be_exported_or_loaded_is_named(tmp_path, exported, monkeypatch):
    folder, _, _ = exported
    used = tmp_path / "used"
    used.mkdir()
    (used / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"used: it holds thesis\.tex and no earlier export"):
        export_onnx("mini-short", used)
    checkpoint = tmp_path / "checkpoint"
    (checkpoint / "onnx").mkdir(parents=True)
    (checkpoint / "config.json").write_text('{"model_type": "nanovlm_hf"}')
    with pytest.raises(InputError, match=r"checkpoint: it holds config\.json and no earlier export"):
        export_onnx("mini-short", checkpoint)
    assert json.loads((checkpoint / "config.json").read_text()) == {"model_type": "nanovlm_hf"}
    other = tmp_path / "bert"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match="bert"):
        export_onnx(str(other), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=r"there are no graphs in onnx/"):
        OnnxModel(other)
    for name, field in (
        ("config", "text_config"),
        ("generation_config", "eos_token_id"),
        ("preprocessor_config", "size"),
    ):
        odd = tmp_path / name
        shutil.copytree(folder, odd)
        content = json.loads((odd / f"{name}.json").read_text())
        for value in (None, -1, "x", [], {}):
            (odd / f"{name}.json").write_text(json.dumps(content | {field: value}))
            with pytest.raises(InputError, match=f"{name}.json: {field}"):
                OnnxModel(odd)
    content = json.loads((folder / "preprocessor_config.json").read_text())
    for field, value in (("image_mean", [1e300, 0, 0]), ("image_std", [1e-300, 1, 1]), ("rescale_factor", 1e300)):
        (tmp_path / "preprocessor_config" / "preprocessor_config.json").write_text(json.dumps(content | {field: value}))
        with pytest.raises(InputError, match=f"preprocessor_config.json: {field}"):
            OnnxModel(tmp_path / "preprocessor_config")
    with pytest.raises(InputError, match=r"there are no int8 graphs in onnx/"):
        OnnxModel(folder, "int8")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UsageError, match=r"pip install 'nanovlm-hf\[onnx\]'"):
        OnnxModel(folder)


def test_the_command_reports_sizes_and_the_comparison(run, said, exported):
    _, _, checkpoint = exported
    assert said[0].endswith("  vision_encoder.onnx")
    assert said[3] == "24 of 24 completions equal PyTorch's"
    code, _, errors = run("export", checkpoint, "--out", checkpoint)
    assert code == 1
    assert "no earlier export" in errors[0]
