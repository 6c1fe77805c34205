"""How a compression stays within limits of memory, by its estimates."""

from calr.errors import CalrError
from calr.estimates import Ways, Work
from calr.progress import Phase
from calr.ranks import parse_size
from calr.text import CACHE_BYTES, NATIVE
from calr.training import windows_drawn

ACTIVATIONS = 1 << 30  # of the training, above which they are computed twice, on a CPU
OF_FREE = 0.8  # what of a GPU's free memory is planned with: estimates miss some


def ways_within(work: Work, max_memory: str | None, device_memory: str | None = None) -> Ways:
    """Choose the fastest ways that stay within what the process and its GPU may take, such as 8GB.

    None: what costs no time; on a GPU activations are computed twice where its free memory asks for
    that, which moves no bit of the result. Raises CalrError naming the phase that cannot stay
    within a limit, and for device_memory without a GPU.
    """
    if device_memory is not None and work.on_cpu:
        raise CalrError(
            f"device_memory={device_memory}: limits a GPU, but the CPU computes here, which "
            "max_memory limits; or name a GPU as device"
        )
    least = work.phases(Ways(work.row, natively=False, checkpointed=True))
    of_process = _most("max_memory", max_memory, {n: p.peak_bytes for n, p in least.items()})
    of_gpu = _most("device_memory", device_memory, {n: p.gpu_bytes for n, p in least.items()})
    most = of_process if work.on_cpu else of_gpu
    training = work.phases(Ways()).get("correction")
    if most is None:
        return Ways(checkpointed=training is not None and not _fits(work, training))
    room = work.row
    if work.sampled:
        room += most - _working(work, least["sampling text"])
    batch = work.row * min(NATIVE, windows_drawn(work.recipe))
    natively = work.panels + batch <= room
    room -= natively * work.panels
    checkpointed = training is not None and _working(work, training) > most
    return Ways(min(CACHE_BYTES, room), natively, checkpointed)


def _fits(work: Work, training: Phase) -> bool:
    """Whether a training may keep its activations, where no limit is named."""
    if work.free is None:
        return work.activations <= ACTIVATIONS
    return training.gpu_bytes <= OF_FREE * work.free


def _working(work: Work, phase: Phase) -> int:
    """Bytes of a phase where it computes."""
    return phase.peak_bytes if work.on_cpu else phase.gpu_bytes


def _most(option: str, limit: str | None, least: dict[str, int]) -> int | None:
    """Read a limit; refuse one that some phase cannot keep, by the least bytes of every phase."""
    if limit is None:
        return None
    most, name = parse_size(str(limit), option), max(least, key=lambda name: least[name])
    if least[name] > most:
        raise CalrError(
            f"{option}={limit}: {name} takes about {least[name] / 1e9:.1f} GB at least; "
            f"{_remedy(name)}"
        )
    return most


def _remedy(phase: str) -> str:
    if phase == "sampling text":
        return "name a file of text or builtin as --calibration"
    if phase == "correction":
        return "leave the correction out (correction_tokens=0), or give it more"
    return "give it more"
