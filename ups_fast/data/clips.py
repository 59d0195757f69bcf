"""Clips, which are images one after the other: kept on the device, and augmented as one image is.

A batch of clips [B, C, T, H, W] in channels_last_3d lies in memory as B * T images in channels_last. So the op that
augments images writes it as it is: all frames of a clip get the draws of one image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ups_fast.data.features import drawn_views
from ups_fast.data.image_set import ImageSet
from ups_fast.data.images import Draws, View
from ups_fast.data.resident import Resident
from ups_fast.ops import augment, augment_plan
from ups_fast.policy import POLICIES, AugmentPlan, Policy
from ups_fast.reference import dropout_keys
from ups_fast.words import many


class ResidentClips(Resident):
    """A training or test set of clips on its device, read by index.

    clips   uint8 [N, F, H, W, C], C = 1 or 3
    frames  that a network gets of a clip, T: each of `stride` frames one. A clip in a training batch starts at a frame
            that its sample id draws; a clean one shows the middle
    lengths int64 [N], how many frames of each clip are its own; None: all of them
    policy  what is done to training clips, to all frames of one alike

    See `Images` for the rest. Raises ValueError or TypeError that names the argument.

    >>> clips = torch.zeros(3, 10, 16, 16, 1, dtype=torch.uint8)
    >>> images = ResidentClips(clips, frames=4, stride=2, mean=[0.5], std=[0.5], device="cpu")
    >>> images.clean(torch.tensor([2, 0])).shape
    torch.Size([2, 1, 4, 16, 16])
    """

    def __init__(
        self,
        clips: Tensor,  # [N, F, H, W, C] uint8
        *,
        frames: int,
        stride: int = 1,
        lengths: Tensor | None = None,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str,
        policy: Policy = POLICIES["none"],
        unreadable: Mapping[int, str] | None = None,
    ) -> None:
        if clips.dim() != 5:
            raise ValueError(f"clips must be uint8 [N, F, H, W, C], got {list(clips.shape)}")
        self._n, self._held = clips.shape[:2]
        needed = span(frames, stride)
        if min(frames, stride) < 1 or needed > self._held:
            raise ValueError(
                f"frames and stride must be at least 1 and fit into the {self._held} frames of a clip, got {frames} "
                f"and {stride}"
            )
        super().__init__(clips.flatten(0, 1), mean, std, device, policy, unreadable)
        home, (height, width, channels) = self.images.device, self.images.shape[1:]
        self.shape = channels, frames, height, width
        own = torch.full((self._n,), self._held) if lengths is None else lengths
        self._starts = (own - needed + 1).clamp(min=1).to(home)  # [N], how many there are to draw from
        self._offsets = torch.arange(0, frames * stride, stride, device=home)
        nothing = torch.zeros(0, dtype=torch.int64, device=home)
        self._read(nothing, nothing, policy, 0, 0)  # what is wrong with the arguments is said now
        self._outlive(policy)

    def __len__(self) -> int:
        return self._n

    def clean(
        self,
        index: Tensor,  # [B] int64, on the device
    ) -> Tensor:  # [B, C, T, H, W] float32, channels_last_3d
        """The middle of each clip, normalized: (pixel / 255 - mean) / std."""
        index = index.to(self.images.device)
        return self._read(index, self._middle(index), POLICIES["none"], 0, 0)

    def drawn_batches(self, index: Tensor, batch_size: int, draws: Draws) -> Iterator[Tensor]:
        """The middle of each clip."""
        for ids, draw in map(draws.of, index.to(self.images.device).split(batch_size)):
            yield self._read(ids, self._middle(ids), draws.policy, draws.seed, draw)

    def read(self, index: Tensor, draw: Tensor, views: Sequence[View], *, seed: Tensor, out: Tensor) -> None:
        """Draws a start and an augmentation for each clip of each view, into its rows of the batch."""
        for view in views:
            rows = slice(view.first, view.last)
            self._outlive(view.policy)
            home = self.images.device
            own = view.seed(seed.to(home))
            place, drawn = index[rows].to(home), draw[rows].to(home)
            start = drawn_views(dropout_keys(place, seed=own, draw=drawn), self._starts[place])
            self._read(place, start, view.policy, own, drawn, out[rows])

    def _middle(self, index: Tensor) -> Tensor:  # int64 [B], where clean clips start
        return (self._starts[index] - 1) // 2

    def _read(
        self,
        index: Tensor,  # int64 [B], where the frames are, as is all else
        start: Tensor,  # int64 [B], of each clip
        policy: Policy,
        seed: int | Tensor,
        draw: int | Tensor,
        out: Tensor | None = None,  # float32 [B, C, T, H, W], channels_last_3d
    ) -> Tensor:
        home, (channels, t, height, width) = self.images.device, self.shape
        plan = augment_plan(index, policy=policy, size=(height, width), seed=seed, draw=draw)
        alike = AugmentPlan(plan.draws.repeat_interleave(t, 0), policy, (height, width))
        places = ((index * self._held + start)[:, None] + self._offsets).flatten()
        if out is None or home != self.device:
            made = torch.empty(len(index), t, height, width, channels, device=home).permute(0, 4, 1, 2, 3)
        else:
            made = out
        augment(
            self.images,
            places,
            policy=policy,
            seed=seed,
            draw=draw.repeat_interleave(t) if isinstance(draw, Tensor) and draw.ndim else draw,
            mean=self.mean,
            std=self.std,
            plan=alike,
            out=_as_images(made),
        )
        if out is None or made is out:
            return made.to(self.device)
        return out.copy_(made)


def _as_images(batch: Tensor) -> Tensor:  # [B, C, T, H, W] -> [B * T, C, H, W], the same memory
    rows = batch.permute(0, 2, 3, 4, 1)  # [B, T, H, W, C]
    return rows.view(-1, *rows.shape[2:]).permute(0, 3, 1, 2)


def span(frames: int, stride: int) -> int:
    """How many frames lie between the first and the last that a network gets, both included."""
    return (frames - 1) * stride + 1


def framed(data: ImageSet, frames: int, stride: int) -> ImageSet:
    """The data set with what a network gets of a clip; `frames` = 0: as many as there are. Images stay as they are.

    Raises ValueError that names the key.
    """
    if data.train_images.ndim != 5:
        if frames or stride > 1:
            got = f"data.frames={frames} and data.stride={stride}"
            raise ValueError(f"{got} are for clips, and data.name={data.name} has {data.noun}s: set 0 and 1")
        return data
    held = data.train_images.shape[1]
    frames = frames or (held - 1) // stride + 1
    if (needed := span(frames, stride)) > held:
        raise ValueError(
            f"data.frames={frames} with data.stride={stride} needs clips of {needed} frames, and they have {held}"
        )
    if frames < 2:
        raise ValueError(f"data.stride={stride} leaves a single frame of clips of {held}: lower it")
    notes = (*data.notes, *_notes_on_stills(data))
    return replace(data, frames=frames, stride=stride, notes=notes)


def clean_clip(data: ImageSet, i: int) -> Tensor:  # uint8 [T, H, W, C]
    """What a clean batch shows of a training clip, before it is normalized."""
    clips = data.train_images
    own = clips.shape[1] if data.lengths is None else int(data.lengths[i])
    return middle(clips[i, :own], data.shape[1], data.stride)


def middle(clip: Tensor, frames: int, stride: int = 1) -> Tensor:  # [F, H, W, C] -> [T, H, W, C]
    """Of a clip that is too short, the last frame is repeated."""
    needed = span(frames, stride)
    first = max(0, len(clip) - needed) // 2
    return clip[torch.arange(first, first + needed, stride).clamp(max=len(clip) - 1)]


def still(clip: np.ndarray) -> bool:  # [F, H, W, C]
    """Whether nothing moves: all frames are equal."""
    return bool((clip == clip[0]).all())


def _notes_on_stills(data: ImageSet) -> list[str]:
    def name(part: str, names: list[str] | None, i: int) -> str:
        return repr(names[i]) if names else f"{part} clip {i}"

    parts = (("training", data.train_images, data.names), ("test", data.test_images, data.test_names))
    some = [
        name(part, names, i)
        for part, clips, names in parts
        for i, clip in enumerate(clips.numpy())
        if (clip[0] == clip[-1]).all() and still(clip)
    ]
    if not some:
        return []
    move = "does not move: its" if len(some) == 1 else "do not move: all their"
    return [f"{many(len(some), 'clip')} {move} frames are equal, such as {some[0]}"]
