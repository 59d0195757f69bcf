"""Networks of torchvision and timm: the library's own function, with dropout by keys in front of the classifier."""

from __future__ import annotations

import io
import json
import pickle
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import safetensors
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn

from ups_fast import load_model, rounds
from ups_fast.config import Config, ModelConfig, TrainConfig
from ups_fast.data import ImageSet
from ups_fast.files import RunFolderError
from ups_fast.models import Backbone, Dropout, build
from ups_fast.models.pretrained import load_weights
from ups_fast.models.saved import save_model
from ups_fast.reference import dropout_keys
from ups_fast.selection import passes_over, skipped

torchvision = pytest.importorskip("torchvision")

SMALL = "torchvision:shufflenet_v2_x0_5"
DEEP = "torchvision:alexnet"  # three Dropouts
ZOO = ["resnet18", "mobilenet_v3_small", "efficientnet_b0", "regnet_y_400mf", "convnext_tiny", "densenet121"]
ZOO += ["shufflenet_v2_x0_5", "swin_t", "vit_b_32", "alexnet"]
TIMM = ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_nfnet", "ghostnet_100"]
TIMM += ["resnet18.a1_in1k"]


def some_now(names: list[str], *now: str) -> list:
    """The names as parameters: all but `now` are slow."""
    return [name if name in now else pytest.param(name, marks=pytest.mark.slow) for name in names]


def make(name: str = SMALL, seed: int = 0, **changes) -> Backbone:
    torch.manual_seed(seed)
    size = 64 if name == DEEP else 32
    model = build(name, **{"n_classes": 5, "channels": 3, "size": size, "dropout": 0.3, **changes})
    assert isinstance(model, Backbone)
    return model


def images(n: int = 4, channels: int = 3, size: int = 32) -> Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(1))


def keys_of(n: int, draw: int = 0) -> Tensor:
    return dropout_keys(torch.arange(n), seed=7, draw=draw)


def last_linear(model: nn.Module) -> nn.Linear:
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


def library_model(name: str, channels: int = 3) -> nn.Module:
    """The untouched network with the weights of `make(name)`."""
    torch.manual_seed(0)
    if name.startswith("timm:"):
        size = {"img_size": 32} if "vit" in name else {}
        return sys.modules["timm"].create_model(name[5:], num_classes=5, in_chans=channels, **size)
    size = {"image_size": 32} if "vit" in name else {}
    return torchvision.models.get_model(name.partition(":")[2], weights=None, num_classes=5, **size)


def check_is_the_library_s(name: str) -> None:
    x = images(size=64 if name == DEEP else 32)
    model, original = make(name), library_model(name)
    for each in (model, original):  # some begin with zeros, and all would be equal
        nn.init.normal_(last_linear(each).weight, generator=torch.Generator().manual_seed(2))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in original.parameters())
    with torch.no_grad():
        logits = model.eval()(x)
        assert logits.shape == (4, 5) and logits.dtype == torch.float32 and logits.isfinite().all()
        assert torch.equal(logits, original.eval()(x))
        assert torch.equal(logits, model(x))
        first, second = (model(x, keys_of(4, draw)) for draw in (0, 1))
        assert not torch.equal(first, second) and not torch.equal(first, logits)
        assert torch.equal(first, model(x, keys_of(4)))
        model.train()
        before = torch.get_rng_state()
        model(x, keys_of(4))
        assert torch.equal(before, torch.get_rng_state()), "training draws from torch's generator"
    found = [module for module in model.modules() if isinstance(module, Dropout)]
    assert found and [each.layer for each in found] == list(range(len(found)))
    assert all(each.p == 0.3 for each in found) and skipped(model, 1) == len(found) - 1


@pytest.mark.parametrize("name", some_now(ZOO, "resnet18"))
def test_is_the_library_s_network_with_dropout(name):
    check_is_the_library_s(f"torchvision:{name}")


@pytest.mark.parametrize("name", some_now(TIMM, "test_vit"))
def test_is_timm_s_network_with_dropout(name):
    pytest.importorskip("timm")
    check_is_the_library_s(f"timm:{name}")


def warm(model: Backbone, size: int = 32) -> Backbone:
    """In float64 and eval mode, with the statistics of one batch: without any, signals die away before the end."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model.double().train()(images(8, size=size).double())
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchvision:convnext_tiny", "torchvision:resnet18"])
def test_one_channel_is_three_equal_ones(name):
    gray, color = (make(name, channels=channels).eval() for channels in (1, 3))
    (first, kernel), *rest = gray.state_dict().items()
    wanted = color.state_dict()
    assert torch.equal(kernel, wanted[first].sum(1, keepdim=True))
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in rest)
    x = images(channels=1)
    with torch.no_grad():
        expected = color.double()(x.expand(-1, 3, -1, -1).double())
        # Float64 but for the summed kernels, which were rounded once, to 2^-24 of themselves.
        torch.testing.assert_close(gray.double()(x.double()), expected, rtol=1e-4, atol=1e-6)
        assert expected.std() > 0.01
    with pytest.raises(RuntimeError):
        gray(images().double())


def test_dropout_off_leaves_nothing_random():
    model, x = make(dropout=0.0), images()
    assert torch.equal(model.eval()(x, keys_of(4)), model(x))
    with torch.no_grad():
        before = torch.get_rng_state()
        model.train()(x)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "skip"), [(SMALL, 0), (DEEP, 1)])
def test_passes_at_once_are_single_passes(name, skip):
    size = 64 if name == DEEP else 32
    model = warm(make(name, dropout=0.5), size)
    x, index = images(6, size=size).double(), torch.tensor([3, 1, 4, 15, 9, 2])
    close = {"rtol": 1e-9, "atol": 1e-9}
    with torch.no_grad():
        logits = passes_over(model, x, index, 3, 7, skip)
        for p in range(3):
            keys = dropout_keys(index, seed=7, draw=p)
            single = model.suffix(model.prefix(x, skip), keys, skip)
            torch.testing.assert_close(logits[p], single, **close)
        parts = zip(x.split([5, 1]), index.split([5, 1]), strict=True)
        split = [passes_over(model, some, which, 3, 7, skip) for some, which in parts]
        torch.testing.assert_close(logits, torch.cat(split, dim=1), **close)
        flipped = passes_over(model, x.flip(0), index.flip(0), 3, 7, skip)
        torch.testing.assert_close(logits, flipped.flip(1), **close)
    assert (logits.std(0) > 1e-5).all()


def test_several_dropouts_of_which_skip_leaves_the_first_off():
    model, x = make(DEEP, dropout=0.5).eval(), images(size=64)
    # Keys of the state are in people's files: a change here makes those unreadable.
    keys = [f"head.{i}.{each}" for i in (1, 4, 7) for each in ("weight", "bias")]
    assert list(model.state_dict())[-6:] == keys
    kinds = [type(module).__name__ for module in model.head]
    assert kinds == ["CounterDropout", "Linear", "ReLU"] * 2 + ["CounterDropout", "Linear"]
    with torch.no_grad():
        skipping = model.suffix(model.prefix(x, 2), keys_of(4), 2)
        assert not torch.equal(skipping, model(x, keys_of(4)))
        for i in (0, 3):
            model.head[i].p = 0.0
        assert torch.equal(skipping, model(x, keys_of(4)))


@pytest.mark.slow
def test_compiles_as_one_graph():
    model, again = make("torchvision:resnet18"), make("torchvision:resnet18")
    x = images()
    compiled = torch.compile(again, backend="aot_eager", fullgraph=True, dynamic=False)
    expected, got = model.train()(x, keys_of(4)), compiled(x, keys_of(4))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    got.square().sum().backward()
    assert all(p.grad is not None for p in again.parameters())
    for key, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value, rtol=1e-3, atol=1e-3, msg=key)


@pytest.mark.slow
def test_passes_compile_as_one_graph():
    model, x, index = warm(make(DEEP), 64), images(size=64).double(), torch.arange(4)
    passes = torch.compile(passes_over, backend="aot_eager", fullgraph=True, dynamic=False)
    args = model, x, index, 2, torch.tensor(7), 1
    with torch.no_grad():
        torch.testing.assert_close(passes(*args), passes_over(*args), rtol=1e-9, atol=1e-9)


def test_smaller_images_than_built_for_are_refused():
    model = make(size=(40, 32))
    assert model.min_size == 32
    assert model(images(2, size=33)).shape == (2, 5)
    with pytest.raises(ValueError, match=r"at least 32x32, got \(2, 3, 31, 31\)"):
        model(images(2, size=31))


@pytest.mark.parametrize(
    ("name", "size", "why"),
    [
        ("torchvision:alexnet", 32, "32x32 images with 3 channels: .*Output size is too small"),
        ("torchvision:convnext_tiny", (31, 64), "31x64 images"),
        pytest.param("torchvision:densenet121", 16, "Output size is too small", marks=pytest.mark.slow),
        ("torchvision:vit_b_32", 33, "indivisible by patch size"),
        pytest.param("torchvision:vit_b_32", (32, 64), "Wrong image width", marks=pytest.mark.slow),
        ("torchvision:maxvit_t", 100, "not divisible by partition size"),
    ],
)
def test_size_that_does_not_work(name, size, why):
    with pytest.raises(ValueError, match=f"size: {name} cannot take .*{why}") as said:
        make(name, size=size)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "torchvision:resnt18",
            "there is no network 'torchvision:resnt18' .did you mean torchvision:resnet18",
        ),
        ("torchvision:ResNet18", "did you mean torchvision:resnet18"),
        ("torchvision:", "there is no network 'torchvision:'$"),
        ("torchvision:" + "x" * 9999, "there is no network '.{,100}'$"),
        ("torchvision:fcn_resnet50", "is not an image classifier but of torchvision.models.segmentation"),
        ("torchvision:ssd300_vgg16", "is not an image classifier but of torchvision.models.detection"),
        (
            "torchvision:quantized_resnet18",
            "is not an image classifier but of torchvision.models.quantization",
        ),
        ("torchvision:r3d_18", "is not an image classifier but of torchvision.models.video"),
        ("torchvision:squeezenet1_1", "does not end in one linear layer"),
        ("Torchvision:resnet18", "model name must be"),
        ("hub:resnet18", "model name must be .*'torchvision:NAME' or 'timm:NAME', or .*got 'hub:resnet18'"),
    ],
)
def test_names_that_do_not_work(name, says):
    with pytest.raises(ValueError, match=says):
        make(name)


def test_timm_names_and_sizes_that_do_not_work():
    pytest.importorskip("timm")
    for name, says in {
        "timm:resnt18": "there is no network 'timm:resnt18' .did you mean timm:resnet18",
        "timm:resnet18.bogus": "there is no network 'timm:resnet18.bogus'",
        "timm:hf-hub:timm/resnet18.a1_in1k": "there is no network",
        "timm:deit_tiny_distilled_patch16_224": "does not end in one linear layer",
        "timm:test_vit": "size: timm:test_vit cannot take 40x40 images .*divisible by patch size",
    }.items():
        with pytest.raises(ValueError, match=says):
            make(name, size=40 if name == "timm:test_vit" else 32)


@pytest.mark.parametrize(("library", "module"), [("torchvision", "torchvision.models"), ("timm", "timm")])
def test_a_missing_library_is_named(library, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    extra = "train" if library == "torchvision" else "timm"
    with pytest.raises(
        ValueError, match=rf"{library} is needed .*pip install {library}, or ups_fast\[{extra}\]"
    ):
        make(f"{library}:resnet18")


@cache
def state(n_classes: int = 1000) -> dict[str, Tensor]:
    torch.manual_seed(5)
    return torchvision.models.shufflenet_v2_x0_5(weights=None, num_classes=n_classes).state_dict()


@pytest.fixture
def pretrained(tmp_path) -> tuple[Path, dict[str, Tensor]]:
    torch.save(state(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth", state()


@pytest.fixture(scope="module")
def bare() -> nn.Module:
    """The network of SMALL before it gets weights: a file that is refused must leave it as it is."""
    torch.manual_seed(0)
    net: nn.Module = torchvision.models.shufflenet_v2_x0_5(weights=None, num_classes=5)
    before = {key: x.clone() for key, x in net.state_dict().items()}
    yield net
    assert all(torch.equal(x, before[key]) for key, x in net.state_dict().items())


def same_body(model: Backbone, wanted: dict[str, Tensor]) -> None:
    got = model.net.state_dict()
    assert got.keys() == {key for key in wanted if not key.startswith("fc.")}
    assert all(torch.equal(got[key], wanted[key].to(got[key].dtype)) for key in got)


def wrapped(path: Path, content: dict[str, Tensor]) -> None:
    torch.save({"epoch": 3, "state_dict": content, "args": "any"}, path)


def in_half(path: Path, content: dict[str, Tensor]) -> None:
    save_file({key: x.half() if x.is_floating_point() else x for key, x in content.items()}, path)


def old_style(path: Path, content: dict[str, Tensor]) -> None:
    kept = {key: x for key, x in content.items() if not key.endswith("num_batches_tracked")}
    torch.save(kept, path, _use_new_zipfile_serialization=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "write"),
    [
        ("w.pth", lambda path, content: torch.save(content, path)),
        ("w.safetensors", lambda path, content: save_file(content, path)),
        ("w.bin", wrapped),
        ("w.safetensors", in_half),
        ("w.pth", old_style),
    ],
)
def test_a_file_of_as_many_classes_gives_the_same_function(tmp_path, file, write, recwarn):
    content = state(n_classes=5)
    write(tmp_path / file, content)
    model = make(weights=str(tmp_path / file)).eval()
    assert not [each for each in recwarn if "classifier" in str(each.message)]
    original = torchvision.models.shufflenet_v2_x0_5(weights=None, num_classes=5).eval()
    original.load_state_dict(
        {
            key: x.half().float() if write is in_half and x.is_floating_point() else x
            for key, x in content.items()
        }
    )
    assert torch.equal(model(images()), original(images()))


def test_a_classifier_of_other_classes_is_replaced_and_said(pretrained):
    path, content = pretrained
    with pytest.warns(
        UserWarning, match=r"weights\.pth has a classifier of 1000 classes, .*a new one of 5"
    ) as said:
        model = make(weights=str(path))
    assert said[0].filename == __file__
    same_body(model, content)
    assert torch.equal(model.head[1].weight, make().head[1].weight), "as it is without a file"
    headless = {key: x for key, x in content.items() if not key.startswith("fc.")}
    torch.save(headless, path)
    with pytest.warns(UserWarning, match="has no classifier"):
        same_body(make(weights=str(path)), content)


def test_kernels_of_three_channels_are_summed_for_one(pretrained):
    path, content = pretrained
    with pytest.warns(UserWarning, match="1000 classes"):
        gray, color = (make(weights=str(path), channels=channels).eval() for channels in (1, 3))
    assert torch.equal(gray.net.conv1[0].weight, content["conv1.0.weight"].sum(1, keepdim=True))
    x = images(channels=1)
    # As in test_one_channel_is_three_equal_ones.
    torch.testing.assert_close(gray.prefix(x), color.prefix(x.expand(-1, 3, -1, -1)), rtol=1e-3, atol=1e-4)


class Evil:
    def __reduce__(self):
        return (pytest.fail, ("code in a file of weights was run",))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("w.pth", b""),
        ("w.safetensors", b""),
        ("w.pth", b"\x00\xff" * 999),
        ("w.safetensors", b"\xff" * 999),
        ("w.pth", b"<html>404</html>"),
        ("w.pth", pickle.dumps({"fc.weight": Evil()}, protocol=2)),
        ("w.pth", "half"),
        ("w.safetensors", "half"),
        ("w.safetensors", "other"),
    ],
)
def test_files_that_are_no_weights(bare, tmp_path, file, content):
    path = tmp_path / file
    if isinstance(content, str):
        save_file(state(), tmp_path / "a.safetensors")
        torch.save(state(), tmp_path / "a.pth")
        source = path.suffix if content == "half" else ".pth"
        whole = (tmp_path / f"a{source}").read_bytes()
        content = whole[: len(whole) // 2] if content == "half" else whole
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"weights: .*{file} is damaged, or neither"):
        load_weights(bare, str(path), SMALL, "fc")


@pytest.mark.parametrize(
    "content",
    [
        [torch.zeros(3)],
        {"epoch": 3},
        torch.zeros(3),
        {"model": {"a": "b"}},
        None,
        {"fc.weight": torch.eye(3).to_sparse()},
        {"fc.weight": torch.empty(3, device="meta")},
    ],
)
def test_files_of_something_else(bare, tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth is no state_dict"):
        load_weights(bare, str(tmp_path / "w.pth"), SMALL, "fc")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"conv1.0.weight": None}, "conv1.0.weight is missing$"),
        (
            {"conv1.0.weight": torch.zeros(24, 4, 3, 3)},
            r"\[24, 4, 3, 3\] and must be real numbers \[24, 3, 3, 3\]$",
        ),
        ({"conv1.0.weight": torch.zeros(24, 3, 3, 3, dtype=torch.int8)}, "whole numbers .* must be real"),
        ({"conv1.0.weight": torch.zeros(())}, r"real numbers \[\] and must be"),
        ({"surprise": torch.zeros(3)}, "surprise is unknown$"),
        ({"fc.weight": torch.zeros(1000, 7)}, r"fc.weight is real numbers \[1000, 7\].*, and 1 more such"),
        ({"fc.weight": torch.zeros(())}, r"fc.weight is real numbers \[\]"),
        ({"fc.bias": torch.zeros(7), "fc.weight": torch.zeros(5, 1024)}, r"fc.bias is real numbers \[7\]"),
    ],
)
def test_weights_that_do_not_fit(bare, pretrained, change, says):
    path, content = pretrained
    changed = {key: x for key, x in {**content, **change}.items() if x is not None}
    torch.save(changed, path)
    with pytest.raises(ValueError, match=rf"weights: .*weights\.pth does not fit {SMALL}: .*{says}"):
        load_weights(bare, str(path), SMALL, "fc")


def test_a_file_that_is_refused_ends_the_building(tmp_path):
    (tmp_path / "w.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=r"weights: .*w\.pth is damaged, or neither"):
        make(weights=str(tmp_path / "w.pth"))


@pytest.mark.slow
def test_weights_of_another_network_or_place(pretrained, tmp_path):
    path, _ = pretrained
    with pytest.raises(
        ValueError, match=r"does not fit torchvision:resnet18: .* is unknown, and \d+ more such"
    ):
        make("torchvision:resnet18", weights=str(path))
    for nowhere in (tmp_path / "nowhere.pth", tmp_path, "https://example.com/a.pth", "x" * 5000):
        with pytest.raises(ValueError, match="weights: there is no file"):
            make(weights=str(nowhere))
    with pytest.raises(ValueError, match="weights are for torchvision:NAME, timm:NAME and video:NAME alone"):
        build("cnn13", n_classes=5, channels=3, size=32, dropout=0.3, weights=str(path))


def test_timm_weights(tmp_path):
    timm = pytest.importorskip("timm")
    content = timm.create_model("test_resnet", num_classes=1000).state_dict()
    save_file(content, tmp_path / "w.safetensors")
    with pytest.warns(UserWarning, match="1000 classes"):
        model = make("timm:test_resnet", channels=1, weights=str(tmp_path / "w.safetensors"))
    first = next(key for key in content if key.endswith("weight") and content[key].ndim == 4)
    assert torch.equal(model.net.state_dict()[first], content[first].sum(1, keepdim=True))


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
def test_a_saved_network_comes_back_without_the_file(pretrained, tmp_path, channels):
    path, _ = pretrained
    with pytest.warns(UserWarning, match="1000 classes"):
        model = make(weights=str(path), channels=channels)
    x = images(channels=channels)
    model.train()(x, keys_of(4))  # statistics of its own
    config = vars(replace(ModelConfig(), name=SMALL, weights=str(path)))
    about = {"model": config, "classes": list("abcde"), "channels": channels, "size": [32, 32]}
    save_model(tmp_path, model, {**about, "mean": [0.5] * channels, "std": [0.5] * channels})
    path.unlink()
    again = load_model(tmp_path)
    assert config["weights"] == str(path), "what the run goes on with is unchanged"
    assert torch.equal(again(x), model.eval()(x))
    assert torch.equal(again(x, keys_of(4)), model(x, keys_of(4)))
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict())
        assert json.loads(file.metadata()["ups_fast"])["model"]["weights"] == ""


def test_keys_of_the_state_are_stable():
    """They are in people's files: a change here makes those unreadable."""
    keys = list(make().state_dict())
    assert keys[0] == "net.conv1.0.weight" and keys[-2:] == ["head.1.weight", "head.1.bias"]


@pytest.mark.slow
def test_every_round_starts_with_the_weights(tmp_path):
    """A run whose steps change nothing ends with the body of the file, and its network needs the file no more."""
    content = {key: x for key, x in state().items() if not key.startswith("fc.")}
    torch.save(content, tmp_path / "w.pth")
    cfg = Config(run_dir=str(tmp_path / "run"), device="cpu", threads=1)
    cfg.model = ModelConfig(name=SMALL, weights=str(tmp_path / "w.pth"))
    cfg.train = TrainConfig(rounds=2, epochs=1, batch_size=4, lr=1e-30, weight_decay=0.0)
    cfg.runtime.precision = "float32"
    cfg.select.passes = 2
    pixels = torch.randint(0, 256, (20, 32, 32, 3), dtype=torch.uint8)
    labels = torch.arange(20) % 2
    test = pixels[:4], labels[:4]
    data = ImageSet("tiny", ["a", "b"], pixels, labels, *test, (0.5,) * 3, (0.3,) * 3, torch.arange(8))
    with pytest.warns(UserWarning, match="has no classifier"):
        rounds.run(cfg, data, console=Console(file=io.StringIO()))
    (tmp_path / "w.pth").unlink()
    body = load_model(tmp_path / "run").net.state_dict()
    kept = [key for key in content if "running" not in key and "tracked" not in key]
    assert len(kept) > 100
    for key in kept:
        torch.testing.assert_close(body[key], content[key], rtol=0, atol=1e-12, msg=key)
    with pytest.raises(ValueError, match=r"^model.name: weights: there is no file"):
        rounds.run(cfg, data, console=Console(file=io.StringIO()))
    torch.save({key: x * 2 if x.is_floating_point() else x for key, x in content.items()}, tmp_path / "w.pth")
    with (
        pytest.warns(UserWarning),
        pytest.raises(RunFolderError, match=r"belongs to other data: other pretrained weights"),
    ):
        rounds.run(cfg, data, console=Console(file=io.StringIO()))
