"""The experiments of PolyGRAD, with tiny sizes."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch

from polygrad_fast import cli
from polygrad_fast.config import SamplerConfig, TrainConfig, TrainingScale, WorldModelScale
from polygrad_fast.data.policy_file import PolicyFacts, StoredPolicy, save_policy
from polygrad_fast.errors import CheckpointError, InputError, NonFiniteError
from polygrad_fast.offline.world_model import WorldModelTraining
from polygrad_fast.reproduce import fig3, fig4, fig5, fig6, fig8
from polygrad_fast.reproduce.polygrad import ModelExperiment
from polygrad_fast.reproduce.polygrad_models import MODELS, Variant, training_config, variants
from polygrad_fast.reproduce.polygrad_returns import ABLATIONS, ablated, smoothed_curve
from polygrad_fast.training.imagination import ImaginationTraining
from polygrad_fast.world_models import Autoregressive

ENV = "InvertedPendulum-v5"


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def has_figure(stages, name):
    return (stages.folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_errors_of_all_models_at_every_step(stages, tiny_models, told):
    scale = dataclasses.replace(tiny_models, horizons=(4,))
    rows = fig5(stages, scale, (0,))
    names = {(row["model"], row["steps"]) for row in rows}
    diffused = ("official", "paper", "exact", "rollout")
    wanted = {(name, steps) for name in diffused for steps in (6, 3)}
    wanted |= {(name, None) for name in MODELS if name not in diffused}
    assert names == wanted - {("rollout", 3)}  # too few to settle in
    assert len(rows) == 3 * len(names)
    for row in rows:
        assert row["paper"] is None
        if row["seeds"]:
            assert 0 <= row["low"] <= row["iqm"] <= row["high"] and row["floor"] < 1e-6
    written = table(stages.folder / "fig5.csv")
    assert [row["model"] for row in written] == [row["model"] for row in rows]
    assert has_figure(stages, "fig5")
    count = len(told)
    assert fig5(stages, scale, (0,)) == rows and len(told) == count
    with pytest.raises(CheckpointError, match="is of other options, .* give another --out"):
        fig5(stages, dataclasses.replace(scale, measured_trajectories=9), (0,))


def test_cost_beside_error_and_actions_of_the_same_trajectories(stages, tiny_models, told):
    scale = dataclasses.replace(tiny_models, models=("official", "exact", "autoregressive"))
    scale = dataclasses.replace(scale, diffusion_steps=(3,))
    errors = fig5(stages, scale, (0, 1))
    first = {json.dumps(row["iqm"]) for row in errors if row["step"] == 2}
    assert len(first) == 5  # one step at a time the first steps are the same at both horizons
    trained = {path.name for path in (stages.folder / "world_models" / ENV).iterdir()}
    wanted = ("official-3", "official-5", "autoregressive")  # exact imagines with the first two
    assert trained == {f"{name}-{seed}" for name in wanted for seed in (0, 1)}
    count = len(told)
    rows = fig4(stages, scale, (0, 1))
    assert all("for 1,000 trajectories" in line for line in told[count:])  # nothing else anew
    by_name = {(row["model"], row["horizon"], row["steps"], row["quantity"]): row for row in rows}
    for horizon, variant in ((h, v) for h in (3, 5) for v in variants(scale, h)):
        last = by_name[*variant, "last_mse"]
        at_end = next(
            row
            for row in errors
            if (row["model"], row["horizon"]) == variant[:2] and row["step"] == horizon - 1
        )
        assert last["iqm"] == at_end["iqm"] and last["seeds"] == at_end["seeds"] > 0
        assert by_name[*variant, "seconds_per_1000"]["iqm"] > 0
        assert by_name[*variant, "ks"]["iqm"] > 0
    assert len(rows) == 6 * 12 and has_figure(stages, "fig4")
    assert len(table(stages.folder / "fig4.csv")) == len(rows)


def test_exact_actions_are_the_policys_at_every_deviation(stages, tiny_models):
    scale = dataclasses.replace(
        tiny_models, models=("exact", "official", "ensemble"), measured_trajectories=40
    )
    rows = fig3(stages, scale, (0,))
    assert {row["horizon"] for row in rows} == {3}
    found = {
        (row["model"], row["steps"], row["sigma"]): row["iqm"]
        for row in rows
        if row["statistic"] == "ks"
    }
    floor = next(row["iqm"] for row in rows if row["statistic"] == "ks_floor")
    assert set(found) == {
        (name, k, sigma)
        for name, steps in (("exact", (6, 3)), ("official", (6, 3)), ("ensemble", (None,)))
        for k in steps
        for sigma in (0.5, 0.1)
    }
    for (name, _, _), ks in found.items():
        if name != "official":
            assert ks < 2.2 * floor
    assert found["official", 3, 0.1] > 3 * floor  # a guidance scale of two samples is none
    wanted = {row["statistic"]: row["on_policy"] for row in rows}
    assert wanted["std"] == 1 and wanted["kurtosis"] == 3 and wanted["ks"] is None
    assert has_figure(stages, "fig3") and len(table(stages.folder / "fig3.csv")) == len(rows)


def test_an_interrupted_experiment_continues_where_it_stopped(
    stages, tiny_models, told, monkeypatch
):
    scale = dataclasses.replace(
        tiny_models, models=("autoregressive", "paper"), horizons=(3,), diffusion_steps=(6,)
    )
    update = WorldModelTraining.update

    class Killed(Exception):
        pass

    def dying(training):
        update(training)
        if training.num_updates == 4 and training.config.world_model == "trajectory_diffusion":
            raise Killed

    monkeypatch.setattr(WorldModelTraining, "update", dying)
    with pytest.raises(Killed):
        fig5(stages, scale, (0,))
    done = list(told)
    assert [line.split(":")[0] for line in done] == [
        f"dataset {ENV}-mixed-noise",
        f"world_models/{ENV}/autoregressive-0",
        f"{ENV}, autoregressive, horizon 3, seed 0",
    ]
    assert not (stages.folder / "fig5.csv").exists()
    monkeypatch.setattr(WorldModelTraining, "update", update)
    rows = fig5(stages, scale, (0,))
    assert [line.split(":")[0] for line in told[len(done) :]] == [
        f"world_models/{ENV}/paper-3-0", f"{ENV}, paper, 6 steps, horizon 3, seed 0"
    ]  # fmt: skip
    whole = type(stages)(stages.folder.parent / "whole", lambda line: None)
    assert fig5(whole, scale, (0,)) == rows


def test_held_out_states_are_of_no_episode_that_was_trained_on(stages, tiny_models):
    experiment = ModelExperiment(stages, tiny_models)
    scene = experiment.scene(ENV)
    trained = {row.tobytes() for row in scene.draw_starts(2000, torch.Generator()).numpy()}
    starts = scene.starts(scene.windows(5)).numpy()
    assert len({row.tobytes() for row in starts}) == 8 and not trained & {
        row.tobytes() for row in starts
    }
    found = scene.replay.play(scene.windows(5).states, scene.windows(5).actions)
    recorded = scene.windows(5).played.observations
    assert np.allclose(found.observations, recorded, atol=1e-4, equal_nan=True)


def test_a_model_that_is_not_finite_has_no_numbers(stages, tiny_models, monkeypatch):
    def imagine(*arguments, **options):
        raise NonFiniteError("observations hold NaN")

    scale = dataclasses.replace(tiny_models, models=("autoregressive",), horizons=(3,))
    monkeypatch.setattr("polygrad_fast.reproduce.polygrad.imagine", imagine)
    monkeypatch.setattr("polygrad_fast.diagnostics.actions.imagine", imagine)
    assert [row["seeds"] for row in fig5(stages, scale, (0,))] == [0, 0]
    assert {row["seeds"] for row in fig3(stages, scale, (0,))} == {0}
    counts = {row["quantity"]: row["seeds"] for row in fig4(stages, scale, (0,))}
    assert counts.pop("seconds_per_1000") == 1 and set(counts.values()) == {0}


def test_variants_are_trained_as_they_say():
    scale = WorldModelScale()
    paper = training_config(scale, "Hopper-v5", "paper", 10)
    assert paper.sampler == SamplerConfig.paper(denoiser_actions="clipped")
    assert paper.denoiser.step_conditioning == "layer" and paper.schedule.tau == 0.1
    assert paper.schedule.num_train_timesteps == 128 and paper.denoiser.batch_size == 32
    rollout = training_config(scale, "Walker2d-v5", "rollout", 50)
    assert rollout.denoiser.kind == "rollout" and rollout.horizon == 50
    assert training_config(scale, "Hopper-v5", "transformer", None).horizon == 15
    assert training_config(scale, "Hopper-v5", "ensemble", None).horizon == 10
    big = training_config(WorldModelScale.from_scale("paper"), "Hopper-v5", "official", 50)
    assert big.denoiser.kind == "transformer" and big.denoiser.hidden_dim == 312
    assert big.denoiser.batch_size == 256 and big.schedule.tau == 1.0
    exact = Variant("exact", 10, 16)
    assert exact.sampler.num_inference_steps == 16 and not exact.is_guided
    assert Variant("official", 10, 16).is_guided and Variant("ensemble", 10, None).sampler is None
    assert [v.steps for v in variants(scale, 50) if v.model == "rollout"] == [128]


def test_returns_beside_model_free_algorithms(stages, tiny_trainings, told):
    rows = fig6(stages, tiny_trainings, (0, 1))
    assert {(row["algorithm"], row["env_step"]) for row in rows} == {
        (name, step) for name in ("autoregressive", "ppo") for step in (0, 60, 120)
    }
    assert all(row["seeds"] == 2 and row["met_nan"] == 0 and row["iqm"] >= 1 for row in rows)
    assert has_figure(stages, "fig6") and len(table(stages.folder / "fig6.csv")) == len(rows)
    stored = json.loads((stages.folder / f"trainings/{ENV}/ppo-1/config.json").read_text())
    assert stored["total_timesteps"] == 120 and stored["seed"] == 1
    count = len(told)
    assert fig6(stages, tiny_trainings, (0, 1)) == rows and len(told) == count
    longer = dataclasses.replace(tiny_trainings, total_timesteps=180)
    with pytest.raises(CheckpointError, match="is of other options"):
        fig6(stages, longer, (0,))


def test_an_interrupted_training_continues_and_a_baseline_begins_anew(
    stages, tiny_trainings, told, monkeypatch
):
    update = Autoregressive.update
    count = []

    def interrupted(model, *arguments):
        count.append(1)
        if len(count) == 20:
            raise KeyboardInterrupt
        return update(model, *arguments)

    monkeypatch.setattr(Autoregressive, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fig6(stages, tiny_trainings, (0,))
    left = stages.folder / "trainings" / ENV / "ppo-0-unfinished"
    left.mkdir(parents=True)
    (left / "config.json").write_text("{")
    rows = fig6(stages, tiny_trainings, (0,))
    assert not left.exists() and len(rows) == 6
    path = stages.folder / "results" / "trainings" / ENV / "ppo-0.json"
    path.unlink()
    assert fig6(stages, tiny_trainings, (0,)) == rows  # of the finished run
    path.unlink()
    config = stages.folder / "trainings" / ENV / "ppo-0" / "config.json"
    config.write_text(config.read_text().replace('"seed": 0', '"seed": 4'))
    with pytest.raises(CheckpointError, match="its seed is 4, got 0: give another --out"):
        fig6(stages, tiny_trainings, (0,))


def test_ablations_are_options_of_a_training(stages, tiny_trainings):
    rows = fig8(stages, tiny_trainings, (0,))
    assert {row["ablation"] for row in rows} == {"base", "random_actions"}
    run = stages.folder / "trainings" / ENV / "ablation-random_actions-0"
    assert json.loads((run / "config.json").read_text())["config"]["sampler"]["action_update"] == (
        "none"
    )
    assert has_figure(stages, "fig8")


def test_ablations_of_the_released_sampler():
    base = TrainConfig.from_preset("laptop")
    found = {name: ablated(base, name) for name in ABLATIONS}
    plain = found["base"]
    assert plain.sampler == SamplerConfig.official(denoiser_actions="clipped")
    assert plain.denoiser.kind == "residual_mlp" and plain.schedule.num_train_timesteps == 16
    assert plain.denoiser.hidden_dim == base.denoiser.hidden_dim
    for name, options in ABLATIONS.items():
        changed = dataclasses.asdict(found[name].sampler)
        assert {
            key for key, value in dataclasses.asdict(plain.sampler).items() if changed[key] != value
        } == set(options)
    full = ablated(TrainConfig.from_preset("default"), "no_clipping")
    assert full.sampler == SamplerConfig.official(clip_std=None)
    assert full.schedule == TrainConfig().schedule and full.guidance == TrainConfig().guidance


def test_a_training_that_meets_nan_keeps_its_last_evaluation(stages, tiny_trainings, monkeypatch):
    update = ImaginationTraining.update_policy

    def failing(training, count=1):
        if training.following_step > 70:
            raise NonFiniteError("actor_loss is nan")
        update(training, count)

    monkeypatch.setattr(ImaginationTraining, "update_policy", failing)
    rows = fig8(stages, dataclasses.replace(tiny_trainings, ablations=("base",)), (0,))
    assert [row["env_step"] for row in rows] == [0, 60]
    assert all(row["met_nan"] == 1 for row in rows)
    stopped = {"env_steps": [0, 10], "returns": [1.0, 3.0]}
    assert smoothed_curve(stopped, [0, 10, 20, 30], 1) == [1.0, 3.0, 3.0, 3.0]
    assert smoothed_curve(stopped, [0, 10, 20], 2) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("experiment", "options", "message"),
    [
        (fig5, {"models": ("dreamer",)}, "models must be of .*, got 'dreamer'"),
        (fig5, {"env_ids": ("Nope-v1",)}, "--medium-return must be given for Nope-v1"),
        (
            fig4,
            {"env_ids": ("Pendulum-v1",), "medium_return": -300.0},
            "one of gymnasium's MuJoCo environments",
        ),
        (fig6, {"algorithms": ("dqn",)}, "algorithms must be of .*, got 'dqn'"),
        (fig6, {"env_ids": ("Nope-v1",)}, "Nope-v1"),
        (fig6, {"env_ids": ("Pendulum-v1", "CartPole-v1")}, "CartPole-v1"),
        (
            fig5,
            {"models": ("exact", "rollout"), "horizons": (10,), "diffusion_steps": (8,)},
            "a number above a horizon for model rollout, got .8. with --horizons .10.",
        ),
        (fig8, {"ablations": ("base", "base")}, "ablations must be different ones"),
    ],
)
def test_wrong_sizes_are_refused_before_any_work(
    stages, tiny_models, tiny_trainings, experiment, options, message
):
    sizes = tiny_trainings if experiment in (fig6, fig8) else tiny_models
    with pytest.raises(InputError, match=message):
        experiment(stages, dataclasses.replace(sizes, **options), (0,))
    assert not stages.folder.exists()


def test_too_few_held_out_starts_are_told_before_a_model_is_trained(stages, tiny_models):
    scale = dataclasses.replace(tiny_models, measured_trajectories=500)
    with pytest.raises(InputError, match="must have at least 500 starts of 2 steps to measure"):
        fig5(stages, scale, (0,))
    assert not (stages.folder / "world_models").exists()
    scale = dataclasses.replace(tiny_models, held_out=0.001)
    with pytest.raises(InputError, match="enough for a held-out share of 0.001, got"):
        fig5(stages, scale, (0,))


def test_scales_are_checked():
    assert WorldModelScale.from_scale("paper").horizons == (10, 50, 200)
    assert TrainingScale.from_scale("paper").preset == "default"
    for options, message in (
        ({"horizons": (2,)}, "horizons must be at least 3 each"),
        ({"horizons": (10, 10)}, "horizons must be different ones"),
        ({"sigmas": ()}, "sigmas must be at least one"),
        ({"held_out": 1.0}, r"held_out must be in \(0, 1\)"),
        ({"diffusion_steps": (0,)}, "diffusion_steps must be at least 1 each"),
    ):
        with pytest.raises(InputError, match=message):
            WorldModelScale(**options)
    for options, message in (
        ({"total_timesteps": 0}, "total_timesteps must be None or a positive number"),
        ({"ablations": ()}, "ablations must be at least one"),
    ):
        with pytest.raises(InputError, match=message):
            TrainingScale(**options)
    for kind in (WorldModelScale, TrainingScale):
        with pytest.raises(InputError, match="scale must be one of"):
            kind.from_scale("huge")


def test_the_command(tmp_path, capsys):
    words = f"reproduce fig5 --no-progress --seeds 0 --env-ids {ENV} --models autoregressive"
    sizes = "--preset quick --model-updates 4 --dataset-steps 200 --held-out 0.2 --horizons 3"
    words = [*words.split(), *sizes.split(), "--measured-trajectories", "6"]
    assert cli.main([*words, "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1].startswith("2 rows in ") and "fig5.png" in out[-1]
    assert len(table(tmp_path / "out" / "fig5.csv")) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("reproduce fig3 --scale huge", "scale must be one of ['quick', 'paper'], got"),
        ("reproduce fig3 --agents iql", "--agents must be left out with fig3: it is of pgd-ret"),
        ("reproduce fig6 --model-updates 5", "--model-updates must be left out with fig6: it is"),
        ("reproduce fig6 --dataset-steps 5", "it is of fig3, fig4, fig5, pgd-returns, pgd-likeli"),
        ("reproduce fig4 --algorithms ppo", "--algorithms must be left out with fig4: it is of f"),
        ("reproduce pgd-error --sigmas 0.1", "--sigmas must be left out with pgd-error: it is of"),
        ("reproduce fig5 --models dreamer", "models must be of"),
        ("reproduce fig6 --seeds 4-0", "--seeds must be seeds, e.g. 0-4 or 0,2,7, got"),
        ("reproduce fig4 --horizons 1", "horizons must be at least 3 each"),
    ],
)
def test_wrong_input_is_one_sentence(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words.split()) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1, captured.err
    assert list(tmp_path.iterdir()) == []


def stored_policy(env_id=ENV, mean_return=50.0):
    """A policy that does little, so that episodes are short."""
    facts = PolicyFacts(
        env_id=env_id,
        algorithm="ppo",
        activation="tanh",
        squashed=False,
        env_steps=10,
        seed=0,
        recipe="by hand",
        mean_return=mean_return,
        std_return=0.0,
        episodes=1,
        evaluation_seed=0,
        versions={},
    )
    layers = (
        (np.eye(4, dtype=np.float32) * 0.5, np.zeros(4, dtype=np.float32)),
        (np.array([[0.4, 0.8, 0.1, 0.2]], dtype=np.float32), np.zeros(1, dtype=np.float32)),
    )
    bounds = np.full(1, -3.0, dtype=np.float32), np.full(1, 3.0, dtype=np.float32)
    return StoredPolicy(layers, (None, np.full(1, -2.0, dtype=np.float32)), bounds, facts)


def test_a_files_policy_is_played_and_imitated(stages, tiny_models, tmp_path, told, monkeypatch):
    save_policy(stored_policy(), tmp_path / f"{ENV}.safetensors")
    scale = dataclasses.replace(
        tiny_models, policies=str(tmp_path), models=("exact",), dataset_steps=400
    )
    rows = fig5(stages, scale, (0,))
    assert told[0].startswith(f"dataset {ENV}-mixed-noise-of-file: ")
    assert not (stages.folder / "behaviour").exists()
    experiment = ModelExperiment(stages, scale)
    policy = experiment.scene(ENV).policy
    observations = experiment.scene(ENV).task.dataset.observations
    wanted = stored_policy().act(observations) / 3  # of bounds -3 and 3
    mean, std = policy(torch.from_numpy(observations.copy()))
    assert np.abs(mean.numpy() - wanted).mean() < 0.03
    assert std[0].item() == pytest.approx(np.exp(-2.0) / 3, rel=0.15)
    monkeypatch.setattr("polygrad_fast.reproduce.polygrad.imitate", None)  # it is kept
    (stages.folder / "fig5.csv").unlink()
    assert fig5(stages, scale, (0,)) == rows
    with pytest.raises(CheckpointError, match="is of other options"):
        fig5(stages, dataclasses.replace(scale, policies=""), (0,))
    for sizes in ({"dataset_steps": 401}, {"behaviour_seed": 1}):  # not the dataset that is there
        with pytest.raises(CheckpointError, match="must have asked .* in its recipe, got"):
            fig5(stages, dataclasses.replace(scale, **sizes), (1,))


def test_policy_files_are_checked_before_any_work(stages, tiny_models, tmp_path):
    scale = dataclasses.replace(tiny_models, policies=str(tmp_path))
    with pytest.raises(InputError, match="is not a policy file"):
        fig5(stages, scale, (0,))
    save_policy(stored_policy("Hopper-v5"), tmp_path / f"{ENV}.safetensors")
    with pytest.raises(InputError, match=f"must be a policy of {ENV}, got one of Hopper-v5"):
        fig5(stages, scale, (0,))
    assert not stages.folder.exists()
