"""Images that stay in their files and stream into batches: the interface of both loaders, and the plain one, Pillow.

A loader turns files into uint8 [B, S, S, C], ahead of time: each thread makes a part of a batch from its files to its
pixels, and meets no other on the way. The rest of the augmentation is the same op that serves images in memory. All
that is drawn derives from seed, draw and sample id: an image is treated alike in any batch, order or process, and a run
that was stopped goes on with its next batch.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ups_fast.data.boxes import Box, box_draws, middle_box, random_box
from ups_fast.data.image import DamagedImage, picture_of, read_bytes, resize_box
from ups_fast.data.images import Draws, View
from ups_fast.machine import cores
from ups_fast.ops import augment, augment_plan, has_kernels
from ups_fast.policy import POLICIES, Policy

NO_DALI = (
    "DALI is not installed: `pip install nvidia-dali-cuda130` (or 'ups_fast[dali]'), with CUDA 12 "
    "`pip install nvidia-dali-cuda120`"
)

BoxOf = Callable[[int, int, int], Box]  # of a row of the batch, whose image has this height and width
FEWEST = 8  # images that are worth a thread


class FileImages:
    """Images as `ResidentImages` serves them, but read from their files batch by batch, in the order asked for.

    root, paths   the files, [N]; a sample id is a position in `paths`
    size          height and width of the batches, S
    channels      1 (gray) or 3 (RGB)
    mean, std     per channel, of pixels in [0, 1]; std above 0
    policy        what is done to the images of `training`, once they are [S, S, C]
    resized_crop  range of the share of the area that a training image shows, within (0, 1], scaled to [S, S] whatever
                  its shape (torchvision's RandomResizedCrop); None: training images are cut as clean ones
    resize        clean images: the shorter side becomes `resize` (such as 256 for S = 224; None: S), then the middle
                  is kept
    threads       that read and decode; None: one for each core
    prefetch      batches made ahead: prefetch + 1 of them are all that is held of files
    images        uint8 [N, H, W, C] in place of the files: then root is None and paths are empty
    unreadable          ids of files that are known to be gone, each with a sentence

    Files that are gone or damaged never stop a run: such an image is black before it is normalized, and before its
    batch is handed out `unreadable` has its id, so that nobody learns from it. Raises ValueError or TypeError that
    names the argument.
    """

    unreadable: dict[int, str]  # by sample id
    home: torch.device  # where batches are put together

    def __init__(
        self,
        root: str | Path | None,
        paths: Sequence[str],
        *,
        size: int,
        channels: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str,
        policy: Policy = POLICIES["none"],
        resized_crop: tuple[float, float] | None = None,
        resize: int | None = None,
        threads: int | None = None,
        prefetch: int = 2,
        images: Tensor | None = None,  # [N, H, W, C] uint8
        unreadable: Mapping[int, str] | None = None,
    ) -> None:
        for name, value, low in (("size", size, 1), ("resize", resize, size), ("threads", threads, 1)):
            if value is not None and value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
        if prefetch < 1:
            raise ValueError(f"prefetch must be at least 1, got {prefetch}")
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, got {channels}")
        if resized_crop is not None and not 0 < resized_crop[0] <= resized_crop[1] <= 1:
            raise ValueError(f"resized_crop must be a range within (0, 1], got {resized_crop}")
        if images is not None and (
            images.dtype != torch.uint8
            or images.dim() != 4
            or images.shape[3] != channels
            or 0 in images.shape
        ):
            got = f"{str(images.dtype)[6:]} {list(images.shape)}"
            raise ValueError(f"images must be uint8 [N, H, W, {channels}], got {got}")
        self.root, self.paths, self.images = root, paths, None if images is None else images.numpy()
        self.size, self.channels, self.policy = size, channels, policy
        self.mean, self.std, self.resized_crop = tuple(mean), tuple(std), resized_crop
        self.share = size / (resize or size)
        self.threads, self.prefetch = threads or cores(), prefetch
        self.shape: tuple[int, ...] = channels, size, size
        self.device = torch.device(device)
        self.home = self.device if has_kernels(self.device) else torch.device("cpu")
        self.unreadable = dict(unreadable or {})
        none = torch.zeros(0, dtype=torch.int64)
        self._finished(torch.zeros(0, size, size, channels, dtype=torch.uint8), none, none, 0, policy)

    def __len__(self) -> int:
        return len(self.paths) if self.images is None else len(self.images)

    def training(
        self,
        steps: Iterable[tuple[Tensor, Tensor]],  # of each step the sample ids and draws, int64 [B]
        *,
        seed: int,
        out: Tensor | None = None,  # as a batch: each is then written there, over the last one
    ) -> Iterator[Tensor]:  # each [B, C, S, S] float32, channels_last, on the device
        """A batch for each step, augmented as the policy draws from seed, draw and sample id.

        `steps` is read `prefetch` steps ahead: over the end of an epoch, too, if it has several.
        """
        for ids, draw, batch in self._decoded(steps, None, seed):
            yield self._finished(batch, ids, draw, seed, self.policy, out)

    def ahead(
        self, steps: Iterable[tuple[Tensor, Tensor]], views: Sequence[View], *, seed: int, out: Tensor
    ) -> Iterator[None]:
        """Each view of a step in its rows of the batch; the file of a sample is decoded once for all its views."""
        for ids, draw, batch in self._decoded(steps, views, seed):
            for view in views:
                rows, source = slice(view.first, view.last), view.source
                pixels = batch[source : source + view.last - view.first]
                self._finished(pixels, ids[rows], draw[rows], view.seed(seed), view.policy, out[rows])
            yield

    def read(self, index: Tensor, draw: Tensor, views: Sequence[View], *, seed: Tensor, out: Tensor) -> None:
        """Nothing: `ahead` has written the batch."""

    def _decoded(
        self, steps: Iterable[tuple[Tensor, Tensor]], views: Sequence[View] | None, seed: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Of each step the ids and draws, and the uint8 images of the views that read some; None: of all rows."""
        checked = ((self._checked("index", ids), self._checked_draw(ids, draw)) for ids, draw in steps)
        ours, theirs = itertools.tee(checked)

        def read(rows: Tensor) -> Tensor:
            if views is None:
                return rows
            return torch.cat([rows[view.first : view.last] for view in views if not view.again])

        once = ((read(ids), read(draw)) for ids, draw in theirs)
        batches = self._streamed((ids, self._drawn(ids, draw, seed)) for ids, draw in once)
        for (ids, draw), batch in zip(ours, batches, strict=True):
            yield ids, draw, batch

    def clean_batches(
        self,
        index: Tensor,  # int64 [n], sample ids
        batch_size: int,
    ) -> Iterator[
        Tensor
    ]:  # each [batch_size, C, S, S] float32, channels_last, on the device; the last may be short
        """The middle of each image, normalized: (pixel / 255 - mean) / std."""
        if index.dim() != 1 or batch_size < 1:
            raise ValueError(
                f"index must be [n] and batch_size at least 1, got {list(index.shape)}, {batch_size}"
            )
        parts = self._checked("index", index).split(batch_size)
        batches = self._streamed((ids, self._middle) for ids in parts)
        return (
            self._finished(batch, ids, ids, 0, POLICIES["none"])
            for batch, ids in zip(batches, parts, strict=True)
        )

    def drawn_batches(
        self,
        index: Tensor,  # int64 [n], sample ids
        batch_size: int,
        draws: Draws,
    ) -> Iterator[Tensor]:  # each [P * batch_size, C, S, S], on the device; the last may be short
        """The middle of each image, read once for all its passes."""
        parts = self._checked("index", index).split(batch_size)
        batches = self._streamed((ids, self._middle) for ids in parts)
        for pixels, part in zip(batches, parts, strict=True):
            ids, draw = draws.of(part)
            many = pixels.repeat(draws.passes, 1, 1, 1)
            yield self._finished(many, ids, draw, draws.seed, draws.policy)

    # --- boxes and pixels -----------------------------------------------------------------------------------

    @staticmethod
    def _checked_draw(ids: Tensor, draw: Tensor) -> Tensor:
        if ids.dim() != 1 or ids.shape != draw.shape:
            raise ValueError(f"index and draw must be [B], got {list(ids.shape)} and {list(draw.shape)}")
        return draw.to("cpu", torch.int64, copy=True)

    def _checked(self, name: str, ids: Tensor) -> Tensor:
        ids = ids.to("cpu", torch.int64, copy=True)  # read later, when the user's may have changed
        if ids.numel() and not (ids.min() >= 0 and ids.max() < len(self)):
            got = f"{ids.min()}..{ids.max()}"
            raise ValueError(f"{name} must hold sample ids of 0..{len(self) - 1}, got {got}")
        return ids

    def _middle(self, row: int, height: int, width: int) -> Box:
        return middle_box(height, width, self.share)

    def _drawn(self, ids: Tensor, draw: Tensor, seed: int) -> BoxOf:
        if self.resized_crop is None:
            return self._middle
        draws, scale = box_draws(ids.numpy(), draw.numpy(), seed), self.resized_crop
        return lambda row, height, width: random_box(draws[row], height, width, scale)

    def _finished(
        self,
        batch: Tensor,
        ids: Tensor,
        draw: Tensor,
        seed: int | Tensor,
        policy: Policy,
        out: Tensor | None = None,
    ) -> Tensor:
        """[B, S, S, C] uint8 as [B, C, S, S] float32: what the policy draws for each, normalized."""
        if batch.is_cuda:  # it was made on another stream, which must not have its memory back too early
            batch.record_stream(torch.cuda.current_stream(batch.device))
        batch, ids, draw = (x.to(self.home, non_blocking=True) for x in (batch, ids, draw))
        plan = augment_plan(ids, policy=policy, size=self.size, seed=seed, draw=draw)
        rows = torch.arange(len(ids), device=self.home)
        there = self.home == self.device
        done = augment(
            batch,
            rows,
            policy=policy,
            seed=seed,
            draw=0,
            mean=self.mean,
            std=self.std,
            plan=plan,
            out=out if there else None,
        )
        if there:
            return done
        return done.to(self.device) if out is None else out.copy_(done)

    # --- reading --------------------------------------------------------------------------------------------

    def _streamed(self, jobs: Iterable[tuple[Tensor, BoxOf]]) -> Iterator[Tensor]:
        """The uint8 batch of each job, in order, made in parts of consecutive rows, each by one thread."""
        waiting: deque[tuple[Tensor, list[Future[None]]]] = deque()
        n = self._makers()
        with ThreadPoolExecutor(n) as makers:
            try:
                for ids, box_of in jobs:
                    out, numbers, rows = self._room(len(ids)), ids.tolist(), range(len(ids))
                    part = max(FEWEST, -(-len(ids) // n))
                    parts = [rows[first : first + part] for first in rows[::part]]
                    fills = [makers.submit(self._fill, out, numbers, some, box_of) for some in parts]
                    waiting.append((out, fills))
                    if len(waiting) > self.prefetch:
                        yield self._whole(*waiting.popleft())
                while waiting:
                    yield self._whole(*waiting.popleft())
            finally:  # when the user stops early, nothing more is begun
                makers.shutdown(wait=False, cancel_futures=True)

    @staticmethod
    def _whole(out: Tensor, fills: list[Future[None]]) -> Tensor:
        for each in fills:
            each.result()
        return out

    def _makers(self) -> int:
        """Threads that make parts of batches."""
        return self.threads

    def _room(self, n: int) -> Tensor:  # [n, S, S, C] uint8
        shape, pinned = (n, self.size, self.size, self.channels), self.home.type == "cuda"
        return torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)

    def _fill(self, out: Tensor, ids: list[int], rows: Iterable[int], box_of: BoxOf) -> None:
        """Makes these rows of a batch [B, S, S, C] uint8 of the images `ids` [B]."""
        pixels = out.numpy()  # whose assignments wake no other threads, as torch's may
        for row in rows:
            pixels[row] = self._by_pillow(ids[row], row, box_of)

    def _by_pillow(
        self, i: int, row: int, box_of: BoxOf, encoded: bytes | None = None
    ) -> np.ndarray:  # [S, S, C] uint8
        """One image from its file, or from what that holds; black where it is unreadable."""
        try:
            if self.images is not None:
                image = self.images[i]
                return resize_box(image, box_of(row, *image.shape[:2]), self.size)
            name = self._file(i)
            encoded = read_bytes(name)[0] if encoded is None else encoded
            with picture_of(encoded, self.channels, repr(name)) as found:
                box = box_of(row, *found.pixels.shape[:2])
                return resize_box(found.pixels, box, self.size)
        except DamagedImage as error:
            self.unreadable[i] = str(error)
            return np.zeros((self.size, self.size, self.channels), np.uint8)

    def _file(self, i: int) -> str:
        return os.path.join(self.root or "", self.paths[i])


class PlainImages(FileImages):
    """Files decoded by Pillow, in threads: what every other loader is held against."""
