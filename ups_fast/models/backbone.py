"""Networks of torchvision and timm for real images, with pretrained weights from a file where wanted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from ups_fast.models.network import Chain, Dropout, Network
from ups_fast.models.pretrained import LITE, imported, library_name, load_weights, weights_file
from ups_fast.words import did_you_mean

LIBRARIES = ("torchvision", "timm")
VIDEO = "video"  # torchvision's networks for clips
VIDEO_NAMES = ("r3d_18", "r2plus1d_18", "mc3_18")  # of these, which need no VIDEO before them
_SIZED = {"vit": "image_size", "maxvit": "input_size"}  # families of torchvision that are built for one size


class Backbone(Network):
    """float32 [B, channels, H, W] -> logits float32 [B, n_classes], H and W at least the shorter side of `size`.

    Of clips it takes [B, channels, T, H, W].

    Dropout by one rule for all architectures: a Dropout in front of the classifier, the last linear layer. Where
    that layer ends an nn.Sequential with dropout of its own (VGG, AlexNet), those in it act too, from the first
    one on. All other dropout of the library, and the random skipping of branches (StochasticDepth, DropPath), is
    off in training too: it would draw from torch's generator, and here randomness depends on keys alone. So
    `prefix` is nearly all of the network, passes cost next to nothing, and their spread is the uncertainty of the
    classifier given its features.

    name     "torchvision:NAME" or "timm:NAME", a classifier that ends in its linear layer; or "lite0", "lite1" or
             "lite2" with the weights that are installed; or for clips "video:NAME", of torchvision.models.video
    size     (height, width), of clips (frames, height, width); transformers may take no other, convolutional networks
             all larger ones too
    dropout  of each of these Dropouts, in [0, 1)
    weights  file of pretrained weights in the library's own names: .safetensors, or what torch.save made of a
             state_dict; "" for none, then the library's initialization from the global torch generator. A
             classifier of another number of classes, or none, is replaced by a new one, with a warning.

    With one channel the first convolution has the sum of the kernels of red, green and blue: the network is that
    for three channels, fed three copies of the gray image. Activations and normalization are the library's: preact,
    activation and bn_momentum do not apply.
    Raises ValueError, one sentence, for a name, size or file that does not work, or a library that is missing.
    """

    def __init__(
        self,
        name: str,
        n_classes: int,
        channels: int,
        size: tuple[int, ...],
        *,
        dropout: float,
        weights: str = "",
    ) -> None:
        super().__init__()
        build = _builder(library_name(name), n_classes, channels, size)
        weights = weights_file(name, weights)
        try:
            self.net = build()
            _calm(self.net)
            classifier = _classifier(self.net, torch.empty(2, channels, *size, device="meta"))
        except Exception as error:  # each network has its own way to say so
            why = (str(error).splitlines() or [""])[0] or type(error).__name__
            of = f" of {size[0]} frames" if len(size) == 3 else ""
            raise ValueError(
                f"size: {name} cannot take {size[-2]}x{size[-1]} {'clips' if of else 'images'}{of} with {channels} "
                f"channels: {why}"
            ) from error
        if not classifier:
            raise ValueError(
                f"{name} does not end in one linear layer that makes its logits: choose another network"
            )
        if weights:
            load_weights(self.net, weights, name, classifier)
        self.min_size = min(size[-2:])
        self.head = _cut(self.net, classifier, dropout)

    def prefix(
        self,
        images: Tensor,  # [B, channels, H, W]
        skip: int = 0,
    ) -> Tensor:  # [B, features]: what the first Dropout gets, or the one after `skip` of them
        return self.head.before(self.net(images), skip)

    def embed(
        self,
        hidden: Tensor,  # as of `prefix`
        keys: Tensor | None,  # int32 [B]
        skip: int = 0,
    ) -> Tensor:  # [B, features]
        return self.head.after(hidden, keys, skip, -1)

    def classify(self, features: Tensor) -> Tensor:  # [B, n_classes]
        logits: Tensor = self.head[-1](features)
        return logits


def pixel_scale(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of pixels in [0, 1], red, green and blue, by which a pretrained network wants them normalized."""
    if name in LITE:
        return (127 / 255,) * 3, (128 / 255,) * 3
    library, _, short = name.partition(":")
    known = imported("timm", "timm").models.get_pretrained_cfg(short) if library == "timm" else None
    if known and len(known.mean) == len(known.std) == 3:
        return tuple(known.mean), tuple(known.std)
    return (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


def _builder(name: str, n_classes: int, channels: int, size: tuple[int, ...]) -> Callable[[], nn.Module]:
    """A function that makes the library's network; all that is wrong with the name is said here."""
    library, _, short = name.partition(":")
    extra = {"torchvision": "train", VIDEO: "train", "timm": "timm"}[library]
    source = imported("timm" if library == "timm" else "torchvision.models", extra)
    options: dict[str, Any] = {}
    if library == "timm":
        _check_name(name, short, source.list_models() + source.list_models(pretrained=True), "")
        known = source.models.get_pretrained_cfg(short)
        if known and known.fixed_input_size:
            options["img_size"] = size
        return lambda: source.create_model(short, num_classes=n_classes, in_chans=channels, **options)

    kind = source.video if library == VIDEO else source
    other = source.get_model_builder(short).__module__ if short in source.list_models() else ""
    _check_name(name, short, source.list_models(module=kind), other)
    if (family := short.partition("_")[0]) in _SIZED:
        options[_SIZED[family]] = size[0] if family == "vit" else size  # a wrong width is found by the trial

    def build() -> nn.Module:
        net: nn.Module = source.get_model(short, weights=None, num_classes=n_classes, **options)
        if channels == 1:
            first = next(module for module in net.modules() if isinstance(module, (nn.Conv2d, nn.Conv3d)))
            first.in_channels, first.weight = 1, nn.Parameter(first.weight.detach().sum(1, keepdim=True))
        return net

    return build


def _check_name(name: str, short: str, names: list[str], other: str) -> None:
    if short in names:
        return
    if other:
        what = "a classifier of clips" if name.startswith(VIDEO) else "an image classifier"
        raise ValueError(f"{name} is not {what} but of {other}")
    hint = did_you_mean(short, names, lambda near: f"{name.partition(':')[0]}:{near}", most=3)
    raise ValueError(f"there is no network {name[:100]!r}{hint}")


def _calm(net: nn.Module) -> None:
    """Switches off all that draws from torch's generator in training."""
    for module in net.modules():
        drops = isinstance(module, _DropoutNd) or type(module).__name__ == "StochasticDepth"
        for rate in ("drop_prob", "drop_rate", *(["p"] if drops else [])):
            if hasattr(module, rate):
                setattr(module, rate, 0.0)


def _classifier(
    net: nn.Module,
    images: Tensor,  # [B, channels, H, W], on the meta device
) -> str:
    """The name of the linear layer whose output is the network's, "" where there is none.

    Found by a training step's forward pass without memory or arithmetic, which also tells whether the size works.
    """
    made: list[tuple[str, Tensor]] = []
    trial = copy.deepcopy(net).to("meta").train()
    for name, module in trial.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _, inputs, made_now, name=name: made.append((name, made_now)))
    logits = trial(images)
    last = next((name for name, tensor in made if tensor is logits), "")
    return last if [name for name, _ in made].count(last) == 1 else ""


def _cut(net: nn.Module, classifier: str, dropout: float) -> Chain:
    """Takes the classifier off, with what is before it in its nn.Sequential from the first dropout on."""
    path, _, last = classifier.rpartition(".")
    parent = net.get_submodule(path)
    parts = {last: parent.get_submodule(last)}
    if isinstance(parent, nn.Sequential):
        names = list(dict(parent.named_children()))
        names = names[: names.index(last) + 1]
        first = next((name for name in names if isinstance(parent.get_submodule(name), nn.Dropout)), last)
        parts = {name: parent.get_submodule(name) for name in names[names.index(first) :]}
    head: list[nn.Module] = []
    layer = 0
    for name, module in parts.items():
        setattr(parent, name, nn.Identity())
        dropping = isinstance(module, nn.Dropout)
        if dropping or (name == last and not (head and isinstance(head[-1], Dropout))):
            head.append(Dropout(dropout, layer))
            layer += 1
        if not dropping:
            head.append(module)
    return Chain(*head)
