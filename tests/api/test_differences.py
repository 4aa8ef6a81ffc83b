"""How a difference passes pooling, dropout and flattening, against plain subtraction."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from bpfree import differences


def maps(scale: float = 1.0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Maps [3, 2, 7, 8] and a change of them that moves the maximum of some windows."""
    generator = torch.Generator().manual_seed(3)
    y = torch.randn(3, 2, 7, 8, generator=generator, dtype=torch.float64)
    change = scale * torch.randn(3, 2, 7, 8, generator=generator, dtype=torch.float64)
    return y.to(dtype), change.to(dtype)


def literal(modules: Sequence[nn.Module], y: Tensor, change: Tensor) -> Tensor:
    run = nn.Sequential(*modules)
    return run(y + change) - run(y)


@pytest.mark.parametrize(
    "modules",
    [
        [nn.MaxPool2d(2)],
        [nn.MaxPool2d(3, stride=2, padding=1)],
        [nn.MaxPool2d((2, 3), stride=(1, 2), dilation=(2, 1))],
        [nn.MaxPool2d(3, ceil_mode=True)],
        [nn.AvgPool2d(3, stride=2, padding=1)],
        [nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False)],
        [nn.Flatten()],
        [nn.Flatten(2), nn.Flatten(1)],
        [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Flatten()],
        [],
    ],
    ids=str,
)
def test_it_is_the_difference_of_the_outputs(modules: list[nn.Module]) -> None:
    y, change = maps()
    output, ways = differences.run(modules, y)
    assert torch.equal(output, nn.Sequential(*modules)(y))
    got = differences.pass_on(ways, change)
    torch.testing.assert_close(got, literal(modules, y, change), rtol=1e-13, atol=1e-13)


def test_the_maximum_moves_in_some_windows_and_stays_in_others() -> None:
    """The test above says something about both."""
    y, change = maps()
    pool = nn.MaxPool2d(2, return_indices=True)
    moved = pool(y)[1] != pool(y + change)[1]
    assert 0.1 < moved.double().mean() < 0.9


def test_max_pooling_loses_no_digits() -> None:
    """A change far below the values' own rounding comes through bit for bit."""
    y, change = maps(scale=1e-12, dtype=torch.float32)
    assert literal([nn.MaxPool2d(2)], y, change).abs().max() == 0
    _, ways = differences.run([nn.MaxPool2d(2)], y)
    got = differences.pass_on(ways, change)
    exact, _ = differences.run([nn.MaxPool2d(2)], y.double())
    exact_ways = differences.run([nn.MaxPool2d(2)], y.double())[1]
    assert torch.equal(got.double(), differences.pass_on(exact_ways, change.double()))
    assert exact.shape == got.shape
    assert got.abs().min() > 0


def test_tied_maxima() -> None:
    """Flat windows, as a ReLU leaves them: the new maximum is the largest change."""
    y, change = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4)
    change[0, 0, 1, 1] = 0.25
    change[0, 0, :, 2:] = -0.5
    _, ways = differences.run([nn.MaxPool2d(2)], y)
    assert differences.pass_on(ways, change).tolist() == [[[[0.25, -0.5]]]]


@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout2d])
def test_dropout_keeps_the_mask_of_the_first_pass(kind: type[nn.Dropout]) -> None:
    y, change = maps()
    y = y.relu()  # an output of 0 says nothing about the mask
    torch.manual_seed(0)
    output, ways = differences.run([kind(0.25), nn.Flatten()], y)
    torch.manual_seed(0)
    mask = kind(0.25)(torch.ones_like(y))
    assert set(mask.unique().tolist()) == {0.0, 1 / 0.75}
    assert torch.equal(output, (y * mask).flatten(1))
    first, second = (differences.pass_on(ways, change) for _ in range(2))
    assert torch.equal(first, (change * mask).flatten(1))
    assert torch.equal(first, second)
    if kind is nn.Dropout2d:
        assert (mask == mask[..., :1, :1]).all()


@pytest.mark.parametrize("dropout", [nn.Dropout(0.5).eval(), nn.Dropout(0.0), nn.Dropout2d(0.0)])
def test_dropout_that_drops_nothing(dropout: nn.Module) -> None:
    y, change = maps()
    before = torch.get_rng_state()
    output, ways = differences.run([dropout], y)
    assert output is y
    assert differences.pass_on(ways, change) is change
    assert torch.equal(torch.get_rng_state(), before)


def test_in_place_dropout_changes_nothing_of_the_callers() -> None:
    y, change = maps()
    kept = y.clone(), change.clone()
    _, ways = differences.run([nn.Dropout(0.5, inplace=True)], y)
    differences.pass_on(ways, change)
    assert torch.equal(y, kept[0])
    assert torch.equal(change, kept[1])


def test_a_dropout_at_the_front_is_split_off() -> None:
    y, _ = maps()
    pool, drop = nn.MaxPool2d(2), nn.Dropout(0.5)
    mask, rest = differences.leading_dropout((drop, pool, drop), y)
    assert mask is not None
    assert mask.shape == y.shape
    assert rest == (pool, drop)
    assert differences.leading_dropout((pool, drop), y) == (None, (pool, drop))
    assert differences.leading_dropout((), y) == (None, ())
    assert differences.leading_dropout((nn.Dropout(0.5).eval(),), y) == (None, ())


def test_extreme_values() -> None:
    y = torch.tensor([[[[1e38, 3e38], [-3e38, -torch.inf]]]])
    change = torch.tensor([[[[0.5, 0.25], [1.0, 2.0]]]])
    _, ways = differences.run([nn.MaxPool2d(2)], y)
    assert differences.pass_on(ways, change).item() == 0.25
