"""Reading datasets: Minari's folders, D4RL's HDF5 files, and npz; and writing them."""

import json
import os
import shutil

import gymnasium
import h5py
import minari
import numpy as np
import pytest
from gymnasium.spaces import Box

from polygrad_fast.data import load, write
from polygrad_fast.data.collect import collect_episodes, random_actions
from polygrad_fast.data.load import load_dataset
from polygrad_fast.data.offline_dataset import FLAGS, FLOATS
from polygrad_fast.data.write import check_output, write_dataset
from polygrad_fast.errors import InputError

ROWS = 12


def d4rl_arrays(**changes):
    generator = np.random.default_rng(0)
    timeouts = np.zeros(ROWS, dtype=bool)
    timeouts[5] = True
    arrays = {
        "observations": generator.normal(size=(ROWS, 3)).astype(np.float32),
        "actions": generator.uniform(-1, 1, (ROWS, 2)).astype(np.float32),
        "rewards": generator.normal(size=ROWS).astype(np.float32),
        "terminals": np.arange(ROWS) == 8,
        "timeouts": timeouts,
    }
    arrays |= changes
    return {name: array for name, array in arrays.items() if array is not None}


def save(path, arrays):
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                file[name] = array
    return path


def collected(env_id="Hopper-v5", episodes=4):
    env = gymnasium.make(env_id)
    dataset = collect_episodes(
        env, random_actions(env, 0), episodes, seed=1, recipe={"policy": "random"}
    )
    return dataset, env


def assert_same(got, wanted):
    for name in (*FLOATS, *FLAGS, "ends"):
        assert np.array_equal(getattr(got, name), getattr(wanted, name)), name
    assert got.true_next and got.env_id == wanted.env_id and got.recipe == wanted.recipe


@pytest.mark.parametrize("name", ["hopper_medium-v2.hdf5", "hopper-medium-v2.npz"])
def test_d4rl_rows(tmp_path, name):
    arrays = d4rl_arrays()
    dataset = load_dataset(save(tmp_path / name, arrays))
    for field in ("observations", "actions", "rewards", "terminals", "timeouts"):
        assert np.array_equal(getattr(dataset, field), arrays[field][:-1])
    assert np.array_equal(dataset.next_observations, arrays["observations"][1:])
    assert np.flatnonzero(dataset.ends).tolist() == [5, 8, 10]
    assert (dataset.name, dataset.env_id, dataset.true_next) == (
        "hopper-medium-v2", "Hopper-v2", False
    )  # fmt: skip
    following = arrays["observations"] + 1
    extra = save(tmp_path / f"more{name}", arrays | {"next_observations": following})
    dataset = load_dataset(extra)
    if name.endswith(".npz"):  # its own next observations, of all rows
        assert len(dataset) == ROWS and dataset.true_next
        assert np.array_equal(dataset.next_observations, following)
    else:
        assert len(dataset) == ROWS - 1 and not dataset.true_next


def test_minari_and_npz_keep_what_was_collected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset, env = collected()
    write_dataset(dataset, load.Path("hopper-random"), env)
    assert_same(load_dataset("hopper-random"), dataset)
    assert_same(load_dataset(tmp_path / "hopper-random" / "data"), dataset)
    write_dataset(dataset, tmp_path / "hopper.npz", env)
    assert_same(load_dataset("hopper.npz"), dataset)
    assert sorted(os.listdir(tmp_path)) == ["hopper-random", "hopper.npz"]
    assert dataset.recipe["versions"]["gymnasium"] == gymnasium.__version__

    # minari itself reads it, in its own place under its id
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    shutil.copytree("hopper-random", "minari/hopper-random-v0")
    theirs = minari.load_dataset("hopper-random-v0")
    assert theirs.total_episodes == 4 and theirs.total_steps == len(dataset)
    assert theirs.recover_environment().spec.id == "Hopper-v5"
    episode = theirs[3]
    assert np.array_equal(episode.observations[-1], dataset.next_observations[-1])
    assert episode.terminations[-1] and episode.rewards.sum() == pytest.approx(
        dataset.episode_returns()[3], rel=1e-5
    )
    assert_same(load_dataset("hopper-random-v0"), dataset)


def test_minaris_unfinished_episodes_end_without_a_flag(tmp_path):
    dataset, env = collected()
    write_dataset(dataset, tmp_path / "d", env)
    with h5py.File(tmp_path / "d" / "data" / "main_data.hdf5", "r+") as file:
        file["episode_1/terminations"][-1] = False
    read = load_dataset(tmp_path / "d")
    assert np.array_equal(read.ends, dataset.ends) and read.num_episodes == 4
    assert read.terminals.sum() == 3 and not read.timeouts.any()


@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"timeouts": None},
            "timeouts is missing, wanted the arrays observations, .*, got actions",
        ),
        ({"actions": np.zeros((ROWS - 1, 2))}, "actions must have 12 rows as observations, got 11"),
        ({"rewards": np.full(ROWS, np.nan)}, r"rewards\[0\] must be a finite .* number, got nan"),
        ({"rewards": np.zeros((ROWS, 1))}, r"rewards must have shape \[steps\], got \[12, 1\]"),
        ({"observations": np.zeros(ROWS)}, r"observations must have shape \[steps, size\], got"),
        ({"terminals": np.full(ROWS, 2)}, r"terminals\[0\] must be 0 or 1, got 2"),
    ],
)
def test_bad_arrays_are_named(tmp_path, suffix, changes, message):
    path = save(tmp_path / f"bad{suffix}", d4rl_arrays(**changes))
    with pytest.raises(InputError, match=f"{path}: {message}"):
        load_dataset(path)


def test_the_last_rows_are_checked_too(tmp_path):
    """The last observation is only a next observation: it is named by its place in the file."""
    arrays = d4rl_arrays()
    arrays["observations"][-1, 2] = np.inf
    with pytest.raises(InputError, match=r"observations\[11, 2\] must be a finite"):
        load_dataset(save(tmp_path / "bad.npz", arrays))
    one = {name: array[:1] for name, array in d4rl_arrays().items()}
    with pytest.raises(InputError, match="at least 2 rows without next_observations, got 1"):
        load_dataset(save(tmp_path / "one.npz", one))


@pytest.mark.parametrize("name", ["cut.npz", "text.npz", "empty.npz", "text.hdf5", "cut.hdf5"])
def test_damaged_files_are_named(tmp_path, name):
    path = save(tmp_path / name, d4rl_arrays())
    data = path.read_bytes()
    path.write_bytes({"cut": data[: len(data) // 2], "text": b"hello", "empty": b""}[path.stem])
    with pytest.raises(InputError, match=f"{path} cannot be read as"):
        load_dataset(path)


def test_what_is_no_dataset_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "folder").mkdir()
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    np.savez(tmp_path / "objects.npz", **d4rl_arrays(rewards=np.array([None] * ROWS)))
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file["weights"] = np.zeros(3)
    with h5py.File(tmp_path / "group.hdf5", "w") as file:
        file.create_group("observations")
    for source, message in (
        (tmp_path / "notes.txt", "notes.txt is not a dataset, wanted a folder of Minari, or"),
        (tmp_path / "folder", "folder is not a dataset of Minari: it has no data/metadata.json"),
        (tmp_path / "gone.npz", "gone.npz does not exist"),
        (tmp_path / "array.npz", "array.npz cannot be read as a dataset: it holds one array"),
        (tmp_path / "objects.npz", "objects.npz cannot be read as a dataset: Object arrays"),
        (tmp_path / "other.hdf5", "other.hdf5 is not a D4RL dataset: wanted .*, got weights"),
        (tmp_path / "group.hdf5", "group.hdf5: observations must be an array, got a group"),
        ("hopper/random-v0", "hopper/random-v0 is no file or folder, and no dataset among"),
        ("hopper random", "hopper random is no file or folder, and no id of a Minari dataset"),
        (3, "dataset must be a path"),
    ):
        with pytest.raises(InputError, match=message):
            load_dataset(source)


def test_only_what_is_asked_for_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    dataset, env = collected(episodes=1)
    asked = []

    def download(name):
        asked.append(name)
        if name != "hopper-v0":
            raise ValueError("Couldn't find any version\nof it")
        write_dataset(dataset, tmp_path / name, env)

    monkeypatch.setattr(minari, "download_dataset", download)
    with pytest.raises(InputError, match="must be asked for"):
        load_dataset("hopper-v0")
    assert asked == []
    assert_same(load_dataset("hopper-v0", download=True), dataset)
    load_dataset("hopper-v0", download=True)  # it is there now
    assert asked == ["hopper-v0"]
    with pytest.raises(InputError, match="other-v0 cannot be downloaded .*: Couldn't find any ver"):
        load_dataset("other-v0", download=True)


def edit(folder, change):
    with h5py.File(folder / "data" / "main_data.hdf5", "r+") as file:
        change(file)


def shorten(file, name):
    array = file[name][()]
    del file[name]
    file[name] = array[:-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: shorten(f, "episode_1/actions"), "episode 1: actions must have .* rows with"),
        (lambda f: shorten(f, "episode_0/observations"), "episode 0: observations must have"),
        (lambda f: f["episode_2/rewards"].write_direct(np.full(1, np.nan), dest_sel=np.s_[:1]),
         r"episode 2: rewards\[0\] must be a finite"),
        (lambda f: f.__delitem__("episode_1/rewards"), "cannot be read as a dataset of Minari"),
        (lambda f: f.__delitem__("episode_1"), "cannot be read as a dataset of Minari"),
    ],
)  # fmt: skip
def test_damaged_minari_datasets_are_named(tmp_path, change, message):
    dataset, env = collected()
    write_dataset(dataset, tmp_path / "d", env)
    edit(tmp_path / "d", change)
    with pytest.raises(InputError, match=f"{tmp_path}/d.*{message}"):
        load_dataset(tmp_path / "d")


def test_minari_metadata_that_is_damaged_is_named(tmp_path):
    dataset, env = collected(episodes=1)
    write_dataset(dataset, tmp_path / "d", env)
    metadata = tmp_path / "d" / "data" / "metadata.json"
    whole = json.loads(metadata.read_text())
    for broken in ("{", json.dumps(whole | {"data_format": "?"}), json.dumps({})):
        metadata.write_text(broken)
        with pytest.raises(InputError, match="d cannot be read as a dataset of Minari"):
            load_dataset(tmp_path / "d")


class Fails:
    """A package that is not installed."""

    def __call__(self, name):
        raise ImportError(name)


def test_missing_packages_are_named(tmp_path, monkeypatch):
    path = save(tmp_path / "a.hdf5", d4rl_arrays())
    monkeypatch.setattr(load.importlib, "import_module", Fails())
    with pytest.raises(
        InputError, match=r"the package h5py: pip install 'polygrad-fast\[offline\]'"
    ):
        load_dataset(path)
    with pytest.raises(InputError, match="the package minari"):
        load_dataset("hopper-v0")
    with pytest.raises(InputError, match="the package minari"):
        check_output(tmp_path / "new")


def test_nothing_is_half_written(tmp_path, monkeypatch):
    dataset, env = collected(episodes=2)
    for out, message in (
        (tmp_path, "must be a folder that is not there yet, got the folder"),
        (tmp_path / "gone" / "d", "must be in an existing folder"),
        (tmp_path / "gone" / "d.npz", "must be in an existing directory"),
    ):
        with pytest.raises(InputError, match=message):
            write_dataset(dataset, out, env)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, "_write_minari", fail)
    with pytest.raises(OSError, match="No space left"):
        write_dataset(dataset, tmp_path / "d", env)
    assert os.listdir(tmp_path) == []
    (tmp_path / ".tmp-d-0123456789ab").mkdir()  # of a killed process
    monkeypatch.undo()
    write_dataset(dataset, tmp_path / "d", env)
    assert os.listdir(tmp_path) == ["d"]


def test_bounds_of_the_actions_are_kept(tmp_path):
    dataset, env = collected("Pendulum-v1", 1)
    write_dataset(dataset, tmp_path / "d", env)
    metadata = json.loads((tmp_path / "d" / "data" / "metadata.json").read_text())
    space = json.loads(metadata["action_space"])
    assert (space["low"], space["high"]) == ([-2.0], [2.0])
    assert Box(-2, 2, (1,), np.float32).contains(load_dataset(tmp_path / "d").actions[0])
