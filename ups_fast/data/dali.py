"""Files that NVIDIA DALI decodes, on the CPU or the GPU: the fast loader of `FileImages`.

DALI decodes the box of each image and nothing else of it. Its decoders give Pillow's pixels, bit for bit, on a CPU; its
resize does not (at the border it repeats pixels that Pillow leaves out, and on a CPU it is the slower one), so torch's
scales the boxes there. docs/data.md has the bounds.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ups_fast.data.boxes import Box
from ups_fast.data.image import DamagedImage, decoding, read_bytes
from ups_fast.data.stream import NO_DALI, BoxOf, FileImages

_UNDECODABLE = (
    "Failed to decode",
    "nvImageCodec failure",
)  # what DALI says of a damaged file, among other errors
_LUMA = torch.tensor([19595, 38470, 7471], dtype=torch.int32)  # of 2^16: ITU-R 601 as Pillow has it


def size_for_dali(encoded: bytes, name: str) -> tuple[int, int] | None:
    """Height and width of the upright image if DALI decodes this file as `read_image` does, by its header alone.

    These it does, all else goes through Pillow:

    JPEG, MPO   grey or RGB. CMYK may be inverted, and a GPU has no decoder for it
    PNG         of at most 8 bits, without transparency (DALI drops alpha, here it lies on white; of 16 bits Pillow
                keeps the upper 8 in colour) and without EXIF or XMP data, which may follow the pixels
    WebP        without transparency
    any         only if the orientation is that of well-formed EXIF data: DALI knows no other place for it

    Raises DamagedImage where even the header cannot be read.
    """
    from PIL import Image

    with decoding(BytesIO(encoded), name) as image:
        width, height = image.size
        if not width or not height or "transparency" in image.info:
            return None
        if image.format == "PNG":
            turned = any(word in encoded for word in (b"eXIf", b"exif", b"XML:com.adobe.xmp"))
            upright = image.mode in ("1", "L", "P", "RGB") and encoded[24] <= 8 and not turned
            return (height, width) if upright else None
        if image.format not in ("JPEG", "MPO", "WEBP") or image.mode not in ("L", "RGB"):
            return None
        own = Image.Exif()
        try:
            own.load(image.info.get("exif", b""))
            orientation = own.get(0x112, 1)
            if orientation not in range(1, 9) or image.getexif().get(0x112, 1) != orientation:
                return None
        except Exception:  # Pillow reads such a file as if it had no EXIF data
            return None
        return (width, height) if orientation >= 5 else (height, width)


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
        # By id, of files that were opened before: height and width of the upright image, 0 if DALI is not to decode
        # it; and the number of bytes for which that is so.
        self._known = np.zeros((len(self), 3), np.int64)

    def _makers(self) -> int:
        return (
            min(2, self.threads) if self._gpu else self.threads
        )  # on a GPU one reads while the other decodes

    def _room(self, n: int) -> Tensor:
        if not self._gpu:
            return super()._room(n)
        with torch.cuda.stream(self._stream):  # its owner: what others still read there is not overwritten
            return torch.empty(n, self.size, self.size, self.channels, dtype=torch.uint8, device=self.home)

    def _fill(self, out: Tensor, ids: list[int], rows: Iterable[int], box_of: BoxOf) -> None:
        files = []
        with torch.cuda.stream(self._stream):  # does nothing for None
            for row in rows:
                if self.images is not None:
                    image = self.images[ids[row]]
                    _put(_cut(image, box_of(row, *image.shape[:2])), out[row])
                elif (found := self._opened(ids[row])) is None:
                    out[row] = torch.from_numpy(self._by_pillow(ids[row], row, box_of))
                else:
                    encoded, size = found
                    files.append(_File(row, encoded, box_of(row, *size)))
            for row, encoded, _ in self._refused(out, files):
                i = ids[row]
                self._known[i] = 0, 0, len(encoded)
                out[row] = torch.from_numpy(self._by_pillow(i, row, box_of, encoded))
                if i not in self.lost:
                    warnings.warn(f"{self._file(i)!r} is read by Pillow: DALI cannot decode it", stacklevel=2)
            if self._stream is not None:  # this thread waits, so that no other need know of the stream
                self._stream.synchronize()

    def _opened(self, i: int) -> tuple[bytes, tuple[int, int]] | None:
        """Content, height and width of a file that DALI is to decode. None: Pillow is, or will say what is wrong."""
        try:
            encoded = read_bytes(self._file(i))
            height, width, length = self._known[i].tolist()
            if length != len(encoded):
                height, width = size_for_dali(encoded, repr(self._file(i))) or (0, 0)
                self._known[i] = height, width, len(encoded)
        except DamagedImage:
            return None
        return (encoded, (height, width)) if height else None

    def _refused(self, out: Tensor, files: list[_File]) -> list[_File]:
        """Decodes the files into their rows; those that DALI cannot decode are left.

        One of them fails its whole batch: then each is tried alone, for what becomes of an image must not depend on
        its company.
        """
        if not files:
            return []
        try:
            self._decode(out, files)
            return []
        except RuntimeError as error:
            if not any(words in str(error) for words in _UNDECODABLE):
                raise
        return files if len(files) == 1 else [each for file in files for each in self._refused(out, [file])]

    def _decode(self, out: Tensor, files: list[_File]) -> None:
        """Raises RuntimeError where DALI fails; its pipeline is then not used again."""
        try:
            pipeline = self._idle.pop()
        except IndexError:
            pipeline = None
        if pipeline is None or pipeline.max_batch_size < len(files):
            pipeline = self._pipeline(len(files), scaled=self._gpu)
        start, shape = (np.array([file.box[k : k + 2] for file in files], np.int32) for k in (0, 2))
        encoded = [np.frombuffer(file.encoded, np.uint8) for file in files]
        (images,) = pipeline.run(encoded=encoded, start=start, shape=shape)
        rows = [file.row for file in files]
        if self._stream is not None:
            colours = torch.from_dlpack(images.as_tensor())
            out[rows] = colours if self.channels == 3 else _grey(colours)
            self._stream.synchronize()  # before the pipeline writes there again
        elif self.channels == 3:
            for k, row in enumerate(rows):
                _put(np.asarray(images[k]), out[row])
        else:
            colours = out.new_empty(len(rows), self.size, self.size, 3)
            for k, place in enumerate(colours):
                _put(np.asarray(images[k]), place)
            out[rows] = _grey(colours)
        self._idle.append(pipeline)

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
    box: Box


def _cut(image: np.ndarray, box: Box) -> np.ndarray:
    top, left, height, width = box
    return np.ascontiguousarray(image[top : top + height, left : left + width])


def _grey(images: Tensor) -> Tensor:  # uint8 [..., 3] to [..., 1]
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
