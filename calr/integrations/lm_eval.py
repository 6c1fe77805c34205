"""Zero-shot tasks through lm-evaluation-harness, on the hub's data or on local jsonl files."""

import os
import tempfile
from pathlib import Path
from typing import Any

import yaml
from jinja2.exceptions import UndefinedError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calr.errors import CalrError

# lm-eval's own prompts, for local files whose columns differ from the hub's
COLUMNS: dict[frozenset[str], dict[str, Any]] = {
    frozenset({"query", "choices", "gold"}): {
        "doc_to_text": "{{query}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "doc_to_decontamination_query": "{{query}}",
    },
    frozenset({"context", "continuation"}): {
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{' ' + continuation}}",
        "doc_to_decontamination_query": "{{context}}",
    },
    frozenset({"passage", "question", "answer"}): {"doc_to_target": "{{answer | int}}"},
}


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[str],
    *,
    data: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Run lm-eval tasks: {task: accuracy, stderr, chance, rows, correct}.

    data: a directory with TASK.SPLIT.jsonl files to use instead of the hub's. limit: first rows of
    each task. accuracy is lm-eval's `acc` with its standard error; chance is the mean of one over
    the number of choices (0 for a free continuation); correct lists 0 or 1 per row, for paired
    comparisons. Raises CalrError without lm-eval, or naming a task or file that is not there.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise CalrError("tasks need lm-evaluation-harness: pip install lm-eval") from error
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tempfile.TemporaryDirectory() as folder:
        manager = TaskManager()
        unknown = [task for task in tasks if task not in manager.all_subtasks]
        if unknown:
            raise CalrError(
                f"tasks: lm-eval has no task {unknown[0]!r} (name single tasks, not groups); "
                "see `lm-eval ls tasks`"
            )
        names = {task: task for task in tasks}
        if data is not None:
            names = {task: f"local_{task}" for task in tasks}
            for task in tasks:
                _write_local_task(manager, task, Path(data), Path(folder) / f"{task}.yaml")
            manager = TaskManager(include_path=folder)
        try:
            results = lm_eval.simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8),
                tasks=list(names.values()),
                task_manager=manager,
                num_fewshot=0,
                limit=limit,
                bootstrap_iters=0,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
                log_samples=True,
            )
        except OSError as error:
            raise CalrError(
                f"tasks: their data cannot be loaded: {error}; --task_data takes local files"
            ) from error
        except UndefinedError as error:
            raise CalrError(
                f"tasks: their data lack what the tasks ask for: {error}; look at --task_data"
            ) from error
    return {task: _summary(task, results["samples"][name]) for task, name in names.items()}


def retention(
    compressed: dict[str, dict[str, Any]], dense: dict[str, dict[str, Any]]
) -> dict[str, float | None]:
    """Compare mean accuracies: compressed ÷ dense, and the same of what exceeds chance.

    None where there is nothing to divide by.

    >>> a, b = {"accuracy": 0.4, "chance": 0.25}, {"accuracy": 0.5, "chance": 0.25}
    >>> kept = retention({"arc": a}, {"arc": b})
    >>> round(kept["retention"], 3), round(kept["above_chance"], 3)
    (0.8, 0.6)
    """

    def total(rows: dict[str, dict[str, Any]], above: bool) -> float:
        return sum(float(row["accuracy"]) - above * float(row["chance"]) for row in rows.values())

    def ratio(above: bool) -> float | None:
        base = total(dense, above)
        return total(compressed, above) / base if base else None

    return {"retention": ratio(False), "above_chance": ratio(True)}


def _summary(task: str, samples: list[dict[str, Any]]) -> dict[str, Any]:
    if not samples or "acc" not in samples[0]:
        raise CalrError(f"tasks: {task} reports no accuracy, so it cannot be compared")
    correct = [int(sample["acc"]) for sample in sorted(samples, key=lambda s: int(s["doc_id"]))]
    count = len(correct)
    accuracy = sum(correct) / count
    choices = [len(sample["arguments"]) for sample in samples]
    return {
        "accuracy": accuracy,
        "stderr": (accuracy * (1 - accuracy) / max(1, count - 1)) ** 0.5,
        "chance": sum(1 / c if c > 1 else 0.0 for c in choices) / count,
        "rows": count,
        "correct": correct,
    }


def _write_local_task(manager: Any, task: str, data: Path, target: Path) -> None:
    """Write a task file that is lm-eval's own task on local data."""
    import json

    files = {split: data / f"{task}.{split}.jsonl" for split in ("test", "validation")}
    split = next((split for split, file in files.items() if file.exists()), None)
    if split is None:
        raise CalrError(
            f"task_data: {data} holds neither {task}.test.jsonl nor {task}.validation.jsonl"
        )
    with files[split].open(encoding="utf-8") as lines:
        try:
            row = json.loads(lines.readline())
        except ValueError:
            row = None
    if not isinstance(row, dict):
        raise CalrError(f"task_data: {files[split]}, line 1: is no JSON object")
    config: dict[str, Any] = {
        "include": str(manager.task_index[task].yaml_path),
        "task": f"local_{task}",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(files[split].resolve())}},
        "training_split": None,
        "validation_split": split if split == "validation" else None,
        "test_split": split if split == "test" else None,
    }
    for known, overrides in COLUMNS.items():
        if known <= set(row):
            config |= overrides
    target.write_text(yaml.safe_dump(config))
