"""Sampling in batches, interrupted and continued."""

import json

import pytest
import torch

from polygrad_fast.config import EDMConfig, PolicyGuidanceConfig
from polygrad_fast.denoisers.temporal_unet import TemporalUNet
from polygrad_fast.errors import CheckpointError, InputError, NonFiniteError
from polygrad_fast.offline import generation
from polygrad_fast.offline.generation import generate
from polygrad_fast.sampling.edm_sampler import EDMSampler
from polygrad_fast.sampling.policy_score import PolicyGuidance
from polygrad_fast.trajectory_normalizer import TrajectoryNormalizer

S, A, L = 3, 2, 5
D = S + A + 2


def make_sampler(seed=0, steps=3, **options) -> EDMSampler:
    unet = TemporalUNet(S, A, 24, 2, torch.Generator().manual_seed(seed))
    return EDMSampler(unet, EDMConfig(num_inference_steps=steps, **options))


def make_guidance(coefficient=1.0, seed=0, std=1.0) -> PolicyGuidance:
    torch.manual_seed(seed)
    policy = torch.nn.Linear(S, A)
    normalizer = TrajectoryNormalizer(torch.zeros(D), torch.full((D,), std), S, A)
    return PolicyGuidance(policy, normalizer, PolicyGuidanceConfig(coefficient=coefficient))


def sampled(folder=None, sampler=None, total=10, seed=7, **options):
    options = {"batch_size": 4, "progress": False} | options
    return generate(sampler or make_sampler(), total, L, seed, folder, **options)


class Killed(Exception):
    pass


def kill_in_batch(monkeypatch, number):
    """Let sampling die while that batch is sampled."""
    sample, calls = EDMSampler.sample, []

    def dying(self, *arguments, **options):
        calls.append(1)
        if len(calls) == number + 1:
            raise Killed
        return sample(self, *arguments, **options)

    monkeypatch.setattr(EDMSampler, "sample", dying)
    return calls


@pytest.mark.parametrize("guidance", [None, make_guidance()])
def test_continued_trajectories_are_the_same(tmp_path, monkeypatch, guidance):
    whole = sampled(guidance=guidance)
    assert whole.shape == (10, L, D) and whole.dtype == torch.float32
    with monkeypatch.context() as patch:
        kill_in_batch(patch, 2)
        with pytest.raises(Killed):
            sampled(tmp_path, guidance=guidance)
    stored = sorted(path.name for path in tmp_path.iterdir())
    assert stored == ["batch_00000.npz", "batch_00001.npz", "generation.json"]
    torch.manual_seed(99)
    with monkeypatch.context() as patch:
        calls = kill_in_batch(patch, 5)
        continued = sampled(tmp_path, guidance=guidance)
    assert len(calls) == 1
    assert torch.equal(continued, whole)
    assert torch.equal(sampled(tmp_path, guidance=guidance), whole)


def test_batches_and_seeds_have_streams_of_their_own():
    first, other = sampled(), sampled(seed=8)
    batches = [*first.split(4), *other.split(4)]
    for i, one in enumerate(batches):
        for two in batches[:i]:
            assert not torch.equal(one[:2], two[:2])
    assert torch.equal(first[:4], sampled(total=4))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seed": 8}, "seed"),
        ({"total": 11}, "num_trajectories"),
        ({"batch_size": 5}, "batch_size"),
        ({"sampler": make_sampler(seed=1)}, "denoiser"),
        ({"sampler": make_sampler(s_churn=1.0)}, "sampler"),
        ({"guidance": None}, "guidance"),
        ({"guidance": make_guidance(0.5)}, "guidance_config"),
        ({"guidance": make_guidance(seed=1)}, "policy"),
        ({"guidance": make_guidance(std=2.0)}, "normalizer"),
    ],
)
def test_another_generation_is_refused(tmp_path, change, name):
    arguments = {"guidance": make_guidance()}
    sampled(tmp_path, **arguments)
    with pytest.raises(CheckpointError, match=f"trajectories of another {name}, "):
        sampled(tmp_path, **(arguments | change))


@pytest.mark.parametrize("content", [b"", b"no archive"])
def test_damaged_files_are_named(tmp_path, content):
    sampled(tmp_path)
    (tmp_path / "batch_00001.npz").write_bytes(content)
    with pytest.raises(CheckpointError, match="batch_00001.npz must hold sampled trajectories"):
        sampled(tmp_path)
    (tmp_path / generation.DESCRIPTION).write_text("{")
    with pytest.raises(CheckpointError, match="generation.json must be JSON"):
        sampled(tmp_path)


def test_what_is_not_finite_is_not_stored(tmp_path):
    sampler = make_sampler()
    with torch.no_grad():
        sampler.denoiser.output.bias.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="batch 0 .* holds NaN or infinity"):
        sampled(tmp_path, sampler)
    assert [path.name for path in tmp_path.iterdir()] == ["generation.json"]


def test_the_description_says_what_was_sampled(tmp_path):
    sampled(tmp_path, guidance=make_guidance())
    described = json.loads((tmp_path / "generation.json").read_text())
    assert described["sampler"]["num_inference_steps"] == 3
    assert described["guidance_config"]["coefficient"] == 1.0 and described["seed"] == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total": 0}, "num_trajectories must be an integer of at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"folder": 3}, "folder must be a path"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(InputError, match=message):
        sampled(**options)


def test_a_progress_bar_counts_trajectories(capsys):
    sampled(progress=True)
    assert "10/10" in capsys.readouterr().err
