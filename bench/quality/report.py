"""Tables and plot of the comparison."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from calr.integrations.lm_eval import retention

Row = dict[str, Any]


def tables(rows: list[Row]) -> str:
    """Format all rows as markdown, per size; retention, and accuracy per task, where tasks ran."""
    dense = next(row for row in rows if row["method"] == "dense")
    texts = list(dense["perplexity"])
    header = ["method", "healed on", "removed of the model", *texts]
    header += ["mean accuracy", "retention", "± paired", "above chance"]
    lines = []
    for keep in sorted({row["keep"] for row in rows}, reverse=True):
        lines += [f"\n### keep {keep}\n", _line(header), _line("---" for _ in header)]
        for row in sorted(
            (row for row in rows if row["keep"] == keep),
            key=lambda row: (row["healed_tokens"], row["perplexity"][texts[-1]]),
        ):
            removed = 1 - row["params"] / dense["params"]
            cells = [row["method"], f"{row['healed_tokens']:,}", f"{removed:.2%}"]
            cells += [_number(row["perplexity"][text]) for text in texts]
            lines.append(_line(cells + _accuracy(row, dense)))
    return "\n".join([*lines, "\n### Accuracy per task\n", *_per_task(rows, dense)])


def _per_task(rows: list[Row], dense: Row) -> list[str]:
    """Format accuracies; the last column is the retention on tasks where dense exceeds chance."""
    tasks = dense["accuracy"]
    passed = {task: found for task, found in tasks.items() if found["accuracy"] > found["chance"]}
    header = ["keep", "method", "healed on", *tasks, "retention where dense exceeds chance"]
    lines = [_line(header), _line("---" for _ in header)]
    for row in sorted(rows, key=lambda row: (-row["keep"], -row["healed_tokens"])):
        found = row["accuracy"]
        if not tasks.keys() <= found.keys():
            continue
        cells = [f"{row['keep']:g}", row["method"], f"{row['healed_tokens']:,}"]
        cells += [f"{found[task]['accuracy']:.2f}" for task in tasks]
        kept = retention({task: found[task] for task in passed}, passed)["retention"]
        lines.append(_line([*cells, f"{kept:.1%}"]))
    return lines


def _accuracy(row: Row, dense: Row) -> list[str]:
    tasks = [task for task in dense["accuracy"] if task in row["accuracy"]]
    if not tasks or len(tasks) < len(dense["accuracy"]):
        return ["", "", "", ""]
    kept = retention({task: row["accuracy"][task] for task in tasks}, dense["accuracy"])
    mean = sum(row["accuracy"][task]["accuracy"] for task in tasks) / len(tasks)
    return [
        f"{mean:.3f}",
        f"{kept['retention']:.1%}",
        f"{paired_error(row, dense):.1%}",
        f"{kept['above_chance']:.1%}",
    ]


def paired_error(row: Row, dense: Row) -> float:
    """Return the standard error of the retention from row-by-row differences to dense.

    The mean over tasks of the difference in accuracy has variance Σ var(d_task) / n_task / tasks²;
    the dense mean is taken as exact, since both models answered the same rows.
    """
    variance, mean = 0.0, 0.0
    for task, found in dense["accuracy"].items():
        pairs = zip(row["accuracy"][task]["correct"], found["correct"], strict=True)
        differences = [a - b for a, b in pairs]
        n = len(differences)
        average = sum(differences) / n
        variance += sum((d - average) ** 2 for d in differences) / max(1, n - 1) / n
        mean += found["accuracy"]
    return math.sqrt(variance) / mean


def draw(rows: list[Row], path: Path) -> None:
    """Draw perplexity against size, a panel per text: x unhealed, dots healed, squares longer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dense = next(row for row in rows if row["method"] == "dense")
    texts = list(dense["perplexity"])
    figure, panels = pyplot.subplots(
        1, len(texts), figsize=(5 * len(texts), 5), sharex=True, squeeze=False
    )
    axes = panels[0]
    methods = list(dict.fromkeys(row["method"] for row in rows if row["method"] != "dense"))
    for axis, text in zip(axes, texts, strict=True):
        for index, method in enumerate(methods):
            for healed, style in ((0, "x--"), (1, "o-"), (2, "s:")):
                chosen = sorted(
                    (1 - row["params"] / dense["params"], row["perplexity"][text])
                    for row in rows
                    if row["method"] == method and _healing(row, rows) == healed
                )
                label = f"{method}{('', ', healed', ', long')[healed]}"
                if chosen:
                    axis.plot(*zip(*chosen, strict=True), style, color=f"C{index}")
                    axis.lines[-1].set_label(label)
        axis.axhline(dense["perplexity"][text], color="grey", linewidth=0.8)
        axis.set(title=text, xlabel="removed of the model's parameters", yscale="log")
        axis.set_ylim(dense["perplexity"][text] * 0.9, dense["perplexity"][text] * 60)
    axes[0].set_ylabel("token perplexity")
    axes[-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _healing(row: Row, rows: list[Row]) -> int:
    """0: not healed; 1: on the common number of tokens; 2: on more."""
    common = min((r["healed_tokens"] for r in rows if r["healed_tokens"]), default=0)
    return 0 if not row["healed_tokens"] else 1 if row["healed_tokens"] == common else 2


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:.3g}"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
