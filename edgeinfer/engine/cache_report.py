"""What the prompt cache on disk holds, for `edgeinfer cache`: no model, no runtime."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeinfer.engine.block_files import (
    BLOCK_SUFFIX,
    PART_PREFIX,
    PART_SUFFIX,
    PIN_SUFFIX,
    BlockInvalid,
    check_block,
    read_gap,
    read_header,
    read_small,
)
from edgeinfer.engine.disk_cache import CACHE_NAME, IDENTITY_FILE, identity_folders, stored_blocks

_MAX_IDENTITY_BYTES = 64 * 1024


@dataclass(frozen=True)
class CachedModel:
    """The blocks of one identity. Sizes in bytes, times in seconds since the epoch."""

    identity: str
    model: str
    kv_types: str
    blocks: int
    tokens: int
    num_bytes: int
    pinned: int
    used: float


@dataclass(frozen=True)
class Verdict:
    """checked: files; removed: (file, what was wrong with it)."""

    checked: int
    num_bytes: int
    removed: tuple[tuple[Path, str], ...]


def cached_models(root: Path) -> list[CachedModel]:
    """Most recently used first. Damaged files are not counted."""
    found = []
    all_blocks = stored_blocks(root)
    for folder in identity_folders(root):
        words = _description(folder)
        blocks = [block for block in all_blocks if block.path.parent == folder]
        tokens = 0
        for block in blocks:
            with contextlib.suppress(BlockInvalid, OSError):
                tokens += len(read_header(block.path, bytes.fromhex(folder.name)).tokens)
        found.append(
            CachedModel(
                folder.name,
                str(words.get("model") or "unknown"),
                str(words.get("kv_types") or "unknown"),
                len(blocks),
                tokens,
                sum(block.num_bytes for block in blocks),
                sum(block.is_pinned for block in blocks),
                max((block.used for block in blocks), default=0.0),
            )
        )
    return sorted(found, key=lambda model: -model.used)


def verify(root: Path, progress: Callable[[float], None] = lambda _: None) -> Verdict:
    """Read every file whole, and remove those that are not what they should be."""
    files = [path for folder in identity_folders(root) for path in sorted(_files(folder))]
    removed: list[tuple[Path, str]] = []
    checked = num_bytes = 0
    for index, path in enumerate(files):
        progress(index / len(files))
        try:
            if path.name.endswith(BLOCK_SUFFIX):
                num_bytes += check_block(path, bytes.fromhex(path.parent.name)).num_bytes
            else:
                read_gap(path)
            checked += 1
        except BlockInvalid as error:
            checked += 1
            with contextlib.suppress(OSError):
                path.unlink()
                removed.append((path, str(error)))
        except OSError:  # removed meanwhile
            continue
    progress(1.0)
    return Verdict(checked, num_bytes, tuple(removed))


def clear(root: Path, model: str | None = None) -> int:
    """Remove all, or what belongs to a model; bytes that are free again. Pinned blocks go too."""
    freed = 0
    for folder in identity_folders(root):
        if model is not None and model not in (_description(folder).get("model"), folder.name):
            continue
        own = (
            *_files(folder),
            *folder.glob(f"*{PIN_SUFFIX}"),
            *folder.glob(f"{PART_PREFIX}*{PART_SUFFIX}"),
        )
        for entry in (*own, folder / IDENTITY_FILE):
            with contextlib.suppress(OSError):
                size = entry.lstat().st_size
                entry.unlink()
                freed += size
        with contextlib.suppress(OSError):
            folder.rmdir()
    return freed


def _files(folder: Path) -> Iterator[Path]:
    """Blocks and gaps, as they are named; whatever else is there is not ours."""
    return (path for path in folder.iterdir() if CACHE_NAME.fullmatch(path.name))


def _description(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_small(folder / IDENTITY_FILE, _MAX_IDENTITY_BYTES))
    except (BlockInvalid, OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
