"""Cosine and ceiling of vectors whose answers are known."""

import pytest
import torch

from polygrad_fast.diagnostics.agreement import agreement

P = 40_000


def halves(truth, noise: float, seed: int):
    """Two estimates with noise of total variance `noise`, in units of the truth's square."""
    g = torch.Generator().manual_seed(seed)
    scale = truth.norm() * (noise / P) ** 0.5
    return tuple(truth + scale * torch.randn(P, generator=g) for _ in range(2))


@pytest.mark.parametrize("noise", [0.0, 0.5, 2.0])
def test_estimates_of_the_same_reach_the_ceiling(noise):
    truth = torch.randn(P, generator=torch.Generator().manual_seed(0))
    found = agreement(halves(truth, noise, 1), halves(truth, noise, 2))
    # E[a . b] = |g|^2, E|a|^2 = |g|^2 (1 + noise / 2) for means of two halves
    assert found.ceiling == pytest.approx(1 / (1 + noise / 2), abs=0.02)
    assert found.cosine == pytest.approx(found.ceiling, abs=0.02)
    assert found.length_ratio == pytest.approx(1.0, abs=0.02)


def test_ceilings_of_both_multiply_and_the_cosine_is_that_share_of_the_true_one():
    g = torch.Generator().manual_seed(3)
    truth, other = torch.randn(P, generator=g), torch.randn(P, generator=g)
    turned = 3 * (0.6 * truth + 0.8 * other * truth.norm() / other.norm())
    found = agreement(halves(turned, 1.0, 4), halves(truth, 4.0, 5))
    assert found.ceiling == pytest.approx((1 / 1.5 / 3) ** 0.5, abs=0.02)
    assert found.cosine / found.ceiling == pytest.approx(0.6, abs=0.03)
    assert found.length_ratio == pytest.approx(3 * (1.5 / 3) ** 0.5, rel=0.02)


def test_halves_that_disagree_have_no_ceiling():
    truth = torch.ones(10)
    assert agreement((truth, -0.5 * truth), (truth, truth)).ceiling == 0.0
    assert agreement((truth, -truth), (truth, truth)).cosine == 0.0
    assert agreement((truth, truth), (0 * truth, 0 * truth)) == agreement(
        (truth, truth), (0 * truth, 0 * truth)
    )
    assert agreement((truth, truth), (0 * truth, 0 * truth)).length_ratio == 0.0
