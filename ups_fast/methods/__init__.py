"""The methods by their names."""

from __future__ import annotations

from ups_fast.methods.method import (
    Batch,
    Group,
    Known,
    Layout,
    Look,
    Method,
    Options,
    Setting,
    Targets,
)
from ups_fast.methods.ups import UPS, SelfTraining, Supervised

METHODS: dict[str, type[Method]] = {
    "ups": UPS,
    "supervised": Supervised,
    "self_training": SelfTraining,
}

__all__ = [
    "METHODS",
    "Batch",
    "Group",
    "Known",
    "Layout",
    "Look",
    "Method",
    "Options",
    "Setting",
    "Targets",
]
