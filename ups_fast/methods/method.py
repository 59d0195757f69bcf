"""What a method is: which images a batch has, what is learned from them, and what is remembered from step to step.

A method is an nn.Module, and its state_dict is everything that it learns: checkpoints and CUDA graphs need no more.
docs/methods.md shows how to add one in a file.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ups_fast.models import Network
from ups_fast.schema import key
from ups_fast.selection import Thresholds
from ups_fast.tasks import SINGLE, Task
from ups_fast.world import ALONE, World


class Group(NamedTuple):
    """Rows of every batch that are drawn and seen alike."""

    source: str  # the list of `Targets` that their samples are drawn from
    rows: int
    view: str = "strong"  # all of the run's augmentation, or "weak": mirrored and shifted alone
    view_of: int | None = None  # number of an earlier group: the same samples, augmented again


class Layout(NamedTuple):
    """How a round's batches are made up."""

    groups: tuple[Group, ...]
    steps: int  # of an epoch
    note: str = ""  # a sentence for the user where the sizes forced something unusual

    @property
    def rows(self) -> int:
        return sum(group.rows for group in self.groups)

    def own(self, world: World) -> Layout:
        """The layout of the rows that are this process's: of each group equally many, or one row more."""
        if world.size == 1:
            return self
        groups, first = [], 0
        for group in self.groups:
            mine = [-(-(each - world.rank) // world.size) for each in (first, first + group.rows)]
            groups.append(group._replace(rows=mine[1] - mine[0]))
            first += group.rows
        return self._replace(groups=tuple(groups))


class Targets(NamedTuple):
    """What a round learns from."""

    lists: dict[str, Tensor]  # int64 [n] on the host: sample ids to draw from
    tables: dict[str, Tensor]  # [N, ...] by sample id, such as target: int64 [N], -1 where there is none


class Known(NamedTuple):
    """What is known when a round begins. All on the host."""

    round: int
    last: bool  # no round comes after it
    labels: Tensor  # int64 [N], of several labels int8 [N, C]; to be read at `labeled` only
    labeled: Tensor  # int64 [L], sample ids
    unlabeled: Tensor  # int64 [U], likewise
    found: Any  # by the last round's network, a record of the task such as PseudoLabels; None: nothing yet
    generator: torch.Generator


class Batch(NamedTuple):
    """What a step learns from: B rows, the groups of the layout one after the other. All on the device.

    In a run of R processes each has the images of its own B / R rows, and all else of the whole batch.
    """

    images: Tensor  # float32 [B / R, C, H, W], or of features [B / R, d]
    keys: Tensor | None  # int32 [B / R], by which dropout drops; None: by torch's generator
    index: Tensor  # type: ignore[assignment]  # int64 [B], sample ids
    # [B, ...] of each of the tables, and "readable": bool [B], False where a file is gone.
    rows: dict[str, Tensor]
    t: Tensor  # float32 [], progress of the schedule in [0, 1)


@dataclass(frozen=True)
class Setting:
    """What a method is made from."""

    network: Callable[[], Network]  # a new one, its weights drawn from torch's generator
    options: Any  # the method's own `Options`
    select: Thresholds
    n_images: int  # of the training set, N
    n_classes: int
    n_unlabeled: int = 0
    batch_size: int = 1  # as `lay_out` gets it
    features: int = 0  # width of what the classifier gets
    labeled_repeats: int = 1
    ema: float = 0.0  # decay of an average of the weights, which then labels and is tested; 0: none
    task: Task = SINGLE  # what a label is
    world: World = ALONE  # the processes of the run


@dataclass
class Options:
    """The keys that every method has."""

    name: str = key("ups", "How to learn from unlabeled images. docs/methods.md explains each method.")


class Method(nn.Module):
    """The base of all methods: one network, learning from lists of samples."""

    Options: ClassVar[type[Options]] = Options
    # False: each round trains a new network on its own schedule. True: one training and one schedule, which the
    # rounds divide into equal parts.
    continues: ClassVar[bool] = False
    two_views: ClassVar[bool] = False  # it needs a strong view that differs from the weak one
    many_heads: ClassVar[bool] = False  # its loss trains several heads, each as if it were alone
    many_labels: ClassVar[bool] = False  # it serves samples with several labels, too
    splits: ClassVar[bool] = True  # its loss treats the groups of a batch differently, by their place

    network: Network  # the one that is trained
    ema: Network | None  # its average
    dtype = torch.float32  # of convolutions and products
    layout: Layout  # of the round
    mine: Layout  # of the rows that are this process's

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.options, self.n_classes, self.n_images = setting.options, setting.n_classes, setting.n_images
        self.decay, self.task, self.world = setting.ema, setting.task, setting.world
        self.network = setting.network()
        self.ema = frozen_copy(self.network) if self.decay else None

    @staticmethod
    def limits(options: Any, limits: Thresholds) -> Thresholds:
        """The thresholds of the labeling: those of `select`, unless the method has its own rule."""
        return limits

    @property
    def answers(self) -> Network:
        """The network that is tested, labels and is saved."""
        return self.network if self.ema is None else self.ema

    def trained(self) -> dict[str, nn.Parameter]:
        """The weights that the optimizer moves, by name."""
        return {name: weight for name, weight in self.named_parameters() if weight.requires_grad}

    def train(self, mode: bool = True) -> Method:
        super().train(mode)
        if self.ema is not None:
            self.ema.eval()
        return self

    def ranges(self) -> dict[str, tuple[float, float]]:
        """Of buffers that serve as indices, by name: the lowest and highest value. Checkpoints are checked for them."""
        return {}

    # What a round learns from ------------------------------------------------------------------------------

    def targets(self, known: Known) -> Targets:
        """By default the labels, beside all unlabeled samples."""
        tables = self.task.given(known.labels, known.labeled)
        return Targets({"labeled": known.labeled, "unlabeled": known.unlabeled}, tables)

    def lay_out(self, sizes: dict[str, int], batch_size: int) -> Layout:
        """The groups of the round's batches; `sizes` are those of the lists. ValueError where it cannot be."""
        raise NotImplementedError

    def check(self, sizes: dict[str, int], batch_size: int) -> None:
        """ValueError, one sentence, where data of these sizes cannot serve the method. Before anything is written."""
        self.lay_out(sizes, batch_size)

    def begin(self, layout: Layout) -> None:
        """A round begins, on the device."""
        self.layout, self.mine = layout, layout.own(self.world)

    # A step ------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch) -> Tensor:  # float32 []
        """Of the whole batch, at each process. Compiled as one graph, so: no wait for the device, and what it remembers
        changes in place."""
        raise NotImplementedError

    def prepare(self, how: Callable[[Callable], Callable]) -> Callable[[Batch], Tensor]:
        """The loss as a function, made by `how` from a plain one: itself, or compiled."""

        def loss(batch: Batch) -> Tensor:
            return self.loss(batch)

        return how(loss)

    def step(
        self, loss_of: Callable[[Batch], Tensor], optimizer: torch.optim.Optimizer, batch: Batch
    ) -> Tensor:  # float32 []
        """A step of the optimizer. Never waits for the device.

        loss_of  `loss`, perhaps compiled
        """
        loss = loss_of(batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.descend(optimizer)
        self.after_step(batch)
        return loss.detach()

    def descend(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer's step, by the gradients of all processes, which also share the statistics of batch-norm."""
        if self.world.size > 1:
            gradients = [weight.grad for weight in self.trained().values() if weight.grad is not None]
            self.world.sum_(gradients, statistics(self))
        optimizer.step()

    @torch.no_grad()
    def after_step(self, batch: Batch) -> None:
        """By default the average of the weights moves on."""
        if self.ema is not None:
            average(self.ema, self.network, self.decay)

    def keep(self, found: Any, round: int) -> Any:
        """Which of the selected labels of a round stay positive, before the class balance. By default all."""
        return found

    def end_round(self, look: Look) -> None:
        """Learns, once a round is trained and all is labeled, what the next one needs. By default nothing."""

    # For subclasses ----------------------------------------------------------------------------------------

    def logits(self, images: Tensor, keys: Tensor | None, network: nn.Module | None = None) -> Tensor:
        """One forward pass, by default of the trained network, in the run's precision; of the whole batch's rows."""
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.world.whole((network or self.network)(images, keys))

    def members(self, images: Tensor, keys: Tensor | None) -> Tensor:  # [H, B, n_classes]
        """One forward pass of each head of the trained network, likewise."""
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.world.whole(self.network.members(images, keys), dim=1)

    def split(self, rows: Tensor) -> Sequence[Tensor]:
        """The rows of a batch, group by group."""
        return rows.split([group.rows for group in self.layout.groups])

    def split_mine(self, rows: Tensor) -> Sequence[Tensor]:
        """Likewise of `images` and `keys`, which are of this process's rows."""
        return rows.split([group.rows for group in self.mine.groups])


class Look(NamedTuple):
    """What a method may look at when a round ends."""

    found: Any  # of the unlabeled samples, a record of the task on the host
    labels: Tensor  # int64 [N], to be read at `labeled` only
    labeled: Tensor  # int64 [L], sample ids of those that can be read
    # int64 [n] sample ids -> float32 [n, D], of clean images, on the device.
    features: Callable[[Tensor], Tensor]


def statistics(method: nn.Module) -> list[Tensor]:
    """Running means and variances of batch-norm that the step has moved, at each process by its own rows."""
    return [
        each
        for module in method.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
        for each in (module.running_mean, module.running_var)
        if each is not None
    ]


def frozen_copy(network: Network) -> Network:
    """With the same weights, which no optimizer moves."""
    return copy.deepcopy(network).requires_grad_(False).eval()


@torch.no_grad()
def average_weights(ema: nn.Module, network: nn.Module, decay: float | Tensor) -> None:
    """ema <- decay * ema + (1 - decay) * weights, in place."""
    theirs: list[Tensor] = list(ema.parameters())
    ours: list[Tensor] = list(network.parameters())
    if isinstance(decay, Tensor):
        for mean, weight in zip(theirs, ours, strict=True):
            mean.lerp_(weight, 1 - decay)
    else:
        torch._foreach_lerp_(theirs, ours, 1 - decay)


@torch.no_grad()
def average(ema: nn.Module, network: nn.Module, decay: float | Tensor) -> None:
    """The same, and statistics of normalization are copied."""
    average_weights(ema, network, decay)
    for old, new in zip(ema.buffers(), network.buffers(), strict=True):
        old.copy_(new)


def check_mu(mu: int, unlabeled: int, batch_size: int) -> int:
    """Unlabeled rows of a batch; ValueError where there are not so many samples."""
    if mu * batch_size > unlabeled:
        raise ValueError(
            f"method.mu={mu} asks for {mu * batch_size:,} unlabeled samples in a batch, but there are {unlabeled:,}: "
            "lower method.mu or train.batch_size"
        )
    return mu * batch_size


def labeled_and_unlabeled(
    mu: int, sizes: dict[str, int], batch_size: int, view: str = "strong", again: Sequence[str] = ()
) -> Layout:
    """`batch_size` labeled and mu times as many unlabeled rows in one view, and the latter again in other views.

    An epoch passes once over as many images as there are. ValueError where a batch needs more than that.
    """
    unlabeled = check_mu(mu, sizes["unlabeled"], batch_size)
    groups = [Group("labeled", batch_size, view), Group("unlabeled", unlabeled, view)]
    groups += [Group("unlabeled", unlabeled, each, view_of=1) for each in again]
    return Layout(tuple(groups), epoch_steps(list(sizes.values()), batch_size + unlabeled))


def epoch_steps(lists: Sequence[int], rows: int) -> int:
    """Steps of an epoch: as many as complete batches of `rows` distinct images fill, at least one."""
    return max(1, sum(lists) // rows)
