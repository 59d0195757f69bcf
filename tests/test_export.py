"""The network of a run as a file for other programs: what it answers, and when it is not written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ups_fast import config, config_file, export, load_model, train
from ups_fast.export import TOLERANCE, Check
from ups_fast.models import Frozen, Network
from ups_fast.models.saved import rebuild, save_model
from ups_fast.modules import Mish

ROOT = Path(__file__).parents[1]
COLUMNS = 7
QUICK = {"threads": 1, "model.name": "wrn-10-1", "train.rounds": 1, "data.name": "npz"}


def awake(model: Network, samples: Tensor) -> Network:
    """New weights, but other answers for other samples."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(samples)
    return model.eval()


def made(folder: Path, *, shape: tuple[int, ...] = (1, 8, 8), **changes: Any) -> Path:
    """The folder of a run that has trained nothing, with its data beside it."""
    folder.mkdir()
    changes = {"data.root": str(folder / "data.npz"), **{k.replace("__", "."): x for k, x in changes.items()}}
    cfg = config.make({**QUICK, **changes, "run_dir": str(folder / "run")})
    random, n = np.random.default_rng(0), 300
    if len(shape) == 1:
        x = random.normal(3, 2, (n, *shape)).astype(np.float32)
        about: dict[str, Any] = {"columns": shape[0], "mean": [3.0] * shape[0], "std": [2.0] * shape[0]}
    else:
        x = random.integers(0, 256, (n, *shape[1:], shape[0]), np.uint8)
        about = {"channels": shape[0], "size": list(shape[1:]), "mean": [0.5] * shape[0]}
        about["std"] = [0.25] * shape[0]
    y = np.arange(n) % 3
    arrays = {
        "x_labeled": x[:6],
        "y_labeled": y[:6],
        "x_unlabeled": x[6:20],
        "x_test": x[20:],
        "y_test": y[20:],
    }
    np.savez(folder / "data.npz", **arrays)
    about |= {"model": vars(cfg.model), "heads": cfg.select.heads, "classes": ["é", "b", "c"]}
    model = rebuild(about)
    scaled = torch.from_numpy(x[:64]).float() if len(shape) == 1 else torch.from_numpy(x[:64]) / 255
    samples = (scaled - scaled.mean()) / scaled.std()
    awake(model, samples if len(shape) == 1 else samples.permute(0, 3, 1, 2))
    (folder / "run").mkdir()
    save_model(folder / "run", model, about)
    (folder / "run" / "config.yaml").write_text(config_file.write(asdict(cfg)))
    (folder / "run" / "metrics.jsonl").write_text("{}\n")
    return folder / "run"


def images_of(run: Path) -> Tensor:
    return torch.from_numpy(np.load(run.parent / "data.npz")["x_test"]).permute(0, 3, 1, 2).contiguous()


def wanted(run: Path, samples: Tensor) -> Tensor:
    """As docs/data.md has it."""
    model = load_model(run)
    scaled = samples / 255 if samples.dtype == torch.uint8 else samples
    with torch.no_grad():
        return model((scaled - model.mean) / model.std).softmax(1)


def answers(path: Path, samples: Tensor) -> tuple[np.ndarray, dict[str, str]]:
    """Of the file alone, with its metadata."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (entry,), (end,) = session.get_inputs(), session.get_outputs()
    assert (entry.name, end.name) == ("samples", "probabilities")
    assert entry.shape == ["batch", *samples.shape[1:]] and end.shape[0] == "batch"
    (found,) = session.run(None, {"samples": samples.numpy()})
    return found, session.get_modelmeta().custom_metadata_map


def snippet() -> str:
    """The example of docs/data.md."""
    page = (ROOT / "docs/data.md").read_text().partition("## The network in other programs")[2]
    return re.findall(r"^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[0]


@pytest.mark.slow
def test_rows_become_probabilities(tmp_path: Path, capsys) -> None:
    pytest.importorskip("onnxscript")
    run = made(
        tmp_path / "a",
        shape=(COLUMNS,),
        data__name="features",
        model__name="mlp-5",
        recipe="features",
        select__heads=3,
        select__passes=6,
        select__kappa_p="inf",
    )
    out = tmp_path / "model.onnx"
    assert export.main([str(run), "--out", str(out)]) == 0
    assert "checked: on 256 samples the largest difference" in capsys.readouterr().out
    rows = torch.from_numpy(np.load(tmp_path / "a/data.npz")["x_test"])
    rows[0] = 1e30  # cut off in the file, too
    found, about = answers(out, rows)
    torch.testing.assert_close(torch.from_numpy(found), wanted(run, rows), rtol=0, atol=1e-6)
    assert found.std(0).min() > 0.01, "answers differ"
    assert json.loads(about["classes"]) == ["é", "b", "c"] and json.loads(about["size"]) == [COLUMNS]
    limits = json.loads(about["thresholds"])
    assert limits["kappa_p"] == "inf" and limits["tau_p"] == 0.7 and about["samples"].startswith("float32 [")
    assert str(ROOT).encode() not in out.read_bytes(), "no paths of this machine"


def test_pixels_become_probabilities(tmp_path: Path) -> None:
    run = made(tmp_path / "a", shape=(3, 8, 8), model__activation="leaky_relu")
    check = export.export(run, tmp_path / "model.pt2")
    assert check.samples == 256 and check.equal == 1.0 and check.largest < 1e-6 < TOLERANCE
    extra = {"classes": "", "size": "", "samples": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=extra)
    assert json.loads(extra["size"]) == [3, 8, 8] and extra["samples"].endswith("red, green, blue, 0 to 255")
    x = images_of(run)
    for some in (x, x[:1]):
        torch.testing.assert_close(program.module()(some), wanted(run, some), rtol=0, atol=1e-6)
    assert not program.example_inputs[0][0].any(), "no image of the user is in it"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest one."""
    place = tmp_path_factory.mktemp("place") / "a"
    return made(place, shape=(COLUMNS,), data__name="features", model__name="linear")


def test_what_the_user_can_mend(run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.onnx").write_bytes(b"mine")
    (tmp_path / "link.pt2").symlink_to("nowhere")
    np.save("narrow.npy", np.ones((2, 3), np.float32))
    np.save("nan.npy", np.full((2, COLUMNS), np.nan, np.float32))
    for words, said in (
        (["x.tflite"], "--out must end in .onnx or .pt2, got 'x.tflite'"),
        (["there.onnx"], "there.onnx is there already: choose another name, or delete it"),
        (["link.pt2"], "link.pt2 is there already"),
        (["no/x.pt2"], "--out no/x.pt2 cannot be written: there is no folder no"),
        (["x.pt2", "--best"], "it has no best.safetensors"),
        (["x.pt2", "narrow.npy"], "'narrow.npy' must have 7 columns as the run's features, got 3"),
        (["x.pt2", "nan.npy"], "none of 2 samples can be read, the first: nan.npy[0]: 7 values are NaN"),
        (["x.pt2", "gone.npy"], "'gone.npy' is no file or folder"),
    ):
        assert export.main([str(run), *words[1:], "--out", words[0]]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and said in error and error.count("\n") == 1
    assert export.main([str(tmp_path), "--out", "x.pt2"]) == 2
    assert "holds no trained network" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert export.main([str(run), "--out", "x.onnx"]) == 2
    assert "pip install onnxscript, or ups_fast[export]" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"link.pt2", "there.onnx", "narrow.npy", "nan.npy"}
    assert (tmp_path / "there.onnx").read_bytes() == b"mine"


def test_data_that_are_gone_or_changed(run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Then other rows serve."""
    data, before = run.parent / "data.npz", (run.parent / "data.npz").read_bytes()
    arrays = dict(np.load(data))
    out = str(tmp_path / "x.pt2")
    try:
        np.savez(data, **{name: x[:, :4] if x.ndim == 2 else x for name, x in arrays.items()})
        assert export.main([str(run), "--out", out]) == 2
        assert "has samples [4] now, and the network takes [7]" in capsys.readouterr().err
        data.unlink()
        assert export.main([str(run), "--out", out]) == 2
        error = capsys.readouterr().err
        assert "to check the file on, cannot be read" in error and "give images or rows after RUN" in error
        np.save(tmp_path / "one.npy", arrays["x_test"][:1])
        (run / "metrics.jsonl").write_text("")
        assert export.main([str(run), str(tmp_path / "one.npy"), "--out", out]) == 0
        said = capsys.readouterr().out
        assert "is not finished: its network has 0 of 1 rounds" in said and "checked: on 1 sample the" in said
    finally:
        data.write_bytes(before)
        (run / "metrics.jsonl").write_text("{}\n")


@pytest.mark.parametrize("off", [3e-4, float("nan")])
def test_a_file_with_other_answers_is_refused(run: Path, tmp_path: Path, monkeypatch, capsys, off) -> None:
    monkeypatch.setattr(export, "_pt2", lambda program, about: (b"", lambda x: program.module()(x) + off))
    assert export.main([str(run), "--out", str(tmp_path / "x.pt2")]) == 2
    said = capsys.readouterr().err
    assert "x.pt2 is not written" in said and ("3.0e-04" if off == off else "nan") in said
    assert not list(tmp_path.iterdir())


def test_nothing_that_came_meanwhile_is_overwritten(run: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "x.pt2"
    monkeypatch.setattr(export, "_compare", lambda *_: out.write_bytes(b"mine") and Check(1, 0.0, 1.0))
    with pytest.raises(ValueError, match="is there already"):
        export.export(run, out)
    assert out.read_bytes() == b"mine"


def test_an_op_of_our_own_is_found(run: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(export.Answer, "forward", lambda self, x: torch.ops.ups_fast.mish(x))
    with pytest.raises(ValueError, match=r"as \.pt2: it has the op ups_fast\.mish\.default, which"):
        export.export(run, tmp_path / "x.pt2")
    assert not list(tmp_path.iterdir())


# Slow ones ---------------------------------------------------------------------------------------------------


LITE = {"model__freeze": True, "model__input_size": 40, "model__head": "mlp-16", "model__dropout": 0.3}
LITE |= {"model__name": "lite0", "recipe": "features", "select__heads": 3, "select__passes": 6}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:weights")
@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ((1, 8, 8), {}),
        ((3, 13, 17), {"model__name": "cnn13"}),
        ((1, 9, 12), {"model__name": "shake-8-2x4d"}),
        ((3, 8, 8), {"model__name": "resnext-11-2x2d"}),
        ((1, 8, 8), {"select__heads": 2}),
        ((1, 20, 14), LITE),
        ((3, 32, 32), {"model__name": "torchvision:resnet18"}),
        ((1, 32, 32), {"model__name": "timm:vit_tiny_patch16_224"}),
    ],
)
def test_every_kind_of_network(tmp_path: Path, shape: tuple[int, ...], changes: dict[str, Any]) -> None:
    for package in ("onnxscript", "timm", "torchvision"):
        pytest.importorskip(package)
    run = made(tmp_path / "a", shape=shape, **changes)
    if not changes:
        assert any(isinstance(module, Mish) for module in load_model(run).modules()), "an op of our own"
    assert isinstance(load_model(run), Frozen) == ("model__freeze" in changes)
    x = images_of(run)[:40]
    want = wanted(run, x)
    assert want.std(0).max() > 1e-3, "answers differ"
    for kind in export.KINDS:
        export.export(run, tmp_path / f"model{kind}")
    found, _ = answers(tmp_path / "model.onnx", x)
    torch.testing.assert_close(torch.from_numpy(found), want, rtol=0, atol=1e-5)
    alone, _ = answers(tmp_path / "model.onnx", x[3:4])
    torch.testing.assert_close(torch.from_numpy(alone), want[3:4], rtol=0, atol=1e-5)
    program = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(program(x).detach(), want, rtol=0, atol=1e-5)
    if changes not in ({}, LITE):
        return
    torch.save(x, tmp_path / "x.pt")
    code = f"""
import sys; sys.modules["ups_fast"] = None
import torch
model = torch.export.load({str(tmp_path / "model.pt2")!r}).module()
torch.save(model(torch.load({str(tmp_path / "x.pt")!r})).detach(), {str(tmp_path / "p.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "p.pt"), want, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_from_digits_to_the_example_of_the_docs(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    words = ["train.rounds=1", "train.epochs=1", "run_dir=runs/digits", "report.baselines=false"]
    assert train.main([str(ROOT / "configs/digits.yaml"), *words]) == 0
    assert export.main(["runs/digits", "--out", "digits.onnx"]) == 0
    names: dict[str, Any] = {}
    exec(compile(snippet(), "data.md", "exec", dont_inherit=True), names)
    want = wanted(Path("runs/digits"), torch.from_numpy(names["images"]))
    assert names["labels"] == [names["classes"][i] for i in want.argmax(1)]
    torch.testing.assert_close(torch.from_numpy(names["probabilities"]), want, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_run_on_files_is_checked_on_its_test_files(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for part, n in (("labeled", 4), ("test", 3), ("unlabeled", 3)):
        for name, value in (("dark", 50), ("light", 200)):
            folder = tmp_path / "images" / part / (name if part != "unlabeled" else "")
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(n):
                pixels = value + np.random.default_rng(i).integers(-20, 20, (20, 16))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{name}{i}.png")
    words = ["data.root=images", "run_dir=run", "data.size=8", "data.channels=1", "model.name=wrn-10-1"]
    words += ["train.rounds=1", "train.epochs=1", "train.batch_size=8", "threads=1", "report.baselines=false"]
    assert train.main([str(ROOT / "configs/folder.yaml"), *words]) == 0
    (tmp_path / "images/test/dark/dark0.png").unlink()
    assert export.main(["run", "--out", "model.pt2"]) == 0
    assert "checked: on 5 samples" in capsys.readouterr().out
    assert export.main(["run", "images/unlabeled", "--out", "model.onnx"]) == 0
    assert "checked: on 6 samples" in capsys.readouterr().out
    np.save("rows.npy", np.ones((2, 3), np.float32))
    assert export.main(["run", "rows.npy", "--out", "other.pt2"]) == 2
    assert "'rows.npy' must be an image" in capsys.readouterr().err
