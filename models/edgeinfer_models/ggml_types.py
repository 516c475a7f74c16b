"""ggml's tensor types: how many elements make a block, and how many bytes a block takes.

A table of our own because importing `gguf` costs 180 ms and brings numpy; a test keeps the two equal.
Source: ggml.h and ggml-cpu.c of llama.cpp as packaged in llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgeinfer.errors import UsageError


@dataclass(frozen=True)
class GgmlType:
    id: int
    name: str
    block: int  # elements in a block
    block_bytes: int


_TABLE: tuple[tuple[int, str, int, int], ...] = (
    (0, "F32", 1, 4),
    (1, "F16", 1, 2),
    (2, "Q4_0", 32, 18),
    (3, "Q4_1", 32, 20),
    (6, "Q5_0", 32, 22),
    (7, "Q5_1", 32, 24),
    (8, "Q8_0", 32, 34),
    (9, "Q8_1", 32, 40),
    (10, "Q2_K", 256, 84),
    (11, "Q3_K", 256, 110),
    (12, "Q4_K", 256, 144),
    (13, "Q5_K", 256, 176),
    (14, "Q6_K", 256, 210),
    (15, "Q8_K", 256, 292),
    (16, "IQ2_XXS", 256, 66),
    (17, "IQ2_XS", 256, 74),
    (18, "IQ3_XXS", 256, 98),
    (19, "IQ1_S", 256, 50),
    (20, "IQ4_NL", 32, 18),
    (21, "IQ3_S", 256, 110),
    (22, "IQ2_S", 256, 82),
    (23, "IQ4_XS", 256, 136),
    (24, "I8", 1, 1),
    (25, "I16", 1, 2),
    (26, "I32", 1, 4),
    (27, "I64", 1, 8),
    (28, "F64", 1, 8),
    (29, "IQ1_M", 256, 56),
    (30, "BF16", 1, 2),
    (34, "TQ1_0", 256, 54),
    (35, "TQ2_0", 256, 66),
    (39, "MXFP4", 32, 17),
    (40, "NVFP4", 64, 36),
    (41, "Q1_0", 128, 18),
    (42, "Q2_0", 64, 18),
)

GGML_TYPES: dict[int, GgmlType] = {row[0]: GgmlType(*row) for row in _TABLE}
GGML_TYPES_BY_NAME: dict[str, GgmlType] = {t.name: t for t in GGML_TYPES.values()}

# Once in GGUF files, since taken out of llama.cpp.
REMOVED_TYPES: dict[int, str] = {
    4: "Q4_2",
    5: "Q4_3",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}

# A matrix of another type has no product in ggml-cpu: llama.cpp would call a null pointer.
MATRIX_TYPES: frozenset[str] = frozenset(
    t.name
    for t in GGML_TYPES.values()
    if t.name not in ("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64")
)

KV_TYPES: tuple[str, ...] = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")


def row_bytes(type_name: str, elements: int) -> int:
    """Bytes of one row, as ggml_row_size: `elements` rounded up to whole blocks.

    type_name: any case. Raises UsageError for a type that does not exist.
    """
    ggml_type = GGML_TYPES_BY_NAME.get(type_name.upper())
    if ggml_type is None:
        known = ", ".join(KV_TYPES)
        raise UsageError(f"tensor type '{type_name}' does not exist; a KV cache takes one of {known}")
    return -(-elements // ggml_type.block) * ggml_type.block_bytes
