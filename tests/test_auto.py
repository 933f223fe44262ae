"""Loading with the Auto classes: from the imported package and from a checkpoint that carries its code."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.models.auto import image_processing_auto

import nanovlm_hf
from nanovlm_hf.compat_nanovlm import HAS_IMAGE_BACKENDS
from nanovlm_hf.hub import code

from helpers.models import old_names, random_image, tiny_model, tiny_processor

EXCHANGE = os.environ.get("NANOVLM_EXCHANGE")


def test_auto_classes_return_the_classes_of_the_package(saved):
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


@pytest.mark.parametrize("torchvision", [False, True])
def test_no_warning_about_the_backend_of_the_image_processor(saved, monkeypatch, torchvision):
    warnings = []
    monkeypatch.setattr(image_processing_auto, "is_torchvision_available", lambda: torchvision)
    monkeypatch.setattr(image_processing_auto.logger, "warning_once", warnings.append)
    assert type(AutoProcessor.from_pretrained(saved).image_processor) is nanovlm_hf.NanoVLMImageProcessor
    if HAS_IMAGE_BACKENDS:  # without, AutoImageProcessor warns about every processor that has no class for torchvision
        assert type(AutoImageProcessor.from_pretrained(saved)) is nanovlm_hf.NanoVLMImageProcessor
    assert warnings == []


@pytest.mark.slow
def test_auto_classes_in_a_script_called_nanovlm(tmp_path, saved):
    script = tmp_path / "nanovlm"
    script.write_text(
        "import sys, nanovlm_hf\n"
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        "print(type(AutoModelForImageTextToText.from_pretrained(sys.argv[1])).__name__)\n"
        "print(type(AutoProcessor.from_pretrained(sys.argv[1])).__name__)\n"
    )
    done = subprocess.run([sys.executable, script, saved], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["NanoVLMForConditionalGeneration", "NanoVLMProcessor"]


def test_vision2seq_is_the_class_of_transformers_if_it_exists():
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

    folder, image = sys.argv[1:]
    trust = {"trust_remote_code": True}
    assert AutoConfig.from_pretrained(folder, **trust).model_type == "nanovlm_hf"
    assert type(AutoModel.from_pretrained(folder, **trust)).__name__ == "NanoVLMModel"
    assert type(AutoImageProcessor.from_pretrained(folder, **trust)).__name__ == "NanoVLMImageProcessor"
    assert AutoTokenizer.from_pretrained(folder, **trust).pad_token_id == 0
    classes = [AutoModelForImageTextToText]
    if hasattr(transformers, "AutoModelForVision2Seq"):
        classes.append(transformers.AutoModelForVision2Seq)
    processor = AutoProcessor.from_pretrained(folder, **trust)
    inputs = processor(images=Image.open(image), text="There is a big", return_tensors="pt")
    for auto_class in classes:
        model = auto_class.from_pretrained(folder, **trust)
        print(model.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist())
"""


@pytest.mark.slow
def test_a_checkpoint_with_code_loads_without_the_package(tmp_path, tokenizer):
    folder = tmp_path / "checkpoint"
    model, processor = tiny_model(), tiny_processor(tokenizer)
    code.save_with_code(model, processor, folder)
    photo = tmp_path / "photo.png"
    random_image().save(photo)

    # Neither the source tree nor an installed copy can be imported.
    script = tmp_path / "script.py"
    script.write_text("import sys\nsys.modules['nanovlm_hf'] = None\n" + textwrap.dedent(REMOTE))
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, script, folder, photo], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

    inputs = processor(images=random_image(), text="There is a big", return_tensors="pt")
    want = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist()
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert lines == [want] * (2 if hasattr(transformers, "AutoModelForVision2Seq") else 1)


OLD_NAMES = """
    import json, sys, warnings
    import torch, transformers
    from transformers import AutoModel, AutoModelForImageTextToText

    folder, saved = sys.argv[1:]
    warnings.simplefilter("error")
    for auto_class in (AutoModel, AutoModelForImageTextToText):
        model, report = auto_class.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    model.save_pretrained(saved)
    inputs = {"input_ids": torch.tensor([[3, 5, 6]]), "pixel_values": torch.linspace(-1, 1, 3072).view(1, 3, 32, 32)}
    print(json.dumps(model.eval()(**inputs).logits.flatten().tolist()))
"""


@pytest.mark.slow
def test_a_checkpoint_with_code_and_old_weight_names(tmp_path, tokenizer):
    folder, model = tmp_path / "checkpoint", tiny_model()
    code.save_with_code(model, tiny_processor(tokenizer), folder)
    save_file(old_names(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    script = tmp_path / "script.py"
    script.write_text("import sys\nsys.modules['nanovlm_hf'] = None\n" + textwrap.dedent(OLD_NAMES))
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, script, folder, tmp_path / "saved"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    inputs = {"input_ids": torch.tensor([[3, 5, 6]]), "pixel_values": torch.linspace(-1, 1, 3072).view(1, 3, 32, 32)}
    found = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    torch.testing.assert_close(found, model(**inputs).logits.flatten(), atol=1e-4, rtol=0)
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == model.state_dict().keys() - {"lm_head.weight"}


def test_a_checkpoint_with_code_loads_with_the_package(tmp_path, tokenizer):
    code.save_with_code(tiny_model(), tiny_processor(tokenizer), tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=False)
    assert type(model) is nanovlm_hf.NanoVLMForConditionalGeneration


def test_saved_code_is_flat_and_complete(tmp_path, tokenizer):
    code.save_with_code(tiny_model(), tiny_processor(tokenizer), tmp_path)
    names = {path.name for path in tmp_path.glob("*.py")}
    assert names == {
        "compat_nanovlm.py",
        "configuration_nanovlm.py",
        "hub_nanovlm.py",
        "image_processing_nanovlm.py",
        "modeling_nanovlm.py",
        "generation_nanovlm.py",
        "paper_nanovlm.py",
        "pillow_nanovlm.py",
        "processing_nanovlm.py",
        "tensor_images_nanovlm.py",
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


def test_tokenizer_class_exists_in_both_versions(saved):
    fields = json.loads((saved / "tokenizer_config.json").read_text())
    assert fields["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.skipif(EXCHANGE is None, reason="NANOVLM_EXCHANGE names the folder that two environments share")
def test_checkpoints_of_the_other_version_give_the_same_logits(tokenizer):
    """Each environment saves a checkpoint with its logits and checks those of the others: see .ci/run."""
    root = Path(EXCHANGE)
    own = root / transformers.__version__
    for strategy in ("cls", "patch", "full"):
        model, processor = tiny_model(strategy), tiny_processor(tokenizer, strategy)
        code.save_with_code(model, processor, own / strategy)
        inputs = processor(images=[random_image(0), random_image(1)], text=["There is a big", "A"], return_tensors="pt")
        with torch.no_grad():
            torch.save(model(**inputs).logits, own / strategy / "logits.pt")
    checked = 0
    for folder in root.glob("*/*"):
        model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=False).eval()
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        inputs = processor(images=[random_image(0), random_image(1)], text=["There is a big", "A"], return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits
        torch.testing.assert_close(logits, torch.load(folder / "logits.pt", weights_only=True), atol=1e-5, rtol=0)
        checked += 1
    assert checked >= 3
