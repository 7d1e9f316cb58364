"""The folder of checkpoints: what a kill at any moment leaves behind, what counts as damaged, what is kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from planner.runtime import faults, storage
from planner.runtime.storage import Manifest, Progress


def manifest(step: int) -> Manifest:
    return Manifest(
        progress=Progress(step=step, samples=8 * step, position=8 * step), seed=0, seq_len=16, global_batch=8, sources=[],
        plan="p", layout={}, world_size=1, schedule={}, environment={},
    )  # fmt: skip


def written(folder: Path, step: int, text: str = "state") -> Manifest:
    """A partial save with all its files."""
    state = storage.partial(folder, step) / storage.STATE
    state.mkdir(parents=True)
    (state / "__0_0.distcp").write_text(text)
    records = {p.name: storage.digest_of(p) for p in state.iterdir()}
    return manifest(step).model_copy(update={"files": records})


def saved(folder: Path, step: int, text: str = "state") -> Path:
    return storage.publish(folder, written(folder, step, text))


def good(folder: Path) -> list[str]:
    """Whole and undamaged checkpoints, the first to try in front."""
    return [p.name for p in storage.candidates(folder) if not storage.damage(p, storage.read_manifest(p))]


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("again", [False, True], ids=["a new step", "a step that is there"])
def test_a_kill_at_any_operation_never_damages_the_last_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    """Every rename, replace, sync and write of `publish` in turn is the last thing that happens."""
    operations = [(os, "fsync"), (Path, "rename"), (Path, "replace"), (storage, "_write"), (storage.shutil, "rmtree")]
    for allowed in range(20):
        folder = tmp_path / str(allowed)
        saved(folder, 20)
        if again:
            saved(folder, 40, "old")
        ready = written(folder, 40, "new")
        count = 0
        with monkeypatch.context() as patch:
            for owner, name in operations:

                def counted(*args: Any, real: Any = getattr(owner, name), most: int = allowed, **kwargs: Any) -> Any:
                    nonlocal count
                    count += 1
                    if count > most:
                        raise Killed
                    return real(*args, **kwargs)

                patch.setattr(owner, name, counted)
            try:
                storage.publish(folder, ready)
                finished = True
            except Killed:
                finished = False
        storage.sweep(folder)
        left = good(folder)
        assert "step-00000020" in left
        assert left[0] == "step-00000040" or not finished
        if finished:
            assert (folder / "latest").read_text() == "step-00000040\n"
            return
    raise AssertionError("never finished")


def test_damage_names_the_file(tmp_path: Path) -> None:
    path = saved(tmp_path, 20, "x" * 100)
    record, file = storage.read_manifest(path), path / "state" / "__0_0.distcp"
    assert storage.damage(path, record) == ""
    file.write_text("x" * 99 + "y")
    assert "changed since" in storage.damage(path, record)
    assert storage.damage(path, record, share=1, shares=2) == "", "contents are another rank's share"
    os.truncate(file, 50)
    assert "has 50 bytes, 100 were written" in storage.damage(path, record, share=1, shares=2)
    file.unlink()
    assert "cannot be read" in storage.damage(path, record)
    (path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        storage.read_manifest(path)


def test_pruning_keeps_those_finished_last(tmp_path: Path) -> None:
    for i, step in enumerate((10, 20, 40, 30)):  # 40 was damaged, the run went back and has saved 30 since
        manifest_file = saved(tmp_path, step) / "manifest.json"
        os.utime(manifest_file, ns=(i, i))
    assert [p.name for p in storage.candidates(tmp_path)] == [f"step-{n:08d}" for n in (30, 40, 20, 10)]
    storage.prune(tmp_path, 2)
    assert [p.name for p in storage.candidates(tmp_path)] == ["step-00000030", "step-00000040"]
    assert not list(tmp_path.glob(".*"))


def test_verdict_names_who_is_behind(tmp_path: Path) -> None:
    def at(step: int, phase: int) -> dict[str, Any]:
        return {"where": [step, phase], "seconds": 9.0}

    message, speaker = faults.verdict({0: at(5, 1), 1: at(5, 0), 2: at(5, 1)}, 60, tmp_path)
    assert "step 5 has taken more than 60 s" in message
    assert "rank 1 is in data" in message
    assert speaker == 1
    message, speaker = faults.verdict({0: at(5, 1), 1: None}, 60, tmp_path)
    assert "rank 1 does not answer" in message
    assert speaker == 0
    message, speaker = faults.verdict({0: at(5, 1), 1: at(5, 1)}, 60, tmp_path)
    assert "all ranks are in forward and backward" in message
    assert speaker == 0
