"""Datasets to files: a Minari folder or an npz, whole or not at all."""

from __future__ import annotations

import contextlib
import io
import json
import re
import warnings
from pathlib import Path

import gymnasium
import numpy as np

from polygrad_fast.arguments import as_output_file, as_path
from polygrad_fast.data.load import import_extra
from polygrad_fast.data.offline_dataset import FLAGS, FLOATS, OfflineDataset
from polygrad_fast.errors import InputError
from polygrad_fast.runs.files import (
    discard,
    make_temporary,
    move_into_place,
    remove_temporaries,
    write_bytes_atomic,
)


def check_output(out: Path) -> None:
    """Raise InputError, before the work, unless a dataset can be written to `out`.

    A file .npz may be there already, a folder may not.
    """
    out = as_path(out, "--out")
    if out.suffix == ".npz":
        as_output_file(out, "--out")
        return
    if out.exists():
        kind = "folder" if out.is_dir() else "file"
        raise InputError(f"--out must be a folder that is not there yet, got the {kind} {out}")
    if not out.absolute().parent.is_dir():
        raise InputError(f"--out must be in an existing folder, got {out}")
    import_extra("minari")


def write_dataset(dataset: OfflineDataset, out: Path, env: gymnasium.Env) -> None:
    """Write a dataset whose next observations are true as .npz, or else as a Minari folder.

    Both keep `recipe`: the npz as JSON under that name, Minari in its metadata under
    "polygrad_fast". A Minari folder can be read by `minari` once it is moved among its datasets
    under its id, the folder's name with -v0.

    Args:
        dataset: of whole episodes.
        out: see `check_output`.
        env: the environment it was collected in.

    Raises:
        InputError: `out` cannot be used, or the next observations are not true.
        OSError: it cannot be written.
    """
    check_output(out)
    if not dataset.true_next:
        raise InputError(
            f"{dataset.source}: a dataset to be written must have each step's own next "
            f"observation, got D4RL's rows"
        )
    if out.suffix == ".npz":
        arrays = {name: getattr(dataset, name) for name in (*FLOATS, *FLAGS)}
        data = io.BytesIO()
        np.savez(data, **arrays, recipe=np.array(json.dumps(dataset.recipe)))
        write_bytes_atomic(out, data.getvalue())
        return
    remove_temporaries(out.absolute().parent, out.name)
    temporary = make_temporary(out.absolute())  # minari loses its way with relative paths
    try:
        _write_minari(dataset, temporary / "data", env, _dataset_id(out))
        move_into_place(temporary, out.absolute())
    except BaseException:
        with contextlib.suppress(OSError):
            discard(temporary)
        raise


def _write_minari(
    dataset: OfflineDataset, folder: Path, env: gymnasium.Env, dataset_id: str
) -> None:
    minari = import_extra("minari")
    from minari.data_collector import EpisodeBuffer
    from minari.dataset.minari_storage import MinariStorage

    low, high = env.action_space.low, env.action_space.high
    recipe = dataset.recipe or {}
    folder.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an environment that cannot be described: no env_spec
        storage = MinariStorage.new(
            folder,
            observation_space=gymnasium.spaces.Box(
                -np.inf, np.inf, (dataset.observation_dim,), np.float32
            ),
            action_space=gymnasium.spaces.Box(
                low.astype(np.float32), high.astype(np.float32), dtype=np.float32
            ),
            env_spec=env.spec,
        )
    storage.update_metadata(
        {
            "dataset_id": dataset_id,
            "minari_version": minari.__version__,
            "algorithm_name": str(recipe.get("policy", "unknown")),
            "description": f"Collected by polygrad-fast in {dataset.env_id}.",
            "polygrad_fast": recipe,
        }
    )
    stops = np.flatnonzero(dataset.ends) + 1
    starts = np.append(0, stops[:-1])

    def episodes():
        for number, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            rows = slice(start, stop)
            last = dataset.next_observations[stop - 1 : stop]
            yield EpisodeBuffer(
                id=number,
                observations=np.concatenate((dataset.observations[rows], last)),
                actions=dataset.actions[rows],
                rewards=dataset.rewards[rows],
                terminations=dataset.terminals[rows],
                truncations=dataset.timeouts[rows],
            )

    storage.update_episodes(episodes())


def _dataset_id(out: Path) -> str:
    """Return the id of Minari's for a folder."""
    name = re.sub(r"[^\w-]", "-", out.name)
    return name if re.search(r"-v\d+$", name) else f"{name}-v0"
