"""The fused AdamW against PyTorch's own."""

import copy

import pytest
import torch

from polygrad_fast.learners.optimizers import FusedAdamW, clip_gradients

SHAPES = ((3, 4), (4,), (), (2, 1, 2))


def make_parameters(seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=g)) for shape in SHAPES]


def set_gradients(parameters, seed, missing=()):
    g = torch.Generator().manual_seed(seed)
    for i, p in enumerate(parameters):
        gradient = torch.randn(p.shape, generator=g)
        p.grad = None if i in missing else gradient


def make_pair(rate=0.1):
    ours, theirs = make_parameters(), make_parameters()
    return (ours, FusedAdamW(ours, torch.tensor(rate))), (
        theirs,
        torch.optim.AdamW(theirs, lr=rate, fused=True),
    )


def assert_equal_states(ours, theirs):
    (parameters, optimizer), (wanted, wanted_optimizer) = ours, theirs
    for p, w in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(p, w)
        for name, value in wanted_optimizer.state[w].items():
            torch.testing.assert_close(optimizer.state[p][name], value)


def test_steps_are_those_of_adamw():
    """Parameters without a gradient are left alone, their counts too."""
    ours, theirs = make_pair()
    for update in range(5):
        for parameters, optimizer in (ours, theirs):
            set_gradients(parameters, update, missing=(1, 2) if update == 2 else ())
            optimizer.step()
        assert_equal_states(ours, theirs)
    parameters, optimizer = ours
    assert [optimizer.state[p]["step"].item() for p in parameters] == [5, 4, 4, 5]


def test_a_skipped_step_changes_nothing():
    (parameters, optimizer), _ = make_pair()
    for skip, changes in ((1.0, False), (0.0, True), (1.0, False)):
        set_gradients(parameters, 0)
        if skip:
            parameters[0].grad.fill_(torch.nan)
        before = copy.deepcopy(([p.detach() for p in parameters], optimizer.moments))
        optimizer.step(torch.tensor(skip))
        after = [p.detach() for p in parameters], optimizer.moments
        assert torch.equal(after[1], before[1]) != changes
        assert all(torch.equal(a, b) != changes for a, b in zip(after[0], before[0], strict=True))


def test_the_learning_rate_is_read_at_every_step():
    (parameters, optimizer), _ = make_pair()
    before = parameters[0].detach().clone()
    optimizer.learning_rate.fill_(0.0)
    set_gradients(parameters, 0)
    optimizer.step()
    assert torch.equal(parameters[0], before) and optimizer.moments.any()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("updates", [0, 3])
def test_states_of_other_adamws_are_restored(fused, updates):
    """As older checkpoints have them."""
    theirs = make_parameters(), None
    theirs = theirs[0], torch.optim.AdamW(theirs[0], lr=0.05, fused=fused)
    ours = make_parameters(), None
    ours = ours[0], FusedAdamW(ours[0], torch.tensor(0.1))
    set_gradients(ours[0], 9)
    ours[1].step()
    rate = ours[1].learning_rate
    for update in range(updates):
        set_gradients(theirs[0], update)
        theirs[1].step()
    ours[1].load_state_dict(copy.deepcopy(theirs[1].state_dict()))
    with torch.no_grad():
        for p, w in zip(ours[0], theirs[0], strict=True):
            p.copy_(w)
    assert ours[1].learning_rate is rate is ours[1].param_groups[0]["lr"]
    assert rate.item() == pytest.approx(0.05)
    for update in range(2):
        for parameters, optimizer in (ours, theirs):
            set_gradients(parameters, 10 + update)
            optimizer.step()
    assert_equal_states(ours, theirs)


def test_moments_are_one_vector_also_after_a_restore():
    (parameters, optimizer), _ = make_pair()
    set_gradients(parameters, 0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.moments.zero_()
    assert not any(t.any() for state in optimizer.state.values() for t in state.values())
    optimizer.load_state_dict(saved)
    optimizer.step()
    assert all(optimizer.state[p]["step"] == 2 for p in parameters)
    optimizer.moments.fill_(7.0)
    assert all((optimizer.state[p]["exp_avg"] == 7).all() for p in parameters)


@pytest.mark.parametrize("limit", [0.1, 1e3, float("inf")])
def test_gradients_are_clipped_as_pytorch_does(limit):
    ours, theirs = make_parameters(), make_parameters()
    for parameters in (ours, theirs):
        set_gradients(parameters, 3)
    norm = clip_gradients([p.grad for p in ours], limit)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, limit))
    for p, w in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.grad, w.grad)
