"""How a low-rank layer is stored: its tensors by name, and how many numbers they are.

Free of heavy imports: recipes and command lines name a layout without loading torch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

if TYPE_CHECKING:
    from torch import Tensor

    from calr_kernels.forms import Form

Layout = Literal["pivoted", "two_factor"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


class Factors(NamedTuple):
    """The tensors of one layer: a dense weight as `up` [N, K] alone, or up and down [r, K].

    Two factors: up [N, r]. Pivoted: up [N - r, r] and pivots [r] int32, the outputs that are
    `down x` itself. bias [N].
    """

    up: Tensor
    down: Tensor | None = None
    pivots: Tensor | None = None
    bias: Tensor | None = None

    @property
    def in_features(self) -> int:
        """K."""
        return (self.up if self.down is None else self.down).shape[1]

    @property
    def out_features(self) -> int:
        """N, pivots included."""
        return self.up.shape[0] + (0 if self.pivots is None else self.pivots.shape[0])


class Records(NamedTuple):
    """The tensors of one quantised layer: weight, records [N, groups, record] of a form; bias [N].

    corrective_down and corrective_up are numbers [c, K] and [c, N] or records of
    `forms.CORRECTIVE`, [c, groups, record]: the second factor is transposed. None: no such path.
    """

    weight: Tensor
    form: Form
    in_features: int
    bias: Tensor | None = None
    corrective_down: Tensor | None = None
    corrective_up: Tensor | None = None

    @property
    def out_features(self) -> int:
        """N."""
        return self.weight.shape[0]


def parameters(layout: Layout, out_features: int, in_features: int, rank: int) -> int:
    """Count the numbers stored for a rank-r layer without its bias.

    >>> parameters("two_factor", 4, 6, 2), parameters("pivoted", 4, 6, 2)
    (20, 16)
    """
    if layout == "pivoted":
        return rank * (out_features + in_features - rank)
    return rank * (out_features + in_features)


def rank_at(layout: Layout, out_features: int, in_features: int, keep: float) -> float:
    """Return the (real) rank at which the layer stores `keep` of its dense parameters.

    >>> rank_at("two_factor", 100, 100, 0.5), round(rank_at("pivoted", 100, 100, 0.75), 9)
    (25.0, 50.0)
    """
    total, product = out_features + in_features, out_features * in_features
    if layout == "two_factor":
        return keep * product / total
    return (total - math.sqrt(max(0.0, total * total - 4 * keep * product))) / 2
