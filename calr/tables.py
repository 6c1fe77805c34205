"""What the commands print: tables for people, JSON for programs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from calr.integrations.lm_eval import retention


def print_json(value: Any) -> None:
    """Print JSON."""
    print(json.dumps(value, indent=2))


def print_facts(facts: dict[str, Any]) -> None:
    """Print names and values."""
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), Text(_shown(value)))
    _console(110).print(table)


def _console(width: int) -> Console:
    """Names are data: brackets in them are no markup, nor numbers worth a colour."""
    return Console(width=width, markup=False, emoji=False, highlight=False)


def plain(name: object) -> str:
    """Return a name in one line, its control characters spelt out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(name))


def _shown(value: Any) -> str:
    if type(value) is int:
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else plain(value)


def gigabytes(count: float) -> str:
    """Format a number of bytes."""
    return f"{count / 1e9:.3f} GB"


def print_phases(phases: dict[str, dict[str, float]]) -> None:
    """Print what phases took or are expected to take, whatever of it is known."""
    shown: dict[str, Callable[[float], str]] = {
        "seconds": "{:.0f} s".format,
        "expected_seconds": "{:.0f} s".format,
        "peak_bytes": gigabytes,
        "expected_peak_bytes": gigabytes,
        "gpu_bytes": gigabytes,
        "expected_gpu_bytes": gigabytes,
    }
    titles = ["time", "time expected", "peak memory", "memory expected"]
    titles += ["on the GPU", "on the GPU, expected"]
    known = [key for key in shown if any(key in phase for phase in phases.values())]
    names = dict(zip(shown, titles, strict=True))
    table = Table("phase", *(names[key] for key in known))
    for name, phase in phases.items():
        table.add_row(name, *(shown[key](phase[key]) if key in phase else "" for key in known))
    _console(110).print(table)


def print_layers(layers: list[dict[str, Any]]) -> None:
    """Print what every layer is: rows of `ranks.report`."""
    table = Table("layer", "shape", "layout", "rank", "parameters", "input group")
    for layer in layers:
        group = (
            "" if layer["group"] == layer["name"] else f"with {layer['group'].rpartition('.')[2]}"
        )
        table.add_row(
            Text(plain(layer["name"])),
            "×".join(map(str, layer["shape"])),
            layer["layout"],
            str(layer["rank"] or ""),
            f"{layer['parameters']:,}",
            group,
        )
    _console(110).print(table)


def print_matrices(matrices: list[dict[str, Any]]) -> None:
    """Print how every matrix is quantised: `ranks.report.quantised_rows`."""
    table = Table("matrix", "shape", "bits", "levels", "scale group", "corrective", "bytes")
    for matrix in matrices:
        table.add_row(
            Text(plain(matrix["name"])),
            "×".join(map(str, matrix["shape"])),
            str(matrix["bits"] or "as it was"),
            matrix["levels"] or "",
            str(matrix["scale_group"] or ""),
            str(matrix["corrective_rank"] or ""),
            f"{matrix['bytes']:,}",
        )
    _console(110).print(table)


def print_comparison(comparison: dict[str, float]) -> None:
    """Print how far the first model's predictions are from the second's."""
    print(
        f"KL from the second: {comparison['kl']:.4f} nats per token; the same most probable token "
        f"at {comparison['agreement']:.1%} of positions; perplexity {comparison['ratio']:.3f} times"
    )


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def print_tasks(rows: list[dict[str, Any]]) -> None:
    """Print accuracy per task; with two models also the retention, plain and above chance."""
    table = Table(
        "task", "rows", "chance", *(Path(row["model"]).name or row["model"] for row in rows)
    )
    compared = len(rows) == 2
    if compared:
        table.add_column("retention")
        table.add_column("above chance")
    for task, first in rows[0]["tasks"].items():
        cells = [
            f"{r['tasks'][task]['accuracy']:.3f} ± {r['tasks'][task]['stderr']:.3f}" for r in rows
        ]
        if compared:
            kept = retention({task: first}, {task: rows[1]["tasks"][task]})
            cells += map(_ratio, kept.values())
        table.add_row(task, str(first["rows"]), f"{first['chance']:.3f}", *cells)
    if compared:
        kept = retention(rows[0]["tasks"], rows[1]["tasks"])
        means = [
            f"{sum(t['accuracy'] for t in r['tasks'].values()) / len(r['tasks']):.3f}" for r in rows
        ]
        table.add_row("average", "", "", *means, *map(_ratio, kept.values()))
    _console(120).print(table)


def print_speeds(rows: list[dict[str, Any]], rounds: int) -> None:
    """Print the rows of `benchmark.bench`; of two models also the ratios."""
    table = Table("model", "parameters", "weights", "dtype", "prefill tokens/s", "decode tokens/s")
    kinds = [f"{kind}_tokens_per_second" for kind in ("prefill", "decode")]
    for row in rows:
        speeds = [row[kind] for kind in kinds]
        packed = f" + {gigabytes(row['packed_bytes'])} packed" if row["packed_bytes"] else ""
        table.add_row(
            Text(plain(Path(row["model"]).name)),
            f"{row['parameters']:,}",
            gigabytes(row["weight_bytes"]) + packed,
            row["dtype"],
            *(f"{s['median']:.1f} ({s['slowest']:.1f}-{s['fastest']:.1f})" for s in speeds),
        )
    if len(rows) == 2:
        ratios = [rows[0][kind]["median"] / rows[1][kind]["median"] for kind in kinds]
        table.add_row("first ÷ second", "", "", "", *(f"{ratio:.2f}" for ratio in ratios))
    _console(120).print(table)
    print(f"medians (slowest-fastest) of {rounds} rounds, {rows[0]['threads']} threads")


def print_perplexity(text: str, found: dict[str, Any]) -> None:
    """Print a token perplexity with its protocol."""
    print(
        f"token perplexity {found['perplexity']:.3f} on {text} ({found['windows']} windows of "
        f"{found['window']}, stride {found['window']}, {found['predicted_tokens']} predicted "
        "tokens)"
    )
