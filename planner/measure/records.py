"""Raw measurements: rows of one number each, the environment they were taken in, and the folder that keeps both."""

from __future__ import annotations

import csv
import json
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from planner.errors import Location, input_error

SECTIONS = ("overheads", "gemm", "attention", "memory", "sustained", "collectives", "overlap")
ENVIRONMENT = "environment.json"


@dataclass(frozen=True)
class Row:
    """One measured number of a section: seconds of a call, or bytes of something held."""

    section: str
    name: str
    sizes: dict[str, int]
    """What was measured: m, n, k of a product, bytes of a tensor, ranks of a group."""
    value: float


@dataclass
class Measurements:
    """All rows of one machine, and what it is."""

    environment: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    def of(self, section: str, *names: str) -> list[Row]:
        """The rows of a section, of some names only if given."""
        return [r for r in self.rows if r.section == section and (not names or r.name in names)]

    def value(self, section: str, name: str) -> float | None:
        """The median over the rows of a name; None when there is none."""
        found = [r.value for r in self.of(section, name)]
        return statistics.median(found) if found else None


def merged(ranks: list[Measurements]) -> Measurements:
    """One set of rows from those of all ranks: the median of each case; what only some had time for is kept."""
    cases: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for rank in ranks:
        for row in rank.rows:
            cases[(row.section, row.name, *row.sizes.items())].append(row)
    rows = [Row(r[0].section, r[0].name, r[0].sizes, statistics.median(x.value for x in r)) for r in cases.values()]
    return Measurements(ranks[0].environment, rows)


def write(measurements: Measurements, folder: Path) -> None:
    """`environment.json` and a CSV for each section."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(measurements.environment, indent=2) + "\n"
    (folder / ENVIRONMENT).write_text(text, encoding="utf-8")
    for section in SECTIONS:
        rows = measurements.of(section)
        names = list(dict.fromkeys(name for r in rows for name in r.sizes))
        with (folder / f"{section}.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["name", *names, "value"])
            table.writerows([r.name, *(r.sizes.get(n, "") for n in names), repr(r.value)] for r in rows)


def read(folder: Path) -> Measurements:
    """What `write` left in a folder. Raises InputError for a folder that has something else."""
    try:
        environment = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
        rows = [row for section in SECTIONS for row in _rows(folder / f"{section}.csv", section)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = str(error).partition("] ")[2] or str(error)
        fix = "give a folder that `planner measure --raw` wrote"
        raise input_error("PLN644", f"{folder} holds no measurements", why, fix, Location(str(folder))) from None
    missing = {"device", "kind", "devices", "stamp"} - set(environment)
    if missing:
        why = f"{ENVIRONMENT} lacks {', '.join(sorted(missing))}"
        raise input_error("PLN644", f"{folder} holds no measurements", why, "measure again with --raw", Location(str(folder)))
    return Measurements(environment, rows)


def _rows(path: Path, section: str) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        return [
            Row(section, line.pop("name"), {k: int(v) for k, v in line.items() if k != "value" and v}, float(line["value"]))
            for line in csv.DictReader(file)
        ]
