"""The recipe: every choice that determines a compressed model, apart from the calibration text.

Free of heavy imports, so that the command line can show its help at once.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from calr.errors import CalrError
from calr_kernels.layout import Layout

Target = Literal["gguf", "compressed-tensors"]
BITS, KEEP = 5.0, 0.8  # of a recipe that names no budget
SCALE_GROUPS = (64, 32, 128, 256)  # the usual one first
TARGET_SCALE_GROUPS: dict[Target, tuple[int, ...]] = {  # the usual one first
    "gguf": (32,),
    "compressed-tensors": (64, 32),
}
LOW_RANK_ALONE = (  # what counts under keep alone
    "method",
    "method_options",
    "layout",
    "allocation",
    "sensitivity",
    "rank_step",
    "shifted_inputs",
    "block_epochs",
    "block_learning_rate",
)
Solver = Literal["lagrangian", "exact"]


@dataclass(frozen=True)
class Recipe:
    """How to compress a model.

    Without a budget it is bits=5, or keep=0.8 with another method than calr, since only calr has
    quantised matrices.

    Args:
        keep: A budget: the fraction kept of the parameters of the decoder's linear layers, in
            (0, 1], as low-rank factors. At most one of the three budgets is named.
        bits: A budget: average bits per parameter of the whole model, everything stored counted, as
            quantised matrices.
        size: A budget: bytes of the tensors, such as 90MB, as quantised matrices.
        scale_group: Weights along a row of a quantised matrix that share a scale: 32, 64, 128 or
            256; by default the budget chooses, or the target's usual one is taken.
        target: A format to export to later (`calr export`), which limits the forms of quantised
            matrices to those that it holds: gguf has 4, 5 and 8 bits in groups of 32;
            compressed-tensors 4 and 8 in groups of 64 or 32, one width for the layers of one input,
            and leaves embeddings and lm_head as they are.
        widths: Bits that a quantised matrix may have, --widths 4,8; by default all that there are,
            or that the target has. vLLM's build for CPUs multiplies by 4 bits alone.
        rotate: Before quantising, rotate the residual stream of a model whose function that leaves
            as it is (RMS norms, lm_head not tied): it loses a quarter less.
        method: Decomposition of one weight: a file in calr/methods (svd, svd_llm, erc_svd, calr).
        method_options: Options of the method, for example {"beta": 0.05} of erc_svd.
        layout: Storage of a rank-r layer: pivoted, r(N+K-r) numbers, or two_factor, r(N+K).
        allocation: Who gets which rank: global minimises the predicted increase of the loss,
            uniform keeps the same fraction of every layer, last_k compresses only the last blocks.
        solver: Solver of the global allocation: lagrangian (fast) or exact (HiGHS).
        sensitivity: What multiplies a layer's output error in the global allocation. gradient: the
            mean squared gradient of the loss at its outputs, which takes a backward pass;
            influence: its block's influence over the layer's output energy; none: 1. The method
            calr ignores this, since its errors are increases of the loss already.
        rank_step: Ranks are multiples of this.
        skip: Patterns (fnmatch) of layer names that stay dense; --skip '*.0.self_attn.*,*.v_proj'.
        samples: Calibration windows for the second moments of the inputs.
        gradient_samples: How many of them also serve the gradient statistics.
        window: Tokens in a calibration window.
        shifted_inputs: Fit each layer to what the compressed layers before it really feed it.
        block_epochs: Passes over the calibration windows in which each block's factors are trained
            to give the dense block's output; 0: none.
        block_learning_rate: Learning rate at the start of that training.
        correction_tokens: Tokens of text on which the compressed layers are trained to give the
            dense model's outputs again; 0: no training.
        learning_rate: Peak learning rate of that training; by default more for a model that lost
            more: 2.5e-4 (1 - keep), or for a quantised one, whose scales and factors move in
            proportion to their size, 2e-4 from 4.5 to 5 bits per parameter, 4 times that for each
            bit less, at most 8e-4, and less above, 5e-5 from 6 bits on; beyond 81,920 tokens less,
            as their square root.
        step_tokens: Tokens of one step of that training, at least a window; gradients are
            accumulated, so that more takes no more memory.
        cross_entropy: Weight, in [0, 1], of the text's own next tokens beside the dense model's
            outputs in that training. Of use with text that people wrote: text that the model
            sampled holds nothing that its outputs do not.
        seed: Seed of sampling and of the order of training.
    """

    keep: float | None = None
    bits: float | None = None
    size: str | None = None
    scale_group: int | None = None
    target: Target | None = None
    widths: tuple[int, ...] = ()
    rotate: bool = True
    method: str = "calr"
    method_options: dict[str, float] = field(default_factory=dict)
    layout: Layout = "pivoted"
    allocation: Literal["global", "uniform", "last_k"] = "global"
    solver: Solver = "lagrangian"
    sensitivity: Literal["gradient", "influence", "none"] = "gradient"
    rank_step: int = 8
    skip: tuple[str, ...] = ()
    samples: int = 64
    gradient_samples: int = 24
    window: int = 512
    shifted_inputs: bool = False
    block_epochs: int = 0
    block_learning_rate: float = 3e-4
    correction_tokens: int = 65_536
    learning_rate: float | None = None
    step_tokens: int = 512
    cross_entropy: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise CalrError for a value of another type or outside its range."""
        for name, kind in _TYPES.items():
            value = getattr(self, name)
            if get_origin(kind) is Literal:
                if value not in get_args(kind):
                    raise CalrError(f"{name}={value!r}: must be one of {get_args(kind)}")
            elif isinstance(value, str) and kind == tuple[str, ...]:
                raise CalrError(f"{name}={value!r}: must be a sequence of patterns, not one string")
            elif not _fits(value, kind):
                raise CalrError(
                    f"{name}={value!r}: must be of type {getattr(kind, '__name__', kind)}"
                )
        named = [name for name in ("keep", "bits", "size") if getattr(self, name) is not None]
        if len(named) > 1:
            raise CalrError(f"{' and '.join(named)}: are several budgets; name one")
        if not named and self.method == "calr":
            object.__setattr__(self, "bits", BITS)
        elif not named:
            object.__setattr__(self, "keep", KEEP)
        for name in LOW_RANK_ALONE if self.quantised else ():
            if getattr(self, name) != _DEFAULTS[name]:
                raise CalrError(
                    f"{name}={getattr(self, name)!r}: is of low-rank layers, which {self.budget} "
                    "has none of; name keep instead, or leave it out"
                )
        if self.keep is not None and not 0 < self.keep <= 1:
            raise CalrError(
                f"keep={self.keep}: must be in (0, 1], the fraction of the decoder's linear "
                "parameters that is kept"
            )
        if self.bits is not None and not 0 < self.bits <= 16:
            raise CalrError(f"bits={self.bits}: must be above 0 and at most 16")
        self._check_forms()
        if not 0 <= self.seed < 2**63:
            raise CalrError(f"seed={self.seed}: must be in [0, 2^63)")
        for name, least in (
            ("rank_step", 1),
            ("samples", 1),
            ("gradient_samples", 1),
            ("window", 4),
            ("block_epochs", 0),
            ("correction_tokens", 0),
            ("step_tokens", 1),
        ):
            if getattr(self, name) < least:
                raise CalrError(f"{name}={getattr(self, name)}: must be at least {least}")
        for name in ("learning_rate", "block_learning_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise CalrError(f"{name}={value}: must be above 0")
        if not 0 <= self.cross_entropy <= 1:
            raise CalrError(f"cross_entropy={self.cross_entropy}: must be in [0, 1]")

    def _check_forms(self) -> None:
        if self.widths and not self.quantised:
            raise CalrError(f"widths={self.widths}: are of quantised matrices; name bits or size")
        if self.target is not None and not self.quantised:
            raise CalrError(f"target={self.target}: holds no low-rank layers; name bits or size")
        for name in ("scale_group", "rotate") if not self.quantised else ():
            if getattr(self, name) != _DEFAULTS[name]:
                raise CalrError(
                    f"{name}={getattr(self, name)}: is of quantised matrices; name bits or size, "
                    "or leave it out"
                )
        held = SCALE_GROUPS if self.target is None else TARGET_SCALE_GROUPS[self.target]
        if self.scale_group is None:
            return
        if self.scale_group not in SCALE_GROUPS:
            raise CalrError(f"scale_group={self.scale_group}: must be one of {SCALE_GROUPS}")
        if self.scale_group not in held:
            has = " or ".join(map(str, held))
            raise CalrError(f"scale_group={self.scale_group}: target={self.target} has {has}")

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "Recipe":
        """Make the recipe that a checkpoint states; what it says beside (calibration) is left out.

        Raises CalrError naming a field of another type or outside its range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        made = {name: value for name, value in values.items() if name in known}
        return cls(**made)

    @property
    def budget(self) -> str:
        """The budget as it was named."""
        named = {"keep": self.keep, "bits": self.bits, "size": self.size}
        return next(f"{name}={value}" for name, value in named.items() if value is not None)

    @property
    def quantised(self) -> bool:
        """Whether the budget is one of bytes, for quantised matrices."""
        return self.keep is None

    @property
    def fraction(self) -> float:
        """What of the linear layers' parameters is kept; 1 under a budget of bytes."""
        return 1.0 if self.keep is None else self.keep

    @property
    def scale_groups(self) -> tuple[int, ...]:
        """The scale groups that a quantised matrix may have, the usual one first."""
        if self.scale_group is not None:
            return (self.scale_group,)
        if self.target is not None:
            return TARGET_SCALE_GROUPS[self.target][:1]
        return SCALE_GROUPS

    def with_learning_rate(self, bits: float | None) -> "Recipe":
        """Name the learning rate where it is the default; bits: per parameter of a quantised model,
        None of a low-rank one."""
        if bits is None:
            usual = 2.5e-4 * (1 - self.fraction)
        else:
            usual = 2e-4 * min(4.0, max(0.25, 4 ** (max(0, 4.5 - bits) - max(0, bits - 5))))
        longer = max(1.0, self.correction_tokens / 81_920) ** 0.5
        rate = self.learning_rate or usual / longer or None  # nothing to train at keep 1
        return dataclasses.replace(self, learning_rate=rate)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return dataclasses.asdict(self) | {"skip": list(self.skip), "widths": list(self.widths)}


_TYPES = get_type_hints(Recipe)
_DEFAULTS: dict[str, Any] = {
    f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
    for f in dataclasses.fields(Recipe)
}


def _fits(value: Any, kind: Any) -> bool:
    """Tell whether a value is of an annotated type; whole numbers are floats, too, NaN is not."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in inside
    if origin in (UnionType, Union):
        return any(_fits(value, option) for option in inside)
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_fits(x, inside[0]) for x in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(x, inside[0]) and _fits(y, inside[1]) for x, y in value.items()
        )
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, kind)
