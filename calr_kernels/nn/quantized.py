"""The drop-in modules of a quantised linear layer and of a quantised embedding."""

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from calr_kernels import eligible, gpu
from calr_kernels.forms import Form
from calr_kernels.layout import Records
from calr_kernels.native import Bound
from calr_kernels.nn.corrective import Corrective
from calr_kernels.quantized import dequantize, product, quantized_linear

if gpu.AVAILABLE:
    from calr_kernels.gpu import linears


class QuantizedLinear(nn.Linear):
    """A linear layer of quantised weights: x [..., K] -> y [..., N] in x's dtype.

    `weight` holds the records [N, groups, record] uint8 of a form (calr_kernels.forms), a frozen
    parameter under the dense layer's name: programs that look for it find it, and loading it into a
    dense model fails on the shape. bias [N]. `corrective`, where the form has one, is the low-rank
    path beside it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        form: Form,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.form = in_features, out_features, form
        self.weight = _empty_records(form, out_features, in_features, device)
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self._bound = Bound()
        self.corrective: Corrective | None = None
        if form.corrective_rank:
            self.corrective = Corrective(in_features, out_features, form, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer: [..., in_features] -> [..., out_features].

        Few rows, without gradients: from a second copy of the records that is made once.
        """
        if not torch.is_grad_enabled() and not eligible.watched() and self.fusible(input):
            records = self.records()
            if eligible.native_packed(input, records):
                return self._bound.linears(input, (records,))[0]
            if eligible.triton_records(input, records):
                return linears.quantized_linear(input, records)
            if self.corrective is not None and self._many(input):
                return product(input, self._whole(self.corrective, input), self.bias)
        own, path = (input, self.weight, self.form, self.bias), self.corrective
        if path is None:
            return quantized_linear(*own)
        alone = type(path) is Corrective and eligible.unhooked(path)
        if alone and path.down.dtype in (torch.uint8, input.dtype):
            return quantized_linear(*own, path.down, path.up)
        beside: Tensor = path(input)
        return quantized_linear(*own) + beside

    def _many(self, input: Tensor) -> bool:
        """Tell whether a product of the corrective factors is less work than both with the rows."""
        rows, n, k = input.numel() // self.in_features, self.out_features, self.in_features
        return rows * (n + k) >= n * k and not eligible.native_quantized(
            input, self.weight, self.bias
        )

    def _whole(self, corrective: Corrective, input: Tensor) -> Tensor:
        """Return both paths in one matrix [out_features, in_features], in the dtype of products."""
        dtype = eligible.product_dtype(input)
        numbers = dequantize(self.weight, self.form, self.in_features, input.dtype).to(dtype)
        down, up = corrective.factors(dtype)
        return numbers.addmm_(up, down)

    def records(self) -> Records:
        """Return the layer's tensors."""
        own, corrective = self._parameters, self.corrective
        paths = () if corrective is None else (corrective.down, corrective.up)
        weight = cast(Tensor, own["weight"])
        return Records(weight, self.form, self.in_features, own["bias"], *paths)

    def fusible(self, input: Tensor) -> bool:
        """Tell whether a kernel may read the tensors for an input [..., in_features].

        Not where something acts when the corrective path is called, or where a tensor is wrapped or
        elsewhere, or where the input is.
        """
        own, corrective = self._parameters, self.corrective
        if "bias" not in own or "weight" not in own:
            return False
        if corrective is not None and not (
            type(corrective) is Corrective
            and eligible.unhooked(corrective)
            and len(corrective._parameters) == 2
        ):
            return False
        return eligible.readable_records(input, self.records())

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight matrix [out_features, in_features], rounded once to a dtype."""
        if self.corrective is None:
            return dequantize(self.weight, self.form, self.in_features, dtype)
        down, up = self.corrective.factors(torch.float64)
        primary = dequantize(self.weight, self.form, self.in_features, torch.float32)
        return torch.addmm(primary.double(), up, down).to(dtype)

    @torch.no_grad()
    def append(self, down: Tensor, up: Tensor) -> None:
        """Add terms to the corrective path, down [r, K] and up [N, r], which is then of 16 bits.

        In the dtype of the bias, or of down where there is none.
        """
        dtype = down.dtype if self.bias is None else self.bias.dtype
        parts = [(down.to(dtype), up.to(dtype).mT)]
        if self.corrective is not None:
            first, second = self.corrective.factors(dtype)
            parts.insert(0, (first, second.mT))
        rank = sum(len(part) for part, _ in parts)
        self.form = replace(self.form, corrective_rank=rank, corrective_bits=16)
        path = Corrective(self.in_features, self.out_features, self.form, down.device, dtype)
        path.down.copy_(torch.cat([part for part, _ in parts]))
        path.up.copy_(torch.cat([part for _, part in parts]))
        self.corrective = path

    @torch.no_grad()
    def to_dense(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """Make the dense layer that computes the same; dtype: by default the bias's, or float32."""
        dtype = dtype or (torch.float32 if self.bias is None else self.bias.dtype)
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        dense.weight = nn.Parameter(self.dense_weight(dtype))
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().to(dtype, copy=True))
        return dense

    def extra_repr(self) -> str:
        """Describe the layer in `print(model)`."""
        return f"{super().extra_repr()}, {self.form}"


class QuantizedEmbedding(nn.Embedding):
    """An embedding of quantised rows: ids [...] -> [..., embedding_dim] in the module's dtype.

    `weight` holds records, as in QuantizedLinear, so that a tied lm_head shares them. scale: what
    the rows are multiplied by, as Gemma does.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        form: Form,
        scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if form.corrective_rank:
            raise ValueError(f"{form}: an embedding has no corrective path")
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.form = num_embeddings, embedding_dim, form
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False
        self.scale = scale
        self.weight = _empty_records(form, num_embeddings, embedding_dim, device)
        # follows .to(dtype) where the records do not: the dtype of the output
        self.register_buffer("like", torch.empty(0, device=device, dtype=dtype), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """Look ids up: [...] int -> [..., embedding_dim]."""
        like = cast(Tensor, self._buffers["like"])
        dtype, rows = like.dtype, self.weight[input.reshape(-1)]
        found = dequantize(rows, self.form, self.embedding_dim, dtype)
        if self.scale != 1:
            found = found * torch.tensor(self.scale, dtype=dtype, device=found.device)
        return found.view(*input.shape, self.embedding_dim)

    @torch.no_grad()
    def to_dense(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """Make the dense embedding that computes the same."""
        dtype = dtype or self.get_buffer("like").dtype
        weight = dequantize(self.weight, self.form, self.embedding_dim, dtype)
        if self.scale != 1:
            return ScaledEmbedding(weight, self.scale)
        dense: nn.Embedding = nn.Embedding.from_pretrained(weight, freeze=False)
        return dense

    def extra_repr(self) -> str:
        """Describe the module in `print(model)`."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.form}"


class ScaledEmbedding(nn.Embedding):
    """A dense embedding [V, K] whose rows are multiplied by a scale, in their dtype, as Gemma does.

    `scalar_embed_scale` is what transformers calls the scale in classes of this kind.
    """

    def __init__(self, weight: Tensor, scale: float) -> None:
        rows, columns = weight.shape
        super().__init__(rows, columns, _weight=weight)
        self.scalar_embed_scale = scale

    def forward(self, input: Tensor) -> Tensor:
        """Look ids up: [...] int -> [..., K]."""
        rows = super().forward(input)
        return rows * torch.tensor(self.scalar_embed_scale, dtype=rows.dtype, device=rows.device)


def _empty_records(
    form: Form, rows: int, columns: int, device: torch.device | str | None
) -> nn.Parameter:
    """Make records of zeros: every scale is 0."""
    zeros = torch.zeros(form.shape(rows, columns), dtype=torch.uint8, device=device)
    return nn.Parameter(zeros, requires_grad=False)
