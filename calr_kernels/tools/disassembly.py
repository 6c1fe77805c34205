"""What is in a compiled Triton kernel: its disassembly, counted."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton

MATRIX = {  # instruction of the matrix unit: pattern in the disassembly
    "wgmma": r"\bHGMMA",
    "tcgen05": r"\bUTC\w*MMA",
    "mma": r"\bHMMA",
    "mfma": r"\bv_mfma",
}


def read(asm: dict[str, Any]) -> dict[str, Any]:
    """Return what a kernel compiled to: registers, bytes spilled, instructions by kind.

    asm: what Triton makes of it, by name. matrix: the matrix units' instructions. wide_loads: those
    of 16 bytes a thread. narrow_loads: those of weights of fewer than 4. loop: all instructions of
    the longest loop. Those two are 0 on AMD, whose listings do not tell.
    """
    return _amd(asm["amdgcn"]) if "amdgcn" in asm else _nvidia(asm)


def _nvidia(asm: dict[str, Any]) -> dict[str, Any]:
    """Read a cubin with the tools that triton carries."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", file.name)
        text = _output(tools / "nvdisasm", "-c", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    stack = re.search(r"STACK:(\d+)", usage)
    assert registers and stack
    return {
        "registers": int(registers[1]),
        "spilled": int(stack[1]),
        "matrix": _matrix(text),
        "wide_loads": len(re.findall(r"\b(?:LDG|LDGSTS)\S*\.128", text)),
        # evict-first, as weights are: of fewer than 4 bytes, which high bits of 32 of them take
        "narrow_loads": len(re.findall(r"\bLDG\.E\.EF\.[US]", text)),
        "loop": _longest_loop(text),
        "asynchronous": len(re.findall(r"\b(?:LDGSTS|UTMALDG)", text)),
    }


def _longest_loop(text: str) -> int:
    """Count the instructions of the longest loop of a disassembly: between a label and the last
    branch back to it."""
    labels: dict[str, int] = {}
    count = longest = 0
    for line in text.splitlines():
        if label := re.match(r"(\.L\w+):", line.strip()):
            labels[label[1]] = count
        elif re.search(r"/\*[0-9a-f]{4,}\*/", line) and ";" in line:
            count += 1
            back = re.search(r"BRA.*`\((\.L\w+)\)", line)
            if back and back[1] in labels:
                longest = max(longest, count - labels[back[1]])
    return longest


def _amd(text: str) -> dict[str, Any]:
    """Read the footer and the instructions of an amdgcn listing."""

    def footer(name: str) -> int:
        match = re.search(rf"\.{name}:\s*(\d+)", text)
        assert match, name
        return int(match[1])

    return {
        "registers": footer("vgpr_count"),
        "spilled": footer("private_segment_fixed_size"),
        "matrix": _matrix(text),
        "wide_loads": len(re.findall(r"\b(?:global|buffer)_load_dwordx4", text)),
        "narrow_loads": 0,
        "loop": 0,
        "asynchronous": len(re.findall(r"\bbuffer_load\S* .*\blds\b", text)),
    }


def _matrix(text: str) -> dict[str, int]:
    counts = {name: len(re.findall(pattern, text)) for name, pattern in MATRIX.items()}
    return {name: count for name, count in counts.items() if count}


def _output(*command: Any) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
