"""Clips to try things on: handwritten digits that move, of which a single frame does not tell the class."""

from __future__ import annotations

import numpy as np
import torch

from ups_fast.data.image_set import ImageSet, moments
from ups_fast.seeds import frozen_random

SIDE, FRAMES = 16, 8
_SEED = 0  # belongs to the data: they are the same whatever the run's seed
MOTIONS = {  # pixels down and right from frame to frame, times a speed of 1 or 2
    "up": (-1, 0),
    "up right": (-1, 1),
    "right": (0, 1),
    "down right": (1, 1),
    "down": (1, 0),
    "down left": (1, -1),
    "left": (0, -1),
    "up left": (-1, -1),
}


def moving(digits: ImageSet) -> ImageSet:
    """Each digit becomes a clip uint8 [8, 16, 16, 1]; its class is the direction in which it moves.

    What leaves the frame comes in again on the other side. Place, direction and speed are drawn independently of each
    other and of the digit, so each frame of a clip looks alike whatever the class. Training and test clips have other
    digits.

    digits  images uint8 [N, 8, 8, 1]
    """
    random = frozen_random(_SEED)
    train, train_labels = _clips(digits.train_images.numpy()[..., 0], random)
    test, test_labels = _clips(digits.test_images.numpy()[..., 0], random)
    mean, std = moments(train)
    return ImageSet("moving_digits", list(MOTIONS), train, train_labels, test, test_labels, mean, std)


def _clips(
    digits: np.ndarray,  # uint8 [N, 8, 8]
    random: np.random.RandomState,
) -> tuple[torch.Tensor, torch.Tensor]:  # uint8 [N, T, 16, 16, 1], int64 [N]
    n, height, width = digits.shape
    labels = random.permutation(n) % len(MOTIONS)
    places = np.asarray(random.randint(SIDE, size=(n, 2)))
    speeds = np.asarray(random.randint(1, 3, size=n))
    clips = np.zeros((n, FRAMES, SIDE, SIDE), np.uint8)
    clips[:, :, :height, :width] = digits[:, None]
    steps = np.array(list(MOTIONS.values()))
    for i, clip in enumerate(clips):
        for t, frame in enumerate(clip):
            down, right = (places[i] + t * speeds[i] * steps[labels[i]]).tolist()
            frame[:] = np.roll(frame, (down, right), (0, 1))
    return torch.from_numpy(clips).unsqueeze(-1), torch.from_numpy(labels.astype(np.int64))
