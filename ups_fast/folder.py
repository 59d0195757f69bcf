"""Where a run keeps what it does: in its folder, or nowhere."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ups_fast.checkpoint import (
    TENSORBOARD,
    load_checkpoint,
    open_folder,
    save_checkpoint,
    write_rows,
    write_selection,
    write_split,
)
from ups_fast.data import ImageSet
from ups_fast.display import TensorBoard
from ups_fast.inputs import write_files
from ups_fast.models import Network
from ups_fast.models.saved import save_model
from ups_fast.state import Checkpoint, Row


class RunFolder:
    """The files of a run. Every method raises RunFolderError where the folder cannot be used."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def open(self, config: Mapping[str, Any], free: Collection[str]) -> Any:
        """See `open_folder`."""
        return open_folder(self.path, config, free)

    def board(self, epochs_done: int, rounds_done: int) -> Any:
        return TensorBoard(self.path / TENSORBOARD, epochs_done, rounds_done)

    def load(self) -> Checkpoint | None:
        return load_checkpoint(self.path)

    def begin(self, data: ImageSet, state: Checkpoint, truth: Tensor) -> None:
        """Brings all that follows from the checkpoint up to date."""
        write_files(self.path, data)
        write_split(self.path, state)
        write_rows(self.path, state.rows)
        if state.pseudo_labels:
            write_selection(self.path, state.pseudo_labels, truth)

    def keep(
        self,
        network: Network,
        about: Mapping[str, Any],
        found: Mapping[str, Tensor],
        truth: Tensor,
        *,
        best: bool,
    ) -> None:
        """What a round has made, before the checkpoint says that it is done."""
        save_model(self.path, network, about, best=best)
        write_selection(self.path, found, truth)

    def save(self, state: Checkpoint) -> None:
        save_checkpoint(self.path, state)

    def write_rows(self, rows: list[Row]) -> None:
        write_rows(self.path, rows)


class Nowhere(RunFolder):
    """A run without a folder writes nothing, and is lost with its process."""

    def __init__(self) -> None:
        super().__init__(Path())

    def __str__(self) -> str:
        return "memory"

    @contextmanager
    def open(self, config: Mapping[str, Any], free: Collection[str]) -> Iterator[str]:
        yield ""

    def board(self, epochs_done: int, rounds_done: int) -> Any:
        return _NoBoard()

    def load(self) -> Checkpoint | None:
        return None

    def begin(self, *_: Any, **__: Any) -> None:
        pass

    keep = save = write_rows = begin


class _NoBoard:
    def __enter__(self) -> _NoBoard:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def add_epoch(self, *_: Any) -> None:
        pass

    def flush(self) -> None:
        pass

    add_round = add_epoch
