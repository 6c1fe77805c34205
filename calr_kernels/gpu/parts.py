"""What the Triton kernels share: rounding, the wait for the launch before, levels of integers."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LEVELS = {"uniform": 0, "formula": 1, "table": 2}  # as kernels take them
UNIFORM, FORMULA = tl.constexpr(0), tl.constexpr(1)
# of the tables, powers 0 to 4 and 5 of q: off by at most 0.17 (8 entries) and 0.49 (16)
C3_0, C3_1, C3_2 = tl.constexpr(2.0), tl.constexpr(24.69694), tl.constexpr(0.1062925)
C3_3, C3_4, C3_5 = tl.constexpr(0.2746599), tl.constexpr(0.05697279), tl.constexpr(0.02840136)
C4_0, C4_1, C4_2 = tl.constexpr(1.0), tl.constexpr(11.42644), tl.constexpr(0.01887354)
C4_3, C4_4 = tl.constexpr(0.08171047), tl.constexpr(0.001072552)
NEAREST = tl.constexpr(12582912.0)  # 1.5 · 2^23: adding it leaves a float32 no fraction


@triton.jit
def rounded(value, dtype: tl.constexpr, EMULATE_BF16: tl.constexpr):
    """Round float32 to dtype; EMULATE_BF16 rounds to bfloat16, to nearest even, within float32."""
    if EMULATE_BF16:  # the interpreter's own bfloat16 truncates
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        value = bits.to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def wait(PDL: tl.constexpr):
    """Wait until the launch before has written all that it writes; let the next one begin.

    What is loaded before must be constant since the last launch that does not let the next begin
    early: weights, and never what a kernel of ours has written.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def level(q, BITS: tl.constexpr, LEVELS: tl.constexpr):
    """Return the levels, float32, of integers q, float32: those of `forms.Form.values`.

    The formula as it is written; for the tables of 8 and of 16 a polynomial whose values are nearer
    to their entries than to any other whole number. Adding NEAREST rounds.
    """
    if LEVELS == UNIFORM:
        return q
    if LEVELS == FORMULA:
        half: tl.constexpr = 1 << (BITS - 1)
        per_q = 127.0 / 1.5 / half + q * q * (127.0 / 3.0 / half / half / half)
        return (q * per_q + NEAREST) - NEAREST
    if BITS == 4:
        per_q = C4_1 + q * (C4_2 + q * (C4_3 + q * C4_4))
        return (q * per_q + (NEAREST + C4_0)) - NEAREST
    per_q = C3_1 + q * (C3_2 + q * (C3_3 + q * (C3_4 + q * C3_5)))
    return (q * per_q + (NEAREST + C3_0)) - NEAREST


@triton.jit
def field(words, high, i: tl.constexpr, BITS: tl.constexpr):
    """Return the integers q, float32, in field i of words and of the words of their high bits.

    Their bits become those of a number between 2^23 and 2^24, where they stand: a mask and a
    multiplication by a power of two, which is exact, are all that it takes.
    """
    low: tl.constexpr = 8 if BITS == 8 else 4 if BITS >= 4 else 2
    more: tl.constexpr = BITS - low
    together: tl.constexpr = 23 // low  # fields that fit the 23 bits
    j: tl.constexpr = i % together
    bits = (words >> (i - j) * low) & (((1 << low) - 1) << j * low)
    if more > 0:
        up: tl.constexpr = (j + 1) * low - i * more  # from its place in the high word
        moved = high << up if up >= 0 else high >> -up
        bits |= moved & (((1 << more) - 1) << (j + 1) * low)
    number = (bits | 0x4B000000).to(tl.float32, bitcast=True)
    unit: tl.constexpr = 1 << j * low
    return number * (1.0 / unit) - (8388608.0 / unit + (1 << BITS - 1))
