"""Files that NVIDIA DALI decodes, on the CPU or the GPU: the fast loader of `FileImages`.

DALI decodes the box of each image and nothing else of it. Its decoders give Pillow's pixels, bit for bit, on a CPU; its
resize does not (at the border it repeats pixels that Pillow leaves out, and on a CPU it is the slower one), so torch's
scales the boxes there. docs/data.md has the bounds.
"""

from __future__ import annotations

import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ups_fast.data.boxes import Box
from ups_fast.data.image import DamagedImage, decode_image, decoding, resize_box
from ups_fast.data.stream import NO_DALI, BoxOf, FileImages, Sample

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
    """Files decoded by DALI: on a CPU in `threads`, on a GPU there (JPEG) or on its host.

    With `images=` there is nothing to decode; they take the rest of the same way. Raises ImportError that says what
    to install.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        try:
            import nvidia.dali.experimental.dynamic as dynamic
            from nvidia.dali import types
        except ImportError as error:
            raise ImportError(NO_DALI) from error
        self._dali: Any = dynamic
        self._types: Any = types
        self._gpu = self.home.type == "cuda"
        place, self._stream = None, None
        if self._gpu:
            place = torch.cuda.current_device() if self.home.index is None else self.home.index
            self._stream = torch.cuda.Stream(self.home)
        # Said everywhere: where there is a GPU, DALI would choose it, for a loader on the CPU too.
        self._place: Any = dynamic.Device("cpu") if place is None else dynamic.Device("gpu", place)
        with self._place:
            pool = dynamic.ThreadPool(self.threads, device_id=place)
            self._context = dynamic.EvalContext(device_id=place, cuda_stream=self._stream, thread_pool=pool)
        self._in_use = Lock()  # a context serves one thread at a time, but two iterators may be read at once
        self._strange: set[int] = set()  # ids of files that DALI cannot decode, whatever their header says
        self._workers = ThreadPoolExecutor(self.threads)  # that scale, on a CPU

    def _opened(self, i: int, content: bytes | np.ndarray, row: int, box_of: BoxOf) -> Sample:
        if isinstance(content, np.ndarray):
            return Sample(i, None, b"", box_of(row, *content.shape[:2]))
        size = None if i in self._strange else size_for_dali(content, repr(self._file(i)))
        if size is None:
            return super()._opened(i, content, row, box_of)
        return Sample(i, None, content, box_of(row, *size))

    def _made(self, reads: list[Future[Sample]]) -> Tensor:  # [B, S, S, C] uint8, on a GPU there
        samples = [read.result() for read in reads]
        rows = [row for row, sample in enumerate(samples) if sample.pixels is None]
        shape = (len(samples), self.size, self.size, self.channels)
        out = torch.empty(shape, dtype=torch.uint8, device=self.home)
        with torch.cuda.stream(self._stream):  # does nothing for None
            found = self._found([samples[row] for row in rows])
            for row, image in zip(rows, found, strict=True):
                if image is None:
                    samples[row] = self._by_pillow(samples[row])
            there = [(out[row], image) for row, image in zip(rows, found, strict=True) if image is not None]
            if self._gpu:
                for place, image in there:
                    place.copy_(self._in_channels(image))
            else:
                list(self._workers.map(lambda pair: self._put(*pair), there))
            for row, sample in enumerate(samples):
                if sample.pixels is not None:
                    out[row] = torch.from_numpy(sample.pixels)
            if self._stream is not None:  # this thread waits, so that no other need know of the stream
                self._stream.synchronize()
        return out

    def _found(self, samples: list[Sample]) -> list[Tensor | None]:  # as of `_decoded`, None: not decodable
        """One file that DALI cannot decode fails its whole batch: then each is tried alone, for what becomes of an
        image must not depend on its company."""
        if not samples:
            return []
        try:
            return [*self._decoded(samples)]
        except RuntimeError as error:
            if not any(words in str(error) for words in _UNDECODABLE):
                raise
            return [None] if len(samples) == 1 else [self._found([sample])[0] for sample in samples]

    def _decoded(self, samples: list[Sample]) -> list[Tensor]:  # uint8 [h, w, 1 or 3]
        """The boxes, on a GPU already scaled. Raises RuntimeError where DALI fails."""
        if self.images is not None:
            cuts = [_cut(self.images[sample.id], sample.box) for sample in samples]
            if not self._gpu:
                return [torch.from_numpy(cut) for cut in cuts]
            with self._in_use, self._place, self._context:
                return list(self._scaled(self._dali.as_batch(cuts, layout="HWC")))
        corner, extent = (np.array([s.box[k : k + 2] for s in samples], np.int32) for k in (0, 2))
        with self._in_use, self._place, self._context:
            images = self._dali.decoders.image_slice(
                self._dali.as_batch([np.frombuffer(sample.encoded, np.uint8) for sample in samples]),
                start=self._dali.as_batch(corner),
                shape=self._dali.as_batch(extent),
                axis_names="HW",
                output_type=self._types.RGB,
                device=self._place.device_type,
                **({"jpeg_fancy_upsampling": True} if self._gpu else {}),  # as on a CPU
            ).evaluate()
            if self._gpu:
                return list(self._scaled(images))
            return [torch.from_numpy(np.asarray(image)) for image in images.tensors]

    def _scaled(self, images: Any) -> Tensor:  # [B, S, S, 1 or 3] uint8
        """By DALI: on a GPU one call for all, whatever their sizes."""
        if self._gpu:
            images = images.to_device(self._place)
        linear, size = self._types.INTERP_LINEAR, [self.size, self.size]
        return self._dali.resize(images, size=size, interp_type=linear, antialias=True).torch()

    def _put(self, place: Tensor, image: Tensor) -> None:  # [S, S, C] and [h, w, 1 or 3], uint8 on the CPU
        """Scales the image where it must be, and into its place."""
        if image.shape[:2] != place.shape[:2]:
            box = image
            image = place if box.shape[2] == self.channels else box.new_empty(*place.shape[:2], 3)
            _scale_into(box.permute(2, 0, 1)[None], image.permute(2, 0, 1)[None])
        if image is not place:  # numpy copies: torch would wake all its threads for each image
            np.copyto(place.numpy(), self._in_channels(image).numpy())

    def _in_channels(self, image: Tensor) -> Tensor:  # [..., 1 or 3] to [..., C]
        if image.shape[-1] == self.channels:
            return image
        return ((image.int() * _LUMA.to(image.device)).sum(-1, keepdim=True) + (1 << 15) >> 16).byte()

    def _by_pillow(self, sample: Sample) -> Sample:
        """A file that only Pillow may be able to decode, and so it does from now on."""
        self._strange.add(sample.id)
        try:
            image = decode_image(sample.encoded, self.channels, repr(self._file(sample.id)))
        except DamagedImage as error:
            return self._missed(sample.id, error)
        warnings.warn(f"{self._file(sample.id)!r} is read by Pillow: DALI cannot decode it", stacklevel=2)
        return Sample(sample.id, resize_box(image, sample.box, self.size))


def _cut(image: np.ndarray, box: Box) -> np.ndarray:
    top, left, height, width = box
    return np.ascontiguousarray(image[top : top + height, left : left + width])


def _scale_into(image: Tensor, place: Tensor) -> None:  # uint8 [1, C, h, w] and [1, C, S, S], channels last
    """Bilinear and antialiased, as `interpolate` does it, but without its copies: they take longer than the scaling."""
    size = list(place.shape[2:])
    torch.ops.aten._upsample_bilinear2d_aa.out(image, size, False, None, None, out=place)
