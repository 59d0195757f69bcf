"""CoMatch: class probabilities and embeddings that train each other on a graph     Li et al., ICCV 2021

    L = CE + lambda_u mean([max q >= tau] H(q, strong 0)) + lambda_c mean(-sum_j Q_ij log S_ij)

q      softmax of the weak view, divided by the mean of the last 32 batches and made to sum 1, then smoothed by memory:
       q <- alpha q + (1 - alpha) A queue_q, A = row softmax(z_weak queue_z^T / t)
S      row softmax(z_strong0 z_strong1^T / t) of normalized embeddings z
Q      q q^T with diagonal 1, entries below T_c set to 0, rows to sum 1
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ups_fast.methods.fixmatch import Consistency, ConsistencyOptions, consistency, shares
from ups_fast.methods.method import (
    Batch,
    Layout,
    Setting,
    labeled_and_unlabeled,
)
from ups_fast.schema import key

ALIGNED = 32  # batches


@dataclass
class CoMatchOptions(ConsistencyOptions):
    tau: float = key(0.95, "Confidence from which on an unlabeled image is learned from.", within="[0, 1]")
    contrast: float = key(1.0, "Weight of the loss on the graph; the paper's lambda_c.", within="[0, 1000]")
    alpha: float = key(0.9, "Share of the network's own probabilities against the memory's.", within="[0, 1]")
    temperature: float = key(0.2, "Of the similarities; the paper's t.", within="(0, 100]")
    graph_tau: float = key(0.8, "Smallest similarity of probabilities on the graph; T_c.", within="[0, 1]")
    queue: int = key(5, "Batches in the memory.", within="[1, 1000]")
    embedding: int = key(64, "Width of the embeddings.", within="[1, 10000]")


class CoMatch(Consistency):
    Options = CoMatchOptions
    means: Tensor  # float32 [ALIGNED, C], of q in the last batches
    steps: Tensor  # int64 []
    queue_z: Tensor  # float32 [Q, E], embeddings
    queue_q: Tensor  # float32 [Q, C], aligned and not smoothed, or one-hot
    queue_valid: Tensor  # float32 [Q], 0 where nothing can be learned

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        d = setting.features
        self.project = nn.Sequential(nn.Linear(d, d), nn.LeakyReLU(0.1), nn.Linear(d, self.options.embedding))
        self.register_buffer("means", torch.zeros(ALIGNED, self.n_classes))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        n = self.options.queue * (1 + self.options.mu) * setting.batch_size
        self.register_buffer("queue_z", torch.zeros(n, self.options.embedding))
        self.register_buffer("queue_q", torch.zeros(n, self.n_classes))
        self.register_buffer("queue_valid", torch.zeros(n))

    def ranges(self) -> dict[str, tuple[float, float]]:
        return {"steps": (0, math.inf)}

    def lay_out(self, sizes: dict[str, int], batch_size: int) -> Layout:
        return labeled_and_unlabeled(self.options.mu, sizes, batch_size, "weak", again=["strong", "strong"])

    def loss(self, batch: Batch) -> Tensor:
        options = self.options
        with torch.autocast(batch.images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            features = self.network.embed(self.network.prefix(batch.images), batch.keys)
            logits = self.network.classify(features)
        z = self.world.whole(nn.functional.normalize(self.project(features.float()), dim=-1))
        logits = self.world.whole(logits)
        labeled, weak, strong, _ = self.split(logits)
        z_labeled, z_weak, z_0, z_1 = self.split(z)
        readable = self.split(batch.rows["readable"])[1].float()
        with torch.no_grad():
            target = self.split(batch.rows["target"])[0]
            aligned = self.align(weak.float().softmax(-1), readable)
            q = self.smooth(aligned, z_weak)
            self.remember(
                torch.cat([z_weak, z_labeled]),
                torch.cat([aligned, shares(target.clamp(min=0), self.n_classes)]),
                torch.cat([readable, (target >= 0).float()]),
            )
            graph = (q @ q.T).fill_diagonal_(1.0)
            graph = graph * (graph >= options.graph_tau) * readable
            graph = graph / graph.sum(-1, keepdim=True).clamp(min=1e-12)
        p, label = q.max(-1)
        weight = (p >= options.tau).float() * self.kept(label, batch)
        log_s = (z_0 @ z_1.T / options.temperature + readable.log().clamp(min=-1e4)).log_softmax(-1)
        contrast = (-(graph * log_s).sum(-1) * readable).mean()
        return (
            self.supervised(labeled, batch)
            + options.weight * consistency(strong, q, weight)
            + options.contrast * contrast
        )

    def align(self, q: Tensor, readable: Tensor) -> Tensor:
        mean = (q * readable[:, None]).sum(0) / readable.sum().clamp(min=1)
        self.means.index_copy_(0, (self.steps % ALIGNED).view(1), mean[None])
        recent = self.means.sum(0) / (self.steps + 1).clamp(max=ALIGNED)
        q = q / recent.clamp(min=1e-12)
        return q / q.sum(-1, keepdim=True)

    def smooth(self, q: Tensor, z: Tensor) -> Tensor:
        """By the memory, once it is full."""
        scores = z @ self.queue_z.T / self.options.temperature + self.queue_valid.log().clamp(min=-1e4)
        alpha = torch.where(self.steps >= self.options.queue, self.options.alpha, 1.0)
        return alpha * q + (1 - alpha) * (scores.softmax(-1) @ self.queue_q)

    def remember(self, z: Tensor, q: Tensor, valid: Tensor) -> None:
        n = len(self.queue_z)
        place = (self.steps * len(z) + torch.arange(len(z), device=z.device)) % n
        for queue, rows in ((self.queue_z, z), (self.queue_q, q), (self.queue_valid, valid)):
            queue.index_copy_(0, place, rows)
        self.steps += 1
