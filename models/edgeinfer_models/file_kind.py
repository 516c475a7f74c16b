"""What a file that is not the model it should be seems to be, for the error message."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from edgeinfer.errors import ModelFileInvalid, ModelNotFound

SNIFF_BYTES = 512

_SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (b"GGUF", "a GGUF model", "name it .gguf"),
    (b"FUGG", "a GGUF file of a big-endian machine", "download the little-endian file"),
    (b"ggml", "a ggml file from before GGUF", "download the model as .gguf"),
    (b"ggjt", "a ggml file from before GGUF", "download the model as .gguf"),
    (b"ggla", "an old LoRA adapter", "download the model as .gguf"),
    (
        b"version https://git-lfs",
        "a git-lfs pointer, not the model itself",
        "run `git lfs pull` beside it",
    ),
    (b"PK\x03\x04", "a zip archive or PyTorch checkpoint", "unpack it, or download the model as .gguf"),
    (b"\x80\x02", "a PyTorch pickle", "download the model as .gguf or .safetensors"),
    (b"\x1f\x8b", "gzip data", "unpack it first"),
    (b"(\xb5/\xfd", "zstd data", "unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it first"),
    (b"\xfd7zXZ", "xz data", "unpack it first"),
    (b"\x89HDF", "an HDF5 file", "download the model as .gguf or .safetensors"),
    (b"\x7fELF", "a program", "give the path of a .gguf file"),
)


def describe(head: bytes) -> tuple[str, str]:
    """(what the file seems to be, what to do next) from its first bytes."""
    if not head:
        return "empty", "download it again"
    for magic, what, then in _SIGNATURES:
        if head.startswith(magic):
            return what, then
    if not head.strip(b"\0"):
        return "all zeros where its header should be", "download it again"
    if _looks_like_safetensors(head):
        return "a safetensors file", "name it .safetensors, or use a .gguf of the model"
    start = head.lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "a web page, as a failed download leaves it", "download the file itself"
    if start.startswith((b"{", b"[")):
        return "JSON text", "give the path of a .gguf file"
    if _looks_like_text(head):
        return "a text file", "give the path of a .gguf file"
    return "unknown data", "download it again as .gguf"


def only_pickles(names: Iterable[str]) -> str:
    """For a folder without weights that can be read: what is to be done, if it has them as pickles."""
    pickles = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl")))
    if not pickles:
        return ""
    return (
        f"has its weights as a Python pickle ({pickles[0][:60]}), which can run code and is never read;"
        " download the .safetensors or .gguf files of this model"
    )


def shown(path: Path | str, limit: int = 200) -> str:
    """A path for a message: its end if it is long, so that the message's own end is not cut off."""
    text = str(path)
    return text if len(text) <= limit else "…" + text[-limit:]


def require_regular_file(path: Path) -> int:
    """The size of a readable regular file; anything else is one clear line.

    Raises ModelNotFound, ModelFileInvalid. Never blocks: a FIFO is not opened.
    """
    name = shown(path)
    try:
        info = path.stat()
    except FileNotFoundError:
        raise ModelNotFound(
            f"{name}: no such file; check the path, or see `edgeinfer models list`"
        ) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "the path is not valid"
        raise ModelFileInvalid(f"{name}: cannot be read ({reason}); check the path") from None
    if stat.S_ISDIR(info.st_mode):
        raise ModelFileInvalid(f"{name}: is a folder; give the model file in it")
    if not stat.S_ISREG(info.st_mode):
        raise ModelFileInvalid(f"{name}: is a device, pipe or socket; give a regular file")
    if not os.access(path, os.R_OK):
        raise ModelFileInvalid(f"{name}: permission denied; make it readable for your user")
    return info.st_size


def _looks_like_safetensors(head: bytes) -> bool:
    return len(head) > 9 and 2 <= int.from_bytes(head[:8], "little") < 2**32 and head[8:9] == b"{"


def _looks_like_text(head: bytes) -> bool:
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # not merely a character cut by the end of the sniff
            return False
        text = head[: error.start].decode("utf-8")
    return all(c.isprintable() or c in "\t\r\n\f" for c in text)
