"""Blocks of a decoder as the native kernel takes them, and whether it computes what they do."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from calr.inference.cache import GrowingLayer
from calr.inference.layers import ACTIVATIONS, ATTENTION, GATED, tensors_of
from calr.inference.rotary import kinds
from calr.inference.traces import TOLERANCE, norm_form
from calr_kernels import eligible, native

NORMS = {  # names in a block: before and after attention, before and after the feed-forward block
    4: ("input_layernorm", None, "post_attention_layernorm", None),
    6: (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}
HELD = 5  # positions in a traced block's past
CLAMPS = ("attn_logit_softcapping", "clip_qkv")  # which a trace of small numbers does not show


def bind(module: Any, x: Tensor) -> native.Blocks | None:
    """Bind a decoder's blocks, and its last norm if that is of their form, if the kernel may read
    them for x and can."""
    types = [kind[0] for kind in kinds(module) if kind]
    parts = []
    for i, block in enumerate(module.layers):
        rotation = types.index(module.config.layer_types[i]) if types else 0
        found = _parts(block, x, rotation)
        if found is None:
            return None
        parts.append(found)
    return native.Blocks(parts, _norm(module.norm, x, parts[-1]))


def _norm(norm: Any, x: Tensor, block: native.BlockParts) -> Tensor | None:
    """Return the weight of a norm that is of a block's form."""
    form = norm_form(norm) if eligible.unhooked(norm) else None
    if form is None or (form.from_one, form.epsilon) != (block.from_one, block.epsilon):
        return None
    weight: Tensor = norm._parameters["weight"]
    return weight if eligible.readable(x, None, weight) and weight.is_contiguous() else None


def usual(block: nn.Module) -> bool:
    """Tell whether a block has the parts that the kernel knows, by their names."""
    own = block._modules
    attention, mlp = own.get("self_attn"), own.get("mlp")
    if len(own) not in NORMS or attention is None or mlp is None:
        return False
    inner = set(attention._modules)
    named = set(ATTENTION) <= inner <= {*ATTENTION, "q_norm", "k_norm"}
    return named and set(GATED) == set(mlp._modules)


def _parts(block: Any, x: Tensor, rotation: int) -> native.BlockParts | None:
    """Return a block's tensors if it looks like one that the kernel knows."""
    if not usual(block):
        return None
    own = block._modules
    names, attention, mlp = NORMS[len(own)], own["self_attn"], own["mlp"]
    inner = attention._modules
    if attention._parameters or not all(map(eligible.unhooked, block.modules())):
        return None
    config = attention.config
    if any(getattr(holder, name, None) for holder in (attention, config) for name in CLAMPS):
        return None
    norms = [None if name is None else own[name] for name in names]
    norms += [inner.get(name) for name in ("q_norm", "k_norm")]
    forms = [norm_form(norm) for norm in norms if norm is not None]
    if forms[0] is None or forms != forms[:1] * len(forms):
        return None
    layers = [tensors_of(inner[name], x, size) for name, size in _widths(attention, x)]
    gated = [tensors_of(mlp.gate_proj, x), tensors_of(mlp.up_proj, x)]
    if gated[0] is not None:
        gated.append(tensors_of(mlp.down_proj, x, gated[0].out_features))
    weights = [None if norm is None else norm._parameters["weight"] for norm in norms]
    fine = all(w is None or (eligible.readable(x, None, w) and w.is_contiguous()) for w in weights)
    activation = ACTIVATIONS.get(type(mlp.act_fn).__name__)
    if None in layers or len(gated) < 3 or None in gated or not fine or activation is None:
        return None
    d = attention.head_dim
    return native.BlockParts(
        norms=tuple(weights[:4]),
        q_norm=weights[4],
        k_norm=weights[5],
        attention=tuple(layers),  # type: ignore[arg-type]
        gated=tuple(gated),  # type: ignore[arg-type]
        heads=layers[0].out_features // d,  # type: ignore[union-attr]
        key_heads=layers[1].out_features // d,  # type: ignore[union-attr]
        d=d,
        window=_window(attention),
        rotation=rotation if getattr(attention, "use_rope", True) else -1,
        activation=activation,
        from_one=forms[0].from_one,
        epsilon=forms[0].epsilon,
        scale=float(attention.scaling),
    )


def _widths(attention: Any, x: Tensor) -> list[tuple[str, int]]:
    """Name the linear layers of an attention, each with its number of inputs."""
    heads = attention.q_proj.out_features
    return [(name, heads if name == "o_proj" else x.shape[-1]) for name in ATTENTION]


def _window(attention: Any) -> int:
    """Return how many positions an attention sees, 0 for all."""
    holder = attention if "sliding_window" in vars(attention) else attention.config
    return getattr(holder, "sliding_window", None) or 0


def same(
    block: Any,
    parts: native.BlockParts,
    index: int,
    size: int,
    dtype: torch.dtype,
    sharpness: float,
    generator: torch.Generator,
) -> bool:
    """Compare a block's own forward with the kernel's, and what both leave in the cache.

    sharpness: how large the keys of the past are, so that other ways to bound scores show.
    """

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    turns = random(1, 1, parts.d), random(1, 1, parts.d)
    count = min(HELD, parts.window - 1) if parts.window else HELD
    held = (
        sharpness * random(1, parts.key_heads, count, parts.d),
        random(1, parts.key_heads, count, parts.d),
    )
    own, growing = DynamicCache(), GrowingLayer()
    own.update(*held, index)
    growing.update(*held)
    x = random(1, 1, size)
    expected = block(
        x,
        attention_mask=None,
        position_embeddings=turns,
        position_ids=torch.full((1, 1), count),
        past_key_values=own,
        use_cache=True,
    )
    expected = expected[0] if isinstance(expected, tuple) else expected
    found = x[:, 0].clone()
    rotations = [(turns[0][:, 0], turns[1][:, 0])] * (parts.rotation + 1)
    blocks = native.Blocks([parts])
    blocks.decode(found, blocks.pasts(found, [(*growing.room(1), count, 0)]), rotations)
    growing.advance(1)
    tolerance = TOLERANCE[dtype]
    noise = torch.finfo(dtype).eps * torch.linalg.vector_norm(expected.float())
    moved = torch.linalg.vector_norm((expected - x).float())
    error = torch.linalg.vector_norm((found - expected[:, 0]).float())
    layer: Any = own.layers[index]
    return bool(error <= tolerance * moved + noise) and all(
        close(a, b, tolerance)
        for a, b in ((growing.keys, layer.keys), (growing.values, layer.values))
    )


def close(found: Any, expected: Any, tolerance: float) -> bool:
    """Tell whether two tensors differ by no more than a share of the second's norm."""
    error = torch.linalg.vector_norm((found - expected).float())
    return bool(error <= tolerance * torch.linalg.vector_norm(expected.float()))
