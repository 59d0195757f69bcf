"""Features of all images of a run by a network that is not trained: computed once, and kept for later runs."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from ups_fast.config import Config
from ups_fast.data import Images, ImageSet, ResidentFeatures
from ups_fast.data.cache import read_rows, write_rows
from ups_fast.data.features import column_moments, first_not_finite
from ups_fast.data.fingerprint import content_of
from ups_fast.display import progress_bar, say
from ups_fast.files import RunFolderError, home
from ups_fast.inputs import open_images
from ups_fast.models import Frozen
from ups_fast.policy import POLICIES
from ups_fast.selection import labeling_rows


def open_features(
    cfg: Config, data: ImageSet, network: Frozen, device: torch.device, console: Console
) -> tuple[ResidentFeatures, ResidentFeatures]:
    """The features of the training and of the test images, on the device. They stand for the images in a run.

    They are standardized by those training images that are not held out to validate, and so is `network` from now on.

    Raises ValueError where features are NaN or infinite.
    """
    found = [_features(cfg, data, network, device, console, test=test) for test in (False, True)]
    rows, unreadable = found[0]
    aside = [*([] if data.val is None else data.val.tolist()), *unreadable]
    seen = torch.ones(len(rows), dtype=torch.bool)
    seen[aside] = False
    mean, std = column_moments(rows[seen] if aside else rows)
    network.standardize(mean, std)
    train, test = (
        ResidentFeatures(rows, mean=mean, std=std, device=device, unreadable=gone) for rows, gone in found
    )
    return train, test


def _features(
    cfg: Config, data: ImageSet, network: Frozen, device: torch.device, console: Console, *, test: bool
) -> tuple[Tensor, dict[int, str]]:  # float32 [N, D] on the host; as of `Images.unreadable`
    """Of one part, from the cache or computed."""
    channels = data.shape[0]
    # The network normalizes on its own.
    raw = replace(data, mean=(0.0,) * channels, std=(1.0,) * channels)
    images = open_images(cfg, raw, device, POLICIES["none"], test=test)
    n, part = len(images), "test images" if test else "training images"
    path, key = _place(cfg, data, network, type(images).__name__, test=test)
    if path and n:
        try:
            rows = read_rows(path, key, (n, network.n_features))
            say(console, f"features of {n:,} {part}: from {path}")
            return rows, images.unreadable
        except FileNotFoundError:
            pass
        except Exception as error:  # whatever a stranger's bytes may cause
            say(console, f"{path} is damaged ({error}): its features are computed anew")
    began = time.monotonic()
    rows = _compute(network, images, device, console, f"features of {part}")
    if bad := first_not_finite(rows):
        raise ValueError(
            f"model.name={cfg.model.name} gives features that are NaN or infinite, first for number {bad[1]} of the "
            f"{part}: choose other weights or another network"
        )
    if n:
        say(console, f"features of {n:,} {part}: computed in {time.monotonic() - began:.1f} s")
    if path and n and not images.unreadable:
        _keep(path, key, rows, console)
    return rows, images.unreadable


def _compute(
    network: Frozen, images: Images, device: torch.device, console: Console, what: str
) -> Tensor:  # float32 [N, D], on the host
    size = labeling_rows(device, network.seen(images.shape[1:]))
    with progress_bar(console) as bar, torch.backends.cudnn.flags(enabled=True, deterministic=True):
        task = bar.add_task(what, total=len(images), now="")
        advance: Callable[[int], None] = lambda done: bar.advance(task, done)  # noqa: E731
        network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        try:
            return embedded(network, images, size, advance)
        finally:
            network.cpu()  # the device is for what is trained


@torch.no_grad()
def embedded(
    network: Frozen, images: Images, batch_size: int, progress: Callable[[int], None] = lambda images: None
) -> Tensor:  # float32 [N, D], on the host
    """The features of all images, not standardized."""
    rows = torch.empty(len(images), network.n_features)
    at = 0
    index = torch.arange(len(images), device=images.device)
    for batch in images.clean_batches(index, batch_size) if len(images) else ():
        rows[at : at + len(batch)] = network.features(batch)
        at += len(batch)
        progress(len(batch))
    return rows


def _place(
    cfg: Config, data: ImageSet, network: Frozen, loader: str, *, test: bool
) -> tuple[Path | None, str]:
    """The file of the cache and the key: all that the features depend on. None where there is no cache."""
    content = content_of(data, test=test)
    if not cfg.data.cache or not content:
        return None, ""
    found = hashlib.blake2b(digest_size=16)
    scale = network.pixel_mean.flatten().tolist(), network.pixel_std.flatten().tolist()
    found.update(repr((1, str(network.body), network.input_size, scale)).encode())
    if data.in_files:
        found.update(loader.encode())  # DALI and Pillow differ in the last bits
    for name, tensor in network.body.state_dict().items():
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    found.update(content)
    return home(cfg.data.cache) / f"{found.hexdigest()}.npy", found.hexdigest()


def _keep(path: Path, key: str, rows: Tensor, console: Console) -> None:
    """Writes into the cache. Where that is not possible the run goes on without it."""
    try:
        with suppress(FileExistsError):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_rows(path, key, rows)
    except (RunFolderError, OSError) as error:
        say(console, f"warning: the features are not kept for later runs: {error}")
