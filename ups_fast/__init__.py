"""UPS, fast: uncertainty-aware pseudo-label selection for semi-supervised learning.

`mc_select`, `nce_loss`, `ups_loss`, `fixmatch_loss` and `augment` are the fused ops; `reference` holds their
specification.
`python -m ups_fast.train CONFIG` runs the whole method, and `load_model` gives its trained network back.
`UPSClassifier` is the same as an estimator of scikit-learn.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .terminal import COMMANDS, stop_at_ctrl_c

if sys.argv[:1] == ["-m"] and COMMANDS & set(sys.orig_argv):
    stop_at_ctrl_c()  # a command is on its way, and torch takes its time

from . import reference
from .modules import CounterDropout, FixMatchLoss, Mish, NCELoss, UPSLoss, mc_dropout
from .ops import (
    augment,
    augment_plan,
    backend,
    counter_dropout,
    fixmatch_loss,
    mc_select,
    mc_select_multilabel,
    mish,
    nce_loss,
    ups_loss,
    ups_loss_multilabel,
)
from .policy import AugmentPlan, Policy
from .reference import MultiLabelSelection, Selection, dropout_keys, pack_mask, unpack_mask

if TYPE_CHECKING:
    from .estimator import UPSClassifier
    from .models.saved import load_model

__version__ = "0.2.0"
__all__ = [
    "AugmentPlan",
    "CounterDropout",
    "FixMatchLoss",
    "Mish",
    "MultiLabelSelection",
    "NCELoss",
    "Policy",
    "Selection",
    "UPSClassifier",
    "UPSLoss",
    "augment",
    "augment_plan",
    "backend",
    "counter_dropout",
    "dropout_keys",
    "fixmatch_loss",
    "load_model",
    "mc_dropout",
    "mc_select",
    "mc_select_multilabel",
    "mish",
    "nce_loss",
    "pack_mask",
    "reference",
    "unpack_mask",
    "ups_loss",
    "ups_loss_multilabel",
]


# The ops must import with torch alone; these need the trainer's dependencies.
_LATER = {"UPSClassifier": "estimator", "load_model": "models.saved"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f".{_LATER[name]}", __name__), name)
    except ImportError as error:
        if (error.name or "").startswith(__name__):  # a fault of our own
            raise
        raise ImportError(
            f"{name} needs what pip install 'ups_fast[train]' brings: {error}", name=error.name
        ) from error
