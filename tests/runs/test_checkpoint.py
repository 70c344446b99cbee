import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from polygrad_fast.errors import CheckpointError
from polygrad_fast.runs import checkpoint
from polygrad_fast.runs.checkpoint import load_checkpoint, read_metadata, save_checkpoint
from polygrad_fast.runs.checkpoint_manager import CheckpointManager


def some_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(7, 5, generator=generator)
    return {
        "base": base,
        "shared": base,
        "transposed": base.T,
        "column": base[:, 1],
        "parameter": torch.nn.Parameter(torch.randn(3, generator=generator)),
        "half": base.bfloat16(),
        "steps": torch.tensor(seed),
        "empty": torch.zeros(0, 4),
    }


def some_state(seed: int = 0) -> dict:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {
        "seed": seed,
        "optimizer": optimizer.state_dict(),
        "numpy_rng": np.random.default_rng(seed).bit_generator.state,
        "torch_rng": torch.get_rng_state(),
        "nested": [1, (2.5, None, True), {3: "three"}, OrderedDict(a=torch.ones(2))],
    }


def assert_equal(got, wanted) -> None:
    if isinstance(wanted, torch.Tensor):
        assert got.dtype == wanted.dtype and torch.equal(got, wanted.detach())
    elif isinstance(wanted, dict):
        assert got.keys() == wanted.keys()
        for key in wanted:
            assert_equal(got[key], wanted[key])
    elif isinstance(wanted, list | tuple):
        assert type(got) is type(wanted) and len(got) == len(wanted)
        for one, other in zip(got, wanted, strict=True):
            assert_equal(one, other)
    else:
        assert got == wanted and type(got) is type(wanted)


def visible(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def test_round_trip(tmp_path):
    weights, state, metadata = some_weights(), some_state(), {"env_step": 3, "score": [1.5, None]}
    path = save_checkpoint(tmp_path / "new" / "one", weights, state, metadata)
    got_weights, got_state, got_metadata = load_checkpoint(path)
    assert_equal(got_weights, weights)
    assert_equal(got_state, state)
    assert got_metadata == metadata
    assert visible(path.parent) == ["one"]
    assert visible(path) == ["manifest.json", "metadata.json", "state.pt", "weights.safetensors"]
    assert all(type(tensor) is torch.Tensor for tensor in got_weights.values())


def test_files_are_readable_without_this_package(tmp_path):
    path = save_checkpoint(tmp_path / "one", some_weights(), some_state(), {"a": 1})
    assert_equal(load_file(path / "weights.safetensors"), some_weights())
    assert torch.load(path / "state.pt", weights_only=True)["seed"] == 0
    assert json.loads((path / "metadata.json").read_text()) == {"a": 1}


def test_state_is_optional_and_str_paths_work(tmp_path):
    save_checkpoint(str(tmp_path / "one"), {}, None, {})
    assert load_checkpoint(str(tmp_path / "one")) == ({}, None, {})


def test_a_slice_of_a_large_buffer_is_cut_out(tmp_path):
    buffer = torch.arange(1_000_000, dtype=torch.float32)
    path = save_checkpoint(tmp_path / "one", {}, {"part": buffer[::100_000]}, {})
    assert (path / "state.pt").stat().st_size < 10_000
    assert_equal(load_checkpoint(path)[1]["part"], buffer[::100_000])


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None)
@given(state=st.dictionaries(st.text(max_size=3), plain, max_size=3))
def test_any_accepted_state_comes_back(tmp_path_factory, state):
    path = save_checkpoint(tmp_path_factory.mktemp("any") / "one", {}, state, {})
    assert_equal(load_checkpoint(path)[1], state)


class Odd:
    pass


@pytest.mark.parametrize(
    ("value", "type_name"),
    [
        (np.float64(1.0), "numpy.float64"),
        (np.zeros(2), "numpy.ndarray"),
        ({1, 2}, "builtins.set"),
        (Odd(), "Odd"),
        (torch.Size([1]), "torch.Size"),
        (torch.float32, "torch.dtype"),
        (b"bytes", "builtins.bytes"),
    ],
)
def test_wrong_type_in_the_state_is_named_and_nothing_is_written(tmp_path, value, type_name):
    with pytest.raises(TypeError, match=r"state\['replay'\]\[1\]\['x'\] must .*" + type_name):
        save_checkpoint(tmp_path / "one", {}, {"replay": [0, {"x": value}]}, {})
    assert visible(tmp_path) == []


def test_other_wrong_types_write_nothing(tmp_path):
    with pytest.raises(TypeError, match=r"keys of state\['a'\] must .*got \(1, 2\) of type tuple"):
        save_checkpoint(tmp_path / "one", {}, {"a": {(1, 2): 3}}, {})
    with pytest.raises(TypeError, match=r"weights must map .*, got 'w' with a list"):
        save_checkpoint(tmp_path / "one", {"w": [1.0]}, None, {})
    with pytest.raises(TypeError, match="metadata cannot be written as JSON: .*ndarray"):
        save_checkpoint(tmp_path / "one", {}, None, {"m": np.zeros(1)})
    assert visible(tmp_path) == []


def test_replaces_a_checkpoint_and_nothing_else(tmp_path):
    for value in (1, 2):
        save_checkpoint(tmp_path / "one", some_weights(value), {"value": value}, {})
    assert load_checkpoint(tmp_path / "one")[1] == {"value": 2}
    assert visible(tmp_path) == ["one"]

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"thesis must be .*, got a directory .*chapter"):
        save_checkpoint(tmp_path / "thesis", {}, None, {})
    with pytest.raises(CheckpointError, match=r"chapter.tex must be .*, got a file"):
        save_checkpoint(tmp_path / "thesis" / "chapter.tex", {}, None, {})
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"


def truncate(path: Path) -> None:
    with open(path / "state.pt", "r+b") as file:
        file.truncate(10)


def flip_a_bit(path: Path) -> None:
    data = bytearray((path / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "weights.safetensors").write_bytes(data)


def edit_manifest(path: Path, **changes) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | changes))


DAMAGE = {
    "truncated": (truncate, r"state\.pt must have \d{3,} bytes, got 10$"),
    "bit flip": (flip_a_bit, r"weights\.safetensors must have the checksum \w{12}\.\.\., got"),
    "file missing": (lambda p: (p / "metadata.json").unlink(), r"metadata\.json is missing"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "is not a checkpoint: it has no man"),
    "not JSON": (lambda p: (p / "manifest.json").write_bytes(b"\0\0"), "cannot read manifest"),
    "JSON list": (
        lambda p: (p / "manifest.json").write_text("[]"),
        "format_version must be 1, got None",
    ),
    "future": (lambda p: edit_manifest(p, format_version=2), "format_version must be 1, got 2"),
    "no files": (lambda p: edit_manifest(p, files=None), "manifest.json is damaged"),
    "strange files": (
        lambda p: edit_manifest(p, files={}),
        r"manifest.json must list .*, got \[\]",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_skipped(tmp_path, kind):
    damage, message = DAMAGE[kind]
    manager = CheckpointManager(tmp_path)
    good = manager.save(10, some_weights(), some_state(), {"env_step": 10})
    bad = manager.save(20, some_weights(), some_state(), {"env_step": 20})
    best = manager.save_best(some_weights(), {})
    assert manager.latest() == bad
    damage(bad)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(bad)
    assert str(bad) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.warns(UserWarning, match=r"skipped a damaged checkpoint: .*step_000000020.*"):
        assert manager.latest() == good
    assert manager.best() == best


def test_missing_and_wrong_paths(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere does not exist"):
        load_checkpoint(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file is not a checkpoint"):
        load_checkpoint(tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"is not a checkpoint"):
        load_checkpoint(tmp_path)


def test_an_undamaged_file_with_the_wrong_content(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.torch, "save", lambda state, file: file.write(b"not a pickle"))
    path = save_checkpoint(tmp_path / "one", {}, {"a": 1}, {})
    with pytest.raises(CheckpointError, match="one cannot be read: "):
        load_checkpoint(path)


def test_keeps_the_last_n(tmp_path):
    manager = CheckpointManager(tmp_path, keep_last=2)
    assert manager.latest() is None and manager.best() is None
    assert not manager.directory.exists()
    for env_step in (5, 10, 15, 1_000_000_000):
        path = manager.save(env_step, some_weights(), {"env_step": env_step}, {})
        assert manager.latest() == path
    manager.save_best({}, {"mean_reward": 3.0})
    assert visible(manager.directory) == ["best", "step_000000015", "step_1000000000"]
    assert load_checkpoint(manager.best()) == ({}, None, {"mean_reward": 3.0})
    manager.save_best({}, {"mean_reward": 4.0})
    assert load_checkpoint(manager.best())[2] == {"mean_reward": 4.0}
    with pytest.raises(ValueError, match="keep_last must be an integer of at least 1, got 0"):
        CheckpointManager(tmp_path, keep_last=0)


def test_what_a_manager_knows_of_lost_damaged_and_others_checkpoints(tmp_path):
    manager = CheckpointManager(tmp_path)
    manager.save_best({}, {"num_timesteps": 3})
    assert not manager.has_saved() and manager.damage("last") == manager.damage("best") == []
    path = manager.save(5, {}, {}, {})
    other = CheckpointManager(tmp_path)
    assert not manager.others_saved() and not other.others_saved()
    other.save(6, {}, {}, {})
    assert manager.others_saved() and not other.others_saved()
    assert read_metadata(manager.best()) == {"num_timesteps": 3}
    truncate(path)
    (found,) = manager.damage("last")
    assert re.search(r"step_000000005: state\.pt must have \d+ bytes, got 10", found)
    (manager.best() / "metadata.json").write_text("")
    (found,) = manager.damage("best")
    assert re.search(r"best: metadata\.json must have \d+ bytes, got 0", found)
    with pytest.raises(CheckpointError, match=r"metadata\.json must have \d+ bytes, got 0"):
        read_metadata(tmp_path / "checkpoints" / "best")
    shutil.rmtree(tmp_path / "checkpoints")
    assert manager.has_saved() and CheckpointManager(tmp_path).has_saved()


def test_newest_is_what_was_saved_last(tmp_path):
    """A run resumed from an earlier step overtakes what it left behind."""
    manager = CheckpointManager(tmp_path, keep_last=2)
    for env_step in (10, 20, 30):
        manager.save(env_step, {}, {"run": 1}, {})
    assert manager.save(15, {}, {"run": 2}, {}) == manager.latest()
    assert visible(manager.directory) == ["step_000000015", "step_000000030"]
    manager.save(30, {}, {"run": 2}, {})
    assert load_checkpoint(manager.latest())[1] == {"run": 2}
    assert visible(manager.directory) == ["step_000000015", "step_000000030"]


def test_damaged_ones_do_not_count_as_kept(tmp_path):
    manager = CheckpointManager(tmp_path, keep_last=2)
    for env_step in (1, 2, 3):
        path = manager.save(env_step, {}, {"env_step": env_step}, {})
    truncate(path)
    manager.save(4, {}, {"env_step": 4}, {})
    assert visible(manager.directory) == ["step_000000002", "step_000000004"]


def read_everything(run_dir: Path) -> None:
    manager = CheckpointManager(run_dir)
    for path in (manager.latest(), manager.best(), manager.directory / "step_000000002"):
        load_checkpoint(path)
        read_metadata(path)
    assert manager.has_saved() and not manager.others_saved()
    assert manager.damage("last") == manager.damage("best") == []


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    """Every file and directory with its inode and the time of its last change."""
    return {
        str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in directory.rglob("*")
    }


def leave_what_killed_saves_leave(directory: Path) -> None:
    """Half a checkpoint, one half deleted, and two that are moved aside, without their new ones."""
    half = directory / ".tmp-step_000000003-0123456789ab"
    half.mkdir()
    (half / "state.pt").write_bytes(b"half")
    (directory / ".tmp-best-ba9876543210").mkdir()
    for name in ("best", "step_000000002"):
        (directory / name).rename(directory / f".old-{name}")


def test_reading_changes_nothing_and_a_save_removes_what_killed_ones_left(tmp_path):
    manager = CheckpointManager(tmp_path)
    for env_step in (1, 2):
        manager.save(env_step, {}, {}, {})
    manager.save_best({}, {})
    leave_what_killed_saves_leave(manager.directory)
    before = snapshot(tmp_path)
    read_everything(tmp_path)
    assert snapshot(tmp_path) == before
    manager.save_best({}, {})
    left = [".old-step_000000002", "best", "step_000000001"]
    assert visible(manager.directory) == left
    (manager.directory / ".tmp-step_000000003-0123456789ab").mkdir()
    manager.save(2, {}, {}, {})
    assert visible(manager.directory) == ["best", "step_000000001", "step_000000002"]


def test_a_save_that_another_process_reads_meanwhile(tmp_path, monkeypatch):
    manager = CheckpointManager(tmp_path)
    for env_step in (1, 2):
        manager.save(env_step, {}, {}, {})
    manager.save_best({}, {})
    original, during = torch.save, []

    def save_while_another_process_reads(state, file):
        before = snapshot(tmp_path)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            pool.apply(read_everything, (tmp_path,))
        assert snapshot(tmp_path) == before
        during.extend(name for name in visible(manager.directory) if name.startswith(".tmp-"))
        original(state, file)

    monkeypatch.setattr(checkpoint.torch, "save", save_while_another_process_reads)
    path = manager.save(3, {}, {"a": 1}, {})
    assert len(during) == 1 and during[0].startswith(".tmp-step_000000003-")
    assert load_checkpoint(path)[1] == {"a": 1}
    assert not [name for name in visible(manager.directory) if name.startswith(".tmp-")]


def test_of_two_saves_to_one_path_at_once_one_fails_and_the_other_is_complete(
    tmp_path, monkeypatch
):
    original = torch.save

    def save_while_another_process_saves(state, file):
        monkeypatch.setattr(checkpoint.torch, "save", original)
        save_checkpoint(tmp_path / "one", some_weights(2), {"by": "the other"}, {})
        save_checkpoint(tmp_path / "one-more", {}, None, {})
        original(state, file)

    save_checkpoint(tmp_path / "one-more", {}, None, {})
    monkeypatch.setattr(checkpoint.torch, "save", save_while_another_process_saves)
    with pytest.raises(FileNotFoundError, match="one"):
        save_checkpoint(tmp_path / "one", some_weights(1), {"by": "the first"}, {})
    weights, state, _ = load_checkpoint(tmp_path / "one")
    assert state == {"by": "the other"}
    assert_equal(weights, some_weights(2))
    assert visible(tmp_path) == ["one", "one-more"]


def test_a_save_leaves_temporaries_of_other_names_alone(tmp_path):
    others = [".tmp-one-more-0123456789ab", ".tmp-one-notes", ".tmp-other-0123456789ab"]
    for name in (*others, ".tmp-one-0123456789ab"):
        (tmp_path / name).mkdir()
    save_checkpoint(tmp_path / "one", {}, None, {})
    assert visible(tmp_path) == [*others, "one"]


class FullDisk:
    """Wraps open() so that all files together take this many bytes."""

    def __init__(self, room: int) -> None:
        self.room = room

    def __call__(self, path, mode="r", *args, **kwargs):
        file = open(path, mode, *args, **kwargs)
        if "x" in mode:
            write = file.write
            disk = self

            class File:
                def __enter__(self):
                    return self

                def __exit__(self, *exception):
                    file.close()

                def write(self, data):
                    disk.room -= len(data)
                    if disk.room < 0:
                        write(data[: disk.room])
                        raise OSError(errno.ENOSPC, "No space left on device")
                    return write(data)

                def flush(self):
                    file.flush()

                def fileno(self):
                    return file.fileno()

            return File()
        return file


def test_a_full_disk_keeps_the_older_checkpoints(tmp_path, monkeypatch):
    manager = CheckpointManager(tmp_path, keep_last=1)
    first = manager.save(1, some_weights(1), some_state(1), {"env_step": 1})
    manager.save_best(some_weights(1), {"env_step": 1})
    total = sum(file.stat().st_size for file in first.iterdir())
    for room in [*range(0, total, total // 12), total - 1]:
        for save in (
            lambda: manager.save(2, some_weights(2), some_state(2), {"env_step": 2}),
            lambda: manager.save(1, some_weights(2), some_state(2), {"env_step": 2}),
            lambda room=room: manager.save_best(some_weights(2), {"a": "x" * room}),
        ):
            monkeypatch.setattr(checkpoint, "open", FullDisk(room), raising=False)
            with pytest.raises(OSError) as caught:
                save()
            assert caught.value.errno == errno.ENOSPC
            monkeypatch.undo()
            assert visible(manager.directory) == ["best", "step_000000001"]
            assert manager.latest() == first
            assert_equal(load_checkpoint(first)[0], some_weights(1))
            assert load_checkpoint(manager.best())[2] == {"env_step": 1}


# One process imports torch once and forks the processes that are killed.
KILL_SCRIPT = textwrap.dedent(
    """
    import os, random, shutil, signal, sys, time, warnings
    import torch
    from pathlib import Path
    from polygrad_fast.runs.checkpoint import load_checkpoint
    from polygrad_fast.runs.checkpoint_manager import CheckpointManager

    run_dir, mode = Path(sys.argv[1]), sys.argv[2]
    # A kill must not leave anything that latest() has to skip with a warning.
    warnings.simplefilter("error", UserWarning)

    def check(saved, best_saved):
        there = sorted(os.listdir(run_dir / "checkpoints"))
        manager = CheckpointManager(run_dir, keep_last=2)
        found = []
        for path, wanted in ((manager.latest(), saved), (manager.best(), best_saved)):
            if wanted < 0 and path is None:
                found.append(-1)
                continue
            weights, state, metadata = load_checkpoint(path)
            i = metadata["i"]
            assert (weights["w"] == i).all()
            if state is not None:
                assert state["i"] == i and torch.equal(state["copy"], weights["w"])
            assert i >= wanted, (i, wanted)
            found.append(i)
        assert sorted(os.listdir(manager.directory)) == there, "reading removes nothing"
        return manager, max(found) + 1

    def fork(work):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            work(write)
            os._exit(0)
        os.close(write)
        return pid, read

    def last_saved(lines, before):
        acknowledged = [line.split() for line in lines]
        return tuple(
            max([before[which]] + [int(i) for kind, i in acknowledged if kind == name])
            for which, name in enumerate(("step", "best"))
        )

    def saves(write, manager, start, count):
        for i in range(start, start + count):
            tensor = torch.full((random.randrange(1, 5000),), float(i))
            # Steps repeat: then a directory that is not empty is replaced.
            manager.save(i // 2, {"w": tensor}, {"i": i, "copy": tensor}, {"i": i})
            os.write(write, b"step %d\\n" % i)
            manager.save_best({"w": tensor}, {"i": i})
            os.write(write, b"best %d\\n" % i)

    os.makedirs(run_dir / "checkpoints")
    saved, start, kills = (-1, -1), 0, 0
    manager = CheckpointManager(run_dir, keep_last=2)
    if mode == "random":
        while kills < 25:
            pid, read = fork(lambda write: saves(write, manager, start, 10**9))
            with open(read) as file:
                # Counting saves, not time, makes progress on a slow disk as well.
                lines = [file.readline() for _ in range(random.randrange(1, 6))]
                time.sleep(random.uniform(0.0, 0.02))
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                kills += 1
                saved = last_saved([*lines, *file.readlines()], saved)
            manager, start = check(*saved)
    else:
        # Die before the n-th call that changes the disk, for every n that a few saves reach.
        def die_at(n):
            def wrap(function):
                def call(*args, **kwargs):
                    calls[0] += 1
                    if calls[0] == n:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return function(*args, **kwargs)
                return call
            calls = [0]
            for name in ("mkdir", "replace", "fsync", "unlink", "rmdir"):
                setattr(os, name, wrap(getattr(os, name)))

        n, finished = 0, False
        while not finished:
            n += 1
            def work(write):
                die_at(n)
                saves(write, manager, start, 3)
            pid, read = fork(work)
            finished = os.waitpid(pid, 0)[1] == 0
            kills += not finished
            with open(read) as file:
                saved = last_saved(file.readlines(), saved)
            manager, start = check(*saved)
            start += start % 2  # the same pattern of new and repeated steps each time
    manager.save(start, {}, {}, {"i": start})
    left = [name for name in os.listdir(manager.directory) if name.startswith(".tmp-")]
    assert not left, left
    print(kills, start)
    """
)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize(
    ("mode", "least_kills"),
    [("random", 25), pytest.param("every step", 80, marks=pytest.mark.slow)],
)
def test_kill_9_leaves_complete_checkpoints(tmp_path, mode, least_kills):
    assert signal.SIGKILL == 9
    root = Path(checkpoint.__file__).parents[2]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
    }
    result = subprocess.run(
        [sys.executable, "-c", KILL_SCRIPT, str(tmp_path / "run"), mode],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    kills, saves = map(int, result.stdout.split())
    assert kills >= least_kills and saves >= 25, result.stdout
