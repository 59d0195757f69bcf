"""Features of all images of a run by a network that is not trained: computed once, and kept for later runs."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ups_fast.config import Config
from ups_fast.data import Images, ImageSet, ResidentFeatures, View
from ups_fast.data.cache import read_rows, write_rows
from ups_fast.data.features import column_moments, first_not_finite
from ups_fast.data.fingerprint import content_of
from ups_fast.display import progress_bar, say
from ups_fast.files import RunFolderError, home
from ups_fast.inputs import image_policy, memory, open_images
from ups_fast.machine import memory_bytes
from ups_fast.models import Frozen
from ups_fast.policy import POLICIES, Policy
from ups_fast.seeds import derive
from ups_fast.selection import labeling_rows
from ups_fast.step import plan_step
from ups_fast.words import many
from ups_fast.world import ALONE, World

SEED = derive(0, "views")  # by which views are drawn: not the run's, whose features others could not use
LARGEST_DEVIATION = 0.1  # of features in bfloat16 from those in float32, in units of their standard deviation


def open_features(
    cfg: Config,
    data: ImageSet,
    network: Frozen,
    device: torch.device,
    console: Console,
    world: World = ALONE,
) -> tuple[ResidentFeatures, ResidentFeatures]:
    """The features of the training and of the test images, on the device. They stand for the images in a run.

    They are standardized by those training images that are not held out to validate, and so is `network` from now on.
    The clean ones give the numbers, by which augmented views are standardized, too. Several processes share the
    batches, and process 0 has the cache.

    Raises ValueError where features are NaN or infinite, or take too much memory.
    """
    _must_fit(cfg, len(data.train_labels), network.n_features, device)
    forward = Forward(network, in_half(cfg.runtime.precision, device), console)
    found = [_part(cfg, data, forward, device, world, test=test).rows() for test in (False, True)]
    rows, unreadable = found[0]
    clean = rows[0]
    aside = [*([] if data.val is None else data.val.tolist()), *unreadable]
    seen = torch.ones(len(clean), dtype=torch.bool)
    seen[aside] = False
    mean, std = column_moments(clean[seen] if aside else clean)
    network.standardize(mean, std)
    train, test = (
        ResidentFeatures(rows, mean=mean, std=std, device=device, unreadable=gone) for rows, gone in found
    )
    return train, test


def _must_fit(cfg: Config, n: int, d: int, device: torch.device) -> None:
    views = cfg.data.views
    needed = 4 * views * n * d
    if needed > min(memory(device), memory_bytes()) // 2:
        raise ValueError(
            f"data.views={views} of {many(n, 'training image')} with {d:,} features each would take "
            f"{needed / 2**30:,.1f} GiB of memory, more than half of what there is: "
            f"{'lower it' if views > 1 else 'choose a model.name with fewer features'}"
        )


# In bfloat16 -------------------------------------------------------------------------------------------------


class Forward:
    """A frozen network's features of batches; in bfloat16 where that is wanted, and near enough to float32.

    The first batch decides, and a sentence says so where it decides for float32.
    """

    def __init__(self, network: Frozen, half: bool, console: Console) -> None:
        self.network, self.half, self.console = network, half, console
        self.wanted = half  # whatever the first batch decides: a part of the cache's keys
        self.checked = not half

    def __call__(self, images: Tensor) -> Tensor:  # [B, channels, H, W] -> float32 [B, D], not standardized
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.half):
            rows = self.network.features(images)
        if self.checked:
            return rows
        exact = self.network.features(images)
        off = float((rows - exact).abs().max() / exact.std())
        self.checked, self.half = True, off <= LARGEST_DEVIATION  # which NaN is not
        if self.half:
            return rows
        say(
            self.console,
            f"features are computed in float32: bfloat16 changes those of the first {many(len(images), 'image')} by up "
            f"to {off:.2g} of their standard deviation, more than {LARGEST_DEVIATION}",
        )
        return exact


def in_half(precision: str, device: torch.device) -> bool:
    """Whether features may be in bfloat16 by `runtime.precision`. On a CPU they never are."""
    return device.type == "cuda" and plan_step("eager", precision, device).dtype == torch.bfloat16


# The views ---------------------------------------------------------------------------------------------------


def augmented_batches(
    images: Images,
    ids: Tensor,  # int64 [N], on the host
    policy: Policy,
    view: int,
    batch_size: int,
) -> Iterator[Tensor]:
    """The images of these ids in their order, augmented as in a training step of the draw `view`.

    Each batch, float32 [B, C, H, W], is written over the last one.
    """
    short = len(ids) % batch_size
    for part in ids.split([len(ids) - short, short]):
        steps = [(some, torch.full_like(some, view)) for some in part.split(batch_size) if len(some)]
        rows = min(batch_size, len(part))
        out = torch.zeros(rows, *images.shape, device=images.device).to(memory_format=torch.channels_last)
        views, seed = (View(0, rows, policy, 0),), torch.tensor(SEED, device=images.device)
        ahead = images.ahead(steps, views, seed=SEED, out=out)
        for (index, draw), _ in zip(steps, ahead, strict=False):
            images.read(index.to(images.device), draw.to(images.device), views, seed=seed, out=out)
            yield out


def embed(
    features: Callable[[Tensor], Tensor],
    batches: Iterable[Tensor],
    rows: Tensor,  # float32 [N, D], on the host
    progress: Callable[[int], None] = lambda images: None,
) -> None:
    """Writes the features of all batches, not standardized, into `rows`."""
    at = 0
    for batch in batches:
        rows[at : at + len(batch)] = features(batch)
        at += len(batch)
        progress(len(batch))


@dataclass
class _Part:
    """The training or the test images, and all that makes features of them."""

    cfg: Config
    name: str
    images: Images
    views: int
    policy: Policy  # of the views but the first, the clean one
    forward: Forward
    content: Any  # a hash of all that clean features depend on; None where this process keeps nothing
    world: World

    def rows(self) -> tuple[Tensor, dict[int, str]]:
        """float32 [V, N, D], on the host; as of `Images.unreadable`."""
        rows = self._view(0)[None]
        if self.views > 1:
            clean, rows = rows, torch.empty(self.views, *rows.shape[1:])
            rows[0] = clean[0]
        for view in range(1, self.views):
            rows[view] = self._view(view)
        return rows, self.images.unreadable

    def _view(self, view: int) -> Tensor:  # float32 [N, D]
        """From the cache, or computed."""
        n, console = len(self.images), self.forward.console
        what = self.name + (f", view {view + 1} of {self.views}" if self.views > 1 else "")
        rows = self.world.share(lambda: self._kept(view, what))
        if rows is not None:
            return rows
        began = time.monotonic()
        rows = self._computed(view, f"features of {what}")
        if bad := first_not_finite(rows):
            raise ValueError(
                f"model.name={self.cfg.model.name} gives features that are NaN or infinite, first for number {bad[1]} "
                f"of the {what}: choose other weights or another network"
            )
        if n:
            say(console, f"features of {n:,} {what}: computed in {time.monotonic() - began:.1f} s")
        path, key = self._place(view)
        if path and n and not self.images.unreadable:
            _keep(path, key, rows, console)
        return rows

    def _kept(self, view: int, what: str) -> Tensor | None:
        path, key = self._place(view)
        n, console = len(self.images), self.forward.console
        if not path or not n:
            return None
        try:
            rows = read_rows(path, key, (n, self.forward.network.n_features))
        except FileNotFoundError:
            return None
        except Exception as error:  # whatever a stranger's bytes may cause
            say(console, f"{path} is damaged ({error}): its features are computed anew")
            return None
        say(console, f"features of {n:,} {what}: from {path}")
        return rows

    def _computed(self, view: int, what: str) -> Tensor:  # float32 [N, D]
        images, network, world, n = self.images, self.forward.network, self.world, len(self.images)
        rows = torch.empty(n, network.n_features)
        size = labeling_rows(images.device, network.seen(images.shape[1:]))
        part, turns = world.part(n, size)
        with (
            progress_bar(self.forward.console) as bar,
            torch.backends.cudnn.flags(enabled=True, deterministic=True),
            world.together(),
        ):
            task = bar.add_task(what, total=n, now="")
            advance: Callable[[int], None] = lambda done: bar.advance(task, done * world.size)  # noqa: E731
            network.to(images.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
            try:
                if not self.forward.checked and world.size > 1:  # the first batch decides, at all processes
                    embed(self.forward, self._batches(torch.arange(n)[:size], view, size), rows[:size])
                embed(self.forward, self._batches(torch.arange(n)[part], view, size), rows[part], advance)
            finally:
                network.cpu()  # the device is for what is trained
        world.fill_(rows, turns * size)
        world.union(images.unreadable, {})
        return rows

    def _batches(self, ids: Tensor, view: int, size: int) -> Iterable[Tensor]:
        if not len(ids):
            return ()
        if view:
            return augmented_batches(self.images, ids, self.policy, view, size)
        return self.images.clean_batches(ids.to(self.images.device), size)

    def _place(self, view: int) -> tuple[Path | None, str]:
        """The file of the cache and the key: all that the features depend on. None where there is no cache."""
        if self.content is None:
            return None, ""
        found, data = self.content.copy(), self.cfg.data
        if view:
            found.update(repr((self.policy, data.resized_crop, view)).encode())
        return home(data.cache) / f"{found.hexdigest()}.npy", found.hexdigest()


def _part(
    cfg: Config, data: ImageSet, forward: Forward, device: torch.device, world: World, *, test: bool
) -> _Part:
    channels, views = data.shape[0], 1 if test else cfg.data.views
    # The network normalizes on its own.
    raw = replace(data, mean=(0.0,) * channels, std=(1.0,) * channels)
    policy = image_policy(cfg) if views > 1 else POLICIES["none"]
    images = open_images(cfg, raw, device, policy, test=test)
    content = _content(cfg, data, forward, type(images).__name__, test=test) if world.main else None
    name = "test images" if test else "training images"
    return _Part(cfg, name, images, views, policy, forward, content, world)


# The cache ---------------------------------------------------------------------------------------------------


def _content(cfg: Config, data: ImageSet, forward: Forward, loader: str, *, test: bool) -> Any:
    content, network = content_of(data, test=test), forward.network
    if not cfg.data.cache or not content:
        return None
    found = hashlib.blake2b(digest_size=16)
    scale = network.pixel_mean.flatten().tolist(), network.pixel_std.flatten().tolist()
    found.update(repr((1, str(network.body), network.input_size, scale)).encode())
    if forward.wanted:
        found.update(b"bfloat16")
    if data.in_files:
        found.update(loader.encode())  # DALI and Pillow differ in the last bits
    for name, tensor in network.body.state_dict().items():
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    found.update(content)
    return found


def _keep(path: Path, key: str, rows: Tensor, console: Console) -> None:
    """Writes into the cache. Where that is not possible the run goes on without it."""
    try:
        with suppress(FileExistsError):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_rows(path, key, rows)
    except (RunFolderError, OSError) as error:
        say(console, f"warning: the features are not kept for later runs: {error}")
