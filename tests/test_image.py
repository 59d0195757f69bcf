"""One image file to pixels: every mode that people's files have, and every way in which a file can be broken."""

from __future__ import annotations

import contextlib
import os
import re
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile
from torchvision.transforms import Resize

from ups_fast.data import DamagedImage, read_image, resize_crop
from ups_fast.data.image import ENOUGH

RAMP = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5  # no two pixels alike, so that a turn shows


def colors(height: int = 6, width: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, color: int, data: bytes, *more: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(data))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + body + chunk(b"IEND", b"")


# --- what is read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["png", "bmp", "tif", "ppm", "webp"])
def test_colors_come_back(tmp_path, kind):
    file = tmp_path / f"a.{kind}"
    Image.fromarray(colors()).save(file, **({"lossless": True} if kind == "webp" else {}))
    image = read_image(file, 3)
    assert image.dtype == np.uint8 and image.flags.writeable and np.array_equal(image, colors())
    gray = read_image(str(file), 1)
    assert np.array_equal(gray[..., 0], np.array(Image.fromarray(colors()).convert("L")))


@pytest.mark.parametrize("channels", [1, 3])
def test_gray_comes_back(tmp_path, channels):
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png", channels), np.stack([RAMP] * channels, 2))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "tif"])
def test_exif_orientation(tmp_path, orientation, kind):
    """Turned by numpy, as the EXIF standard says where row 0 and column 0 of the file belong."""
    turn = [
        lambda a: a,
        lambda a: a[:, ::-1],
        lambda a: a[::-1, ::-1],
        lambda a: a[::-1],
        lambda a: a.T,
        lambda a: np.rot90(a, -1),
        lambda a: a[::-1, ::-1].T,
        lambda a: np.rot90(a),
    ][orientation - 1]
    flat = np.kron(RAMP[:2, :3] * 4, np.ones((8, 8), np.uint8))  # survives JPEG: its blocks are constant
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"a.{kind}"
    Image.fromarray(flat).save(file, exif=exif, **({"quality": 100} if kind == "jpg" else {}))
    got = read_image(file, 1)[..., 0].astype(int)
    assert got.shape == turn(flat).shape and np.abs(got - turn(flat)).max() <= 1


def test_a_nonsense_orientation_and_broken_exif_leave_the_image_as_it_is(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 77
    Image.fromarray(RAMP).save(tmp_path / "77.png", exif=exif)
    Image.fromarray(RAMP).save(tmp_path / "broken.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    for name in ("77.png", "broken.png"):
        assert np.array_equal(read_image(tmp_path / name, 1)[..., 0], RAMP)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "palette", "transparent gray", "transparent color"])
def test_transparency_lies_on_white(tmp_path, mode):
    file, expected = tmp_path / "a.png", np.full((6, 8), 255)
    if mode in ("RGBA", "LA"):
        alpha = np.full_like(RAMP, 255)
        alpha[:3], alpha[3] = 0, 51
        Image.merge(
            mode, [Image.fromarray(RAMP)] * (3 if mode == "RGBA" else 1) + [Image.fromarray(alpha)]
        ).save(file)
        expected = np.rint(255 + (RAMP.astype(float) - 255) * (alpha / 255))
    elif mode == "palette":
        image = Image.fromarray(RAMP // 5 % 4).convert("L")
        image = Image.frombytes("P", image.size, image.tobytes())
        image.putpalette([10, 10, 10, 90, 90, 90, 200, 200, 200, 0, 0, 0])
        image.save(file, transparency=bytes([255, 255, 255, 0]))  # a palette of alphas
        expected = np.array([10, 90, 200, 255])[RAMP // 5 % 4]
    elif mode == "transparent gray":
        Image.fromarray(RAMP).save(file, transparency=15)
        expected = np.where(RAMP == 15, 255, RAMP)
    else:
        Image.fromarray(RAMP).convert("RGB").save(file, transparency=(15, 15, 15))
        expected = np.where(RAMP == 15, 255, RAMP)
    for channels in (1, 3):
        got = read_image(file, channels)
        assert got.shape == (6, 8, channels)
        assert np.abs(got.astype(int) - expected[..., None]).max() <= (1 if mode in ("RGBA", "LA") else 0)


@pytest.mark.parametrize("kind", ["png", "tif", "big-endian tif", "pgm"])
def test_sixteen_bits_are_scaled(tmp_path, kind):
    wide = np.array([[0, 1, 128, 129, 255, 256], [257, 32768, 40000, 65278, 65534, 65535]], np.uint16)
    file = tmp_path / f"a.{kind[-3:]}"
    if kind == "big-endian tif":
        Image.frombytes("I;16B", (6, 2), wide.astype(">u2").tobytes()).save(file)
    elif kind == "pgm":
        file.write_bytes(b"P5 6 2 65535\n" + wide.astype(">u2").tobytes())
    else:
        Image.fromarray(wide).save(file)
    expected = np.rint(wide / 257).astype(np.uint8)
    assert np.array_equal(read_image(file, 1)[..., 0], expected)
    assert np.array_equal(read_image(file, 3), np.stack([expected] * 3, 2))


def test_sixteen_bits_are_turned_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png", 1)[..., 0], np.rot90(RAMP, -1))


def test_sixteen_bits_of_color(tmp_path):
    wide = colors().astype(">u2") * 257
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in wide)
    (tmp_path / "a.png").write_bytes(png(8, 6, 16, 2, rows))
    assert np.array_equal(read_image(tmp_path / "a.png", 3), colors())


@pytest.mark.parametrize("kind", ["png", "bmp", "pbm", "tif"])
def test_one_bit(tmp_path, kind):
    bits = RAMP % 2 == 1
    Image.fromarray(bits).save(tmp_path / f"a.{kind}")
    assert np.array_equal(read_image(tmp_path / f"a.{kind}", 1)[..., 0], bits * np.uint8(255))


@pytest.mark.parametrize("kind", ["jpg", "tif"])
def test_cmyk(tmp_path, kind):
    """Ink on paper: none of it is white, all the black is black, and cyan is without red."""
    inks = np.zeros((16, 48, 4), np.uint8)
    inks[:, 16:32, 3] = 255
    inks[:, 32:, 0] = 255
    Image.frombytes("CMYK", (48, 16), inks.tobytes()).save(
        tmp_path / f"a.{kind}", **({"quality": 100} if kind == "jpg" else {})
    )
    got = read_image(tmp_path / f"a.{kind}", 3)[8, [8, 24, 40]].astype(int)
    assert np.abs(got - [[255, 255, 255], [0, 0, 0], [0, 255, 255]]).max() <= 2


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tif"])
def test_of_many_frames_the_first_is_read(tmp_path, kind):
    frames = [Image.new("RGB", (5, 4), (value, value, value)) for value in (255, 0, 128)]
    extra = {"lossless": True} if kind == "webp" else {}
    frames[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:], **extra)
    assert (read_image(tmp_path / f"a.{kind}", 3) == 255).all()


def test_the_content_decides_not_the_suffix(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "a.jpg", format="PNG")
    assert np.array_equal(read_image(tmp_path / "a.jpg", 1)[..., 0], RAMP)


def test_floats_are_read_in_their_range_or_not_at_all(tmp_path):
    file = tmp_path / "a.tif"
    for high, good in ((1.0, True), (255.0, False), (float("nan"), False), (-1.0, False)):
        Image.fromarray(np.array([[0, 0.5, high]], np.float32)).save(file)
        if good:
            assert read_image(file, 1).ravel().tolist() == [0, 128, 255]
        else:
            with pytest.raises(DamagedImage, match=r"floating-point numbers are not in 0\.\.1"):
                read_image(file, 1)
    Image.fromarray(np.array([[0, 70000]], np.int32)).save(file)
    with pytest.raises(DamagedImage, match=r"integers are not in 0\.\.65535"):
        read_image(file, 3)


@pytest.mark.parametrize(
    "name", ["zwei Wörter.png", "猫 🐈.png", "a'b\"c;,%s{x}.png", "-rf.png", b"\xff\xfe.png"]
)
def test_odd_names(tmp_path, name):
    folder = os.fsencode(tmp_path)
    path = os.fsdecode(folder + b"/" + (name if isinstance(name, bytes) else name.encode()))
    Image.fromarray(RAMP).save(path, format="PNG")
    assert np.array_equal(read_image(path, 1)[..., 0], RAMP)
    Path(path).write_bytes(b"")
    with pytest.raises(DamagedImage, match=r"is empty$") as caught:
        read_image(path, 1)
    str(caught.value).encode()  # it can be printed anywhere


# --- what is broken ----------------------------------------------------------------------------------------


def broken(tmp_path: Path, how: str) -> Path:
    file = tmp_path / "a.jpg"
    Image.fromarray(colors(64, 64)).save(file, quality=95)
    whole = file.read_bytes()
    if how == "truncated":
        file.write_bytes(whole[: len(whole) // 2])
    elif how == "header only":
        file.write_bytes(whole[:30])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "text":
        file.write_text("<html>404 not found</html>")
    elif how == "zeros":
        file.write_bytes(bytes(5000))
    elif how == "truncated png":
        Image.fromarray(colors(64, 64)).save(file, format="PNG")
        file.write_bytes(file.read_bytes()[:4000])
    elif how == "postscript":  # Pillow would run Ghostscript
        file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    elif how == "bomb":
        file.write_bytes(png(40000, 40000, 8, 2, b""))
    elif how == "no pixels":
        file.write_bytes(png(0, 0, 8, 0, b""))
    elif how == "folder":
        file.unlink()
        file.mkdir()
    elif how == "pipe":
        file.unlink()
        os.mkfifo(file)
    else:
        file.unlink()
        if how == "loop":
            file.symlink_to(file)
    return file


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("truncated", r"cannot be decoded \(image file is truncated.*\)"),
        ("header only", r"(cannot be decoded|is a JPEG file that is damaged).*"),
        ("empty", "is empty"),
        ("text", "is not an image, or of a kind that cannot be read"),
        ("zeros", "is not an image, or of a kind that cannot be read"),
        ("truncated png", r"cannot be decoded \(.*\)"),
        ("postscript", "is not an image, or of a kind that cannot be read"),
        (
            "bomb",
            r"cannot be decoded \(it takes 1\d\.\d GiB of memory, and decoding may take .*: make it smaller\)",
        ),
        ("no pixels", r"(cannot be decoded|is a PNG file that is damaged).*"),
        ("folder", "is not a file"),
        ("pipe", "is not a file"),
        ("gone", r"cannot be opened \(No such file or directory\)"),
        ("loop", r"cannot be opened \(Too many levels of symbolic links\)"),
    ],
)
def test_a_broken_file_says_so_in_one_sentence(tmp_path, how, reason):
    file = broken(tmp_path, how)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for channels in (1, 3):
            with pytest.raises(DamagedImage, match=f"^{re.escape(repr(str(file)))} {reason}$") as caught:
                read_image(file, channels)
            assert "\n" not in str(caught.value) and "0x" not in str(caught.value)
    assert not said


def test_a_file_without_permission(tmp_path, monkeypatch):
    file = tmp_path / "a.png"
    Image.fromarray(RAMP).save(file)
    if os.geteuid() == 0:  # root reads everything

        def refuse(*_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("ups_fast.data.image.open", refuse, raising=False)
    else:
        file.chmod(0)
    with pytest.raises(DamagedImage, match=r"a\.png' cannot be opened \(Permission denied\)$"):
        read_image(file, 1)


def test_every_prefix_and_many_flipped_bytes_are_read_or_refused(tmp_path):
    """Whatever Pillow's readers raise for a broken file, what comes out is pixels or DamagedImage."""
    random = np.random.default_rng(0)
    file = tmp_path / "a"
    for kind in ("jpeg", "png", "gif", "bmp", "tiff", "webp", "ppm"):
        Image.fromarray(colors()).save(file, format=kind)
        whole = file.read_bytes()
        cases = [whole[:n] for n in range(0, len(whole), 1 + len(whole) // 25)]
        for _ in range(40):
            flipped = bytearray(whole)
            flipped[random.integers(len(whole))] ^= 1 << random.integers(8)
            cases.append(bytes(flipped))
        for case in cases:
            file.write_bytes(case)
            with contextlib.suppress(DamagedImage):
                assert read_image(file, 3).ndim == 3


def test_warnings_of_pillow_are_not_heard_in_any_thread(tmp_path):
    """Not even where they are errors; and the filters of the process are as before."""
    wide = tmp_path / "wide.png"
    wide.write_bytes(png(9500, 9500, 1, 0, (b"\0" + bytes(1188)) * 9500))  # Pillow warns, but reads it
    exif = tmp_path / "a.tif"
    Image.fromarray(RAMP).save(exif)
    failed: list[BaseException] = []

    def read(file: Path, times: int) -> None:
        try:
            for _ in range(times):
                read_image(file, 1)
        except BaseException as error:
            failed.append(error)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        threads = [
            threading.Thread(target=read, args=(f, n)) for f, n in ((wide, 1), (exif, 300), (exif, 300))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert warnings.filters == before
    assert not failed


def test_read_refuses_other_channels(tmp_path):
    for channels in (0, 2, 4):
        with pytest.raises(ValueError, match=f"^channels must be 1 or 3, got {channels}$"):
            read_image(tmp_path / "a.png", channels)


# --- size --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [1, 7, 33, 64])
@pytest.mark.parametrize("size", [1, 8, 32, 50])
def test_of_a_square_it_is_what_torchvision_does(channels, side, size):
    image = colors(side, side)[..., :channels]
    got = resize_crop(image, size)
    assert got.dtype == np.uint8 and got.shape == (size, size, channels)
    whole = Image.fromarray(image[..., 0] if channels == 1 else image)
    assert np.array_equal(got, np.array(Resize(size)(whole)).reshape(got.shape))


@pytest.mark.parametrize(("height", "width"), [(60, 91), (91, 60), (97, 40), (32, 33)])
@pytest.mark.parametrize("size", [8, 20, 64])
def test_resize_crop_samples_the_middle_evenly(height, width, size):
    """Of a plane, an even filter gives its value in the middle of each new pixel; but for the border, where the
    filter is cut, and within the rounding of the plane and of each of two passes: 3 halves."""
    side = min(height, width)
    y, x = np.mgrid[:height, :width]
    image = np.rint(2.0 * y * 40 / height + 1.5 * x * 80 / width).astype(np.uint8)[..., None]
    center = (np.arange(size) + 0.5) * side / size - 0.5
    rows, columns = center + (height - side) // 2, center + (width - side) // 2
    expected = 80 / height * rows[:, None] + 120 / width * columns
    border = max(1, -(-size // side))
    inner = np.s_[border:-border, border:-border]
    assert np.abs(resize_crop(image, size)[..., 0].astype(float) - expected)[inner].max() <= 1.5


def test_resize_crop_keeps_the_middle_and_what_fits():
    image = np.zeros((10, 30, 1), np.uint8)
    image[:, 10:20] = 200
    assert (resize_crop(image, 10) == 200).all()
    for width in (9, 12, 13):
        view = colors(9, width)[:, ::-1]  # neither contiguous nor in order
        left = (width - 9) // 2
        assert np.array_equal(resize_crop(view, 9), view[:, left : left + 9])
        assert np.array_equal(resize_crop(view.swapaxes(0, 1), 9), view.swapaxes(0, 1)[left : left + 9])
    assert resize_crop(np.full((1, 200000, 3), 7, np.uint8), 224).max() == 7  # 30 GB if it were scaled first
    with pytest.raises(ValueError, match=r"^size must be at least 1, got 0$"):
        resize_crop(image, 0)


def test_the_settings_of_pillow_are_left_alone(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    read_image(tmp_path / "a.png", 1)
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_large_jpeg_is_decoded_at_a_fraction(tmp_path, mode, options):
    """Down to what is asked for, upright, and after scaling hardly to be told from the whole."""
    random = np.random.default_rng(0)
    noise = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8)).convert(mode)
    exif = Image.Exif()
    exif[0x112] = 6
    noise.resize((640, 480), Image.Resampling.BICUBIC).save(tmp_path / "a.jpg", exif=exif, **options)
    for at_least, side in ((0, 480), (1, 60), (60, 60), (61, 120), (240, 240), (241, 480), (9999, 480)):
        image = read_image(tmp_path / "a.jpg", 3, at_least)
        assert image.shape == (side * 4 // 3, side, 3)
    whole = resize_crop(read_image(tmp_path / "a.jpg", 3), 40).astype(int)
    for at_least, mean, most in ((ENOUGH * 40, 1, 6), (40, 3, 16)):
        error = np.abs(resize_crop(read_image(tmp_path / "a.jpg", 3, at_least), 40) - whole)
        assert error.mean() <= mean and error.max() <= most


@pytest.mark.parametrize("at_least", [0, 1])
def test_damage_is_found_at_any_fraction(tmp_path, at_least):
    Image.effect_noise((640, 480), 60).save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    for share in (0.02, 0.5, 0.99):
        (tmp_path / "a.jpg").write_bytes(content[: int(share * len(content))])
        with pytest.raises(DamagedImage, match="truncated"):
            read_image(tmp_path / "a.jpg", 1, at_least)


def test_only_jpegs_have_fractions(tmp_path):
    picture = Image.effect_noise((64, 48), 60)
    for kind in ("png", "webp", "tif", "bmp", "gif"):
        picture.save(tmp_path / f"a.{kind}")
        assert read_image(tmp_path / f"a.{kind}", 1, 1).shape == (48, 64, 1)
