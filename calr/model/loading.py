"""Load a causal language model and its tokenizer: hub id, local directory, or GGUF file."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from calr.errors import CalrError
from calr.integrations.config import QUANT_METHOD
from calr.integrations.experts import take_apart
from calr.model.absent import Absent, become_resident
from calr.model.files import GGUFReader, all_parts, in_gguf
from calr.model.lazy import lazy_model, read_in_parts
from calr.model.weights import require_finite

GGUF_DTYPE = torch.bfloat16  # of the numbers of a GGUF file, where no other is asked for
logger = logging.get_logger(__name__)
NUMBERS = {gguf.GGMLQuantizationType[kind] for kind in ("F64", "F32", "F16", "BF16")}
HEAD = "output.weight"  # of lm_head, in a GGUF file
LONG = 500  # characters, of a message that says too much
REPEATED = re.compile(r"(layers|n_layer|experts)$")  # fields that count modules
MOST_REPEATED = 10_000


def load(
    source: str,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    lazily: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a dense or compressed model, in evaluation mode, and its tokenizer.

    source: hub id, directory, directory with one GGUF model, or a file of that (dequantised on
    load). dtype: "auto" keeps the checkpoint's, bfloat16 for a GGUF file; or a torch dtype's name.
    lazily: leave matrices in the files, where those allow it, and read them whenever they are used;
    whether they are numbers is then for `check_finite` to say. Raises CalrError with the source and
    the cause when it cannot be loaded, and naming a tensor that the files lack, that is left over,
    that does not fit (transformers itself would put random numbers in its place) or that holds NaN
    or infinity.
    """
    arguments = _arguments(source) | {"trust_remote_code": trust_remote_code}
    tokenizer_arguments = {k: v for k, v in arguments.items() if k != "quantization_config"}
    found = resolve_dtype(dtype)
    if found == "auto" and "gguf_file" in arguments:
        found = GGUF_DTYPE
    placed = {"dtype": found, "device_map": None if device == "cpu" else device}
    _require_model(source)
    with _one_sentence(f"{source}: cannot be loaded"):
        files = gguf_files(source)
        config = _config(source, tokenizer_arguments, files)
    remedy = "; save_pretrained writes one there" if Path(source).is_dir() and not files else ""
    with _one_sentence(f"{source}: its tokenizer cannot be loaded{remedy}"):
        tokenizer = AutoTokenizer.from_pretrained(**tokenizer_arguments)
    with _one_sentence(f"{source}: cannot be loaded"):
        loaded: Any = None
        if lazily or len(files) > 1:
            loaded = lazy_model(config, source, files, found, device, trust_remote_code)
        if loaded is None:
            _require_one(source, files)
            loaded = AutoModelForCausalLM.from_pretrained(
                **arguments, **placed, config=config, output_loading_info=True
            )
        else:
            (read_in_parts if lazily else become_resident)(loaded[0])
    model: PreTrainedModel = loaded[0]
    _require_all(source, loaded[1])
    for name, parameter in model.named_parameters():
        if parameter.device.type != "meta" and not isinstance(parameter, Absent):
            require_finite(parameter.detach(), f"{source}: {name}: the values", parameter.dtype)
    return model.eval(), tokenizer


def _require_model(source: str) -> None:
    """Refuse a directory without a model, and say of one with an adapter beside it what is read."""
    place = Path(source)
    if place.is_dir() and not gguf_files(source) and not (place / "config.json").exists():
        raise CalrError(f"{source}: holds no model (no config.json, no GGUF file)")
    if (place / "adapter" / "adapter_config.json").exists():
        logger.warning(
            f"{source}: is read without its corrective paths, which are in {place / 'adapter'}; "
            "its card says how both are loaded"
        )


def _config(source: str, arguments: dict[str, Any], files: list[Path]) -> Any:
    config = AutoConfig.from_pretrained(**arguments)
    if len(files) > 1:  # transformers has looked for a head in the first
        config.tie_word_embeddings = HEAD not in in_gguf(files)[1]
    _require_finite_work(source, config.to_dict())
    return config


def _require_finite_work(source: str, config: dict[str, Any]) -> None:
    """Refuse a configuration whose modules would be built until memory runs out."""
    for name, value in config.items():
        if isinstance(value, dict):
            _require_finite_work(source, value)
        elif REPEATED.search(str(name)) and isinstance(value, int) and value > MOST_REPEATED:
            raise CalrError(f"{source}: {name}={value}: no model has so many")


def _require_all(source: str, found: dict[str, Any]) -> None:
    """Refuse a checkpoint that gave some tensors of the model no value, by transformers' report.

    What may be missing (tied heads, buffers) or left over, by the model's own rules, is not in it.
    """
    for what, said in (
        ("missing_keys", "missing from the checkpoint's files; copy them again"),
        ("mismatched_keys", "has another shape in the checkpoint's files than config.json needs"),
        ("unexpected_keys", "in the checkpoint's files, but config.json describes no such tensor"),
    ):
        if found.get(what):
            first = sorted(map(str, found[what]))[0]
            more = f" (and {len(found[what]) - 1} others)" if len(found[what]) > 1 else ""
            raise CalrError(f"{source}: {first}{more}: {said}")


@contextlib.contextmanager
def _one_sentence(what: str) -> Iterator[None]:
    """Turn whatever the libraries below raise for bad files into one sentence."""
    try:
        yield
    except CalrError:
        raise
    except Exception as error:  # every kind, for damaged files
        said = str(error).strip() or type(error).__name__
        first = said.splitlines()[0] if len(said) > LONG else said  # not a list of all families
        raise CalrError(f"{what}: {first}") from error


def load_skeleton(
    source: str, *, trust_remote_code: bool = False, dense: bool = False
) -> PreTrainedModel:
    """Build a model's modules on the meta device, without its weights; experts taken apart.

    dense: take a compressed model for the dense one that it came from.
    """
    arguments = _arguments(source) | {"trust_remote_code": trust_remote_code}
    arguments.pop("quantization_config", None)
    with _one_sentence(f"{source}: its configuration cannot be read"), torch.device("meta"):
        config = _config(source, arguments, gguf_files(source))
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, trust_remote_code=trust_remote_code
        )
        if dense and hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        take_apart(model)
        model.eval()
    return model


def gguf_files(source: str) -> list[Path]:
    """Return the GGUF file that a source is or holds, or all of its parts; none for another."""
    found = _arguments(source)
    name = found.get("gguf_file")
    return [] if name is None else all_parts(Path(found["pretrained_model_name_or_path"]) / name)


def _require_one(source: str, files: list[Path]) -> None:
    """Refuse a split GGUF file that only transformers could read."""
    if len(files) > 1:
        raise CalrError(
            f"{source}: is a GGUF model in {len(files)} parts, of an architecture that is read "
            "from one file alone; merge them with llama-gguf-split --merge first"
        )


def on_grid(source: str) -> bool:
    """Tell whether a source is a GGUF file whose weights are quantised."""
    kinds = set()
    for file in gguf_files(source):
        with _one_sentence(f"{source}: cannot be read"):
            kinds |= {tensor.tensor_type for tensor in GGUFReader(file).tensors}
    return not kinds <= NUMBERS


def is_compressed(directory: Path) -> bool:
    """Tell whether a directory holds a checkpoint written by calr."""
    try:
        config = json.loads((directory / "config.json").read_text())
    except (OSError, json.JSONDecodeError):
        return False
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(quantization, dict) and bool(quantization.get("quant_method") == QUANT_METHOD)


def _arguments(source: str) -> dict[str, Any]:
    path = Path(source)
    if path.is_file():
        if path.suffix != ".gguf":
            raise CalrError(f"{source}: is a file but no GGUF; name a directory or a hub id")
        files = [path]
    elif (path / "adapter_config.json").exists():
        raise CalrError(
            f"{source}: is a PEFT adapter (adapter_config.json), not a model; merge it into its "
            "base model first (merge_and_unload) and save that"
        )
    else:
        if path.is_dir() and (path / ".calr").exists() and not (path / "config.json").exists():
            raise CalrError(f"{source}: holds an unfinished compression; run it again to finish")
        files = [] if (path / "config.json").exists() else sorted(path.glob("*.gguf"))
    files = sorted({all_parts(file)[0] for file in files})
    if not files:
        return {"pretrained_model_name_or_path": source}
    if len(files) > 1:
        listed = ", ".join(f.name for f in files)
        raise CalrError(f"{source}: holds several GGUF files ({listed}); name one of them")
    found = {"pretrained_model_name_or_path": str(files[0].parent), "gguf_file": files[0].name}
    if not hasattr(transformers, "GgufConfig"):  # before 5.23: dequantised without being asked
        return found
    return found | {"quantization_config": transformers.GgufConfig(dequantize=True)}


def resolve_dtype(name: str) -> Any:
    """Return the torch dtype of a name, or "auto". Raises CalrError for anything else."""
    if name == "auto":
        return "auto"
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise CalrError(f"dtype={name!r}: use auto, float64, float32, bfloat16 or float16")
    return dtype
