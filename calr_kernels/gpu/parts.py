"""What the Triton kernels share: rounding, the wait for the launch before, levels of integers."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from calr_kernels.forms import Form
from calr_kernels.gpu.arch import Arch

LEVELS = {"uniform": 0, "formula": 1, "table": 2}  # as kernels take them
UNIFORM, FORMULA = tl.constexpr(0), tl.constexpr(1)
# of the tables, powers 0 to 4 and 5 of q: off by at most 0.17 (8 entries) and 0.49 (16)
C3_0, C3_1, C3_2 = tl.constexpr(2.0), tl.constexpr(24.69694), tl.constexpr(0.1062925)
C3_3, C3_4, C3_5 = tl.constexpr(0.2746599), tl.constexpr(0.05697279), tl.constexpr(0.02840136)
C4_0, C4_1, C4_2 = tl.constexpr(1.0), tl.constexpr(11.42644), tl.constexpr(0.01887354)
C4_3, C4_4 = tl.constexpr(0.08171047), tl.constexpr(0.001072552)
NEAREST = tl.constexpr(12582912.0)  # 1.5 · 2^23: adding it leaves a float32 no fraction


def looks_up(arch: Arch, form: Form) -> bool:
    """Tell whether kernels look levels up: those of LOOKED_UP, on NVIDIA's GPUs."""
    return arch.assembles and (form.bits, form.levels) in LOOKED_UP


def byte_permutes(values: tuple[int, ...]) -> str:
    """Write PTX that turns 8 codes into 8 numbers 2^23 + 128 + level, as the bits of float32.

    $8: the codes' low 4 bits, a nibble each; $9: of 32 values, their fifth bits in as many bits.
    prmt takes four of the eight bytes of its first two operands, by the nibbles of the third: eight
    values by the low three bits, then of two such choices the one that the next bit says.
    """
    table = [0] * (len(values) // 4)
    for code, value in enumerate(values):
        table[code // 4] |= (value + 128) << code % 4 * 8
    chosen = [
        "and.b32 low, $8, 0x77777777",
        "shr.u32 middle, $8, 1",
        "and.b32 middle, middle, 0x44444444",
        "or.b32 middle, middle, 0x32103210",
    ]
    if len(values) == 32:  # a bit to every nibble
        for shift, mask in ((12, 0x000F000F), (6, 0x03030303), (3, 0x11111111)):
            before = "$9" if shift == 12 else "top"
            chosen += [f"shl.b32 moved, {before}, {shift}", f"or.b32 top, {before}, moved"]
            chosen += [f"and.b32 top, top, {mask:#x}"]
        chosen += ["shl.b32 top, top, 2", "or.b32 top, top, 0x32103210"]
    halves = len(values) // 16
    for first in (0, 4):
        for half in range(halves):
            quarters = [f"{word:#x}" for word in table[4 * half : 4 * half + 4]]
            chosen += [
                f"prmt.b32 one, {quarters[0]}, {quarters[1]}, low",
                f"prmt.b32 other, {quarters[2]}, {quarters[3]}, low",
                f"prmt.b32 four{half}, one, other, middle",
            ]
        if halves == 2:
            chosen += ["prmt.b32 four0, four0, four1, top"]
        chosen += [f"prmt.b32 ${first + i}, four0, 0x4b000000, 0x765{i}" for i in range(4)]
        if first == 0:
            names = ("low", "middle", "top")[: 1 + halves]
            chosen += [f"shr.u32 {name}, {name}, 16" for name in names]
    registers = "low, middle, top, moved, one, other, four0, four1"
    return "{ .reg .b32 " + registers + "; " + "; ".join(chosen) + "; }"


LOOKED_UP = {(4, "table"), (5, "formula")}
SIXTEEN = tl.constexpr(byte_permutes(Form(4, "table", 32).values))
THIRTY_TWO = tl.constexpr(byte_permutes(Form(5, "formula", 32).values))


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

    Their bits become those of a number between 2^23 and 2^24, where they stand: a mask, which
    leaves the exponent, and a multiplication by a power of two, which is exact, are all it takes.
    """
    low: tl.constexpr = 8 if BITS == 8 else 4 if BITS >= 4 else 2
    more: tl.constexpr = BITS - low
    together: tl.constexpr = 23 // low  # fields that fit the 23 bits
    j: tl.constexpr = i % together
    # of all fields that fit together at once, and then of one
    bits = ((words >> (i - j) * low) & ((1 << together * low) - 1)) | 0x4B000000
    bits &= (((1 << low) - 1) << j * low) | -0x800000
    if more > 0:
        up: tl.constexpr = (j + 1) * low - i * more  # from its place in the high word
        moved = high << up if up >= 0 else high >> -up
        bits |= moved & (((1 << more) - 1) << (j + 1) * low)
    number = bits.to(tl.float32, bitcast=True)
    unit: tl.constexpr = 1 << j * low
    return number * (1.0 / unit) - (8388608.0 / unit + (1 << BITS - 1))


@triton.jit
def look_up(words, high, BITS: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Return for each field of words 2^23 + 128 + its level, as the bits of a float32 (LOOKED_UP);
    without ASSEMBLY nothing of use."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            SIXTEEN if BITS == 4 else THIRTY_TWO,
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r", [words, high],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True, pack=1,
        )  # fmt: skip
    return (words, words, words, words, words, words, words, words)


@triton.jit
def levels_of(
    words, high, looked_up, i: tl.constexpr, BITS: tl.constexpr, LEVELS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Return the levels, float32, in field i of words: what `look_up` found, or computed."""
    if ASSEMBLY:
        return looked_up[i].to(tl.float32, bitcast=True) - (8388608.0 + 128.0)
    return level(field(words, high, i, BITS), BITS, LEVELS)
