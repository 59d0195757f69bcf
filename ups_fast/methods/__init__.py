"""The methods by their names."""

from __future__ import annotations

from ups_fast.methods.comatch import CoMatch
from ups_fast.methods.fixmatch import UDA, Dash, FixMatch, FlexMatch, FreeMatch, SoftMatch
from ups_fast.methods.meta import MetaPseudoLabels
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
from ups_fast.methods.propagation import EM, LabelPropagation
from ups_fast.methods.pseudo_label import PseudoLabel
from ups_fast.methods.teachers import CPS, MeanTeacher
from ups_fast.methods.ups import UPS, SelfTraining, Supervised

METHODS: dict[str, type[Method]] = {
    "ups": UPS,
    "supervised": Supervised,
    "self_training": SelfTraining,
    "pseudo_label": PseudoLabel,
    "fixmatch": FixMatch,
    "flexmatch": FlexMatch,
    "freematch": FreeMatch,
    "softmatch": SoftMatch,
    "dash": Dash,
    "uda": UDA,
    "comatch": CoMatch,
    "mean_teacher": MeanTeacher,
    "cps": CPS,
    "label_propagation": LabelPropagation,
    "em": EM,
    "meta_pseudo_labels": MetaPseudoLabels,
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
