"""Make compressed checkpoints load and save like any transformers model.

Registered on `import calr` (as soon as transformers is loaded): config.json's quantization_config
names every compressed module and how it is stored; the modules are built from that on the meta
device before the weights are read.
"""

import itertools
import re
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
)
from transformers.quantizers.base import HfQuantizer

from calr.errors import CalrError
from calr.integrations.config import QUANT_METHOD, CalrConfig, is_quantised
from calr.integrations.experts import all_experts, put_together, take_apart
from calr.integrations.modules import replace
from calr_kernels import LowRankLinear, QuantizedEmbedding, QuantizedLinear, records
from calr_kernels.forms import CORRECTIVE

FLOATS = ("F64", "F32", "F16", "BF16")  # of weights and, below, of pivots, as safetensors says
PIVOTS = ("I32", "I64", "BOOL")
FACTORS = (".down.weight", ".pivots", ".corrective.down", ".corrective.up")
INTEGERS = {torch.uint8: ("U8",)}  # records


class CalrQuantizer(HfQuantizer):
    """Build, check, plan and undo compressed modules on behalf of transformers."""

    requires_calibration = True
    quantization_config: CalrConfig

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        take_apart(model)
        try:
            for name, layer in self.quantization_config.layers.items():
                replace(model, name, layer)
            if checkpoint_files:
                _check_files(model, checkpoint_files, self.quantization_config.layers)
        except CalrError as error:
            written = getattr(model.config, "architectures", None) or []
            if type(model).__name__ in written or not written:
                raise
            raise CalrError(
                f"this checkpoint is of {', '.join(written)} and cannot be loaded as "
                f"{type(model).__name__} ({error}); load it as it is, or call dequantize() on it "
                "and save a dense one"
            ) from error

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        vars(model)["is_quantized"] = (
            False  # .half(), .float() and training are all fine: records are frozen integers
        )
        _check_loaded(model, self.quantization_config.layers)

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        """Shard a row-parallel layer by its first factor (transformers >= 5.21)."""
        for name in self.quantization_config.layers:
            generic = _wildcard(name)
            if plan.get(generic) == "rowwise":
                plan[f"{generic}.down"] = plan.pop(generic)

    def update_tp_plan(self, config: Any) -> Any:
        """Shard a row-parallel layer by its first factor (transformers <= 5.20)."""
        plan = dict(getattr(config, "base_model_tp_plan", None) or {})
        for key in [key for key, style in plan.items() if style == "rowwise"]:
            if any(_wildcard(name).endswith(key) for name in self.quantization_config.layers):
                plan[f"{key}.down"] = plan.pop(key)
        config.base_model_tp_plan = plan  # of this config alone, not of its class
        return config

    def _dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | str | None = None
    ) -> PreTrainedModel:
        """Replace every compressed module by the dense one that computes the same."""
        found: torch.dtype | None = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        made: dict[int, nn.Module] = {}  # by the weight, which a tied lm_head shares
        for name, stated in self.quantization_config.layers.items():
            layer: Any = model.get_submodule(name)
            kind = found or (model.dtype if is_quantised(stated) else None)
            dense = layer.to_dense(kind)
            if id(layer.weight) in made:
                dense.weight = made[id(layer.weight)].weight
            made[id(layer.weight)] = dense
            model.set_submodule(name, dense)
        put_together(model)
        return model

    def is_serializable(self) -> bool:
        """save_pretrained works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The factors are ordinary parameters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """torch.compile works."""
        return True


def attach(model: PreTrainedModel, config: CalrConfig) -> None:
    """Mark a model compressed in memory, so that save_pretrained and dequantize work on it."""
    model.config.quantization_config = config
    vars(model).update(hf_quantizer=CalrQuantizer(config), quantization_method=QUANT_METHOD)


def prepare(model: PreTrainedModel) -> None:
    """Give a model, its experts apart, the empty modules that its configuration describes."""
    found: Any = getattr(model.config, "quantization_config", None)
    if found is None:
        return
    config = found if isinstance(found, CalrConfig) else CalrConfig(**found)
    for name, layer in config.layers.items():
        replace(model, name, layer)
    attach(model, config)


def register() -> None:
    """Make transformers know the format; harmless when repeated."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QUANT_METHOD, CalrConfig)
    AUTO_QUANTIZER_MAPPING.setdefault(QUANT_METHOD, CalrQuantizer)


def _wildcard(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _check_files(model: PreTrainedModel, files: list[str], layers: Iterable[str]) -> None:
    """Compare names, shapes and dtypes on disk with the modules built from config.json.

    transformers itself only warns about a missing tensor and initialises it at random.
    """
    expected: dict[str, Tensor] = model.state_dict()
    found: dict[str, tuple[str, list[int] | None]] = {}  # no shape: of a tensor that is converted
    stored: dict[str, str] = {}
    named = naming(model, expected)
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 (no iterator)
                    name, converted = named(key)
                    tensor = opened.get_slice(key)
                    stored[name] = tensor.get_dtype()
                    found[name] = (file, None if converted else tensor.get_shape())
        except (SafetensorError, OSError) as error:
            raise CalrError(f"{file}: damaged or truncated ({error}); copy it again") from error
    optional = set(getattr(model, "all_tied_weights_keys", None) or {})
    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or []
    for key, tensor in expected.items():
        if key in optional or any(re.search(pattern, key) for pattern in patterns):
            continue
        if key not in found:
            raise CalrError(f"{key}: missing from the checkpoint's files; copy them again")
        file, shape = found[key]
        if shape is not None and shape != list(tensor.shape):
            raise CalrError(
                f"{key}: has shape {shape} in {file}, but config.json needs {list(tensor.shape)}"
            )
        allowed = FLOATS if tensor.is_floating_point() else INTEGERS.get(tensor.dtype, PIVOTS)
        if stored[key] not in allowed:
            raise CalrError(
                f"{key}: has type {stored[key]} in {file}, must be one of {', '.join(allowed)}"
            )
    for key, (file, _) in found.items():
        factor = key.endswith(FACTORS)
        if key not in expected and (factor or key.rpartition(".")[0] in layers):
            raise CalrError(f"{key}: in {file}, but config.json lists no layer that it belongs to")


def naming(model: Any, expected: dict[str, Tensor]) -> Callable[[str], tuple[str, str | None]]:
    """Return what transformers calls, in a model, a tensor of a name on disk, and what converts it.

    Some families have other names there (GPT-NeoX, text models of multimodal checkpoints), or store
    apart what the model holds as one (experts).
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix = getattr(model, "base_model_prefix", None)

    def named(key: str) -> tuple[str, str | None]:  # as transformers names it when it loads
        found, converted = rename_source_key(key, renamings, converters, prefix, expected)
        if found not in expected and key in expected:
            found, converted = rename_source_key(key, [], [], prefix, expected)
        return found, converted

    return named


def _check_loaded(model: PreTrainedModel, layers: dict[str, dict[str, Any]]) -> None:
    """Check factors, pivots and records, and refuse what tensor parallelism cannot shard."""
    for name in layers:
        _check_records(name, model.get_submodule(name))
        for factor, parameter in model.get_submodule(name).named_parameters():
            if parameter.device.type != "meta" and not bool(torch.isfinite(parameter).all()):
                raise CalrError(f"{name}.{factor}: holds NaN or infinity; the file is damaged")
    _check_shared(model)
    parallel = any(type(p).__name__ == "DTensor" for p in model.parameters())
    mixtures = [name for name, _ in all_experts(model)]
    if parallel and mixtures:
        raise CalrError(
            f"{mixtures[0]}: experts cannot be sharded by tensor parallelism; load the model on "
            "one device"
        )
    pivoted = [name for name, layer in layers.items() if layer.get("layout") == "pivoted"]
    quantised = [name for name, layer in layers.items() if is_quantised(layer)]
    if parallel and quantised:
        raise CalrError(
            f"{quantised[0]}: a quantised layer cannot be sharded by tensor parallelism; load the "
            "model on one device"
        )
    if parallel and pivoted:
        raise CalrError(
            f"{pivoted[0]}: the pivoted layout cannot be sharded by tensor parallelism; compress "
            "with layout=two_factor"
        )
    if parallel:
        _check_row_parallel(model, layers)
    for name in pivoted:
        layer = cast(LowRankLinear, model.get_submodule(name))
        pivots = layer.get_buffer("pivots")
        if pivots.device.type == "meta":
            continue  # offloaded to disk
        rows, places = layer.out_features, pivots.tolist()
        ascending = all(a < b for a, b in itertools.pairwise(places))
        if pivots.dtype != torch.int32 or not ascending or not 0 <= places[0] <= places[-1] < rows:
            raise CalrError(
                f"{name}.pivots: not ascending distinct rows below {rows} of type int32; the file "
                "is damaged"
            )


def _check_shared(model: PreTrainedModel) -> None:
    """Refuse a weight that two modules take for different forms: a tied embedding and lm_head."""
    forms: dict[int, tuple[str, Any]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            form = getattr(module, "form", None)
            first, other = forms.setdefault(id(module.weight), (name, form))
            if form != other:
                raise CalrError(
                    f"config.json: layer {name} shares its weight with {first}, but they are not "
                    "of one form there"
                )


def _check_records(name: str, module: nn.Module) -> None:
    """Refuse records that no matrix of the module's form has."""
    if isinstance(module, QuantizedLinear):
        sizes = module.out_features, module.in_features
    elif isinstance(module, QuantizedEmbedding):
        sizes = module.num_embeddings, module.embedding_dim
    else:
        return
    stored = {"weight": (module.weight, module.form, *sizes)}
    path = getattr(module, "corrective", None)
    if path is not None and module.form.corrective_bits == 8:
        stored["corrective.down"] = (path.down, CORRECTIVE, path.rank, path.in_features)
        stored["corrective.up"] = (path.up, CORRECTIVE, path.rank, path.out_features)
    for key, (tensor, form, rows, columns) in stored.items():
        if tensor.device.type != "meta":
            try:
                records.check(tensor, form, rows, columns)
            except ValueError as error:
                raise CalrError(f"{name}.{key}: {error}; the file is damaged") from error


def _check_row_parallel(model: PreTrainedModel, layers: dict[str, dict[str, Any]]) -> None:
    """Refuse a row-parallel position that is factored in one block and dense in another."""
    moved = {key.removesuffix(".down") for key in model.tp_plan or {} if key.endswith(".down")}
    for name, module in model.named_modules():
        if type(module) is nn.Linear and name not in layers and _wildcard(name) in moved:
            raise CalrError(
                f"{name}: is dense, but the same layer of another block is factored, which "
                "tensor parallelism cannot shard; compress with allocation=uniform"
            )
