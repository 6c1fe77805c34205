"""The assembly within kernels, followed instruction by instruction as NVIDIA's PTX ISA defines it.

The interpreter runs its plain twin; on a GPU (--device cuda) every test of the kernels runs it.
"""

import numpy as np
import pytest

from calr_kernels.forms import Form
from calr_kernels.gpu import parts


def run(text: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Execute and, or, shifts and prmt on uint32 arrays; return all registers."""
    registers = dict(inputs)

    def value(word: str) -> np.ndarray:
        return registers[word] if word in registers else np.uint32(int(word, 0))

    def permuted(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
        """prmt: byte i of the result is the byte of b:a that nibble i selects; a nibble's highest
        bit would ask for the sign of that byte, and no selector here has it."""
        a, b, selector = np.broadcast_arrays(a, b, selector)
        pool = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
        found = np.zeros(a.shape, np.uint32)
        for i in range(4):
            nibble = selector >> np.uint32(4 * i) & np.uint32(15)
            assert (nibble < 8).all()
            byte = pool >> (nibble * 8).astype(np.uint64) & np.uint64(255)
            found |= byte.astype(np.uint32) << np.uint32(8 * i)
        return found

    operations = {
        "and.b32": lambda a, b: a & b,
        "or.b32": lambda a, b: a | b,
        "shr.u32": lambda a, b: a >> b,
        "shl.b32": lambda a, b: a << b,
        "prmt.b32": permuted,
    }
    for line in text.strip().strip("{}").split(";"):
        if line.strip() and not line.strip().startswith(".reg"):
            name, rest = line.strip().split(" ", 1)
            goal, *operands = (word.strip() for word in rest.split(","))
            registers[goal] = operations[name](*map(value, operands))
    return registers


@pytest.mark.parametrize(("bits", "levels"), sorted(parts.LOOKED_UP))
def test_eight_codes_become_eight_levels(bits, levels):
    values = np.array(Form(bits, levels, 32).values)
    codes = np.random.default_rng(0).integers(0, 1 << bits, (2000, 8)).astype(np.uint32)
    words = ((codes & 15) << np.arange(0, 32, 4, dtype=np.uint32)).sum(1).astype(np.uint32)
    high = ((codes >> 4) << np.arange(8, dtype=np.uint32)).sum(1).astype(np.uint32)
    text = parts.SIXTEEN.value if bits == 4 else parts.THIRTY_TWO.value
    found = run(text, {"$8": words, "$9": high})
    for i in range(8):
        numbers = found[f"${i}"].view(np.float32) - np.float32(8388608 + 128)
        assert (numbers == values[codes[:, i]]).all()


def test_prmt_takes_bytes_of_the_second_above_those_of_the_first():
    """As the instruction's own example has it: a funnel of two words."""
    words = {"x": np.array([0x33221100], np.uint32), "y": np.array([0x77665544], np.uint32)}
    found = run("{ prmt.b32 z, x, y, 0x5432; prmt.b32 w, x, y, 0x0147; }", words)
    assert found["z"][0] == 0x55443322
    assert found["w"][0] == 0x00114477
