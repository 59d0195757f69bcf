"""The networks of UPS, by name. They know nothing of training, rounds or selection.

Called as `model(images)`, or as `model(images, keys)`, and then their dropout drops by keys, in eval mode too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from ups_fast.models.backbone import LIBRARIES, VIDEO, VIDEO_NAMES, Backbone
from ups_fast.models.clips import Conv2Plus1D
from ups_fast.models.cnn13 import CNN13
from ups_fast.models.dropouts import KINDS, DropBlock, SpatialDropout, has_maps
from ups_fast.models.ensemble import Ensemble
from ups_fast.models.frozen import LARGEST_INPUT, Frozen
from ups_fast.models.mlp import MLP, widths_of
from ups_fast.models.network import Dropout, Network
from ups_fast.models.pretrained import LITE
from ups_fast.models.resnext import ResNeXt
from ups_fast.models.shake import ShakeShake
from ups_fast.models.wrn import WideResNet

__all__ = [
    "CNN13",
    "KINDS",
    "MLP",
    "Backbone",
    "Conv2Plus1D",
    "DropBlock",
    "Dropout",
    "Ensemble",
    "Frozen",
    "Network",
    "ResNeXt",
    "ShakeShake",
    "SpatialDropout",
    "WideResNet",
    "build",
]

_NUMBER = "[0-9]{1,9}"


def build(
    name: str,
    *,
    n_classes: int,
    channels: int = 0,
    size: int | Sequence[int] = 0,
    frames: int = 0,
    columns: int = 0,
    heads: int = 1,
    dropout: float,
    dropout_kind: str = "dropout",
    preact: str = "fixed",
    activation: str = "mish",
    bn_momentum: float = 0.1,
    weights: str = "",
    freeze: bool = False,
    head: str = "mlp-128",
    input_size: int = 0,
) -> Network:
    """A freshly initialized network, float32 [B, channels, H, W] -> logits float32 [B, n_classes].

    name         "wrn-d-k" with d = 6n + 4 up to 1000 and k up to 100 (such as "wrn-28-2"), or "cnn13"; "shake-d-2xwd"
                 with d = 6n + 2 (such as "shake-26-2x96d") or "resnext-d-cxwd" with d = 9n + 2 (such as
                 "resnext-29-8x64d"), see `ShakeShake` and `ResNeXt`; for real images "torchvision:NAME" or
                 "timm:NAME", an image classifier of that library, or "lite0", "lite1" or "lite2", see `Backbone`; for
                 features "linear" or "mlp-w[-w...]" with hidden layers of these widths (such as "mlp-256");
                 for clips "conv2plus1d-w" with w channels in its first block, at most 512, or "video:NAME" with
                 torchvision's name, or "r3d_18", "r2plus1d_18" or "mc3_18"
    frames       of clips, at least 2: the network takes float32 [B, channels, frames, H, W]; 0: of images
    columns      of features, in place of channels and size: the network takes float32 [B, columns]
    heads        that many networks side by side, each with weights of its own: see `MLP`, and on images `Ensemble`
    channels     1 or 3
    size         side of the images, or (height, width); at least 12 for CNN-13, and 8 for the others.
                 The network then takes any size from that minimum on (a `Backbone`: what its own kind takes).
    dropout      in [0, 1)
    dropout_kind what a WRN, CNN-13, Shake-Shake or ResNeXt drops: "dropout", elements; "spatial", channels;
                 "dropblock", squares of them
    preact       WRN only. "fixed": every conv1 is fed the activated input. "published": the first block of
                 stages 2 and 3 feeds conv1 the raw input, as the published UPS code does; its bn1 is dead.
    activation   WRN and ResNeXt only: "mish" or "leaky_relu" (slope 0.1). CNN-13 always has LeakyReLU 0.1, and
                 Shake-Shake ReLU.
    bn_momentum  in (0, 1]. The published WRN has 0.001; its running statistics need thousands of steps before
                 eval mode means anything, so short runs want the default. Not for a `Backbone`.
    weights      networks of torchvision and timm, video:NAME too, only: file of pretrained weights, "" for none
    freeze       these only, too: the network is never trained, but `head`, a network on its features, see `Frozen`
    input_size   with freeze: the length to which the shorter side of the images is scaled. 0: as they are

    Other weights are drawn from the global torch generator. A ValueError names the argument and what it got.
    """
    if n_classes < 1:
        raise ValueError(f"n_classes must be at least 1, got {n_classes}")
    if not columns and channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    if dropout_kind not in KINDS:
        raise ValueError(f"dropout_kind must be one of {', '.join(KINDS)}, got {dropout_kind!r}")
    if dropout_kind != "dropout" and not has_maps(name):
        raise ValueError(
            f"dropout_kind={dropout_kind} drops parts of feature maps, as wrn-d-k, cnn13, shake-d-2xwd and "
            f"resnext-d-cxwd have, got {name}"
        )
    if not 0.0 < bn_momentum <= 1.0:
        raise ValueError(f"bn_momentum must be in (0, 1], got {bn_momentum}")
    if preact not in ("published", "fixed"):
        raise ValueError(f"preact must be 'published' or 'fixed', got {preact!r}")
    if activation not in ("mish", "leaky_relu"):
        raise ValueError(f"activation must be 'mish' or 'leaky_relu', got {activation!r}")
    if name in VIDEO_NAMES:
        name = f"{VIDEO}:{name}"
    if frames and (frames < 2 or columns):
        raise ValueError(f"frames must be at least 2, and 0 for features and images, got {frames}")
    library = name.partition(":")[0] if ":" in name else ""
    if weights and library not in (*LIBRARIES, VIDEO):
        raise ValueError(
            f"weights are for torchvision:NAME, timm:NAME and video:NAME alone, got {weights} for {name}"
        )

    if widths_of(head) is None:
        raise ValueError(f"head must be linear or mlp-WIDTH, such as mlp-128, got {head!r}")
    if not 0 <= input_size <= LARGEST_INPUT:
        raise ValueError(f"input_size must be in [0, {LARGEST_INPUT}], got {input_size}")
    pretrained = library in LIBRARIES or name in LITE
    if freeze and (not pretrained or columns):
        raise ValueError(f"freeze is for lite0, torchvision:NAME and timm:NAME on images alone, got {name}")
    widths = widths_of(name)
    if (widths is not None) != bool(columns):
        fits = "linear or mlp-WIDTH, such as mlp-256" if columns else "another: this one is for features"
        raise ValueError(f"name must be {fits}, got {name!r} for {'features' if columns else 'images'}")
    if (library == VIDEO or name.startswith("conv2plus1d-")) != bool(frames):
        fits = "conv2plus1d-WIDTH or video:NAME" if frames else "another: this one is for clips"
        raise ValueError(f"name must be {fits}, got {name!r} for {'clips' if frames else 'images'}")
    if heads < 1:
        raise ValueError(f"heads must be at least 1, got {heads}")
    if widths is not None:
        return MLP(widths, columns, n_classes, dropout=dropout, heads=heads)

    height, width = (size, size) if isinstance(size, int) else size
    if heads > 1 and not freeze:
        one = partial(
            build,
            name,
            n_classes=n_classes,
            channels=channels,
            size=(height, width),
            frames=frames,
            dropout=dropout,
            dropout_kind=dropout_kind,
            preact=preact,
            activation=activation,
            bn_momentum=bn_momentum,
            weights=weights,
        )
        return Ensemble(one, heads)
    model: Network
    if freeze:
        return Frozen(
            name,
            n_classes,
            channels,
            (height, width),
            head=head,
            heads=heads,
            input_size=input_size,
            dropout=dropout,
            weights=weights,
        )
    common: dict[str, Any] = {
        "dropout": dropout,
        "kind": KINDS[dropout_kind],
        "bn_momentum": bn_momentum,
    }
    numbers = [int(each) for each in re.findall("[0-9]{1,9}", name)]
    if pretrained or library == VIDEO:
        shape = (frames, height, width) if frames else (height, width)
        model = Backbone(name, n_classes, channels, shape, dropout=dropout, weights=weights)
    elif re.fullmatch(f"conv2plus1d-{_NUMBER}", name):
        model = Conv2Plus1D(numbers[2], n_classes, channels, frames, dropout=dropout, bn_momentum=bn_momentum)
    elif name == "cnn13":
        model = CNN13(n_classes, channels, **common)
    elif re.fullmatch(f"shake-{_NUMBER}-2x{_NUMBER}d", name):
        model = ShakeShake(numbers[0], numbers[2], n_classes, channels, **common)
    elif re.fullmatch(f"resnext-{_NUMBER}-{_NUMBER}x{_NUMBER}d", name):
        model = ResNeXt(
            numbers[0], numbers[1], numbers[2], n_classes, channels, activation=activation, **common
        )
    elif re.fullmatch(f"wrn-{_NUMBER}-{_NUMBER}", name):
        published = preact == "published"
        model = WideResNet(
            numbers[0],
            numbers[1],
            n_classes,
            channels,
            published_preact=published,
            activation=activation,
            **common,
        )
    else:
        raise ValueError(
            "model name must be 'cnn13' or 'wrn-d-k' (such as 'wrn-28-2'), 'shake-d-2xwd' or 'resnext-d-cxwd' (such as "
            "'shake-26-2x96d' or 'resnext-29-8x64d'), or 'torchvision:NAME' or 'timm:NAME', or 'lite0', for features "
            "'linear' or 'mlp-w' (such as 'mlp-256'), or for clips 'conv2plus1d-w' (such as 'conv2plus1d-16') or "
            f"'video:NAME', got {name!r}"
        )

    if min(height, width) < model.min_size:
        raise ValueError(
            f"size: {name} needs images from {model.min_size}x{model.min_size}, got {height}x{width}"
        )
    return model
