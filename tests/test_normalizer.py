import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import polygrad_fast as pg

examples = settings(max_examples=100, deadline=None)
EPS = 2.0**-24
FIELDS = ("observations", "actions", "rewards", "terminals")


def build(**moments) -> pg.Normalizer:
    defaults = {
        "observations": (torch.tensor([1.0, -2.0, 30.0]), torch.tensor([0.5, 2.0, 10.0])),
        "actions": (torch.tensor([0.1, -0.3]), torch.tensor([0.7, 1.2])),
        "rewards": (2.0, 3.0),
        "terminals": (0.05, 0.2),
    }
    return pg.Normalizer.from_moments(**(defaults | moments))


def moments_of(normalizer) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in normalizer.named_buffers()}


@examples
@given(
    mean=st.floats(-1e4, 1e4, width=32),
    std=st.floats(2.0**-10, 2.0**10, width=32),
    z=st.floats(-20, 20, width=32),
    field=st.sampled_from(FIELDS),
)
def test_round_trip_and_formula(mean, std, z, field):
    moments = {"observations": (0.0, 1.0), "actions": (0.0, 1.0), field: (mean, std)}
    normalizer = pg.Normalizer.from_moments(**moments)
    x = torch.tensor([[mean + z * std]])
    normed = normalizer.normalize(x, field)
    exact = (x.double().item() - mean) / (std + 1e-6)
    size = abs(mean) + 20 * std
    assert normed.dtype == torch.float32
    # both x - mean and std + 1e-6 are rounded once
    assert normed.item() == pytest.approx(exact, rel=4 * EPS, abs=2 * EPS * size / std)
    back = normalizer.unnormalize(normed, field)
    assert back.item() == pytest.approx(x.item(), rel=0, abs=4 * EPS * size)


def test_fields_do_not_mix():
    normalizer = build()
    for field, dim in zip(FIELDS, (3, 2, 1, 1), strict=True):
        mean, scale = normalizer.normalize(torch.zeros(dim), field), normalizer.state_dict()
        wanted = -scale[f"{field}_mean"] / scale[f"{field}_scale"]
        assert torch.equal(mean, wanted)


def test_rewards_and_terminals_keep_their_shape():
    normalizer = build()
    for field in ("rewards", "terminals"):
        flat = torch.randn(4, 5)
        assert torch.equal(
            normalizer.normalize(flat, field).unsqueeze(-1),
            normalizer.normalize(flat.unsqueeze(-1), field),
        )


def test_fields_built_with_none_are_left_unchanged():
    normalizer = build(rewards=None, terminals=None)
    x = torch.randn(7, 5) * 100
    for field in ("rewards", "terminals"):
        assert torch.equal(normalizer.normalize(x, field), x)
        assert torch.equal(normalizer.unnormalize(x, field), x)


def test_trajectory_layout_is_observation_reward_terminal():
    normalizer = build()
    observations, rewards = torch.randn(2, 4, 3), torch.randn(2, 4)
    terminals = torch.randint(2, (2, 4)).float()
    trajectory = normalizer.normalize_trajectory(observations, rewards, terminals)
    assert trajectory.shape == (2, 4, 5)
    assert torch.equal(trajectory[..., :3], normalizer.normalize(observations, "observations"))
    assert torch.equal(trajectory[..., 3], normalizer.normalize(rewards, "rewards"))
    assert torch.equal(trajectory[..., 4], normalizer.normalize(terminals, "terminals"))


def test_min_std_is_a_floor_per_field():
    normalizer = build()
    zero = {"rewards": (1.0, 0.0), "terminals": (0.0, 0.0)}
    mixed = {"observations": (torch.zeros(3), torch.tensor([0.0, 0.05, 5.0]))}
    normalizer.update(zero | mixed, min_std={"terminals": 0.01, "observations": 0.1})
    got = normalizer.state_dict()
    assert got["terminals_scale"].item() == pytest.approx(0.01 + 1e-6, rel=1e-6)
    assert got["rewards_scale"].item() == pytest.approx(1e-6)
    assert got["observations_scale"].tolist() == pytest.approx([0.1, 0.1, 5.0], rel=2e-5)
    assert normalizer.normalize(torch.zeros(4), "terminals").abs().max() == 0


def test_updates_are_in_place_and_touch_only_the_given_fields():
    normalizer = build()
    pointers = {name: buffer.data_ptr() for name, buffer in normalizer.named_buffers()}
    before = moments_of(normalizer)
    normalizer.update({"actions": (torch.tensor([5.0, 6.0]), torch.tensor([7.0, 8.0]))})
    after = dict(normalizer.named_buffers())
    assert {name: buffer.data_ptr() for name, buffer in after.items()} == pointers
    assert after["actions_mean"].tolist() == [5.0, 6.0]
    assert after["actions_scale"].tolist() == pytest.approx([7.0, 8.0], rel=1e-6)
    for name in set(before) - {"actions_mean", "actions_scale"}:
        assert torch.equal(after[name], before[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64])
def test_moments_of_other_dtypes_are_converted(dtype):
    pair = (torch.tensor([1, 2], dtype=dtype), torch.tensor([3, 4], dtype=dtype))
    normalizer = build(actions=pair)
    assert normalizer.actions_mean.dtype == normalizer.actions_scale.dtype == torch.float32
    assert normalizer.actions_mean.tolist() == [1.0, 2.0]


def test_unknown_field_names_what_was_got_and_wanted():
    normalizer, message = build(), r"field must be one of .*observations.*terminals.*got 'states'"
    with pytest.raises(pg.InputError, match=message):
        normalizer.update({"states": (torch.zeros(3), torch.ones(3))})
    for method in (normalizer.normalize, normalizer.unnormalize):
        with pytest.raises(pg.InputError, match=message):
            method(torch.zeros(3), "states")


@pytest.mark.parametrize(
    "moments, message",
    [
        ((torch.zeros(3), torch.ones(3)), r"be of shape \(2,\) each, got \(3,\) and \(3,\)"),
        ((torch.zeros(2), torch.ones(3)), r"be of shape \(2,\) each, got \(2,\) and \(3,\)"),
        ((torch.zeros(2), torch.tensor([1.0, -1.0])), r"actions.*non-negative.*-1\.0"),
        ((torch.tensor([0.0, torch.nan]), torch.ones(2)), r"actions.*finite.*nan"),
        ((torch.zeros(2), torch.tensor([1.0, torch.nan])), r"actions.*finite.*nan"),
        ((torch.zeros(2), torch.tensor([torch.inf, 1.0])), r"actions.*finite.*inf"),
    ],
)
def test_bad_moments_are_refused_and_nothing_changes(moments, message):
    normalizer = build()
    before = moments_of(normalizer)
    with pytest.raises(pg.InputError, match=message):
        normalizer.update({"rewards": (9.0, 9.0), "actions": moments}, min_std={"actions": 0.1})
    for name, buffer in normalizer.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_from_moments_refuses_what_update_refuses():
    with pytest.raises(pg.InputError, match="observations"):
        build(observations=(torch.zeros(3), torch.ones(2)))
    with pytest.raises(pg.InputError, match="rewards"):
        build(rewards=(torch.zeros(2), torch.ones(2)))


def test_state_dict_round_trip():
    source, target = build(), pg.Normalizer(3, 2)
    target.load_state_dict(source.state_dict())
    x = torch.randn(4, 3)
    assert torch.equal(target.normalize(x, "observations"), source.normalize(x, "observations"))
