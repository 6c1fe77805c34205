"""llama.cpp's own quantisations of models on which they were measured, to name beside ours."""

from typing import Any, NamedTuple


class Rung(NamedTuple):
    """A type of llama.cpp: bytes of tensors, mean KL from the dense model, worst perplexity ratio.

    Over three texts, without an importance matrix: bench/README.md, `bench/frontier.py --ladder`.
    """

    name: str
    tensor_bytes: int
    kl: float
    ratio: float


class Measured(NamedTuple):
    """A model, by its name and what its config says of it, and its rungs."""

    model: str
    shapes: dict[str, Any]
    rungs: tuple[Rung, ...]


MEASURED = (
    Measured(
        "SmolLM2-135M-Instruct",
        {"model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "vocab_size": 49152},
        (
            Rung("Q8_0", 143_025_408, 0.0013, 1.001),
            Rung("Q6_K", 136_597_248, 0.0059, 1.006),
            Rung("Q5_K_M", 110_317_824, 0.0752, 1.093),
            Rung("Q4_K_M", 103_668_480, 0.0523, 1.065),
            Rung("Q5_0", 103_212_288, 0.0808, 1.094),
            Rung("Q3_K_M", 91_724_544, 0.1369, 1.135),
            Rung("IQ4_NL", 90_273_024, 0.1980, 1.212),
            Rung("Q4_0", 89_941_248, 0.3096, 1.241),
            Rung("IQ4_XS", 89_526_528, 0.2011, 1.212),
            Rung("Q2_K", 86_416_128, 0.4350, 1.388),
        ),
    ),
)


def nearest_rung(config: Any, tensor_bytes: int) -> str | None:
    """Name the type nearest to so many bytes, and what it loses; None for a model not measured."""
    for model, shapes, rungs in MEASURED:
        if all(getattr(config, name, None) == value for name, value in shapes.items()):
            name, size, kl, ratio = min(
                rungs, key=lambda rung: abs(rung.tensor_bytes - tensor_bytes)
            )
            lost = f"KL {kl:.4f}, perplexity ratio {ratio:.3f}"
            return f"{name} of {model}: {size / 1e6:.1f} MB, {lost} on other text"
    return None
