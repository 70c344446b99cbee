"""An experiment in stages: each is done once, whole or not at all, and what it was done with is
checked before it is used again."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from polygrad_fast.agent import PolyGRAD
from polygrad_fast.baselines import read_baseline_config, train_baseline
from polygrad_fast.config import TrainConfig
from polygrad_fast.data.load import load_dataset
from polygrad_fast.data.offline_dataset import OfflineDataset
from polygrad_fast.errors import CheckpointError
from polygrad_fast.offline.runs import OfflineRun
from polygrad_fast.runs.directory import options_of, read_run_config
from polygrad_fast.runs.files import write_bytes_atomic, write_json_atomic


class Stages:
    """Stages in a folder; a second call does those that are missing.

    Args:
        folder: made where it is missing.
        tell: gets a sentence per stage that is done.
        progress: show progress bars.
    """

    def __init__(self, folder: Path, tell: Callable[[str], None] = print, progress: bool = False):
        self.folder, self.tell, self.progress = folder, tell, progress

    def dataset(
        self, name: str, described: Mapping[str, Any], make: Callable[[Path], None]
    ) -> Path:
        """Return the folder of a dataset, which `make` writes where it is not there.

        Args:
            name: of the dataset.
            described: what its recipe must say.
            make: writes a dataset to a path, whole or not at all.

        Raises:
            CheckpointError: one of another recipe is there.
        """
        path = self.folder / "datasets" / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            make(path)
            self.tell(f"dataset {name}: {_in_words(load_dataset(path))}")
        recipe = load_dataset(path).recipe or {}
        for key, wanted in described.items():
            if recipe.get(key) != wanted:
                raise CheckpointError(
                    f"the dataset {path} must have {key} {wanted!r} in its recipe, got "
                    f"{recipe.get(key)!r}"
                )
        return path

    def train(self, name: str, begin: Callable[[Path, bool], OfflineRun]) -> Path:
        """Return the run directory of a finished training, begun or continued.

        Args:
            name: of the run directory, below the folder.
            begin: gets the run directory and whether to resume, and returns the run.

        Raises:
            CheckpointError: a run of other options is there.
            KeyboardInterrupt: Ctrl-C came; the training can be continued.
        """
        path = self.folder / name
        run = begin(path, (path / "config.json").exists())
        if run.training.num_updates < run.training.total_updates:
            if not run.train(self.progress):
                raise KeyboardInterrupt
            self.tell(f"{name}: {run.training.total_updates:,} updates")
        return path

    def agent(self, name: str, env_id: str, preset: str, seed: int, config: TrainConfig) -> Path:
        """Return the run directory of a finished training of Algorithm 3, begun or continued.

        Args:
            name: of the run directory, below the folder.
            env_id, preset, seed, config: of the run.

        Raises:
            CheckpointError: a run of other options is there.
            NonFiniteError: the training met NaN.
            KeyboardInterrupt: Ctrl-C came; the training can be continued.
        """
        path, total = self.folder / name, config.total_timesteps
        if (path / "config.json").exists():
            wanted = dataclasses.asdict(config.resolved(env_id))
            wanted |= {"env_id": env_id, "preset": preset, "seed": seed}
            refuse_another(path, wanted, options_of(read_run_config(path)))
            agent = PolyGRAD.resume(path)
        else:
            agent = PolyGRAD(env_id, preset, seed, config=config, run_dir=path)
        if agent.num_timesteps < total:
            agent.learn(total - agent.num_timesteps, progress_bar=self.progress)
            self.tell(f"{name}: {total:,} environment steps")
        return path

    def baseline(self, name: str, algorithm: str, env_id: str, **options: Any) -> Path:
        """Return the run directory of a finished model-free training; what an interrupted one did
        is done anew.

        Args:
            name: of the run directory, below the folder.
            algorithm, env_id, options: of `train_baseline`.

        Raises:
            CheckpointError: a run of other options is there.
        """
        path = self.folder / name
        if path.exists():
            wanted = {"baseline": algorithm, "env_id": env_id, **options}
            refuse_another(path, wanted, read_baseline_config(path))
            return path
        unfinished = path.with_name(f"{path.name}-unfinished")
        if unfinished.exists():
            shutil.rmtree(unfinished)
        train_baseline(algorithm, env_id, unfinished, progress_bar=self.progress, **options)
        unfinished.rename(path)
        self.tell(f"{name}: {options['total_timesteps']:,} environment steps")
        return path

    def result(
        self, name: str, inputs: Mapping[str, Any], compute: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """Return what `compute` returned, of which a file keeps the first answer.

        Args:
            name: of the file, below "results".
            inputs: what the answer depends on.
            compute: returns what JSON can express.

        Raises:
            CheckpointError: the file is damaged, or of other inputs.
        """
        path = self.folder / "results" / f"{name}.json"
        inputs = json.loads(json.dumps(inputs))
        if path.exists():
            try:
                stored = json.loads(path.read_text())
                kept, answer = stored["inputs"], stored["result"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{path} is damaged: {error!r}") from None
            if kept != inputs:
                raise CheckpointError(
                    f"{path} is of other options, {kept}, got {inputs}: give another --out"
                )
            return answer
        answer = compute()
        write_json_atomic(path, {"inputs": inputs, "result": answer})
        return answer


def refuse_another(path: Path, wanted: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless what is stored of a run is what is wanted, its length too."""
    wanted = json.loads(json.dumps(wanted))
    for name, value in wanted.items():
        if stored.get(name) != value:
            raise CheckpointError(
                f"{path} is of other options, its {name} is {stored.get(name)}, got {value}: give "
                f"another --out"
            )


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV, columns in the order in which they first come; missing and None are
    empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes_atomic(path, text.getvalue().encode())


def _in_words(dataset: OfflineDataset) -> str:
    returns = dataset.episode_returns()
    return (
        f"{len(dataset):,} steps of {dataset.num_episodes:,} episodes, mean return "
        f"{returns.mean():.0f}"
    )
