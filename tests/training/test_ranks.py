"""Several processes that train together compute what one does, and continue as one or several."""

from __future__ import annotations

import functools
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import fake_cuda
import numpy as np
import pytest
import torch

import polygrad_fast as pg
from cases import tiny_config
from polygrad_fast import cli
from polygrad_fast.config import DenoiserConfig
from polygrad_fast.diffusion.averaged_trainer import AveragedTrainer
from polygrad_fast.diffusion.ddpm import denoising_loss
from polygrad_fast.diffusion.trainer import DenoiserTrainer
from polygrad_fast.learners.a2c import ActorCritic
from polygrad_fast.policy import ValueFunction
from polygrad_fast.ranks import Ranks, current_ranks, joined
from polygrad_fast.runs.checkpoint import load_checkpoint
from polygrad_fast.runs.metric_sums import MetricSums, merged_sums
from polygrad_fast.runs.metrics import read_metrics

TESTS = Path(__file__).resolve().parents[1]
S, A, B, H, K = 3, 2, 12, 5, 8
# --local-addr: where the host's own name has no address, torchrun would look for one without end
TORCHRUN = [
    *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
    *("--local-addr", "127.0.0.1", "--nproc-per-node"),
]
PATIENCE = 120  # seconds


def environment() -> dict[str, str]:
    """Of processes on a CPU that can import this file."""
    path = os.pathsep.join([str(TESTS), str(Path(__file__).parent)])
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}


@functools.cache
def has_loopback() -> bool:
    """Whether processes of this machine can talk to each other, as torchrun's have to."""
    with socket.socket() as server, socket.socket() as client:
        client.settimeout(5)
        try:
            server.bind(("127.0.0.1", 0))
            server.listen()
            client.connect(server.getsockname())
        except OSError:
            return False
    return True


needs_loopback = pytest.mark.skipif(not has_loopback(), reason="no connections to 127.0.0.1")


def begin(*words: str, number: int = 2) -> subprocess.Popen:
    """Begin a Python command in several processes of torch.distributed."""
    return subprocess.Popen(
        [*TORCHRUN, str(number), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )


def finished(process: subprocess.Popen) -> tuple[str, str]:
    """Wait for what `begin` returned."""
    try:
        return process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then ends its processes
        _, err = process.communicate(timeout=PATIENCE)
        pytest.fail(f"not finished after {PATIENCE} s: {err[-4000:]}")


def together(*words: str, number: int = 2) -> subprocess.CompletedProcess:
    """Run a Python command in several processes of torch.distributed."""
    process = begin(*words, number=number)
    out, err = finished(process)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def train_denoiser(ranks: Ranks) -> dict[str, torch.Tensor]:
    """Three updates on this process's rows of the same windows and noise."""
    torch.manual_seed(0)
    config = DenoiserConfig(hidden_dim=16, num_layers=1, batch_size=B)
    network = pg.ResidualMLPDenoiser(S, A, H, hidden_dim=16, num_layers=1, num_train_timesteps=K)
    schedule = pg.NoiseSchedule.cosine(K)
    trainer = DenoiserTrainer(network, schedule, config, pg.SamplerConfig.official())
    trainer.ranks = ranks
    for step in range(3):
        trajectory, actions = draw(B, H, S + 2, seed=step), draw(B, H, A, seed=10 + step)
        noise = draw(B, H, S + 2, seed=20 + step)
        timesteps = torch.arange(B) % K
        parts = [part(rows, ranks) for rows in (trajectory, actions, timesteps, noise)]
        with trainer.network() as network_passes:
            loss, _ = denoising_loss(network_passes, *parts, schedule, trainer.sampler_config)
        trainer.minimize(loss)
    found = {f"denoiser.{name}": p.detach().clone() for name, p in network.named_parameters()}
    gradients = {f"gradient.{n}": p.grad.clone() for n, p in network.named_parameters()}
    return found | gradients


def train_policy(ranks: Ranks, **options) -> dict[str, torch.Tensor]:
    """Three actor-critic updates on this process's rows of the same trajectories."""
    torch.manual_seed(0)
    normalizer = pg.Normalizer(S, A)
    policy, value = pg.GaussianPolicy(S, A, 16), ValueFunction(S, 16)
    learner = ActorCritic(policy, value, normalizer, pg.A2CConfig(**options))
    learner.ranks = ranks
    found = {}
    for step in range(3):
        batch = [
            draw(B, H, S, seed=step),
            draw(B, H, A, seed=10 + step),
            draw(B, H, seed=20 + step),
            (draw(B, H, seed=30 + step) > 1.5).float(),
        ]
        metrics = learner.update(*(part(rows, ranks) for rows in batch))
    for name in ("actor_loss", "critic_loss", "update_size", "linesearch_steps", "value"):
        found[f"metric.{name}"] = torch.tensor(metrics[name])
    for owner, module in learner.modules().items():
        found |= {f"{owner}.{n}": p.detach().clone() for n, p in module.named_parameters()}
    return found


def part(rows: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    return rows.chunk(ranks.number)[ranks.index].contiguous()


def check_communication(ranks: Ranks) -> None:
    """What each call returns, seen from one of two processes."""
    i = ranks.index
    assert (ranks.number, current_ranks().index) == (2, i)
    tensors = [torch.full((3,), float(i)), torch.tensor(2.0 + i), torch.tensor([i + 1.0]).double()]
    ranks.average_(tensors)
    assert [t.tolist() for t in tensors] == [[0.5] * 3, 2.5, [1.5]]
    noted = {
        "first": torch.tensor([i, 3.0 - i]),
        "mean": torch.tensor([[2.0 * i]]),
        "lowest": torch.tensor([1.0 - i, i]),
        "highest": torch.tensor([1.0 - i, i]),
        "farthest": torch.tensor([-3.0 * i, 2.0 - 2.0 * i, 0.0]),
    }
    ranks.merge_([(tensor, which) for which, tensor in noted.items()])
    assert {which: tensor.tolist() for which, tensor in noted.items()} == {
        "first": [0.0, 3.0],
        "mean": [[1.0]],
        "lowest": [0.0, 0.0],
        "highest": [1.0, 1.0],
        "farthest": [-3.0, 2.0, 0.0],
    }
    ranks.merge_([])
    rows = torch.tensor([[i, 0.0], [i, 1.0]])
    everyone = ranks.concatenate(rows)
    assert everyone.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert torch.equal(ranks.own(everyone), rows)
    action = np.array([[0.1], [i]], dtype=np.float32)
    exchanged = ranks.exchange((action, 1 / 3 + i, True, i == 1))
    for j, (got, number, yes, flag) in enumerate(exchanged):
        assert got.dtype == np.float32 and got.tolist() == [[np.float32(0.1)], [j]]
        assert number == 1 / 3 + j and yes and bool(flag) == (j == 1)
    assert ranks.gather({"index": i}) == [{"index": 0}, {"index": 1}]
    assert ranks.any(i == 1) and not ranks.any(False)
    assert ranks.first(lambda: 7 + i) == 7
    with pytest.raises(pg.InputError, match="rows must be a multiple of .* processes, 2, got 3"):
        ranks.check_multiples(batch=4, rows=3)


def train_rollout(ranks: Ranks) -> dict[str, torch.Tensor]:
    """Three updates on this process's rows of the same windows: what the network then notes."""
    torch.manual_seed(0)
    network = pg.RolloutDenoiser(S, A, H, hidden_dim=16, num_layers=1, process_noise=True)
    network.step.difference_scale.fill_(0.7)  # else what the first process's windows say
    trainer = AveragedTrainer(network, 1e-3, 0.9)
    trainer.ranks = ranks
    for step in range(3):
        states, actions = draw(B, H, S + 2, seed=step), draw(B, H, A, seed=10 + step)
        states[..., -1] = -0.1
        if step > 0:
            states[3, -1, -1] = 4.0  # the first process's
        losses = network.transition_losses(*(part(rows, ranks) for rows in (states, actions)))
        trainer.minimize(sum(losses.values()))
    assert all(map(torch.equal, trainer.ema_model.buffers(), network.buffers()))
    return {f"rollout.{name}": buffer.clone() for name, buffer in network.named_buffers()}


def agent_config(**overrides) -> pg.TrainConfig:
    return tiny_config(num_envs=4, policy_delay_steps=0, log_interval=20, **overrides)


NOTING = {
    "rollout": {
        "schedule__num_train_timesteps": 5,
        "sampler__action_update": "exact",
        "sampler__scale_actions": False,
        "denoiser__kind": "rollout",
        "denoiser__process_noise": True,
    },
    "autoregressive": {"world_model": "autoregressive"},
    "ensemble": {"world_model": "ensemble", "ensemble__holdout_fraction": 0.4},
    "transformer": {"world_model": "transformer"},
    "autoregressive_diffusion": {"world_model": "autoregressive_diffusion"},
}
"""World models that note what windows show, by what they change."""


def resume_exactly(ranks: Ranks, folder: Path, **overrides) -> None:
    """A saved training continues, in the same number of processes, as if it had not been."""
    agent = pg.PolyGRAD("Pendulum-v1", config=agent_config(**overrides), device="cpu")
    agent.learn(60)
    agent.save(folder / "saved")
    agent.learn(40)
    loaded = pg.PolyGRAD.load(folder / "saved", device="cpu")
    loaded.learn(40)
    weights = agent.training.weights()
    for name, tensor in loaded.training.weights().items():
        assert torch.equal(tensor, weights[name]), name
    ours, theirs = (each.replay.state_dict()["steps"] for each in (agent, loaded))
    assert torch.equal(ours, theirs) and len(ours) == agent.num_timesteps == 100
    for other in ranks.gather((weights, ours))[1:]:  # all processes hold the same
        assert all(torch.equal(weights[name], tensor) for name, tensor in other[0].items())
        assert torch.equal(ours, other[1])
    taken = [each.state_dict()["episode_length"] for each in agent.training.collector.environments]
    assert taken == [25, 25]


def continue_with_more(ranks: Ranks, folder: Path) -> None:
    """What one process saved continues in both, each with its environments and random numbers."""
    agent = pg.PolyGRAD.load(folder / "alone", device="cpu")
    assert agent.num_timesteps == agent.replay.total_steps == 60
    collector, streams = agent.training.collector, agent.training.streams
    collector.restore()
    states = ranks.gather([each.state_dict() for each in collector.environments])
    merged = [states[i % 2][i // 2] for i in range(4)]
    for got, saved in zip(
        merged, load_checkpoint(folder / "alone")[1]["environments"], strict=True
    ):
        assert got["episode_seed"] == saved["episode_seed"]
        assert torch.equal(got["actions"], saved["actions"])
    for name in ("generator", "acting"):
        first, second = ranks.gather(getattr(streams, name).get_state())
        assert not torch.equal(first, second), name
    agent.learn(40)
    ours = agent.training.weights()
    assert all(torch.isfinite(tensor).all() for tensor in ours.values())
    for other in ranks.gather(ours)[1:]:
        assert all(torch.equal(ours[name], tensor) for name, tensor in other.items())


def work(folder: Path) -> None:
    """What the processes do."""
    torch.set_num_threads(1)
    with joined() as ranks:
        check_communication(ranks)
        found = train_denoiser(ranks) | train_policy(ranks) | train_rollout(ranks)
        found |= {
            f"counted.{name}": tensor
            for name, tensor in train_policy(ranks, advantage_moments="counted").items()
        }
        torch.save(found, folder / f"{ranks.index}.pt")
        resume_exactly(ranks, folder)
        for name, overrides in NOTING.items():
            resume_exactly(ranks, folder / name, **overrides)
        continue_with_more(ranks, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("together")
    alone = pg.PolyGRAD("Pendulum-v1", config=agent_config(), device="cpu")
    alone.learn(60)
    alone.save(path / "alone")
    code = path / "work.py"
    code.write_text(
        "import sys\nfrom pathlib import Path\nfrom test_ranks import work\n"
        "work(Path(sys.argv[1]))\n"
    )
    result = together(str(code), str(path))
    assert result.returncode == 0, result.stderr[:4000]
    return path


@needs_loopback
def test_two_processes_compute_what_one_does(folder):
    """To rounding, and the same bits in both."""
    alone = Ranks()
    wanted = train_denoiser(alone) | train_policy(alone) | train_rollout(alone)
    counted = train_policy(alone, advantage_moments="counted")
    wanted |= {f"counted.{name}": tensor for name, tensor in counted.items()}
    first, second = (torch.load(folder / f"{i}.pt") for i in range(2))
    assert first.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], tensor, rtol=1e-4, atol=2e-6, msg=name)


@needs_loopback
def test_what_two_processes_saved_one_continues(folder):
    """With their environments and replay buffer; they share one stream of random numbers then."""
    state = load_checkpoint(folder / "saved")[1]
    assert len(state["environments"]) == 4 and len(state["other_streams"]) == 1
    assert [each["episode_length"] for each in state["environments"]] == [15] * 4
    agent = pg.PolyGRAD.load(folder / "saved", device="cpu")
    assert agent.num_timesteps == agent.replay.total_steps == 60
    agent.learn(4)
    environments = agent.training.collector.environments
    assert [each.episode_length for each in environments] == [16] * 4
    for each, saved in zip(environments, state["environments"], strict=True):
        assert each.state_dict()["episode_seed"] == saved["episode_seed"]
        assert torch.equal(each.state_dict()["actions"][:15], saved["actions"])


def train(env_id: str, run: Path, total: int) -> list[str]:
    """Return the arguments of a short training."""
    tiny = (
        "--preset quick --horizon 4 --schedule.num-train-timesteps 3 --denoiser.hidden-dim 16 "
        "--denoiser.kind residual_mlp --sampler.action-update score --sampler.scale-actions "
        "--denoiser.num-layers 1 --denoiser.batch-size 16 --denoiser.pretrain-updates 5 "
        "--policy.hidden-dim 8 --imagined-batch-size 8 --learning-starts 40 --eval-interval 60 "
        "--eval-episodes 1 --log-interval 20 --checkpoint-interval 20 --policy-delay-steps 0"
    ).split()
    words = ["train", "--env-id", env_id, "--run-dir", str(run), "--no-progress"]
    return ["-m", "polygrad_fast.cli", *words, *tiny, "--total-timesteps", str(total)]


@needs_loopback
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_torchrun_stops_all_with_a_checkpoint(tmp_path, number):
    run = tmp_path / "run"
    process = begin(*train("Pendulum-v1", run, 10**6))
    deadline = time.monotonic() + PATIENCE
    while not list(run.glob("checkpoints/step_*")) and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(process.pid, number)
    out, err = finished(process)
    assert f"stopped; `polygrad-fast train --resume --run-dir {run}` continues" in out, err
    saved = {int(path.name[5:]) for path in run.glob("checkpoints/step_*")}
    assert max(saved) == pg.PolyGRAD.load(run, device="cpu").num_timesteps


@needs_loopback
def test_training_by_torchrun_and_resuming_alone(tmp_path, capsys):
    pytest.importorskip("mujoco")
    run = tmp_path / "run"
    result = together(*train("InvertedPendulum-v5", run, 80))
    assert result.returncode == 0, result.stderr[:4000]
    assert result.stdout.count("training InvertedPendulum-v5") == 1  # one speaks for all
    rows = read_metrics(run / "metrics.csv")
    assert [row["env_step"] for row in rows] == [0, 20, 40, 60, 80]
    assert rows[-1]["a2c/update_size"] > 0 and rows[2]["train/episode_length"] >= 1
    again = ["train", "--resume", "--run-dir", str(run), "--no-progress"]
    assert cli.main([*again, "--total-timesteps", "100"]) == 0
    assert "at environment step 80 of 100" in capsys.readouterr().out
    assert read_metrics(run / "metrics.csv")[-1]["env_step"] == 100

    odd = together("-m", "polygrad_fast.cli", *again, "--total-timesteps", "120", number=3)
    assert odd.returncode != 0
    assert "num_envs must be a multiple of the number of processes, 3, got 2" in odd.stderr


def test_alone_nothing_changes():
    ranks = current_ranks()
    assert (ranks.index, ranks.number) == (0, 1)
    tensor = torch.ones(3)
    ranks.average_([tensor])
    assert ranks.concatenate(tensor) is tensor and ranks.own(tensor) is tensor
    assert ranks.exchange((1, 2)) == [(1, 2)] and ranks.gather(3) == [3]
    assert ranks.any(True) and not ranks.any(False) and ranks.first(lambda: 5) == 5
    with joined() as joined_ranks:
        assert joined_ranks.number == 1


def test_a_length_that_cannot_be_split_leaves_no_run(tmp_path):
    two = Ranks()
    two.number = 2
    command = cli._parse(train("Pendulum-v1", tmp_path / "run", 81)[2:])
    with pytest.raises(pg.InputError, match="total_timesteps must be a multiple .* 2, got 81"):
        cli._train_together(command, tmp_path / "run", two)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("auto", "needs a GPU of its own, got 1 for at least 2"),
        ("cuda", "needs a GPU of its own, got 1 for at least 2"),
        (
            "cuda:0",
            "device must be 'auto', 'cuda' or 'cpu' for processes of torchrun, got 'cuda:0'",
        ),
    ],
)
def test_every_process_has_a_gpu_of_its_own(monkeypatch, device, message):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with fake_cuda.installed(), pytest.raises(pg.InputError, match=message), joined(device):
        pass


def test_metrics_are_means_over_what_all_have_measured():
    """Also of what one of them has not measured, and however often each has."""
    first, second = MetricSums(), MetricSums()
    first.add({"a2c/value": 1.0})
    first.add({"a2c/value": 2.0})
    second.add({"a2c/value": 6.0})
    second.add({"train/episode_return": -5.0})
    merged = merged_sums([first.state_dict(), second.state_dict()])
    assert merged.means() == {"a2c/value": 3.0, "train/episode_return": -5.0}
