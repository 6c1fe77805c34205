"""README's table "works with": a row for each test marked `works`, no more and no fewer.

    python tests/test_readme.py

runs those tests and, when all pass, writes the table.
"""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
LOW_RANK = ("two_factor", "pivoted")
COLUMNS = (*LOW_RANK, "quantised")
TABLE = re.compile(r"(?<=## Works with\n\n)(\|.*\n)+")


def table():
    """Build the table from the marks: what works, and how ("yes" unless said), in the columns of
    low rank, or in that of quantised models alone where a mark names it."""
    rows = {}
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.works":
                what = ast.literal_eval(node.args[0])
                said = {key.arg: ast.literal_eval(key.value) for key in node.keywords}
                on = said if "quantised" in said else LOW_RANK
                rows.setdefault(what, {}).update(dict.fromkeys(on, "yes") | said)
    lines = [f"| | {' | '.join(COLUMNS)} |", "|" + "---|" * (len(COLUMNS) + 1)]
    for what, cells in rows.items():
        lines.append(f"| {what} | {' | '.join(cells.get(x, 'not tried') for x in COLUMNS)} |")
    return "\n".join(lines) + "\n"


def test_what_works_is_what_is_tested():
    assert TABLE.search(README.read_text()).group() == table()


def test_families_named_are_families_that_come_back():
    named = re.search(r"\n\n(Llama, .*?)\swork\.", README.read_text(), re.DOTALL).group(1)
    swept = (ROOT / "docs" / "families.md").read_text().replace("_", "")
    named = named.replace(" and 3 (text)", ", Gemma 3text")
    for family in re.split(r", | and ", named):
        kind = re.sub(r"[- ]", "", family.lower())
        assert re.search(rf"\| `?{kind}`? \| loads", swept), family


if __name__ == "__main__":
    failed = pytest.main(["-q", "-m", "works", str(ROOT / "tests")])
    if not failed:
        README.write_text(TABLE.sub(lambda _: table(), README.read_text()))
    sys.exit(failed)
