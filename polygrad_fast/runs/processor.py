"""Which processor this machine has."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
"""Those that decide how fast matrix products are; named as in /proc/cpuinfo."""


@dataclass(frozen=True)
class Processor:
    """A processor; None where unknown.

    Attributes:
        name: as it names itself, which may say little ("AMD EPYC" are processors of many years).
        vendor: for instance "GenuineIntel".
        family, model: the numbers that tell generations apart.
        instruction_sets: those of `INSTRUCTION_SETS` that it offers, separated by spaces.
    """

    name: str | None = None
    vendor: str | None = None
    family: int | None = None
    model: int | None = None
    instruction_sets: str | None = None

    @classmethod
    def of_this_machine(cls) -> Processor:
        """Read /proc/cpuinfo; where there is none, only a name is known. Never fails."""
        try:
            found = cls.from_cpuinfo(Path("/proc/cpuinfo").read_text())
        except (OSError, UnicodeError):
            found = cls()
        if found.name is None:
            return cls(platform.processor() or platform.machine() or None)
        return found

    @classmethod
    def from_cpuinfo(cls, text: str) -> Processor:
        """Read the first processor of a /proc/cpuinfo."""
        first = text.split("\n\n")[0]
        pairs = (line.partition(":") for line in first.splitlines())
        facts = {key.strip(): value.strip() for key, _, value in pairs}

        def number(key: str) -> int | None:
            return int(facts[key]) if facts.get(key, "").isdecimal() else None

        sets = None
        if "flags" in facts:
            flags = facts["flags"].split()
            sets = " ".join(name for name in INSTRUCTION_SETS if name in flags)
        return cls(
            facts.get("model name") or None,
            facts.get("vendor_id") or None,
            number("cpu family"),
            number("model"),
            sets,
        )
