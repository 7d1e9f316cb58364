"""A folder of checkpoints on disk: how one comes to be all at once, which one is good, and which ones are kept.

    checkpoints/
      latest                  name of the checkpoint that was finished last
      step-00000040/
        manifest.json         progress, data and layout, and the size and SHA-256 of every file of the state
        state/                torch.distributed.checkpoint, resharded on load
      .step-00000060.partial/ a save that runs, or was killed: never read, swept away at the next start

A save writes into a hidden folder, syncs it to disk, and renames it: a name without a dot is a whole checkpoint. The
folder must be on a file system that all nodes share. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from planner.specs.base import Spec

MANIFEST, STATE, LATEST = "manifest.json", "state", "latest"
_NAME = re.compile(r"step-(\d+)")


class FileRecord(Spec):
    """One file of the state."""

    size: int
    sha256: str


class Progress(Spec):
    """Where a run is. A step is an optimizer step, a sample one sequence."""

    step: int = 0
    """Steps done: the number of the next one."""
    samples: int = 0
    """Samples trained in all."""
    position: int = 0
    """The next sample of the data: `samples`, unless the data was changed on the way."""


class SourceIdentity(Spec):
    """What makes a data source the same one later."""

    path: str
    size: int
    digest: str
    """SHA-256 of its size, its ends and blocks in between (see `tokens.identity`)."""
    weight: float


class Manifest(Spec):
    """What a checkpoint says of itself."""

    format: Literal["planner.checkpoint"] = "planner.checkpoint"
    version: Literal[1] = 1
    progress: Progress
    seed: int
    seq_len: int
    global_batch: int
    sources: list[SourceIdentity]
    """Empty for the synthetic stream."""
    plan: str
    """Digest of the plan that saved it; another plan may load it."""
    layout: dict[str, Any]
    world_size: int
    schedule: dict[str, Any]
    """Settings of the learning rate. They may change at a resume, which says so."""
    environment: dict[str, str]
    files: dict[str, FileRecord] = Field(default_factory=dict)


def name_of(step: int) -> str:
    """Folder name of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def partial(folder: Path, step: int) -> Path:
    """Where a save writes before it is whole."""
    return folder / f".{name_of(step)}.partial"


def candidates(folder: Path) -> list[Path]:
    """Whole checkpoints, the one to try first in front: the one finished last, then by falling step."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()]
    found.sort(key=lambda p: int(p.name.removeprefix("step-")), reverse=True)
    last = _latest(folder)
    return sorted(found, key=lambda p: p.name != last)


def _latest(folder: Path) -> str:
    try:
        return (folder / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint. Raises ValueError, with the reason, when there is none that can be read."""
    path = checkpoint / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValidationError, UnicodeDecodeError):
        raise ValueError(f"{path} is damaged") from None


def digest_of(path: Path) -> FileRecord:
    """Size and SHA-256 of a file."""
    with path.open("rb") as stream:
        sha = hashlib.file_digest(stream, "sha256").hexdigest()
    return FileRecord(size=path.stat().st_size, sha256=sha)


def damage(checkpoint: Path, manifest: Manifest, share: int = 0, shares: int = 1) -> str:
    """What is wrong with a checkpoint's files, "" when nothing: every size, and the contents of this share of files."""
    for i, (name, wanted) in enumerate(sorted(manifest.files.items())):
        path = checkpoint / STATE / name
        try:
            size = path.stat().st_size
            if size != wanted.size:
                return f"{path} has {size:,} bytes, {wanted.size:,} were written"
            if i % shares == share and digest_of(path) != wanted:
                return f"the contents of {path} changed since they were written"
        except OSError as error:
            return f"{path} cannot be read: {error.strerror}"
    return ""


def publish(folder: Path, manifest: Manifest) -> Path:
    """Turn a finished partial save into a checkpoint, and point `latest` at it. All or nothing at any kill."""
    step = manifest.progress.step
    source, target = partial(folder, step), folder / name_of(step)
    _write(source / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
    _sync_folder(source / STATE)
    _sync_folder(source)
    replaced = folder / f".{target.name}.replaced"
    if target.exists():  # a damaged one that the run fell back from
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    source.rename(target)
    _sync_folder(folder)
    temporary = folder / f".{LATEST}"
    _write(temporary, target.name + "\n")
    temporary.replace(folder / LATEST)
    _sync_folder(folder)
    shutil.rmtree(replaced, ignore_errors=True)
    return target


def prune(folder: Path, keep: int) -> None:
    """Remove all but the `keep` checkpoints finished last."""
    found = sorted(candidates(folder), key=_finished, reverse=True)
    for old in found[keep:]:
        hidden = folder / f".{old.name}.old"
        old.rename(hidden)  # a half-removed checkpoint must not look like one
        shutil.rmtree(hidden, ignore_errors=True)


def _finished(checkpoint: Path) -> tuple[int, str]:
    try:
        return (checkpoint / MANIFEST).stat().st_mtime_ns, checkpoint.name
    except OSError:
        return 0, checkpoint.name


def sweep(folder: Path) -> None:
    """Remove what killed saves and removals left behind."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(path: Path) -> None:
    """Make a folder's names last through a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems cannot sync folders; their renames are synchronous
        pass
    finally:
        os.close(descriptor)
