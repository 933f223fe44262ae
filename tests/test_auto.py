"""Loading by the Auto classes: with the package imported, and from a folder that carries its code."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import transformers
from conftest import picture, tiny_model, tiny_processor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

import nanovlm_hf
from nanovlm_hf import hub

EXCHANGE = os.environ.get("NANOVLM_EXCHANGE")


def test_each_auto_class_finds_ours(saved):
    assert type(AutoConfig.from_pretrained(saved)) is nanovlm_hf.NanoVLMConfig
    assert type(AutoModel.from_pretrained(saved)) is nanovlm_hf.NanoVLMModel
    for auto_class in (nanovlm_hf.AutoModelForVision2Seq, AutoModelForImageTextToText):
        assert type(auto_class.from_pretrained(saved)) is nanovlm_hf.NanoVLMForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(saved)) is nanovlm_hf.NanoVLMProcessor
    assert type(AutoImageProcessor.from_pretrained(saved)) is nanovlm_hf.NanoVLMImageProcessor
    assert isinstance(AutoTokenizer.from_pretrained(saved), transformers.PreTrainedTokenizerFast)
    config = tiny_model().config
    assert type(AutoModel.from_config(config.vision_config)) is nanovlm_hf.NanoVLMVisionModel
    assert type(AutoModel.from_config(config.text_config)) is nanovlm_hf.NanoVLMTextModel


def test_vision2seq_is_transformers_own_class_where_there_is_one():
    own = getattr(transformers, "AutoModelForVision2Seq", None)
    assert nanovlm_hf.AutoModelForVision2Seq is (own or AutoModelForImageTextToText)


REMOTE = """
    import sys
    import torch, transformers
    try:
        import nanovlm_hf
        sys.exit("the package must not be importable here")
    except ImportError:
        pass
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor
    from transformers import AutoTokenizer
    from PIL import Image

    folder, picture = sys.argv[1:]
    trust = {"trust_remote_code": True}
    assert AutoConfig.from_pretrained(folder, **trust).model_type == "nanovlm_hf"
    assert type(AutoModel.from_pretrained(folder, **trust)).__name__ == "NanoVLMModel"
    assert type(AutoImageProcessor.from_pretrained(folder, **trust)).__name__ == "NanoVLMImageProcessor"
    assert AutoTokenizer.from_pretrained(folder, **trust).pad_token_id == 0
    classes = [AutoModelForImageTextToText]
    if hasattr(transformers, "AutoModelForVision2Seq"):
        classes.append(transformers.AutoModelForVision2Seq)
    processor = AutoProcessor.from_pretrained(folder, **trust)
    inputs = processor(images=Image.open(picture), text="There is a big", return_tensors="pt")
    for auto_class in classes:
        model = auto_class.from_pretrained(folder, **trust)
        print(model.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist())
"""


def test_a_folder_with_its_code_loads_without_the_package(tmp_path, tokenizer):
    folder = tmp_path / "checkpoint"
    model, processor = tiny_model(), tiny_processor(tokenizer)
    hub.save_with_code(model, processor, folder)
    photo = tmp_path / "photo.png"
    picture().save(photo)

    # The source tree and an installed copy are both out of reach: only the interpreter's own libraries remain.
    script = tmp_path / "script.py"
    script.write_text("import sys\nsys.modules['nanovlm_hf'] = None\n" + textwrap.dedent(REMOTE))
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, script, folder, photo], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

    inputs = processor(images=picture(), text="There is a big", return_tensors="pt")
    want = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist()
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert lines == [want] * (2 if hasattr(transformers, "AutoModelForVision2Seq") else 1)


def test_a_folder_with_its_code_loads_with_the_package_too(tmp_path, tokenizer):
    hub.save_with_code(tiny_model(), tiny_processor(tokenizer), tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=False)
    assert type(model) is nanovlm_hf.NanoVLMForConditionalGeneration


def test_what_travels_is_flat_and_complete(tmp_path, tokenizer):
    hub.save_with_code(tiny_model(), tiny_processor(tokenizer), tmp_path)
    names = {path.name for path in tmp_path.glob("*.py")}
    assert names == {
        "_compat.py",
        "configuration_nanovlm.py",
        "image_processing_nanovlm.py",
        "modeling_nanovlm.py",
        "processing_nanovlm.py",
    }
    config = json.loads((tmp_path / "config.json").read_text())
    assert set(config["auto_map"]) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForImageTextToText",
        "AutoModelForVision2Seq",
        "AutoModelForMultimodalLM",
    }


def test_saving_without_code_leaves_no_auto_map(saved):
    assert not list(saved.glob("*.py"))
    for path in saved.glob("*.json"):
        assert "auto_map" not in path.read_text()


def test_tokenizer_config_names_a_class_that_both_versions_have(saved):
    fields = json.loads((saved / "tokenizer_config.json").read_text())
    assert fields["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.skipif(EXCHANGE is None, reason="NANOVLM_EXCHANGE names the folder that two environments share")
def test_checkpoints_of_the_other_version_give_the_same_logits(tokenizer):
    """Each environment leaves a checkpoint with its logits and reads those of the others: see .ci/run."""
    root = Path(EXCHANGE)
    own = root / transformers.__version__
    for strategy in ("cls", "patch", "full"):
        model, processor = tiny_model(strategy), tiny_processor(tokenizer, strategy)
        hub.save_with_code(model, processor, own / strategy)
        inputs = processor(images=[picture(0), picture(1)], text=["There is a big", "A"], return_tensors="pt")
        with torch.no_grad():
            torch.save(model(**inputs).logits, own / strategy / "logits.pt")
    checked = 0
    for folder in root.glob("*/*"):
        model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=False).eval()
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        inputs = processor(images=[picture(0), picture(1)], text=["There is a big", "A"], return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits
        torch.testing.assert_close(logits, torch.load(folder / "logits.pt", weights_only=True), atol=1e-5, rtol=0)
        checked += 1
    assert checked >= 3
