"""Memory is estimated before it is allocated, and refused in one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import polygrad_fast as pg
from cases import changed, tiny_config
from polygrad_fast import cli
from polygrad_fast.denoisers.build import build_denoiser
from polygrad_fast.denoisers.ensemble import EnsembleNetwork
from polygrad_fast.denoisers.one_step import OneStepNetwork
from polygrad_fast.denoisers.transformer_dynamics import TransformerDynamics
from polygrad_fast.denoisers.transition_denoiser import TransitionDenoiser
from polygrad_fast.training import memory, model_memory

GB = 10**9
WALKER = (17, 6)
CPU = torch.device("cpu")


@pytest.mark.parametrize("hidden_dim, num_layers", [(8, 1), (24, 3)])
def test_parameters_of_the_one_step_network_are_counted_as_they_are_built(hidden_dim, num_layers):
    network = OneStepNetwork(*WALKER, hidden_dim, num_layers)
    wanted = sum(weight.numel() for weight in network.parameters())
    sizes = {"autoregressive__hidden_dim": hidden_dim, "autoregressive__num_layers": num_layers}
    config = changed(pg.TrainConfig(), **sizes)
    assert model_memory.autoregressive_parameters(config, *WALKER) == wanted


@pytest.mark.parametrize("hidden_dim, num_layers, num_members", [(8, 1, 5), (24, 3, 9)])
def test_parameters_of_the_ensemble_are_counted_as_they_are_built(
    hidden_dim, num_layers, num_members
):
    network = EnsembleNetwork(*WALKER, num_members, 5, hidden_dim, num_layers)
    wanted = sum(weight.numel() for weight in network.parameters())
    sizes = {
        "ensemble__hidden_dim": hidden_dim,
        "ensemble__num_layers": num_layers,
        "ensemble__num_members": num_members,
    }
    config = changed(pg.TrainConfig(), **sizes)
    assert model_memory.ensemble_parameters(config, *WALKER) == wanted


@pytest.mark.parametrize("hidden_dim, num_layers", [(8, 1), (24, 3)])
def test_parameters_of_the_other_step_networks_are_counted_as_they_are_built(
    hidden_dim, num_layers
):
    sizes = {"hidden_dim": hidden_dim, "num_layers": num_layers}
    networks = {
        "transformer": TransformerDynamics(*WALKER, 7, **sizes),
        "autoregressive_diffusion": TransitionDenoiser(*WALKER, **sizes),
    }
    for name, network in networks.items():
        config = changed(
            pg.TrainConfig(),
            transformer__context=7,
            **{f"{name}__{option}": size for option, size in sizes.items()},
        )
        counted = model_memory.MODEL_MEMORY[name].parameters(config, *WALKER)
        assert counted == sum(weight.numel() for weight in network.parameters()), name


@pytest.fixture
def host(monkeypatch):
    """Sets what the host has available."""

    def set_available(size: float) -> None:
        monkeypatch.setattr(memory, "available_host_memory", lambda: int(size))

    set_available(18 * GB)
    return set_available


@pytest.mark.parametrize("horizon", [2, 10, 30])
@pytest.mark.parametrize(
    "options",
    [
        {"kind": "residual_mlp", "hidden_dim": 24, "num_layers": 1},
        {"kind": "residual_mlp", "hidden_dim": 40, "num_layers": 3, "step_conditioning": "layer"},
        {"kind": "transformer", "hidden_dim": 16, "num_layers": 2, "num_heads": 4},
        {"kind": "transformer", "hidden_dim": 8, "num_layers": 1, "step_conditioning": "learned"},
        {"kind": "rollout", "hidden_dim": 24, "num_layers": 3},
    ],
)
def test_parameters_are_counted_as_they_are_built(options, horizon):
    config = pg.TrainConfig(
        horizon=horizon,
        denoiser=pg.config.DenoiserConfig(**options),
        sampler=pg.SamplerConfig.official(scale_actions=False),
    )
    denoiser = build_denoiser(config.denoiser, *WALKER, horizon, 128)
    wanted = sum(weight.numel() for weight in denoiser.parameters())
    assert model_memory.denoiser_parameters(config, *WALKER) == wanted


@pytest.mark.parametrize("preset", ["default", "laptop", "paper", "quick"])
@pytest.mark.parametrize("sizes", [(4, 1), WALKER, (105, 8)])
def test_presets_train_on_a_machine_with_8_gb(host, preset, sizes):
    host(7 * GB)  # of which the system takes some
    memory.check_training_memory(pg.TrainConfig.from_preset(preset), *sizes, CPU)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replay_capacity": 10**12}, r"replay_capacity 1,000,000,000,000 needs about 2\d\d TB of"),
        (
            {"imagined_batch_size": 2 * 10**9},
            r"imagined_batch_size 2,000,000,000 needs about 3\d TB",
        ),
        ({"horizon": 5000}, r"horizon 5,000 needs about 1.\d TB of memory, 18 GB are available$"),
        ({"denoiser__hidden_dim": 10**7}, r"denoiser.hidden_dim 10,000,000 needs about \d\d PB"),
        ({"denoiser__num_layers": 10**9}, r"denoiser.num_layers 1,000,000,000 needs about"),
        ({"denoiser__batch_size": 10**8}, r"denoiser.batch_size 100,000,000 needs about"),
        ({"policy__hidden_dim": 10**6}, r"policy.hidden_dim 1,000,000 needs about 1\d\d TB"),
        ({"policy__num_layers": 10**7}, r"policy.num_layers 10,000,000 needs about"),
        ({"schedule__num_train_timesteps": 10**9}, "schedule.num_train_timesteps 1,000,000,000 n"),
        ({"denoiser__kind": "transformer", "horizon": 5000}, "horizon 5,000 needs about"),
    ],
)
def test_what_needs_too_much_is_named(host, options, message):
    config = changed(pg.TrainConfig(), **options)
    with pytest.raises(pg.InputError, match=f"^{message}"):
        memory.check_training_memory(config, *WALKER, CPU)


def test_a_machine_too_small_for_the_defaults_is_told_what_is_largest(host):
    host(10**7)
    message = "^denoiser.hidden_dim 1,024 needs about .* [MG]B of memory, 10 MB are available"
    with pytest.raises(pg.InputError, match=message):
        memory.check_training_memory(pg.TrainConfig(), *WALKER, CPU)
    config = changed(pg.TrainConfig(), denoiser__hidden_dim=8, imagined_batch_size=8)
    with pytest.raises(pg.InputError, match="^replay_capacity 1,000,000 .* 10 MB are available"):
        memory.check_training_memory(config, *WALKER, CPU)


def test_nothing_is_refused_where_the_system_does_not_tell(monkeypatch):
    monkeypatch.setattr(memory, "available_host_memory", lambda: None)
    config = changed(pg.TrainConfig(), replay_capacity=10**15)
    memory.check_training_memory(config, *WALKER, CPU)


def test_memory_of_the_gpu_and_of_the_host_are_counted_apart(host, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * GB, 80 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * GB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: GB)
    cuda = torch.device("cuda")
    assert memory.available_memory(cuda) == {"host": 18 * GB, "device": 7 * GB}
    config = changed(pg.TrainConfig(), replay_capacity=7 * 10**7)  # 8.2 GB, twice in a checkpoint
    message = "replay_capacity 70,000,000 needs .* of memory on the GPU, 7.0 GB are available"
    with pytest.raises(pg.InputError, match=message):
        memory.check_training_memory(config, *WALKER, cuda)
    memory.check_training_memory(config, *WALKER, cuda, held=5 * GB)
    host(GB)
    with pytest.raises(pg.InputError, match="of memory, 1.0 GB are available"):
        memory.check_training_memory(config, *WALKER, cuda, held=5 * GB)


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def machine(root: Path, groups: str) -> tuple[Path, Path]:
    write(root / "proc", meminfo="MemTotal: 9000 kB\nMemAvailable:    5000 kB\nSwapFree: 1 kB")
    write(root / "proc" / "self", cgroup=groups)
    return root / "proc", root / "cgroup"


def test_available_memory_without_control_groups(tmp_path):
    assert memory.available_host_memory(*machine(tmp_path, "")) == 5000 * 1024
    assert memory.available_host_memory(tmp_path / "elsewhere", tmp_path) is None


def test_available_memory_in_control_groups_of_version_2(tmp_path):
    proc, cgroups = machine(tmp_path, "0::/job/step")
    write(cgroups / "job" / "step", memory__max="max", memory__current=7)
    assert memory.available_host_memory(proc, cgroups) == 5000 * 1024
    statistics = "anon 1\ninactive_file 500\nactive_file 9"
    write(cgroups / "job", memory__max=4000, memory__current=3000, memory__stat=statistics)
    assert memory.available_host_memory(proc, cgroups) == 1500
    # a container sees its own group as the root
    write(cgroups, memory__max=900, memory__current=100, memory__stat="inactive_file 0")
    assert memory.available_host_memory(proc, cgroups) == 800
    write(cgroups, memory__max=900, memory__current=1000, memory__stat="inactive_file 0")
    assert memory.available_host_memory(proc, cgroups) == 0


def test_available_memory_in_control_groups_of_version_1(tmp_path):
    proc, cgroups = machine(tmp_path, "9:cpu,cpuacct:/x\n4:memory:/job\n1:name=systemd:/")
    write(
        cgroups / "memory" / "job",
        memory__limit_in_bytes=3000,
        memory__usage_in_bytes=1000,
        memory__stat="inactive_file 1\ntotal_inactive_file 250",
    )
    assert memory.available_host_memory(proc, cgroups) == 2250
    assert memory.available_host_memory(proc, tmp_path / "not mounted") == 5000 * 1024


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_available_memory_of_this_machine():
    assert 10**7 < memory.available_host_memory() < 10**14


def test_an_agent_that_only_acts_needs_less(host, tmp_path):
    agent = pg.PolyGRAD("Pendulum-v1", config=tiny_config())
    agent.learn(25)
    agent.save(tmp_path / "saved")
    host(10**8)  # the buffer fits, training does not
    loaded = pg.PolyGRAD.load(tmp_path / "saved")
    assert loaded.predict([0, 0, 0])[0].shape == (1,)
    with pytest.raises(pg.InputError, match="replay_capacity 200,000 needs"):
        loaded.learn(5)
    agent.learn(5)  # has what it needs already
    host(10**6)
    with pytest.raises(pg.InputError, match="replay_capacity 200,000 needs about 8.4 MB"):
        pg.PolyGRAD("Pendulum-v1", config=tiny_config())
    with pytest.raises(
        pg.InputError, match="num_trajectories 1,000,000 needs about .* [MG]B of mem"
    ):
        agent.imagine(10**6)
    assert agent.imagine(20).observations.shape == (20, 4, 3)
    for number in (1.5, "3", None):
        with pytest.raises(pg.InputError, match="num_trajectories must be an integer"):
            agent.imagine(number)


def test_the_command_line_refuses_and_leaves_nothing(host, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for option, message in (
        ("--replay-capacity 1000000000000", "replay_capacity 1,000,000,000,000 needs about"),
        ("--imagined-batch-size 2000000000", "imagined_batch_size 2,000,000,000 needs about"),
        ("--preset default --horizon 5000", "horizon 5,000 needs about"),
    ):
        words = ["train", "--env-id", "Pendulum-v1", *option.split()]
        assert cli.main(words) == 2
        error = capsys.readouterr().err
        assert message in error and "18 GB are available" in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    pg.PolyGRAD("Pendulum-v1", config=tiny_config(), run_dir=tmp_path / "run").learn(25)
    assert cli.main("sample run --num 1000000000 --out x.npz".split()) == 2
    assert "num_trajectories 1,000,000,000 needs about" in capsys.readouterr().err
    assert not (tmp_path / "x.npz").exists()


MEASURE = """
import json, sys
import polygrad_fast as pg
from polygrad_fast import agent
from polygrad_fast.config import from_dict

def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))

def begin(*arguments, **options):
    before.append(status("VmRSS"))

before = []
agent.check_training_memory = begin
config = from_dict(json.load(sys.stdin), pg.TrainConfig)
trained = pg.PolyGRAD("Pendulum-v1", config=config, run_dir=sys.argv[1])
trained.learn(config.total_timesteps)
print(status("VmHWM") - before[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"replay_capacity": 5_000_000},
        {"denoiser__hidden_dim": 3000, "denoiser__num_layers": 2},
        {"imagined_batch_size": 20_000, "policy__hidden_dim": 128},
        {"denoiser__batch_size": 8192, "denoiser__hidden_dim": 512, "denoiser__num_layers": 4},
        {"horizon": 150, "denoiser__hidden_dim": 64},
        {"denoiser__kind": "transformer", "horizon": 32, "denoiser__batch_size": 256,
         "denoiser__hidden_dim": 128},
        {"engine": "reference", "imagined_batch_size": 30_000, "denoiser__hidden_dim": 512},
        {"world_model": "autoregressive", "autoregressive__hidden_dim": 512, "horizon": 20,
         "autoregressive__num_layers": 3, "autoregressive__batch_size": 1024},
        {"world_model": "ensemble", "ensemble__hidden_dim": 256, "horizon": 20,
         "ensemble__num_layers": 3, "ensemble__batch_size": 512},
        {"world_model": "transformer", "transformer__hidden_dim": 128, "horizon": 15,
         "transformer__num_layers": 2, "transformer__batch_size": 512},
        {"world_model": "autoregressive_diffusion", "autoregressive_diffusion__batch_size": 1024,
         "autoregressive_diffusion__hidden_dim": 256},
    ],
    ids=lambda options: "-".join(map(str, options)) or "tiny",
)  # fmt: skip
def test_estimates_are_within_a_factor_of_two_of_what_is_measured(options, tmp_path):
    import dataclasses

    config = tiny_config(
        **{"learning_starts": 310, "total_timesteps": 320, "cpu_threads": 1} | options
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE, str(tmp_path / "run")],
        input=json.dumps(dataclasses.asdict(config)),
        capture_output=True,
        text=True,
        check=True,
    )
    measured = int(result.stdout.split()[-1])
    # the few steps taken do not fill the buffer, so a checkpoint writes less
    unwritten = config.replay_capacity * (4 * 6 + 32)
    estimate = memory.training_memory(config.resolved("Pendulum-v1"), 3, 1).host - unwritten
    assert 0.5 * measured < estimate < 2 * measured, (measured, estimate)
