"""Small runs of several processes, for test_world.py.

Each rank is forked from a server that has imported torch and done nothing else: a fork of the tests' own process could
not train where an earlier test had started the threads of autograd.
"""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from ups_fast import build, frozen, inputs, rounds, train
from ups_fast.config import Config
from ups_fast.data import ImageSet
from ups_fast.models import Network
from ups_fast.models.synced import synced
from ups_fast.selection import features_of, pseudo_label
from ups_fast.step import TrainStep
from ups_fast.world import World, join

SPAWN = multiprocessing.get_context("forkserver")
# What takes seconds, once and not in each rank; `tests` is not on the path of the server.
SPAWN.set_forkserver_preload(["torch._dynamo", "ups_fast.rounds", "ups_fast.train"])
SECONDS = 120.0  # of all ranks together, after which they are killed


def free_port() -> int:
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        return int(some.getsockname()[1])


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """As torchrun sets it."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def rank_of(rank: int, size: int, port: int, work: Callable[[World], Any], file: Path, changes: dict) -> None:
    """A rank, as torchrun starts it; it leaves what `work` gives in `file`, or a traceback."""
    torch.set_num_threads(1)  # of more, the parent may have the only ones
    os.environ.update({**environment(rank, size, port), **changes})
    world = join()
    world.open(torch.device("cpu"), 30)
    torch.save(work(world), file)
    world.close()


def results(
    size: int, work: Callable[[World], Any], folder: Path, seconds: float = SECONDS, **changes: str
) -> list[Any]:
    """What `work` gives at each rank. Ranks that do not end are killed."""
    folder.mkdir()
    port, files = free_port(), [folder / f"{rank}" for rank in range(size)]
    processes = [
        SPAWN.Process(target=rank_of, args=(rank, size, port, work, file, changes))
        for rank, file in enumerate(files)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    for process in processes:
        process.kill()
        process.join()
    return [torch.load(file, weights_only=False) for file in files]


class End(NamedTuple):
    """How a rank ended."""

    status: int  # negative: by that signal
    out: str
    err: str


def commands(
    words: Sequence[str],
    folder: Path,
    size: int = 2,
    *,
    at: dict[int, tuple[int, Callable[[], object]]]
    | None = None,  # of a rank: before which step, and what happens
    own: dict[int, list[str]] | None = None,  # further words of a rank
    **changes: str,  # of the environment
) -> tuple[list[End], float]:
    """`python -m ups_fast.train` at each rank, and the seconds from the first end to the last one."""
    folder.mkdir()
    port, processes = free_port(), []
    for rank in range(size):
        environ = {**environment(rank, size, port), **changes}
        happens = (at or {}).get(rank, (0, int))
        given = rank, folder, [*words, *(own or {}).get(rank, [])], environ, *happens
        processes.append(SPAWN.Process(target=command_of, args=given))
        processes[-1].start()
    ended: dict[int, float] = {}
    end = time.monotonic() + SECONDS
    while len(ended) < size:
        now = time.monotonic()
        ended |= {
            rank: now
            for rank, each in enumerate(processes)
            if rank not in ended and each.exitcode is not None
        }
        if now > end or (ended and now > max(ended.values()) + SECONDS / 4):
            for process in processes:
                process.kill()
        time.sleep(0.002)
    read = lambda rank, name: (folder / f"{rank}.{name}").read_text()  # noqa: E731
    ends = [
        End(int(each.exitcode or 0), read(rank, "out"), read(rank, "err"))
        for rank, each in enumerate(processes)
    ]
    return ends, max(ended.values()) - min(ended.values())


def command_of(
    rank: int, folder: Path, words: list[str], environ: dict[str, str], step: int, what: Callable[[], object]
) -> None:
    status = 70
    try:
        torch.set_num_threads(1)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        os.environ.update(environ)
        happens_at(step, what)
        train._report = lambda *_: None  # type: ignore[assignment]  # which takes seconds, and is of one process
        status = train.main(words)
    except SystemExit as error:
        status = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        status = 71
    finally:
        sys.stderr.flush(), sys.stdout.flush()
        os._exit(status)


def signal_me(number: int) -> None:
    os.kill(os.getpid(), number)


def fail() -> None:
    raise ValueError("the disk of this machine is gone")


def happens_at(step: int, what: Callable[[], object]) -> None:
    """Before that step of the process, counted from 1; 0: never."""
    count, real = 0, TrainStep.__call__

    def call(self: TrainStep, *args: Any, **how: Any) -> None:
        nonlocal count
        count += 1
        if count == step:
            what()
        real(self, *args, **how)

    TrainStep.__call__ = call  # type: ignore[method-assign]


# Jobs --------------------------------------------------------------------------------------------------------


def blobs(n: int = 150, columns: int = 6, classes: int = 3) -> ImageSet:
    """Features; the first 24 of the training set are labeled."""
    drawn = torch.Generator().manual_seed(1)
    centers = torch.randn(classes, columns, generator=drawn)
    labels = torch.arange(n) % classes
    rows = centers[labels] + 0.7 * torch.randn(n, columns, generator=drawn)
    mean, std = (tuple(each.tolist()) for each in (rows.mean(0), rows.std(0)))
    names = [str(c) for c in range(classes)]
    return ImageSet(
        "blobs", names, rows[:120], labels[:120], rows[120:], labels[120:], mean, std,
        labeled=torch.arange(24),
    )  # fmt: skip


def pictures(n: int = 100) -> ImageSet:
    """Images of 8x8 pixels, with batch-norm in their network."""
    drawn = torch.Generator().manual_seed(2)
    labels = torch.arange(n) % 3
    images = torch.randint(0, 120, (n, 8, 8, 1), generator=drawn)
    images[torch.arange(n), labels * 2] += 100
    images = images.byte()
    return ImageSet(
        "pictures", ["0", "1", "2"], images[:80], labels[:80], images[80:], labels[80:], (0.3,), (0.3,),
        labeled=torch.arange(24),
    )  # fmt: skip


def settings(data: ImageSet, folder: str = "", **changes: Any) -> Config:
    cfg = Config()
    values: dict[str, Any] = {
        "run_dir": folder, "device": "cpu", "threads": 1, "checkpoint_seconds": 3600.0,
        "model.name": "mlp-12" if len(data.shape) == 1 else "wrn-10-1", "model.dropout": 0.2,
        "train.rounds": 2, "train.epochs": 1, "train.min_steps": 4, "train.batch_size": 12, "train.lr": 0.05,
        "train.weight_decay": 0.0, "runtime.precision": "float32",
        "select.passes": 3, "select.batch_size": 60, "select.tau_p": 0.4, "select.tau_n": 0.3,
        "select.kappa_p": 0.3, "select.kappa_n": 0.3, "report.baselines": False, "report.review": False,
        **({"data.noise": 0.1} if len(data.shape) == 1 else {"data.crop": 1}),
    }  # fmt: skip
    for name, value in {**values, **changes}.items():
        group, _, key = name.rpartition(".")
        setattr(getattr(cfg, group) if group else cfg, key, value)
    return cfg


def digest(tensors: dict[str, Tensor]) -> str:
    found = hashlib.blake2b(digest_size=8)
    for name, each in tensors.items():
        found.update(name.encode() + each.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def trained(world: World, what: str = "blobs", folder: str = "", **changes: Any) -> dict[str, Any]:
    """A run; after each step a digest of all that its method and optimizer remember."""
    data = globals()[what]()
    method = changes.pop("method.name", "ups")
    cfg = settings(data, folder, **changes)
    cfg = with_method(cfg, method)
    after, real = [], TrainStep.__call__

    def step(self: TrainStep, *args: Any, **how: Any) -> None:
        real(self, *args, **how)
        after.append(digest({**self.method.state_dict(), **self.momentum, "loss": self.loss}))

    TrainStep.__call__ = step  # type: ignore[method-assign]
    console = Console(file=io.StringIO())
    job = build.prepare(cfg, data, console, world)
    rows = list(rounds.rounds(job, console))
    TrainStep.__call__ = real  # type: ignore[method-assign]
    found = job.state.pseudo_labels
    return {"after": after, "weights": job.method.state_dict(), "found": found, "rows": rows}


def compiled(world: World) -> list[Tensor]:
    """Loss and gradients of a batch through batch-norm and a loss over all rows, as one graph."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten())
    if world.size > 1:
        synced(network)
    rows, weight = torch.randn(4, 1, 4, 4), torch.linspace(0, 1, 4)

    def loss(x: Tensor) -> Tensor:
        seen = world.whole(network(x))
        return (seen.square().sum(1) * weight).sum() + seen.std(0).sum()

    found = []
    for how in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        network.zero_grad()
        value = how(rows[world.rank :: world.size])
        value.backward()
        gradients = [each.grad for each in network.parameters() if each.grad is not None]
        world.sum_(gradients)
        found += [value.detach(), *(each.clone() for each in gradients)]
    return found


def features(world: World, folder: str, cache: str = "") -> dict[str, Any]:
    """Those of a frozen network whose weights lie in a folder, of clean pictures and of three views."""
    own = {"name": "torchvision:shufflenet_v2_x0_5", "weights": f"{folder}/weights.pth", "freeze": True}
    changes: dict[str, Any] = {
        **{f"model.{key}": value for key, value in {**own, "input_size": 32, "head": "mlp-12"}.items()},
        **{"data.views": 3, "data.crop": 2, "data.noise": 0.1, "data.cache": cache},
    }
    frozen.labeling_rows = lambda *_: 11  # type: ignore[assignment]
    console, data = Console(file=io.StringIO(), width=200), pictures()
    with world.together():
        job = build.prepare(settings(data, **changes), data, console, world)
    train, test = job.images, job.test_images
    return {"train": train.seen, "test": test.seen, "said": console.file.getvalue()}  # type: ignore[attr-defined]


def with_files(world: World, folder: str) -> dict[str, Any]:
    """A run on files that are streamed, three of which vanish when it has begun."""
    root = Path(folder) / "images"
    if world.main:
        from PIL import Image

        for i, image in enumerate(pictures().train_images):
            place = root / f"labeled/{i % 3}" if i < 30 else root / "unlabeled"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0].numpy()).save(place / f"{i:03}.png")
    world.wait()
    changes = {"name": "folder", "root": str(root), "loader": "plain", "size": 8, "channels": 1}
    cfg = settings(pictures(), "", **{f"data.{name}": value for name, value in changes.items()})
    cfg.run_dir = str(Path(folder) / "run")
    console = Console(file=io.StringIO())
    data = world.share(lambda: inputs.load_data(cfg, torch.device("cpu"), console))
    job = build.prepare(cfg, data, console, world)
    if world.main:
        for i in (40, 41, 55):
            (root / "unlabeled" / f"{i:03}.png").unlink()
    world.wait()
    after, real = [], TrainStep.__call__

    def step(self: TrainStep, *args: Any, **how: Any) -> None:
        real(self, *args, **how)
        after.append(digest({**self.method.state_dict(), "loss": self.loss, **self.tables}))

    TrainStep.__call__ = step  # type: ignore[method-assign]
    list(rounds.rounds(job, console))
    return {"after": after, "found": job.state.pseudo_labels, "gone": job.images.unreadable}


def with_method(cfg: Config, name: str) -> Config:
    from ups_fast.methods import METHODS

    options = METHODS[name].Options()
    options.name = name
    if hasattr(options, "mu"):
        options.mu = 2
    if name in ("fixmatch", "comatch"):
        options.tau = 0.4
    if name == "fixmatch":
        options.uncertainty = "passes"
        cfg.select.kappa_p = 0.5
    return replace(cfg, method=options)


def label(world: World) -> dict[str, Any]:
    """All that a run asks of a network: labels with and without balance, features, of blobs and of pictures."""
    found: dict[str, Any] = {}
    for data in (blobs(), pictures()):
        torch.manual_seed(3)
        job = build.prepare(settings(data), data)
        network: Network = job.method.network.eval()
        for rows, balanced, u in (
            (20, False, 56),
            (7, True, 50),
            (500, True, 56),
            (3, False, 1),
            (3, False, 0),
        ):
            index, told = torch.arange(24, 24 + u), []
            labels = pseudo_label(
                network, job.images, index, passes=3, batch_size=3 * rows, tau_p=0.35, kappa_p=1.0, tau_n=0.32,
                kappa_n=1.0, balanced=balanced, seed=5, progress=told.append, world=world,
            )  # fmt: skip
            found[f"{data.name} {rows} {u}"] = vars(labels)
            found[f"told {data.name} {rows} {u}"] = sum(told), len(told)
            if u:
                how: Any = {"batch_size": rows, "world": world}
                found[f"features {data.name} {rows} {u}"] = features_of(network, job.images, index, **how)
    return found
