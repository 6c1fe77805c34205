"""Budgets of bytes: exact, never exceeded, spent where it is worth most."""

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calr.errors import CalrError
from calr.model import Matrix, analyse, matrices, tensor_bytes
from calr.ranks import (
    ByteBudget,
    Price,
    byte_budget,
    even,
    fitting_group,
    least_loss,
    parse_size,
)
from calr.ranks.bits import CORRECTIVE_RANKS, RATIOS
from calr.recipe import Recipe
from calr.testing import tiny_llama

SIZES = [(40, 64), (24, 64), (64, 160), (300, 24)]  # corrective paths in the first and the third


def budget_of(total, fixed=100):
    found = tuple(Matrix("linear", (f"m{i}",), n, k) for i, (n, k) in enumerate(SIZES))
    return ByteBudget(found, fixed, total, 2, sum(m.parameters for m in found))


def stored(budget, forms):
    return budget.fixed + sum(
        2 * m.parameters if forms[m.name] is None else forms[m.name].bytes(*sizes, 2)
        for m, sizes in zip(budget.matrices, SIZES, strict=True)
    )


@settings(max_examples=40, deadline=None)
@given(
    st.integers(14_000, 45_000),
    st.lists(st.floats(1e-6, 1), min_size=4, max_size=4),
    st.floats(0.01, 1),
)
def test_the_budget_is_kept_and_used_and_no_choice_of_that_size_loses_less(total, prices, left):
    budget = budget_of(total)
    named = {
        f"m{i}": Price([price * left**j for j in range(3)], [1.0]) for i, price in enumerate(prices)
    }
    exact, fast = least_loss(budget, named, exact=True), least_loss(budget, named)

    def loss(forms):
        return sum(
            named[n].losses[(0, 8, 16).index(f.corrective_rank)] * RATIOS[f.bits, f.levels]
            for n, f in forms.items()
            if f is not None
        )

    everything = itertools.product(*budget.choices())
    best = min(
        loss(forms)
        for at in everything
        if stored(budget, forms := {f"m{i}": f for i, (f,) in enumerate(at)}) <= total
    )
    assert stored(budget, fast) <= total
    assert stored(budget, exact) <= total
    assert (
        best * (1 - 1e-9) <= loss(exact) <= best + 1e-5 * max(prices) * RATIOS[3, "table"]
    )  # HiGHS' gap
    assert best * (1 - 1e-9) <= loss(fast)
    left = total - stored(budget, fast)
    for name, options, costs in zip(named, budget.choices(), budget.costs(), strict=True):
        at = options.index((fast[name],))
        for (form,), cost in zip(options, costs, strict=True):
            assert cost - costs[at] > left or loss(fast | {name: form}) >= loss(fast)


def test_a_corrective_path_is_bought_where_it_is_cheap():
    """8 more ranks cost 0.03 bits a weight of the large matrix, 1.1 of the small one."""
    sizes = {"large": 4096, "small": 128}
    found = tuple(Matrix("linear", (name,), n, n) for name, n in sizes.items())
    parameters = sum(m.parameters for m in found)
    budget = ByteBudget(found, 0, int(4.5 * parameters / 8), 2, parameters)
    falls = [1.0, 0.8, 0.7, 0.6, 0.5]
    prices = {name: Price([n * f for f in falls], [1.0]) for name, n in sizes.items()}
    forms = least_loss(budget, prices)
    assert forms["large"].corrective_rank > 0
    assert forms["small"] is None or forms["small"].corrective_rank == 0


def test_only_the_widths_that_are_named_are_chosen():
    budget = dataclasses.replace(budget_of(10**6), widths=(4, 6))
    forms = {form for options in budget.choices() for (form,) in options if form is not None}
    assert {form.bits for form in forms} == {4, 6}
    with pytest.raises(CalrError, match="widths=7: must be of 3, 4, 5, 6, 8 bits"):
        dataclasses.replace(budget, widths=(4, 7))
    with pytest.raises(CalrError, match="are of quantised matrices"):
        Recipe(keep=0.5, widths=(4,))


def test_scale_groups_are_as_long_as_the_matrix_bears():
    """128 weights a scale instead of 64 save 0.125 bits, worth a factor of 1.2 at 3 and 4 bits."""
    even, uneven = (Matrix("linear", (name,), 4096, 4096) for name in ("even", "uneven"))
    losses = [1.0] * len(CORRECTIVE_RANKS)
    prices = {"even": Price(losses, [1.0, 1.1]), "uneven": Price(losses, [1.0, 1.3])}

    def chosen(bits, groups=(64, 128)):
        parameters = even.parameters + uneven.parameters
        total = int(bits * parameters / 8)
        budget = ByteBudget((even, uneven), 0, total, 2, parameters, scale_groups=groups)
        forms = least_loss(budget, prices)
        return [(forms[name].bits, forms[name].scale_group) for name in ("even", "uneven")]

    assert chosen(3.19) == [(3, 128), (3, 64)]
    assert chosen(4.19) == [(4, 128), (4, 64)]
    with pytest.raises(CalrError, match="below"):
        chosen(3.19, (64,))


def test_scale_groups_are_the_budgets_own_the_targets_or_named():
    assert Recipe(bits=4).scale_groups == (64, 32, 128, 256)
    assert Recipe(bits=4, scale_group=32).scale_groups == (32,)
    assert Recipe(bits=4, target="gguf").scale_groups == (32,)
    assert Recipe(bits=4, target="compressed-tensors").scale_groups == (64,)


def test_the_layers_of_one_input_have_one_width_where_they_must():
    model = tiny_llama(hidden_size=128, intermediate_size=192)
    recipe = Recipe(bits=9.0, target="compressed-tensors")
    budget = byte_budget(model, analyse(model), recipe)
    names = [[m.name.rpartition(".")[2] for m in members] for members in budget.bundles]
    block = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert names == [*block, *block, ["embed_tokens"]]
    for members, options, costs in zip(
        budget.bundles, budget.choices(), budget.costs(), strict=True
    ):
        for forms, cost in zip(options, costs, strict=True):
            assert len({form and form.bits for form in forms}) == 1
            assert cost == sum(map(budget.cost, members, forms))
            assert all(f is None or f.corrective_rank in (0, 16) for f in forms)
    assert budget.choices()[-1] == [(None,)]  # embeddings stay as they are


def test_costs_are_the_bytes_that_are_stored():
    budget = budget_of(10**6)
    for options, costs, (rows, columns) in zip(
        budget.choices(), budget.costs(), SIZES, strict=True
    ):
        for (form,), cost in zip(options, costs, strict=True):
            groups = 0 if form is None else -(-columns // form.scale_group)
            wanted = 2 * rows * columns
            if form is not None:
                wanted = rows * groups * (2 + form.scale_group * form.bits // 8)
                wanted += form.corrective_rank * 34 * (-(-rows // 32) + -(-columns // 32))
            assert cost == wanted


@pytest.mark.parametrize(
    ("columns", "wanted"), [(64, 64), (96, 32), (160, 32), (576, 64), (100, 32), (31, 32)]
)
def test_a_scale_group_that_does_not_divide_becomes_the_next_that_does(columns, wanted):
    assert fitting_group(64, columns) == wanted
    assert fitting_group(128, 192) == 96


def test_below_the_smallest_is_refused_with_the_smallest():
    with pytest.raises(CalrError, match=r"below the 0.0\d+ MB .* bits\) that"):
        budget_of(10_000)


@pytest.mark.parametrize("tied", [True, False])
def test_everything_stored_is_counted(tied):
    model = tiny_llama(tie_word_embeddings=tied)
    structure = analyse(model)
    found = matrices(model, structure)
    assert [m.kind for m in found if m.kind != "linear"] == (
        ["tied"] if tied else ["embedding", "head"]
    )
    budget = byte_budget(model, structure, Recipe(bits=9.0))
    assert budget.total == int(9 * structure.model_parameters / 8)
    assert budget.fixed + 4 * sum(m.parameters for m in found) == tensor_bytes(model)
    assert tensor_bytes(model) == 4 * structure.model_parameters
    assert set(even(budget)) == {m.name for m in found}


def test_sizes_as_people_write_them():
    assert parse_size("90MB") == parse_size(" 90 mb") == parse_size("90000000") == 90_000_000
    for wrong in ("", "MB", "-1MB", "nanMB", "90 MiB", "infGB"):
        with pytest.raises(CalrError, match="must be like 90MB"):
            parse_size(wrong)
