"""Images streamed from files: DALI's batches against Pillow's and against images in memory, and all that goes wrong."""

from __future__ import annotations

import gc
import io
import itertools
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ups_fast.data import PlainImages, ResidentImages, file_images, read_image, resize_crop
from ups_fast.data.boxes import RATIO, TRIES, box_draws, middle_box, random_box
from ups_fast.data.dali import DaliImages, Header, _File, header_for_dali
from ups_fast.data.image import DamagedImage
from ups_fast.policy import POLICIES, Policy

try:
    import nvidia.dali  # noqa: F401

    DALI = True
except ImportError:
    DALI = False
needs_dali = pytest.mark.skipif(
    not DALI, reason="nvidia-dali is not installed: its loader is not proved here"
)
LOADERS = [pytest.param(DaliImages, marks=needs_dali, id="dali"), pytest.param(PlainImages, id="plain")]
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
EXIF = 0x112


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:  # [H, W, 3] uint8
    """Smooth colors with edges: what codecs and filters are made for."""
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    pixels = np.array(small.resize((width, height), Image.Resampling.BICUBIC))
    pixels[height // 3 : height // 2, width // 4 : width // 2] = random.integers(0, 256, 3)
    return pixels


def encode(image: np.ndarray | Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(file, kind, **options)
    return file.getvalue()


def put(root: Path, files: dict[str, bytes]) -> list[str]:
    for name, content in files.items():
        (root / name).write_bytes(content)
    return list(files)


def loader(kind, root, paths, size=16, channels=3, **settings):
    settings = {"mean": MEAN[:channels], "std": STD[:channels], "device": "cpu", "threads": 2} | settings
    return kind(root, paths, size=size, channels=channels, **settings)


def pixels_of(batch: Tensor) -> Tensor:  # [B, C, S, S] float32 -> [B, S, S, C] uint8
    c = batch.shape[1]
    scale, shift = (torch.tensor(x[:c]).view(1, c, 1, 1) for x in (STD, MEAN))
    return ((batch * scale + shift) * 255).round().byte().permute(0, 2, 3, 1)


def clean(images, index=None) -> Tensor:
    index = torch.arange(len(images)) if index is None else index
    return torch.cat(list(images.clean_batches(index, 4)))


def difference(a: Tensor | np.ndarray, b: Tensor | np.ndarray) -> int:
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max())


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory) -> tuple[Path, list[str]]:
    root = tmp_path_factory.mktemp("jpegs")
    sizes = [(40, 60), (64, 33), (50, 50), (16, 16), (9, 12), (200, 150), (31, 97), (17, 16)] * 2
    return root, put(root, {f"{i}.jpg": encode(photo(*hw, i), "JPEG") for i, hw in enumerate(sizes)})


# --- against images in memory ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("policy", ["published", "weak", "none"])
def test_png_of_the_size_is_what_images_in_memory_are(tmp_path, kind, channels, policy):
    """Bit for bit, training and clean, with no crop: color and gray files."""
    images = [photo(16, 16, i) for i in range(11)]
    files = {f"{i}.png": encode(image, "PNG") for i, image in enumerate(images)}
    files |= {
        "gray.png": encode(images[0][..., 0], "PNG"),
        "1.png": encode(Image.new("1", (16, 16), 1), "PNG"),
    }
    paths = put(tmp_path, files)
    held = torch.stack([torch.from_numpy(read_image(tmp_path / path, channels)) for path in paths])
    rule = {"mean": MEAN[:channels], "std": STD[:channels], "device": "cpu", "policy": POLICIES[policy]}
    resident = ResidentImages(held, **rule)
    files_of = loader(kind, tmp_path, paths, channels=channels, policy=POLICIES[policy])
    arrays = loader(kind, None, (), channels=channels, policy=POLICIES[policy], images=held)
    plan, draw = torch.randint(len(paths), (3, 8)), torch.randint(50, (3, 8))
    expected = [resident.augmented(ids, seed=7, epoch=d) for ids, d in zip(plan, draw, strict=True)]
    for images_of in (files_of, arrays):
        assert len(images_of) == len(paths)
        got = list(images_of.training(zip(plan, draw, strict=True), seed=7))
        assert len(got) == 3 and all(map(torch.equal, got, expected)), "files equal images in memory"
        assert all(b.is_contiguous(memory_format=torch.channels_last) for b in got if channels > 1)
        assert torch.equal(clean(images_of), resident.clean(torch.arange(len(paths))))
        assert images_of.unreadable == {}


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("channels", [1, 3])
def test_jpegs_against_read_image_and_resize_crop(jpegs, kind, channels):
    """DALI's pixels are Pillow's, its box is the same; torch's filter rounds otherwise, once in each of two passes.

    Each is within 1/2 + 1/2 of the exact value (the second pass averages what the first one rounded): they differ by
    2 at most. Gray takes the luma after the filter in place of before: 1/2 + 1/2 more.
    """
    root, paths = jpegs
    expected = np.stack([resize_crop(read_image(root / path, channels), 16) for path in paths])
    found = pixels_of(clean(loader(kind, root, paths, channels=channels)))
    bound = 0 if kind is PlainImages else 2 if channels == 3 else 3
    assert difference(found, expected) <= bound
    assert difference(found[3], expected[3]) <= (channels == 1), "nothing to scale: Pillow's own pixels"


@needs_dali
@pytest.mark.parametrize("quality", [30, 90])
@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 2}, {"progressive": True}], ids=str)
def test_a_box_of_a_jpeg_is_decoded_as_pillow_does(tmp_path, quality, options):
    """Bound 0, at the edges of the box too: S = the box, so that nothing is scaled."""
    image = photo(90, 120)
    paths = put(tmp_path, {"a.jpg": encode(image, "JPEG", quality=quality, **options)})
    whole = read_image(tmp_path / "a.jpg", 3)
    images = loader(DaliImages, tmp_path, paths, size=33)
    for box in ((0, 0, 33, 33), (5, 7, 33, 33), (57, 87, 33, 33), (16, 16, 33, 33)):
        images._middle = lambda *_, box=box: box
        cut = whole[box[0] : box[0] + 33, box[1] : box[1] + 33]
        assert np.array_equal(pixels_of(clean(images))[0], cut)


@needs_dali
@pytest.mark.parametrize(("height", "width"), [(60, 60), (100, 70), (31, 90), (400, 300), (20, 20)])
def test_dali_s_own_resize(tmp_path, height, width):
    """Its rounding once against Pillow's twice: within 1, but for the outermost pixels, where it repeats the border.

    A triangle of half-width s around s / 2 has 1/8 of its weight outside, so there 255 / 8 more for each of both axes.
    On a GPU this resize is the one that scales; it is held here on a CPU.
    """
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    paths = put(tmp_path, {"a.png": encode(noise, "PNG")})
    images = loader(DaliImages, tmp_path, paths, size=32)
    place, file = torch.zeros(1, 32, 32, 3, dtype=torch.uint8), (tmp_path / "a.png").read_bytes()
    images._idle = [images._pipeline(1, scaled=True)]
    images._decode(place, [_File(0, file, Header(height, width, 1), (0, 0, height, width))])
    got = place[0].numpy()
    expected = np.array(Image.fromarray(noise).resize((32, 32), Image.Resampling.BILINEAR))
    assert difference(got[1:-1, 1:-1], expected[1:-1, 1:-1]) <= 1
    assert difference(got, expected) <= 1 + 2 * 255 / 8


def oriented(orientation: int) -> dict[str, object]:
    exif = Image.Exif()
    exif[EXIF] = orientation
    return {"exif": exif}


def odd_files() -> dict[str, tuple[bytes, bool]]:
    """Files of every kind, and whether DALI is to decode them."""
    rgb = Image.fromarray(photo(30, 44))
    gray, clear = rgb.convert("L"), rgb.convert("RGBA")
    clear.putalpha(gray)
    wide = Image.fromarray(np.asarray(gray).astype(np.uint16) * 201 + 99)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
    found = {f"exif{i}.jpg": (encode(rgb, "JPEG", **oriented(i)), True) for i in range(1, 9)}
    found |= {
        "exif77.jpg": (encode(rgb, "JPEG", **oriented(77)), True),
        "xmp.jpg": (encode(rgb, "JPEG", xmp=xmp), True),
        "broken_exif.jpg": (encode(rgb, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), True),
        "no_exif.jpg": (encode(rgb, "JPEG", exif=b"Exif\0\0hello world"), True),
        "gray.jpg": (encode(gray, "JPEG"), True),
        "cmyk.jpg": (encode(rgb.convert("CMYK"), "JPEG"), False),
        "progressive.jpg": (encode(rgb, "JPEG", progressive=True), True),
        "rgb.jpg": (encode(rgb, "JPEG", keep_rgb=True), True),
        "two.jpg": (encode(rgb, "MPO", save_all=True, append_images=[gray.convert("RGB")]), True),
        "a.png": (encode(rgb, "PNG"), True),
        "gray.png": (encode(gray, "PNG"), True),
        "palette.png": (encode(rgb.quantize(40), "PNG"), True),
        "bit.png": (encode(gray.convert("1"), "PNG"), True),
        "alpha.png": (encode(clear, "PNG"), False),
        "gray_alpha.png": (encode(clear.convert("LA"), "PNG"), False),
        "hole.png": (encode(rgb, "PNG", transparency=(1, 2, 3)), False),
        "palette_hole.png": (encode(rgb.quantize(40), "PNG", transparency=0), False),
        "wide.png": (encode(wide, "PNG"), False),
        "turned.png": (encode(rgb, "PNG", **oriented(6)), False),
        "a.webp": (encode(rgb, "WEBP"), True),
        "lossless.webp": (encode(rgb, "WEBP", lossless=True), True),
        "alpha.webp": (encode(clear, "WEBP"), False),
        "turned.webp": (encode(rgb, "WEBP", **oriented(5)), True),
        "a.bmp": (encode(rgb, "BMP"), False),
        "a.tif": (encode(rgb, "TIFF"), False),
        "a.gif": (encode(rgb, "GIF"), False),
        "dot.png": (encode(photo(1, 1), "PNG"), True),
        "dot.jpg": (encode(photo(1, 1), "JPEG"), True),
        "long.jpg": (encode(photo(1, 3000), "JPEG"), True),
        "high.png": (encode(photo(2000, 2), "PNG"), True),
    }  # fmt: skip
    return found


@needs_dali
@pytest.mark.parametrize("channels", [1, 3])
def test_files_of_every_kind_are_read_alike(tmp_path, channels):
    files = odd_files()
    paths = put(tmp_path, {name: content for name, (content, _) in files.items()})
    for name, (content, fit) in files.items():
        header = header_for_dali(content, name)
        assert (header is not None) == fit, name
        assert header is None or header[:2] == read_image(tmp_path / name, 3).shape[:2], name
    dali, plain = (loader(kind, tmp_path, paths, channels=channels) for kind in (DaliImages, PlainImages))
    for path, got, expected in zip(paths, pixels_of(clean(dali)), pixels_of(clean(plain)), strict=True):
        bound = (2 if channels == 3 else 3) if files[path][1] else 0
        assert difference(got, expected) <= bound, path
        assert difference(expected, resize_crop(read_image(tmp_path / path, channels), 16)) == 0
    assert dali.unreadable == plain.unreadable == {} and (dali._known[:, 0] > 0).tolist() == [
        fit for _, fit in files.values()
    ]


def exif_with(
    order: str, orientation: int, entries: list[tuple[int, int, int, bytes]], magic: int = 42
) -> bytes:
    """EXIF data with an orientation after these entries, written by hand: in ways that people's software has."""
    words = [*entries, (0x112, 3, 1, struct.pack(f"{order}HH", orientation, 0))]
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", magic, 8, len(words))
    body = b"".join(struct.pack(f"{order}HHI", *word[:3]) + word[3] for word in words)
    return b"Exif\0\0" + head + body + bytes(4)


@needs_dali
@pytest.mark.parametrize("size", [30, 16])
def test_the_orientation_is_pillow_s_in_files_that_readers_disagree_about(tmp_path, size):
    """With boxes, so that one turned otherwise is another part of the image. 30: nothing is scaled."""
    image, files = photo(30, 44), {}
    image[:3, :3] = 255, 0, 0
    for order, orientation in itertools.product("<>", range(1, 9)):
        beyond = [(0x10F, 2, 99, struct.pack(f"{order}I", 5000))]  # its text lies behind the end
        long = struct.pack(f"{order}HHI", 0x112, 4, 1) + struct.pack(f"{order}I", orientation)
        head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, 1)
        kinds = {
            "plain": exif_with(order, orientation, []),
            "beyond": exif_with(order, orientation, beyond),
            "magic": exif_with(order, orientation, [], magic=43),
            "long": b"Exif\0\0" + head + long + bytes(4),
            "twice": b"Exif\0\0" + exif_with(order, orientation, []),
        }
        for kind, exif in kinds.items():
            for suffix, form in (("jpg", "JPEG"), ("webp", "WEBP")):
                name = f"{kind}{'le' if order == '<' else 'be'}{orientation}.{suffix}"
                files[name] = encode(image, form, exif=exif)
    content = encode(image, "JPEG", **oriented(6))
    segment = encode(image, "JPEG", **oriented(1))[2:]
    files["two.jpg"] = content[:2] + segment[: 2 + int.from_bytes(segment[2:4], "big")] + content[2:]
    paths = put(tmp_path, files)
    settings = {"size": size, "resized_crop": (0.3, 0.9) if size == 16 else None}
    dali, plain = (loader(kind, tmp_path, paths, **settings) for kind in (DaliImages, PlainImages))
    index = torch.arange(len(paths))
    got, want = (torch.cat([*each.training([(index, index)], seed=0)]) for each in (dali, plain))
    for path, a, b in zip(paths, pixels_of(got), pixels_of(want), strict=True):
        assert difference(a, b) <= (0 if size == 30 else 2), path
    assert dali._known[:, 0].all() and set(dali._known[:, 2].tolist()) == set(range(1, 9))


@pytest.mark.parametrize("kind", LOADERS)
def test_a_file_may_become_another_of_the_same_length(tmp_path, kind):
    large, small = (encode(photo(side, side), "JPEG") for side in (200, 40))
    turned = large[:2] + encode(photo(9, 9), "JPEG", **oriented(6))[2:38] + large[2:]
    paths = put(tmp_path, {"a.jpg": large + bytes(400)})
    images = loader(kind, tmp_path, paths, resized_crop=(0.9, 1.0))
    for content in (large, small, turned, large[:1000], b"", large):
        (tmp_path / "a.jpg").write_bytes(content + bytes(len(large) + 400 - len(content)))
        index = torch.zeros(1, dtype=torch.int64)
        (batch,) = images.training([(index, index)], seed=0)
        fresh = loader(PlainImages, tmp_path, paths, resized_crop=(0.9, 1.0))
        (expected,) = fresh.training([(index, index)], seed=0)
        assert difference(pixels_of(batch), pixels_of(expected)) <= 2


@needs_dali
def test_few_decoded_boxes_are_held(tmp_path, monkeypatch):
    from ups_fast.data import dali

    monkeypatch.setattr(dali, "_MOST_BYTES", 3 * 50 * 50 * 2)
    files = {
        f"{i}.jpg": encode(photo(side, side), "JPEG")
        for i, side in enumerate([50, 50, 50, 90, 20, 20, 20, 200])
    }
    paths = put(tmp_path, files)
    images, sizes = loader(DaliImages, tmp_path, paths, threads=1), []
    real = images._decode
    monkeypatch.setattr(images, "_decode", lambda out, part: sizes.append(len(part)) or real(out, part))
    got = pixels_of(torch.cat([*images.clean_batches(torch.arange(8), 8)]))
    assert sizes == [2, 1, 1, 3, 1]
    assert difference(got, pixels_of(clean(loader(PlainImages, tmp_path, paths)))) <= 2


@pytest.mark.parametrize("kind", LOADERS)
def test_ids_may_change_after_they_were_given(jpegs, kind):
    root, paths = jpegs
    images, ids = loader(kind, root, paths), torch.zeros(4, dtype=torch.int64)

    def steps():
        for i in range(8):
            yield ids.fill_(i), ids

    for i, batch in enumerate(images.training(steps(), seed=0)):
        assert torch.equal(batch, clean(images, torch.tensor([i])).expand_as(batch))


# --- boxes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (1, 5000), (5000, 1), (280, 320), (7, 9), (100, 100), (40, 64)]
)
def test_boxes_lie_within_the_image(height, width):
    draws = box_draws(np.arange(500), np.zeros(500, np.int64), 3)
    assert draws.shape == (500, TRIES, 4) and draws.min() >= 0 and draws.max() < 1
    for row in (*draws, np.zeros((TRIES, 4)), np.full((TRIES, 4), 1 - 2.0**-53)):
        for scale in ((0.08, 1.0), (1.0, 1.0), (1e-9, 1e-9)):
            top, left, h, w = random_box(row, height, width, scale)
            assert h > 0 and w > 0 and 0 <= top <= height - h and 0 <= left <= width - w
    for share in (1.0, 224 / 256, 1e-3):
        top, left, h, w = middle_box(height, width, share)
        assert h == w >= 1 and 0 <= top <= height - h and 0 <= left <= width - w


@pytest.mark.parametrize("size", [(280, 320), (60, 200), (33, 30), (30, 300)])
def test_boxes_are_torchvision_s_in_distribution(size):
    """Means of top, left, height and width within 4 standard errors of RandomResizedCrop's, spread within 10 %."""
    from torchvision.transforms import RandomResizedCrop

    n, scale = 4000, (0.2, 1.0)
    draws = box_draws(np.arange(n), np.zeros(n, np.int64), 0)
    ours = torch.tensor([random_box(row, *size, scale) for row in draws]).double()
    torch.manual_seed(0)
    image = torch.empty(1, *size)
    theirs = torch.tensor([RandomResizedCrop.get_params(image, scale, RATIO) for _ in range(n)]).double()
    spread = theirs.std(0)
    assert ((ours.mean(0) - theirs.mean(0)).abs() <= 4 * spread * math.sqrt(2 / n)).all()
    assert ((ours.std(0) - spread).abs() <= 0.1 * spread + 1e-9).all()


def test_draws_depend_on_seed_draw_and_id_alone():
    ids, draw = np.arange(1000), np.arange(1000) % 7
    draws = box_draws(ids, draw, 5)
    assert np.array_equal(box_draws(ids[::-1][:3], draw[::-1][:3], 5), draws[::-1][:3])
    others = (
        box_draws(ids, draw + 1, 5),
        box_draws(ids, draw, 6),
        box_draws(ids + 1, draw, 5),
        box_draws(draw, ids, 5),
    )
    for other in others:
        assert abs(np.corrcoef(draws.ravel(), other.ravel())[0, 1]) < 0.03, (
            "40,000 numbers: 6 standard errors"
        )
    assert len(np.unique(draws)) == draws.size
    assert np.array_equal(box_draws(ids, draw, 2**63 - 1), box_draws(ids, draw, 2**63 - 1))
    assert abs(draws.mean() - 0.5) < 0.01 and abs(draws.var() - 1 / 12) < 0.003


# --- the stream --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOADERS)
def test_an_image_is_treated_alike_in_any_batch_and_after_a_stop(jpegs, kind):
    root, paths = jpegs
    settings = {"policy": POLICIES["ups"], "resized_crop": (0.2, 1.0), "size": 24}
    images = loader(kind, root, paths, **settings)
    plan, draw = torch.randint(len(paths), (6, 8)), torch.randint(5, (6, 8))
    whole = list(images.training(zip(plan, draw, strict=True), seed=11))
    assert len(whole) == 6 and whole[0].shape == (8, 3, 24, 24) and whole[0].dtype == torch.float32
    later = loader(kind, root, paths, **settings, prefetch=1).training(
        zip(plan[4:], draw[4:], strict=True), seed=11
    )
    assert all(map(torch.equal, list(later), whole[4:])), "a resumed run starts at its step"
    flat = loader(kind, root, paths, **settings, prefetch=4, threads=1)
    order = torch.randperm(48)
    rows = torch.cat(
        list(
            flat.training(
                zip(*(each.flatten()[order].view(16, 3) for each in (plan, draw)), strict=True), seed=11
            )
        )
    )
    assert torch.equal(rows, torch.cat(whole)[order]), "order and size of batches change nothing"
    assert not torch.equal(
        torch.cat(list(flat.training(zip(plan, draw, strict=True), seed=12))), torch.cat(whole)
    )
    assert list(images.training(zip(plan[6:], draw[6:], strict=True), seed=11)) == []
    one, two = (images.training(zip(plan, draw, strict=True), seed=11) for _ in range(2))
    for batch, again, expected in zip(one, two, whole, strict=True):  # side by side
        assert torch.equal(batch, expected) and torch.equal(again, expected)


@pytest.mark.parametrize("kind", LOADERS)
def test_clean_in_batches_with_a_short_last_one(jpegs, kind):
    root, paths = jpegs
    images = loader(kind, root, paths, resize=20)
    batches = list(images.clean_batches(torch.tensor([5, 1, 1, 0, 9]), 2))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert torch.equal(torch.cat(batches), clean(images)[[5, 1, 1, 0, 9]])
    assert [len(batch) for batch in images.clean_batches(torch.zeros(0, dtype=torch.int64), 4)] == [0]
    whole = read_image(root / paths[5], 3)  # 200 x 150: to 20, of which the middle 16: 120 of 150
    expected = np.array(Image.fromarray(whole[40:160, 15:135]).resize((16, 16), Image.Resampling.BILINEAR))
    assert difference(pixels_of(batches[0])[0], expected) <= (2 if kind is DaliImages else 0)


@pytest.mark.parametrize("kind", LOADERS)
def test_files_that_vanish_or_break_do_not_stop_a_run(tmp_path, kind):
    whole = {
        "JPEG": encode(photo(60, 80), "JPEG"),
        "PNG": encode(photo(60, 80), "PNG"),
        "WEBP": encode(photo(60, 80), "WEBP"),
    }
    files = {f"good{i}.jpg": encode(photo(30, 40, i), "JPEG") for i in range(4)}
    for name, content in whole.items():
        files[f"half.{name}"] = content[: len(content) // 2]
        files[f"head.{name}"] = content[:40]
    broken = bytearray(whole["PNG"])
    broken[len(broken) // 2] ^= 255
    files |= {"broken.png": bytes(broken), "text.jpg": b"hello", "empty.jpg": b"", "gone.jpg": b""}
    files["short.png"] = whole["PNG"][:-4]  # which Pillow forgives and DALI does not
    paths = put(tmp_path, files)
    (tmp_path / "gone.jpg").unlink()
    images = loader(kind, tmp_path, paths, policy=POLICIES["weak"], resized_crop=(0.5, 1.0))
    plan = torch.arange(len(paths))[None]
    for _ in range(2):
        (batch,) = images.training([(plan[0], plan[0] * 0)], seed=0)
        bad = [i for i, path in enumerate(paths) if not path.startswith(("good", "short"))]
        assert sorted(images.unreadable) == bad
        assert all(repr(str(tmp_path / paths[i])) in sentence for i, sentence in images.unreadable.items())
        assert (pixels_of(batch)[bad] == 0).all(), "black"
    good = [i for i in range(len(paths)) if i not in bad]
    (alone,) = images.training([(torch.tensor(good), torch.zeros(len(good), dtype=torch.int64))], seed=0)
    assert torch.equal(alone, batch[good]), "its company changes no image"
    (tmp_path / "gone.jpg").write_bytes(files["good0.jpg"])
    assert (pixels_of(clean(images))[paths.index("gone.jpg")] > 0).any(), (
        "a file that is there again is read again"
    )


@needs_dali
def test_whatever_dali_fails_on_is_for_pillow(jpegs, monkeypatch):
    """Which it may do for reasons that no list has."""
    root, paths = jpegs
    images, plain = loader(DaliImages, root, paths), loader(PlainImages, root, paths)
    real, tried = images._decode, []

    def fail(out, files):
        tried.append(len(files))
        if any(file.row % 2 for file in files):
            raise RuntimeError("Invalid sample_type: -1")
        return real(out, files)

    monkeypatch.setattr(images, "_decode", fail)
    got, expected = pixels_of(clean(images)), pixels_of(clean(plain))
    assert difference(got[1::2], expected[1::2]) == 0 and difference(got, expected) <= 2
    n = len(tried)
    assert images.unreadable == {} and n == 4 + len(paths), "each part, then each of its files"
    clean(images)
    assert len(tried) == n + 4, "and never again"


@pytest.mark.parametrize("kind", LOADERS)
def test_few_files_are_held_and_nothing_goes_on_after_a_stop(jpegs, kind, monkeypatch):
    from ups_fast.data import dali, stream

    root, paths = jpegs
    read, opened = stream.read_bytes, []
    for module in (stream, dali):
        monkeypatch.setattr(module, "read_bytes", lambda path: opened.append(path) or read(path))
    images = loader(kind, root, paths, prefetch=2)
    plan = torch.randint(len(paths), (50, 4))
    batches = images.training(zip(plan, plan, strict=True), seed=0)
    for step in range(1, 6):
        next(batches)
        assert 4 * step <= len(opened) <= 4 * (step + images.prefetch)
    del batches
    gc.collect()
    assert len(opened) <= 4 * 8


@needs_dali
def test_memory_does_not_grow(jpegs):
    root, paths = jpegs
    images = loader(DaliImages, root, paths, policy=POLICIES["weak"], resized_crop=(0.2, 1.0))

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    plan = torch.randint(len(paths), (150, 16))
    for _ in images.training(zip(plan, plan, strict=True), seed=0):
        pass
    before = resident()
    for _ in images.training(zip(plan, plan, strict=True), seed=1):
        pass
    assert resident() - before < 8 << 20, "2,400 more images, whose pixels take 60 MB"


@pytest.mark.gpu
@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("channels", [1, 3])
def test_on_a_gpu_batches_are_those_of_a_cpu(tmp_path, kind, channels):
    """PNG of the size bit for bit; others within DALI's filter and the GPU's JPEG decoder, for which no bound is known:
    3 in the mean is far above rounding and far below any other box, turn or channel."""
    files = {f"{i}.png": encode(photo(32, 32, i), "PNG") for i in range(40)}
    files |= {name: content for name, (content, _) in odd_files().items()}
    paths = put(tmp_path, files)
    settings = {"size": 32, "channels": channels, "policy": POLICIES["weak"]}
    here, there = (
        loader(kind, tmp_path, paths, **settings),
        loader(kind, tmp_path, paths, device="cuda", **settings),
    )
    index = torch.arange(len(paths))
    plan, draw = torch.randint(40, (6, 8)), torch.randint(5, (6, 8))
    steps = [*zip(plan, draw, strict=True)]
    for got, expected in zip(there.training(steps, seed=3), here.training(steps, seed=3), strict=True):
        assert got.is_cuda and torch.equal(got.cpu(), expected), "PNG"
    one, two = (
        pixels_of(torch.cat([*images.clean_batches(index, 7)]).cpu()).int() for images in (there, here)
    )
    error = (one - two).abs().flatten(1)
    assert not error[:40].any()
    for path, mean in zip(paths, error.float().mean(1), strict=True):
        assert mean <= 3, path
    assert there.unreadable == here.unreadable == {}


@pytest.mark.gpu
@needs_dali
def test_on_a_gpu_no_batch_is_overwritten_while_it_is_read(jpegs):
    """The device is kept busy, so that batches are made long before they are used, and a place is used again."""
    root, paths = jpegs
    images = loader(DaliImages, root, paths, size=64, device="cuda", resized_crop=(0.2, 1.0), prefetch=4)
    plan = torch.randint(len(paths), (60, 16))
    steps, place = [*zip(plan, plan, strict=True)], torch.empty(16, 3, 64, 64, device="cuda")
    place = place.to(memory_format=torch.channels_last)
    quiet = [batch.sum((1, 2, 3)) for batch in images.training(steps, seed=0)]
    torch.cuda.synchronize()
    weight, busy = torch.randn(2048, 2048, device="cuda"), []
    for _ in images.training(steps, seed=0, out=place):
        for _ in range(20):
            weight = weight @ weight / weight.norm()
        busy.append(place.sum((1, 2, 3)))
    assert all(map(torch.equal, busy, quiet))


# --- what is refused, and what is missing ------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOADERS)
def test_arguments_are_refused(jpegs, kind):
    root, paths = jpegs
    for settings, sentence in (
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"channels": 2}, "channels must be 1 or 3, got 2"),
        ({"resize": 15}, "resize must be at least 16, got 15"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"prefetch": 0}, "prefetch must be at least 1, got 0"),
        ({"resized_crop": (0.0, 1.0)}, r"resized_crop must be a range within \(0, 1\], got \(0.0, 1.0\)"),
        ({"policy": Policy(crop=16)}, "policy.crop must be below the image size 16x16, got 16"),
        ({"images": torch.zeros(2, 8, 8)}, r"images must be uint8 \[N, H, W, 3\], got float32 \[2, 8, 8\]"),
    ):
        with pytest.raises(ValueError, match=sentence):
            loader(kind, root, paths, **settings)
    images, plan = loader(kind, root, paths), torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^index must hold sample ids of 0..15, got 0..16$"):
        next(images.training([(plan[0] + torch.tensor([0, 16, 0, 0]), plan[0])], seed=0))
    with pytest.raises(ValueError, match=r"^index and draw must be \[B\], got \[4\] and \[3\]$"):
        next(images.training([(plan[0], plan[0, 1:])], seed=0))
    with pytest.raises(ValueError, match="batch_size at least 1"):
        images.clean_batches(plan[0], 0)


def test_without_dali_a_sentence_says_what_to_install(jpegs, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    root, paths = jpegs
    settings = {"size": 8, "channels": 3, "mean": [0] * 3, "std": [1] * 3, "device": "cpu"}
    plain = "files are decoded by Pillow, which is slower: DALI is not installed"
    with pytest.warns(UserWarning, match=f"^{plain}"):
        images = file_images("auto", str(root), paths, **settings)
    assert type(images).__name__ == "PlainImages"
    with pytest.raises(ImportError) as error:
        file_images("dali", str(root), paths, **settings)
    said = str(error.value)
    assert said.startswith("DALI is not installed: `pip install nvidia-dali-cuda130`") and "cuda120" in said


@needs_dali
@pytest.mark.slow
def test_dali_is_imported_by_its_loader_alone(jpegs):
    code = "import sys, ups_fast.data, ups_fast.data.dali; print([m for m in sys.modules if m.startswith('nvidia')])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert done.stdout.strip() == "[]", done.stderr
    assert isinstance(
        file_images("auto", *jpegs, size=8, channels=3, mean=MEAN, std=STD, device="cpu"), DaliImages
    )
    with pytest.raises(ValueError, match=r"^loader must be auto, dali or plain, got 'tf'$"):
        file_images("tf", *jpegs)


def test_header_for_dali_says_what_is_damaged():
    with pytest.raises(DamagedImage, match=r"^'a\.jpg' is not an image"):
        header_for_dali(b"hello", "'a.jpg'")


# --- a small task ------------------------------------------------------------------------------------------


def accuracy_of(batches, labels: Tensor, test: Tensor, truth: Tensor) -> float:
    """Test accuracy of a small network after one pass over the batches."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, 2), torch.nn.ReLU(), torch.nn.Conv2d(16, 32, 3, 2), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(128, 4),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for batch, target in zip(batches, labels, strict=True):
        loss = torch.nn.functional.cross_entropy(model(batch), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float((model(test).argmax(1) == truth).float().mean())


@needs_dali
@pytest.mark.slow
def test_training_is_as_good_through_every_loader(tmp_path):
    """Stripes of four directions in JPEGs of many sizes. In memory they are those that the plain loader crops.

    256 test images at about 90 %: 3 standard errors of a difference are 8 points.
    """
    random = np.random.default_rng(0)
    truth = torch.from_numpy(random.integers(0, 4, 768))
    files = {}
    for i, kind in enumerate(truth.tolist()):
        height, width = random.integers(24, 60, 2)
        y, x = np.mgrid[:height, :width]
        along = (y, x, x + y, x - y)[kind] * random.uniform(0.5, 1.2) + random.uniform(0, 6)
        image = 128 + 60 * np.sin(along)[..., None] + random.normal(0, 55, (height, width, 3))
        files[f"{i}.jpg"] = encode(image.clip(0, 255).astype(np.uint8), "JPEG")
    paths = put(tmp_path, files)
    plan = torch.from_numpy(np.stack([random.permutation(512) for _ in range(6)])).view(-1, 32)
    draw = torch.arange(6).repeat_interleave(16)[:, None].expand_as(plan)
    rule = {"policy": Policy(crop=2), "size": 24}
    found = {}
    for kind in (DaliImages, PlainImages):
        images = loader(kind, tmp_path, paths, **rule)
        test = clean(images, torch.arange(512, 768))
        found[kind.__name__] = accuracy_of(
            images.training(zip(plan, draw, strict=True), seed=0), truth[plan], test, truth[512:]
        )
    held = torch.stack([torch.from_numpy(resize_crop(read_image(tmp_path / path, 3), 24)) for path in paths])
    resident = ResidentImages(held, mean=MEAN, std=STD, device="cpu", policy=Policy(crop=2))
    batches = (resident.augmented(ids, seed=0, epoch=d) for ids, d in zip(plan, draw, strict=True))
    test = resident.clean(torch.arange(512, 768))
    found["resident"] = accuracy_of(batches, truth[plan], test, truth[512:])
    assert found["resident"] == found["PlainImages"], "bit for bit the same batches"
    assert abs(found["DaliImages"] - found["resident"]) <= 0.08 and found["resident"] > 0.7, found
