"""The table of stored policies, made of what their files say."""

from __future__ import annotations

from pathlib import Path

from polygrad_fast.data.policy_file import load_policy
from polygrad_fast.errors import InputError
from polygrad_fast.runs.files import write_bytes_atomic

BEGIN, END = "<!-- table: policies -->", "<!-- end of table -->"


def policies_table(folder: Path) -> str:
    """Return a Markdown table of the policy files in a folder, in alphabetical order."""
    lines = [
        "| file | algorithm | environment steps | return, 100 fresh episodes | kB |",
        "| --- | --- | --- | --- | --- |",
    ]
    recipes = []
    for path in sorted(folder.glob("*.safetensors")):
        facts = load_policy(path).facts
        if facts.episodes != 100:
            raise InputError(f"{path} must be evaluated on 100 episodes, got {facts.episodes}")
        size = path.stat().st_size / 1000
        cells = [path.name, facts.algorithm, f"{facts.env_steps:,}"]
        cells += [f"{facts.mean_return:.0f} (std {facts.std_return:.0f})", f"{size:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
        recipes.append(facts.recipe)
    return "\n".join([*lines, "", "```", *recipes, "```"])


def with_table(text: str, folder: Path) -> str:
    """Return a text with its table between `BEGIN` and `END` made anew.

    Raises:
        InputError: the text has no place for it.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise InputError(f"the text must hold {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{policies_table(folder)}\n{END}{after}"


def list_policies(folder: Path) -> None:
    """Write the table of a folder's policies into its README.md."""
    readme = folder / "README.md"
    try:
        text = readme.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {readme}: {error.strerror}") from None
    write_bytes_atomic(readme, with_table(text, folder).encode())
