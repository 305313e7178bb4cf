"""Recipes, and what follows from them by arithmetic."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from toy_training import RECIPE, ROOT, toy_pair

from psychocounsel.errors import UserError
from psychocounsel.recipes import PolicyRecipe, Recipe, accumulation, check_pairs, checkpoint_steps, optimizer_steps, training_order


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 8))
def test_accumulation_makes_the_global_batch_exact_or_refuses(batch_size, per_device, devices):
    recipe = Recipe(**RECIPE | {"batch_size": batch_size, "per_device_batch_size": per_device})
    if batch_size % (per_device * devices):
        with pytest.raises(UserError, match="no multiple"):
            accumulation(recipe, devices)
    else:
        assert accumulation(recipe, devices) * per_device * devices == batch_size


@given(st.integers(1, 40), st.integers(1, 10), st.integers(1, 12), st.integers(0, 99))
def test_training_order(pairs, batch_size, steps, seed):
    names, lengths = [f"{n:016x}" for n in range(pairs)], [(n * 7) % 13 for n in range(pairs)]
    order = training_order(names, lengths, steps, batch_size, seed)
    assert len(order) == steps * batch_size, "every step sees the whole batch"
    counts = [order.count(place) for place in range(pairs)]
    assert max(counts) - min(counts) <= 1, "no pair is seen a second time before each was seen once"
    for start in range(0, len(order), batch_size):
        batch = [lengths[place] for place in order[start : start + batch_size]]
        assert batch == sorted(batch, reverse=True), "pairs of like length stand together"
    backwards = training_order(names[::-1], lengths[::-1], steps, batch_size, seed)
    assert [names[::-1][place] for place in backwards] == [names[place] for place in order], "the file's order does not matter"


def test_training_order_follows_the_seed():
    names = [str(n) for n in range(30)]
    assert training_order(names, [1] * 30, 3, 10, seed=1) != training_order(names, [1] * 30, 3, 10, seed=2)


@given(st.integers(1, 50), st.integers(1, 50))
def test_checkpoints_are_evenly_spaced(steps, checkpoints):
    if checkpoints > steps:
        with pytest.raises(UserError, match="checkpoints"):
            checkpoint_steps(steps, checkpoints)
        return
    places = [0, *checkpoint_steps(steps, checkpoints)]
    gaps = [after - before for before, after in zip(places, places[1:], strict=False)]
    assert places[-1] == steps
    assert max(gaps) - min(gaps) <= 1
    assert min(gaps) >= 1


def test_steps_of_epochs_count_the_last_batch():
    assert optimizer_steps(Recipe(**RECIPE), 21) == 6  # 42 pairs in batches of 8
    assert optimizer_steps(Recipe(**RECIPE | {"epochs": None, "max_steps": 4}), 21) == 4


@pytest.mark.parametrize("change", [{"epochs": None}, {"max_steps": 3}, {"precision": "fp16"}, {"learning_rat": 1}])
def test_a_wrong_recipe_is_refused(change):
    with pytest.raises(ValueError, match=next(iter(change)) if "learning_rat" in change else "."):
        Recipe(**RECIPE | change)


def test_every_recipe_of_the_project_fits():
    for path in sorted((ROOT / "config/train").glob("*.yaml")):
        kind = Recipe if "reward" in path.stem else PolicyRecipe
        kind(**yaml.safe_load(path.read_text()))


def test_pairs_named_twice_and_no_pairs_are_refused():
    with pytest.raises(UserError, match="stands twice"):
        check_pairs([toy_pair(1), toy_pair(1)])
    with pytest.raises(UserError, match="no pairs"):
        check_pairs([])
