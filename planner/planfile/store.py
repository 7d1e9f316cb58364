"""Plan files: read, check and write them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from planner.errors import Location, input_error
from planner.planfile.plan import FORMAT_VERSION, Plan, digest_as_written
from planner.specs import files


def write(plan: Plan, path: str | Path) -> None:
    """Write the plan so that a reader never sees half of it (in place where the path is not a regular file)."""
    write_text(plan.to_json(), path)


def write_text(text: str, path: str | Path) -> None:
    """Write a file so that a reader never sees half of it. Raises InputError."""
    target = Path(path).resolve()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        if target.exists() and not target.is_file():
            target.write_text(text, encoding="utf-8")
            return
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        why = error.strerror or str(error)
        raise input_error("PLN113", f"cannot write {path}", why, "give a writable path", Location(str(path))) from None


def is_plan(data: Any) -> bool:
    """Whether parsed data is a plan file."""
    return isinstance(data, dict) and data.get("format") == "planner.plan"


def read(path: str | Path) -> Plan:
    """Read and check a plan file. Raises InputError: not a plan, another version, or changed by hand."""
    return from_document(files.parse_document(path))


def from_document(document: files.Document) -> Plan:
    """The plan in a parsed document."""
    plan, stated = unchecked(document)
    # Fields that a newer minor version added are not in an older file: its own content has the digest it states.
    if stated is not None and stated not in (plan.digest, digest_as_written(document.data)):
        why = f"its content has digest {plan.digest[:19]}…, the file states {stated[:19]}…"
        raise input_error(
            "PLN116", "the plan was changed after it was made", why, "make the plan again, or remove the digest line",
            Location(document.path, 1, 1),
        )  # fmt: skip
    return plan


def unchecked(document: files.Document) -> tuple[Plan, str | None]:
    """The plan in a parsed document, and the digest that the file states, whether they agree or not."""
    place = Location(document.path, 1, 1)
    if not is_plan(document.data):
        raise input_error("PLN114", "not a plan file", "it lacks format: planner.plan", "make one with planner plan -o", place)
    version = str(document.data.get("version", ""))
    if version.split(".")[0] != FORMAT_VERSION.split(".")[0]:
        why = f"this planner reads {FORMAT_VERSION.split('.')[0]}.x"
        raise input_error("PLN115", f"plan format {version}", why, "make the plan again", place)
    data = dict(document.data)
    stated = data.pop("digest", None)
    return files.build(Plan, document, data), None if stated is None else str(stated)
