"""Checkpoints with custom code: no command runs it or asks to run it, whatever is on stdin."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.models import random_image
from helpers.tiny_baselines import blip

EVIL = """
import os
open(os.environ["WITNESS"], "a").write(__name__ + " ran\\n")
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
class EvilConfig(PretrainedConfig):
    model_type = "evil"
class EvilModel(PreTrainedModel):
    config_class = EvilConfig
class EvilProcessor(ProcessorMixin):
    pass
class EvilImageProcessor(BaseImageProcessor):
    pass
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""
MODELS = ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForVision2Seq")
AUTO_MAPS = {
    "config.json": {"AutoConfig": "evil.EvilConfig"} | dict.fromkeys(MODELS, "evil.EvilModel"),
    "processor_config.json": {"AutoProcessor": "evil.EvilProcessor"},
    "preprocessor_config.json": {
        "AutoProcessor": "evil.EvilProcessor",
        "AutoImageProcessor": "evil.EvilImageProcessor",
    },
    "tokenizer_config.json": {
        "AutoProcessor": "evil.EvilProcessor",
        "AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"],
    },
}
GLOBALS = "cycler.__init__.__globals__.os"
TEMPLATE = '{{ GLOBALS.system("echo template ran >> $WITNESS") }}'.replace("GLOBALS", GLOBALS)

COMMANDS = """
import sys
from nanovlm_hf import cli
photo, data, *folders = sys.argv[1:]
for number, folder in enumerate(folders):
    evaluate = ["evaluate", "--dataset", data, "--variant", "short", "--limit", "1", "--max-new-tokens", "2"]
    for command in (
        ["complete", photo, "--max-new-tokens", "2", "--model", folder],
        [*evaluate, "--grounding-images", "0", "--out", folder + "-report", "--model", folder],
        ["info", folder],
        ["push", folder, "org/name", "--dry-run"],
        ["data", "tokenizer", "--dataset", folder, "--out", folder + "-tokenizer"],
    ):
        sys.argv = ["nanovlm", *command]
        try:
            cli.main()
        except SystemExit as end:
            print("exit", end.code, *command[:2], flush=True)
"""


def make_evil(folder: Path, **config) -> None:
    (folder / "evil.py").write_text(EVIL)
    (folder / f"{folder.name}.py").write_text(EVIL)  # the name of a dataset script
    for file, auto_map in AUTO_MAPS.items():
        path = folder / file
        content = json.loads(path.read_text()) if path.exists() else {}
        content |= {"auto_map": auto_map} | (config if file == "config.json" else {})
        path.write_text(json.dumps(content))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


@pytest.mark.slow
@pytest.mark.parametrize("answers", ["y\n" * 1000, ""], ids=["yes", "nothing"])
def test_no_command_runs_code_of_a_checkpoint(saved, toy, tmp_path, answers):
    folders = {name: tmp_path / name for name in ("ours", "unknown", "known", "processor")}
    for name in ("ours", "unknown"):
        shutil.copytree(saved, folders[name])
    blip(folders["known"])
    shutil.copytree(folders["known"], folders["processor"])
    make_evil(folders["ours"])
    make_evil(folders["unknown"], model_type="evil", architectures=["EvilModel"])
    make_evil(folders["known"])
    # A model known to Transformers, with a custom processor.
    make_evil(folders["processor"])
    for file in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        path = folders["processor"] / file
        classes = {"processor_class": "EvilProcessor", "image_processor_type": "EvilImageProcessor"}
        path.write_text(json.dumps(json.loads(path.read_text()) | classes | {"tokenizer_class": "EvilTokenizer"}))
    photo, witness = tmp_path / "photo.png", tmp_path / "witness"
    random_image().save(photo)
    environment = os.environ | {"WITNESS": str(witness), "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", COMMANDS, photo, toy / "data", *folders.values()]
    done = subprocess.run(command, input=answers, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert not witness.exists(), witness.read_text() + done.stdout + done.stderr
    assert "custom code. You can inspect" not in done.stdout
    assert "Do you wish" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "unexpected" not in done.stderr
    ends = [line.split()[1:3] for line in done.stdout.splitlines() if line.startswith("exit")]
    assert len(ends) == 5 * len(folders)
    assert ends[:3] == [["0", "complete"], ["0", "evaluate"], ["0", "info"]], "our model works without its custom code"
    assert ends[5:8] == [["1", "complete"], ["1", "evaluate"], ["1", "info"]]
