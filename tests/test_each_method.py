"""What holds for every method in METHODS: its steps reach all that it trains, and none learns from what is gone."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch

from ups_fast.batches import epoch_order, views_of
from ups_fast.data import load_set
from ups_fast.methods import METHODS, Batch

# The trainer's packages, which gpu-check can do without. A fault of ours is no reason to skip.
for package in ("yaml", "rich", "safetensors", "sklearn", "tensorboard"):
    pytest.importorskip(package)
config, build, rounds = (import_module(f"ups_fast.{name}") for name in ("config", "build", "rounds"))

DIGITS = Path(__file__).parents[1] / "configs/digits.yaml"
WORDS = ["model.name=wrn-10-1", "train.weight_decay=0", "train.batch_size=16", "train.round0_batch_size=0"]
ROWS = 6  # of each group, which are gone
each_method = pytest.mark.parametrize("name", METHODS)


class Steps:
    """A run in its first round, and the batches of its first epoch."""

    def __init__(self, name: str, *words: str) -> None:
        cfg = config.load(DIGITS, [f"method.name={name}", *WORDS, *words])
        torch.manual_seed(0)
        self.run = build.prepare(cfg, load_set("digits", ""))
        targets, self.layout = rounds.targets_and_layout(self.run)
        self.tables = targets.tables
        self.ids, self.draws = epoch_order(targets.lists, self.layout, self.run.stream("epoch", 0), 0)
        views = views_of(self.layout.groups, self.run.policies)
        weights = self.run.new_method().state_dict()
        seeds = {"augment_seed": 1, "dropout_seed": 2}
        self.run.step.start(self.layout, views, self.tables, weights, **seeds)

    def step(self, n: int, t: float) -> float:
        """The loss of step n."""
        run, at = self.run, n % len(self.ids)
        rows = self.ids[at], self.draws[at]
        fetched = run.images.ahead(iter([rows]), run.step.views, seed=1, out=run.step.batch)
        run.step.loss.zero_()
        next(fetched)
        run.step(*rows, 0.01, t)
        return float(run.step.loss)


@each_method
def test_two_steps_are_finite_and_move_every_trained_weight(name: str) -> None:
    steps = Steps(name)
    before = {key: weight.detach().clone() for key, weight in steps.run.method.trained().items()}
    for n in range(2):
        assert torch.tensor(steps.step(n, 0.5 + n / 1000)).isfinite()
    still = [key for key, weight in steps.run.method.trained().items() if weight.equal(before[key])]
    assert not still, f"the loss does not reach {still}"


@pytest.mark.gpu
@each_method
def test_its_graph_takes_its_eager_steps_on_a_gpu(name: str) -> None:
    """The first ones: rounding, which differs, has not grown much yet; a wrong slope of mish moved them by 0.004."""
    losses = []
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        for mode in ("eager", "graph"):
            words = [
                "device=cuda",
                f"runtime.step={mode}",
                "runtime.precision=float32",
                "model.activation=mish",
            ]
            steps = Steps(name, *words)
            losses.append([steps.step(n, 0.5 + n / 1000) for n in range(4)])
            assert steps.run.step.captures == (mode == "graph")
    assert losses[1] == pytest.approx(losses[0], rel=1e-3, abs=1e-4)


@each_method
def test_nothing_is_learned_from_files_that_are_gone(name: str) -> None:
    """Of a network that is sure of all, without the statistics of batch-norm, which see such an image, too."""
    steps = Steps(name)
    method, index = steps.run.method, steps.ids[0]
    with torch.no_grad():
        for key, weight in method.named_parameters():
            if key.endswith("weight") and weight.ndim == 2 and weight.shape[0] == method.n_classes:
                weight *= 100
    method.eval()
    rows = {key: table[index].clone() for key, table in steps.tables.items()}
    rows["readable"] = torch.ones(len(index), dtype=torch.bool)
    gone = torch.cat([torch.arange(group.rows) < ROWS for group in steps.layout.groups])
    for key, table in rows.items():
        table[gone] = -1 if key == "target" else 0
    images = torch.randn(len(index), 1, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    keys = torch.arange(len(index), dtype=torch.int32)
    loss = method.loss(Batch(images, keys, index, rows, torch.tensor(0.9)))
    (learned,) = torch.autograd.grad(loss, images)
    assert loss.isfinite() and learned.any()
    assert not learned[gone].any()
