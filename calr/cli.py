"""The command line: arguments only, so that --help answers without loading torch."""

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    restricted_number_type,
)

from calr.errors import CalrError
from calr.interrupts import interruptible
from calr.recipe import KEEP, Recipe, Solver
from calr.version import __version__
from calr_kernels.layout import Layout

CALIBRATION = (
    "Calibration text: a text file, FILE.jsonl[#field], a hub data set NAME[:CONFIG][:SPLIT]"
    "[#field], sampled (by the model itself: measured to serve unseen text best), builtin (English "
    "that every Python carries), or several of these separated by commas, in equal shares."
)

Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**32)])  # as NumPy's in lm-eval
LISTS = ("--skip", "--tasks", "--widths")  # options that take several values


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0: done; 1: an error that its message tells how to mend; 2: wrong arguments; 130: interrupted.
    """
    parser = build_parser()
    try:
        parsed = parser.parse_args(_lists(_config_first(arguments)))
    except UnicodeDecodeError as error:  # of a file that is no text
        parser.error(f"--config: is no text in UTF-8 ({error})")
    _set_up_logging()
    try:
        with interruptible():
            from calr import commands

            name = parsed.subcommand.replace("-", "_")
            run: Callable[[Namespace], None] = getattr(commands, name)
            run(parsed[parsed.subcommand])
    except BrokenPipeError:  # of a reader that has seen enough, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (CalrError, OSError, ValueError) as error:
        if isinstance(error, ValueError) and "CALR_CPU_ISA" not in str(error):
            raise
        print(f"calr: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        resumes = "; the same command continues where it stopped"
        print(
            f"\ncalr: interrupted{resumes if parsed.subcommand == 'compress' else ''}",
            file=sys.stderr,
        )
        return 130
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        print(f"calr: there is not enough memory: {error}", file=sys.stderr)
        return 1
    return 0


def _lists(arguments: list[str]) -> list[str]:
    """Let lists be typed plainly: --skip '*.0.*', --tasks arc_easy,piqa, --widths 4,5."""
    found: list[str] = []
    for word in arguments:
        option, _, value = word.partition("=")
        if found and found[-1] in LISTS and not word.startswith("["):
            word = _json_list(word)
        elif option in LISTS and value and not value.startswith("["):
            word = f"{option}={_json_list(value)}"
        found.append(word)
    return found


def _json_list(typed: str) -> str:
    return json.dumps([int(x) if x.isdecimal() else x for x in typed.split(",")])


def _set_up_logging() -> None:
    """Show what calr says, and of other packages only what a user can act on: their errors."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
    for name in ("torchao", "torch.utils._pytree", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    own = logging.getLogger("calr")
    own.setLevel(logging.INFO)
    if not own.handlers:
        own.addHandler(_Stderr())


class _Stderr(logging.Handler):
    """Writes to what is standard error at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def _config_first(arguments: Sequence[str] | None) -> list[str]:
    """Move --config FILE behind the subcommand, so that what is typed wins over the file."""
    parser = argparse.ArgumentParser(prog="calr", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", action="append", default=[])
    found, rest = parser.parse_known_args(arguments)
    files = [word for file in found.config for word in ("--config", file)]
    return [*rest[:1], *files, *rest[1:]]


def build_parser() -> ArgumentParser:
    """Describe all commands."""
    parser = ArgumentParser(prog="calr", description="Compress causal language models.")
    parser.add_argument("--version", action="version", version=f"calr {__version__}")
    commands = parser.add_subcommands(required=True)
    for name, (describe, text) in {
        "plan": (_plan, "Show forms, bytes, memory and time of a compression; write nothing."),
        "compress": (_compress, "Compress a model and write an ordinary checkpoint."),
        "resize": (_resize, "Cut an elastic checkpoint to a size, without calibration."),
        "export": (_export, "Write a compressed checkpoint for programs that do not know calr."),
        "eval": (_eval, "Measure token perplexity and zero-shot tasks."),
        "bench": (_bench, "Time prefill and decode, two models interleaved."),
        "generate": (_generate, "Generate text from a dense or compressed model."),
        "inspect": (_inspect, "Show what a compressed checkpoint is made of."),
    }.items():
        command = ArgumentParser(description=text)
        describe(command)
        command.add_argument("--json", action="store_true", help="Print results as JSON.")
        commands.add_subcommand(name, command, help=text)
    return parser


def _model(parser: ArgumentParser, name: str = "model", **kwargs: Any) -> None:
    text = "Hub id, directory, or GGUF file (or a directory with one)."
    parser.add_argument(name, type=str, help=text, **kwargs)


def _loading(parser: ArgumentParser) -> None:
    parser.add_argument("--dtype", type=str, default="auto", help="Load weights in this dtype.")
    _trust(parser)
    parser.add_argument("--device", type=str, default="cpu", help="cpu, cuda, cuda:1, ...")


def _trust(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="Run code that comes with the model."
    )


def _recipe(parser: ArgumentParser) -> None:
    parser.add_class_arguments(Recipe, help="recipe")
    parser.add_argument(
        "--config",
        action="config",
        help="YAML of any of these options; what is typed beside it wins.",
    )
    parser.add_argument(
        "--statistics",
        type=str | None,
        default=None,
        help="Directory that keeps calibration statistics for further runs.",
    )
    parser.add_argument(
        "--offload",
        type=str | None,
        default=None,
        help="Directory for what is kept in files during the run; by default DIRECTORY/.calr.",
    )
    parser.add_argument("--calibration", type=str, default="sampled", help=CALIBRATION)
    parser.add_argument(
        "--elastic",
        action="store_true",
        help="Write every layer whole, as ordered factors, for `calr resize` to cut to any size; "
        "keep, layout, shifted_inputs, block_epochs and correction do not count then.",
    )
    parser.add_argument(
        "--eval_windows",
        type=NonNegativeInt,
        default=8,
        help="Windows of held-out built-in text to measure perplexity on, for the card; 0: none.",
    )
    limit: dict[str, Any] = {"type": str | None, "default": None}
    text = "What the process may take, such as 8GB, by the estimates of `calr plan`: text is "
    text += "sampled in smaller batches or more slowly, activations of the training computed twice."
    parser.add_argument("--max_memory", help=text, **limit)
    text = "What it may take of a GPU's memory; by default what is free there."
    parser.add_argument("--device_memory", help=text, **limit)
    _loading(parser)


def _plan(parser: ArgumentParser) -> None:
    _model(parser)
    _recipe(parser)


def _compress(parser: ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("directory", type=str, help="Where to write the checkpoint.")
    _recipe(parser)
    _overwrite(parser)


def _overwrite(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--overwrite", action="store_true", help="Replace a checkpoint in the directory."
    )


def _resize(parser: ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("directory", type=str, help="Where to write the checkpoint.")
    parser.add_argument(
        "--keep",
        type=float,
        default=KEEP,
        help="Fraction kept of the parameters of the decoder's linear layers, in (0, 1].",
    )
    parser.add_argument(
        "--layout", type=Layout, default=Recipe.layout, help="How a rank is stored."
    )
    parser.add_argument(
        "--solver",
        type=Solver,
        default=Recipe.solver,
        help="Solver of the allocation.",
    )
    _overwrite(parser)
    _loading(parser)


def _export(parser: ArgumentParser) -> None:
    parser.add_argument("model", type=str, help="Directory of a compressed checkpoint.")
    parser.add_argument("output", type=str, help="Directory, or GGUF file, to write.")
    parser.add_argument(
        "--to",
        type=Literal["dense", "gguf", "compressed-tensors"],
        required=True,
        help="dense: an ordinary checkpoint; gguf: a file for llama.cpp, compressed-tensors: a "
        "directory for transformers and vLLM, of a checkpoint that was compressed with that "
        "--target.",
    )
    parser.add_argument(
        "--like",
        type=str | None,
        default=None,
        help="A GGUF file of the dense model, of which tokenizer and hyperparameters are copied.",
    )
    _overwrite(parser)
    _trust(parser)


def _eval(parser: ArgumentParser) -> None:
    _model(parser)
    _model(parser, "--against", default=None)
    parser.add_argument(
        "--text",
        type=str,
        default="builtin",
        help="Text for token perplexity: a file or data set as in compress --calibration, or "
        "builtin, the part of the built-in text that calibration never sees.",
    )
    parser.add_argument(
        "--windows", type=NonNegativeInt, default=40, help="Windows of text; 0: none."
    )
    parser.add_argument("--window", type=PositiveInt, default=512, help="Tokens in a window.")
    parser.add_argument(
        "--tasks", type=list[str], default=[], help="lm-eval tasks, e.g. arc_easy,piqa."
    )
    parser.add_argument(
        "--task_data",
        type=str | None,
        default=None,
        help="Directory with TASK.test.jsonl or TASK.validation.jsonl in place of the hub's data.",
    )
    parser.add_argument(
        "--limit", type=PositiveInt | None, default=None, help="First rows of each task."
    )
    parser.add_argument("--seed", type=Seed, default=0, help="Seed of the tasks' own sampling.")
    _loading(parser)


def _bench(parser: ArgumentParser) -> None:
    _model(parser)
    _model(parser, "--against", default=None)
    parser.add_argument(
        "--prompt_tokens", type=PositiveInt, default=256, help="Tokens of the prefill."
    )
    parser.add_argument("--new_tokens", type=PositiveInt, default=32, help="Tokens to decode.")
    parser.add_argument("--rounds", type=PositiveInt, default=5, help="Rounds; medians are shown.")
    parser.add_argument("--threads", type=PositiveInt | None, default=None, help="CPU threads.")
    _packing(parser)
    _loading(parser)


def _packing(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--pack",
        action="store_true",
        help="On a CPU, hold 16- and 32-bit weights a second time, in the order in which they are "
        "read fastest; quantised ones always are.",
    )


def _generate(parser: ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("--prompt", type=str, default="Once upon a time", help="Text to continue.")
    parser.add_argument("--chat", action="store_true", help="Apply the model's chat template.")
    parser.add_argument(
        "--max_new_tokens", type=PositiveInt, default=64, help="Tokens to generate."
    )
    parser.add_argument(
        "--temperature", type=NonNegativeFloat, default=0.0, help="0: greedy; otherwise sample."
    )
    parser.add_argument("--seed", type=Seed, default=0, help="Seed of sampling.")
    _packing(parser)
    _loading(parser)


def _inspect(parser: ArgumentParser) -> None:
    parser.add_argument("model", type=str, help="Directory of a compressed checkpoint.")
    parser.add_argument(
        "--verify", action="store_true", help="Compare every file with its checksum."
    )
    _trust(parser)


if __name__ == "__main__":
    sys.exit(main())
