"""The training step: how it runs on a device, and the memory that it works in from the first round to the last."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ups_fast.data.images import Images, View, memory_format
from ups_fast.fullgraph import fullgraph
from ups_fast.methods import Batch, Layout, Method
from ups_fast.ops import has_kernels
from ups_fast.reference import dropout_keys

WARM_UP = 3  # steps before a capture, in which libraries choose their kernels and allocate


class StepPlan(NamedTuple):
    """How the training step runs, and why."""

    mode: str  # "eager", "compile": by torch.compile, "graph": the same, and the whole step as one CUDA graph
    dtype: torch.dtype  # of convolutions and products
    why: str


def plan_step(step: str, precision: str, device: torch.device) -> StepPlan:
    """What `runtime.step` and `runtime.precision` mean on this device.

    Raises ValueError where it cannot be: a graph needs a GPU, and our kernels on it.
    """
    half = has_bfloat16(device) if precision == "auto" else precision == "bfloat16"
    dtype = torch.bfloat16 if half else torch.float32
    graphs = device.type == "cuda" and has_kernels(device)
    if step == "graph" and not graphs:
        lack = "has no fused kernels" if device.type == "cuda" else "is no GPU"
        raise ValueError(f"graph needs a GPU with fused kernels, but {device} {lack}: use auto")
    if step != "auto":
        return StepPlan(step, dtype, f"runtime.step={step}")
    if device.type == "cuda":
        return StepPlan(
            "graph" if graphs else "compile", dtype, "on a GPU" + " without kernels" * (not graphs)
        )
    return StepPlan("eager", dtype, "on a CPU compiled steps were no faster")


def has_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 are faster than of float32 there."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    tell = getattr(torch.cpu, "get_capabilities", dict)  # which an older torch lacks
    cpu: dict[str, bool] = tell()
    return bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16"))


def as_it_is(function: Callable) -> Callable:
    return function


class TrainStep:
    """The step of a run: augment, forward, backward, optimizer, sum of the losses, on a batch of sample ids.

    All that it reads or writes keeps its place in memory, and `start` begins a round in place: so a CUDA graph can
    repeat the step, and no round but one with other views, or other groups for a method that splits batches, compiles
    or captures anything again.
    """

    loss: Tensor  # float32 [], sum over the steps since somebody last set it to 0
    views: tuple[View, ...]

    def __init__(
        self,
        method: Method,  # on the device of the images
        images: Images,  # N of them
        plan: StepPlan,
        *,
        momentum: float,
        optimizer: str = "sgd",
        weight_decay: float,
        decay_norms: bool = True,
    ) -> None:
        self.method, self.images, self.plan, self.device = method, images, plan, images.device
        self.world = method.world
        method.dtype = plan.dtype
        self.loss_of = method.prepare(as_it_is if plan.mode == "eager" else fullgraph)
        self.loss, self.lr, self.t = (torch.zeros((), device=self.device) for _ in range(3))
        self.tables: dict[str, Tensor] = {}  # [N, ...] by sample id
        self.seeds = torch.zeros(2, dtype=torch.int64, device=self.device)  # of augmentation, of dropout
        self.rows = torch.zeros(2, 0, dtype=torch.int64, device=self.device)  # a batch: sample ids, draws
        # [b, C, H, W], [b, C, T, H, W], or [b, d] of the b = B / R rows of one of R processes.
        self.batch = torch.zeros(0, device=self.device)
        self.layout, self.views = Layout((), 0), ()
        self.unreadable = 0  # how many images the tables know to be unreadable
        # Which are, as all processes of the run know; of one process, at once.
        self.gone: Mapping[int, str] = images.unreadable if self.world.size == 1 else dict(images.unreadable)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.captures = 0
        trained = method.trained()
        groups = [list(trained.values())]
        decays = [weight_decay]
        if not decay_norms:  # of biases and of normalization neither
            small = {name for name, p in trained.items() if p.ndim <= 1 or name.endswith("bias")}
            groups = [
                [p for name, p in trained.items() if (name in small) == spared] for spared in (False, True)
            ]
            decays.append(0.0)
        made = [{"params": group, "weight_decay": each} for group, each in zip(groups, decays, strict=True)]
        self.optimizer: torch.optim.Optimizer
        if optimizer == "sgd":
            self.optimizer = torch.optim.SGD(made, momentum=momentum, nesterov=momentum > 0, fused=True)
            parts = ["momentum_buffer"]
        else:
            self.optimizer = torch.optim.AdamW(made, betas=(momentum, 0.999), fused=True)
            parts = ["exp_avg", "exp_avg_sq", "step"]
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr  # a tensor: a number would be part of the graph
        # There from the start, as a graph could not make them: a first step on zeros is the same as on none.
        self.momentum: dict[str, Tensor] = {}
        for name, parameter in trained.items():
            for part in parts:
                made_for = (
                    torch.zeros((), device=self.device) if part == "step" else torch.zeros_like(parameter)
                )
                self.momentum[name if len(parts) == 1 else f"{name}/{part}"] = made_for
                self.optimizer.state[parameter][part] = made_for

    @torch.no_grad()
    def start(
        self,
        layout: Layout,
        views: tuple[View, ...],  # of the layout's groups, their rows at this process
        tables: Mapping[str, Tensor],  # as of `Targets`
        weights: Mapping[str, Tensor],  # as of method.state_dict()
        momentum: Mapping[str, Tensor] | None = None,  # as `self.momentum`; None: zeros
        *,
        augment_seed: int,
        dropout_seed: int,
    ) -> None:
        """Begins a round, or goes on in the middle of one. All processes have the weights of process 0."""
        self.method.load_state_dict(weights)
        self.world.copy_(list(self.method.state_dict().values()))
        self.method.train()
        for name, buffer in self.momentum.items():
            buffer.copy_(momentum[name]) if momentum else buffer.zero_()
        everything = {**tables, "readable": torch.ones(len(self.images), dtype=torch.bool)}
        fits = {name: (each.shape, each.dtype) for name, each in everything.items()}
        if fits == {name: (each.shape, each.dtype) for name, each in self.tables.items()}:
            for name, table in self.tables.items():
                table.copy_(everything[name])
        else:
            self.tables = {name: each.to(self.device, copy=True) for name, each in everything.items()}
            self.graph = None
        self.unreadable = 0
        self.seeds[0], self.seeds[1] = augment_seed, dropout_seed
        if views != self.views:
            shape = layout.rows // self.world.size, *self.images.shape
            self.batch = torch.zeros(shape, device=self.device)
            self.batch = self.batch.to(memory_format=memory_format(self.batch.ndim))
            self.rows, self.views, self.graph = self.rows.new_zeros(2, layout.rows), views, None
        if self.method.splits and layout.groups != self.layout.groups:
            self.graph = None
        self.layout = layout
        self.method.begin(layout)
        if self.plan.mode == "graph" and self.graph is None:
            self.graph = self._capture()

    def __call__(
        self,
        index: Tensor,  # int64 [B], sample ids, group by group
        draw: Tensor,  # int64 [B], which of a sample's augmentations and dropout masks
        lr: float,
        t: float = 0.0,  # progress of the schedule, in [0, 1)
    ) -> None:
        """One step, before which `images.ahead` was asked; adds its loss to `loss`. Never waits for the device.

        An image that is unreadable stays in its batch, but nothing is learned from it any more.
        """
        if len(self.gone) > self.unreadable:
            gone = torch.tensor(list(self.gone), device=self.device)
            for name, table in self.tables.items():
                table[gone] = -1 if name == "target" else 0
            self.unreadable = len(gone)
        self.rows[0].copy_(index)
        self.rows[1].copy_(draw)
        self.lr.fill_(lr)
        self.t.fill_(t)
        if self.graph is None:
            self._step()
        else:
            self.graph.replay()

    def _step(self) -> None:
        index, draw = self.rows
        mine, draw = self.world.own(index), self.world.own(draw)
        self.images.read(mine, draw, self.views, seed=self.seeds[0], out=self.batch)
        keys = dropout_keys(mine, seed=self.seeds[1], draw=draw)
        rows = {name: table[index] for name, table in self.tables.items()}
        batch = Batch(self.batch, keys, index, rows, self.t)
        self.loss += self.method.step(self.loss_of, self.optimizer, batch)

    def _capture(self) -> torch.cuda.CUDAGraph:
        """The step as a CUDA graph; what its trial steps change is put back."""
        self.captures += 1
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        changing = [*self.method.state_dict().values(), *self.momentum.values(), self.loss]
        with torch.cuda.device(self.device), _put_back(changing), torch.enable_grad():
            stream = torch.cuda.Stream()
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self._step()
            # NCCL's own thread asks for events at any time, which else would end the capture.
            mode: Any = {"capture_error_mode": "thread_local"} if self.world.size > 1 else {}
            with torch.cuda.graph(graph, stream=stream, **mode):
                self._step()
            here.wait_stream(stream)
        return graph


@contextmanager
def _put_back(tensors: list[Tensor]) -> Iterator[None]:
    """Gives the tensors their values back afterwards, in place."""
    before = [tensor.clone() for tensor in tensors]
    yield
    for tensor, value in zip(tensors, before, strict=True):
        tensor.copy_(value)
