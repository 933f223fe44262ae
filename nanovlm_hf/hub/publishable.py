"""The files of a checkpoint folder that are published, and the check that they hold nothing private."""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path

from huggingface_hub import get_token
from huggingface_hub.constants import HF_HUB_CACHE

from ..errors import InputError, decodings, holds_secret, scrub
from ..files import read_text

# Files that `save_pretrained`, training and the card write. No others are published, as folders of runs also hold
# optimizer states, notebooks and `.env` files.
NAMES = frozenset(
    (
        *("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json"),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
        *("merges.txt", "preprocessor_config.json", "processor_config.json", "chat_template.jinja"),
        *("README.md", "metrics.json", "metrics.jsonl", "evaluation.json", "training_args.yaml", "loss.png"),
    )
)
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
# Applied to text whose separators are all "/". Folders may come before `home`; a relative path is that of no home.
_HOME = re.compile(
    r"""(?:(?<![\w.<])|(?<=\.\.))/(?:
    (?:private/)?(?:var/)?root\b
    | (?:[^\s/"'<>]{1,80}/){0,8}(?:homes?[-_]?\d*|users|documents\ and\ settings)/[\w.-]
    )
    |(?:^|[\s"'=:(])~[a-z_][\w.-]{0,80}/ | ["'=]~[a-z_][\w.-]{0,80}["'] | [=:]\ ?~[a-z_][\w.-]{0,80}\s*$""",
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)
_SEPARATORS = re.compile(r"[\\/]+(?:\.[\\/]+)*")
_WEB_ADDRESS = re.compile(r"\bhttps?:/[^\s\"'<>)?#]+", re.IGNORECASE)
# A vocabulary may hold any piece of text, such as the beginning of a path.
VOCABULARIES = frozenset(("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json"))
PNG_PARTS = (b"IHDR", b"PLTE", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"tEXt", b"IDAT", b"IEND")
MAX_TEXT = 50_000_000  # bytes of a text file
SHOWN = 10  # names in a message


def publishable(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Divide the content of a checkpoint folder into files that are published and others.

    Returns:
        The files that may be published, by name, with links resolved; and the names of everything else.

    Raises:
        InputError: if a file to publish is a link out of the folder, is not a regular file, or holds a token or the
            path of a home directory.
    """
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror})") from None
    chosen = {path.name: _regular(path) for path in paths if _is_listed(path.name)}
    skipped = [f"{path.name}/" if path.is_dir() else path.name for path in paths if not _is_listed(path.name)]
    for name, path in chosen.items():
        _check_private(folder / name, path)
    return chosen, skipped


def skipped_line(skipped: list[str]) -> str:
    """Return a line that names the files that are not published."""
    more = f" and {len(skipped) - SHOWN} more" if len(skipped) > SHOWN else ""
    return f"not published: {', '.join(scrub(name, 80) for name in skipped[:SHOWN])}{more}"


def _is_listed(name: str) -> bool:
    return name in NAMES or _SHARD.fullmatch(name) is not None


def _regular(path: Path) -> Path:
    """Return the path of a listed file with links resolved: in its own folder, or in the blobs of the Hub's cache."""
    try:
        target = path.resolve(strict=True)
        mode = target.stat().st_mode
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'a cycle of links'})") from None
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: not a regular file")
    if path.is_symlink() and not _may_link_to(path.parent.resolve(), target):
        raise InputError(f"{path}: a link that leads out of this folder: replace it with the file")
    return target


def _may_link_to(folder: Path, target: Path) -> bool:
    if target.parent == folder:
        return _is_listed(target.name)
    # A snapshot in the Hub's cache consists of links to the blobs of its repository.
    if folder.parent.name == "snapshots" and target.parent == folder.parents[1] / "blobs":
        return True
    return target.parent.name == "blobs" and target.is_relative_to(Path(HF_HUB_CACHE).resolve())


def _check_private(shown: Path, path: Path) -> None:
    name = shown.name
    if name == "loss.png":
        text = _png_text(shown, path)
    else:
        text = _header(path) if name.endswith(".safetensors") else _text(shown, path)
    check_private(text, str(shown), paths=name not in VOCABULARIES)
    if name == "tokenizer.json":
        check_private(_without_vocabulary(text), str(shown))


def check_private(text: str, where: str, paths: bool = True) -> None:
    """Check that a text to publish holds nothing private.

    Args:
        where: file or field for errors.
        paths: whether to look for the paths of home directories as well.

    Raises:
        InputError: if it holds a token, key or password, or the path of a home directory.
    """
    token = get_token()
    if holds_secret(text) or (token is not None and len(token) >= 8 and token in text):
        raise InputError(f"{where}: it contains a token, key or password: remove it before publishing")
    if paths and _names_home(text):
        raise InputError(f"{where}: it contains the path of a home directory: remove it before publishing")


def _names_home(text: str) -> bool:
    """Return whether a text, as it is or with its escapes decoded, contains the path of a home directory."""
    home = str(Path.home())
    own = re.compile(re.escape(home) + r"(?![\w-])")
    for form in decodings(text):
        path = _WEB_ADDRESS.sub(" ", _SEPARATORS.sub("/", form))
        if _HOME.search(path) or (home.count("/") > 1 and own.search(path)):
            return True
    return False


def _without_vocabulary(text: str) -> str:
    """Return the JSON of a tokenizer without its tokens, or the text if it is not such a file."""
    try:
        content = json.loads(text)
        del content["model"], content["added_tokens"]
        return json.dumps(content)
    except (ValueError, TypeError, KeyError, RecursionError):  # loading refuses such a file
        return ""


def _text(shown: Path, path: Path) -> str:
    if path.stat().st_size > MAX_TEXT:
        raise InputError(f"{shown}: larger than {MAX_TEXT // 10**6} MB: remove it")
    try:
        return read_text(path)
    except InputError as error:
        raise InputError(str(error).replace(str(path), str(shown))) from None


def _png_text(shown: Path, path: Path) -> str:
    """Return what a PNG image says besides its pixels.

    Raises:
        InputError: if it is no such image, or has more parts than a plot, such as compressed text or another file
            behind its end.
    """
    content = path.read_bytes() if path.stat().st_size <= MAX_TEXT else b""
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        raise InputError(f"{shown}: not a PNG image: remove it, or plot it again")
    start, texts, kind = 8, [], b""
    while kind != b"IEND" and start + 12 <= len(content):
        end = start + 12 + int.from_bytes(content[start : start + 4], "big")  # length, kind, data, checksum
        kind = content[start + 4 : start + 8]
        if kind not in PNG_PARTS:
            break
        if kind == b"tEXt":
            texts.append(content[start + 8 : end - 4].decode("latin-1"))
        start = end
    if kind != b"IEND" or start != len(content):
        raise InputError(f"{shown}: this PNG image is damaged, or holds more than a plot: remove it, or plot it again")
    return "\n".join(texts)


def _header(path: Path) -> str:
    """Return the JSON header of a safetensors file, which may hold any metadata; loading checks whether it is valid."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return file.read(min(size, MAX_TEXT)).decode("utf-8", "replace")
