"""How a quantised matrix is stored: bits, levels, scale groups, a corrective path.

Free of heavy imports: recipes and command lines name a form without loading torch.
"""

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

Levels = Literal["uniform", "formula", "table"]
LEVELS: tuple[Levels, ...] = get_args(Levels)
ScaleDtype = Literal["float16", "bfloat16"]
PLANES = {3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}  # bits of each plane, lowest first
BITS = tuple(PLANES)
SCALE_BYTES = 2  # float16
LEAST_GROUP, MOST_GROUP = 32, 4096  # scale groups are multiples of the first
CORRECTIVE_BITS = (8, 16)  # 16: floating numbers of the model's dtype
TABLES = {
    3: (-127, -81, -49, -23, 2, 27, 56, 96),  # least squared error on Gaussian groups of 64
    4: (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),  # IQ4_NL's
}


@dataclass(frozen=True)
class Form:
    """A quantised matrix [N, K]: of each weight an integer, of each scale group a scale.

    A weight is level · scale; the level is the integer q itself ("uniform"), round(127 t (1 + t²/2)
    / 1.5) with t = q / 2^(bits-1) ("formula", 3 to 6 bits), or llama.cpp's IQ4_NL ("table", 4 bits)
    and a table of eight (3 bits): all of them int8. scale_group: weights along a row that share a
    scale, a multiple of 32; a row's last group may be padded. corrective_rank: of the low-rank path
    beside it, 0 for none; corrective_bits: 8, uniform levels in groups of 32, or 16. scale_dtype:
    scales are stored in float16; "bfloat16" allows only those that it holds exactly, too. Raises
    ValueError for what does not exist.

    >>> Form(4, "table", 64).shape(2, 100), Form(5, "formula", 32).values[:3]
    ((2, 2, 34), (-127, -114, -102))
    """

    bits: int
    levels: Levels
    scale_group: int
    corrective_rank: int = 0
    corrective_bits: int = 8
    scale_dtype: ScaleDtype = "float16"

    def __post_init__(self) -> None:
        """Refuse combinations that no layer has."""
        if type(self.bits) is not int or self.bits not in BITS:
            raise ValueError(f"bits={self.bits!r}: must be one of {BITS}")
        if self.levels not in LEVELS:
            raise ValueError(f"levels={self.levels!r}: must be one of {LEVELS}")
        if self.levels == "table" and self.bits not in TABLES:
            raise ValueError(f"levels=table: has {' or '.join(map(str, TABLES))} bits")
        if self.levels == "formula" and self.bits == 8:
            raise ValueError("levels=formula: has 3 to 6 bits; 8 bits are uniform")
        if type(self.corrective_rank) is not int or self.corrective_rank < 0:
            raise ValueError(f"corrective_rank={self.corrective_rank!r}: must be 0 or more")
        if type(self.corrective_bits) is not int or self.corrective_bits not in CORRECTIVE_BITS:
            raise ValueError(
                f"corrective_bits={self.corrective_bits!r}: must be one of {CORRECTIVE_BITS}"
            )
        if self.scale_dtype not in get_args(ScaleDtype):
            raise ValueError(
                f"scale_dtype={self.scale_dtype!r}: must be one of {get_args(ScaleDtype)}"
            )
        group = self.scale_group
        if not isinstance(group, int) or not 0 < group <= MOST_GROUP or group % LEAST_GROUP:
            raise ValueError(
                f"scale_group={group!r}: must be a multiple of {LEAST_GROUP}, at most {MOST_GROUP}"
            )

    @cached_property
    def values(self) -> tuple[int, ...]:
        """The levels, ascending, of the integers -2^(bits-1) … 2^(bits-1) - 1."""
        half = 1 << (self.bits - 1)
        if self.levels == "table":
            return TABLES[self.bits]
        if self.levels == "uniform":
            return tuple(range(-half, half))
        ts = (q / half for q in range(-half, half))
        return tuple(round(127 * t * (1 + t * t / 2) / 1.5) for t in ts)

    @property
    def record(self) -> int:
        """Bytes of a scale group: its scale and its integers."""
        return SCALE_BYTES + self.scale_group * self.bits // 8

    def groups(self, columns: int) -> int:
        """Count the scale groups of a row."""
        return -(-columns // self.scale_group)

    def shape(self, rows: int, columns: int) -> tuple[int, int, int]:
        """Return the shape of the records, uint8, of a matrix: never [rows, columns] itself."""
        return rows, self.groups(columns), self.record

    def bytes(self, rows: int, columns: int, element: int) -> int:
        """Count the bytes that a matrix takes, its corrective path included.

        element: bytes of a number of that path, where it has 16 bits.
        """
        found = rows * self.groups(columns) * self.record
        if self.corrective_rank and self.corrective_bits == 16:
            return found + element * self.corrective_rank * (rows + columns)
        if self.corrective_rank:
            path = CORRECTIVE.groups(rows) + CORRECTIVE.groups(columns)
            found += self.corrective_rank * path * CORRECTIVE.record
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a checkpoint states them, without what is usual.

        >>> Form(4, "table", 64).to_dict()
        {'bits': 4, 'levels': 'table', 'scale_group': 64}
        """
        found = dataclasses.asdict(self)
        if not self.corrective_rank:
            del found["corrective_rank"], found["corrective_bits"]
        if self.scale_dtype == "float16":
            del found["scale_dtype"]
        return found


CORRECTIVE = Form(8, "uniform", 32)  # of each factor of a corrective path in 8 bits
