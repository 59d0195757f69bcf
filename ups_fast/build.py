"""From the config to all that the rounds work on: the method, its step and the state of a new run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from ups_fast.config import Config, limits_of
from ups_fast.data import Images, ImageSet, Noise
from ups_fast.data.fingerprint import fingerprint
from ups_fast.data.images import memory_format
from ups_fast.folder import Nowhere, RunFolder
from ups_fast.frozen import open_features
from ups_fast.fullgraph import fullgraph
from ups_fast.inputs import naming_key, open_images, policies_of, split_of, val_of
from ups_fast.methods import METHODS, Method, Setting
from ups_fast.models import KINDS, Frozen, Network
from ups_fast.models.backbone import pixel_scale
from ups_fast.models.pretrained import LITE, weights_file
from ups_fast.models.saved import rebuild
from ups_fast.models.synced import synced
from ups_fast.policy import POLICIES, Policy
from ups_fast.seeds import derive
from ups_fast.selection import labeling_rows, passes_over, skipped
from ups_fast.state import Checkpoint, Keeps
from ups_fast.step import TrainStep, plan_step
from ups_fast.tasks import MULTI, Task, task_of
from ups_fast.world import ALONE, World


@dataclass
class Run:
    """All that the rounds work on. What is wrong with config and data has been said before one is made."""

    cfg: Config
    data: ImageSet
    device: torch.device
    about: dict[str, Any]  # what a saved network says of itself
    policies: dict[str, Any]  # by the views of a method
    images: Images  # the training set
    test_images: Images
    new_method: Callable[[], Method]  # on the host, its weights drawn from torch's generator
    step: TrainStep
    forward: Callable[..., Tensor]  # `passes_over`, perhaps compiled
    state: Checkpoint  # at first that of a new run
    store: RunFolder
    frozen: Frozen | None = None  # on whose features the run works, in place of the images
    resumed: int = 0  # rounds that the folder held when the run was resumed
    world: World = ALONE  # the processes of the run

    @property
    def method(self) -> Method:
        return self.step.method

    @property
    def network(self) -> Network:
        """That of the method's which is tested, labels and is saved, behind the frozen one if there is one."""
        return self.frozen.with_head(self.method.answers) if self.frozen else self.method.answers

    @property
    def folder(self) -> Path:
        return Path(self.cfg.run_dir) if self.cfg.run_dir else self.store.path

    @property
    def saved_in(self) -> str:
        """A sentence about what a stopped run leaves."""
        return f"everything is saved in {self.folder}" if self.cfg.run_dir else "nothing is saved"

    @property
    def truth(self) -> Tensor:
        """int64 [U], of several labels int8 [U, C], of the unlabeled images; -1 where unknown."""
        return self.data.train_labels[self.state.unlabeled]

    @property
    def task(self) -> Task:
        """What a label is."""
        return self.method.task

    @property
    def keeps(self) -> Keeps:
        goes_on = self.method.continues
        return Keeps(weights=goes_on or self.cfg.train.warm_start, momentum=goes_on)

    def budget(self, round: int) -> tuple[int, int]:
        """Epochs and batch size of a round; round 0 may have its own where each round is a training of its own."""
        train, own = self.cfg.train, round == 0 and not self.method.continues
        return (
            train.round0_epochs if own and train.round0_epochs else train.epochs,
            train.round0_batch_size if own and train.round0_batch_size else train.batch_size,
        )

    def lr(self, round: int) -> tuple[str, float]:
        """The key of the highest learning rate that holds in this round, and its value."""
        train = self.cfg.train
        if round and train.later_rounds_lr and not self.method.continues:
            return "later_rounds_lr", train.later_rounds_lr
        return "lr", train.lr

    def epochs_done(self) -> int:
        """Of the whole run."""
        return sum(self.budget(round)[0] for round in range(self.state.round)) + self.state.epoch

    def labeling_rows(self) -> int:
        return self.cfg.select.batch_size or labeling_rows(self.device, self.images.shape)

    def seed(self, stream: str, *path: int) -> int:
        return derive(self.cfg.seed, stream, self.state.round, *path)

    def stream(self, stream: str, *path: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed(stream, *path))


def prepare(cfg: Config, data: ImageSet, console: Console | None = None, world: World = ALONE) -> Run:
    """Raises ValueError, with the key and one sentence, where config and data cannot work.

    Writes nothing, but the features of a frozen network into its cache; `console` hears of these.
    """
    device = world.pick_device(cfg.device)
    about = _about(cfg, data)
    select, train = cfg.select, cfg.train
    labeled, unlabeled = split_of(cfg, data)
    labeled, val = val_of(cfg, data, labeled)
    with naming_key("model.name"):
        frozen = _frozen(cfg, about)
        network: Callable[[], Network] = frozen.new_head if frozen else partial(rebuild, about)
        if train.sync_bn and world.size > 1:
            network = partial(_synced, network)
        weights = weights_file(cfg.model.name, cfg.model.weights)
        trial = network().eval()
    shape = (frozen.n_features,) if frozen else data.shape
    _check_small_batches(cfg, trial, (1, *shape), world)
    with torch.no_grad():
        features = trial.embed(trial.prefix(torch.zeros(1, *shape)), None).shape[1]
    setting = Setting(
        network=network,
        options=cfg.method,
        select=limits_of(cfg),
        n_images=len(data.train_labels),
        n_unlabeled=len(unlabeled),
        n_classes=len(data.classes),
        batch_size=train.batch_size,
        features=features,
        labeled_repeats=train.labeled_repeats,
        ema=train.ema,
        task=task_of(data.train_labels),
        world=world,
    )
    make = METHODS[cfg.method.name]
    method = make(setting)
    policies = policies_of(cfg, shape)
    _check_method(cfg, method, policies, len(labeled), len(unlabeled), len(val))
    _check_shares(cfg, method, world)
    lying: Any = {"memory_format": memory_format(max(4, 1 + len(shape)))}
    method.to(device, **lying)
    with naming_key("runtime.step"):
        plan = plan_step(cfg.runtime.step, cfg.runtime.precision, device)
    with naming_key("select.mc_layers"):
        skipped(method.network, select.mc_layers)
    images: Images
    test_images: Images
    if frozen:
        images, test_images = open_features(cfg, data, frozen, device, console or Console(quiet=True), world)
    else:
        data = replace(data, mean=tuple(about["mean"]), std=tuple(about["std"]))
        images = open_images(cfg, data, device, policies["strong"])
        test_images = open_images(cfg, data, device, POLICIES["none"], test=True)
    step = TrainStep(
        method,
        images,
        plan,
        momentum=train.momentum,
        optimizer=train.optimizer,
        weight_decay=train.weight_decay,
        decay_norms=train.decay_norms,
    )
    state = Checkpoint(fingerprint(data, weights), labeled, unlabeled, val)
    forward = passes_over if plan.mode == "eager" else fullgraph(passes_over)
    store = RunFolder(Path(cfg.run_dir)) if cfg.run_dir and world.main else Nowhere()
    return Run(
        cfg,
        data,
        device,
        about,
        policies,
        images,
        test_images,
        lambda: make(setting),
        step,
        forward,
        state,
        store,
        frozen,
        world=world,
    )


def _about(cfg: Config, data: ImageSet) -> dict[str, Any]:
    """What a saved network says of itself. A pretrained one may have a mean and std of pixels of its own."""
    shape: dict[str, Any] = {"channels": data.shape[0], "size": list(data.shape[-2:])}
    if len(data.shape) == 4:
        shape["frames"] = data.shape[1]
    if len(data.shape) == 1:
        shape = {"columns": data.shape[0]}
    mean, std = data.mean, data.std
    if cfg.model.freeze:  # it normalizes on its own
        mean, std = (0.0,) * len(mean), (1.0,) * len(std)
    elif cfg.model.name in LITE:
        mean, std = (each[: len(data.mean)] for each in pixel_scale(cfg.model.name))
    model = {"model": asdict(cfg.model), "heads": cfg.select.heads, "classes": data.classes}
    if cfg.select.uncertainty in KINDS and cfg.select.uncertainty != "dropout":
        model["dropout_kind"] = cfg.select.uncertainty
    task = {"task": MULTI.name} if task_of(data.train_labels) is MULTI else {}
    return {**model, **shape, **task, "mean": mean, "std": std}


def _frozen(cfg: Config, about: Mapping[str, Any]) -> Frozen | None:
    """The network that is not trained, if the config asks for one."""
    if not cfg.model.freeze:
        return None
    network = rebuild(about).eval()
    assert isinstance(network, Frozen)
    return network


def _check_method(
    cfg: Config, method: Method, policies: Mapping[str, Any], labeled: int, unlabeled: int, val: int
) -> None:
    """ValueError where data, batch and method do not go together."""
    name, train = f"method.name={cfg.method.name}", cfg.train
    strong = policies["strong"]
    if method.two_views and isinstance(strong, Noise) and strong == policies["weak"]:
        raise ValueError(
            f"{name} compares a weak view of each row with a strong one, but data.noise and data.drop_columns are 0: "
            f"raise one of them{', or data.views' if cfg.model.freeze else ''}"
        )
    if method.task is MULTI and not method.many_labels:
        able = ", ".join(each for each, cls in METHODS.items() if cls.many_labels)
        raise ValueError(f"samples with several labels are for method.name={able}, got {name}")
    if method.task is MULTI and getattr(method.options, "schedule", "") == "curriculum":
        raise ValueError("method.schedule=curriculum is for one label a sample, and these data have several")
    if cfg.select.weight == "measured" and (method.task is not MULTI or not val):
        need = (
            "a validation part, such as data.val_share=0.2"
            if method.task is MULTI
            else "samples with several labels"
        )
        raise ValueError(f"select.weight=measured needs {need}")
    if cfg.select.heads > 1 and not method.many_heads:
        able = ", ".join(sorted(each for each, cls in METHODS.items() if cls.many_heads))
        raise ValueError(f"select.heads={cfg.select.heads} is for method.name={able}, got {name}")
    if (
        method.two_views
        and isinstance(strong, Policy)
        and not ((strong.ops and strong.n_ops) or any(strong.jitter) or strong.cutout)
    ):
        raise ValueError(
            f"{name} compares a weak view of each image with a strong one, but data.ops is empty: set data.ops=ups, "
            "and data.cutout to half of the images' side"
        )
    if getattr(method.options, "uncertainty", "off") == "passes" and not cfg.model.dropout:
        raise ValueError(
            "method.uncertainty=passes needs model.dropout above 0, got 0: without it all passes are equal"
        )
    if cfg.select.uncertainty == "augment" and policies["passes"] in (Policy(), Noise()):
        raise ValueError(
            "select.uncertainty=augment mirrors and shifts images, but data.flip is false and data.crop 0, which for "
            "images of fewer than 8 pixels is no shift: set one of them"
        )
    own = train.round0_batch_size and not method.continues
    for key in ("batch_size", *(["round0_batch_size"] if own else [])):
        with naming_key(f"{name} with train.{key}={getattr(train, key)}"):
            method.check({"labeled": labeled, "unlabeled": unlabeled}, getattr(train, key))


def _synced(network: Callable[[], Network]) -> Network:
    made = network()
    synced(made)
    return made


def _check_shares(cfg: Config, method: Method, world: World) -> None:
    """ValueError where a batch cannot be shared by the processes of the run."""
    for key in ("batch_size", *([] if method.continues else ["round0_batch_size"])):
        if (rows := getattr(cfg.train, key)) % world.size:
            raise ValueError(
                f"train.{key}={rows} cannot be shared by {world.size} processes: make it a multiple of {world.size}, "
                f"such as {max(1, round(rows / world.size)) * world.size}"
            )


def _check_small_batches(cfg: Config, model: nn.Module, shape: tuple[int, ...], world: World) -> None:
    """ValueError where batch-norm would meet a single value per channel: a batch of one, images down to 1x1."""
    train, share = cfg.train, 1 if cfg.train.sync_bn else world.size
    for key, size in (("round0_batch_size", train.round0_batch_size), ("batch_size", train.batch_size)):
        if size != share or (key == "round0_batch_size" and METHODS[cfg.method.name].continues):
            continue
        trial = copy.deepcopy(model).train()
        try:
            with torch.no_grad():
                trial(torch.zeros(shape), torch.zeros(1, dtype=torch.int32))
        except ValueError as error:
            raise ValueError(
                f"train.{key}={size} is too small a batch for model.name={cfg.model.name}, whose normalization "
                f"needs more than one value per channel: raise it to {2 * share} or more ({error})"
            ) from error
