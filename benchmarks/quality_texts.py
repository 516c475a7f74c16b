"""Texts that quality is measured on: of every Python installation, and of Debian's licences.

Three that share no document: what models are trained on here, what they are calibrated on, and what they
are judged by (half of it of the calibration's kind, half of another). And one that judges what was
calibrated on edgeinfer's own text.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Literal

from edgeinfer.measure.texts import measured_text

Kind = Literal["training", "calibration", "unseen", "measured"]
TRAINING: Kind = "training"
CALIBRATION: Kind = "calibration"
UNSEEN: Kind = "unseen"
MEASURED: Kind = "measured"
_LICENCES = Path("/usr/share/common-licenses")
_LICENCE_NAMES = ("GPL-3", "MPL-2.0", "Apache-2.0", "GFDL-1.3", "Artistic")
_PIECE = 4000  # characters of one kind in a row
_CALIBRATED_SHARE = 0.6


def quality_text(kind: Kind) -> str:
    """Raises OSError where this is no Debian (unseen, measured)."""
    if kind == TRAINING:
        return "\n\n".join(_docstrings())
    if kind == MEASURED:
        return _and_licences(measured_text(None))
    topics = _topics()
    edge = int(len(topics) * _CALIBRATED_SHARE)
    if kind == CALIBRATION:
        return "\n\n".join(topics[:edge])
    return _and_licences("\n\n".join(topics[edge:]))


def _and_licences(text: str) -> str:
    licences = "\n\n".join((_LICENCES / name).read_text() for name in _LICENCE_NAMES)
    both = (_pieces(text), _pieces(licences))
    return "\n\n".join(piece for pair in zip_longest(*both, fillvalue="") for piece in pair)


def _topics() -> list[str]:
    """What Python says of its language, in an order without meaning."""
    from pydoc_data import topics

    return [topics.topics[name] for name in sorted(topics.topics, key=lambda name: name[::-1])]


def _docstrings() -> Iterator[str]:
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) > 200:
                    yield text


def _pieces(text: str) -> Iterator[str]:
    for start in range(0, len(text), _PIECE):
        yield text[start : start + _PIECE]
