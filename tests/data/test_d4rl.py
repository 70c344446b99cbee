"""D4RL's scores and when they are comparable."""

import numpy as np
import pytest

from polygrad_fast.data.d4rl import d4rl_environment, d4rl_score, score_caveat
from polygrad_fast.errors import InputError


def test_random_is_0_and_expert_100():
    assert d4rl_score("Hopper-v2", -20.272305) == pytest.approx(0)
    assert d4rl_score("halfcheetah-medium-replay-v2", 12135.0) == pytest.approx(100)
    scores = d4rl_score("maze2d-umaze-v1", np.array([23.85, 161.86], dtype=np.float32))
    assert scores == pytest.approx([0, 100], abs=1e-5)
    assert d4rl_score("Walker2d-v5", 4592.3) == pytest.approx(100)


def test_versions_that_are_not_comparable_are_told():
    for name in ("Hopper-v2", "hopper_medium_expert-v2", "maze2d-large-sparse-v1"):
        assert score_caveat(name) is None
    assert "close to published ones, but not the same" in score_caveat("HalfCheetah-v4")
    assert "Hopper-v5 is not Hopper-v2" in score_caveat("Hopper-v5")
    assert "not comparable" in score_caveat("Hopper-v5")
    assert "another version than Hopper-v2" in score_caveat("hopper-medium-v0")


def test_other_environments_have_no_score():
    for name in ("Ant-v5", "Hopperr-v2", "maze2d-huge-v1", "Hopper"):
        with pytest.raises(InputError, match=f"{name} has no D4RL score"):
            d4rl_score(name, 1.0)
        assert "has no D4RL score" in score_caveat(name)


def test_environments_of_datasets():
    assert d4rl_environment("hopper_medium-v2") == "Hopper-v2"
    assert d4rl_environment("maze2d-umaze-sparse-v1") == "maze2d-umaze-v1"
    assert d4rl_environment("hopper-medium-v0") is None
    assert d4rl_environment("anything") is None
