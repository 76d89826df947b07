"""The folder of a run: what may lie in it at the start, and how the finished adapter gets there."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from adapters.adapter import Adapter
from adapters.checkpoint import CONFIG_FILE, TENSORS_FILE, write_peft
from adapters.errors import TrainingError
from adapters.json_file import read_json

CHECKPOINTS = "checkpoints"
"""Where checkpoints lie inside `--out`, unless told otherwise."""

RUN_FILE = "run.json"
"""In the folder of checkpoints: what a resumed run must have in common with the one it goes on with."""

PUBLISHED_FILE = "published.sha256"
"""Beside it: digests of the adapters that the run has ended with, by which a resumed one knows its own."""

UNFINISHED = ".unfinished"
"""In `out`: the adapter while it is written."""

_MAX_RUN_BYTES = 1 << 20


@dataclass(frozen=True)
class RunFolder:
    """Where a run writes.

    Attributes:
        out: the finished adapter; nothing there is an adapter until it is whole.
        checkpoints: the run's own.
    """

    out: Path
    checkpoints: Path

    def check(self, resume: bool) -> None:
        """See whether a run may write here, changing nothing.

        Args:
            resume: go on with the run that lies here; without one, start it.

        Raises:
            TrainingError: there is something else already.
        """
        for folder in (self.out, self.checkpoints):
            if folder.exists() and not folder.is_dir():
                raise TrainingError(f"{folder} is a file; expected a folder, or nothing yet")
        if (self.checkpoints / RUN_FILE).exists():
            if not resume:
                raise TrainingError(f"{self.checkpoints} holds a run already: resume it (--resume), or choose another folder")
            self._refuse_foreign()
            return
        for folder in (self.out, self.checkpoints):
            inside = folder.glob("*") if folder.is_dir() else ()
            found = sorted(path.name for path in inside if not self.checkpoints.is_relative_to(path))  # that is looked into
            if found:
                raise TrainingError(f"{folder} is not empty ({', '.join(found[:3])}) and holds no run; choose another folder")

    def _refuse_foreign(self) -> None:
        """Raise TrainingError unless what lies in `out` is the run's own: it is about to be replaced."""
        tensors, published = self.out / TENSORS_FILE, self.checkpoints / PUBLISHED_FILE
        if tensors.exists() and published.exists() and _digest(tensors) in published.read_text("ascii").split():
            return
        checkpoints = self.checkpoints.resolve()
        own = {checkpoints, *checkpoints.parents, self.out.resolve() / UNFINISHED}
        foreign = sorted(path.name for path in self.out.resolve().glob("*") if path not in own)
        if foreign and self.out.resolve() != checkpoints:
            shown = ", ".join(foreign[:3])
            raise TrainingError(
                f"{self.out} holds what is not of the run in {self.checkpoints} ({shown}); choose another --out for its adapter"
            )

    @contextmanager
    def made(self) -> Iterator[None]:
        """Make the folders for the block, so that what can't be written shows before the work; if it fails, new empty ones go.

        Raises:
            TrainingError: they can't be made.
        """
        new = [folder for each in (self.checkpoints, self.out) for folder in (each, *each.parents) if not folder.exists()]
        try:
            for folder in (self.out, self.checkpoints):
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise TrainingError(f"{folder} can't be made: {error.strerror or error}") from error
            yield
        except BaseException:
            for folder in sorted(set(new), reverse=True):  # a folder before the one it lies in
                with suppress(OSError):
                    folder.rmdir()
            raise

    def open(self, run: Mapping[str, object], resume: bool) -> None:
        """Take the folders, which `made` made, for `run`, or find them as an earlier start of the same run left them.

        Args:
            run: what makes it this run, in JSON's types.
            resume: as in `check`, which is done once more.

        Raises:
            TrainingError: there is something else, or a run that differs; names every difference.
        """
        self.check(resume)
        if (self.checkpoints / RUN_FILE).exists():
            self._refuse_differences(run)
        _write_whole(self.checkpoints / RUN_FILE, json.dumps(run, indent=2, sort_keys=True) + "\n")

    def _refuse_differences(self, run: Mapping[str, object]) -> None:
        before = read_json(self.checkpoints / RUN_FILE, max_bytes=_MAX_RUN_BYTES)
        now = json.loads(json.dumps(run))
        if not isinstance(before, dict):
            raise TrainingError(f"{self.checkpoints / RUN_FILE} is not a JSON object")
        names = sorted(before.keys() | now.keys())
        different = [f"{n} was {before.get(n)!r}, now {now.get(n)!r}" for n in names if before.get(n) != now.get(n)]
        if different:
            raise TrainingError(f"the run in {self.checkpoints} can't be resumed with other settings: {'; '.join(different)}")

    def publish(self, adapter: Adapter) -> None:
        """Write the adapter into `out`, its config last: without one no reader takes the folder for an adapter.

        Its digest is noted before, so that a run that is killed meanwhile knows it again.
        """
        unfinished = self.out / UNFINISHED  # of one file system with `out`: there a rename is whole or not at all
        write_peft(adapter, unfinished)
        with (self.checkpoints / PUBLISHED_FILE).open("a", encoding="ascii") as published:
            published.write(_digest(unfinished / TENSORS_FILE) + "\n")
        for name in (TENSORS_FILE, CONFIG_FILE):
            os.replace(unfinished / name, self.out / name)
        shutil.rmtree(unfinished)


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _write_whole(target: Path, text: str) -> None:
    beside = target.with_name(target.name + ".partial")
    beside.write_text(text, "utf-8")
    os.replace(beside, target)
