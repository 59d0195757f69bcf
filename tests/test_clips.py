"""Clips: arrays of five dimensions and video files, what a network gets of them, and a whole run on some."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch._subclasses.fake_tensor import FakeTensorMode

from ups_fast import config, export, inputs, label_studio, predict, train
from ups_fast.data import ResidentClips, ResidentImages, View, load_set
from ups_fast.data.clips import clean_clip, framed, middle
from ups_fast.data.image import DamagedImage
from ups_fast.data.images import Draws, memory_format
from ups_fast.data.moving_digits import MOTIONS
from ups_fast.data.ucf101 import ucf101
from ups_fast.data.video import Clip, read_clip
from ups_fast.models import build
from ups_fast.models.saved import load_model
from ups_fast.policy import POLICIES, Policy, randaugment
from ups_fast.reference import dropout_keys
from ups_fast.report.thumbnails import thumbnail

CONFIGS = Path(__file__).parents[1] / "configs"
STRONG = Policy(ops=randaugment(9), n_ops=2, flip=True, crop=3, jitter=(0.4, 0.4, 0.4), cutout=6)
SCALE: dict[str, Any] = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "device": "cpu"}


def some_clips(n: int = 5, held: int = 9, channels: int = 3) -> torch.Tensor:
    shape = n, held, 12, 16, channels
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(n))


def batch_of(
    images: Any, index: torch.Tensor, draw: torch.Tensor, policy: Policy, number: int = 0
) -> torch.Tensor:
    out = torch.zeros(len(index), *images.shape)
    out = out.to(memory_format=memory_format(out.ndim))
    images.read(index, draw, (View(0, len(index), policy, 0, number),), seed=torch.tensor(11), out=out)
    return out


# Batches ----------------------------------------------------------------------------------------------------


def test_no_host_synchronization():
    """Fake tensors have no values: whatever asks for one raises."""
    clips = ResidentClips(some_clips(), frames=4, policy=Policy(flip=True, crop=2), **SCALE)
    with FakeTensorMode(allow_non_fake_inputs=True):
        index = torch.zeros(5, dtype=torch.int64)
        assert (
            batch_of(clips, index, index, clips.policy).shape == clips.clean(index).shape == (5, 3, 4, 12, 16)
        )
        drawn = list(clips.drawn_batches(index, 3, Draws(2, clips.policy, 0)))
        assert [len(each) for each in drawn] == [6, 4]


@pytest.mark.parametrize("channels", [1, 3])
def test_all_frames_get_the_draws_of_one_image(channels):
    """Each frame is, bit by bit, what the image of the same id would be."""
    clips = some_clips(channels=channels)
    scale = SCALE if channels == 3 else {**SCALE, "mean": [0.4], "std": [0.2]}
    index, draw = torch.tensor([4, 0, 4, 2]), torch.tensor([0, 7, 1, 0])
    batch = batch_of(ResidentClips(clips, frames=9, **scale), index, draw, STRONG)
    assert batch.shape == (4, channels, 9, 12, 16) and batch.is_contiguous(
        memory_format=torch.channels_last_3d
    )
    for t in range(9):
        image = batch_of(ResidentImages(clips[:, t], **scale), index, draw, STRONG)
        assert torch.equal(batch[:, :, t], image)


def test_where_a_clip_starts_depends_on_its_id_and_draw_alone():
    frame = torch.arange(9, dtype=torch.uint8)[None, :, None, None, None]
    clips = frame.expand(50, 9, 8, 8, 1).contiguous()  # a frame's pixels say which it is
    images = ResidentClips(clips, frames=3, stride=2, mean=[0.0], std=[1 / 255], device="cpu")
    index, draw = torch.arange(50), torch.arange(50) % 3
    batch = batch_of(images, index, draw, POLICIES["none"])[:, 0, :, 0, 0]
    assert set(batch[:, 0].tolist()) == {0.0, 1.0, 2.0, 3.0, 4.0}
    assert torch.allclose(batch - batch[:, :1], torch.tensor([0.0, 2.0, 4.0]))
    order = torch.randperm(50)
    assert torch.equal(
        batch_of(images, index[order], draw[order], POLICIES["none"])[:, 0, :, 0, 0], batch[order]
    )
    assert not torch.equal(batch_of(images, index, draw, POLICIES["none"], 1)[:, 0, :, 0, 0], batch)
    assert images.clean(torch.tensor([7]))[0, 0, :, 0, 0].round().tolist() == [2, 4, 6]


def test_short_clips_repeat_their_last_frame_and_no_start_lies_behind_them():
    clips = torch.arange(6, dtype=torch.uint8)[None, :, None, None, None].repeat(3, 1, 8, 8, 1)
    lengths = torch.tensor([6, 4, 1])
    for row, n in enumerate(lengths.tolist()):
        clips[row, n:] = clips[row, n - 1]
    images = ResidentClips(clips, frames=4, lengths=lengths, mean=[0.0], std=[1 / 255], device="cpu")
    clean = images.clean(torch.arange(3))[:, 0, :, 0, 0].round().tolist()
    assert clean == [[1, 2, 3, 4], [0, 1, 2, 3], [0, 0, 0, 0]]
    index = torch.tensor([1]).repeat(40)
    assert (batch_of(images, index, torch.arange(40), POLICIES["none"])[:, 0, 0] == 0).all()
    assert middle(torch.arange(3).view(3, 1, 1, 1), 4).flatten().tolist() == [0, 1, 2, 2]


@pytest.mark.parametrize(("frames", "stride"), [(0, 1), (4, 0), (10, 1), (4, 3)])
def test_frames_that_do_not_fit_are_refused(frames, stride):
    with pytest.raises(ValueError, match=f"got {frames} and {stride}"):
        ResidentClips(some_clips(), frames=frames, stride=stride, **SCALE)


# Arrays -----------------------------------------------------------------------------------------------------


def npz(path: Path, **changes: Any) -> Path:
    """Two classes: a bar that goes down, one that goes up."""
    bars = np.eye(10, dtype=np.uint8)[:, :, None] * 200 + np.zeros((1, 1, 10), np.uint8)
    rng = np.random.RandomState(0)

    def clips(n: int) -> tuple[np.ndarray, np.ndarray]:
        y = np.arange(n) % 2
        order = [np.roll(bars, rng.randint(10), 0)[:: 1 if each else -1][:6] for each in y]
        noise = rng.randint(0, 40, (n, 6, 10, 10))
        return (np.stack(order) + noise).astype(np.uint8)[..., None], y

    (a, y), (b, z), (c, w) = clips(8), clips(20), clips(10)
    arrays = {"x_labeled": a, "y_labeled": y, "x_unlabeled": b, "y_unlabeled": z, "x_test": c, "y_test": w}
    np.savez(path, **{**arrays, **{name: change(arrays[name]) for name, change in changes.items()}})
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x[:, :1], "x_labeled must be clips of at least two frames, got uint8 [8, 1, 10, 10, 1]"),
        (lambda x: np.repeat(x, 3, 4).transpose(0, 4, 1, 2, 3), "x_labeled.transpose(0, 2, 3, 4, 1)"),
        (lambda x: np.repeat(x, 3, 4).transpose(0, 1, 4, 2, 3), "x_labeled.transpose(0, 1, 3, 4, 2)"),
        (
            lambda x: x.astype(np.float32),
            "must be uint8 clips [N, T, H, W, 1] or [N, T, H, W, 3], got float32",
        ),
        (lambda x: x[:, :4], "all images must have one size and number of channels"),
        (lambda x: x[:0], "x_labeled must not be empty"),
    ],
)
def test_arrays_that_are_no_clips_are_refused(tmp_path, change, said):
    with pytest.raises(ValueError) as error:
        load_set("npz", str(npz(tmp_path / "a.npz", x_labeled=change)))
    assert said in str(error.value)


def test_what_a_network_gets_of_arrays(tmp_path):
    data = load_set("npz", str(npz(tmp_path / "a.npz", x_test=lambda x: np.repeat(x[:, :1], 6, 1))))
    assert data.shape == (1, 6, 10, 10) and data.noun == "clip"
    cut = framed(data, 2, 3)
    assert cut.shape == (1, 2, 10, 10)
    assert torch.equal(clean_clip(cut, 3), data.train_images[3, [1, 4]])
    assert cut.notes[-1] == "10 clips do not move: all their frames are equal, such as test clip 0"
    for frames, stride, said in (
        (4, 2, "data.frames=4 with data.stride=2 needs clips of 7 frames, and they have 6"),
        (0, 6, "data.stride=6 leaves a single frame of clips of 6: lower it"),
    ):
        with pytest.raises(ValueError, match=said):
            framed(data, frames, stride)
    with pytest.raises(ValueError, match=r"are for clips, and data.name=digits has images: set 0 and 1"):
        framed(load_set("digits", ""), 8, 1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["data.name=cifar10", "data.n_labels=100", "data.frames=8"],
            "data.frames and data.stride are for clips",
        ),
        (["data.frames=1"], "data.frames must be at least 2, or 0"),
        (["data.name=folder", "data.size=16", "data.stride=2"], "say how many frames by data.frames, got 0"),
        (
            ["data.name=folder", "data.size=16", "data.frames=4", "data.loader=plain"],
            "and clips live in memory",
        ),
        (["data.name=ucf101", "data.n_labels=101", "data.size=16"], "data.frames must say how many frames"),
    ],
)
def test_keys_that_do_not_go_together(words, said):
    with pytest.raises(ValueError) as error:
        config.load(CONFIGS / "npz.yaml", words)
    assert said in str(error.value)


def test_a_single_frame_of_the_moving_digits_tells_nothing():
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    data = load_set("moving_digits", "")
    assert data.shape == (1, 8, 16, 16) and data.classes == list(MOTIONS) and len(data.train_labels) == 1437
    assert data.train_labels.bincount().tolist() == [180] * 5 + [179] * 3
    x, z = (images[:, 3].flatten(1).float() / 255 for images in (data.train_images, data.test_images))
    for model in (LogisticRegression(C=0.01, max_iter=30), KNeighborsClassifier(5)):
        right = model.fit(x.numpy(), data.train_labels.numpy()).predict(z.numpy()) == data.test_labels.numpy()
        assert right.mean() < 1 / 8 + 4 * (1 / 8 * 7 / 8 / 360) ** 0.5
    again = load_set("moving_digits", "")
    assert torch.equal(again.train_images, data.train_images)


# Networks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dropouts"), [("conv2plus1d-2", 3), pytest.param("mc3_18", 1, marks=pytest.mark.slow)]
)
def test_dropout_of_clips_goes_by_keys(name, dropouts):
    model = build(name, n_classes=3, channels=1, size=16, frames=4, dropout=0.5).eval()
    assert model.n_dropouts == dropouts
    x = torch.randn(2, 1, 4, 16, 16).to(memory_format=torch.channels_last_3d)
    keys = dropout_keys(torch.tensor([3, 5]), seed=0, draw=0)
    with torch.no_grad():
        one, two = model(x, keys), model(x.contiguous(), keys)
        assert torch.allclose(one, two, atol=1e-4) and not torch.allclose(one, model(x), atol=1e-4)
        assert torch.allclose(model(x[:1], keys[:1]), one[:1], atol=1e-4)
        assert model.passes(model.prefix(x), keys.repeat(3), 3).shape == (3, 2, 3)


def test_names_of_networks_for_clips():
    for name, frames, said in (
        ("wrn-10-1", 4, "name must be conv2plus1d-WIDTH or video:NAME, got 'wrn-10-1' for clips"),
        ("r3d_18", 0, "name must be another: this one is for clips, got 'video:r3d_18' for images"),
        ("conv2plus1d-4", 1, "frames must be at least 2"),
        ("conv2plus1d-0", 4, "the width of conv2plus1d must be in 1..512, got 0"),
        ("video:r3d_19", 4, "there is no network 'video:r3d_19' (did you mean video:r3d_18"),
        ("video:resnet18", 4, "video:resnet18 is not a classifier of clips but of torchvision.models.resnet"),
    ):
        with pytest.raises(ValueError) as error:
            build(name, n_classes=3, channels=3, size=16, frames=frames, dropout=0.1)
        assert said in str(error.value)


@pytest.mark.slow
def test_video_networks_take_weights_of_a_file(tmp_path):
    from torchvision.models.video import r2plus1d_18

    torch.manual_seed(0)
    theirs = r2plus1d_18().eval()
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    shape: dict[str, Any] = {"n_classes": 400, "size": 32, "frames": 4, "dropout": 0.0}
    ours = build("r2plus1d_18", channels=3, weights=str(tmp_path / "w.pth"), **shape).eval()
    x = torch.randn(2, 3, 4, 32, 32)
    with torch.no_grad():
        assert torch.allclose(ours(x), theirs(x), atol=1e-4)
        gray = build("video:r2plus1d_18", channels=1, weights=str(tmp_path / "w.pth"), **shape).eval()
        assert torch.allclose(gray(x[:, :1]), theirs(x[:, :1].expand(-1, 3, -1, -1, -1)), atol=1e-3)


# Video files ------------------------------------------------------------------------------------------------


def film(
    path: Path, frames: int = 12, *, codec: str = "mpeg4", side: int = 32, way: int = 1, **options: str
) -> Path:
    """A bright column on the left, which goes right, or left with way = -1: frame t is known by its place."""
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = side, side, "rgb8" if codec == "gif" else "yuv420p"
        for t in range(frames):
            picture = np.zeros((side, side, 3), np.uint8)
            picture[:, (2 * way * t) % side :][:, :2] = 255
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=stream.pix_fmt)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def sound(path: Path) -> Path:
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="flt", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


CODECS = {"a.mp4": "libx264", "a.avi": "mpeg4", "a.webm": "libvpx", "a.gif": "gif"}


@pytest.mark.parametrize(("name", "codec"), CODECS.items())
def test_the_middle_of_a_file_is_read(tmp_path, name, codec):
    path = film(tmp_path / name, codec=codec)
    places = [int(frame[..., 0].mean(0).argmax()) // 2 for frame in read_clip(path, Clip(4, 2, 32, 1))]
    assert places == [2, 4, 6, 8]  # of 0, 2, .. 10
    assert read_clip(path, Clip(20, 1, 16, 3)).shape == (12, 16, 16, 3)


def test_a_file_that_counts_frames_that_were_never_taken_is_whole(tmp_path):
    """An .avi has a place for each tick of its clock, and a camera that was late leaves some empty."""
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "late.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=1000)
        stream.width = stream.height = 32
        for t in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 10 * t, np.uint8), format="rgb24")
            frame.pts = 40 * t
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert len(read_clip(tmp_path / "late.avi", Clip(40, 1, 16, 3))) == 20
    content = (tmp_path / "late.avi").read_bytes()
    (tmp_path / "cut.avi").write_bytes(content[: len(content) // 3])
    with pytest.raises(DamagedImage, match=r"ends early|cannot be decoded"):
        read_clip(tmp_path / "cut.avi", Clip(40, 1, 16, 3))


def test_files_that_are_no_clips_are_refused_with_one_sentence(tmp_path):
    whole = film(tmp_path / "a.mp4", codec="libx264", movflags="faststart").read_bytes()
    files = {
        "cut.mp4": (whole[: len(whole) - 200], "ends early: it has"),
        "headless.mp4": (film(tmp_path / "b.mp4").read_bytes()[:-300], "cannot be decoded"),
        "cut.gif": (film(tmp_path / "a.gif", codec="gif").read_bytes()[:-60], "ends early"),
        "cut.webm": (film(tmp_path / "a.webm", 40, codec="libvpx").read_bytes()[:-900], "ends early: it has"),
        "sound.mp4": (sound(tmp_path / "s.mp4").read_bytes(), "has no video, only sound"),
        "empty.mp4": (b"", "is empty"),
        "text.mp4": (b"hello" * 100, "cannot be decoded"),
        "list.mp4": (f"#EXTM3U\n#EXTINF:1,\nfile://{tmp_path}/a.mp4\n#EXT-X-ENDLIST\n".encode(), "cannot be decoded"),
    }  # fmt: skip
    for name, (content, said) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DamagedImage) as error:
            read_clip(tmp_path / name, Clip(4, 1, 16, 3))
        assert said in str(error.value) and name in str(error.value), name
    with pytest.raises(DamagedImage, match="cannot be opened"):
        read_clip(tmp_path / "gone.mp4", Clip(4, 1, 16, 3))
    with pytest.raises(DamagedImage, match="is not a file"):
        read_clip(tmp_path, Clip(4, 1, 16, 3))


def test_a_clip_plays_in_the_report():
    import base64
    import io

    from PIL import Image

    found = thumbnail(some_clips()[0].numpy())
    picture = Image.open(io.BytesIO(base64.b64decode(found.source.partition(",")[2])))
    assert (picture.format, picture.n_frames, found.width, found.height) == ("WEBP", 8, 80, 60)  # type: ignore[attr-defined]


def test_ucf101_is_read_by_its_lists(tmp_path, monkeypatch):
    lists = tmp_path / "ucfTrainTestlist"
    with pytest.raises(ValueError, match="lacks the folder UCF-101"):
        ucf101(tmp_path)
    names = [f"{way}/v_{way}_g0{i}_c01.avi" for way in ("Left", "Right") for i in range(3)]
    for name in names:
        film(tmp_path / "UCF-101" / name, 5)
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 Left\r\n2 Right\r\n")
    train_list = "".join(f"{name} 1\r\n" for name in names if "g00" not in name)
    (lists / "trainlist01.txt").write_text(train_list)
    (lists / "testlist01.txt").write_text("".join(f"{name}\n" for name in names if "g00" in name))
    (tmp_path / "UCF-101" / names[1]).write_bytes(b"damaged")
    words = ["data.name=ucf101", f"data.root={tmp_path}", "data.size=8", "data.frames=2", "data.n_labels=2"]
    cfg = config.load(CONFIGS / "clips.yaml", [*words, f"run_dir={tmp_path.parent / 'run'}"])
    with monkeypatch.context() as small:
        small.setattr(inputs, "memory", lambda device: 1000)
        with pytest.raises(
            ValueError, match=r"clips must be in memory, but they would take .*loader=resident"
        ):
            inputs.load_data(cfg, torch.device("cpu"), Console(quiet=True))
    data = inputs.load_data(cfg, torch.device("cpu"), Console(quiet=True))
    assert (data.name, data.shape, data.manifest) == ("ucf101", (3, 2, 8, 8), None)
    assert (
        data.train_labels.tolist() == [0, 1, 1]
        and data.test_labels.tolist() == [0, 1]
        and data.labeled is None
    )
    assert data.lengths is not None and data.lengths.tolist() == [5, 5, 5] and len(data.damaged) == 1
    (lists / "trainlist01.txt").write_text(train_list + "Up/v_Up_g01_c01.avi 3\n")
    with pytest.raises(ValueError, match=r"is of no class of classInd.txt"):
        ucf101(tmp_path)


# Whole runs -------------------------------------------------------------------------------------------------

QUICK = [
    "model.name=conv2plus1d-2", "data.ops=", "data.crop=1", "data.flip=false", "train.epochs=1", "train.rounds=2",
    "train.round0_epochs=2", "train.batch_size=8", "select.passes=2", "threads=1", "runtime.precision=float32",
    "report.baselines=false", "report.review=false",
]  # fmt: skip


@pytest.mark.slow
def test_a_run_on_arrays(tmp_path, capsys):
    words = [f"data.root={npz(tmp_path / 'a.npz')}", f"run_dir={tmp_path / 'run'}", "data.frames=4", *QUICK]
    assert train.main([str(CONFIGS / "npz.yaml"), *words]) == 0
    model = load_model(tmp_path / "run")
    assert (model.frames, model.size, model.mean.shape) == (4, [10, 10], (1, 1, 1, 1))
    assert model((torch.zeros(1, 1, 4, 10, 10) - model.mean) / model.std).shape == (1, 2)
    check = export.export(tmp_path / "run", tmp_path / "run.pt2")
    assert check.samples == 10 and check.equal == 1
    assert train.main([str(CONFIGS / "npz.yaml"), *words, "data.frames=3"]) == 2
    assert "data.frames" in capsys.readouterr().err
    tasks = ["tasks", str(tmp_path / "run"), "--out", str(tmp_path / "t.json")]
    assert label_studio.main(tasks) == 2 and "of which no tasks are made" in capsys.readouterr().err


def test_a_run_on_video_files(tmp_path, capsys):
    root = tmp_path / "films"
    for part, n in (("labeled", 3), ("test", 2), ("unlabeled", 4)):
        for way, name in ((1, "right"), (-1, "left")):
            for i in range(n):
                place = f"{part}/{name}" if part != "unlabeled" else part
                film(root / place / f"{name}{i}.avi", 8 + i, way=way)
    (root / "unlabeled/broken.mp4").write_bytes(b"broken")
    words = [f"data.root={root}", f"run_dir={tmp_path / 'run'}", "data.size=8", "data.frames=4", *QUICK]
    words += ["train.batch_size=4", "data.channels=1"]
    assert train.main([str(CONFIGS / "folder.yaml"), *words]) == 0
    first = capsys.readouterr()
    assert "1 damaged file left out" in first.out + first.err
    shutil.copy(root / "unlabeled/left0.avi", root / "unlabeled/new.avi")
    assert train.main([str(CONFIGS / "folder.yaml"), *words, "train.rounds=3"]) == 0
    assert (
        predict.main([str(tmp_path / "run"), str(root / "unlabeled"), "--out", str(tmp_path / "l.csv")]) == 0
    )
    lines = (tmp_path / "l.csv").read_text().splitlines()
    assert len(lines) == 11 and sum("cannot be decoded" in line for line in lines) == 1
    assert predict.main([str(tmp_path / "run"), str(tmp_path / "run")]) == 2
    assert "holds no clips" in capsys.readouterr().err
