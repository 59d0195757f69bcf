"""The keys of a network."""

from __future__ import annotations

from dataclasses import dataclass

from ups_fast.schema import key

MOST_FRAMES = 4096  # of a clip that a network gets


@dataclass
class ModelConfig:
    name: str = key(
        "wrn-28-2",
        "Network: wrn-DEPTH-WIDTH (depth 10, 16, 22, 28, ...), cnn13, shake-26-2x96d or resnext-29-8x64d with any "
        "numbers that docs/data.md allows. For photographs torchvision:NAME or timm:NAME, such as "
        "torchvision:resnet50, or lite0, lite1 or lite2, small ones that are installed with their weights. For clips "
        "conv2plus1d-WIDTH, such as conv2plus1d-16, r3d_18, r2plus1d_18, mc3_18 or video:NAME of torchvision. For "
        "features linear or mlp-WIDTH, such as mlp-256.",
    )
    weights: str = key(
        "",
        "File of pretrained weights for torchvision, timm and video networks, .safetensors or .pth. Each new network "
        "starts from it. Empty: none.",
    )
    freeze: bool = key(
        False,
        "Never trains the network, but model.head on its features, which are computed once for each image. Needs "
        "weights.",
    )
    head: str = key(
        "mlp-128", "With model.freeze, what is trained on the features: linear or mlp-WIDTH, such as mlp-256."
    )
    input_size: int = key(
        0,
        "With model.freeze, the length to which the shorter side of the images is scaled for the network. Small images "
        "want more than their own, such as 96. 0: as they are.",
        within="[0, 4096]",
    )
    dropout: float = key(0.3, "Dropout rate. Dropout also makes the labeling passes differ.", within="[0, 1)")
    preact: str = key(
        "fixed",
        "Input of the first convolution of WRN stages 2 and 3. published: not activated, as in the UPS code. fixed: "
        "activated.",
        choices=("published", "fixed"),
    )
    activation: str = key(
        "mish", "Activation of a WRN or ResNeXt. The others have their own.", choices=("mish", "leaky_relu")
    )
    bn_momentum: float = key(
        0.1,
        "Momentum of batch-norm's statistics. The published WRN has 0.001, which is too slow for short runs.",
        within="(0, 1]",
    )
