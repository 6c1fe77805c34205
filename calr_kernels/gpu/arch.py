"""What is known of a GPU: its limits, and whether its launches may overlap."""

import dataclasses
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch


@dataclass(frozen=True)
class Arch:
    """A GPU: threads of a warp, processors, shared memory of one of them in bytes."""

    name: str
    backend: Literal["cuda", "hip"]
    version: int | str
    warp: int
    processors: int
    shared: int

    @property
    def assembles(self) -> bool:
        """Whether kernels may hold NVIDIA's assembly: not in the interpreter."""
        return self.backend == "cuda" and int(self.version) > 0

    @property
    def overlaps(self) -> bool:
        """Whether a kernel may start before the one that it depends on has ended (NVIDIA's
        programmatic dependent launch, from Hopper on)."""
        return self.backend == "cuda" and int(self.version) >= 90


ARCHS = {
    arch.name: arch
    for arch in (
        Arch("sm_80", "cuda", 80, 32, 108, 166_912),  # A100 80 GB SXM
        Arch("sm_90", "cuda", 90, 32, 132, 232_448),  # H100 SXM
        Arch("sm_100", "cuda", 100, 32, 148, 232_448),  # B200
        Arch("gfx942", "hip", "gfx942", 64, 304, 65_536),  # MI300X
    )
}
INTERPRETED = Arch("interpreter", "cuda", 0, 32, 4, 232_448)


@cache
def device_arch(device: torch.device) -> Arch:
    """Return the model of a device: the newest known architecture not newer than it, with the
    processors that it has; of AMD's, always the one known."""
    if device.type != "cuda":
        return INTERPRETED
    if torch.version.hip:
        return ARCHS["gfx942"]
    version = _version(device)
    older = [a for a in ARCHS.values() if a.backend == "cuda" and int(a.version) <= version]
    newest = max(older, key=lambda arch: int(arch.version))
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return dataclasses.replace(newest, processors=count)


@cache
def supported(device: torch.device) -> bool:
    """Tell whether the kernels are meant for a GPU: NVIDIA's from Ampere on, AMD's CDNA."""
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).startswith("gfx9")
    return _version(device) >= 80


def _version(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
