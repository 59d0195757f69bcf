"""One video file, decoded by PyAV: any kind that its FFmpeg knows becomes uint8 [F, S, S, C], or DamagedImage."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ups_fast.data.image import DamagedImage, resize_crop
from ups_fast.data.memory import budget
from ups_fast.words import line_of, many

SUFFIXES = frozenset(
    f".{kind}" for kind in ["mp4", "m4v", "mov", "avi", "mkv", "webm", "gif", "mpg", "mpeg", "wmv"]
)
# A file is what its content says, but only of these kinds: playlists, for one, would open other files.
_FORMATS = "mov,matroska,webm,avi,gif,mpeg,mpegvideo,asf"
NO_PYAV = "PyAV is not installed, which decodes video files: pip install av, or ups_fast[video]"
_ENOUGH = 0.9  # share of the frames that a file claims to have: one with fewer was cut off
_HELD = 32  # bytes a pixel that a decoder holds: some frames that others are made from, and one in RGB
_DEEP = 1 << 16  # pixels of a side


class Clip(NamedTuple):
    """What is read of a file: every `stride`-th frame, of these at most `most` from its middle, in squares."""

    most: int
    stride: int
    size: int
    channels: int  # 1 or 3


KEPT = (
    4  # times as many frames as a network gets are kept of a file, so that training can draw where they start
)


def clip_of(frames: int, stride: int, size: int, channels: int) -> Clip:
    """What is read of a file for a network that gets so many frames."""
    return Clip(KEPT * frames, stride, size, channels)


def check_installed() -> None:
    """Raises ValueError with one sentence where PyAV is missing."""
    if find_spec("av") is None:
        raise ValueError(NO_PYAV)


def read_clip(path: str | Path, clip: Clip) -> np.ndarray:  # uint8 [F, size, size, C], F = 1 .. clip.most
    """The middle of a file's first video, frame by frame as `resize_crop` makes it, turned as a phone held it.

    Frames are counted, not timed: a file of another rate plays at another speed. The sound is not read.

    Raises DamagedImage for whatever is wrong with the file: it is gone, has no video, was cut off, has a damaged frame,
    or takes more memory than `ups_fast.data.memory` gives.
    """
    name = repr(str(path))
    with _errors(name):
        with _opened(path, name) as container:
            total = _count(container, name)
        kept = -(-total // clip.stride)
        first = max(0, kept - clip.most) // 2
        wanted = range(first * clip.stride, total, clip.stride)[: clip.most]
        with _opened(path, name) as container:
            context = _video(container, name).codec_context
            width, height = context.width, context.height
            if not (0 < width <= _DEEP and 0 < height <= _DEEP):
                raise DamagedImage(f"{name} has frames of {width}x{height} pixels")
            with budget.hold(width * height * _HELD):
                frames = list(_frames(container, name, wanted, clip))
    if len(frames) < max(1, _ENOUGH * len(wanted)):
        raise DamagedImage(
            f"{name} ends early: {len(frames):,} of {many(len(wanted), 'frame')} can be decoded"
        )
    return np.stack(frames)


@contextmanager
def _errors(name: str) -> Iterator[None]:
    try:
        yield
    except DamagedImage:
        raise
    except Exception as error:  # whatever a stranger's bytes may cause
        why = getattr(error, "strerror", None) or line_of(error)
        raise DamagedImage(f"{name} cannot be decoded ({why})") from error


@contextmanager
def _opened(path: str | Path, name: str) -> Iterator[Any]:
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise DamagedImage(f"{name} cannot be opened ({why})") from error
    if not stat.S_ISREG(status.st_mode):  # to open a pipe could wait for ever
        raise DamagedImage(f"{name} is not a file")
    if not status.st_size:
        raise DamagedImage(f"{name} is empty")
    try:
        import av
    except ImportError as error:
        raise ValueError(NO_PYAV) from error
    # PyAV gets no name: FFmpeg would take some names for addresses.
    with open(path, "rb") as file, av.open(file, options={"format_whitelist": _FORMATS}) as container:
        if container.format.name == "gif" and not _ends_as_gif(path):
            raise DamagedImage(f"{name} ends early")
        yield container


def _ends_as_gif(path: str | Path) -> bool:
    """FFmpeg takes a GIF that was cut off for a shorter one."""
    with open(path, "rb") as file:
        file.seek(-min(1024, os.path.getsize(path)), os.SEEK_END)
        return file.read().rstrip(b"\0").endswith(b";")


def _video(container: Any, name: str) -> Any:
    """The first stream of moving pictures; the cover of a song is none."""
    streams = [each for each in container.streams.video if not _is_cover(each)]
    if not streams:
        raise DamagedImage(f"{name} has no video{', only sound' if container.streams.audio else ''}")
    stream = streams[0]
    stream.codec_context.thread_count = 1  # files are read side by side
    return stream


def _is_cover(stream: Any) -> bool:
    return bool(stream.disposition & stream.disposition.__class__.attached_pic)


def _count(container: Any, name: str) -> int:
    """How many frames the video has, without decoding them. DamagedImage where its header claims more."""
    stream = _video(container, name)
    count, end = 0, 0.0
    for packet in container.demux(stream):
        if packet.size:
            count += 1
            at = packet.dts if packet.pts is None else packet.pts
            if at is not None:
                end = max(end, float((at + (packet.duration or 0)) * packet.time_base))
    claimed = stream.frames
    long = float((stream.duration or 0) * stream.time_base) or (container.duration or 0) / 1e6
    first = float((container.start_time or 0) / 1e6)
    early = end - first < _ENOUGH * long
    if count < _ENOUGH * claimed and (early or not long):  # an .avi may count frames that were never taken
        raise DamagedImage(f"{name} ends early: it has {count:,} of {many(claimed, 'frame')}")
    if not claimed and early and not container.streams.audio:  # such as of .webm; sound may be longer
        raise DamagedImage(f"{name} ends early: it has {end - first:.1f} of {long:.1f} seconds")
    if not count:
        raise DamagedImage(f"{name} has a video without frames")
    return count


def _frames(container: Any, name: str, wanted: range, clip: Clip) -> Iterator[np.ndarray]:
    stream = _video(container, name)
    for i, frame in enumerate(container.decode(stream)):
        if i in wanted:
            if frame.is_corrupt:
                raise DamagedImage(f"{name} is damaged in frame {i:,}")
            yield _pixels(frame, clip)
        if i >= wanted[-1]:
            return


def _pixels(frame: Any, clip: Clip) -> np.ndarray:  # uint8 [size, size, C]
    """As in a viewer: upright, what is transparent on white. Gray by the luma of ITU-R 601, as of images."""
    from PIL import Image

    if any(part.is_alpha for part in frame.format.components):
        clear = Image.fromarray(frame.to_ndarray(format="rgba"))
        image = Image.new("RGBA", clear.size, "white")
        image.alpha_composite(clear)
        image = image.convert("RGB")
    else:
        image = Image.fromarray(frame.to_ndarray(format="rgb24"))
    if clip.channels == 1:
        image = image.convert("L")
    pixels = np.asarray(image).reshape(image.height, image.width, clip.channels)
    return resize_crop(np.rot90(pixels, round(frame.rotation / 90) % 4), clip.size)
