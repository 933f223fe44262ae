"""Files: resolving untrusted names, reading with one-line errors, atomic writes, and locks."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO, TypeVar

from filelock import FileLock, Timeout

from .errors import InputError, first_line, printable, scrub

T = TypeVar("T")

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_MOST_YAML_VALUES = 200_000
_MOST_YAML_DIGITS = 100
_MOST_LINE_BREAKS = 100  # in a row


def inside(folder: str | Path, name: str) -> Path:
    """Return the path of the regular file that an untrusted name refers to in a folder.

    Every name from an annotation file, a dataset or a server's reply becomes a path here.

    Args:
        folder: that must contain the file after symbolic links are resolved.
        name: relative to the folder.

    Raises:
        InputError: if the name is absolute, leads out of the folder (`..`, a symbolic link), is not a valid file name,
            or does not refer to a regular file.
    """
    shown = scrub(str(name), max_length=120)
    if not isinstance(name, str) or not name or "\0" in name:
        raise InputError(f"{folder}: {shown!r} is not a file name")
    try:
        root = Path(folder).resolve()
        path = (root / name).resolve()
        if Path(name).is_absolute() or not path.is_relative_to(root):
            raise InputError(f"{folder}: {shown} leads out of this folder: file names must be relative to it")
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise InputError(f"{Path(folder) / shown}: no such file") from None
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        problem = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{Path(folder) / shown}: cannot be opened ({problem})") from None
    if not stat.S_ISREG(mode):
        raise InputError(f"{Path(folder) / shown}: not a regular file")
    return path


def relative_name(folder: str | Path, name: str) -> str:
    """Return an untrusted file name, normalised, if it stays in its folder; the file need not exist.

    Raises:
        InputError: if the name is absolute, leads out of the folder, or is not a valid file name.
    """
    shown = scrub(str(name), max_length=120)
    if not isinstance(name, str) or not name or "\0" in name:
        raise InputError(f"{folder}: {shown!r} is not a file name")
    normal = os.path.normpath(name)
    if os.path.isabs(normal) or normal.split(os.sep)[0] == "..":
        raise InputError(f"{folder}: {shown} leads out of this folder: file names must be relative to it")
    return normal


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading bytes, without blocking on a FIFO or touching a device.

    Raises:
        InputError: if there is no such file, it is not readable, or it is a folder, a FIFO, a socket or a device.
    """
    shown = printable(path)
    try:
        mode = os.stat(path).st_mode  # before opening: opening a device may have side effects
        if stat.S_ISREG(mode):
            return open(path, "rb", opener=_open_without_waiting)
    except FileNotFoundError:
        raise InputError(f"{shown}: no such file") from None
    except PermissionError:
        raise InputError(f"{shown}: may not be read: check its permissions") from None
    except (OSError, ValueError) as error:  # a name that is too long, a loop of symbolic links, a null byte
        problem = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{shown}: cannot be opened ({problem})") from None
    raise InputError(f"{shown}: this is {'a folder, not a file' if stat.S_ISDIR(mode) else 'not a regular file'}")


def _open_without_waiting(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # otherwise opening a FIFO waits for its writer
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # replaced since the check
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file")
    return descriptor


def read_text(path: str | Path, max_bytes: int | None = None) -> str:
    """Return the content of a UTF-8 text file, without a byte order mark.

    Raises:
        InputError: if the file is missing, not a regular file, larger than `max_bytes`, or not UTF-8.
    """
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):  # reading a FIFO or a device may never end
            problem = "this is a folder" if Path(path).is_dir() else "not a regular file"
            raise InputError(f"{path}: {problem}")
        if max_bytes is not None and status.st_size > max_bytes:
            raise InputError(f"{path}: {status.st_size:,} bytes exceed the limit of {max_bytes:,}")
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        with Path(path).open("rb") as file:
            compressed = file.read(2) in (b"\x1f\x8b", b"PK", b"BZ")
        remedy = "a compressed file: unpack it first" if compressed else "not UTF-8 text: save it as UTF-8"
        raise InputError(f"{path}: {remedy}") from None
    except (OSError, MemoryError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or first_line(error)})") from None
    except ValueError as error:  # a null byte in the name
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be read ({first_line(error)})") from None


def parse_json(text: str, where: str | Path, unique: bool = False) -> Any:
    """Parse untrusted JSON; lone surrogates become U+FFFD, so that the content can be encoded again.

    Args:
        where: source for the error message: a file, or a file and line.
        unique: refuse an object that has a name twice, of which JSON readers keep the last.

    Raises:
        InputError: if the text is not JSON, is nested too deeply, contains a number of too many digits or, if `unique`,
            a name twice.
    """
    try:
        content = json.loads(text, object_pairs_hook=_unique if unique else None)
        return without_surrogates(content) if "\\u" in text else content
    except _NameTwiceError as error:
        raise InputError(f"{where}: {scrub(str(error), 40)}: it appears twice: remove one") from None
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if "\n" not in text.strip() else f"line {error.lineno}, column {error.colno}"
        raise InputError(f"{where}: not JSON ({error.msg}, {place})") from None
    except RecursionError:
        raise InputError(f"{where}: JSON nested too deeply") from None
    except ValueError as error:  # a number with thousands of digits
        raise InputError(f"{where}: not JSON ({first_line(error)})") from None


class _NameTwiceError(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise _NameTwiceError(
            next(name for name in names if content.pop(name, names) is names)
        )  # the first that is repeated
    return content


def without_surrogates(content: Any) -> Any:
    """Return JSON content with each lone surrogate replaced by U+FFFD."""
    if isinstance(content, str):
        return content.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(content, list):
        return [without_surrogates(one) for one in content]
    if isinstance(content, dict):
        return {without_surrogates(name): without_surrogates(value) for name, value in content.items()}
    return content


def read_json(path: str | Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        InputError: as `read_text` and `parse_json`.
    """
    return parse_json(read_text(path), path, unique=True)


def read_jsonl(path: str | Path, skip_unfinished: bool = False) -> Iterator[tuple[int, Any]]:
    """Yield the line number (from 1) and the content of each non-empty line of a JSON Lines file.

    Args:
        skip_unfinished: ignore what follows the last line break: a line that a kill cut short, perhaps in the middle
            of a character.

    Raises:
        InputError: as `read_text` and `parse_json`, with the line number.
    """
    yield from _parse_lines(_finished_lines(path), path) if skip_unfinished else parse_jsonl(read_text(path), path)


def parse_jsonl(text: str, where: str | Path) -> Iterator[tuple[int, Any]]:
    """Yield the line number (from 1) and the content of each non-empty line of JSON Lines.

    Args:
        where: source for error messages.

    Raises:
        InputError: as `parse_json`, with the line number.
    """
    # Not `splitlines`: JSON strings may contain Unicode's other line separators (U+2028, U+0085).
    return _parse_lines(text.split("\n"), where)


def _parse_lines(lines: Iterable[str], where: str | Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, parse_json(line, f"{where}: line {number}", unique=True)


def _finished_lines(path: str | Path) -> Iterator[str]:
    with open_regular(path) as file:
        content = file.read()
    for number, line in enumerate(content.rpartition(b"\n")[0].split(b"\n"), start=1):
        try:
            yield line.decode()
        except UnicodeDecodeError:
            raise InputError(f"{path}: line {number}: not UTF-8 text") from None


def read_yaml(path: str | Path, max_bytes: int = 2**20, as_text: bool = False) -> Any:
    """Return the content of a YAML file of plain values.

    Args:
        as_text: as for `parse_yaml`.

    Raises:
        InputError: as `read_text` and `parse_yaml`.
    """
    return parse_yaml(read_text(path, max_bytes), path, as_text)


def parse_yaml(text: str, path: str | Path, as_text: bool = False) -> Any:
    """Return the plain values of a YAML text.

    Args:
        path: source for error messages.
        as_text: return numbers, booleans and dates without a tag as they are written, for readers that know their
            types: YAML would read `no` as False, 010 as 8, 1:30 as 90 and 1.10 as 1.1.

    Raises:
        InputError: if the text is not YAML or contains a duplicate key, a merge key or a tag of a Python object; and if
            its aliases expand to too many values, or are recursive.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            seen = set()
            for key, _ in node.value:
                if key.tag == "tag:yaml.org,2002:merge":
                    raise yaml.constructor.ConstructorError(None, None, "merge keys are not supported", key.start_mark)
                if isinstance(key, yaml.ScalarNode) and key.value in seen:
                    problem = f"duplicate key {key.value!r}"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))

        def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
            if ":" in node.value and len(node.value) > _MOST_YAML_DIGITS:  # in base 60, which takes quadratic time
                problem = f"a number in base 60 of more than {_MOST_YAML_DIGITS} digits"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
            return super().construct_yaml_int(node)

    Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
    if as_text:
        kept = ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")
        Loader.yaml_implicit_resolvers = {
            first: [(tag, pattern) for tag, pattern in resolvers if tag in kept]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }
    try:
        content = yaml.load(text, Loader=Loader)
    except RecursionError:
        raise InputError(f"{path}: cannot be read as YAML (nested too deeply)") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{path}: cannot be read as YAML ({scrub(error.problem or '')}{line})") from None
    except Exception as error:  # PyYAML raises many types for invalid numbers, dates and characters
        raise InputError(f"{path}: cannot be read as YAML ({first_line(error)})") from None
    waiting, count = [content], 0
    while waiting:
        one = waiting.pop()
        count += 1
        if count > _MOST_YAML_VALUES:
            raise InputError(f"{path}: its aliases expand to more than {_MOST_YAML_VALUES:,} values")
        if isinstance(one, dict):
            waiting += one.values()
        elif isinstance(one, (list, set)):
            waiting += one
    return content


def check_line_breaks(text: str, where: str | Path) -> None:
    """Check a card before huggingface_hub looks for its metadata, which takes quadratic time in blank lines in a row.

    Raises:
        InputError: if there are too many.
    """
    if max(map(len, re.findall(r"[\r\n]+", text)), default=0) > _MOST_LINE_BREAKS:
        raise InputError(f"{where}: more than {_MOST_LINE_BREAKS} blank lines in a row: remove them")


def validate(content: Any, kind: type[T] | Any, where: str | Path) -> T:
    """Validate untrusted content against a type or pydantic model, and return the validated value.

    Args:
        content: as returned by `parse_json`.
        kind: any type that pydantic's `TypeAdapter` accepts.
        where: source for the error message: a file, or a file and line.

    Raises:
        InputError: with the name of the first invalid field, and the reason.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
        field = ".".join(map(str, problem["loc"]))
        message = problem["msg"].removeprefix("Value error, ")  # of a validator of this package
        raise InputError(f"{where}: {f'{scrub(field, 80)}: ' if field else ''}{scrub(message)}") from None
    except RecursionError:
        raise InputError(f"{where}: nested too deeply") from None


def check_output(path: Path, option: str, folder: bool) -> None:
    """Check that a file or folder can be written, before the work that leads to it.

    Args:
        option: for errors, such as `--out`.
        folder: whether it is a folder, which is made with its parents, or a file in a folder that exists.

    Raises:
        InputError: if it cannot be written, with the remedy.
    """
    shown = f"{option} {printable(path)}: cannot be written"
    try:
        if not folder and path.exists() and not path.is_file():
            raise InputError(f"{shown}: this is {'a folder' if path.is_dir() else 'not a regular file'}: name a file")
        if folder and (path.exists() or path.is_symlink()) and not path.is_dir():
            raise InputError(f"{shown}: this is a file: name a folder")
        place = path if folder else path.parent
        if not folder and not place.exists():
            raise InputError(f"{shown}: there is no folder {printable(place)}: make it, or name another")
        while not place.exists() and place != place.parent:
            place = place.parent
        if not place.is_dir():
            raise InputError(f"{shown}: {printable(place)} is a file: name another folder")
        if not os.access(place, os.W_OK | os.X_OK):
            raise InputError(f"{shown}: {printable(place)} may not be written: check its permissions, or name another")
    except (OSError, ValueError) as error:  # a name that is too long, a loop of symbolic links, a null byte
        if isinstance(error, InputError):
            raise
        problem = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{shown} ({problem}): name another") from None


@contextmanager
def atomic_write(path: Path) -> Iterator[TextIO]:
    """Write a text file atomically: it replaces `path` when the block ends, and a failure leaves `path` unchanged."""
    partial = path.with_name(path.name + ".partial")
    try:
        # In a folder that others can write to, a symbolic link of this name is replaced, not followed.
        partial.unlink(missing_ok=True)
        with partial.open("x", encoding="utf-8", errors="backslashreplace") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except OSError as error:
        if error.filename is None:  # a full disk: name the file in the message
            error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically, with an indentation of two spaces."""
    with atomic_write(path) as file:
        file.write(json.dumps(content, ensure_ascii=False, indent=2) + "\n")


def json_line(content: Any) -> str:
    """Return content as a line of a JSON Lines file, with its line break."""
    return json.dumps(content, ensure_ascii=False) + "\n"


def flush_to_disk(path: Path) -> None:
    """Flush a file, or a folder and everything in it, to disk."""
    if path.is_dir():
        for entry in path.iterdir():
            flush_to_disk(entry)
        sync_names(path)
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_names(folder: Path) -> None:
    """Flush the directory entries of a folder (files created, renamed and removed) to disk."""
    with suppress(OSError):  # not supported by some file systems, and not on Windows
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def locked(path: str | Path, busy: str, wait: bool = False) -> Iterator[bool]:
    """Hold a lock for the block; the operating system releases it however the process ends.

    Args:
        path: of the lock file, which is not removed.
        busy: message for when another process holds the lock.
        wait: print `busy` and wait, instead of raising it.

    Yields:
        Whether the lock is held; False on a file system without locks.

    Raises:
        InputError: with `busy`, unless `wait`.
        OSError: if the lock file cannot be created.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise InputError(busy) from None
        print(busy, file=sys.stderr, flush=True)
        lock.acquire()
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    try:
        yield lock.is_locked
    finally:
        lock.release()


@contextmanager
def named_disk_errors(folder: str | Path) -> Iterator[None]:
    """Turn disk errors that name no file, such as that of a full disk, into an error that names the folder.

    Raises:
        InputError: in place of such an error.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        problem = os.strerror(error.errno) if error.errno else first_line(error)
        raise InputError(f"{folder}: cannot be written ({problem}): run the same command again to resume") from None


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Make a file available at another path, as a hard link if the file system allows it."""
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)
