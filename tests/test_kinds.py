"""Rare kinds of files, made here byte by byte: read as a viewer shows them, or refused by name; and no data missing."""

from __future__ import annotations

import io
import re
import struct
import threading
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from ups_fast.data import DamagedImage, as_image_set, check, file_images, read_image, scan
from ups_fast.data import image as image_module
from ups_fast.data.image import picture, picture_of
from ups_fast.data.memory import Budget
from ups_fast.data.sets import load_set

GRAY = np.array([[0, 51, 102, 255], [17, 34, 68, 136]], np.uint8)  # multiples of 17: exact in 4 bits
COLOR = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
COLOR[0, 0] = 0
ALPHA = np.where(np.arange(48).reshape(6, 8, 1) % 3 == 0, 128, 255)
ON_WHITE = np.rint(255 + (COLOR.astype(float) - 255) * ALPHA / 255).astype(np.uint8)


def tiff(size, bits, photometric, *parts, order="<", compression=1, tile=None, rows=None, **tags) -> bytes:
    """A TIFF file of these strips, or tiles of this width and height."""
    width, height = size
    if compression == 8:
        parts = [zlib.compress(part) for part in parts]
    entries = {256: [width], 257: [height], 258: bits, 259: [compression], 277: [len(bits)]}
    entries |= {} if photometric is None else {262: [photometric]}
    entries |= {322: [tile[0]], 323: [tile[1]]} if tile else {278: [rows or height]}
    body, offsets = b"", []
    for part in parts:
        offsets.append(8 + len(body))
        body += part + bytes(len(part) % 2)
    entries |= {324 if tile else 273: offsets, 325 if tile else 279: [len(part) for part in parts]}
    entries |= {int(tag[1:]): values for tag, values in tags.items()}
    start = 8 + len(body)
    after, more, table = start + 6 + 12 * len(entries), b"", b""
    for tag, values in sorted(entries.items()):
        raw = struct.pack(f"{order}{len(values)}I", *values)
        if len(raw) > 4:
            raw, more = struct.pack(order + "I", after + len(more)), more + raw
        table += struct.pack(order + "HHI", tag, 4, len(values)) + raw
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, start)
    return head + body + struct.pack(order + "H", len(entries)) + table + bytes(4) + more


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(size, depth, color, data: bytes, *before: bytes, after: bytes = b"", interlaced: int = 0) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, color, 0, 0, interlaced))
    body = chunk(b"IDAT", zlib.compress(data)) + after + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(before) + body


def bmp(size, bits, data: bytes, *, masks=b"", palette=b"", colors=0, header=40, compression=0) -> bytes:
    info = struct.pack("<IiiHHIIiiII", header, *size, 1, bits, compression, len(data), 0, 0, colors, 0)
    info = (info + masks).ljust(header, b"\0") + palette
    return b"BM" + struct.pack("<IHHI", 14 + len(info) + len(data), 0, 0, 14 + len(info)) + info + data


def gif(size, pixels, screen=None) -> bytes:
    """Every hundredth code clears the table, so that codes keep 9 bits."""
    codes = [
        code for i, pixel in enumerate(pixels) for code in ([256] if i % 100 == 0 else []) + [int(pixel)]
    ]
    bits = sum(code << 9 * i for i, code in enumerate([*codes, 257]))
    data = bits.to_bytes((9 * len(codes) + 16) // 8, "little")
    blocks = b"".join(bytes([len(data[i : i + 255])]) + data[i : i + 255] for i in range(0, len(data), 255))
    palette = bytes(value for value in range(256) for _ in range(3))
    head = b"GIF89a" + struct.pack("<HHBBB", *(screen or size), 0xF7, 0, 0) + palette
    return head + b"," + struct.pack("<HHHHB", 0, 0, *size, 0) + b"\x08" + blocks + b"\0;"


def saved(pixels, kind: str, **options) -> bytes:
    file = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(file, kind, **options)
    return file.getvalue()


def packed(values: np.ndarray, bits: int) -> bytes:  # [H, W], each row from a new byte on
    width = values.shape[1] * bits
    rows = (int("".join(f"{value:0{bits}b}" for value in row.tolist()), 2) << -width % 8 for row in values)
    return b"".join(row.to_bytes((width + 7) // 8, "big") for row in rows)


def planes(pixels: np.ndarray) -> list[bytes]:
    return [np.ascontiguousarray(pixels[..., k]).tobytes() for k in range(pixels.shape[2])]


def tiffs() -> dict[str, tuple[bytes, np.ndarray | str]]:
    cases: dict[str, tuple[bytes, np.ndarray | str]] = {}
    gray, color = (4, 2), (8, 6)
    unknown = "is a TIFF file that is damaged or of a kind that cannot be read (unknown pixel mode)"
    for order in "<>":
        for compression in (1, 8):
            how = {"order": order, "compression": compression}
            at = f"{'II' if order == '<' else 'MM'}, {'raw' if compression == 1 else 'deflate'}"
            for bits in (1, 2, 4, 8):
                data = packed(GRAY >> 8 - bits, bits)
                wide = (GRAY >> 8 - bits) * (255 // (2**bits - 1))
                cases[f"{bits} bits, {at}"] = tiff(gray, [bits], 1, data, **how), wide
                cases[f"{bits} bits, white is 0, {at}"] = tiff(gray, [bits], 0, data, **how), 255 - wide
            deep = (GRAY.astype(np.uint16) * 257 + [[0, 1, 2, 0]]).astype(order + "u2")  # of unequal bytes
            near = np.rint(deep / 257).astype(np.uint8)
            cases[f"16 bits, {at}"] = tiff(gray, [16], 1, deep.tobytes(), **how), near
            inverse = (
                np.rint((65535 - deep.astype(float)) / 257).astype(np.uint8) if order == "<" else unknown
            )
            cases[f"16 bits, white is 0, {at}"] = tiff(gray, [16], 0, deep.tobytes(), **how), inverse
            share = (GRAY / 255).astype(order + "f4").tobytes()
            cases[f"float, {at}"] = tiff(gray, [32], 1, share, t339=[3], **how), GRAY
            cases[f"float, white is 0, {at}"] = tiff(gray, [32], 0, share, t339=[3], **how), 255 - GRAY
            for bits in (16, 32):
                whole = (GRAY.astype(np.int64) * 128).astype(f"{order}i{bits // 8}")
                half = np.rint(GRAY.astype(int) * 128 / 257).astype(np.uint8)
                cases[f"signed {bits}, {at}"] = tiff(gray, [bits], 1, whole.tobytes(), t339=[2], **how), half
            signed = tiff(gray, [8], 1, GRAY.tobytes(), t339=[2], **how)
            cases[f"signed 8, {at}"] = signed, "its 8-bit numbers are signed"
            silent = tiff(gray, [8], None, GRAY.tobytes(), **how)
            cases[f"silent, {at}"] = silent, "it is a TIFF that does not say whether 0 is black or white"
            cases[f"double, {at}"] = tiff(gray, [64], 1, bytes(64), t339=[3], **how), unknown
            straight = np.concatenate([COLOR, ALPHA.astype(np.uint8)], 2)
            before = np.concatenate([np.rint(COLOR * (ALPHA / 255)), ALPHA], 2).astype(np.uint8)
            inks = np.concatenate([255 - COLOR, np.zeros((6, 8, 1), np.uint8)], 2)
            rgba, la = [8] * 4, [8] * 2
            cases[f"alpha, {at}"] = tiff(color, rgba, 2, straight.tobytes(), t338=[2], **how), ON_WHITE
            cases[f"premultiplied, {at}"] = tiff(color, rgba, 2, before.tobytes(), t338=[1], **how), ON_WHITE
            cases[f"no alpha, {at}"] = tiff(color, rgba, 2, straight.tobytes(), t338=[0], **how), COLOR
            some = before[..., [0, 3]].tobytes()
            cases[f"gray premultiplied, {at}"] = tiff(color, la, 1, some, t338=[1], **how), ON_WHITE[..., 0]
            cases[f"inks, {at}"] = tiff(color, rgba, 5, inks.tobytes(), **how), COLOR
            other = tiff(color, rgba, 5, inks.tobytes(), t332=[2], **how)
            cases[f"other inks, {at}"] = other, "its inks are not cyan, magenta, yellow and black"
            cases[f"planes, {at}"] = tiff(color, [8] * 3, 2, *planes(COLOR), t284=[2], **how), COLOR
            deep = (COLOR.astype(np.uint16) * 256 + 7).astype(order + "u2")
            cases[f"16 bits of color, {at}"] = tiff(color, [16] * 3, 2, deep.tobytes(), **how), COLOR
            apart = tiff(color, [16] * 3, 2, *planes(deep), t284=[2], **how)
            raw = "it is a TIFF of 3 separate planes of 16 bits"
            cases[f"planes of 16 bits, {at}"] = apart, raw if compression == 1 else COLOR
            map16 = np.random.default_rng(1).integers(0, 256, (3, 256))
            indexed = map16.T[COLOR[..., 0]].astype(np.uint8)
            for scale in (1, 257):  # some programs write 8 bits where 16 belong
                name = f"palette of {8 * (1 + scale // 257)} bits, {at}"
                colors = (map16 * scale).ravel().tolist()
                cases[name] = tiff(color, [8], 3, COLOR[..., 0].tobytes(), t320=colors, **how), indexed
            pad = np.zeros((16, 32, 3), np.uint8)
            pad[:6, :8] = COLOR
            wide = np.tile(COLOR, (1, 3, 1))
            padded = np.zeros((16, 32, 3), np.uint8)
            padded[:6, :24] = wide
            tiles = [np.ascontiguousarray(padded[:, x : x + 16]).tobytes() for x in (0, 16)]
            cases[f"tiles, {at}"] = tiff((24, 6), [8] * 3, 2, *tiles, tile=(16, 16), **how), wide
            end = "its data end before its last row" if compression == 1 else "decoder error -2"
            cases[f"a tile missing, {at}"] = tiff((24, 6), [8] * 3, 2, tiles[0], tile=(16, 16), **how), end
            strips = [COLOR[:3].tobytes(), COLOR[3:].tobytes()]
            cases[f"strips, {at}"] = tiff(color, [8] * 3, 2, *strips, rows=3, **how), COLOR
            cases[f"a strip missing, {at}"] = tiff(color, [8] * 3, 2, strips[0], rows=3, **how), end
            short = tiff(color, [8] * 3, 2, strips[0], strips[1][:-24], rows=3, **how)
            cases[f"a strip short, {at}"] = short, end
    twelve = packed(GRAY.astype(int) * 4095 // 255, 12)
    cases["12 bits"] = tiff(gray, [12], 1, twelve), GRAY
    fewer = tiff(color, [8] * 3, 6, bytes(72))
    cases["uncompressed YCbCr"] = fewer, "it is a TIFF of uncompressed YCbCr with fewer colors than pixels"
    thumbnail = tiff(gray, [8], 1, GRAY.tobytes(), t254=[1], t330=[8])
    cases["a thumbnail"] = thumbnail, "its first image is a thumbnail of another one in it"
    cases["reduced, and alone"] = tiff(gray, [8], 1, GRAY.tobytes(), t254=[1]), GRAY
    return cases


def others() -> dict[str, tuple[bytes, np.ndarray | str]]:
    clear = "it is transparent everywhere"
    bgra = np.concatenate([COLOR[::-1, :, ::-1], np.zeros((6, 8, 1), np.uint8)], 2).tobytes()
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    row = np.array([[0, 1, 0, 1, 1, 1, 0, 0]], np.uint8)
    black_white, white_black = b"\0\0\0\0\xff\xff\xff\0", b"\xff\xff\xff\0\0\0\0\0"
    rows = b"".join(b"\0" + line.tobytes() for line in COLOR)
    deep = b"".join(b"\0" + (line.astype(np.uint16) * 256 + 7).astype(">u2").tobytes() for line in COLOR)
    key = struct.pack(">HHH", *(COLOR[2, 3].astype(int) * 256 + 7).tolist())
    near = struct.pack(">HHH", *(COLOR[2, 3].astype(int) * 256 + 8).tolist())
    without = COLOR.copy()
    without[2, 3] = 255
    lab = np.array([[[0, 0, 0], [255, 0, 0], [136, 81, 70]]], np.uint8)  # the last is red
    around = np.full((9, 9), 255, np.uint8)
    around[:2, :4] = GRAY
    cases: dict[str, tuple[bytes, np.ndarray | str]] = {
        "bmp 32": (bmp((8, 6), 32, bgra), COLOR),
        "bmp of 8 bits, black and white": (
            bmp((8, 1), 8, row.tobytes(), palette=black_white, colors=2),
            row * 255,
        ),
        "bmp of 8 bits, white and black": (
            bmp((8, 1), 8, row.tobytes(), palette=white_black, colors=2),
            255 - row * 255,
        ),
        "bmp of 1 bit, inverse": (
            bmp((8, 1), 1, packed(row, 1) + bytes(3), palette=white_black),
            255 - row * 255,
        ),
        "bmp short": (bmp((8, 6), 32, bgra[:-32]), "image file is truncated (0 bytes not processed)"),
        "bmp of 16 bits, odd": (
            bmp((2, 1), 16, bytes(4), masks=struct.pack("<III", 0xF00, 0xF0, 0xF), header=52, compression=3),
            "Unsupported BMP bitfields layout",
        ),
        "png 16 bits": (png((8, 6), 16, 2, deep), COLOR),
        "png 16 bits, transparent color": (png((8, 6), 16, 2, deep, chunk(b"tRNS", key)), without),
        "png 16 bits, absent color": (png((8, 6), 16, 2, deep, chunk(b"tRNS", near)), COLOR),
        "png gray 16, transparent": (
            png((2, 1), 16, 0, b"\0\1\1\1\2", chunk(b"tRNS", b"\1\1")),
            np.array([[255, 1]]),
        ),
        "png gray 16, all transparent": (png((1, 1), 16, 0, b"\0\1\1", chunk(b"tRNS", b"\1\1")), clear),
        "png rgb, all transparent": (png((1, 1), 8, 2, b"\0\1\2\3", chunk(b"tRNS", b"\0\1\0\2\0\3")), clear),
        "png without palette": (png((4, 1), 8, 3, b"\0\1\2\3\0"), "it has no palette"),
        "png short": (png((8, 6), 8, 2, rows[: 3 * 25]), "its data end before its last row"),
        "png with a black end": (
            png((8, 6), 8, 2, rows[:75] + bytes(75)),
            np.vstack([COLOR[:3], COLOR[3:] * 0]),
        ),
        "png interlaced": (png((8, 6), 8, 0, bytes(60), interlaced=1), np.zeros((6, 8))),
        "png interlaced, short": (
            png((8, 6), 8, 0, bytes(42), interlaced=1),
            "its data end before its last row",
        ),
        "gif": (gif((4, 2), GRAY.ravel()), GRAY),
        "gif of a smaller frame": (gif((4, 2), GRAY.ravel(), (9, 9)), around),
        "gif short": (gif((4, 2), GRAY.ravel()[:4]), "image file is truncated (*)"),
        "pgm of 15": (b"P5 4 2 15\n" + (GRAY // 17).tobytes(), GRAY),
        "pgm of 1,023": (
            b"P5 2 1 1023\n" + struct.pack(">HH", 1023, 512),
            np.array([[255, 128]]),
        ),
        "ppm of 1,023": (b"P6 1 1 1023\n" + struct.pack(">HHH", 1023, 512, 0), np.array([[[255, 128, 0]]])),
        "plain pgm": (b"P2 4 2 255\n" + " ".join(map(str, GRAY.ravel().tolist())).encode(), GRAY),
        "pgm short": (b"P5 4 2 15\n" + bytes(4), "not enough image data"),
        "lab": (
            tiff((3, 1), [8] * 3, 8, lab.tobytes()),
            np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0]]]),
        ),
        "jpeg of 12 bits": (
            saved(COLOR, "JPEG").replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"),
            "is a JPEG file that is damaged or of a kind that cannot be read (cannot handle 12-bit layers)",
        ),
    }
    for size in (56, 108, 124):  # the headers that have a mask of alpha
        data = bmp((8, 6), 32, bgra, masks=masks, header=size, compression=3)
        cases[f"bmp 32 whose alpha is 0, header {size}"] = data, COLOR
    for depth in (1, 2, 4):
        data = png((4, 2), depth, 0, b"".join(b"\0" + packed(line[None], depth) for line in GRAY >> 8 - depth),
                   chunk(b"tRNS", struct.pack(">H", 1)))  # fmt: skip
        levels = GRAY >> 8 - depth
        expected = np.where(levels == 1, 255, levels.astype(int) * 255 // (2**depth - 1))
        cases[f"png gray {depth}, transparent"] = data, expected
    for mode in ("LA", "RGBA"):
        nothing = Image.new(mode, (8, 8), (9,) * (len(mode) - 1) + (0,))
        for kind in ("PNG", "TIFF", "WEBP", "AVIF", "JPEG2000"):
            cases[f"{kind} {mode}, all transparent"] = saved(nothing, kind), clear
    return cases


CASES = tiffs() | others()


@pytest.mark.parametrize("name", CASES)
def test_a_kind_is_read_as_it_is_meant_or_refused_by_name(name):
    data, expected = CASES[name]
    for channels in (1, 3):
        if isinstance(expected, str):
            sentence = expected if expected.startswith("is a") else f"cannot be decoded ({expected})"
            pattern = re.escape(f"'a' {sentence}").replace(r"\*", ".*")
            with pytest.raises(DamagedImage, match=f"^{pattern}$"), picture_of(data, channels, "'a'"):
                pass
            continue
        with picture_of(data, channels, "'a'") as found:
            got = found.pixels.astype(int)
        expected = np.asarray(expected, np.uint8)
        if expected.ndim == 2:
            expected = np.stack([expected] * 3, 2)
        wanted = expected if channels == 3 else np.array(Image.fromarray(expected).convert("L"))[..., None]
        most = 5 if name == "lab" else 2 if "premultiplied" in name else 1 if "alpha" in name else 0
        assert got.shape == wanted.shape and np.abs(got - wanted).max() <= most


@pytest.mark.parametrize("kind", ["plain", "dali"])
def test_every_loader_judges_alike(tmp_path, kind):
    if kind == "dali":
        pytest.importorskip("nvidia.dali")
    cases = CASES | ends()
    names = [f"{i}.png" for i in range(len(cases))]
    for name, (data, _) in zip(names, cases.values(), strict=True):
        (tmp_path / name).write_bytes(data)
    images = file_images(
        kind, tmp_path, names, size=8, channels=3, mean=[0] * 3, std=[1] * 3, device="cpu", threads=2
    )
    for _ in images.clean_batches(torch.arange(len(names)), 32):
        pass
    bad = {i for i, (_, expected) in enumerate(cases.values()) if isinstance(expected, str)}
    assert set(images.unreadable) == bad


# --- data that end early -----------------------------------------------------------------------------------


def ends() -> dict[str, tuple[bytes, np.ndarray | str]]:
    """JPEGs whose scan ends early, with the mark of its end; and whole ones that end in the same gray."""
    early = "its data end before its last row"
    big = np.array(Image.fromarray(COLOR).resize((96, 80), Image.Resampling.BICUBIC))
    gray_end = big.copy()
    gray_end[-24:] = 128
    cases: dict[str, tuple[bytes, np.ndarray | str]] = {}
    for mode in ("RGB", "L", "CMYK"):
        for options in ({}, {"subsampling": 0}, {"restart_marker_rows": 1}):
            whole = saved(Image.fromarray(gray_end).convert(mode), "JPEG", **options)
            cases[f"JPEG {mode} {options}"] = whole, np.array(0)
            whole = saved(Image.fromarray(big).convert(mode), "JPEG", **options)
            scan = whole.index(b"\xff\xda")
            for share in (0.5, 0.9):
                cut = whole[: scan + int((len(whole) - scan) * share)].rstrip(b"\xff") + b"\xff\xd9"
                cases[f"JPEG {mode} {options} {share}"] = cut, early
    whole = saved(big, "JPEG", progressive=True)
    cases["progressive"] = whole, np.array(0)
    last = whole.rindex(b"\xff\xda")
    cases["progressive, without its last scan"] = whole[:last] + b"\xff\xd9", early
    for options in ({}, {"strip_size": 3 * 96 * 16}):
        whole = saved(gray_end, "TIFF", compression="jpeg", **options)
        cases[f"TIFF {options}"] = whole, np.array(0)
        whole = saved(big, "TIFF", compression="jpeg", **options)
        with Image.open(io.BytesIO(whole)) as opened:
            tags: dict[int, tuple[int, ...]] = dict(opened.tag_v2)  # type: ignore[attr-defined]
        start, length = tags[273][-1], tags[279][-1]
        cut = start + length * 6 // 10  # the end of the image, and then what has to be passed over
        short = whole[:cut] + b"\xff\xd9" + bytes(start + length - cut - 2) + whole[start + length :]
        cases[f"TIFF {options} short"] = short, early
    size = big.shape[1], 32
    for parts in ({"rows": 16}, {"tile": (size[0], 16)}):
        whole, low, narrow = (
            saved(Image.fromarray(part).convert("L"), "JPEG") for part in (big[:16], big[:8], big[:16, :-8])
        )
        for name, first, second in (("whole", whole, whole), ("low", low, whole), ("narrow", whole, narrow)):
            data = tiff(size, [8], 1, first, second, compression=7, **parts)
            cases[f"TIFF {parts} {name}"] = data, np.array(0) if name == "whole" else early
    return cases


@pytest.mark.parametrize("name", ends())
@pytest.mark.parametrize("at_least", [0, 1])
def test_a_jpeg_whose_data_end_early_is_damaged(tmp_path, name, at_least):
    data, expected = ends()[name]
    (tmp_path / "a").write_bytes(data)
    if isinstance(expected, str):
        with pytest.raises(DamagedImage, match=rf"\({expected}\)$"):
            read_image(tmp_path / "a", 3, at_least)
    else:
        read_image(tmp_path / "a", 3, at_least)


# --- good files that Pillow refuses ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP", b"iTXt", b"tEXt", b"after"])
def test_long_text_in_a_png_is_passed_over(kind):
    """And what tells how to turn the image is not."""
    long = {
        b"zTXt": b"a\0\0" + zlib.compress(bytes(3 << 20)),
        b"iTXt": b"a\0\1\0\0\0" + zlib.compress(bytes(3 << 20)),
        b"iCCP": b"a\0\0" + zlib.compress(bytes(3 << 20)),
        b"tEXt": b"a\0" + b"x" * (65 << 20),
    }
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'
    text = chunk(kind, long[kind]) if kind in long else chunk(b"zTXt", long[b"zTXt"])
    data = b"".join(b"\0" + line.tobytes() for line in GRAY)
    turned = chunk(b"iTXt", xmp)
    file = (
        png((4, 2), 8, 0, data, turned, after=text)
        if kind == b"after"
        else png((4, 2), 8, 0, data, turned, text)
    )
    with picture_of(file, 1, "'a'") as found:
        assert np.array_equal(found.pixels[..., 0], np.rot90(GRAY, -1))


@pytest.mark.slow
def test_a_jpeg_of_200_million_pixels_is_read_at_a_fraction(tmp_path):
    Image.fromarray(np.full((16000, 12500), 77, np.uint8)).save(tmp_path / "a.jpg")
    limit = Image.MAX_IMAGE_PIXELS
    image = read_image(tmp_path / "a.jpg", 1, 32)
    assert image.shape == (2000, 1563, 1) and (image == 77).all() and limit == Image.MAX_IMAGE_PIXELS


# --- memory ------------------------------------------------------------------------------------------------


def test_what_takes_more_than_there_is_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(image_module, "budget", Budget(1 << 20))
    (tmp_path / "a.png").write_bytes(png((4000, 4000), 8, 2, zlib.compress(b"")))
    sentence = r"cannot be decoded \(it takes \d+\.\d MiB of memory, and decoding may take 1\.0 MiB: make it smaller\)$"
    with pytest.raises(DamagedImage, match=sentence):
        read_image(tmp_path / "a.png", 3)
    Image.fromarray(np.zeros((1600, 1600, 3), np.uint8)).save(tmp_path / "a.jpg")
    with pytest.raises(DamagedImage, match=sentence):
        read_image(tmp_path / "a.jpg", 3)
    assert read_image(tmp_path / "a.jpg", 3, 100).shape == (200, 200, 3)
    with picture_of((tmp_path / "a.jpg").read_bytes(), 3, "'a'") as found:  # as a loader reads it
        assert found.pixels.shape == (200, 200, 3)
    Image.fromarray(np.zeros((1600, 1600, 3), np.uint8)).save(tmp_path / "a.jpg", progressive=True)
    with pytest.raises(
        DamagedImage, match=sentence
    ):  # whose coefficients are all held, however small it becomes
        read_image(tmp_path / "a.jpg", 3, 100)
    assert image_module.budget._held == 0


def test_threads_share_a_budget_and_none_is_passed_for_ever():
    budget, held, most, order = Budget(10), 0, 0, []
    lock = threading.Lock()

    def work(size: int, name: str) -> None:
        nonlocal held, most
        with budget.hold(size):
            with lock:
                held += size
                most = max(most, held)
                order.append(name)
            time.sleep(0.002)
            with lock:
                held -= size

    with budget.hold(4):
        large = threading.Thread(target=work, args=(10, "large"))
        large.start()
        while len(budget._waiting) < 1:
            time.sleep(0.001)
        small = [threading.Thread(target=work, args=(1 + i % 7, "small")) for i in range(30)]
        for thread in small:
            thread.start()
        time.sleep(0.02)
        assert order == [], "those that would fit wait behind the one that came first"
    for thread in [large, *small]:
        thread.join(10)
        assert not thread.is_alive()
    assert order[0] == "large" and len(order) == 31 and most == 10 and budget._held == 0
    with pytest.raises(ValueError, match=r"^it takes 11\.0"), Budget(10 << 20).hold(11 << 20):
        pass
    with budget.hold(10):
        pass


@pytest.mark.parametrize("kind", ["plain", "dali"])
def test_loaders_share_the_budget(tmp_path, monkeypatch, kind):
    """Each image takes more than half of it: they are decoded one by one, and none is lost."""
    if kind == "dali":
        pytest.importorskip("nvidia.dali")
    for module in ("image", "dali"):
        monkeypatch.setattr(f"ups_fast.data.{module}.budget", Budget(1 << 20))
    names = [f"{i}.png" for i in range(12)]
    for name in names:
        Image.effect_noise((220, 220), 60).convert("RGB").save(tmp_path / name)
    images = file_images(
        kind, tmp_path, names, size=8, channels=3, mean=[0] * 3, std=[1] * 3, device="cpu", threads=4
    )
    batches = list(images.clean_batches(torch.arange(12).repeat(4), 24))
    assert len(batches) == 2 and images.unreadable == {}


# --- what is odd to look at --------------------------------------------------------------------------------


def folder_of_odd_ones(root):
    random = np.random.default_rng(0)
    for part, n in (("labeled/a", 6), ("labeled/b", 6), ("unlabeled", 6), ("test/a", 2), ("test/b", 2)):
        (root / part).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(
                root / part / f"{i}.png"
            )
    Image.new("RGB", (16, 16), (9, 9, 9)).save(root / "labeled/a/0.png")
    Image.new("L", (16, 16), 255).save(root / "unlabeled/1.png")
    Image.new("L", (16, 16), 7).save(root / "unlabeled/2.png")
    twelve = random.integers(0, 4096, (16, 16)).astype(np.uint16)
    twelve[0, 0] = 4095
    Image.fromarray(twelve).save(root / "unlabeled/3.png")
    tiny = np.zeros((8, 8), np.uint8)  # at an eighth of its size it is one pixel
    tiny[:4] = 255
    Image.fromarray(tiny).save(root / "test/a/0.jpg")
    return scan(root)


def test_images_of_one_color_and_of_12_bits_are_counted(tmp_path):
    folder = folder_of_odd_ones(tmp_path / "data")
    plain = (
        "3 images are of a single color (1 labeled, 2 unlabeled), such as 'labeled/a/0.png': "
        "check whether they should be"
    )
    coarse = (
        "1 file has more than 8 bits a channel but no value above 4,095, such as 'unlabeled/3.png': "
        "as in a viewer they are nearly black, with at most 17 levels. Scale 12 bits up to 16 first"
    )
    cache = tmp_path / "cache"
    for _ in range(2):  # the second time most files are known
        found, damaged = check(folder, cache=cache)
        assert found.notes[-2:] == [plain, coarse] and damaged == []
    data, _ = as_image_set(folder, 8, 3)
    assert data.notes[-2:] == (plain, coarse)
    again, _ = as_image_set(found, 8, 3, keep=True)
    assert list(again.notes) == found.notes


@pytest.mark.parametrize(("kind", "color"), [("PNG", 2), ("TIFF", 2)])
def test_12_bits_of_color_are_seen_too(tmp_path, kind, color):
    deep = np.random.default_rng(0).integers(0, 4096, (6, 8, 3)).astype(np.uint16)
    rows = b"".join(b"\0" + line.astype(">u2").tobytes() for line in deep)
    data = (
        png((8, 6), 16, 2, rows) if kind == "PNG" else tiff((8, 6), [16] * 3, 2, deep.astype("<u2").tobytes())
    )
    (tmp_path / "a").write_bytes(data)
    with picture(tmp_path / "a", 3) as found:
        assert found.coarse and found.pixels.max() <= 15
    Image.fromarray(deep[..., 0] * 16).save(tmp_path / "b.png")
    with picture(tmp_path / "b.png", 1) as found:
        assert not found.coarse


def test_arrays_are_looked_at_too(tmp_path):
    random = np.random.default_rng(0)
    x = {
        name: random.integers(0, 256, (6, 5, 5), dtype=np.uint8)
        for name in ("x_labeled", "x_unlabeled", "x_test")
    }
    x["x_unlabeled"][3], x["x_test"][1:3] = 4, 200
    y = np.arange(6) % 2
    np.savez(tmp_path / "a.npz", **x, y_labeled=y, y_test=y)
    (note,) = load_set("npz", str(tmp_path / "a.npz")).notes
    assert note.startswith(
        "3 images are of a single color (1 unlabeled, 2 test), such as unlabeled image 3: "
    )
