"""Codes of a few bits in little-endian streams, lowest bits first: what MLX and compressed-tensors both
mean by "packed into 32-bit words". In bytes, so that no machine's byte order matters."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Codes = npt.NDArray[np.uint8]

WORD_BITS = 32


def pack_codes(codes: Codes, bits: int) -> Codes:
    """codes: (n, width), each below 2**bits. (n, width * bits / 8), in whole bytes."""
    import numpy as np

    if bits == 8:
        return codes
    if bits == 4:
        return codes[:, 0::2] | codes[:, 1::2] << np.uint8(4)
    stream = np.unpackbits(codes[:, :, None], axis=2, bitorder="little")[:, :, :bits]
    return np.packbits(stream.reshape(codes.shape[0], -1), axis=1, bitorder="little")


def unpack_codes(data: Codes, bits: int) -> Codes:
    """The inverse of `pack_codes`."""
    import numpy as np

    if bits == 8:
        return data
    if bits == 4:
        found = np.empty((data.shape[0], 2 * data.shape[1]), np.uint8)
        found[:, 0::2] = data & np.uint8(15)
        found[:, 1::2] = data >> np.uint8(4)
        return found
    stream = np.unpackbits(data, axis=1, bitorder="little").reshape(data.shape[0], -1, bits)
    return np.packbits(stream, axis=2, bitorder="little")[:, :, 0]
