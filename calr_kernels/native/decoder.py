"""What lies between a decoder's linear layers, on the native kernel: norms, rotation, attention.

Callers ask `calr_kernels.eligible` first; all tensors are on the CPU and of one type in TYPES.
"""

import torch
from torch import Tensor

from calr_kernels.native.loader import TYPES, required


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Compute weight * x / sqrt(mean(x²) + epsilon) over the last dimension, in float32.

    x [..., K] and weight [K], contiguous. What is multiplied by the weight is rounded to their type
    first, as the norms of transformers' Llama family do.
    """
    x = x.contiguous()
    y = torch.empty_like(x)
    k = x.shape[-1]
    required().calr_rms_norm(
        x.data_ptr(),
        weight.data_ptr(),
        y.data_ptr(),
        x.numel() // k,
        k,
        epsilon,
        TYPES[x.dtype],
        torch.get_num_threads(),
    )
    return y


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> None:
    """Turn heads by rotary position embeddings, in place: x * cos + (-second, first half) * sin.

    x [B, heads, d], contiguous, and cosines and sines [B or 1, 1, d]. Products and sum round to
    their type, as in transformers.
    """
    b, heads, d = x.shape
    cosines, sines = cosines.contiguous(), sines.contiguous()
    required().calr_rotate(
        x.data_ptr(),
        cosines.data_ptr(),
        sines.data_ptr(),
        b,
        heads,
        d,
        d if cosines.shape[0] > 1 else 0,
        TYPES[x.dtype],
    )


def attend(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Compute softmax(scale q keys') values for one query a head, in float32.

    q [B, heads, d], keys and values [B, key heads, count, d], heads a multiple of key heads ->
    [B, heads, d]. Raises ValueError for what does not fit.
    """
    b, heads, count, d = keys.shape
    shapes = keys.shape == values.shape and q.shape == (b, q.shape[1] // heads * heads, d)
    kinds = {(t.dtype, t.device.type) for t in (q, keys, values)}
    if not shapes or kinds != {(q.dtype, "cpu")}:
        described = [f"{list(t.shape)} {t.dtype} on {t.device}" for t in (q, keys, values)]
        raise ValueError(f"keys and values do not fit the queries: {described}")
    q, keys, values = q.contiguous(), keys.contiguous(), values.contiguous()
    y = torch.empty_like(q)
    required().calr_attend(
        q.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        y.data_ptr(),
        b,
        heads,
        q.shape[1] // heads,
        count,
        d,
        scale,
        TYPES[q.dtype],
        torch.get_num_threads(),
    )
    return y
