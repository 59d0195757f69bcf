"""All files of a Folder, read by threads: which are damaged, and the whole as an ImageSet."""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ups_fast.data.equal import GONE, stamp
from ups_fast.data.folder import Folder, leave_out
from ups_fast.data.image import ENOUGH, DamagedImage, picture, resize_crop
from ups_fast.data.image_set import ImageSet, moments
from ups_fast.data.looks import COARSE, PLAIN, is_plain, notes_on_looks, plain_rows
from ups_fast.data.video import Clip, read_clip
from ups_fast.files import RunFolderError, read_bytes, write_atomic, writing
from ups_fast.machine import cores, memory_bytes

Progress = Callable[[int, int], object]  # files done, files in all
SAVE_SECONDS = 20  # a check that is killed has lost no more
MOMENTS = 1000  # images of a large folder from which mean and std are taken
_HEADER = '{"ups_fast": "files that can be read"'

A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True)
class Damaged:
    path: str  # as in Folder.paths
    reason: str  # a sentence that names the file


def check(
    folder: Folder,
    *,
    cache: str | Path | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> tuple[Folder, list[Damaged]]:
    """Decodes every file once: the folder without those that cannot be read, and these.

    cache     a file that remembers the good ones by path and stamp, also when the check is
              interrupted: only others are decoded by the next check. None: nothing is remembered
    threads   None: one for each core
    progress  is called in this thread after each file

    Raises ValueError as `leave_out` does, or if `cache` is a file of something else.
    """
    good = {} if cache is None else _remembered(Path(cache))
    stamps = {path: list(stamp(_file(folder, i))) for i, path in enumerate(folder.paths)}
    stamps = {path: each for path, each in stamps.items() if tuple(each) != GONE}
    good = {path: each for path, each in good.items() if stamps.get(path) == each}
    todo = [i for i, path in enumerate(folder.paths) if path not in good]
    done, total = len(folder.paths) - len(todo), len(folder.paths)
    damaged: dict[int, str] = {}
    odd: dict[int, list[str]] = {}
    notes: list[str] = []
    saved = time.monotonic()
    if progress and done:
        progress(done, total)

    def reason(i: int) -> str | None:
        try:
            if looks := _looks(_file(folder, i)):
                odd[i] = looks
        except DamagedImage as error:
            return str(error)
        return None

    try:
        for i, why in zip(todo, in_order(reason, todo, threads), strict=True):
            path = folder.paths[i]
            if why is not None:
                damaged[i] = why
            elif path in stamps and i not in odd:  # what is odd is to be said again
                good[path] = stamps[path]
            done += 1
            if progress:
                progress(done, total)
            if cache is not None and time.monotonic() - saved > SAVE_SECONDS:
                notes, saved = _remember(Path(cache), good), time.monotonic()
    finally:
        if cache is not None and todo:
            notes = _remember(Path(cache), good)
    left = leave_out(folder, damaged)
    notes += _notes_on_looks(folder, odd)
    return replace(left, notes=left.notes + notes), _listed(folder, damaged)


def _looks(file: str) -> list[str]:
    """What is odd about an image that can be read. Raises DamagedImage."""
    with picture(file, 3, at_least=1) as found:
        looks = [COARSE] if found.coarse else []
        plain = is_plain(found.pixels)
    if plain:  # of a small JPEG an eighth of its size is a pixel or two
        with picture(file, 3, at_least=64) as found:
            looks += [PLAIN] if is_plain(found.pixels) else []
    return looks


def _notes_on_looks(folder: Folder, odd: Mapping[int, Collection[str]]) -> list[str]:
    parts = {"labeled": folder.labeled, "unlabeled": folder.unlabeled}
    parts |= {"validation": folder.val, "test": folder.test}
    places = {part: ids.tolist() for part, ids in parts.items()}
    noun = folder.listing.noun if folder.listing else "image"
    return notes_on_looks(odd, places, lambda i: repr(folder.paths[i]), noun)


def as_image_set(
    folder: Folder,
    size: int,
    channels: int,
    *,
    clip: Clip | None = None,
    keep: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> tuple[ImageSet, list[Damaged]]:
    """All images in memory, [size, size, channels] each, for sets that fit; and the files that could not be read.

    clip  what is read of video files, in place of images: [clip.most, size, size, channels] each

    keep  these become black images that are told as unreadable, and no other changes its place; else they are left out.
          Then `folder` has the notes on what images look like already

    The labeled images come first in the training set, then the unlabeled ones, last those for validation, each in the
    order of their paths. Mean and std are those of the first two.
    Needs no `check` before it. Raises ValueError as `leave_out` does, or if memory cannot hold the images.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    order = torch.cat([_training(folder), folder.test])
    images = _room(len(order), (clip.most,) if clip else (), size, channels)
    pixels, lengths = images.numpy(), torch.ones(len(order), dtype=torch.int64)

    def read(row: int, i: int) -> str | None:
        try:
            if clip:
                found_frames = read_clip(_file(folder, i), clip)
                lengths[row] = n = len(found_frames)
                pixels[row, :n], pixels[row, n:] = found_frames, found_frames[-1]
                return None
            with picture(_file(folder, i), channels, ENOUGH * size) as found:
                pixels[row] = resize_crop(found.pixels, size)
                if found.coarse:
                    odd[i] = [COARSE]
        except DamagedImage as error:
            pixels[row] = 0
            return str(error)
        return None

    damaged: dict[int, str] = {}
    odd: dict[int, list[str]] = {}
    places = order.tolist()
    reasons = in_order(lambda item: read(*item), enumerate(places), threads)
    for done, (i, why) in enumerate(zip(places, reasons, strict=True), 1):
        if why is not None:
            damaged[i] = why
        if progress:
            progress(done, len(places))
    for row in plain_rows(pixels):
        if places[row] not in damaged:
            odd.setdefault(places[row], []).append(PLAIN)
    left = folder if keep else leave_out(folder, damaged)
    notes = left.notes + ([] if keep else _notes_on_looks(folder, odd))
    if damaged and not keep:  # move up, one by one: a copy of all would need the memory twice
        for row, old in enumerate(old for old, i in enumerate(places) if i not in damaged):
            pixels[row], lengths[row] = pixels[old], lengths[old]
    n = len(left.paths) - len(left.test)
    rows = {row: damaged[i] for row, i in enumerate(places) if keep and i in damaged}
    data = _image_set(
        left,
        images[:n],
        images[n : len(left.paths)],
        moments(images[: n - len(left.val)]),
        notes=tuple(notes),
        damaged=() if keep else tuple(damaged[i] for i in sorted(damaged)),
        unreadable={row: why for row, why in rows.items() if row < n},
        test_unreadable={row - n: why for row, why in rows.items() if row >= n},
        lengths=lengths[:n] if clip else None,
        test_lengths=lengths[n : len(left.paths)] if clip else None,
    )
    return data, _listed(folder, damaged)


def as_file_set(
    folder: Folder,
    size: int,
    channels: int,
    *,
    threads: int | None = None,
) -> ImageSet:
    """Images that stay in their files, to be streamed as [size, size, channels]. `check` the folder first.

    Its order is that of `as_image_set`. Mean and std are those of MOMENTS training images, spread evenly over the set.
    """
    train = _training(folder)
    n = len(train) - len(folder.val)
    some = train[torch.linspace(0, n - 1, min(MOMENTS, n)).round().long()].tolist()

    def read(i: int) -> Tensor | None:
        try:
            with picture(_file(folder, i), channels, ENOUGH * size) as found:
                return torch.from_numpy(resize_crop(found.pixels, size))
        except DamagedImage:  # since it was checked: it does not stop the run
            return None

    found = [image for image in in_order(read, some, threads) if image is not None]
    if not found:
        raise ValueError(f"none of {len(some):,} images of {str(folder.root)!r} can be read any more")
    none = torch.empty(0, size, size, channels, dtype=torch.uint8)
    return _image_set(
        folder, none, none, moments(torch.stack(found)), notes=tuple(folder.notes), in_files=True
    )


def _image_set(
    folder: Folder,
    train_images: Tensor,
    test_images: Tensor,
    mean_and_std: tuple[tuple[float, ...], tuple[float, ...]],
    **more: Any,
) -> ImageSet:
    train, n_val = _training(folder), len(folder.val)
    return ImageSet(
        "folder",
        folder.classes,
        train_images,
        folder.label[train],
        test_images,
        folder.label[folder.test],
        *mean_and_std,
        labeled=torch.arange(len(folder.labeled)),
        val=torch.arange(len(train) - n_val, len(train)) if n_val else None,
        names=[folder.paths[i] for i in train.tolist()],
        test_names=[folder.paths[i] for i in folder.test.tolist()],
        root=str(folder.root),
        **more,
    )


def _training(folder: Folder) -> Tensor:  # int64 [N]
    """The places of the training set's images, in its order."""
    return torch.cat([folder.labeled, folder.unlabeled, folder.val])


def _room(
    n: int, frames: tuple[int, ...], size: int, channels: int
) -> Tensor:  # [n, *frames, size, size, channels]
    needed = n * math.prod(frames) * size * size * channels
    memory = memory_bytes()
    if needed > memory:
        noun = "clips" if frames else "images"
        raise ValueError(
            f"{n:,} {noun} of size={size} and channels={channels} take {needed / 2**30:,.0f} GiB, this machine has "
            f"{memory / 2**30:,.0f}: choose a smaller size"
        )
    return torch.empty(n, *frames, size, size, channels, dtype=torch.uint8)


def _file(folder: Folder, i: int) -> str:
    return os.path.join(folder.root, folder.paths[i])


def _listed(folder: Folder, damaged: dict[int, str]) -> list[Damaged]:
    return [Damaged(folder.paths[i], damaged[i]) for i in sorted(damaged)]


def in_order(function: Callable[[A], B], items: Iterable[A], threads: int | None) -> Iterator[B]:
    """function(item) of each item, in order; only a few are under way or waiting, however many there are.

    threads  at least 1; None: one for each core
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    threads = threads or cores()
    waiting: deque[Future[B]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 8 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


# --- what is remembered of files ----------------------------------------------------------------------------


def _remembered(cache: Path) -> dict[str, list[int]]:
    """What an earlier check wrote. A file that is cut short counts as empty, a foreign one is never overwritten."""
    try:
        text = read_bytes(cache).decode(errors="replace")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ValueError(f"cache {str(cache)!r} cannot be read ({error.strerror})") from error
    if text and not text.startswith(_HEADER):
        raise ValueError(f"cache must be a new file or one that a check wrote, got {str(cache)!r}")
    try:
        files = json.loads(text)["files"]
    except (ValueError, KeyError, RecursionError):
        return {}
    return files if isinstance(files, dict) else {}


def _remember(cache: Path, good: dict[str, list[int]]) -> list[str]:
    """Replaces the file as a whole. Where it cannot be written, a note says so: the check itself is good."""
    try:
        with writing(cache):
            cache.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(cache, f'{_HEADER}, "files": {json.dumps(good)}}}\n'.encode("ascii"))
    except RunFolderError as error:
        return [f"{error}: the next check begins anew"]
    return []
