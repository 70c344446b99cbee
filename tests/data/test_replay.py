"""The replay buffer against a naive list of episodes."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polygrad_fast.data.replay import ReplayBuffer, Windows
from polygrad_fast.errors import CheckpointError, InputError

S, A = 3, 2

# (steps, terminated, truncated) of an episode; neither flag leaves it for the next to continue.
episode_lists = st.lists(
    st.tuples(st.integers(1, 14), st.booleans(), st.booleans()), min_size=1, max_size=12
)


def step_values(n: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Values that name the step, so that a window tells which steps it is made of."""
    return np.full(S, n) + np.arange(S) / 8, np.full(A, -n) - np.arange(A) / 8, 1.0 + n


def flatten(episodes: list[tuple[int, bool, bool]]) -> list[tuple[bool, bool]]:
    flags = []
    for length, terminated, truncated in episodes:
        flags += [(False, False)] * (length - 1) + [(terminated, truncated)]
    return flags


def fill(buffer: ReplayBuffer, flags: list[tuple[bool, bool]], first: int = 0) -> ReplayBuffer:
    for n, (terminated, truncated) in enumerate(flags, start=first):
        buffer.add(*step_values(n), terminated, truncated)
    return buffer


def naive_windows(
    flags: list[tuple[bool, bool]], capacity: int, horizon: int
) -> list[list[tuple[int, float, float]]]:
    """Every valid window in order, as (step whose observation and action, reward, terminal)."""
    episodes, running = [], []
    for n, (terminated, truncated) in enumerate(flags):
        running.append(n)
        if terminated or truncated:
            episodes.append((running, terminated))
            running = []
    episodes.append((running, False))
    windows = []
    for steps, terminated in episodes:
        for i, start in enumerate(steps):
            real = steps[i : i + horizon]
            if start < len(flags) - capacity or (len(real) < horizon and not terminated):
                continue
            window = [(n, 1.0 + n, float(flags[n][0])) for n in real]
            windows.append(window + [(real[-1], 0.0, 1.0)] * (horizon - len(real)))
    return windows


def all_windows(buffer: ReplayBuffer) -> list[list[tuple[int, float, float]]]:
    """Every window the buffer could draw, in order, after checking observations and actions."""
    places = (torch.arange(buffer.num_windows) + buffer._first_start) % buffer.capacity
    windows = buffer.windows(places)
    steps = windows.observations[..., 0]
    for field in (windows.observations, windows.actions, windows.rewards, windows.terminals):
        assert field.dtype == torch.float32 and field.is_contiguous()
    expected = steps[..., None] + torch.arange(S) / 8
    assert torch.equal(windows.observations, expected)
    assert torch.equal(buffer.initial_observations(), expected[:, 0])
    assert torch.equal(windows.actions, -(steps[..., None] + torch.arange(A) / 8))
    return [
        list(zip(n, r, t, strict=True))
        for n, r, t in zip(
            steps.int().tolist(), windows.rewards.tolist(), windows.terminals.tolist(), strict=True
        )
    ]


def assert_same(first: Windows, second: Windows) -> None:
    for name in ("observations", "actions", "rewards", "terminals"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


def saved_and_read(buffer: ReplayBuffer) -> dict:
    file = io.BytesIO()
    torch.save(buffer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@settings(max_examples=150, deadline=None)
@given(episodes=episode_lists, horizon=st.integers(1, 6), spare=st.integers(0, 30))
def test_windows_equal_those_of_a_list_of_episodes(episodes, horizon, spare):
    capacity = horizon + spare
    flags = flatten(episodes)
    buffer = fill(ReplayBuffer(capacity, horizon, S, A), flags)
    assert all_windows(buffer) == naive_windows(flags, capacity, horizon)
    assert buffer.num_steps == min(len(flags), capacity)
    assert buffer.total_steps == len(flags)
    assert buffer.num_episodes == sum(terminated or truncated for terminated, truncated in flags)


@settings(max_examples=20, deadline=None)
@given(episodes=episode_lists, horizon=st.integers(1, 5), spare=st.integers(0, 8))
def test_windows_are_right_after_every_single_step(episodes, horizon, spare):
    flags = flatten(episodes)
    buffer = ReplayBuffer(horizon + spare, horizon, S, A)
    for n in range(len(flags)):
        fill(buffer, flags[n : n + 1], first=n)
        assert all_windows(buffer) == naive_windows(flags[: n + 1], horizon + spare, horizon)


def test_sample_draws_every_window_uniformly_and_no_other():
    flags = flatten([(9, True, False), (2, False, True), (12, False, True), (6, True, True)])
    buffer = fill(ReplayBuffer(25, 4, S, A), flags)
    drawn = buffer.sample(20_000, torch.Generator().manual_seed(0))
    first, counts = drawn.observations[:, 0, 0].int().unique(return_counts=True)
    wanted = [window[0][0] for window in naive_windows(flags, 25, 4)]
    assert first.tolist() == wanted
    expected = 20_000 / len(wanted)
    assert (counts - expected).abs().max() < 5 * expected**0.5


def test_terminal_window_is_padded_and_truncated_window_is_not():
    buffer = fill(ReplayBuffer(20, 3, S, A), flatten([(4, True, True), (4, False, True)]))
    assert all_windows(buffer) == [
        [(0, 1.0, 0.0), (1, 2.0, 0.0), (2, 3.0, 0.0)],
        [(1, 2.0, 0.0), (2, 3.0, 0.0), (3, 4.0, 1.0)],
        [(2, 3.0, 0.0), (3, 4.0, 1.0), (3, 0.0, 1.0)],
        [(3, 4.0, 1.0), (3, 0.0, 1.0), (3, 0.0, 1.0)],
        [(4, 5.0, 0.0), (5, 6.0, 0.0), (6, 7.0, 0.0)],
        [(5, 6.0, 0.0), (6, 7.0, 0.0), (7, 8.0, 0.0)],
    ]


def test_end_episode_closes_the_running_episode_as_truncated():
    buffer = fill(ReplayBuffer(20, 3, S, A), [(False, False)] * 4)
    buffer.end_episode()
    buffer.end_episode()
    assert buffer.num_episodes == 1
    fill(buffer, [(False, False)] * 4, first=4)
    assert [[n for n, _, _ in window] for window in all_windows(buffer)] == [
        [0, 1, 2],
        [1, 2, 3],
        [4, 5, 6],
        [5, 6, 7],
    ]


def test_a_seeded_generator_gives_the_same_windows_again():
    buffer = fill(ReplayBuffer(60, 5, S, A), flatten([(30, True, False), (40, False, True)]))
    draws = [buffer.sample(257, torch.Generator().manual_seed(seed)) for seed in (7, 7, 8)]
    assert_same(draws[0], draws[1])
    assert not torch.equal(draws[0].observations, draws[2].observations)
    initial = buffer.sample_initial_observations(257, torch.Generator().manual_seed(7))
    assert torch.equal(initial, draws[0].observations[:, 0])


def test_sample_draws_one_randint(monkeypatch):
    buffer = fill(ReplayBuffer(60, 5, S, A), flatten([(30, True, False)]))
    calls, randint = [], torch.randint
    monkeypatch.setattr(torch, "randint", lambda *a, **k: calls.append(a) or randint(*a, **k))
    buffer.sample(16)
    assert calls == [(0, 30, (16,))]


@pytest.mark.parametrize("share, newest", [(0.0, 0), (0.25, 100), (0.5, 200), (1.0, 401)])
def test_a_share_of_the_starts_are_the_newest(share, newest):
    buffer = fill(ReplayBuffer(60, 5, S, A), flatten([(50, True, False)]))
    generator = torch.Generator().manual_seed(0)
    drawn = buffer.sample_initial_observations(401, generator, 10, share)
    wanted, _, _ = step_values(0)
    steps = (drawn[:, 0] - wanted[0]).numpy()  # the first entry counts the steps
    scale = step_values(1)[0][0] - wanted[0]
    steps = np.rint(steps / scale).astype(int)
    assert ((steps[:newest] >= 40) & (steps[:newest] < 50)).all()
    if newest < 401:
        assert steps[newest:].min() < 40 and len(set(steps[newest:])) > 20
    assert len(set(steps[:newest])) == min(newest, 10)


def test_more_newest_starts_than_there_are_is_all_of_them():
    buffer = fill(ReplayBuffer(60, 5, S, A), flatten([(30, True, False)]))
    some, every = (
        buffer.sample_initial_observations(50, torch.Generator().manual_seed(0), *options)
        for options in ((1000, 1.0), ())
    )
    assert torch.equal(some, every)


def test_a_window_does_not_alias_the_ring():
    buffer = fill(ReplayBuffer(5, 5, S, A), [(False, False)] * 5)
    window = buffer.sample(1)
    before = window.observations.clone()
    fill(buffer, [(False, False)] * 5, first=5)
    assert torch.equal(window.observations, before)
    assert not torch.equal(buffer.sample(1).observations, before)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    chunks=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    capacity=st.integers(1, 50),
)
def test_moments_equal_numpy_over_all_steps_ever(seed, chunks, capacity):
    rng = np.random.default_rng(seed)
    total = sum(chunks) + 1
    scale = np.array([1e-3, 1.0, 1e3])
    observations = (rng.normal(size=(total, S)) * scale + 100 * scale).astype(np.float32)
    actions = rng.uniform(-1, 1, size=(total, A)).astype(np.float32)
    rewards = rng.normal(size=total).astype(np.float32)
    terminals = rng.random(total) < 0.2
    buffer = ReplayBuffer(capacity, 1, S, A)
    n = 0
    for chunk in [1, *chunks]:
        for _ in range(chunk):
            buffer.add(observations[n], actions[n], rewards[n], terminals[n], False)
            n += 1
        moments = buffer.moments()
    fields = {
        "observations": observations,
        "actions": actions,
        "rewards": rewards,
        "terminals": terminals,
    }
    assert moments.keys() == fields.keys()
    for name, values in fields.items():
        mean, std = moments[name]
        assert mean.dtype == std.dtype == torch.float32
        assert mean.shape == std.shape == values.shape[1:]
        wanted = values.astype(np.float64)
        np.testing.assert_allclose(mean, wanted.mean(0), rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(std, wanted.std(0), rtol=1e-6, atol=1e-12)


def test_a_constant_field_has_a_deviation_of_exactly_zero():
    buffer = ReplayBuffer(100, 1, S, A)
    for n in range(70):
        buffer.add([0.1, n, 0.3], [0.7, 0.7], 0.1, False, False)
        if n % 13 == 0:
            buffer.moments()
    moments = buffer.moments()
    assert moments["observations"][1][[0, 2]].tolist() == [0.0, 0.0]
    assert moments["observations"][1][1] > 0
    assert moments["rewards"][1] == 0 and moments["terminals"][1] == 0
    assert moments["rewards"][0] == torch.tensor(0.1)


def test_moments_read_only_new_steps(monkeypatch):
    buffer = fill(ReplayBuffer(1000, 2, S, A), [(False, False)] * 500)
    buffer.moments()
    fill(buffer, [(False, False)] * 7, first=500)
    read, arange = [], torch.arange
    monkeypatch.setattr(torch, "arange", lambda *a, **k: read.append(a) or arange(*a, **k))
    buffer.moments()
    buffer.moments()
    assert read == [(500, 507)]


@settings(max_examples=40, deadline=None)
@given(
    before=episode_lists,
    after=episode_lists,
    horizon=st.integers(1, 5),
    spare=st.integers(0, 30),
    look=st.booleans(),
)
def test_a_restored_buffer_continues_identically(before, after, horizon, spare, look):
    before, after = flatten(before), flatten(after)
    buffer = fill(ReplayBuffer(horizon + spare, horizon, S, A), before)
    if look:
        buffer.moments()
    restored = fill(ReplayBuffer(horizon + spare, horizon, S, A), [(True, False)] * 9)
    restored.load_state_dict(saved_and_read(buffer))
    assert all_windows(restored) == all_windows(buffer)
    for one in (buffer, restored):
        fill(one, after, first=len(before))
    assert all_windows(restored) == all_windows(buffer)
    assert all_windows(buffer) == naive_windows(before + after, horizon + spare, horizon)
    assert restored.num_episodes == buffer.num_episodes
    for name, (mean, std) in buffer.moments().items():
        assert torch.equal(mean, restored.moments()[name][0])
        assert torch.equal(std, restored.moments()[name][1])
    if buffer.num_windows:
        draws = [one.sample(33, torch.Generator().manual_seed(3)) for one in (buffer, restored)]
        assert_same(*draws)


def test_state_holds_only_the_filled_part_and_is_a_copy():
    buffer = fill(ReplayBuffer(10_000, 4, S, A), [(False, False)] * 6)
    state = buffer.state_dict()
    assert state["steps"].shape == (6, S + A + 2)
    assert state["starts"].tolist() == [[0, 3], [1, 4], [2, 5]]
    kept = state["steps"].clone()
    fill(buffer, [(False, False)] * 10_000, first=6)
    assert torch.equal(state["steps"], kept)
    assert all(isinstance(v, (int, str, torch.Tensor)) for v in state.values())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("capacity", 31),
        ("horizon", 3),
        ("observation_dim", 4),
        ("action_dim", 1),
        ("num_environments", 2),
    ],
)
def test_loading_another_configuration_names_both_values(name, value):
    sizes = {
        "capacity": 30,
        "horizon": 4,
        "observation_dim": S,
        "action_dim": A,
        "num_environments": 1,
    }
    state = fill(ReplayBuffer(**sizes), [(True, False)] * 3).state_dict()
    other = ReplayBuffer(**{**sizes, name: value})
    with pytest.raises(
        CheckpointError, match=f"{name} must be {value}, this buffer's, got {sizes[name]}"
    ):
        other.load_state_dict(state)
    assert other.num_steps == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("starts"), "'starts' is missing"),
        (lambda s: s.update(format="other"), "format must be .*got 'other'"),
        (
            lambda s: s.update(steps=s["steps"][:-1]),
            r"steps must have shape \(20, 7\), got \(19, 7\)",
        ),
        (
            lambda s: s.update(steps=s["steps"].double()),
            "must be a torch.float32 tensor, got torch.float64",
        ),
        (
            lambda s: s.update(moment_mean=[0.0]),
            "moment_mean must be a torch.float64 tensor, got list",
        ),
        (
            lambda s: s.update(total_steps=-1),
            "total_steps must be an integer of at least 0, got -1",
        ),
        (
            lambda s: s.update(episode_starts=torch.tensor([99])),
            r"episode_starts must be at most 25, got \[99\]",
        ),
        (
            lambda s: s.update(episode_starts=torch.zeros(2, dtype=torch.int64)),
            r"episode_starts must have shape \(1,\), got \(2,\)",
        ),
        (lambda s: s.update(waiting=torch.zeros(3, dtype=torch.int64)), "waiting must have shape"),
        (lambda s: s.update(moment_steps=2), "moment_steps must be at least 5, .*got 2"),
        (
            lambda s: s.update(starts=s["starts"][:, :1]),
            r"must have shape \(n, 2\) .*, got \(17, 1\)",
        ),
        (lambda s: s.update(starts=s["starts"] - 1), "got 4 to 23"),
        (lambda s: s.update(starts=s["starts"].flip(0)), "must increase within steps 5 to 24, got"),
    ],
)
def test_loading_a_damaged_state_names_the_damage_and_changes_nothing(change, message):
    state = fill(ReplayBuffer(20, 4, S, A), [(False, False)] * 25).state_dict()
    change(state)
    buffer = fill(ReplayBuffer(20, 4, S, A), [(False, False)] * 8)
    before = all_windows(buffer)
    with pytest.raises(CheckpointError, match=message):
        buffer.load_state_dict(state)
    assert all_windows(buffer) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"observation": np.zeros(4)}, r"step 2: observation must have shape \(3,\), got \(4,\)"),
        ({"observation": np.zeros((1, 3))}, r"observation must have shape \(3,\), got \(1, 3\)"),
        ({"action": torch.zeros(3)}, r"step 2: action must have shape \(2,\), got \(3,\)"),
        ({"reward": np.zeros(1)}, r"step 2: reward must have shape \(\), got \(1,\)"),
        ({"observation": [0, np.nan, 0]}, r"step 2: observation\[1\] must be a finite .*, got nan"),
        (
            {"observation": torch.tensor([0, 0, -torch.inf])},
            r"observation\[2\] must be .*, got -inf",
        ),
        ({"observation": [1e39, 0, 0]}, r"observation\[0\] must be .*, got 1e\+39"),
        ({"action": np.array([0, np.inf])}, r"step 2: action\[1\] must be .*, got inf"),
        ({"reward": float("nan")}, "step 2: reward must be .*, got nan"),
        ({"action": "left"}, "action must be numbers .*, got 'left'"),
    ],
)
def test_add_refuses_what_it_cannot_store(change, message):
    buffer = fill(ReplayBuffer(20, 2, S, A), [(False, False)] * 2)
    good = {"observation": np.zeros(S), "action": np.zeros(A), "reward": 0.0}
    with pytest.raises(InputError, match=message):
        buffer.add(**{**good, **change}, terminated=False, truncated=False)
    assert (buffer.num_steps, buffer.num_windows) == (2, 1)


def test_add_takes_tensors_and_copies_them():
    buffer = ReplayBuffer(4, 1, S, A)
    observation = torch.arange(3.0, dtype=torch.float64, requires_grad=True)
    action = np.ones(A, dtype=np.float32)
    buffer.add(observation, action, torch.tensor(2.0), np.bool_(True), np.bool_(False))
    action[:] = 5.0
    window = buffer.sample(1)
    assert window.observations.tolist() == [[[0.0, 1.0, 2.0]]]
    assert window.actions.tolist() == [[[1.0, 1.0]]]
    assert (window.rewards.item(), window.terminals.item()) == (2.0, 1.0)
    assert not window.observations.requires_grad


def test_sample_without_a_window_says_steps_and_horizon():
    buffer = fill(ReplayBuffer(20, 5, S, A), [(False, False)] * 4)
    for draw in (buffer.sample, buffer.sample_initial_observations):
        with pytest.raises(InputError, match="horizon 5 .*, got 4 steps and no valid window"):
            draw(8)
    fill(buffer, [(False, True)], first=4)
    assert buffer.num_windows == 1


def test_sizes_out_of_range_are_named():
    with pytest.raises(InputError, match="capacity must be at least the horizon, 5, got 4"):
        ReplayBuffer(4, 5, S, A)
    with pytest.raises(InputError, match="horizon must be an integer of at least 1, got 0"):
        ReplayBuffer(4, 0, S, A)
    with pytest.raises(InputError, match="action_dim must be an integer of at least 1, got 0"):
        ReplayBuffer(4, 1, S, 0)
    buffer = fill(ReplayBuffer(4, 1, S, A), [(False, False)])
    for draw in (buffer.sample, buffer.sample_initial_observations):
        with pytest.raises(InputError, match="batch_size must be an integer of at least 1, got 0"):
            draw(0)
    with pytest.raises(InputError, match="moments need at least 1 step in the buffer, got 0"):
        ReplayBuffer(4, 1, S, A).moments()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_buffer_on_the_gpu_gives_the_windows_of_one_on_the_host():
    flags = flatten([(9, True, False), (2, False, True), (12, False, True), (6, True, True)])
    host = fill(ReplayBuffer(25, 4, S, A), flags)
    device = fill(ReplayBuffer(25, 4, S, A, device="cuda"), flags)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    drawn = device.sample(257, generators[1])
    assert drawn.observations.is_cuda
    on_host = [getattr(drawn, n).cpu() for n in ("observations", "actions", "rewards", "terminals")]
    assert_same(host.sample(257, generators[0]), Windows(*on_host))
    restored = ReplayBuffer(25, 4, S, A)
    restored.load_state_dict(device.state_dict())
    assert all_windows(restored) == all_windows(host)
    for name, (mean, std) in host.moments().items():
        assert torch.equal(mean, device.moments()[name][0].cpu())
        assert torch.equal(std, device.moments()[name][1].cpu())


def windows_in_turns(
    flags: list[tuple[bool, bool]], capacity: int, horizon: int, num_environments: int
) -> list[list[tuple[int, float, float]]]:
    """Every valid window of environments that take turns, by its first step."""
    windows = []
    for environment in range(num_environments):
        own = list(range(environment, len(flags), num_environments))
        for window in naive_windows([flags[n] for n in own], len(flags), horizon):
            real = [(own[i], 1.0 + own[i], t) if r else (own[i], r, t) for i, r, t in window]
            if real[0][0] >= len(flags) - capacity:
                windows.append(real)
    return sorted(windows)


@settings(max_examples=60, deadline=None)
@given(
    episodes=episode_lists,
    num_environments=st.integers(2, 5),
    horizon=st.integers(1, 5),
    room=st.integers(0, 30),
    cut=st.integers(0, 200),
)
def test_environments_in_turns_have_windows_of_their_own(
    episodes, num_environments, horizon, room, cut
):
    """A prefix of all windows, in order, of which only the last turns may be missing; and the same
    after a state was saved at any step."""
    flags = flatten(episodes)
    capacity = horizon * num_environments + room
    sizes = dict(
        capacity=capacity,
        horizon=horizon,
        observation_dim=S,
        action_dim=A,
        num_environments=num_environments,
    )
    buffer = ReplayBuffer(**sizes)
    for n, (terminated, truncated) in enumerate(flags):
        if n == cut:
            saved = buffer.state_dict()
            buffer = ReplayBuffer(**sizes)
            buffer.load_state_dict(saved)
        buffer.add(*step_values(n), terminated, truncated)
        wanted = windows_in_turns(flags[: n + 1], capacity, horizon, num_environments)
        got = all_windows(buffer)
        assert got == wanted[: len(got)]
        missing = [window[0][0] for window in wanted[len(got) :]]
        assert all(start > n - (horizon - 1) * num_environments for start in missing)
        count = sum(term or trunc for term, trunc in flags[: n + 1])
        assert buffer.num_episodes == count
    for environment in range(num_environments):
        buffer.end_episode(environment)
    # a terminal step of each decides what waited
    for n in range(len(flags), len(flags) + num_environments):
        buffer.add(*step_values(n), True, False)
        flags.append((True, False))
    ends = windows_in_turns(flags, capacity, horizon, num_environments)
    # whatever ran at the end was closed as truncated
    firsts = {window[0][0] for window in all_windows(buffer)}
    assert {window[0][0] for window in ends if len({n for n, _, _ in window}) == 1} <= firsts
    assert buffer._waiting == []


def test_one_environments_episode_is_closed_alone():
    buffer = ReplayBuffer(20, 2, S, A, num_environments=2)
    fill(buffer, [(False, False)] * 3)  # environment 0: 0, 2; environment 1: 1
    buffer.end_episode(0)
    fill(buffer, [(False, False)] * 3, first=3)  # 1, 3, 5 go on; 4 begins
    firsts = [window[0][0] for window in all_windows(buffer)]
    assert firsts == [0, 1, 3]
    assert buffer.num_episodes == 1


def test_the_capacity_holds_a_window_of_every_environment():
    with pytest.raises(
        InputError, match="at least the horizon, 4 for each of 3 environments, got 11"
    ):
        ReplayBuffer(11, 4, S, A, num_environments=3)


def test_a_state_of_one_environment_as_it_was_written_before():
    buffer = fill(ReplayBuffer(20, 4, S, A), [(False, False)] * 5 + [(True, False)] * 2)
    state = buffer.state_dict()
    old = {k: v for k, v in state.items() if k not in ("episode_starts", "waiting")}
    old["episode_start"] = int(state["episode_starts"])
    del old["num_environments"]
    loaded = ReplayBuffer(20, 4, S, A)
    loaded.load_state_dict(old)
    for each in (buffer, loaded):
        fill(each, [(False, False)] * 6, first=7)
    assert all_windows(loaded) == all_windows(buffer)
