"""Stages are done once, whole, and checked."""

import numpy as np
import pytest

from polygrad_fast.data.collect import collect_episodes, random_actions
from polygrad_fast.data.environment import make_environment
from polygrad_fast.data.write import write_dataset
from polygrad_fast.errors import CheckpointError
from polygrad_fast.reproduce.stages import write_table


def test_a_result_is_computed_once_and_of_the_same_inputs(stages):
    calls = []

    def compute():
        calls.append(1)
        return {"value": 0.1 + 0.2, "none": None, "list": [1, 2]}

    first = stages.result("a/b", {"seed": 0, "sizes": (1, 2)}, compute)
    again = stages.result("a/b", {"seed": 0, "sizes": (1, 2)}, compute)
    assert first == again == compute() and len(calls) == 2
    with pytest.raises(CheckpointError, match="is of other options, .*'seed': 0.*give another --"):
        stages.result("a/b", {"seed": 1, "sizes": (1, 2)}, compute)
    path = stages.folder / "results" / "a" / "b.json"
    path.write_text(path.read_text()[:-9])
    with pytest.raises(CheckpointError, match="b.json is damaged"):
        stages.result("a/b", {"seed": 0, "sizes": (1, 2)}, compute)


def test_a_result_that_failed_leaves_nothing(stages):
    with pytest.raises(ZeroDivisionError):
        stages.result("a", {}, lambda: {"value": 1 / 0})
    assert stages.result("a", {}, lambda: {"value": 2}) == {"value": 2}


def test_a_dataset_is_made_once_and_its_recipe_checked(stages, told):
    def make(path):
        made.append(path)
        env = make_environment("Pendulum-v1")
        found = collect_episodes(env, random_actions(env, 0), 1, recipe={"recipe": "noise"})
        write_dataset(found, path, env)

    made = []
    path = stages.dataset("d", {"recipe": "noise"}, make)
    assert stages.dataset("d", {"recipe": "noise", "seed": 0}, make) == path and len(made) == 1
    assert told[0].startswith("dataset d: 200 steps of 1 episodes, mean return -")
    with pytest.raises(CheckpointError, match="must have recipe 'medium' in its recipe"):
        stages.dataset("d", {"recipe": "medium"}, make)


def test_tables_have_every_column(tmp_path):
    write_table(tmp_path / "t.csv", [{"a": 1, "b": None}, {"a": np.float64(0.5), "c": "x, y"}])
    assert (tmp_path / "t.csv").read_text() == 'a,b,c\n1,,\n0.5,,"x, y"\n'
