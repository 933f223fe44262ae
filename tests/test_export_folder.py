"""What an export writes and removes in its folder: its own files, and nothing that a link leads to."""

import json

import pytest

from nanovlm_hf import InputError
from nanovlm_hf.export import onnx
from nanovlm_hf.export.runtime import GRAPHS

OWN = ("config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")


class Graph:
    def SerializeToString(self):  # noqa: N802
        return b"graph"


@pytest.fixture
def write(saved, monkeypatch):
    """Writes an export without the time of tracing the graphs."""
    monkeypatch.setattr(onnx, "export_graphs", lambda model: ((name, Graph()) for name in GRAPHS))
    return lambda out: onnx.write_onnx(str(saved), out, "fp32")


@pytest.fixture
def earlier(tmp_path):
    """A folder that calls itself an earlier export of other weights."""
    out = tmp_path / "out"
    (out / "onnx").mkdir(parents=True)
    (out / "config.json").write_text(json.dumps({"exported_by": "nanovlm_hf", "weights_sha256": "x"}))
    return out


@pytest.mark.parametrize(
    "name", [*OWN, "config.json.partial", "notes", "onnx", "onnx/embed_tokens.onnx", "onnx/embed_tokens.partial"]
)
def test_links_below_the_output_folder_are_refused(write, earlier, tmp_path, name):
    others = tmp_path / "others"
    others.mkdir()
    victim = others / "embed_tokens.onnx"
    victim.write_text((earlier / "config.json").read_text())
    link = earlier / name
    if name == "onnx":
        link.rmdir()
    link.unlink(missing_ok=True)
    link.symlink_to(others if name == "onnx" else victim)
    with pytest.raises(InputError, match=f"--out .*: {name} is a link, which is not followed: remove it"):
        write(earlier)
    assert victim.exists()
    assert json.loads(victim.read_text())["weights_sha256"] == "x"


@pytest.mark.parametrize("name", [*OWN, "onnx/vision_encoder.onnx", "onnx/vision_encoder.partial"])
def test_a_hard_link_is_replaced_and_its_other_name_unchanged(write, earlier, tmp_path, name):
    victim = tmp_path / "victim"
    content = (earlier / "config.json").read_text()
    victim.write_text(content)
    (earlier / name).unlink(missing_ok=True)
    (earlier / name).hardlink_to(victim)
    write(earlier)
    assert victim.read_text() == content


def test_only_graphs_of_the_export_are_removed(write, earlier):
    mine = ("mine.onnx", "export_notes.json", "decoder.onnx")
    stale = ("embed_tokens_fp16.onnx", "vision_encoder_quantized.onnx", "export_int8.json")
    for name in (*mine, *stale):
        (earlier / "onnx" / name).write_text("old")
    write(earlier)
    assert {path.name for path in (earlier / "onnx").iterdir()} == {*mine, *(f"{name}.onnx" for name in GRAPHS)}
    assert (earlier / "onnx" / "embed_tokens.onnx").read_bytes() == b"graph"


@pytest.mark.parametrize("name", [".", "onnx"])
def test_a_file_in_place_of_a_folder_is_refused(write, earlier, name):
    (earlier / "onnx").rmdir()
    if name == ".":
        (earlier / "config.json").unlink()
        earlier.rmdir()
    (earlier / name if name != "." else earlier).write_text("text")
    with pytest.raises(InputError, match="is a file"):
        write(earlier)
