"""What is known of a GPU: its limits, and whether its launches may overlap."""

import dataclasses
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch


@dataclass(frozen=True)
class Arch:
    """A GPU: peak memory rate in bytes/s, processors, shared memory of one of them in bytes."""

    name: str
    backend: Literal["cuda", "hip"]
    version: int | str
    warp: int
    processors: int
    bandwidth: float
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
        Arch("sm_80", "cuda", 80, 32, 108, 2.04e12, 166_912),  # A100 80 GB SXM
        Arch("sm_90", "cuda", 90, 32, 132, 3.35e12, 232_448),  # H100 SXM
        Arch("sm_100", "cuda", 100, 32, 148, 8.0e12, 232_448),  # B200
        Arch("gfx942", "hip", "gfx942", 64, 304, 5.3e12, 65_536),  # MI300X
    )
}
INTERPRETED = Arch("interpreter", "cuda", 0, 32, 4, 1.0, 232_448)


@cache
def device_arch(device: torch.device) -> Arch:
    """Return the model of a device: the newest known architecture not newer than it, or the oldest,
    with the processors and the shared memory that it has; of AMD's, always the one known."""
    if device.type != "cuda":
        return INTERPRETED
    if torch.version.hip:
        return ARCHS["gfx942"]
    major, minor = torch.cuda.get_device_capability(device)
    known = sorted((a for a in ARCHS.values() if a.backend == "cuda"), key=lambda a: int(a.version))
    older = [a for a in known if int(a.version) <= 10 * major + minor]
    found = older[-1] if older else dataclasses.replace(known[0], version=10 * major + minor)
    properties = torch.cuda.get_device_properties(device)
    # consumer GPUs have less shared memory than the best of their generation; torch may not say
    shared = getattr(properties, "shared_memory_per_block_optin", 99 << 10)
    return dataclasses.replace(
        found,
        name=f"{found.name}/{properties.name.replace(' ', '_')}",
        processors=properties.multi_processor_count,
        shared=min(found.shared, shared),
    )
