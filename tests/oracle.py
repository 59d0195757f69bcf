"""An independent float64 implementation of the ops in NumPy, from the equations; shares no code with the package."""

from __future__ import annotations

import numpy as np


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def mc_statistics(z: np.ndarray, temp: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased std over the passes of softmax(z / temp), [N, C] each; two passes over the data."""
    p = softmax(z / temp)
    mean = p.sum(axis=0) / len(p)
    return mean, np.sqrt(((p - mean) ** 2).sum(axis=0) / max(1, len(p) - 1))


def mc_select(z, tau_p=0.70, tau_n=0.05, kappa_p=0.05, kappa_n=0.005, temp_nl=2.0) -> dict[str, np.ndarray]:
    """`doubt_*` mark verdicts within 1e-5 (relative for stds) of a threshold or of a tie, where float32 may differ."""
    z = np.asarray(z, dtype=np.float64)
    finite = np.isfinite(z).all(axis=(0, 2))
    z = np.where(finite[None, :, None], z, 0.0)
    mean, std = mc_statistics(z, 1.0)
    mean_q, std_q = mc_statistics(z, temp_nl)
    rows = np.arange(z.shape[1])
    label = mean.argmax(axis=1)
    runner_up = np.where(np.arange(z.shape[2]) == label[:, None], -1.0, mean).max(axis=1)
    conf, s = mean[rows, label], std[rows, label]
    not_label = np.arange(z.shape[2]) != label[:, None]

    def near(x, threshold):
        return (
            np.abs(x - threshold) <= 1e-6 + 1e-5 * threshold
            if np.isfinite(threshold)
            else np.zeros(x.shape, bool)
        )

    doubt_label = (conf - runner_up < 1e-6) & (conf != runner_up)
    return {
        "label": np.where(finite, label, -1),
        "confidence": np.where(finite, conf, np.nan),
        "std": np.where(finite, s, np.nan),
        "positive": (conf >= tau_p) & (s < kappa_p) & finite,
        "negative": (mean_q < tau_n) & (std_q < kappa_n) & not_label & finite[:, None],
        "doubt_label": doubt_label,
        "doubt_positive": near(conf, tau_p) | near(s, kappa_p) | doubt_label,
        "doubt_negative": near(mean_q, tau_n) | near(std_q, kappa_n) | doubt_label[:, None],
    }


def ce_rows(z, target) -> np.ndarray:
    return -np.log(softmax(np.asarray(z, np.float64)))[np.arange(len(z)), target]


def nce_rows(z, mask) -> np.ndarray:
    """0 for rows without a mask. 1 - p is summed from the other classes, so it keeps its digits."""
    p = softmax(np.asarray(z, np.float64))
    not_p = np.stack([np.delete(p, c, axis=1).sum(axis=1) for c in range(p.shape[1])], axis=1)
    return -(mask * np.log(np.clip(not_p, 1e-7, 1))).sum(axis=1) / (mask.sum(axis=1) + 1e-7)


def nce_loss(z, mask) -> float:
    active = mask.any(axis=1)
    return float(nce_rows(z, mask)[active].mean()) if active.any() else 0.0


def ups_loss(z, target, positive, negative) -> float:
    z = np.asarray(z, np.float64)
    ce = float(ce_rows(z[positive], target[positive]).mean()) if positive.any() else 0.0
    return ce + nce_loss(z[~positive], negative[~positive])


def sigmoid(z: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -z))


def mc_select_multilabel(
    z, tau_p=0.5, tau_n=0.05, kappa_p=0.05, kappa_n=0.005, temp_nl=2.0
) -> dict[str, np.ndarray]:
    """`doubt_*` as in `mc_select`. Thresholds are numbers or arrays [C]."""
    z = np.asarray(z, dtype=np.float64)
    finite = np.isfinite(z).all(axis=0)
    z = np.where(finite, z, 0.0)
    verdicts = {}
    for name, temp in (("positive", 1.0), ("negative", temp_nl)):
        p = sigmoid(z / temp)
        mean = p.sum(axis=0) / len(p)
        std = np.sqrt(((p - mean) ** 2).sum(axis=0) / max(1, len(p) - 1))
        tau, kappa = (tau_p, kappa_p) if name == "positive" else (tau_n, kappa_n)
        kappa = np.inf if len(p) == 1 else kappa
        if name == "positive":
            verdicts |= {"confidence": np.where(finite, mean, np.nan), "std": np.where(finite, std, np.nan)}
        sure = mean >= tau if name == "positive" else mean < tau
        verdicts[name] = sure & (std < kappa) & finite
        near_kappa = np.isfinite(kappa) & (np.abs(std - np.nan_to_num(kappa, posinf=0)) <= 1e-6 + 1e-5 * std)
        verdicts[f"doubt_{name}"] = (np.abs(mean - tau) <= 1e-6 + 1e-5 * mean) | near_kappa
    return verdicts


def ups_loss_multilabel_rows(z, positive, negative, weight=None) -> np.ndarray:
    """Loss of each image, 0 without a selected class. weight: [B, C]."""
    z, g = np.asarray(z, np.float64), positive | negative
    entries = np.where(positive, np.logaddexp(0.0, -z), np.logaddexp(0.0, z))
    entries = np.where(g, entries * (1.0 if weight is None else weight), 0.0)
    return entries.sum(axis=1) / np.maximum(1, g.sum(axis=1))
