"""Which blocks train when: by name, by chance, in turns."""

import itertools
import math
from collections import Counter

import pytest
import torch
from torch import nn

from satchel.core.errors import UserError
from satchel.optim._sampler import Sampler, blocks_of
from tests.tolerances import DEVIATIONS


def named(*names):
    return [(name, nn.Parameter(torch.zeros(1))) for name in names]


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.layers.3.mlp.up_proj.weight", "model.layers.3"),
        ("transformer.h.11.attn.c_attn.bias", "transformer.h.11"),
        ("model.layers.3.mlp.experts.5.w1.weight", "model.layers.3"),
        ("layer1.0.conv1.weight", "layer1.0"),
        ("0.weight", "0"),
        ("model.layers.3.self_attn.q_proj.adapters.default.A_RI", "model.layers.3"),
        ("model.embed_tokens.weight", None),
        ("lm_head.weight", None),
        ("fc1.weight", None),
    ],
)
def test_a_block_is_what_stands_below_the_first_number_of_a_name(name, block):
    same, other = f"{block}.also.weight", "model.layers.99.weight"
    blocks = [[n for n, _ in found] for found in blocks_of(named(name, same, other))]
    assert blocks == ([[name, same], [other]] if block else [[other]])


def test_blocks_stand_in_the_models_order_and_hold_only_what_trains():
    pairs = named("layers.10.a", "layers.10.b", "layers.2.a")
    pairs[1][1].requires_grad_(False)
    assert [[n for n, _ in block] for block in blocks_of(pairs)] == [["layers.10.a"], ["layers.2.a"]]


def test_a_model_without_numbered_layers_is_refused():
    with pytest.raises(UserError, match=r"no name has a number, as in layers.3.weight; the first is fc1.weight"):
        blocks_of(named("fc1.weight", "fc2.weight"))


def draws(sampler, count, weights=(), number=20_000):
    return Counter(tuple(sorted(sampler.draw(count, n, 7, weights))) for n in range(number))


def chi_square(found, shares):
    total = sum(found.values())
    assert set(found) <= set(shares)
    return sum((found[key] - total * share) ** 2 / (total * share) for key, share in shares.items())


def bound(degrees):
    """Of a chi-square: its mean and some standard deviations."""
    return degrees + DEVIATIONS * (2 * degrees) ** 0.5


def test_without_weights_any_set_is_as_likely():
    pairs = list(itertools.combinations(range(6), 2))
    found = draws(Sampler(at_once=2, period=1), 6)
    assert chi_square(found, dict.fromkeys(pairs, 1 / 15)) < bound(14)


def test_weights_are_the_chances_of_drawing_one_after_the_other_without_replacement():
    weights = [0.5, 0.25, 0.15, 0.1]
    shares = {}
    for i, j in itertools.combinations(range(4), 2):
        shares[i, j] = weights[i] * weights[j] * (1 / (1 - weights[i]) + 1 / (1 - weights[j]))
    assert sum(shares.values()) == pytest.approx(1)
    found = draws(Sampler(at_once=2, period=1), 4, [10 * w for w in weights])
    assert chi_square(found, shares) < bound(5)


def test_what_has_no_weight_comes_last_and_then_by_chance():
    found = draws(Sampler(at_once=2, period=1), 5, [0.0, 3.0, 0.0, 0.0, 0.0], 4000)
    assert chi_square(found, {pair: 1 / 4 for pair in ((0, 1), (1, 2), (1, 3), (1, 4))}) < bound(3)
    assert len(draws(Sampler(at_once=2, period=1), 5, [0.0] * 5, 500)) == 10


def test_a_draw_is_a_function_of_the_seed_and_its_number():
    sampler = Sampler(at_once=3, period=1)
    first = [sampler.draw(30, n, 1) for n in range(40)]
    assert first == [sampler.draw(30, n, 1) for n in range(40)]
    assert len(set(first)) > 35
    assert sum(a == b for a, b in zip(first, (sampler.draw(30, n, 2) for n in range(40)), strict=True)) < 5


@pytest.mark.parametrize(("order", "first"), [("ascending", [0, 1, 2, 3]), ("descending", [3, 2, 1, 0])])
def test_turns_go_through_the_model_again_and_again(order, first):
    sampler = Sampler(at_once=1, period=1, order=order)
    assert [next(iter(sampler.draw(4, n, 0))) for n in range(8)] == first * 2


def test_random_turns_give_every_block_one_a_round_in_another_order():
    sampler = Sampler(at_once=1, period=1, order="random")
    rounds = [[next(iter(sampler.draw(8, 8 * r + n, 0))) for n in range(8)] for r in range(20)]
    assert all(sorted(turns) == list(range(8)) for turns in rounds)
    assert len({tuple(turns) for turns in rounds}) == 20


def test_several_at_once_take_their_turns_too():
    sampler = Sampler(at_once=3, period=1, order="ascending")
    assert [sorted(sampler.draw(8, n, 0)) for n in range(3)] == [[0, 1, 2], [3, 4, 5], [0, 6, 7]]


@pytest.mark.parametrize("order", ["", "ascending", "random"])
def test_at_most_all_blocks_train(order):
    sampler = Sampler(at_once=5, period=1, order=order)
    assert sampler.draw(5, 3, 0) == sampler.draw(4, 3, 0) | {4} == frozenset(range(5))


def test_the_heaviest_turn_is_that_of_the_largest_and_last_layers():
    sampler = Sampler(at_once=2, period=1)
    assert sampler.together([5] * 6, below=True) == [{4, 5}]
    assert sampler.together([5, 9, 5, 9, 5, 5], below=True) == [{1, 3}]
    assert Sampler(at_once=9, period=1).together([5] * 6, below=True) == [set(range(6))]


def test_where_nothing_below_trains_the_heaviest_turn_goes_down_to_the_first_layer():
    sampler = Sampler(at_once=2, period=1)
    assert sampler.together([5] * 6, below=False)[1:] == [{0, 5}]
    assert sampler.together([5, 9, 5, 9, 5, 5], below=False)[1:] == [{0, 3}, {1, 3}]
    assert Sampler(at_once=9, period=1).together([5] * 6, below=False) == [set(range(6))]


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_the_first_turns_backward_pass_is_as_long_as_on_average(at_once):
    sampler, lowest = Sampler(at_once=at_once, period=1), range(20 - at_once + 1)
    first = sampler.together([5] * 20, below=False)[0]
    chances = [math.comb(19 - block, at_once - 1) for block in lowest]
    average = sum(block * chance for block, chance in zip(lowest, chances, strict=True)) / sum(chances)
    assert len(first) == at_once and abs(min(first) - average) < 1
