"""The methods of the comparison: from the dense model to a smaller one, healed or not.

All get the same calibration windows, the same windows to heal on, the same recorded outputs of the
dense model, and the same training loop.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

import calr
from calr.baselines.laco import laco
from calr.baselines.losparse import LoSparse
from calr.baselines.shortgpt import shortgpt
from calr.model import analyse, digest, find_blocks, fingerprint
from calr.statistics import open_statistics
from calr.storage import Store
from calr.text import spread
from calr.training import mixed, norm_parameters, recorded_outputs, train

SAMPLES, GRADIENT_SAMPLES = 96, 32  # calibration windows
FACTORS = {"layout": "two_factor", "learning_rate": 1e-4}  # farther from dense than CALR
RECIPES = {  # as their papers have them, up to rank rules that those leave open
    "SVD": FACTORS | {"method": "svd", "allocation": "uniform"},
    "SVD-LLM": FACTORS | {"method": "svd_llm", "allocation": "uniform"},
    "ERC-SVD": FACTORS | {"method": "erc_svd", "allocation": "last_k"},
    "CALR": {},
    "CALR + 0.5 cross-entropy": {"cross_entropy": 0.5},
}
BLOCKS = {"ShortGPT": shortgpt, "LaCo": laco}
METHODS = ["SVD", "SVD-LLM", "ERC-SVD", "ShortGPT", "LaCo", "LoSparse", "CALR"]
LONGER = ["CALR", "CALR + 0.5 cross-entropy"]  # those that get a longer correction, too
MATRICES_LEARNING_RATE = 5e-5  # of the methods that train whole matrices


@dataclass
class Bench:
    """A dense model, the text that every method gets, and where what they share is kept."""

    dense: PreTrainedModel
    ids: Tensor
    statistics: Path

    def build(
        self, name: str, keep: float, tokens: int, *, work: Path | None = None, **options: object
    ) -> PreTrainedModel:
        """Return a copy of the dense model at keep of its linear parameters, healed on tokens.

        work: where a killed run continues (not LoSparse's, which prunes as it trains). options: of
        the recipe, for variants of the methods that have one.
        """
        model = copy.deepcopy(self.dense)
        if name in RECIPES:
            recipe = calr.Recipe(
                keep=keep,
                samples=SAMPLES,
                gradient_samples=GRADIENT_SAMPLES,
                correction_tokens=tokens,
                **(RECIPES[name] | options),
            )
            return calr.compress(
                model, recipe, calibration=self.ids, statistics=self.statistics, work=work
            )
        if name in BLOCKS:
            blocks = analyse(model).blocks
            BLOCKS[name](model, self._calibration, round_down((1 - keep) * blocks))
            if tokens:
                inside = model.get_submodule(find_blocks(model)[0]).parameters()
                self._heal(
                    model, list(dict.fromkeys([*inside, *norm_parameters(model)])), tokens, work
                )
            return model
        return self._losparse(model, keep, tokens)

    @property
    def _calibration(self) -> Tensor:
        return spread(self.ids, SAMPLES)

    def _losparse(self, model: PreTrainedModel, keep: float, tokens: int) -> PreTrainedModel:
        pruner = LoSparse(model, keep)
        for window in self._calibration[:8].split(1):  # importance without training: one backward
            with torch.enable_grad():
                with mixed(model):
                    logits = model(input_ids=window, use_cache=False).logits[0]
                cross_entropy(logits[:-1].float(), window[0, 1:]).backward()
        if tokens:
            pruner.observe()
            model.zero_grad()
            self._heal(
                model, [*pruner.parameters, *norm_parameters(model)], tokens, None, pruner.update
            )
        else:
            pruner.update(0, 1)
            model.zero_grad()
        return model

    def _heal(self, model, parameters, tokens, work, on_gradients=None) -> None:
        recipe = calr.Recipe(correction_tokens=tokens)
        identity = fingerprint(self.dense)
        key = digest(identity, self._calibration, GRADIENT_SAMPLES, recipe.seed)
        store = open_statistics(self.statistics, key)  # the one that compress shares
        train(
            model,
            parameters,
            *recorded_outputs(self.dense, self.ids, recipe, store),
            learning_rate=MATRICES_LEARNING_RATE,
            store=Store(work),
            on_gradients=on_gradients,
        )


def round_down(count: float) -> int:
    """Return the nearest whole number that is not above count, but for rounding errors."""
    return int(count + 1e-6)


def stored_parameters(model: nn.Module) -> int:
    """Count what a model stores; a pruned matrix only its kept rows."""
    total = sum(p.numel() for p in model.parameters())
    for module in model.modules():
        if hasattr(module, "stored"):
            total += module.stored - sum(p.numel() for p in module.parameters() if p.dim() == 2)
    return total
