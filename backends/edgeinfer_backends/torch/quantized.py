"""Matrices of 8 and 4 bits in the place of a `Linear`.

Int8Linear computes in whole numbers, but for the few inputs that are far larger than the rest (LLM.int8,
Dettmers et al. 2022, arXiv:2208.07339). Int4Linear only stores in 4 bits, in groups with a scale and an
offset each (as tinygemm and gpt-fast do).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeinfer_backends.torch.number_types import Held

OUTLIER = 6.0  # the paper's: entries this large are rare and make their whole column an outlier
_MOST_ERROR = 0.05
_KEPT_SHARE = 50  # of the columns one in so many is kept at most, or eight
GROUP = 32  # weights of an Int4Linear that share a scale
_LEAST_ROWS = 32  # CUDA multiplies whole numbers of no fewer
_FEW_ROWS = 96  # up to here the kernel for 4 bits beats unpacking (measured on AVX-512, 2 cores)


def quantized(linear: nn.Linear, held: Held) -> nn.Module:
    """Matrices of sizes that the kernels have not stay as they are."""
    if not has_kernel(linear.out_features, linear.in_features, held):
        return linear
    return Int8Linear(linear) if held == "int8" else Int4Linear(linear)


def has_kernel(rows: int, width: int, held: Held) -> bool:
    if held == "int8":  # CUDA multiplies by eights
        return width % 8 == 0 and rows % 8 == 0
    return width % GROUP == 0 and rows % 64 == 0


class Int8Linear(nn.Module):
    """weight: (out, in) int8 with a scale for each row; inputs are rounded row by row. Entries of the
    input of `outlier` or more are multiplied in the input's own type (the paper takes their whole
    columns: then a row's result would depend on the rows beside it).

    The paper looks at inputs alone. Where a norm's large weight makes the outlier, the matrix's column
    is small in turn, and lost in the rounding of its rows: columns that would be off by more than
    `_MOST_ERROR` of themselves are kept as they are (few, or the matrix is not one for 8 bits).
    """

    def __init__(self, linear: nn.Linear, outlier: float = OUTLIER, *, keeps: bool = True) -> None:
        """keeps: columns that rounding would lose; without, and with an infinite `outlier`, this is
        plain INT8."""
        super().__init__()
        wide = linear.weight.detach().float()
        scales = wide.abs().amax(dim=1).clamp_min(1e-12) / 127.0
        rounded = (wide / scales.unsqueeze(1)).round()
        off = (rounded * scales.unsqueeze(1) - wide).norm(dim=0) / wide.norm(dim=0).clamp_min(1e-12)
        most = min(max(wide.shape[1] // _KEPT_SHARE, 8), wide.shape[1])
        worst = off.topk(most).indices.sort().values
        kept = worst[off[worst] > (_MOST_ERROR if keeps else float("inf"))]
        rounded[:, kept] = 0.0
        self._hold(rounded.to(torch.int8), scales, kept, linear.weight.detach()[:, kept].clone())
        self.bias = linear.bias
        self._outlier = outlier

    @classmethod
    def of_codes(cls, codes: Tensor, scales: Tensor, computed: torch.dtype) -> Int8Linear:
        """codes: (out, in) int8, scales: (out,) float32, both as a file has them. computed: the inputs'
        type. Whoever reads its bias sets it."""
        found = cls.__new__(cls)
        nn.Module.__init__(found)
        none = torch.empty(0, dtype=torch.int64, device=codes.device)
        found._hold(codes, scales, none, torch.empty(codes.shape[0], 0, dtype=computed).to(codes.device))
        found.bias = None
        found._outlier = OUTLIER
        return found

    def _hold(self, codes: Tensor, scales: Tensor, kept: Tensor, kept_weight: Tensor) -> None:
        self.register_buffer("weight", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("kept", kept)
        self.register_buffer("kept_weight", kept_weight)
        self.out_features, self.in_features = codes.shape

    bias: nn.Parameter | None
    weight: Tensor
    scales: Tensor
    kept: Tensor
    kept_weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(n, in) -> (n, out)."""
        is_outlier = (x.abs() >= self._outlier).index_fill(1, self.kept, False)
        columns = is_outlier.any(dim=0).nonzero().squeeze(1)
        rest = x.float().index_fill(1, self.kept, 0.0).masked_fill(is_outlier, 0.0)
        row_scales = rest.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127.0
        numbers = (rest / row_scales).round().to(torch.int8)
        found = _product(numbers, self.weight).float() * row_scales * self.scales
        if columns.numel():
            weights = self.weight[:, columns].float() * self.scales.unsqueeze(1)
            outliers = x[:, columns] * is_outlier[:, columns]
            found = found + functional.linear(outliers, weights.to(x.dtype)).float()
        if self.kept.numel():
            found = found + functional.linear(x[:, self.kept], self.kept_weight).float()
        found = found.to(x.dtype)
        return found if self.bias is None else found + self.bias

    def dequantized(self) -> Tensor:
        found = self.weight.float() * self.scales.unsqueeze(1)
        return found.index_copy(1, self.kept, self.kept_weight.float())


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x: (n, in), weight: (out, in), int8. (n, out) int32."""
    rows = x.shape[0]
    if x.is_cuda and rows < _LEAST_ROWS:
        x = functional.pad(x, (0, 0, 0, _LEAST_ROWS - rows))
    return torch._int_mm(x, weight.t())[:rows]


class Int4Linear(nn.Module):
    """Rounded to 16 steps between the least and the largest of each group. weight = (n - 8) * scale +
    offset, n in 0..15."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._hold(*rounded_to_4_bits(linear.weight.detach().float()), linear.weight.dtype)
        self.bias = linear.bias

    @classmethod
    def of_codes(
        cls, numbers: Tensor, scales: Tensor, offsets: Tensor, computed: torch.dtype
    ) -> Int4Linear:
        """As `rounded_to_4_bits` gives them. computed: the inputs' type. Whoever reads its bias sets
        it."""
        found = cls.__new__(cls)
        nn.Module.__init__(found)
        found._hold(numbers, scales, offsets, computed)
        found.bias = None
        return found

    def _hold(self, numbers: Tensor, scales: Tensor, offsets: Tensor, computed: torch.dtype) -> None:
        self.out_features, self.in_features = self._size = (numbers.shape[0], numbers.shape[1])
        pairs = torch.stack((scales, offsets), dim=-1).transpose(0, 1).contiguous()
        is_cuda = numbers.is_cuda
        # tinygemm's kernel is for bf16 only; the processor's for any.
        self._computed = torch.bfloat16 if is_cuda else computed
        self.register_buffer("scales_and_offsets", pairs.to(self._computed))
        self.register_buffer("packed", _packed(numbers))
        self._can_unpack = not is_cuda and torch.equal(
            _unpacked(self.packed, *self._size).to(torch.int32), numbers
        )

    bias: nn.Parameter | None
    packed: Tensor
    scales_and_offsets: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(n, in) -> (n, out)."""
        if self._can_unpack and x.shape[0] > _FEW_ROWS:
            return functional.linear(x, self.dequantized().to(x.dtype), self.bias)
        found = self._product(x.to(self._computed)).to(x.dtype)
        return found if self.bias is None else found + self.bias

    def _product(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return torch._weight_int4pack_mm(x, self.packed, GROUP, self.scales_and_offsets)
        found: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, self.packed, GROUP, self.scales_and_offsets
        )
        return found

    def dequantized(self) -> Tensor:
        """(out, in), of the type that it computes in."""
        if not self._can_unpack:
            identity = torch.eye(self._size[1], dtype=self._computed, device=self.packed.device)
            return self._product(identity).t()
        numbers = _unpacked(self.packed, *self._size).view(self._size[0], -1, GROUP)
        scales, offsets = (each.t().unsqueeze(-1) for each in self.scales_and_offsets.unbind(dim=-1))
        found = numbers.to(self._computed).sub_(8).mul_(scales).add_(offsets)
        return found.view(self._size)


def rounded_to_4_bits(wide: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """wide: (out, in) float32. Numbers 0..15 as int32 (out, in), scales and offsets (out, groups)."""
    groups = wide.view(wide.shape[0], -1, GROUP)
    low, high = groups.amin(dim=-1), groups.amax(dim=-1)
    scales = ((high - low) / 15.0).clamp_min(1e-12)
    numbers = ((groups - low.unsqueeze(-1)) / scales.unsqueeze(-1)).round().clamp(0, 15)
    return numbers.to(torch.int32).view(wide.shape), scales, low + 8.0 * scales


def _packed(numbers: Tensor) -> Tensor:
    """As the kernel of the device they are on wants them."""
    if numbers.is_cuda:
        pairs = (numbers[:, ::2] << 4 | numbers[:, 1::2]).to(torch.uint8)
        inner = next(tiles for tiles in (8, 4, 2) if numbers.shape[1] % (16 * tiles) == 0)
        return torch._convert_weight_to_int4pack(pairs, inner)
    found: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1)
    return found


def _unpacked(packed: Tensor, rows: int, width: int) -> Tensor:
    """What the processor's packing is, as far as is known: of 64 rows, for each column, 16 bytes with
    the rows at 0 and 32 and 16 bytes with those at 16 and 48 (torch 2.13, AVX-512). Whoever calls this
    compares once: it is nobody's promise."""
    if packed.numel() != rows * width // 2 or packed.dtype != torch.uint8:
        return torch.empty(0)
    blocks = packed.view(rows // 64, width, 2, 16)
    low, high = blocks & 15, blocks >> 4
    # (block, column, half, lane): low has the rows 0 and 16, high those at 32 and 48
    found = torch.stack((low, high), dim=2)
    return found.view(rows // 64, width, 64).transpose(1, 2).reshape(rows, width)
