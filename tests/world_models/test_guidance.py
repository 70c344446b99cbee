import math

import fake_cuda
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polygrad_fast.config import GuidanceConfig
from polygrad_fast.errors import InputError
from polygrad_fast.learners.advantages import spread
from polygrad_fast.world_models.guidance import GuidanceTuner

examples = settings(max_examples=40, deadline=None)
values = st.floats(1e-4, 5.0)
rates = st.floats(1e-4, 0.5)
spreads = st.floats(0.0, 3.0)
unbounded = {"minimum": 1e-30, "maximum": 1e30}


@examples
@given(values, rates, st.lists(spreads, min_size=1, max_size=5))
def test_log_rule_is_gradient_descent_on_log_delta(initial, rate, measured):
    tuner = GuidanceTuner(GuidanceConfig(initial, "log", rate, **unbounded))
    log_delta = torch.tensor(math.log(initial), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([log_delta], lr=rate)
    for value in measured:  # the released code's loss
        optimizer.zero_grad()
        (-log_delta * (value - 1.0)).backward()
        optimizer.step()
        assert tuner.update(value).item() == pytest.approx(log_delta.exp().item(), rel=1e-9)
        assert tuner.value > 0


@examples
@given(st.floats(5.0, 9.0), rates, st.lists(spreads, min_size=1, max_size=5))
def test_linear_rule_is_equation_10(initial, rate, measured):
    tuner = GuidanceTuner(GuidanceConfig(initial, "linear", rate, **unbounded))
    delta = initial
    for value in measured:
        delta += rate * (value - 1)
        assert tuner.update(value) is tuner.value
        assert tuner.value.item() == pytest.approx(delta, rel=1e-12)


@examples
@given(spreads)
def test_rule_none_keeps_delta(value):
    assert GuidanceTuner(GuidanceConfig(0.25, "none")).update(value) == 0.25


@pytest.mark.parametrize("rule, rate", [("log", 0.05), ("linear", 0.01)])
@pytest.mark.parametrize("initial", [1e-3, 0.2, 5.0])
def test_both_rules_settle_where_the_spread_is_one(rule, rate, initial):
    def response(delta):  # of a scalar; stronger guidance, narrower actions; 1 at delta = 0.2
        return 2.0 / (1.0 + delta / 0.2)

    tuner = GuidanceTuner(GuidanceConfig(initial, rule, rate))
    start = abs(response(initial) - 1)
    for _ in range(3000):
        tuner.update(response(tuner.value))
    assert response(tuner.value.item()) == pytest.approx(1.0, abs=1e-3)
    assert abs(response(tuner.value.item()) - 1) <= start
    assert tuner.value.item() == pytest.approx(0.2, rel=1e-2)


@pytest.mark.parametrize("rule", ["log", "linear"])
@pytest.mark.parametrize("extreme", [1e3, 1e300])
def test_delta_stays_within_its_bounds(rule, extreme):
    tuner = GuidanceTuner(GuidanceConfig(0.5, rule, 0.5, minimum=0.1, maximum=2.0))
    for _ in range(10):
        assert 0.1 <= tuner.update(extreme) <= 2.0
    assert tuner.value == 2.0
    for _ in range(20):
        assert 0.1 <= tuner.update(0.0) <= 2.0
    assert tuner.value == 0.1


@pytest.mark.parametrize("rule", ["log", "linear"])
@pytest.mark.parametrize("spread", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_leaves_delta_as_it_is(rule, spread):
    tuner = GuidanceTuner(GuidanceConfig(0.5, rule))
    assert tuner.update(torch.tensor(spread)) == 0.5
    assert tuner.update(2.0) > 0.5


@pytest.mark.parametrize("rule", ["log", "linear", "none"])
def test_delta_is_tuned_without_reading_it(rule):
    with fake_cuda.installed() as gpu:
        tuner = GuidanceTuner(GuidanceConfig(0.5, rule), "cuda")
        spread = torch.full((), 1.5, device="cuda")
        with gpu.without_syncs():
            for _ in range(2):
                delta = tuner.update(spread)
        assert delta.is_cuda and delta.dtype == torch.float64 and delta.ndim == 0


@pytest.mark.parametrize("statistic", ["std", "mean_abs"])
def test_spread_of_standard_normals_is_one(statistic):
    z = torch.randn(2000, 100, 5, generator=torch.Generator().manual_seed(0))
    assert spread(z, statistic).item() == pytest.approx(1.0, abs=4 / math.sqrt(2e6))


@examples
@given(st.floats(0.01, 100), st.sampled_from(["std", "mean_abs"]), st.integers(0, 2**31))
def test_spread_scales_with_the_actions(factor, statistic, seed):
    z = torch.randn(7, 3, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert spread(factor * z, statistic).item() == pytest.approx(
        factor * spread(z, statistic).item(), rel=1e-9
    )


def test_spread_by_hand():
    z = torch.tensor([[[1.0, -2.0], [3.0, 2.0]]])
    deviations = [math.sqrt(2.0), math.sqrt(8.0)]
    assert spread(z, "std").item() == pytest.approx(sum(deviations) / 2)
    assert spread(z, "mean_abs").item() == pytest.approx(2.0 / math.sqrt(2 / math.pi))


def test_heavy_tails_move_mean_abs_less():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(20_000, 1, generator=g)
    z[:20] = 100.0
    assert spread(z, "std") > 3
    assert spread(z, "mean_abs") < 1.15


@pytest.mark.parametrize(
    "options",
    [
        {"rule": "cosine"},
        {"statistic": "median"},
        {"initial": 0.0},
        {"initial": math.nan},
        {"learning_rate": -1.0},
        {"minimum": 0.0},
        {"minimum": 2.0, "maximum": 1.0},
    ],
)
def test_invalid_options_are_named(options):
    name, value = next(iter(options.items()))
    with pytest.raises(InputError, match=f"GuidanceConfig.{name} must be .* got {value!r}"):
        GuidanceConfig(**options)


def test_unknown_names_do_not_fall_through():
    """However they got past the configuration's own check."""
    tuner = GuidanceTuner(GuidanceConfig())
    object.__setattr__(tuner.config, "rule", "typo")
    with pytest.raises(InputError, match="rule must be .* got 'typo'"):
        tuner.update(1.5)
    assert tuner.value == tuner.config.initial
    with pytest.raises(InputError, match="statistic must be .* got 'typo'"):
        spread(torch.randn(4, 1), "typo")
