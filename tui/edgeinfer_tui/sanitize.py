"""Text from a model or a clipboard, made safe to put on a terminal."""

from __future__ import annotations

_LINE_BREAKS = {0x2028: "\n", 0x2029: "\n"}
# Overrides and isolates reorder everything that follows them on the line, other widgets included.
_BIDI_CONTROLS = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
# A lone surrogate cannot be encoded: the thread that writes to the terminal would die of it.
_SURROGATES = range(0xD800, 0xE000)

_TABLE: dict[int, str | None] = {
    **{code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"},
    **dict.fromkeys(_BIDI_CONTROLS),
    **dict.fromkeys(_SURROGATES, "\ufffd"),
    **_LINE_BREAKS,
}


def neutralise(text: str) -> str:
    """No C0 or C1 control but newline and tab, no bidirectional override, no lone surrogate.

    An escape sequence loses its ESC and stays visible as harmless characters. Line ends become "\\n".
    """
    return text.replace("\r\n", "\n").replace("\r", "\n").translate(_TABLE)
