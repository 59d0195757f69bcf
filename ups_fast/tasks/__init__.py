"""What a label is: `SingleLabel`, one class for each sample, or `MultiLabel`, any number of them."""

from __future__ import annotations

from torch import Tensor

from ups_fast.tasks.multi import MultiLabel
from ups_fast.tasks.single import SingleLabel
from ups_fast.tasks.task import Task

SINGLE, MULTI = SingleLabel(), MultiLabel()
TASKS: dict[str, Task] = {each.name: each for each in (SINGLE, MULTI)}


def task_of(labels: Tensor) -> Task:
    """By the shape of labels: int64 [N], a class each, or int8 [N, C], a mark for each class."""
    return MULTI if labels.ndim == 2 else SINGLE


__all__ = ["MULTI", "SINGLE", "TASKS", "MultiLabel", "SingleLabel", "Task", "task_of"]
