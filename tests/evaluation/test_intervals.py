"""Losses are means over tokens, and their intervals come from resampled examples, the same ones for every model."""

import math

import torch

from lora_merge.evaluation.intervals import Interval, bootstrap

ONE, OTHER, DIFFERENCE = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]], dtype=torch.float64)


def test_the_loss_is_the_mean_over_tokens_not_over_examples() -> None:
    losses = bootstrap(torch.tensor([[2.0, 30.0]]).double(), torch.tensor([2, 10]), seed=0)
    assert losses.of(ONE[:1]).value == 32 / 12


def test_examples_that_are_all_alike_leave_no_doubt() -> None:
    estimate = bootstrap(torch.full((1, 9), 6.0).double(), torch.full((9,), 3), seed=0).of(ONE[:1])
    assert (estimate.value, estimate.interval) == (2.0, Interval(2.0, 2.0))


def test_the_interval_of_many_like_draws_is_that_of_the_normal_law() -> None:
    nll = torch.randn(1, 400, generator=torch.Generator().manual_seed(3)).double()
    interval = bootstrap(nll, torch.ones(400), seed=0).of(ONE[:1]).interval
    assert math.isclose(interval.high - interval.low, 2 * 1.96 * float(nll.std()) / 20, rel_tol=0.1)


def test_a_constant_difference_is_certain_however_much_the_losses_vary() -> None:
    first = torch.tensor([1.0, 5.0, 20.0, 2.0]).double()
    losses = bootstrap(torch.stack([first, first - 1]), torch.ones(4), seed=0)
    assert losses.of(ONE).interval.high - losses.of(ONE).interval.low > 5
    gain = losses.of(DIFFERENCE)
    assert max(abs(number - 1) for number in (gain.value, gain.interval.low, gain.interval.high)) < 1e-9


def test_a_seed_decides_the_interval() -> None:
    nll, tokens = torch.tensor([[1.0, 5.0, 20.0, 2.0]]).double(), torch.ones(4)
    same = [bootstrap(nll, tokens, seed=seed, resamples=50).of(ONE[:1]).interval for seed in (1, 1, 2)]
    assert same[0] == same[1] != same[2]


def test_perplexity_is_e_to_the_loss_and_so_is_its_interval() -> None:
    estimate = bootstrap(torch.tensor([[1.0, 3.0]]).double(), torch.ones(2), seed=0).of(ONE[:1])
    assert estimate.exp().value == math.exp(2)
    assert estimate.exp().interval == Interval(math.exp(1), math.exp(3))
