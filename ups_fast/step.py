"""The training step: how it runs on a device, and the memory that it works in from the first round to the last."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ups_fast.data.resident import ResidentImages
from ups_fast.data.stream import FileImages
from ups_fast.engine import Mix, Supervision
from ups_fast.fullgraph import fullgraph
from ups_fast.ops import has_kernels, ups_loss
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


def loss_function(
    model: nn.Module, *, compiled: bool = False, dtype: torch.dtype = torch.float32
) -> Callable[..., Tensor]:
    """The loss of a batch as a function of (images, keys, target, positive, negative), as `train_step` has them.

    One forward pass over the joined batch, so that batch-norm sees both kinds; then CE + NCE.

    compiled  by `fullgraph`, anew for each shape of the batch and for nothing else
    dtype     of convolutions and products; statistics of batch-norm, the loss and all weights stay float32
    """

    def loss(
        images: Tensor, keys: Tensor | None, target: Tensor, positive: Tensor, negative: Tensor
    ) -> Tensor:
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            logits = model(images, keys)
        return ups_loss(logits, target, positive, negative)

    return fullgraph(loss) if compiled else loss


def train_step(
    loss_of: Callable[..., Tensor],  # of `loss_function`
    optimizer: torch.optim.Optimizer,
    images: Tensor,  # float32 [B, C, H, W]
    keys: Tensor | None,  # int32 [B], by which dropout drops; None: by torch's generator
    target: Tensor,  # int64 [B], -1 where not positive
    positive: Tensor,  # bool [B]
    negative: Tensor,  # int32 [B, ceil(C / 32)]
) -> Tensor:  # float32 [], on the device
    """One step of the optimizer. Never waits for the device."""
    loss = loss_of(images, keys, target, positive, negative)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()


class TrainStep:
    """The step of a run: augment, forward, backward, optimizer, sum of the losses, on a batch of sample ids.

    All that it reads or writes keeps its place in memory, and `start` begins a round in place: so a CUDA graph can
    repeat the step, and no round but one with another batch size compiles or captures anything again.
    """

    loss: Tensor  # float32 [], sum over the steps since somebody last set it to 0

    def __init__(
        self,
        model: nn.Module,
        images: ResidentImages | FileImages,  # N of them
        n_classes: int,
        plan: StepPlan,
        *,
        momentum: float,
        weight_decay: float,
    ) -> None:
        self.model, self.images, self.plan, self.device = model, images, plan, images.device
        self.loss_of = loss_function(model, compiled=plan.mode != "eager", dtype=plan.dtype)
        self.loss, self.lr = (torch.zeros((), device=self.device) for _ in range(2))
        self.target = torch.zeros(len(images), dtype=torch.int64, device=self.device)
        self.negative = torch.zeros(
            len(images), (n_classes + 31) // 32, dtype=torch.int32, device=self.device
        )
        self.seeds = torch.zeros(2, dtype=torch.int64, device=self.device)  # of augmentation, of dropout
        self.rows = torch.zeros(2, 0, dtype=torch.int64, device=self.device)  # a batch: sample ids, draws
        self.positive = torch.zeros(0, dtype=torch.bool, device=self.device)
        # [B, C, S, S] where images come from files: their loader writes there; others are read in the step.
        self.batch: Tensor | None = None
        self.unreadable = 0  # how many images the tables know to be unreadable
        self.graph: torch.cuda.CUDAGraph | None = None
        self.captures = 0
        self.optimizer = torch.optim.SGD(
            model.parameters(),
            momentum=momentum,
            nesterov=momentum > 0,
            weight_decay=weight_decay,
            fused=True,
        )
        self.optimizer.param_groups[0]["lr"] = self.lr  # a tensor: a number would be part of the graph
        # There from the start, as a graph could not make them: SGD's first step on zeros is the same as on none.
        self.momentum = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for name, parameter in model.named_parameters():
            self.optimizer.state[parameter]["momentum_buffer"] = self.momentum[name]

    @torch.no_grad()
    def start(
        self,
        told: Supervision,
        mix: Mix,
        weights: Mapping[str, Tensor],  # as of model.state_dict()
        momentum: Mapping[str, Tensor] | None = None,  # as `self.momentum`; None: zeros
        *,
        augment_seed: int,
        dropout_seed: int,
    ) -> None:
        """Begins a round, or goes on in the middle of one."""
        self.model.load_state_dict(weights)
        self.model.train()
        for name, buffer in self.momentum.items():
            buffer.copy_(momentum[name]) if momentum else buffer.zero_()
        self.target.copy_(told.target)
        self.negative.copy_(told.negative)
        self.unreadable = 0
        self.seeds[0], self.seeds[1] = augment_seed, dropout_seed
        positive = mix.positive(self.device)
        if len(positive) != len(self.positive):
            self.rows, self.positive = self.rows.new_zeros(2, len(positive)), positive
            if isinstance(self.images, FileImages):
                shape = len(positive), self.images.channels, self.images.size, self.images.size
                self.batch = torch.zeros(shape, device=self.device).to(memory_format=torch.channels_last)
            self.graph = self._capture() if self.plan.mode == "graph" else None
        self.positive.copy_(positive)

    def __call__(
        self,
        index: Tensor,  # int64 [B], sample ids, the positives first
        draw: Tensor,  # int64 [B], which of a sample's augmentations and dropout masks
        lr: float,
    ) -> None:
        """One step; adds its loss to `loss`. Images from files must be in `batch`. Never waits for the device.

        An image that is unreadable stays in its batch, but has neither a target nor negatives any more.
        """
        if len(self.images.unreadable) > self.unreadable:
            gone = torch.tensor(list(self.images.unreadable), device=self.device)
            self.target[gone], self.negative[gone], self.unreadable = -1, 0, len(gone)
        self.rows[0].copy_(index)
        self.rows[1].copy_(draw)
        self.lr.fill_(lr)
        if self.graph is None:
            self._step()
        else:
            self.graph.replay()

    def _step(self) -> None:
        index, draw = self.rows
        images = self.batch
        if isinstance(self.images, ResidentImages):
            images = self.images.augmented(index, seed=self.seeds[0], epoch=draw)
        assert images is not None
        keys = dropout_keys(index, seed=self.seeds[1], draw=draw)
        target, negative = self.target[index], self.negative[index]
        positive = self.positive & (target >= 0)
        self.loss += train_step(self.loss_of, self.optimizer, images, keys, target, positive, negative)

    def _capture(self) -> torch.cuda.CUDAGraph:
        """The step as a CUDA graph; what its trial steps change is put back."""
        self.captures += 1
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        changing = [*self.model.state_dict().values(), *self.momentum.values(), self.loss]
        with torch.cuda.device(self.device), _put_back(changing), torch.enable_grad():
            stream = torch.cuda.Stream()
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self._step()
            with torch.cuda.graph(graph, stream=stream):
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
