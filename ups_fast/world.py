"""The processes of one run, as torchrun starts them: who this one is, and what they tell each other.

`World` is the one place that talks to torch.distributed. A run of one process has `ALONE`, whose methods do nothing.
A batch of B rows is dealt out like cards: rank r of R has the rows r, r + R, r + 2 R and so on.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ups_fast import machine
from ups_fast.messages import LINE, Lost, all_gather, call, pickled, unpickled, whole_rows, whole_sum
from ups_fast.terminal import complain
from ups_fast.words import line_of, many, shown

MEETING = 120  # seconds in which all processes must have come
PATIENCE = timedelta(days=7)  # with a rank that reads data, or computes what the others wait for
CHUNK = 1 << 28  # bytes that are sent at once


class World:
    """This process among those of its run.

    rank, size   which one, of how many
    local_rank   which one of its machine
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, store: Any = None) -> None:
        self.rank, self.size, self.local_rank, self.store = rank, size, local_rank, store
        # Groups of all processes: on the host, for days; on the host and between devices, for `runtime.timeout`.
        self.patient: Any = None
        self.host: Any = None
        self.devices: Any = None

    @property
    def main(self) -> bool:
        """Whether this is the process that prints, logs and writes."""
        return self.rank == 0

    def pick_device(self, name: str) -> torch.device:
        """`machine.pick_device`, each process of a machine its own GPU. ValueError where there are too few."""
        device = machine.pick_device(name)
        if self.size == 1 or device.type != "cuda":
            return device
        if device.index is not None:
            raise ValueError(
                f"device={name} is one GPU, but {self.size} processes need one each: use device=cuda"
            )
        if self.local_rank >= (count := torch.cuda.device_count()):
            raise ValueError(
                f"this machine has {many(count, 'GPU')}, too few for its processes: lower --nproc-per-node"
            )
        return torch.device("cuda", self.local_rank)

    def open(self, device: torch.device, timeout: float) -> None:
        """Connects the devices. From now on a process is lost that does not answer for `timeout` seconds."""
        if self.size == 1:
            return
        seconds = timedelta(seconds=timeout)
        self.host = self.devices = call(dist.new_group, backend="gloo", timeout=seconds)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            self.devices = call(dist.new_group, backend="nccl", timeout=seconds)
        LINE.devices = self.devices

    def close(self) -> None:
        """The end of what is done together."""
        self.wait()
        if self.size > 1:
            dist.destroy_process_group()

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            call(dist.barrier, group=self.host)

    # What all do, or none -----------------------------------------------------------------------------------

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails in it at one process fails at all of them, with the sentence of the first.

        SystemExit, of a parser of words that has said why, is raised as it is where it was.
        """
        if self.size == 1:
            yield
            return
        mine: Exception | SystemExit | None = None
        try:
            yield
        except (Exception, SystemExit) as error:
            if isinstance(error, Lost) or getattr(error, "everywhere", False):
                raise
            mine = error
        said: list[str | None] = [None] * self.size
        text = None if mine is None else line_of(mine)
        if isinstance(mine, SystemExit):
            text = "its command cannot be read"
        call(dist.all_gather_object, said, text, group=self.patient)
        if isinstance(mine, SystemExit):
            raise mine
        failed = [rank for rank, each in enumerate(said) if each is not None]
        if not failed:
            return
        if mine is None or failed[0] != self.rank:
            mine = ValueError(f"{said[failed[0]]} (rank {failed[0]} of {self.size})")
        mine.everywhere = True  # type: ignore[attr-defined]
        raise mine

    def same(self, facts: Mapping[str, str]) -> None:
        """ValueError, at all processes, where `facts` differ between them."""
        if self.size == 1:
            return
        found: list[Any] = [None] * self.size
        call(dist.all_gather_object, found, dict(facts), group=self.patient)
        with self.together():
            for rank, theirs in enumerate(found):
                for name, its in theirs.items():
                    if (mine := found[0].get(name, "absent")) != its:
                        raise ValueError(
                            f"{name} is {shown(mine)} for rank 0, but {shown(its)} for rank {rank} of {self.size}: all "
                            "processes of a run need the same"
                        )

    def ask(self, *numbers: float) -> list[float]:
        """The largest of each over all processes, such as whether any of them wants to stop."""
        if self.size == 1:
            return list(numbers)
        asked = torch.tensor(numbers, dtype=torch.float64)
        call(dist.all_reduce, asked, dist.ReduceOp.MAX, group=self.host)
        return asked.tolist()

    def union(self, mine: dict[int, str], agreed: Mapping[int, str]) -> Mapping[int, str]:
        """What any process knows, which is also added to `mine`; `agreed` is what this gave before.

        Threads may add to `mine` at any time.
        """
        if self.size == 1:
            return mine
        if not any(self.ask(len(mine) > len(agreed))):
            return agreed
        found: list[Any] = [None] * self.size
        call(dist.all_gather_object, found, dict(mine), group=self.host)
        everything = {number: text for each in reversed(found) for number, text in each.items()}
        for number, text in everything.items():
            mine.setdefault(number, text)
        return everything

    # What they send each other ------------------------------------------------------------------------------

    def share(self, make: Callable[[], Any]) -> Any:
        """What `make` gives at process 0, at all of them. Tensors, on the host, are sent as they are."""
        if self.size == 1:
            return make()
        made: Any = None
        tensors: list[Tensor] = []
        text = b""
        with self.together():
            if self.main:
                made = make()
                text, tensors = pickled(made)
        shapes = [(tuple(each.shape), each.dtype) for each in tensors]
        plan = [(text, shapes)]
        call(dist.broadcast_object_list, plan, src=0, group=self.patient)
        text, shapes = plan[0]
        if not self.main:
            tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in shapes]
        for tensor in tensors:
            self._send(tensor, 0)
        return made if self.main else unpickled(text, tensors)

    def _send(self, tensor: Tensor, source: int) -> None:
        """Gives all processes what a tensor on the host, contiguous, is at process `source`."""
        if tensor.numel():
            for piece in tensor.view(-1).view(torch.uint8).split(CHUNK):
                call(dist.broadcast, piece, src=source, group=self.patient)

    def fill_(self, rows: Tensor, most: int) -> None:
        """[n, ...] on the host, of which each process has made its `part`, of at most `most` rows: all get all."""
        if self.size > 1:
            for source in range(self.size):
                self._send(rows[source * most :][:most], source)

    def copy_(self, tensors: Sequence[Tensor]) -> None:
        """Gives all processes the values of process 0, in place, on the device."""
        if self.size > 1:
            for each in tensors:
                flat = each.contiguous()  # as an order of channels of its own cannot be sent
                call(dist.broadcast, flat, src=0, group=self.devices)
                each.copy_(flat)

    def part(self, n: int, rows: int) -> tuple[slice, int]:
        """Which of n samples are this process's, in whole batches of `rows`, and the most batches of any process.

        >>> World(rank=1, size=2).part(100, 30)
        (slice(60, 100, None), 2)
        """
        turns = -(-n // rows // self.size) if rows else 0
        first, last = (min(n, each * turns * rows) for each in (self.rank, self.rank + 1))
        return slice(first, last), turns

    def gather(self, parts: Sequence[Tensor], n: int, most: int) -> list[Tensor]:
        """[m, ...] each, of `part` -> [n, ...], at all processes and bit for bit. `most`: the largest m of any."""
        if self.size == 1:
            return list(parts)
        widths = [math.prod(each.shape[1:]) * each.element_size() for each in parts]
        mine = torch.zeros(most, sum(widths), dtype=torch.uint8, device=parts[0].device)
        for column, each in zip(mine.split(widths, dim=1), parts, strict=True):
            if len(each) and column.numel():
                column[: len(each)] = each.reshape(len(each), -1).view(torch.uint8)
        everything = mine.new_empty(self.size * most, mine.shape[1])
        call(all_gather, everything, mine, group=self.devices)
        found = []
        for column, each in zip(everything[:n].split(widths, dim=1), parts, strict=True):
            whole = each.new_empty(n, *each.shape[1:])
            if whole.numel():
                whole.view(n, -1).view(torch.uint8).copy_(column)
            found.append(whole)
        return found

    def own(self, rows: Tensor) -> Tensor:  # [.., B] -> [.., B / R]
        """This process's part of what has a value for each row of a batch."""
        return rows if self.size == 1 else rows[..., self.rank :: self.size].contiguous()

    def whole(self, rows: Tensor, dim: int = 0) -> Tensor:  # [.., B / R, ..] -> [.., B, ..]
        """The rows of the whole batch. Differentiable; may be compiled and captured."""
        if self.size == 1:
            return rows
        found: Tensor = whole_rows(rows.movedim(dim, 0), self.rank, self.size)
        return found.movedim(0, dim)

    def total(self, x: Tensor) -> Tensor:
        """The sum over all processes. Differentiable; may be compiled and captured."""
        return x if self.size == 1 else whole_sum(x)

    def sum_(self, sums: Sequence[Tensor], means: Sequence[Tensor] = ()) -> None:
        """Float32 tensors become their sum, or mean, over all processes, in place, by one message. May be captured."""
        if self.size == 1 or not (sums or means):
            return
        parts = [*sums, *means]
        flat = torch.cat([each.reshape(-1) for each in parts])
        call(dist.all_reduce, flat, group=self.devices)
        if count := sum(each.numel() for each in means):
            flat[-count:] /= self.size
        views = flat.split([each.numel() for each in parts])
        torch._foreach_copy_(parts, [view.view(each.shape) for view, each in zip(views, parts, strict=True)])

    # When one is lost ---------------------------------------------------------------------------------------

    def say(self, error: BaseException, sentence: str) -> None:
        """Says of an error what one process has to say for all: 0 where all have it, else the first to come here."""
        if self.size == 1:
            complain(f"error: {sentence}")
            return
        if getattr(error, "everywhere", False):
            if self.main:
                complain(f"error: {sentence}")
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # it outlives all processes
                with suppress(
                    RuntimeError
                ):  # and torchrun ends all as soon as one has: not before it is said
                    self.store.set("said", "") if self.main else _until(self._is_said, 5.0)
            return
        try:
            first = self.store.add("speaks", 1) == 1
            self.store.set(f"here/{self.rank}", "")
            if not first:
                _until(self._is_said, 5.0)
                return
        except RuntimeError:  # it was kept by a process that is lost, too
            pass
        if isinstance(error, Lost):
            sentence = (
                f"{self._missing()} has ended or does not answer ({sentence}); the same command goes on"
            )
        else:
            sentence = f"{sentence} (rank {self.rank} of {self.size})"
        complain(f"error: {sentence}")
        with suppress(RuntimeError):
            self.store.set("said", "")

    def _is_said(self) -> bool:
        return bool(self.store.check(["said"]))

    def _missing(self) -> str:
        """Who does not come to `say` within a second."""
        try:
            keys = {rank: f"here/{rank}" for rank in range(self.size)}
            _until(lambda: self.store.check(list(keys.values())), 1.0)
            ranks = [str(rank) for rank, key in keys.items() if not self.store.check([key])]
        except RuntimeError:
            ranks = []
        return f"rank {' and '.join(ranks)} of {self.size}" if ranks else "another process of this run"


def _until(done: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not done() and time.monotonic() < end:
        time.sleep(0.02)


ALONE = World()


def join() -> World:
    """Meets the other processes where torchrun has started several; else `ALONE`.

    Raises ValueError, one sentence, where its variables of the environment are wrong, and OSError where nobody comes.
    """
    if os.environ.get("WORLD_SIZE", "") in ("", "1"):
        return ALONE
    size, rank, local_rank = (_number(name) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
    if rank >= size:
        raise ValueError(f"RANK must be below WORLD_SIZE={size}, got {rank}: use torchrun")
    where = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
    wait = timedelta(seconds=MEETING)
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=wait))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=wait)
        world = World(rank, size, local_rank, dist.PrefixStore("ups_fast", store))
        world.patient = world.host = world.devices = dist.new_group(backend="gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        why = line_of(error)
        if "EADDRINUSE" in why or "address already in use" in why:
            raise OSError(
                f"{where} is in use by another program: choose another port with torchrun --master-port"
            ) from error
        raise OSError(f"the {size} processes of this run do not meet at {where}: {why}") from error
    LINE.size, LINE.devices = size, world.devices
    return world


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    if not (value.isascii() and value.isdecimal()) or len(value) > 9:
        where = " where WORLD_SIZE is set" if name != "WORLD_SIZE" else ""
        raise ValueError(f"{name} must be a number{where}, got {shown(value) or 'nothing'}: use torchrun")
    return int(value)
