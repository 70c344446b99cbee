import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import polygrad_fast as pg
from polygrad_fast.diffusion.ddpm import TABLES

examples = settings(max_examples=60, deadline=None)
EPS = 2.0**-24  # half a unit in the last place of float32
NAMES = TABLES
num_steps = st.integers(1, 300)
taus = st.floats(0.05, 3.0)


def chen_gamma(s: float, tau: float) -> float:
    """Chen 2023, Algorithm 1, start 0, end 1, without its lower clip."""
    start, end = math.cos(0.0) ** (2 * tau), math.cos(math.pi / 2) ** (2 * tau)
    return (end - math.cos(s * math.pi / 2) ** (2 * tau)) / (end - start)


def chen_betas(steps: int, tau: float) -> list[float]:
    gamma = [chen_gamma(i / steps, tau) for i in range(steps + 1)]
    ratios = (b / a for a, b in zip(gamma[:-1], gamma[1:], strict=True))
    return [min(max(1.0 - ratio, 0.0), 0.999) for ratio in ratios]


def float64_schedule(steps: int, tau: float) -> pg.NoiseSchedule:
    return pg.NoiseSchedule.from_betas(torch.tensor(chen_betas(steps, tau), dtype=torch.float64))


@examples
@given(num_steps, taus)
def test_betas_are_chens_formula_rounded_once(steps, tau):
    betas = pg.NoiseSchedule.cosine(steps, tau).betas
    wanted = torch.tensor(chen_betas(steps, tau), dtype=torch.float64)
    assert (betas.double() - wanted).abs().div(wanted).max() < 1.01 * EPS + 1e-9


@examples
@given(num_steps, taus)
def test_alphas_cumprod_are_chens_gamma_and_fall(steps, tau):
    schedule = pg.NoiseSchedule.cosine(steps, tau)
    got = schedule.alphas_cumprod
    assert (got[1:] < got[:-1]).all()
    assert got[0] < 1 and got[-1] > 0
    for k in range(steps):
        if schedule.betas[k] >= 0.998:
            break
        wanted = chen_gamma((k + 1) / steps, tau)
        # every factor 1 - beta is rounded once, relative to 1, and so is every product
        rounding = sum(EPS / (1 - beta) + EPS for beta in schedule.betas[: k + 1].tolist())
        assert abs(got[k].item() - wanted) <= 1.1 * rounding * wanted


@examples
@given(num_steps, taus)
def test_tables_are_float32_of_length_k(steps, tau):
    schedule = pg.NoiseSchedule.cosine(steps, tau)
    assert schedule.num_train_timesteps == steps
    for name in NAMES:
        table = getattr(schedule, name)
        assert table.dtype == torch.float32 and table.shape == (steps,), name
        assert torch.isfinite(table).all(), name


@examples
@given(num_steps, taus)
def test_posterior_identities(steps, tau):
    s = float64_schedule(steps, tau)
    previous, current = s.alphas_cumprod_prev, s.alphas_cumprod
    close = {"rtol": 1e-7, "atol": 1e-12}  # 1 - alphabar of the first step costs half the digits
    assert previous[0] == 1 and torch.equal(previous[1:], current[:-1])
    assert s.posterior_variance[0] == 0
    # Bayes: precisions of q(x_{i-1} | x_0) and q(x_i | x_{i-1}) add up
    precision = (1 - s.betas[1:]) / s.betas[1:] + 1 / (1 - previous[1:])
    torch.testing.assert_close(1 / s.posterior_variance[1:], precision, **close)
    # averaging the posterior over x_i given x_0 gives q(x_{i-1} | x_0) back: mean and variance
    mean = s.posterior_mean_coef1 + s.posterior_mean_coef2 * current.sqrt()
    torch.testing.assert_close(mean, previous.sqrt(), **close)
    variance = s.posterior_mean_coef2.square() * (1 - current) + s.posterior_variance
    torch.testing.assert_close(variance, 1 - previous, **close)
    torch.testing.assert_close(
        s.posterior_log_variance_clipped.exp()[1:], s.posterior_variance[1:], **close
    )
    assert s.posterior_log_variance_clipped[0].item() == pytest.approx(math.log(1e-20))


@examples
@given(num_steps, taus, st.integers(0, 2**31))
def test_posterior_mean_is_equation_1(steps, tau, seed):
    s = float64_schedule(steps, tau)
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, steps, 5, generator=generator, dtype=torch.float64)
    beta, alphabar = s.betas[:, None], s.alphas_cumprod[:, None]
    equation_1 = (x - beta / (1 - alphabar).sqrt() * noise) / (1 - beta).sqrt()
    x0 = s.sqrt_recip_alphas_cumprod[:, None] * x - s.sqrt_recipm1_alphas_cumprod[:, None] * noise
    mean = s.posterior_mean_coef1[:, None] * x0 + s.posterior_mean_coef2[:, None] * x
    torch.testing.assert_close(mean, equation_1, rtol=1e-7, atol=1e-7)


@examples
@given(num_steps, taus, st.integers(0, 2**31))
def test_error_gain_is_what_equation_1_makes_of_an_error(steps, tau, seed):
    s = float64_schedule(steps, tau)
    x, noise, error = torch.randn(
        3, steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )

    def equation_1(predicted_noise):
        correction = s.betas / (1 - s.alphas_cumprod).sqrt() * predicted_noise
        return (x - correction) / (1 - s.betas).sqrt()

    moved = (equation_1(noise + error) - equation_1(noise)) / -error
    torch.testing.assert_close(s.epsilon_error_gain, moved, rtol=1e-6, atol=1e-6)
    rounded = pg.NoiseSchedule.cosine(steps, tau).epsilon_error_gain
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded.double(), moved, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("steps, tau", [(1, 1.0), (12, 1.0), (128, 1.0), (128, 0.1)])
def test_first_reverse_step_of_every_cosine_schedule_multiplies_errors_by_32(steps, tau):
    gain = pg.NoiseSchedule.cosine(steps, tau).epsilon_error_gain
    assert gain.argmax() == steps - 1
    assert gain[-1].item() == pytest.approx(math.sqrt(1000), rel=2e-3)
    assert (gain[:-1] < 2).all()


@pytest.mark.parametrize("steps, tau", [(12, 1.0), (128, 1.0), (128, 0.1)])
def test_float32_tables_lose_no_more_than_their_conditioning(steps, tau):
    got = pg.NoiseSchedule.cosine(steps, tau)
    wanted = float64_schedule(steps, tau)
    count = torch.arange(1, steps + 1)
    rounding = EPS * count * (1 / wanted.alphas_cumprod + 1 / (1 - wanted.alphas_cumprod)) * 4
    for name in set(NAMES) - {"posterior_log_variance_clipped"}:
        error = (getattr(got, name).double() - getattr(wanted, name)).abs()
        assert (error <= rounding * getattr(wanted, name).abs()).all(), name


def test_one_step_is_valid():
    schedule = pg.NoiseSchedule.cosine(1)
    assert schedule.betas.item() == pytest.approx(0.999)
    assert schedule.posterior_mean_coef1.item() == pytest.approx(1.0)
    assert schedule.posterior_mean_coef2.item() == 0


@pytest.mark.parametrize("steps", [0, -1, 2.5, "8", None, float("nan")])
def test_number_of_steps_must_be_a_positive_integer(steps):
    with pytest.raises(pg.InputError, match=r"num_train_timesteps must be .* at least 1, got"):
        pg.NoiseSchedule.cosine(steps)


@pytest.mark.parametrize("tau", [0, 0.0, -1.0, math.nan, math.inf, -math.inf, None, "1"])
def test_tau_must_be_a_positive_finite_number(tau):
    with pytest.raises(pg.InputError, match="tau must be a positive finite number, got"):
        pg.NoiseSchedule.cosine(128, tau)


@pytest.mark.parametrize("steps, tau", [(10_000, 1.0), (128, 200.0), (128, 1e-17)])
@pytest.mark.filterwarnings("error")
def test_a_schedule_that_float32_cannot_hold_is_refused(steps, tau):
    with pytest.raises(pg.InputError, match=f"num_train_timesteps {steps} with tau {tau}"):
        pg.NoiseSchedule.cosine(steps, tau)


@pytest.mark.parametrize(
    "betas", [[0.1, 0.2], (0.1, 0.2), np.array([0.1, 0.2]), torch.tensor([0.1, 0.2])]
)
def test_betas_of_any_kind_of_list(betas):
    schedule = pg.NoiseSchedule.from_betas(betas)
    for name in NAMES:
        assert getattr(schedule, name).dtype == torch.float32
    torch.testing.assert_close(schedule.alphas_cumprod, torch.tensor([0.9, 0.72]))
    double = pg.NoiseSchedule.from_betas(torch.tensor([0.1, 0.2], dtype=torch.float64))
    assert double.posterior_mean_coef1.dtype == torch.float64


@pytest.mark.parametrize(
    "betas, message",
    [
        ([[0.1, 0.2]], r"must be of shape \[K\] .* got shape \(1, 2\)"),
        (0.1, r"got shape \(\)"),
        ([], r"got shape \(0,\)"),
        ([0.1, 1.5], r"betas\[1\] must be in \(0, 1\), got 1.5"),
        ([0.1, 1.0], r"betas\[1\] must be .* got 1.0"),
        ([0.0], r"betas\[0\] must be .* got 0.0"),
        ([-0.1, 0.5], r"betas\[0\] must be .* got -0.1"),
        ([0.5, math.nan], r"betas\[1\] must be .* got nan"),
        (torch.tensor([1, 2]), "float32 or float64, got torch.int64"),
        (torch.tensor([0.5]).half(), "float32 or float64, got torch.float16"),
        ("abc", "must be numbers.*'abc'"),
        (None, "betas"),
        ([0.1, [0.2]], "must be numbers"),
        ([1e-9, 0.1], "must be larger or of float64 .* got 2 of torch.float32 from"),
        (
            [0.999] * 20,
            "must be smaller or fewer or of float64 .* got 20 of torch.float32 from 0.999",
        ),
    ],
)
def test_unusable_betas_are_refused(betas, message):
    with pytest.raises(pg.InputError, match=message):
        pg.NoiseSchedule.from_betas(betas)


def test_unknown_variance_type():
    with pytest.raises(pg.InputError, match="variance_type must be .* got 'typo'"):
        pg.NoiseSchedule.cosine(3).step_coefficients("typo")


def test_to_converts_every_table():
    schedule = pg.NoiseSchedule.cosine(5)
    for name in NAMES:
        converted = getattr(schedule.to(torch.float64), name)
        assert converted.dtype == torch.float64
        assert torch.equal(converted.float(), getattr(schedule, name))


def definition(schedule: pg.NoiseSchedule, kept: list[int]) -> dict[str, torch.Tensor]:
    """Every table of the kept steps, from the kept alphabar, in float64."""
    alphabar = (1 - schedule.betas.double()).cumprod(0)
    now = torch.stack([alphabar[k] for k in kept])
    previous = torch.tensor([1.0, *now[:-1].tolist()], dtype=torch.float64)
    beta = 1 - now / previous
    variance = (1 - previous) / (1 - now) * beta
    return {
        "betas": beta,
        "alphas_cumprod": now,
        "alphas_cumprod_prev": previous,
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": previous.sqrt() * beta / (1 - now),
        "posterior_mean_coef2": (now / previous).sqrt() * (1 - previous) / (1 - now),
        "sqrt_recip_alphas_cumprod": now**-0.5,
        "sqrt_recipm1_alphas_cumprod": ((1 - now) / now).sqrt(),
    }


@examples
@given(st.integers(1, 130), taus, st.integers(1, 130), st.sampled_from([torch.float32, None]))
def test_respaced_tables_are_those_of_the_definition(steps, tau, num_inference_steps, dtype):
    n = min(num_inference_steps, steps)
    schedule = pg.NoiseSchedule.cosine(steps, tau) if dtype else float64_schedule(steps, tau)
    short = schedule.respaced(n)
    kept = np.linspace(0, steps - 1, n).round().astype(int).tolist() if n > 1 else [steps - 1]
    assert short.timesteps == tuple(kept) and all(type(k) is int for k in short.timesteps)
    assert short.num_train_timesteps == n and schedule.timesteps == tuple(range(steps))
    if n == steps:
        assert short is schedule
        return
    tolerance = 1e-6 if dtype else 1e-9
    for name, wanted in definition(schedule, kept).items():
        got = getattr(short, name)
        assert got.dtype == schedule.betas.dtype, name
        torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=1e-12, msg=name)
    assert NAMES == tuple(definition(schedule, kept))


@pytest.mark.parametrize(
    "num_steps, n, kept",
    [
        (128, 2, [0, 127]),
        (128, 5, [0, 32, 64, 95, 127]),
        (6, 4, [0, 2, 3, 5]),
        (12, 8, [0, 2, 3, 5, 6, 8, 9, 11]),
        (10, 1, [9]),
    ],
)
def test_kept_steps(num_steps, n, kept):
    schedule = pg.NoiseSchedule.cosine(num_steps)
    short = schedule.respaced(n)
    assert list(short.timesteps) == kept
    assert short.respaced(n) is short and schedule.respaced(None) is schedule
    assert short.to(torch.float64).timesteps == short.timesteps
    torch.testing.assert_close(
        short.alphas_cumprod, schedule.alphas_cumprod[kept], rtol=1e-5, atol=0
    )


def test_respacing_twice_keeps_original_steps():
    schedule = float64_schedule(9, 1.0)
    twice, once = schedule.respaced(5).respaced(3), schedule.respaced(3)
    assert twice.timesteps == once.timesteps == (0, 4, 8)
    for name in NAMES:
        torch.testing.assert_close(getattr(twice, name), getattr(once, name), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("n", [0, -1, 9, 2.5, "3", True])
def test_numbers_of_inference_steps_that_cannot_be(n):
    match = f"num_inference_steps must be from 1 to num_train_timesteps 8, got {n!r}"
    with pytest.raises(pg.InputError, match=match):
        pg.NoiseSchedule.cosine(8).respaced(n)
