"""A process that takes whole updates of Algorithm 3 when it is told to, and says what each part of
them took.

    python harness/update_worker.py SETTINGS

SETTINGS is JSON; see `attribution.py`, which starts one process per variant. It runs in checkouts
of other commits too, with their own interpreter, and imports nothing but the package. Its first
line is its configuration, then comes one per line that it reads.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
import sys
import time
from collections.abc import Callable

import torch

import polygrad_fast as pg

PREFILL = 200


def replaced(config, options: dict):
    """Return a configuration with the options, nested ones too, that it has."""
    changes = {}
    for field in dataclasses.fields(config):
        if field.name in options:
            value, own = options[field.name], getattr(config, field.name)
            changes[field.name] = replaced(own, value) if isinstance(value, dict) else value
    return dataclasses.replace(config, **changes)


class Clock:
    """Adds up processor seconds by part; a part within another counts for itself only."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._running: list[list[float]] = []  # when it began, and what parts within it took

    def __call__(self, part: str, call: Callable) -> Callable:
        """Return a function that counts for a part."""

        def timed(*arguments, **options):
            self._running.append([time.process_time(), 0.0])
            try:
                return call(*arguments, **options)
            finally:
                begun, within = self._running.pop()
                took = time.process_time() - begun
                self.seconds[part] = self.seconds.get(part, 0.0) + took - within
                if self._running:
                    self._running[-1][1] += took

        return timed


def parts_of(agent) -> dict[str, tuple[object, tuple[str, ...]]]:
    """Return the objects and methods that make each part, at commit 690a659 too."""
    training = getattr(agent, "training", None)
    if training is None:
        return {
            "replay": (agent.replay, ("sample",)),
            "model_update": (agent, ("_update_denoiser",)),
            "imagine": (agent, ("imagine",)),
            "policy_update": (agent.actor_critic, ("update",)),
        }
    return {
        "replay": (agent.replay, ("draw", "windows")),
        "model_update": (training, ("update_model",)),
        "imagine": (training, ("imagine",)),
        "policy_update": (training.learner, ("step",)),
    }


def step_of(agent) -> Callable[[], object]:
    """Return what takes one environment step with all updates due after it."""
    if hasattr(agent, "step"):
        return agent.step
    speed = vars(sys.modules["polygrad_fast.agent"])["_Speed"](0)
    return functools.partial(operator.methodcaller("_step", speed), agent)


def main(settings: dict) -> None:
    """Build the agent, say its configuration, and take as many updates as each line that comes in
    says."""
    torch.set_num_threads(1)
    config = pg.TrainConfig.from_preset(settings["preset"])
    config = replaced(config, settings["options"])
    agent = pg.PolyGRAD(settings["env_id"], settings["preset"], 0, "cpu", config)
    if settings["autograd"]:  # a network that is watched is differentiated by autograd
        learner = agent.training.learner
        for network in (agent.world_model.trainer.model, learner.value_function):
            network.register_forward_hook(lambda *_: None)
    agent.environment.reset()
    step = step_of(agent)
    env_steps = round(1 / config.policy_updates_per_env_step)

    def update() -> None:
        for _ in range(env_steps):
            step()

    while agent.num_timesteps < config.learning_starts:
        step()
    update(), update()
    clock = Clock()
    for part, (owner, names) in parts_of(agent).items():
        for name in names:
            setattr(owner, name, clock(part, getattr(owner, name)))
    print(json.dumps(dataclasses.asdict(config)), flush=True)
    for line in sys.stdin:
        clock.seconds = {}
        for _ in range(int(line)):
            clock("rest", update)()
        found = {part: seconds / int(line) for part, seconds in clock.seconds.items()}
        found |= {"whole": sum(found.values()), "env_steps": env_steps}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
