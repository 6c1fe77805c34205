"""A quantised matrix as the GPU kernels read it: words of 16-byte loads, scales apart.

A block is 16 words of 32 bits, the lowest bits of as many weights as fit. Field i of word c, from
the lowest bits up, is weight 16 i + c of the block, so that a field of all words is 16 weights that
lie side by side, and one scale's. What bits a weight has beyond those lie apart, word for word.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from calr_kernels import records
from calr_kernels.forms import PLANES, Form, Levels

WORDS = 16  # of a block
ROWS = 4096  # made at a time: their codes take 4 bytes a weight meanwhile
HIGH = {(4, 1): torch.uint8, (4, 2): torch.int16, (2, 1): torch.int16}  # bits of both planes


class Packed(NamedTuple):
    """words [N, blocks, 16] int32; high: the same shape, where a weight has 3, 5 or 6 bits; scales
    [N, blocks · block / span] float16, one for `span` weights; block: the weights of one."""

    words: Tensor
    high: Tensor | None
    scales: Tensor
    form: Form
    span: int
    block: int


def span_of(form: Form) -> tuple[int, int]:
    """Return the weights that share a packed scale, and those of a block."""
    block = WORDS * 32 // PLANES[form.bits][0]
    span = 32
    while 2 * span <= block and form.scale_group % (2 * span) == 0:
        span *= 2
    return span, block


@torch.no_grad()
def pack(weight: Tensor, bits: int, levels: Levels, scale_group: int, columns: int) -> Packed:
    """Pack records of a form; what pads a row has scale 0."""
    form = Form(bits, levels, scale_group)
    span, block = span_of(form)
    low, *more = PLANES[form.bits]
    blocks, rows = -(-columns // block), weight.shape[0]
    words = torch.empty(rows, blocks, WORDS, dtype=torch.int32, device=weight.device)
    kind = HIGH[low, more[0]] if more else None
    high = None if kind is None else torch.empty_like(words, dtype=kind)
    scales = weight.new_zeros(rows, blocks * block // span, dtype=torch.float16)
    for first in range(0, rows, ROWS):
        part = slice(first, first + ROWS)
        codes, own = records.unpack(weight[part], form, columns)
        codes = torch.nn.functional.pad(codes, (0, blocks * block - columns))
        fields = codes.view(len(codes), blocks, block // WORDS, WORDS).int()
        words[part] = _joined(fields & ((1 << low) - 1), low)
        if high is not None:
            high[part] = _joined(fields >> low, more[0]).to(high.dtype)
        every = own.repeat_interleave(form.scale_group // span, 1)[:, : scales.shape[1]]
        scales[part, : every.shape[1]] = every
    return Packed(words, high, scales, form, span, block)


def _joined(fields: Tensor, bits: int) -> Tensor:
    """Put fields [N, blocks, F, 16] int32 of some bits into words [N, blocks, 16] int32."""
    found = fields[:, :, 0].clone()
    for i in range(1, fields.shape[2]):
        found |= fields[:, :, i] << (i * bits)
    return found
