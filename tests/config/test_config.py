import dataclasses
import json
import math

import numpy as np
import pytest

import polygrad_fast as pg
from polygrad_fast import config as c

PRESETS = ["default", "laptop", "paper", "quick"]
CLASSES = [
    c.SamplerConfig,
    c.ScheduleConfig,
    c.DenoiserConfig,
    c.A2CConfig,
    c.PolicyConfig,
    c.GuidanceConfig,
    c.NormalizerConfig,
    c.TrainConfig,
]


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_tables_1_2_and_4(preset):
    config = pg.TrainConfig.from_preset(preset).resolved("Walker2d-v5")
    assert config.imagined_batch_size == 1024
    assert config.horizon == 10
    assert config.a2c.gae_lambda == 0.9
    assert config.a2c.critic_learning_rate == 3e-4
    assert config.a2c.gamma == 0.99
    assert config.a2c.target_update == 0.01
    assert config.a2c.line_search_tolerance == 0.2
    assert config.a2c.entropy_coef == 1e-5
    assert config.policy.min_std == 0.1
    assert config.policy_updates_per_env_step == 0.25
    assert config.denoiser.kind == "residual_mlp"
    assert config.denoiser.hidden_dim == 1024
    assert config.denoiser.batch_size == 256
    assert config.denoiser.num_layers == 6
    assert config.denoiser.learning_rate == 3e-4
    assert config.denoiser.updates_per_env_step == 1
    assert config.schedule == c.ScheduleConfig(num_train_timesteps=128, tau=1.0)


@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize(
    "env_id, tau", [("Hopper-v5", 0.1), ("module:Hopper-v3", 0.1), ("Ant-v5", 1.0)]
)
def test_only_hopper_has_another_temperature(preset, env_id, tau):
    config = pg.TrainConfig.from_preset(preset)
    assert config.resolved(env_id).schedule.tau == tau
    transformer = dataclasses.replace(config, denoiser=c.DenoiserConfig(kind="transformer"))
    assert transformer.resolved(env_id).schedule.tau == 1.0
    given = dataclasses.replace(config, schedule=c.ScheduleConfig(tau=0.5))
    assert given.resolved(env_id).schedule.tau == 0.5


def test_default_preset_is_the_released_configuration():
    config = pg.TrainConfig.from_preset("default")
    assert config == pg.TrainConfig()
    assert config.sampler == pg.SamplerConfig.official()
    assert config.a2c == pg.A2CConfig()
    assert config.denoiser.step_conditioning == "input"
    assert (config.denoiser.ema_decay, config.denoiser.ema_interval) == (0.99, 10)
    assert config.denoiser.ema_start == 2000
    assert config.resolved("").guidance == c.GuidanceConfig(0.005, "log", 3e-3, "std")
    assert config.policy == c.PolicyConfig(256, 2, 1.0, 0.1, normed_inputs=False)
    assert config.a2c.actor_learning_rate == 3e-5
    assert config.a2c.max_grad_norm == 0.1
    assert config.a2c.normalize_advantages and config.a2c.line_search
    assert config.a2c.target_critic_decay == 0.995
    assert config.a2c.line_search_ratio == 0.8
    assert config.a2c.actor_learning_rate_lr == 3e-4
    assert (config.learning_starts, config.policy_delay_steps) == (5000, 1000)
    assert config.eval_interval == 10_000


def test_paper_preset_follows_the_text():
    config = pg.TrainConfig.from_preset("paper").resolved("")
    assert config.sampler == pg.SamplerConfig.paper()
    assert config.denoiser.step_conditioning == "layer"
    assert (config.guidance.rule, config.guidance.learning_rate) == ("linear", 1e-4)


@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("horizon, width", [(10, 1024), (50, 2048), (200, 2048)])
@pytest.mark.parametrize("kind", ["residual_mlp", "transformer"])
def test_kind_and_horizon_need_no_second_option(preset, horizon, width, kind):
    config = pg.TrainConfig.from_preset(preset)
    chosen = dataclasses.replace(
        config, horizon=horizon, denoiser=dataclasses.replace(config.denoiser, kind=kind)
    )
    denoiser = chosen.resolved("Hopper-v5").denoiser
    residual_mlp = kind == "residual_mlp"
    assert denoiser.hidden_dim == (width if residual_mlp else 312)
    assert denoiser.learning_rate == (3e-4 if residual_mlp else 1e-4)
    of_the_paper = "layer" if residual_mlp else "learned"
    assert denoiser.step_conditioning == (of_the_paper if preset == "paper" else "input")
    assert chosen.resolved("Hopper-v5").schedule.tau == (0.1 if residual_mlp else 1.0)


def test_what_none_stands_for_yields_to_what_is_given():
    given = c.DenoiserConfig(kind="transformer", step_conditioning="input").resolved(10)
    assert given.step_conditioning == "input"
    assert c.GuidanceConfig(rule="linear", learning_rate=0.5).resolved().learning_rate == 0.5
    rates = {rule: c.GuidanceConfig(rule=rule).resolved().learning_rate for rule in ("log", "none")}
    assert rates == {"log": 3e-3, "none": 3e-3}


@pytest.mark.parametrize(
    "kind, step_conditioning", [("residual_mlp", "layer"), ("transformer", "learned")]
)
def test_configurations_of_earlier_paper_runs_stay_what_they_were(kind, step_conditioning):
    """config.json holds every value resolved, as these words and numbers."""
    config = pg.TrainConfig.from_preset("paper")
    denoiser = dataclasses.replace(config.denoiser, kind=kind)
    resolved = dataclasses.replace(config, denoiser=denoiser).resolved("Hopper-v5")
    stored = json.loads(json.dumps(dataclasses.asdict(resolved)))
    assert stored["denoiser"]["step_conditioning"] == step_conditioning
    assert stored["guidance"]["learning_rate"] == 1e-4
    assert (
        c.from_dict(stored, c.TrainConfig)
        == resolved
        == c.from_dict(stored, c.TrainConfig).resolved("Hopper-v5")
    )


@pytest.mark.parametrize("preset", ["quick", "laptop"])
def test_what_a_cpu_trains_is_exactly_on_policy(preset):
    config = pg.TrainConfig.from_preset(preset)
    assert config.sampler.action_update == "exact" and config.denoiser.kind == "rollout"
    assert config.cpu_threads == 1
    estimator = {"quick": "score", "laptop": "auto"}[preset]
    assert config.a2c.gradient_estimator == estimator


def test_official_sampler_is_the_released_code():
    assert dataclasses.asdict(pg.SamplerConfig.official()) == {
        "prediction_type": "sample",
        "action_update": "score",
        "clip_std": 3.0,
        "clip_order": "before",
        "clip_final_actions": True,
        "policy_input": "denoised",
        "update_states": False,
        "clip_state_change": 0.25,
        "clip_state_change_steps": 11,
        "variance_type": "posterior",
        "scale_actions": True,
        "denoiser_actions": "raw",
        "max_guidance": None,
        "num_inference_steps": None,
    }


def test_paper_sampler_is_equation_11():
    official = dataclasses.asdict(pg.SamplerConfig.official())
    assert dataclasses.asdict(pg.SamplerConfig.paper()) == official | {
        "prediction_type": "epsilon",
        "clip_order": "after",
        "clip_final_actions": False,
        "clip_state_change": None,
        "variance_type": "beta",
        "scale_actions": False,
    }


@pytest.mark.parametrize("preset", [pg.SamplerConfig.official, pg.SamplerConfig.paper])
def test_sampler_presets_take_overrides(preset):
    config = preset(clip_std=None, policy_input="noisy")
    assert dataclasses.replace(config, clip_std=3.0, policy_input="denoised") == preset()
    with pytest.raises(pg.InputError, match=r"no option 'clip', wanted one of .*'clip_std'"):
        preset(clip=1.0)
    with pytest.raises(pg.InputError, match="clip_std must be None or a positive number, got 0"):
        preset(clip_std=0)


@pytest.mark.parametrize("preset", PRESETS)
def test_round_trip_through_json(preset):
    config = pg.TrainConfig.from_preset(preset)
    restored = c.from_dict(json.loads(json.dumps(dataclasses.asdict(config))), c.TrainConfig)
    assert restored == config
    assert type(restored.sampler) is pg.SamplerConfig and type(restored.a2c) is pg.A2CConfig


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_build_a_sampler_and_an_actor_critic(preset):
    config = pg.TrainConfig.from_preset(preset).resolved("")
    schedule = pg.NoiseSchedule.cosine(config.schedule.num_train_timesteps, config.schedule.tau)
    assert schedule.num_train_timesteps == config.schedule.num_train_timesteps
    assert config.horizon >= 2 and config.policy.init_std > config.policy.min_std
    normalizer = pg.Normalizer(3, 2)
    normalizer.update({"terminals": (0.0, 0.0)}, config.normalizer.min_std())
    assert normalizer.terminals_scale.item() >= config.normalizer.min_std_terminals


def test_table_3_and_the_width_of_long_horizons():
    transformer = c.DenoiserConfig(kind="transformer").resolved(50)
    assert (transformer.hidden_dim, transformer.num_layers, transformer.num_heads) == (312, 6, 4)
    assert transformer.learning_rate == 1e-4
    assert c.DenoiserConfig().resolved(11).hidden_dim == 2048
    assert c.DenoiserConfig(hidden_dim=7, learning_rate=1.0).resolved(11).hidden_dim == 7


def test_dictionaries_of_the_wrong_kind():
    with pytest.raises(pg.InputError, match="ScheduleConfig must be a dictionary"):
        c.from_dict({"schedule": 3}, c.TrainConfig)
    with pytest.raises(pg.InputError, match="horizon must be an integer, got 'x'"):
        c.from_dict({"horizon": "x"}, c.TrainConfig)


def test_missing_options_take_their_defaults():
    assert c.from_dict({}, c.TrainConfig) == pg.TrainConfig()
    partial = c.from_dict({"horizon": 7, "a2c": {"gamma": 0.5}}, c.TrainConfig)
    assert partial.horizon == 7 and partial.a2c == pg.A2CConfig(gamma=0.5)


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(
        pg.InputError, match="preset must be one of .*default.*paper.*quick.*got 'fast'"
    ):
        pg.TrainConfig.from_preset("fast")


def test_unknown_options_are_named_with_their_class():
    with pytest.raises(pg.InputError, match="TrainConfig has no option 'horizn'"):
        c.from_dict({"horizn": 10}, c.TrainConfig)
    with pytest.raises(pg.InputError, match="A2CConfig has no option 'lambda'"):
        c.from_dict({"horizon": 10, "a2c": {"lambda": 0.9}}, c.TrainConfig)


@pytest.mark.parametrize(
    "cls, name, value, wanted",
    [
        (c.SamplerConfig, "prediction_type", "x0", "'sample', 'epsilon'"),
        (c.SamplerConfig, "action_update", "grad", "'score', 'sample', 'exact', 'none'"),
        (c.SamplerConfig, "policy_input", "recon", "'denoised', 'posterior_mean', 'noisy'"),
        (c.SamplerConfig, "clip_order", "never", "'before', 'after'"),
        (c.SamplerConfig, "variance_type", "learned", "'posterior', 'beta'"),
        (c.SamplerConfig, "denoiser_actions", "noisy", "'raw', 'clipped'"),
        (c.SamplerConfig, "clip_std", -3.0, "None or a positive number"),
        (c.SamplerConfig, "clip_std", math.nan, "a finite number or None"),
        (c.SamplerConfig, "clip_state_change", 0.0, "None or a positive number"),
        (c.SamplerConfig, "max_guidance", -0.5, "None or a positive number"),
        (c.SamplerConfig, "clip_state_change_steps", -1, "at least 0"),
        (c.DenoiserConfig, "kind", "unet", "'residual_mlp', 'transformer'"),
        (c.DenoiserConfig, "step_conditioning", "learned", "'input', 'layer' or None"),
        (c.DenoiserConfig, "hidden_dim", 0, "None or a positive number"),
        (c.DenoiserConfig, "batch_size", 0, "at least 1"),
        (c.DenoiserConfig, "ema_interval", 0, "at least 1"),
        (c.DenoiserConfig, "ema_decay", 1.5, r"in \[0, 1\]"),
        (c.DenoiserConfig, "learning_rate", math.nan, "a finite number or None"),
        (c.DenoiserConfig, "learning_rate", -1.0, "None or a positive number"),
        (c.DenoiserConfig, "updates_per_env_step", -1.0, "at least 0"),
        (c.DenoiserConfig, "pretrain_updates", -1, "at least 0"),
        (c.A2CConfig, "gamma", 1.01, r"in \[0, 1\]"),
        (c.A2CConfig, "gae_lambda", -0.1, r"in \[0, 1\]"),
        (c.A2CConfig, "target_critic_decay", math.nan, "a finite number"),
        (c.A2CConfig, "entropy_coef", "small", "a finite number"),
        (c.A2CConfig, "line_search", 1, "a bool"),
        (c.ScheduleConfig, "tau", -1.0, "positive"),
        (c.ScheduleConfig, "num_train_timesteps", 0, "at least 1"),
        (c.PolicyConfig, "init_std", 0.05, "above min_std"),
        (c.NormalizerConfig, "min_std_rewards", -1.0, "at least 0"),
        (c.TrainConfig, "horizon", 2.5, "an integer"),
        (c.TrainConfig, "engine", "jax", "'auto', 'reference', 'torch', 'triton'"),
        (c.A2CConfig, "actor_learning_rate", 0.0, "positive"),
        (c.A2CConfig, "target_update", -0.01, "positive"),
        (c.A2CConfig, "final_target_update", 0.0, "None or a positive number"),
        (c.A2CConfig, "max_grad_norm", -1.0, "None or a positive number"),
        (c.A2CConfig, "line_search_ratio", 1.0, r"in \(0, 1\)"),
        (c.A2CConfig, "line_search_max_steps", 0, "at least 1"),
        (c.NormalizerConfig, "refresh", "never", "'episode', 'prefill'"),
        (c.TrainConfig, "horizon", 0, "at least 1"),
        (c.TrainConfig, "horizon", 1, "at least 2"),
        (c.TrainConfig, "imagined_batch_size", 0, "at least 1"),
        (c.TrainConfig, "diagnostics_interval", -1, "at least 0"),
        (c.TrainConfig, "eval_episodes", -1, "at least 1"),
        (c.TrainConfig, "gradient_trajectories", 7, "0 or at least 8"),
        (c.TrainConfig, "policy_delay_steps", -1, "at least 0"),
        (c.TrainConfig, "policy_updates_per_env_step", -0.5, "at least 0"),
    ],
)
def test_invalid_values_name_option_wanted_and_got(cls, name, value, wanted):
    message = rf"{cls.__name__}\.{name} must be .*{wanted}.*, got {value!r}"
    with pytest.raises(pg.InputError, match=message):
        cls(**{name: value})
    with pytest.raises(pg.InputError, match=message):
        c.from_dict({name: value}, cls)


def test_transformers_have_their_own_step_conditioning():
    assert c.DenoiserConfig(kind="transformer", step_conditioning="learned").kind == "transformer"
    with pytest.raises(pg.InputError, match="step_conditioning must be .*'learned'.*got 'layer'"):
        c.DenoiserConfig(kind="transformer", step_conditioning="layer")


@pytest.mark.parametrize("action_update", ["sample", "exact", "none"])
def test_state_updates_need_the_score(action_update):
    with pytest.raises(
        pg.InputError, match=f"action_update must be 'score' .*got '{action_update}'"
    ):
        pg.SamplerConfig.official(action_update=action_update, update_states=True)


def test_state_updates_need_the_estimated_states():
    with pytest.raises(pg.InputError, match="policy_input must be .*got 'noisy'"):
        pg.SamplerConfig.official(policy_input="noisy", update_states=True)


@pytest.mark.parametrize("cls", CLASSES)
def test_configurations_are_frozen_and_hashable(cls):
    config = cls()
    for field in dataclasses.fields(cls):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, None)
    assert hash(config) == hash(cls())


def test_numpy_numbers_are_stored_as_python_numbers():
    a2c = pg.A2CConfig(gamma=np.float32(0.5), line_search_max_steps=np.int64(7))
    config = pg.TrainConfig(a2c=a2c, horizon=np.uint8(4), rescale_actions=np.bool_(False))
    values = (config.a2c.gamma, config.a2c.line_search_max_steps, config.horizon)
    assert [type(value) for value in values] == [float, int, int] and values == (0.5, 7, 4)
    assert config.rescale_actions is False
    assert c.from_dict(json.loads(json.dumps(dataclasses.asdict(config))), c.TrainConfig) == config
    with pytest.raises(pg.InputError, match="gamma must be in"):
        pg.A2CConfig(gamma=np.float64(2))
    with pytest.raises(pg.InputError, match="horizon must be an integer"):
        pg.TrainConfig(horizon=np.float64(4))


def test_the_prefill_holds_a_window():
    with pytest.raises(
        pg.InputError, match="learning_starts must be at least the horizon, 10 .*got 9"
    ):
        pg.TrainConfig(learning_starts=9)
    assert pg.TrainConfig(learning_starts=10).learning_starts == 10


def test_an_unknown_option_is_named_with_the_one_meant():
    with pytest.raises(
        pg.InputError, match="A2CConfig has no option 'gama', did you mean 'gamma'\\?$"
    ):
        c.from_dict({"a2c": {"gama": 1.0}}, c.TrainConfig)
    with pytest.raises(pg.InputError, match="TrainConfig has no option 'xyzzy'$"):
        c.from_dict({"xyzzy": 1}, c.TrainConfig)
