"""Datasets from files: Minari's folders, D4RL's HDF5 files, and npz."""

from __future__ import annotations

import importlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from polygrad_fast.arguments import as_path
from polygrad_fast.data.d4rl import d4rl_environment
from polygrad_fast.data.offline_dataset import (
    OfflineDataset,
    as_flags,
    as_numbers,
    check_lengths,
)
from polygrad_fast.errors import InputError, first_line

ARRAYS = ("observations", "actions", "rewards", "terminals", "timeouts")
HDF5_SUFFIXES = (".hdf5", ".h5")


def load_dataset(source: str | Path, download: bool = False) -> OfflineDataset:
    """Read a dataset of episodes.

    - A folder: a Minari dataset, or the `data` folder in it. Its episodes have their true last
      observations.
    - A file .hdf5 or .h5: D4RL's arrays observations, actions, rewards, terminals and timeouts of R
      rows. Rows 0 .. R - 2 are kept and row i + 1's observation follows row i, also across
      episodes, as in the released code of Policy-Guided Diffusion; a file's own
      `next_observations` is not read.
    - A file .npz: the same arrays; with `next_observations`, as `data collect` writes them, all
      rows are kept and that is what follows.
    - Anything else: the id of a Minari dataset, as "mujoco/hopper/medium-v0", looked up among local
      ones.

    Args:
        source: see above.
        download: fetch a Minari dataset that is not there from Minari's server.

    Returns:
        The dataset, float32; all further checks are those of `OfflineDataset`.

    Raises:
        InputError: nothing there, not a dataset, an array missing, of another length, rank or type,
            a number that is not finite, no steps, or a package that is not installed.
    """
    path = as_path(source, "dataset")
    if path.is_dir():
        return _read_minari(path)
    if path.suffix in (".npz", *HDF5_SUFFIXES):
        if not path.is_file():
            raise InputError(f"{path} does not exist, wanted a dataset")
        return _read_npz(path) if path.suffix == ".npz" else _read_hdf5(path)
    if path.exists():
        raise InputError(
            f"{path} is not a dataset, wanted a folder of Minari, or a file .npz or .hdf5"
        )
    return _read_minari(_find_minari(str(source), download))


def from_d4rl_arrays(arrays: Mapping[str, np.ndarray], source: str, **known: Any) -> OfflineDataset:
    """Return the dataset of D4RL's arrays, see `load_dataset`.

    Args:
        arrays: observations [R, S], actions [R, A], rewards, terminals and timeouts [R], and
            perhaps next_observations [R, S].
        source: names their file in errors.
        known: name, env_id, recipe.

    Raises:
        InputError: as `load_dataset`; also fewer than 2 rows, without next_observations.
    """
    missing = [name for name in ARRAYS if name not in arrays]
    if missing:
        raise InputError(
            f"{source}: {missing[0]} is missing, wanted the arrays {', '.join(ARRAYS)}, got "
            f"{', '.join(sorted(arrays)) or 'none'}"
        )
    checked = {}
    for name in ARRAYS:
        is_flag = name in ("terminals", "timeouts")
        checked[name] = (as_flags if is_flag else as_numbers)(arrays[name], name, source)
    check_lengths(checked, source)
    if "next_observations" in arrays:
        following = arrays["next_observations"]
        return OfflineDataset(
            **checked, next_observations=following, source=source, true_next=True, **known
        )
    if len(checked["rewards"]) < 2:
        raise InputError(
            f"{source}: observations must hold at least 2 rows without next_observations, got "
            f"{len(checked['rewards'])}"
        )
    following = checked["observations"][1:]
    kept = {name: array[:-1] for name, array in checked.items()}
    return OfflineDataset(**kept, next_observations=following, source=source, **known)


def _read_npz(path: Path) -> OfflineDataset:
    wanted = (*ARRAYS, "next_observations", "recipe")
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise ValueError("it holds one array without a name")
        with loaded as data:
            found = set(data.files)
            arrays = {name: data[name] for name in wanted if name in found}
            recipe = json.loads(str(arrays.pop("recipe"))) if "recipe" in arrays else None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} cannot be read as a dataset: {first_line(error)}") from None
    known = {"name": path.stem, "env_id": d4rl_environment(path.stem), "recipe": recipe}
    if isinstance(recipe, dict):
        known["env_id"] = recipe.get("env_id")
    return from_d4rl_arrays(arrays, str(path), **known)


def _read_hdf5(path: Path) -> OfflineDataset:
    h5py = import_extra("h5py")
    arrays = {}
    try:
        with h5py.File(path, "r") as file:
            names = list(file)
            for name in ARRAYS:
                if name in file:
                    if not isinstance(file[name], h5py.Dataset):
                        raise InputError(f"{path}: {name} must be an array, got a group")
                    arrays[name] = file[name][()]
    except InputError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{path} cannot be read as HDF5: {first_line(error)}") from None
    if not arrays:
        raise InputError(
            f"{path} is not a D4RL dataset: wanted the arrays {', '.join(ARRAYS)}, got "
            f"{', '.join(sorted(names)) or 'none'}"
        )
    name = path.stem.replace("_", "-")
    return from_d4rl_arrays(arrays, str(path), name=name, env_id=d4rl_environment(name))


def _find_minari(name: str, download: bool) -> Path:
    """Return the folder of a dataset of Minari's, by its id."""
    minari = import_extra("minari")
    from minari.dataset.minari_dataset import parse_dataset_id
    from minari.storage.datasets_root_dir import get_dataset_path

    try:
        parse_dataset_id(name)
    except (ValueError, TypeError):
        raise InputError(
            f"{name} is no file or folder, and no id of a Minari dataset such as "
            f"mujoco/hopper/medium-v0"
        ) from None
    folder = get_dataset_path(name)
    if not (folder / "data").is_dir():
        if not download:
            raise InputError(
                f"{name} is no file or folder, and no dataset among Minari's local ones in "
                f"{get_dataset_path()}; downloading it must be asked for (download=True)"
            )
        try:
            minari.download_dataset(name)
        except Exception as error:  # of the network, the server, or its client
            raise InputError(
                f"{name} cannot be downloaded from Minari's server: {first_line(error)}"
            ) from error
    return folder


def _read_minari(folder: Path) -> OfflineDataset:
    data = folder / "data" if (folder / "data").is_dir() else folder
    if not (data / "metadata.json").is_file():
        raise InputError(f"{folder} is not a dataset of Minari: it has no data/metadata.json")
    import_extra("minari")
    from minari.dataset.minari_storage import MinariStorage

    try:
        metadata = MinariStorage.read_raw_metadata(data)
        storage = MinariStorage.read(data.absolute())
        episodes = list(storage.get_episodes(range(metadata["total_episodes"])))
    except Exception as error:  # minari's own are of every kind: assertions, KeyError, OSError
        raise InputError(
            f"{folder} cannot be read as a dataset of Minari: {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error
    columns: dict[str, list[np.ndarray]] = {
        name: [] for name in (*ARRAYS, "next_observations", "ends")
    }
    for number, episode in enumerate(episodes):
        where = f"{folder}, episode {number}"
        arrays = {
            "observations": as_numbers(episode["observations"], "observations", where),
            "actions": as_numbers(episode["actions"], "actions", where),
            "rewards": as_numbers(episode["rewards"], "rewards", where),
            "terminals": as_flags(episode["terminations"], "terminations", where),
            "timeouts": as_flags(episode["truncations"], "truncations", where),
        }
        steps = len(arrays["rewards"])
        for name, array in arrays.items():
            wanted = steps + (name == "observations")
            if len(array) != wanted:
                raise InputError(
                    f"{where}: {name} must have {wanted:,} rows with {steps:,} rewards, got "
                    f"{len(array):,}"
                )
        observations = arrays["observations"]
        arrays |= {"observations": observations[:-1], "next_observations": observations[1:]}
        ends = np.zeros(steps, dtype=bool)
        ends[-1:] = True
        for name, array in (*arrays.items(), ("ends", ends)):
            columns[name].append(array)
    if not any(map(len, columns["rewards"])):
        raise InputError(f"{folder}: a dataset must hold at least one step, got none")
    for name, parts in columns.items():
        shapes = {part.shape[1:] for part in parts}
        if len(shapes) > 1:
            raise InputError(
                f"{folder}: {name} must have one shape per step in all episodes, got "
                f"{' and '.join(str(list(shape)) for shape in sorted(shapes))}"
            )
    return OfflineDataset(
        **{name: np.concatenate(parts) for name, parts in columns.items()},
        source=str(folder),
        true_next=True,
        name=metadata.get("dataset_id"),
        env_id=_environment_of(metadata),
        recipe=metadata.get("polygrad_fast"),
    )


def _environment_of(metadata: Mapping[str, Any]) -> str | None:
    try:
        return json.loads(metadata["env_spec"])["id"]
    except (KeyError, TypeError, ValueError):
        return None


def import_extra(name: str) -> ModuleType:
    """Return a package of the extra "offline".

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(
            f"datasets of this kind need the package {name}: pip install 'polygrad-fast[offline]'"
        ) from None
