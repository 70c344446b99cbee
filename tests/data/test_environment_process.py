"""Environments in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import gymnasium
import numpy as np
import pytest

from polygrad_fast.data.environment_process import EnvironmentProcess, ProcessEnvironment
from polygrad_fast.errors import InputError


def play(env: gymnasium.Env, ahead: bool = False) -> list[bytes]:
    seen, space = [], np.random.default_rng(0)
    for seed in (3, 4):
        seen.append(env.reset(seed=seed)[0].tobytes())
        for _ in range(7):
            action = space.uniform(-1, 1, env.action_space.shape).astype(np.float32)
            if ahead:
                env.start(action)
            observation, *outcome, _ = env.step(action)
            seen.append(observation.tobytes() + repr(outcome).encode())
    return seen


def test_it_steps_as_the_environment_does():
    local = gymnasium.make("Pendulum-v1")
    remote = ProcessEnvironment("Pendulum-v1", local)
    assert remote.process._process is None  # nothing begins before it is needed
    assert remote.spec.id == "Pendulum-v1"
    wanted = play(local)
    assert play(remote) == wanted
    assert play(remote, ahead=True) == wanted
    remote.start(np.zeros(1, np.float32))
    assert play(remote) == wanted  # a reset forgets the step that was begun
    process = remote.process._process
    remote.close()
    assert process.returncode == 0
    assert play(remote) == wanted  # in another process
    del remote


def test_environments_share_a_process():
    local, process = gymnasium.make("Pendulum-v1"), EnvironmentProcess()
    first, second = (ProcessEnvironment("Pendulum-v1", local, process) for _ in range(2))
    observations = [env.reset(seed=seed)[0] for seed, env in enumerate((first, second))]
    action = np.full(1, 0.5, np.float32)
    for env in (first, second):
        env.start(action)
    answers = [env.step(action) for env in (second, first)][::-1]  # asked in another order
    for seed, (observation, answer) in enumerate(zip(observations, answers, strict=True)):
        assert local.reset(seed=seed)[0].tobytes() == observation.tobytes()
        wanted, *outcome, _ = local.step(action)
        assert wanted.tobytes() == answer[0].tobytes() and outcome == list(answer[1:4])
    process.close()


def make_own() -> callable:
    """A function that hands its class over by value: nothing to import."""

    def make(render_mode=None):
        import gymnasium
        import numpy

        class Own(gymnasium.Env):
            observation_space = gymnasium.spaces.Box(-1, 1, (2,))
            action_space = gymnasium.spaces.Box(-1, 1, (1,))

            def reset(self, *, seed=None, options=None):
                print("a word to stdout")
                return numpy.full(2, 0.5), {"a lock": seed}

            def step(self, action):
                if action[0] > 0.9:
                    import os

                    os._exit(3)
                if action[0] > 0.5:
                    raise FloatingPointError(f"no such action {action[0]}")
                return numpy.full(2, action[0]), 1.0, False, False, {"f": lambda: 0}

        return Own()

    return make


def test_a_function_its_errors_and_its_end():
    make = make_own()
    env = ProcessEnvironment(make, make())
    observation, info = env.reset(seed=1)
    assert observation.tolist() == [0.5, 0.5] and info == {}
    with pytest.raises(FloatingPointError, match="no such action 0.75") as caught:
        env.step(np.array([0.75]))
    assert "in the process of Own" in caught.value.__notes__[0]
    assert env.step(np.array([0.25]))[0].tolist() == [0.25, 0.25]
    with pytest.raises(InputError, match="Own: the environment's process ended .* exit code 3"):
        env.step(np.array([1.0]))
    assert env.reset(seed=1)[0].tolist() == [0.5, 0.5]
    env.close()


def test_an_id_that_is_registered_here_only():
    gymnasium.register("HereOnly-v0", make_own())
    try:
        env = ProcessEnvironment("HereOnly-v0", gymnasium.make("HereOnly-v0"))
        assert env.reset(seed=1)[0].tolist() == [0.5, 0.5]
        env.close()
    finally:
        gymnasium.registry.pop("HereOnly-v0")


def test_what_cannot_be_handed_over_is_refused():
    lock = threading.Lock()
    with pytest.raises(InputError, match="Pendulum-v1 cannot be made in another process: TypeErr"):
        ProcessEnvironment(lambda: lock, gymnasium.make("Pendulum-v1"))


def test_its_process_ends_where_this_one_is_killed():
    code = (
        "import gymnasium, time\n"
        "from polygrad_fast.data.environment_process import ProcessEnvironment\n"
        "env = ProcessEnvironment('Pendulum-v1', gymnasium.make('Pendulum-v1'))\n"
        "env.reset(seed=0)\n"
        "print(env.process._process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    worker = int(owner.stdout.readline())
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    for _ in range(100):
        if not os.path.exists(f"/proc/{worker}") or "Z" in status(worker):
            return
        time.sleep(0.1)
    pytest.fail(f"process {worker} is still there")


def status(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"
