"""What every phase of a compression takes in memory and time, from shapes; and how to take less.

Modelled, not measured: counts of numbers and of operations, and the speed of short matrix products;
of a GPU that which one was seen to reach.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from calr.methods import resolve
from calr.model import Structure
from calr.progress import Phase
from calr.ranks import CACHE_BYTES as DECOMPOSITION_BYTES
from calr.ranks import PRICED, parse_size
from calr.recipe import Recipe
from calr.rounding import TOGETHER, rounding_operations
from calr.statistics import HELD_BYTES, LOGITS
from calr.text import (
    CACHE_BYTES,
    MOST,
    NATIVE,
    cache_row,
    panel_bytes,
    sampled_in,
    sampling_batch,
)
from calr.training import PART_TOKENS, TARGET_BYTES, windows_drawn
from calr_kernels.eligible import cpu_multiplies_bfloat16

LIBRARY_BYTES = 600_000_000  # resident size of Python with torch and transformers loaded
# operations per second on a GPU: an H200 reached 19e12 in second moments, 7e12 in the training; how
# fast one rounds is not known
GPU_SPEED = 12e12
CPU = torch.device("cpu")
# times a prefill's of as many tokens at a product's speed: text that is sampled, natively or not
SAMPLED_NATIVELY, SAMPLED = 2.2, 4.0
DEARER = 2.0  # times a rounding: its price
EIGEN = 25  # eigenvalues and vectors of an n × n matrix cost about 25 n³
USUAL_RANK = 8  # of a corrective path, over all matrices
# what is beside products, in operations of these: an operation of attention, a logit, an input or
# output of a layer; and of a backward pass, over a forward pass's (SmolLM2-135M on a Zen 4)
ATTENDED, LOGIT, FEATURE, BACKWARD = 3, 1500, 250, 2.5


@cache
def product_speed(dtype: torch.dtype) -> float:
    """Return how many operations per second a product of 1024 x 1024 numbers makes on this CPU."""
    a = torch.ones(1024, 1024, dtype=dtype)
    a @ a
    start = time.perf_counter()
    for _ in range(5):
        a @ a
    return 5 * 2 * 1024**3 / (time.perf_counter() - start)


@dataclass(frozen=True)
class Ways:
    """How a compression stays within memory, at the cost of time.

    cache_bytes: of keys and values while text is sampled. natively: that is done with the weights
    once more in memory, where it can. checkpointed: the training computes activations again for its
    backward pass.
    """

    cache_bytes: int = CACHE_BYTES
    natively: bool = True
    checkpointed: bool = False


@dataclass(frozen=True)
class Work:
    """What there is to do: how large a model, in memory or in files, and by which recipe.

    dtype: of the model's numbers. tied: lm_head is the embedding. row: bytes of keys and values of
    one window. sampled: the model writes its own text; panels: bytes of the second copy of its
    weights with which the native kernel does. held: bytes of the model that are in memory all the
    time. speed: operations per second of products of a type. device: what computes. free: bytes
    of a GPU that the work may take; None where that is not known.
    """

    structure: Structure
    recipe: Recipe
    dtype: torch.dtype
    vocabulary: int
    tied: bool
    row: int
    sampled: bool
    panels: int
    held: int
    speed: Callable[[torch.dtype], float] = product_speed
    device: torch.device = CPU
    free: int | None = None

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        structure: Structure,
        recipe: Recipe,
        dtype: torch.dtype,
        sampled: bool,
        held: int = 0,
        device: torch.device = CPU,
    ) -> "Work":
        """Describe the work on a model, which may be without weights, and its device here."""
        embeddings: Any = model.get_input_embeddings()
        head: Any = model.get_output_embeddings()
        tied = head is not None and head.weight is embeddings.weight
        on_cpu, free = device.type == "cpu", None
        row = cache_row(model, recipe.window, (sampled_in(dtype) if on_cpu else dtype).itemsize)
        count = int(embeddings.num_embeddings)
        panels = panel_bytes(model, dtype) if sampled and on_cpu else 0
        speed = product_speed if on_cpu else lambda _: GPU_SPEED
        if device.type == "cuda" and (device.index or 0) < torch.cuda.device_count():
            free = torch.cuda.mem_get_info(device)[0] + held
        described = structure, recipe, dtype, count, tied, row, sampled, panels, held
        return cls(*described, speed, device, free)

    def phases(self, ways: Ways) -> dict[str, Phase]:
        """Estimate seconds and peak bytes of every phase, in the order in which they come."""
        found = {"sampling text": self._sampling(ways)} if self.sampled else {}
        found["second moments"] = self._moments
        method = resolve(self.recipe.method, self.recipe.method_options)
        if self.recipe.quantised or method.needs_gradients(self.recipe):
            found["gradients"] = self._gradients
        if self.recipe.quantised:
            found["prices"] = self._rounding(DEARER)
            found["rounding"] = self._rounding(1.0)
        else:
            found["factors"] = self._factors
        if self.recipe.correction_tokens:
            found["dense outputs"] = self._outputs
            found["correction"] = self._correction(ways)
        return found

    def _phase(self, seconds: float, working: int, beside: int = 0, passing: int = 0) -> Phase:
        """Estimate a phase of so many seconds.

        working: bytes of what computes, on a GPU its own. beside: bytes of what is in the process's
        memory whatever computes. passing: bytes of it that are there on the way to or from a GPU.
        """
        if self.on_cpu:
            return Phase(seconds, LIBRARY_BYTES + working + beside)
        return Phase(seconds, LIBRARY_BYTES + beside + passing, working)

    @property
    def on_cpu(self) -> bool:
        """Whether the CPU computes, so that all is in the process's memory."""
        return self.device.type == "cpu"

    def disk(self, result: int) -> int:
        """Estimate the bytes of all that is written, for a result of so many bytes."""
        parameters, recipe = self.structure.model_parameters, self.recipe
        kept = 2 * sum(x**2 for x in self._groups.values())  # second moments
        if recipe.correction_tokens:  # values and two moments, twice while they are written; best
            kept += int(4 * 7 * self._trained) + TARGET_BYTES * recipe.correction_tokens
        if not recipe.quantised:  # second moments of gradients, of the smaller side; factors
            sides = [min(x.in_features, x.out_features) for x in self.structure.layers]
            factors = 4 * int(recipe.fraction * self.structure.linear_parameters)
            return kept + 2 * sum(side**2 for side in sides) + factors + result
        rotated = self.dtype.itemsize * parameters if recipe.rotate and not self.tied else 0
        rounded = result * (2 + bool(recipe.correction_tokens))
        states = self._tokens * self.structure.layers[0].in_features * self.dtype.itemsize
        windows = min(recipe.gradient_samples, recipe.samples) * self.structure.blocks
        passing = max(states, windows * states // recipe.samples)  # a forward, a backward pass
        return kept + rotated + rounded + parameters * PRICED // 8 + passing

    @cached_property
    def _speeds(self) -> tuple[float, float]:
        """Operations per second of products in the model's type, and in that of the training."""
        own = torch.float32 if self.dtype is torch.float16 else self.dtype
        fast = not self.on_cpu or cpu_multiplies_bfloat16() or own is not torch.float32
        return self.speed(own), self.speed(torch.bfloat16 if fast else torch.float32)

    @property
    def _read(self) -> int:
        """Bytes that are read of the model at once."""
        structure = self.structure
        around = structure.model_parameters - structure.block_parameters
        most = max(structure.block_parameters // structure.blocks, around)
        return self.held or self.dtype.itemsize * most

    @cached_property
    def _widest(self) -> int:
        """Parameters of the largest layer."""
        return max(x.parameters for x in self.structure.layers)

    @property
    def _one(self) -> int:
        """Bytes of the largest tensor: what is in the process's memory on its way to a GPU."""
        around = self.structure.model_parameters - self.structure.block_parameters
        return self.dtype.itemsize * max(self._widest, around // (1 if self.tied else 2))

    @property
    def _tokens(self) -> int:
        return self.recipe.samples * self.recipe.window

    @cached_property
    def _groups(self) -> dict[str, int]:
        return {layer.group: layer.in_features for layer in self.structure.layers}

    @cached_property
    def _active_in_blocks(self) -> float:
        """Parameters of the blocks that the mean token meets."""
        structure = self.structure
        idle = structure.model_parameters - structure.active_parameters
        return structure.block_parameters - idle

    @cached_property
    def _moment_bytes(self) -> int:
        """Bytes of one block's second moments."""
        blocks = (self.structure.in_block(block) for block in range(self.structure.blocks))
        return 4 * max(sum(self._groups[g] ** 2 for g in {x.group for x in b}) for b in blocks)

    def _sampling(self, ways: Ways) -> Phase:
        windows = windows_drawn(self.recipe)
        tokens = windows * self.recipe.window
        dtype = sampled_in(self.dtype) if self.on_cpu else self.dtype
        operations = 2 * self.structure.active_parameters * tokens
        own, panels = dtype is self.dtype, self.panels if ways.natively else 0
        seconds = operations / (self._speeds[0] if own else self.speed(dtype))
        seconds *= SAMPLED_NATIVELY if panels else SAMPLED
        copied = 0 if own and self.held else dtype.itemsize * self.structure.model_parameters
        most = NATIVE if panels else MOST
        cache = self.row * sampling_batch(windows, self.row, ways.cache_bytes, most)
        return self._phase(seconds, self.held + copied + panels + cache, passing=self._one)

    @property
    def _moments(self) -> Phase:
        read = {x.group: x.share * x.in_features**2 for x in self.structure.layers}
        products = 2 * self._active_in_blocks + 2 * sum(read.values())
        states = self._tokens * self.structure.layers[0].in_features * self.dtype.itemsize
        boundary = states if self.held else min(HELD_BYTES, states)
        seconds = products * self._tokens / self._speeds[0]
        working, passing = self._read + self._moment_bytes + boundary, self._moment_bytes // 2
        return self._phase(seconds, working, passing=max(self._one, passing))

    @property
    def _gradients(self) -> Phase:
        windows = min(self.recipe.gradient_samples, self.recipe.samples)
        operations = 8 * self.structure.active_parameters * windows * self.recipe.window
        logits = 4 * 4 * min(LOGITS, self.recipe.window * self.vocabulary)
        boundaries = windows * self.recipe.window * self.structure.layers[0].in_features * 4
        kept = min(HELD_BYTES, boundaries * self.structure.blocks)
        size = self._read + boundaries + logits + 2 * self._moment_bytes
        passing = max(self._one, self._moment_bytes)
        return self._phase(operations / self._speeds[0], size, kept, passing)

    def _rounding(self, times: float) -> Phase:
        """Two float64 and two float32 matrices of a moment's size, parts of a weight, on a GPU
        large ones, and a block's moments, which are kept by halves."""
        widest = max(self._groups.values()) ** 2
        layers, around = self.structure.layers, self.structure.model_parameters
        around -= sum(x.parameters for x in layers)
        operations = sum(rounding_operations(x.parameters, x.in_features) for x in layers)
        operations += rounding_operations(around, layers[0].in_features)
        size = self.held + 24 * widest + 3 * 4 * self._widest + (0 if self.on_cpu else TOGETHER)
        passing = 8 * widest + self._one
        seconds = times * operations / self.speed(torch.float32)
        return self._phase(seconds, size, self._moment_bytes // 2, passing)

    @property
    def _factors(self) -> Phase:
        layers, recipe = self.structure.layers, self.recipe
        kept = sum(8 * (x.parameters + min(x.in_features, x.out_features) ** 2) for x in layers)
        held = min(DECOMPOSITION_BYTES, kept if recipe.allocation != "uniform" else 0)
        passes = 5 * recipe.shifted_inputs + 3 * recipe.block_epochs  # through the blocks
        operations = passes * 2 * self._active_in_blocks * self._tokens + 4 * sum(
            2 * EIGEN * min(x.in_features, x.out_features) ** 3 + 12 * x.parameters * 1000
            for x in layers
        )
        size = self._read + held + 4 * self.structure.linear_parameters
        passing = self._moment_bytes + self._one
        return self._phase(operations / self.speed(torch.float32), size, passing=passing)

    @cached_property
    def _features(self) -> float:
        """Inputs and outputs of the layers that the mean token meets."""
        return sum(x.share * (x.in_features + x.out_features) for x in self.structure.layers)

    @property
    def _beside(self) -> float:
        """What a token of a forward pass takes beside products, in operations of these."""
        hidden, blocks = self.structure.layers[0].in_features, self.structure.blocks
        attention = 4 * self.recipe.window * hidden * blocks
        return ATTENDED * attention + LOGIT * self.vocabulary + FEATURE * self._features

    @property
    def _outputs(self) -> Phase:
        operations = 2 * self.structure.active_parameters + self._beside
        operations *= self.recipe.correction_tokens
        logits = 3 * 4 * min(LOGITS, self.recipe.window * self.vocabulary)
        return self._phase(operations / self._speeds[1], self._read + logits, passing=self._one)

    @property
    def _part(self) -> int:
        """Tokens that are trained on at once."""
        most = min(self.recipe.step_tokens, PART_TOKENS, 2 * LOGITS // self.vocabulary)
        return max(self.recipe.window, most)

    @property
    def activations(self) -> int:
        """Bytes of a training's activations, where they are not computed twice."""
        return int(4 * self._part * self._features) if self.recipe.correction_tokens else 0

    @property
    def _trained(self) -> float:
        """Numbers that the correction trains: scales and factors, or those of low-rank layers."""
        structure, recipe = self.structure, self.recipe
        if not recipe.quantised:
            return recipe.fraction * structure.linear_parameters
        factors = USUAL_RANK * sum(x.in_features + x.out_features for x in structure.layers)
        return structure.model_parameters / recipe.scale_groups[0] + factors

    def _correction(self, ways: Ways) -> Phase:
        structure, recipe = self.structure, self.recipe
        around = structure.model_parameters - structure.block_parameters
        if recipe.quantised:  # records; of what is trained value, gradient, two moments, start
            bits = 8 * parse_size(recipe.size) if recipe.size else 0
            student = (bits or (recipe.bits or 0) * structure.model_parameters) / 8
        else:
            student = self.dtype.itemsize * around
        activations = self.activations // (structure.blocks if ways.checkpointed else 1)
        logits = 2 * 4 * self.vocabulary * self._part
        active = sum(x.share * x.parameters for x in structure.layers)
        left = structure.active_parameters - (1 - recipe.fraction) * active
        passes = 2 if ways.checkpointed else 1
        operations = 2 * (passes + 2) * left + (passes + BACKWARD) * self._beside
        operations *= recipe.correction_tokens
        size = self.held + int(student + 5 * 4 * self._trained) + activations + logits
        passing = 3 * 4 * int(self._trained)  # values and moments, when they are kept
        return self._phase(operations / self._speeds[1], size, passing=passing)
