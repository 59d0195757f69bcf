"""Files that NVIDIA DALI decodes, on the CPU or the GPU: the fast loader of `FileImages`.

DALI decodes the box of each image and nothing else of it. Its decoders give Pillow's pixels, bit for bit, on a CPU; its
resize does not (at the border it repeats pixels that Pillow leaves out, and on a CPU it is the slower one), so torch's
scales the boxes there. docs/data.md has the bounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ups_fast.data.boxes import Box
from ups_fast.data.image import DamagedImage, decoding, read_bytes
from ups_fast.data.memory import budget
from ups_fast.data.pieces import GRAY, jpeg_ends_early, lacks_scans
from ups_fast.data.stream import NO_DALI, BoxOf, FileImages

_LUMA = torch.tensor([19595, 38470, 7471], dtype=torch.int32)  # of 2^16: ITU-R 601 as Pillow has it
_FLIPPED, _MIRRORED = (3, 4, 7, 8), (2, 3, 6, 7)  # orientations: rows in reverse, columns in reverse
_MOST_BYTES = 64 << 20  # of decoded boxes that a pipeline holds at once on a CPU
_LARGEST = 256 << 20  # bytes of an image: a pipeline keeps its memory, so that larger ones go through Pillow
_PEAK = 3  # times the image's bytes that decoding takes: the coefficients of a progressive JPEG have 16 bits


class Header(NamedTuple):
    """Of a file that DALI decodes as `read_image` does."""

    height: int  # of the upright image
    width: int
    orientation: int  # as in EXIF: how the image in the file has to be turned


def header_for_dali(encoded: bytes, name: str) -> Header | None:
    """The header of a file for DALI. These files it decodes, all else goes through Pillow:

    JPEG, MPO   gray or RGB, with all scans. CMYK may be inverted, and a GPU has no decoder for it
    PNG         of at most 8 bits, without transparency (DALI drops alpha, here it lies on white; of 16 bits Pillow
                keeps the upper 8 in color) and without EXIF or XMP data, which may follow the pixels
    WebP        without transparency

    None of them is larger than 256 MiB when it is decoded.

    Raises DamagedImage where even the header cannot be read.
    """
    with decoding(BytesIO(encoded), name) as image:
        width, height = image.size
        if not width or not height or "transparency" in image.info or 3 * width * height > _LARGEST:
            return None
        if image.format == "PNG":
            turned = any(word in encoded for word in (b"eXIf", b"exif", b"XML:com.adobe.xmp"))
            plain = image.mode in ("1", "L", "P", "RGB") and encoded[24] <= 8 and not turned
            return Header(height, width, 1) if plain else None
        if image.format not in ("JPEG", "MPO", "WEBP") or image.mode not in ("L", "RGB"):
            return None
        if image.info.get("progressive") and lacks_scans(encoded):
            return None
        orientation = 1
        with suppress(Exception):  # Pillow reads a file with broken EXIF data as if it had none
            orientation = image.getexif().get(0x112, 1)
        if orientation not in range(2, 9):
            orientation = 1
        return Header(width, height, orientation) if orientation >= 5 else Header(height, width, orientation)


class DaliImages(FileImages):
    """Files decoded by DALI: on a CPU by a pipeline for each thread, on a GPU there (JPEG) or on its host.

    With `images=` there is nothing to decode; they take the rest of the same way. Raises ImportError that says what
    to install.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        try:
            import nvidia.dali
        except ImportError as error:
            raise ImportError(NO_DALI) from error
        self._dali: Any = nvidia.dali
        self._gpu = self.home.type == "cuda" and self.images is None
        self._stream = torch.cuda.Stream(self.home) if self._gpu else None
        self._idle: list[Any] = []  # pipelines that no thread uses
        # By id, of files that were opened before: the header, all 0 if DALI is not to decode it; and the file's time
        # of change in ns and number of bytes, for which that is so.
        self._known = np.zeros((len(self), 5), np.int64)

    def _makers(self) -> int:
        most = 2 if self._gpu else self.threads  # on a GPU one reads while the other decodes
        return min(most, self.threads)

    def _room(self, n: int) -> Tensor:
        if not self._gpu:
            return super()._room(n)
        with torch.cuda.stream(self._stream):  # its owner: what others still read there is not overwritten
            return torch.empty(n, self.size, self.size, self.channels, dtype=torch.uint8, device=self.home)

    def _fill(self, out: Tensor, ids: list[int], rows: Iterable[int], box_of: BoxOf) -> None:
        files: list[_File] = []
        with torch.cuda.stream(self._stream):  # does nothing for None
            for row in rows:
                if self.images is not None:
                    image = self.images[ids[row]]
                    _put(_cut(image, box_of(row, *image.shape[:2])), out[row])
                elif (found := self._opened(ids[row])) is None:
                    out[row] = torch.from_numpy(self._by_pillow(ids[row], row, box_of))
                else:
                    encoded, header = found
                    files.append(_File(row, encoded, header, box_of(row, header.height, header.width)))
            for part in _parts(files, 16 * _MOST_BYTES if self._gpu else _MOST_BYTES):
                with budget.hold(min(_bytes_of(part, self.threads if self._gpu else 1), budget.total)):
                    refused = self._refused(out, part)
                for file in refused:
                    i = ids[file.row]
                    self._known[i, :3] = 0
                    out[file.row] = torch.from_numpy(self._by_pillow(i, file.row, box_of, file.encoded))
            if self._stream is not None:  # this thread waits, so that no other need know of the stream
                self._stream.synchronize()

    def _opened(self, i: int) -> tuple[bytes, Header] | None:
        """Content and header of a file that DALI is to decode. None: Pillow is, or will say what is wrong."""
        try:
            encoded, changed = read_bytes(self._file(i))
            *header, then, length = self._known[i].tolist()
            if (then, length) != (changed, len(encoded)):
                header = header_for_dali(encoded, repr(self._file(i))) or (0, 0, 0)
                self._known[i] = *header, changed, len(encoded)
        except DamagedImage:
            return None
        return (encoded, Header(*header)) if header[0] else None

    def _refused(self, out: Tensor, files: list[_File]) -> list[_File]:
        """Decodes the files into their rows. Those that DALI cannot decode are left for Pillow, which may; and those
        whose data end early, for it to say so.

        One that fails, fails its whole batch: then each is tried alone, for what becomes of an image must not depend
        on its company.
        """
        if not files:
            return []
        try:
            return [file for file in self._decode(out, files) if jpeg_ends_early(file.encoded)]
        except RuntimeError:
            if len(files) == 1:
                return files
        return [each for file in files for each in self._refused(out, [file])]

    def _decode(self, out: Tensor, files: list[_File]) -> list[_File]:
        """Returns the JPEGs whose box ends in the gray that they have where their data end early.

        Raises RuntimeError where DALI fails; its pipeline is then not used again.
        """
        try:
            pipeline = self._idle.pop()
        except IndexError:
            pipeline = None
        if pipeline is None or pipeline.max_batch_size < len(files):
            pipeline = self._pipeline(len(files), scaled=self._gpu)
        boxes = [_box_in_file(file) for file in files]
        start, shape = (np.array([box[k : k + 2] for box in boxes], np.int32) for k in (0, 2))
        encoded = [np.frombuffer(file.encoded, np.uint8) for file in files]
        (images,) = pipeline.run(encoded=encoded, start=start, shape=shape)
        places = [out[file.row] for file in files]
        if self._stream is not None:
            colors = torch.from_dlpack(images.as_tensor())
            last = colors[:, -1, -1].tolist()
            for place, image in zip(places, colors if self.channels == 3 else _gray(colors), strict=True):
                place.copy_(image)
        else:
            decoded = [np.asarray(images[k]) for k in range(len(files))]
            last = [box[-1, -1].tolist() for box in decoded]
            colored = (
                places if self.channels == 3 else list(out.new_empty(len(files), self.size, self.size, 3))
            )
            for box, place in zip(decoded, colored, strict=True):
                _put(box, place)
            if self.channels == 1:
                for place, image in zip(places, _gray(torch.stack(colored)), strict=True):
                    np.copyto(place.numpy(), image.numpy())
        for file, place in zip(files, places, strict=True):
            if file.header.orientation > 1:
                place.copy_(_upright(place, file.header.orientation))
        if self._stream is not None:
            self._stream.synchronize()  # before the pipeline writes there again
        self._idle.append(pipeline)
        return [
            file
            for file, pixel in zip(files, last, strict=True)
            if file.encoded[:1] == b"\xff" and all(abs(value - 128) <= GRAY for value in pixel)
        ]

    def _pipeline(self, batch_size: int, scaled: bool) -> Any:
        """From files to boxes [h, w, 3], or to [S, S, 3]: on a GPU one call for all, whatever their size."""
        place, threads = None, 1
        if self._gpu:
            place = torch.cuda.current_device() if self.home.index is None else self.home.index
            threads = max(1, self.threads // self._makers())
        fn, types = self._dali.fn, self._dali.types
        pipeline = self._dali.Pipeline(
            batch_size, threads, place, prefetch_queue_depth=1, exec_pipelined=False, exec_async=False
        )
        with pipeline:
            images = fn.decoders.image_slice(
                fn.external_source(name="encoded", no_copy=True),
                start=fn.external_source(name="start"),
                shape=fn.external_source(name="shape"),
                axis_names="HW",
                output_type=types.RGB,
                adjust_orientation=False,  # DALI reads another one than Pillow of some files
                device="mixed" if self._gpu else "cpu",
                **({"jpeg_fancy_upsampling": True} if self._gpu else {}),  # as on a CPU
            )
            if scaled:
                size, linear = [self.size, self.size], types.INTERP_LINEAR
                images = fn.resize(images, size=size, interp_type=linear, antialias=True)
            pipeline.set_outputs(images)
        pipeline.build()
        return pipeline


class _File(NamedTuple):
    row: int
    encoded: bytes
    header: Header
    box: Box  # of the upright image


def _parts(files: list[_File], most: int) -> Iterator[list[_File]]:
    """The files in parts whose boxes take at most so many bytes, or of one file."""
    part: list[_File] = []
    size = 0
    for file in files:
        bytes_of = 3 * file.box[2] * file.box[3]
        if part and size + bytes_of > most:
            yield part
            part, size = [], 0
        part.append(file)
        size += bytes_of
    yield part


def _bytes_of(files: list[_File], at_once: int) -> int:
    """What decoding the boxes takes, of which so many are decoded at the same time."""
    whole = max((3 * file.header.height * file.header.width for file in files), default=0)
    return sum(3 * file.box[2] * file.box[3] for file in files) + _PEAK * whole * at_once


def _box_in_file(file: _File) -> Box:
    """The box of the image as it lies in the file: `_upright` backwards."""
    (top, left, h, w), (height, width, orientation) = file.box, file.header
    if orientation in _FLIPPED:
        top = height - top - h
    if orientation in _MIRRORED:
        left = width - left - w
    return (left, top, w, h) if orientation >= 5 else (top, left, h, w)


def _upright(image: Tensor, orientation: int) -> Tensor:  # [S, S, C]
    """A copy, turned as EXIF's orientation says: transposed from 5 on, then flipped and mirrored."""
    image = image.transpose(0, 1) if orientation >= 5 else image
    return image.flip([axis for axis, some in enumerate((_FLIPPED, _MIRRORED)) if orientation in some])


def _cut(image: np.ndarray, box: Box) -> np.ndarray:
    top, left, height, width = box
    return np.ascontiguousarray(image[top : top + height, left : left + width])


def _gray(images: Tensor) -> Tensor:  # uint8 [..., 3] to [..., 1]
    return ((images.int() * _LUMA.to(images.device)).sum(-1, keepdim=True) + (1 << 15) >> 16).byte()


def _put(image: np.ndarray, place: Tensor) -> None:  # [h, w, C] and [S, S, C], uint8 on the CPU
    """Scales the image where it must be, and into its place."""
    if image.shape == place.shape:
        np.copyto(place.numpy(), image)  # by numpy: torch would wake all its threads for each image
    else:
        _scale_into(torch.from_numpy(image).permute(2, 0, 1)[None], place.permute(2, 0, 1)[None])


def _scale_into(image: Tensor, place: Tensor) -> None:  # uint8 [1, C, h, w] and [1, C, S, S], channels last
    """Bilinear and antialiased, as `interpolate` does it, but without its copies: they take longer than the scaling."""
    size = list(place.shape[2:])
    torch.ops.aten._upsample_bilinear2d_aa.out(image, size, False, None, None, out=place)
