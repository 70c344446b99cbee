"""Environments are put into the state that an observation shows, and go on as they did."""

import gymnasium
import numpy as np
import pytest

import polygrad_fast as pg
from polygrad_fast.diagnostics.simulator import Simulator

# id -> leading entries that are positions and velocities, and where velocities are clipped
SUPPORTED = {
    "Hopper-v5": (11, 10.0),
    "Walker2d-v5": (17, 10.0),
    "HalfCheetah-v5": (17, np.inf),
    "Swimmer-v5": (8, np.inf),
    "InvertedPendulum-v5": (4, np.inf),
    "InvertedDoublePendulum-v5": (8, 10.0),
    "Ant-v5": (27, np.inf),
    "Humanoid-v5": (45, np.inf),
    "Pendulum-v1": (3, np.inf),
}


def collect(environment, num: int, scale: float = 0.3) -> dict[str, np.ndarray]:
    """Steps of random episodes, as the replay buffer holds them, in float32."""
    space, g = environment.action_space, np.random.default_rng(0)
    steps, seed = [], 0
    while len(steps) < num:
        observation, _ = environment.reset(seed=seed)
        seed += 1
        for _ in range(40):
            action = (scale * g.uniform(space.low, space.high)).astype(np.float32)
            following, reward, terminated, truncated, _ = environment.step(action)
            steps.append((observation, action, reward, terminated, following))
            observation = following
            if terminated or truncated:
                break
    names = ("observations", "actions", "rewards", "terminals", "next_observations")
    columns = (np.array(column, dtype=np.float32) for column in zip(*steps[:num], strict=True))
    return dict(zip(names, columns, strict=True))


def simulator_of(environment, steps) -> Simulator:
    scales = steps["observations"].std(axis=0) + 1e-3, steps["rewards"].std(keepdims=True) + 1e-3
    return Simulator(environment, **steps, scales=scales)


@pytest.mark.parametrize("env_id", SUPPORTED)
def test_an_observation_is_read_back_and_the_step_from_it_is_the_true_one(env_id):
    num_entries, limit = SUPPORTED[env_id]
    steps = collect(gymnasium.make(env_id), 300)
    simulator = simulator_of(gymnasium.make(env_id), steps)
    assert simulator.share_repeated > 0.99
    clipped = (np.abs(steps["observations"]) == 10.0).any(axis=1) & np.isfinite(limit)
    assert (simulator.is_determined(steps["observations"]) == ~clipped).all()
    bare = simulator.environment.unwrapped
    scale = steps["observations"].std(axis=0) + 1e-3
    checked = 0
    for i in np.flatnonzero(~clipped)[:200]:
        simulator.set(steps["observations"][i])
        shown = bare._get_obs()
        wanted = steps["observations"][i]
        np.testing.assert_allclose(shown[:num_entries], wanted[:num_entries], atol=2e-6, rtol=1e-6)
        observation, reward, terminated = simulator.step(steps["actions"][i])
        error = (observation - steps["next_observations"][i]) / scale
        assert np.sqrt(np.square(error).mean()) < 1e-3
        late = 0.12 if env_id == "Ant-v5" else 0.01  # its reward has a body's position before
        assert abs(reward - steps["rewards"][i]) < late * steps["rewards"].std() + 1e-5
        assert terminated == bool(steps["terminals"][i])
        checked += 1
    assert checked > 50


def test_a_state_restored_goes_on_as_before():
    steps = collect(gymnasium.make("Hopper-v5"), 50)
    simulator = simulator_of(gymnasium.make("Hopper-v5"), steps)
    simulator.set(steps["observations"][3])
    simulator.step(steps["actions"][3])
    state = simulator.state()
    wanted = simulator.step(steps["actions"][4])
    simulator.set(steps["observations"][40])
    simulator.step(steps["actions"][40])
    simulator.restore(state)
    got = simulator.step(steps["actions"][4])
    np.testing.assert_allclose(got[0], wanted[0], atol=1e-4)
    assert got[1] == pytest.approx(wanted[1], abs=1e-4) and got[2] == wanted[2]


@pytest.mark.parametrize(("env_id", "num_hidden"), [("Hopper-v5", 1), ("Swimmer-v5", 2)])
def test_hidden_positions_are_set_and_move_by_the_velocities(env_id, num_hidden):
    steps = collect(gymnasium.make(env_id), 100)
    simulator = simulator_of(gymnasium.make(env_id), steps)
    bare = simulator.environment.unwrapped
    observation = steps["observations"][7]
    simulator.set(observation)
    assert np.array_equal(simulator.hidden(), np.zeros(num_hidden))
    hidden = np.array([3.0, -2.0])[:num_hidden]
    simulator.set(observation, hidden)
    assert np.array_equal(simulator.hidden(), hidden)
    following, _, _ = simulator.step(steps["actions"][7])
    assert np.array_equal(bare.data.qpos[:num_hidden], simulator.hidden())
    moved, truly = simulator.moved(hidden, following), simulator.hidden()
    assert (np.abs(truly - hidden) > 0).all()
    np.testing.assert_allclose(moved, truly, atol=0.3 * np.abs(truly - hidden).max())


def test_clipped_velocities_are_not_taken_for_states():
    """With full torques Walker2d's velocities reach the clip; those steps are not repeated."""
    steps = collect(gymnasium.make("Walker2d-v5"), 300, scale=1.0)
    clipped = (np.abs(steps["observations"][:, 8:]) == 10.0).any(axis=1)
    assert 0.2 < clipped.mean() < 0.9
    simulator = simulator_of(gymnasium.make("Walker2d-v5"), steps)
    assert (simulator.is_determined(steps["observations"]) == ~clipped).all()
    assert simulator.share_repeated > 0.99
    with pytest.raises(pg.InputError, match="0% of its own steps"):
        simulator_of(gymnasium.make("Walker2d-v5"), {name: v[clipped] for name, v in steps.items()})


def test_a_simulation_that_blows_up_is_told():
    steps = collect(gymnasium.make("Hopper-v5"), 50)
    simulator = simulator_of(gymnasium.make("Hopper-v5"), steps)
    for _ in range(3):  # the clock has to be ahead of where MuJoCo resets it to
        simulator.step(steps["actions"][0])
    far = steps["observations"][0].copy()
    far[5:] = 1e9
    simulator.set(far)
    observation, reward, terminated = simulator.step(steps["actions"][0])
    assert np.isnan(observation).all() and np.isnan(reward) and not terminated


class Noisy(gymnasium.Wrapper):
    """Nothing determines its next observation."""

    def step(self, action):
        observation, *rest = self.env.step(action)
        return observation + 0.1 * np.random.default_rng().standard_normal(11), *rest


@pytest.mark.parametrize(
    "make",
    [
        lambda: gymnasium.make("Pusher-v5"),
        lambda: gymnasium.make("MountainCarContinuous-v0"),
        lambda: Noisy(gymnasium.make("Hopper-v5")),
        lambda: gymnasium.wrappers.TransformObservation(
            gymnasium.make("Hopper-v5"), lambda o: 2 * o, None
        ),
    ],
)
def test_other_environments_are_refused(make):
    environment = make()
    steps = collect(environment, 60)
    with pytest.raises(pg.InputError) as caught:
        simulator_of(make(), steps)
    message = str(caught.value)
    assert message.startswith(environment.spec.id) and "whose observations determine" in message
    assert "got one of which 0% of its own steps" in message and "\n" not in message


def test_another_environment_than_the_steps_are_of_is_refused():
    steps = collect(gymnasium.make("Hopper-v5"), 60)
    with pytest.raises(pg.InputError, match="of its own steps"):
        simulator_of(gymnasium.make("Hopper-v5", frame_skip=5), steps)
