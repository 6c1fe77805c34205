"""Load a causal language model and its tokenizer: hub id, local directory, or GGUF file."""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from calr.errors import CalrError
from calr.integrations.transformers import QUANT_METHOD

# what the libraries below raise for bad paths, devices, memory, configurations and files
LOADING_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    RuntimeError,
    ImportError,
    AssertionError,
    SafetensorError,
    AttributeError,
    StrictDataclassError,
)


def load(
    source: str, *, dtype: str = "auto", device: str = "cpu", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a dense or compressed model, in evaluation mode, and its tokenizer.

    source: hub id, directory, directory with one GGUF file, or that file (dequantised on load).
    dtype: "auto" keeps the checkpoint's; or a torch dtype's name. Raises CalrError with the source
    and the cause when it cannot be loaded.
    """
    arguments = _arguments(source) | {"trust_remote_code": trust_remote_code}
    tokenizer_arguments = {k: v for k, v in arguments.items() if k != "quantization_config"}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**tokenizer_arguments)
        model = AutoModelForCausalLM.from_pretrained(
            **arguments, dtype=resolve_dtype(dtype), device_map=None if device == "cpu" else device
        )
    except LOADING_ERRORS as error:
        raise CalrError(f"{source}: cannot be loaded: {error}") from error
    return model.eval(), tokenizer


def load_skeleton(
    source: str, *, trust_remote_code: bool = False, dense: bool = False
) -> PreTrainedModel:
    """Build a model's modules on the meta device, without its weights.

    dense: take a compressed model for the dense one that it came from.
    """
    arguments = _arguments(source) | {"trust_remote_code": trust_remote_code}
    arguments.pop("quantization_config", None)
    try:
        config = AutoConfig.from_pretrained(**arguments)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code
            )
            if dense and hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            model.eval()
            return model
    except LOADING_ERRORS as error:
        raise CalrError(f"{source}: its configuration cannot be read: {error}") from error


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
    else:
        if path.is_dir() and (path / ".calr").exists() and not (path / "config.json").exists():
            raise CalrError(f"{source}: holds an unfinished compression; run it again to finish")
        files = [] if (path / "config.json").exists() else sorted(path.glob("*.gguf"))
    if not files:
        return {"pretrained_model_name_or_path": source}
    if len(files) > 1:
        listed = ", ".join(f.name for f in files)
        raise CalrError(f"{source}: holds several GGUF files ({listed}); name one of them")
    return {
        "pretrained_model_name_or_path": str(files[0].parent),
        "gguf_file": files[0].name,
        "quantization_config": GgufConfig(dequantize=True),
    }


def resolve_dtype(name: str) -> Any:
    """Return the torch dtype of a name, or "auto". Raises CalrError for anything else."""
    if name == "auto":
        return "auto"
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise CalrError(f"dtype={name!r}: use auto, float32, bfloat16 or float16")
    return dtype
