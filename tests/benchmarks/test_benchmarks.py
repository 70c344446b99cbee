"""The benchmarks and the GPU check run without a GPU as far as they can; a wrong result carries no
time."""

import concurrent.futures
import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cases import tiny_config
from harness.rows import Check, Row, RowFile, provenance, read_rows, write_rows
from harness.session import Session
from polygrad_fast.agent import PolyGRAD
from polygrad_fast.baselines import find_algorithm
from polygrad_fast.data import ReplayBuffer, ResumableEnvironment
from polygrad_fast.diffusion.trainer import DenoiserTrainer
from polygrad_fast.errors import InputError
from polygrad_fast.evaluation.environments import EvaluationEnvironments, build_environment
from polygrad_fast.evaluation.evaluator import Evaluator
from polygrad_fast.learners import IQL, TD3BC
from polygrad_fast.learners.a2c import ActorCritic
from polygrad_fast.runs.processor import Processor
from polygrad_fast.sampling.torch_engine import TorchEngine
from polygrad_fast.training.actor import Actor
from polygrad_fast.training.imagination import ImaginationTraining

ROOT = Path(__file__).parents[2]
GPU_CHECK = ROOT / "benchmarks" / "gpu_check.sh"
ENVIRONMENT = {
    # pytest-benchmark measures nothing in a worker of pytest-xdist, which these processes are not
    **{k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")},
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(sys.path),
    "TRITON_INTERPRET": "1",  # the kernels too, where there is triton
}
SAMPLER = "benchmarks/bench_sampler.py"


def command(*arguments) -> list[str]:
    words = ["--device", "cpu", "--smoke", "--benchmark-only", "-p", "no:cacheprovider"]
    return [sys.executable, "-m", "pytest", *map(str, arguments), *words]


def run(*arguments, plugin: Path | None = None) -> subprocess.CompletedProcess:
    """Run pytest over the tiny sizes on the CPU; `plugin` is a file to load first."""
    environment = dict(ENVIRONMENT)
    if plugin is not None:
        environment["PYTHONPATH"] += os.pathsep + str(plugin.parent)
        arguments = (*arguments, "-p", plugin.stem)
    return subprocess.run(
        command(*arguments), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def test_all_benchmarks_in_tiny_sizes(tmp_path):
    result = run("benchmarks/", "--rows", tmp_path / "rows.jsonl", "--commit", "abc-dirty")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = read_rows(tmp_path / "rows.jsonl")
    assert {row.benchmark for row in rows} == {
        "sample", "sampler step", "guided_step", "residual_mlp layer", "denoiser update",
        "A2C update", "offline update", "whole update", "environment step", "dynamics replay",
        "replay windows", "edm sample", "generalized_advantages",
    }  # fmt: skip
    sampled = {
        (row.case["engine"], row.case["denoiser"], row.dtype)
        for row in rows
        if row.benchmark == "sample"
    }
    assert sampled == {
        (engine, denoiser, dtype)
        for denoiser in ("residual_mlp", "transformer")
        for engine, dtype in (
            ("reference", "float32"), ("torch", "float32"), ("torch", "bfloat16")
        )
    }  # fmt: skip
    for row in rows:
        assert row.status == "ok" and row.checks and all(check.passed for check in row.checks)
        assert 0 < row.ms_min <= row.ms <= row.ms_max and row.us_per_item > 0
        assert (row.commit, row.dirty, row.device, row.threads) == ("abc", True, "cpu", 1)
        assert row.clock == "processor time" and row.torch and row.processor and row.smoke
        assert "--smoke" in row.command and row.command.startswith("OMP_NUM_THREADS=1 pytest ")
    for row in rows:
        if row.benchmark not in ("environment step", "dynamics replay", "replay windows"):
            assert row.flops > 0 and row.bytes > 0
            assert row.tflops > 0 and row.gb_per_s > 0 and row.share_of_floor > 0
    assert len(os.listdir(tmp_path)) == 1
    assert "sample engine=torch denoiser=transformer batch=5" in result.stdout


BROKEN = '''
"""Break engines: one a little, one into NaN, one in its own noise only; one raises."""
from harness import sampler_case

make_engine = sampler_case.make_engine


def broken(name, components, dtype):
    if name == "reference":
        raise RuntimeError("launch failed")
    engine = make_engine(name, components, dtype)
    sample, transformer = engine.sample, not hasattr(components.denoiser, "proj")

    def changed(s0, guidance_scale, generator, noise, return_chain):
        x, u, chain = sample(s0, guidance_scale, generator, noise, return_chain)
        for states, actions in [*zip(*(chain or ((), ())), strict=True), (x, u)]:
            if transformer:
                actions.mul_(2 if noise is None else 1)
            elif dtype == "float32":
                states[-1, -1, 0] += 1e-3
            else:
                actions[0, 0, 0] = float("nan")
        return x, u, chain

    engine.sample = changed
    return engine


sampler_case.make_engine = broken
'''


def test_a_wrong_result_carries_no_time_and_stops_nothing(tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    rows = tmp_path / "rows.jsonl"
    result = run(SAMPLER, "--rows", rows, plugin=tmp_path / "broken.py")
    assert result.returncode == 1
    found = {(row.case["engine"], row.case["denoiser"], row.dtype): row for row in read_rows(rows)}
    assert len(found) == 6
    assert all(row.ms is None and row.tflops is None for row in found.values())
    little = found["torch", "residual_mlp", "float32"]
    assert little.status == "wrong" and 1e-4 < little.checks[0].value < 1e-2
    nan = found["torch", "residual_mlp", "bfloat16"]
    assert nan.status == "wrong" and nan.checks[0].value is None
    noise = found["torch", "transformer", "float32"]
    assert noise.status == "wrong" and noise.checks[0].passed and not noise.checks[1].passed
    assert noise.checks[1].name == "timed result" and noise.ms_min is None
    raised = found["reference", "transformer", "float32"]
    assert raised.status == "error" and "launch failed" in raised.error
    assert result.stdout.count("FAILED") == 6


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measure(test, *listed) -> Row:
    """Run one tiny case of a benchmark in this process and return its row."""
    made = lambda device: provenance(device, None, commit="a" * 40)  # noqa: E731
    session = Session(torch.device("cpu"), RowFile(None), made, small=True)

    def case(benchmark, dtype, control=False, **names):
        return session.case(benchmark, dtype, **names)

    bench = SimpleNamespace(session=session, device=session.device, case=case)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        test(bench, *listed)
    finally:
        torch.set_num_threads(threads)
    (row,) = session.rows.added
    return row


def changed(owner, name, change):
    """Return what replaces a method by `change(method, *its arguments)`."""

    def apply(monkeypatch):
        method = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: change(method, *a, **k))

    return apply


def sign_of_the_actor(step, self, *arguments):
    for p in self.policy.parameters():
        p.grad.neg_()
    return step(self, *arguments)


def random_gradient_of_the_actor(step, self, *arguments):
    for p in self.policy.parameters():
        p.grad.copy_(torch.randn_like(p))
    return step(self, *arguments)


def without_steps(optimizer):
    def init(make, self, *arguments, **options):
        make(self, *arguments, **options)
        getattr(self, optimizer).step = lambda *_: None

    return init


def steps_without(name):
    def init(make, self, *arguments, **options):
        make(self, *arguments, **options)
        self.optimizers[name].step = lambda *_: None

    return init


def one_step_less(steps, self, batch, pairs, noise):
    return steps(self, batch, pairs, noise[:1])


def reversed_steps(optimizer):
    """The gradient is right, the step goes the other way."""

    def init(make, self, *arguments, **options):
        make(self, *arguments, **options)
        for group in getattr(self, optimizer).param_groups:
            group["maximize"] = True

    return init


def few_steps_of_long_chains(sample, self, *arguments):
    steps = self._steps
    self._steps = steps[:3] if len(steps) > 12 else steps
    try:
        return sample(self, *arguments)
    finally:
        self._steps = steps


def wrong_later(sample, self, *arguments):
    self.samples = getattr(self, "samples", 0) + 1
    states, actions, chain = sample(self, *arguments)
    return states, actions * (2 if self.samples > 1 else 1), chain


def without_guidance(sample, self, s0, guidance_scale, *arguments):
    return sample(self, s0, 0.0, *arguments)


def until_step_203(add, self, *arguments):
    if self.num_steps < 203:
        add(self, *arguments)


def other_end_of_the_episode(step, self, action):
    observation, reward, terminated, truncated = step(self, action)
    return observation, reward, not terminated, truncated


def one_window_repeated(sample, self, *arguments):
    windows = sample(self, *arguments)
    for tensor in vars(windows).values():
        tensor.copy_(tensor[:1].clone().expand_as(tensor))
    return windows


def fewer_trajectories(imagine, self, num_trajectories, *arguments, **options):
    return imagine(self, 4, *arguments, **options)


WHOLE = ("bench_training", "whole_update", "quick", "Pendulum-v1", 8, "torch", "float32")
A2C = ("bench_training", "a2c_update", 8, 4)
DENOISER = ("bench_training", "denoiser_update", "residual_mlp", 4, 3)
TD3_BC = ("bench_offline_agents", "offline_update", "td3_bc", 8)
SAMPLE = ("bench_sampler", "sample", "torch", "float32", 5, 3, "residual_mlp")
MUTATIONS = {
    "no policy update": (WHOLE, changed(ImaginationTraining, "update_policy", lambda *_: None)),
    "four trajectories": (
        WHOLE, changed(ImaginationTraining, "imagine", fewer_trajectories)
    ),
    "zero actions": (WHOLE, changed(Actor, "sample", lambda act, *a: np.zeros_like(act(*a)))),
    "no denoiser update": (WHOLE, changed(ImaginationTraining, "update_model", lambda *_: None)),
    "steps not stored": (WHOLE, changed(ReplayBuffer, "add", until_step_203)),
    "actor's sign": (A2C, changed(ActorCritic, "_step_actor", sign_of_the_actor)),
    "actor's gradient": (A2C, changed(ActorCritic, "_step_actor", random_gradient_of_the_actor)),
    "actor uphill": (A2C, changed(ActorCritic, "__init__", reversed_steps("actor_optimizer"))),
    "no actor step": (A2C, changed(ActorCritic, "__init__", without_steps("actor_optimizer"))),
    "no critic step": (A2C, changed(ActorCritic, "__init__", without_steps("critic_optimizer"))),
    "no denoiser step": (
        DENOISER, changed(DenoiserTrainer, "__init__", without_steps("optimizer"))
    ),
    "no critic step of TD3+BC": (TD3_BC, changed(TD3BC, "step_critics", one_step_less)),
    "no actor step of TD3+BC": (TD3_BC, changed(TD3BC, "__init__", steps_without("policy"))),
    "targets of TD3+BC stay": (TD3_BC, changed(TD3BC, "move_targets", lambda *_: None)),
    "no step of IQL": (("bench_offline_agents", "offline_update", "iql", 8),
                       changed(IQL, "__init__", steps_without("all"))),
    "short chain": (SAMPLE, changed(TorchEngine, "sample", few_steps_of_long_chains)),
    "wrong later": (SAMPLE, changed(TorchEngine, "sample", wrong_later)),
    "no guidance": (SAMPLE, changed(TorchEngine, "sample", without_guidance)),
    "no guidance, bfloat16": (
        (*SAMPLE[:3], "bfloat16", *SAMPLE[4:]), changed(TorchEngine, "sample", without_guidance)
    ),
    "terminals": (
        ("bench_data", "environment_steps", "Pendulum-v1", 20),
        changed(ResumableEnvironment, "step", other_end_of_the_episode),
    ),
    "repeated windows": (
        ("bench_data", "replay_windows", 5, 3), changed(ReplayBuffer, "sample", one_window_repeated)
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_library_is_not_timed(mutation, monkeypatch):
    (module, test, *case), apply = MUTATIONS[mutation]
    test = getattr(load(module), f"test_{test}")
    apply(monkeypatch)
    row = measure(test, *case)
    assert row.status in ("wrong", "error") and row.ms is None, (row.status, row.checks)
    assert row.status == "wrong" or mutation == "short chain", row.error


def quick_seeds(path, *words) -> subprocess.CompletedProcess:
    """Run the script in tiny sizes."""
    script = [sys.executable, "benchmarks/quick_seeds.py", "--env-id", "InvertedPendulum-v5"]
    words = ["--episodes", 3, "--rows", path, "--smoke", *words]
    return subprocess.run(
        [*script, *map(str, words)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_seeds_become_rows(tmp_path):
    """Each as soon as it is there; the rows of other seeds stay."""
    path = tmp_path / "rows.jsonl"
    result = quick_seeds(path, "--seeds", 7, 8, "--jobs", 2)
    assert result.returncode == 0, result.stderr
    first = {row.case["seed"]: row for row in read_rows(path)}
    assert set(first) == {7, 8} and result.stdout.count("\n") == 2
    result = quick_seeds(path, "--seeds", 8)
    assert result.returncode == 0, result.stderr
    second = {row.case["seed"]: row for row in read_rows(path)}
    assert second[7] == first[7] and set(second) == {7, 8}
    timed = ("train_seconds", "jobs")
    for row in (first[8], second[8]):
        assert row.case == {
            "env_id": "InvertedPendulum-v5",
            "preset": "quick",
            "world_model": "trajectory_diffusion",
            "seed": 8,
        }
        assert row.status == "ok" and row.smoke and row.threads == 1 and row.processor
        values = row.values
        assert values["train_steps"] == 90 and 0 < values["train_seconds"] < 60
        assert values["episodes"] == 3 and values["selection_evaluations"] == 3
        assert 2 * 3 <= values["selection_steps"] <= 2 * 3 * 1000
        assert values["evaluation_seed"] >= 2**31
        for policy in ("untrained", "best", "last"):
            assert 1 <= values[f"{policy}_mean_reward"] <= 1000
            assert values[f"{policy}_std_reward"] >= 0
        assert row.curves["env_step"] == [0, 80, 90]
        assert all(1 <= value <= 1000 for value in row.curves["mean_reward"])
    same = [{k: v for k, v in row[8].values.items() if k not in timed} for row in (first, second)]
    assert same[0] == same[1]  # a seed gives what it gave, alone or beside another
    result = quick_seeds(path, "--seeds", 8, "--total-timesteps", 95)
    assert result.returncode == 0, result.stderr
    (longer,) = (row for row in read_rows(path) if row.case["seed"] == 8)
    assert longer.values["train_steps"] == longer.curves["env_step"][-1] == 95


def test_world_models_are_judged(tmp_path, capsys):
    torch.manual_seed(0)
    config = tiny_config(world_model="autoregressive", sampler__denoiser_actions="clipped")
    agent = PolyGRAD("Pendulum-v1", seed=0, device="cpu", config=config, run_dir=tmp_path / "run")
    agent.learn(150)
    words = [str(tmp_path / "run"), "--rows", str(tmp_path / "rows.jsonl"), "--smoke"]
    module = load("world_models")
    chosen = ["residual MLP, released update", "rollout, exact", "autoregressive"]
    assert module.main([*words, "--only", *chosen]) == 0
    rows = read_rows(tmp_path / "rows.jsonl")
    assert {(row.case["world_model"], row.case["steps"]) for row in rows} == {
        ("residual MLP, released update", 16),
        ("rollout, exact", 5),  # the horizon and one
        ("autoregressive", 0),
    }
    for row in rows:
        assert row.case["env_id"] == "Pendulum-v1" and row.case["env_steps"] == 150
        assert row.status == "ok" and row.smoke and row.values["updates"] >= 1
        assert row.values["seconds_per_1000"] > 0 and -1 <= row.values["cosine"] <= 1
        if row.case["world_model"] != "residual MLP, released update":
            assert abs(row.values["on_policy/std"] - 1) < 0.2
    with pytest.raises(SystemExit):
        module.main([*words, "--only", "rollout"])
    assert "--only must be of ['residual MLP, released update', " in capsys.readouterr().err


@pytest.mark.parametrize("sets, rounded", [("avx2", 0), (None, 0), ("avx2 amx_bf16", 1)])
def test_bfloat16_is_attributed_where_the_processor_has_it(monkeypatch, sets, rounded):
    module = load("attribution")
    found = Processor(instruction_sets=sets)
    monkeypatch.setattr(module.Processor, "of_this_machine", lambda: found)
    names = [variant.name for variant in module.variants(module.SMOKE[0])]
    assert names[:3] == ["plain PyTorch", "+ engine torch", "+ written-out passes"]
    assert names[3:] == ["+ bfloat16"] * rounded


def test_an_updates_time_is_attributed(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    module = load("attribution")
    ways = [module.Variant("a", module.PLAIN, autograd=True), module.Variant("b", module.ROUNDED)]
    module.variants = lambda case: ways
    words = ["--smoke", "--rounds", "1", "--rows", str(path)]
    assert module.main(words) == 0
    rows = read_rows(path)
    assert [row.case["variant"] for row in rows] == ["a", "b"]
    for row in rows:
        v = row.values
        parts = [v[f"{part}_ms"] for part in module.PARTS]
        assert min(parts) > 0 and sum(parts) == pytest.approx(v["whole_ms"], rel=1e-6)
        assert v["env_steps"] == 2 and row.smoke
        assert v["hours_per_million_steps"] == pytest.approx(v["whole_ms"] * 5e5 / 3.6e6)
        assert v["times_as_fast"] == pytest.approx(rows[0].values["whole_ms"] / v["whole_ms"])
    ways[:] = [module.Variant("c", module.ENGINE, python="/bin/false")]
    with pytest.raises(SystemExit):
        module.main(words)
    assert "c cannot be measured" in capsys.readouterr().err


def test_two_commits_learn_the_same_seeds(tmp_path, capsys):
    """Here this code is both: its curves are equal, by the command line and with its settings."""
    path = tmp_path / "rows.jsonl"
    module = load("learning_curves")
    words = ["--env-id", "Pendulum-v1", "--seeds", "3", "--rows", str(path), "--smoke"]
    assert module.main([*words, "--against", "abc", sys.executable]) == 0
    first, second = read_rows(path)
    assert (first.case["code"], second.case["code"]) == ("commit abc", module.THIS)
    assert first.curves == second.curves and first.curves["env_step"] == [0, 80, 90]
    for row in (first, second):
        assert row.values["train_steps"] == 90 and 0 < row.values["processor_seconds"] < 60
        assert row.smoke and sys.executable not in row.command
    for python, message in (("/bin/false", "did not train"), ("/no/python", "cannot be run")):
        with pytest.raises(SystemExit) as stopped:
            module.main([*words, "--against", "abc", python])
        assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_action_updates_are_compared(tmp_path):
    words = ["--env-id", "Pendulum-v1", "--seeds", "3", "--rows", str(tmp_path / "rows.jsonl")]
    module = load("on_policy")
    assert module.main([*words, "--smoke"]) == 0
    rows = read_rows(tmp_path / "rows.jsonl")
    assert [(row.case["update"], row.case["sigma"]) for row in rows] == [
        (update, sigma) for update in ("released", "paper", "exact") for sigma in module.SIGMAS
    ]
    for row in rows:
        assert row.case["env_id"] == "Pendulum-v1" and row.case["seed"] == 3 and row.smoke
        exact = row.case["update"] == "exact"
        assert ("guidance_scale" in row.values) == (not exact)
        if exact:
            assert (
                abs(row.values["std"] - 1) < 0.2 and row.values["ks"] < 4 * row.values["ks_floor"]
            )
    with pytest.raises(SystemExit):
        module.main([*words, "--env-id", "Wings-v0"])


def test_a_model_free_algorithm_becomes_a_row(tmp_path):
    """Its policies play the same fresh episodes as those of a world model."""
    pytest.importorskip("stable_baselines3")
    path = tmp_path / "rows.jsonl"
    result = quick_seeds(path, "--seeds", 7, "--model-free", "sac")
    assert result.returncode == 0, result.stderr
    (row,) = read_rows(path)
    assert row.case["world_model"] == "none, SAC" and row.status == "ok"
    assert row.values["train_steps"] == row.curves["env_step"][-1] == 90
    best = max(row.curves["mean_reward"])
    at = [s for s, r in zip(*row.curves.values(), strict=True) if r == best][-1]
    assert row.values["best_step"] == at
    evaluation_seed = load("quick_seeds").evaluation_seed("InvertedPendulum-v5", "quick", 7)
    assert row.values["evaluation_seed"] == evaluation_seed and row.values["episodes"] == 3
    untrained = find_algorithm("sac")("MlpPolicy", "InvertedPendulum-v5", seed=7, device="cpu")
    environments = EvaluationEnvironments(
        build_environment("InvertedPendulum-v5"), "InvertedPendulum-v5"
    )
    evaluator = Evaluator(
        lambda observations, _: untrained.predict(observations, deterministic=True)[0],
        environments,
        evaluation_seed,
    )
    wanted = evaluator.evaluate(3).mean_reward
    assert row.values["untrained_mean_reward"] == pytest.approx(wanted, abs=0.01)


def test_world_models_need_a_run(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        load("world_models").main([str(tmp_path / "nothing")])
    assert stopped.value.code == 2 and "nothing" in capsys.readouterr().err


def test_a_seed_that_fails_is_a_row_and_stops_no_other(tmp_path, monkeypatch):
    module = load("quick_seeds")
    options = SimpleNamespace(
        env_id=["a", "b"],
        preset="quick",
        world_model="autoregressive",
        seeds=[1, 2],
        episodes=1,
        jobs=2,
        smoke=True,
        total_timesteps=95,
    )
    rows = module.rows_of(options, provenance(torch.device("cpu"), None, commit="a" * 40))

    class Pool(concurrent.futures.ThreadPoolExecutor):
        def __init__(self, jobs, context, max_tasks_per_child):
            super().__init__(jobs)

    def run_seed(env_id, preset, world_model, seed, episodes, smoke, total_timesteps):
        assert (world_model, total_timesteps) == ("autoregressive", 95)
        if (env_id, seed) == ("a", 2):
            raise InputError("no such thing")
        return {"best_mean_reward": 1.0}, {"env_step": [0, 10], "mean_reward": [0.5, 1.0]}

    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(module, "run_seed", run_seed)
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    file = RowFile(tmp_path / "rows.jsonl")
    assert module.measure(options, file, rows) == 1
    stored = {(row.case["env_id"], row.case["seed"]): row for row in read_rows(file.path)}
    assert len(stored) == 4
    failed = stored.pop(("a", 2))
    assert (failed.status, failed.error) == ("error", "InputError: no such thing")
    for row in stored.values():
        assert row.status == "ok" and row.values == {"best_mean_reward": 1.0, "jobs": 2}
        assert row.curves == {"env_step": [0, 10], "mean_reward": [0.5, 1.0]}


def test_what_was_measured_is_left_out_on_resume(tmp_path, monkeypatch):
    module, ran = load("quick_seeds"), []
    made = provenance(torch.device("cpu"), None, commit="a" * 40)
    monkeypatch.setattr(module, "provenance", lambda *_: made)
    monkeypatch.setattr(
        module, "measure", lambda options, file, rows: [ran.append(row.case) for row in rows] and 0
    )
    words = ["--env-id", "Pendulum-v1", "--seeds", "1", "2", "--rows", str(tmp_path / "rows.jsonl")]
    (row, _) = module.rows_of(
        SimpleNamespace(
            env_id=["Pendulum-v1"],
            preset="quick",
            world_model="trajectory_diffusion",
            seeds=[1, 2],
            smoke=False,
        ),
        made,
    )
    RowFile(tmp_path / "rows.jsonl").add(row)
    module.main([*words, "--resume"])
    assert [case["seed"] for case in ran] == [2]
    module.main(words)
    assert [case["seed"] for case in ran] == [2, 1, 2]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--seeds", "-1"], "--seeds must be in [0, 2^31), got -1"),
        (["--seeds", str(2**31)], "--seeds must be in [0, 2^31)"),
        (["--seeds", "1", "--episodes", "0"], "--episodes must be at least 1, got 0"),
        (["--seeds", "1", "--jobs", "0"], "--jobs must be at least 1, got 0"),
        (
            ["--seeds", "1", "--total-timesteps", "0"],
            "--total-timesteps must be at least 1, got 0",
        ),
        (["--seeds", "1", "--env-id", "Wings-v0"], "Wings"),
    ],
)
def test_bad_seeds_are_refused_before_any_work(words, message, capsys):
    with pytest.raises(SystemExit):
        load("quick_seeds").main(["--env-id", "Pendulum-v1", *words])
    assert message in capsys.readouterr().err


def test_evaluation_episodes_are_seen_by_nothing_else(monkeypatch):
    """Neither by another row nor by the evaluations that choose the best checkpoint."""
    module = load("quick_seeds")
    played = []
    monkeypatch.setattr(
        "polygrad_fast.evaluation.evaluator.evaluate_policy",
        lambda act, environments, seeds: played.append(seeds),
    )
    agents = {seed: PolyGRAD("Pendulum-v1", "quick", seed, "cpu") for seed in (100, 101, 102)}
    for seed, agent in agents.items():
        agent.evaluate(agent.config.eval_episodes)
        for preset in ("quick", "default"):
            fresh = module.evaluation_seed("Pendulum-v1", preset, seed)
            assert 2**31 <= fresh < 2**32
            agent.evaluate(100, fresh)
    episodes = [seed for seeds in played for seed in seeds]
    assert len(episodes) == 3 * (agents[100].config.eval_episodes + 200)
    assert len(set(episodes)) == len(episodes)
    others = {
        module.evaluation_seed(env_id, "quick", seed)
        for env_id in ("InvertedPendulum-v5", "Pendulum-v1", "Hopper-v5")
        for seed in range(300)
    }
    assert len(others) == 900
    assert module.evaluation_seed("Pendulum-v1", "quick", 100) == 3355117035


def test_the_cost_of_selection():
    module = load("quick_seeds")
    metrics = [
        {"env_step": 0, "eval/mean_episode_length": 12.5},
        {"env_step": 100, "denoiser/loss": 1.0},
        {"env_step": 500, "eval/mean_episode_length": 200.0},
    ]
    cost = module.selection_cost(metrics, 32)
    assert cost == {"selection_evaluations": 2, "selection_steps": 6800}


LOST = '''
"""The device is lost after the second case of the first process."""
from pathlib import Path

from harness.session import Session


def is_lost(self):
    flag = Path(__file__).with_name("lost")
    if len(self.rows.added) < 2 or flag.exists():
        return False
    flag.touch()
    return True


Session.is_lost = is_lost
'''


def test_after_a_lost_device_a_new_process_goes_on(tmp_path):
    """The loop of the GPU check around the benchmarks."""
    (tmp_path / "lost.py").write_text(LOST)
    rows = tmp_path / "rows.jsonl"
    (loop,) = re.findall(r"^begin_again='(.*?)'$", GPU_CHECK.read_text(), re.DOTALL | re.MULTILINE)
    words = command(SAMPLER, "--rows", rows, "--resume", "--commit", "abc", "-p", "lost")
    result = subprocess.run(
        ["bash", "-c", loop, "loop", "100", *words],
        cwd=ROOT,
        env={**ENVIRONMENT, "PYTHONPATH": f"{ENVIRONMENT['PYTHONPATH']}{os.pathsep}{tmp_path}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("the device is lost for this process") == 1
    assert "2 cases not measured: its row is stored" in result.stdout
    stored = read_rows(rows)
    assert len(stored) == 6 and all(row.status == "ok" for row in stored)
    budgets = [float(row.command.rsplit(" ", 1)[1]) for row in stored]
    assert budgets[0] == budgets[1] == 100 > budgets[2] > 50


def test_time_budget(tmp_path):
    rows = tmp_path / "rows.jsonl"
    result = run(SAMPLER, "--rows", rows, "--time-budget", 0)
    assert result.returncode == 0 and not rows.exists()
    assert "6 cases not measured: the time budget of 0 s is spent" in result.stdout


def test_rows_that_cannot_be_read(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    result = run(SAMPLER, "--rows", tmp_path / "rows.jsonl")
    assert result.returncode == 4
    assert re.fullmatch(r"ERROR: .*rows.jsonl, line 1: the row lacks .*\s*", result.stderr)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without a GPU")
def test_a_device_that_is_not_there():
    words = [word if word != "cpu" else "cuda" for word in command(SAMPLER)]
    result = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 4
    assert result.stderr.strip() == "ERROR: --device cuda given, but torch finds no CUDA GPU"


@dataclass(frozen=True)
class OnGPU:
    device = torch.device("cuda")
    smoke = False


def test_order_of_cases_on_a_gpu():
    bench = load("bench_sampler")
    cases = sorted(bench.list_cases(OnGPU()), key=lambda pair: pair[0])
    words = ["{engine} {dtype} {denoiser} B={batch} H={horizon}".format(**c) for _, c in cases]
    too_long = 2 * 9  # transformer, 16384 trajectories, H = 50 and 200
    assert len(words) == len(set(words)) == 12 * (13 + 9) - too_long
    assert words[:3] == [
        "triton float16 residual_mlp B=1024 H=10",
        "torch float16 residual_mlp B=1024 H=10",
        "reference float32 residual_mlp B=1024 H=10",
    ]
    controls = [word for word in words if word.startswith("compile")]
    assert controls[0] == "compile float16 residual_mlp B=1024 H=10"
    assert words[-len(controls) :] == controls


def test_gpu_check_is_a_script_whose_parts_exist():
    text = GPU_CHECK.read_text()
    subprocess.run(["bash", "-n", GPU_CHECK], check=True)
    paths = set(re.findall(r"\b(?:tests|benchmarks|kernels)/[\w/]+\.(?:py|sh)", text))
    assert {"benchmarks/profile_sampler.py", "tests/training/test_gpu_training.py"} <= paths
    for path in paths:
        assert (ROOT / path).is_file(), path
    (selected,) = re.findall(r'-k "([\w ]+)"', text)
    kernels = ROOT / "tests" / "kernels"
    tests = (kernels / "test_guided_step.py").read_text()
    tests += (kernels / "test_residual_mlp.py").read_text()
    for name in selected.split(" or "):
        assert f"def test_{name}(" in tests
    offered = (ROOT / "benchmarks" / "conftest.py").read_text()
    for option in ("rows", "resume", "time-budget", "commit", "tests"):
        assert f" --{option}" in text and f'"--{option}"' in offered


STAND_IN = """#!/usr/bin/env bash
# Stands for python on a machine with a GPU.
echo "$*" >>"$CALLS"
case "$*" in
    "-") echo "GPU sm_90 132 multiprocessors" ;;
    "- "*) exec "$REAL_PYTHON" "$@" ;;
    "-c import xdist") exit 1 ;;
    *benchmark-only*) [[ -z $ROWS ]] || cp "$ROWS" "$OUT/rows.jsonl" ;;
    *"$SKIPPING"*) echo "SKIPPED [2] test_it.py:7: $REASON" ;;
esac
"""


def gpu_check(tmp_path, rows=(), skipping="nothing", reason="", **environment):
    """Run the GPU check with a stand-in for python; return exit code, summary and its calls."""
    stand_in, out, calls = tmp_path / "python", tmp_path / "out", tmp_path / "calls"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    stored = ""
    if rows:
        stored = str(tmp_path / "stored.jsonl")
        write_rows(stored, rows)
    result = subprocess.run(
        ["bash", GPU_CHECK, out],
        env={
            **os.environ,
            "PYTHON": str(stand_in),
            "REAL_PYTHON": sys.executable,
            "OUT": str(out),
            "CALLS": str(calls),
            "ROWS": stored,
            "SKIPPING": skipping,
            "REASON": reason,
            "POLYGRAD_COMMIT": "a" * 40,
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    return result.returncode, (out / "summary.txt").read_text(), calls.read_text().splitlines()


def timed_row(engine="triton") -> Row:
    case = {"engine": engine, "denoiser": "residual_mlp", "batch": 1024, "horizon": 10}
    facts = vars(provenance(torch.device("cpu"), None, "a" * 40))
    facts |= {"checks": (Check("largest error", 1e-6, 1e-4),), "status": "ok", "ms": 9.0}
    return Row(**facts, benchmark="sample", dtype="float16", case=case)


def test_gpu_check_passes(tmp_path):
    """Wheels are installed first, kernels compiled beside the tests, times taken last."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "a.whl").touch()
    code, summary, calls = gpu_check(
        tmp_path, [timed_row()], "tests/kernels", "what happens without a GPU", WHEELS=str(wheels)
    )
    assert code == 0, summary
    assert calls[0].startswith("-m pip install") and calls[0].endswith("a.whl")
    order = ["tests/parity", "test_gpu_training", "--benchmark-only", "--kernel-times"]
    at = [next(i for i, call in enumerate(calls) if word in call) for word in order]
    assert at == sorted(at)
    (compiling,) = (call for call in calls if "compile_sample.py" in call)
    assert "compile_sample.py 90 --timed" in compiling and calls.index(compiling) < at[1]
    (timing,) = (call for call in calls if "--benchmark-only" in call)
    assert f"--commit {'a' * 40}" in timing and "--tests passed" in timing


@pytest.mark.parametrize(
    "skipping, engine, wanted",
    [
        ("tests/kernels", "triton", "test_it.py:7: needs a CUDA GPU"),
        ("nothing", "torch", "no time of engine triton at B = 1024, H = 10"),
    ],
)
def test_gpu_check_fails(tmp_path, skipping, engine, wanted):
    """Where a test of the GPU is skipped, and where the engine it is about has no time."""
    code, summary, _ = gpu_check(tmp_path, [timed_row(engine)], skipping, "needs a CUDA GPU")
    assert code == 1 and wanted in summary, summary


def test_gpu_check_wants_a_commit(tmp_path):
    """It travels apart where the checkout is no git repository."""
    (tmp_path / "benchmarks").mkdir()
    script = tmp_path / "benchmarks" / "gpu_check.sh"
    script.write_text(GPU_CHECK.read_text())
    environment = {k: v for k, v in os.environ.items() if k != "POLYGRAD_COMMIT"}
    command = ["bash", script, tmp_path / "out"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and "POLYGRAD_COMMIT must name the commit" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without a GPU")
def test_gpu_check_says_what_is_missing(tmp_path):
    result = subprocess.run(
        ["bash", GPU_CHECK, tmp_path / "out"],
        env={**os.environ, "PYTHON": sys.executable, "POLYGRAD_COMMIT": "a" * 40},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 2
    assert "no CUDA GPU" in result.stdout or "missing packages: triton" in result.stdout
    assert os.listdir(tmp_path / "out") == ["summary.txt"]
    usage = subprocess.run(["bash", GPU_CHECK], capture_output=True, text=True)
    assert usage.returncode == 2 and "OUT_DIR" in usage.stderr
