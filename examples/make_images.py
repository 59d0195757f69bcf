"""Creates a folder of small image files from scikit-learn's digits: `python examples/make_images.py FOLDER`.

Handwritten digits as JPEG and PNG files of 32x32 pixels: labeled/<digit>/ has 4 of each, unlabeled/ 1,397,
test/<digit>/ 360 in all. Two files are damaged on purpose.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


def main(root: Path) -> None:
    root.mkdir(parents=True)  # a folder that is there already may be somebody's
    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    seen = dict.fromkeys(range(10), 0)
    for i in order.tolist():
        digit, place = int(bunch.target[i]), i
        seen[digit] += 1
        part = (
            f"labeled/{digit}" if seen[digit] <= 4 else f"test/{digit}" if seen[digit] <= 40 else "unlabeled"
        )
        file = root / part / f"{place:04}.{'png' if i % 3 else 'jpg'}"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.rint(bunch.images[i] * (255 / 16)).astype(np.uint8)
        picture = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC)
        picture.save(file, **({"quality": 92} if file.suffix == ".jpg" else {}))
    (root / "unlabeled" / "empty.jpg").write_bytes(b"")
    whole = next((root / "unlabeled").glob("0*.jpg")).read_bytes()
    (root / "unlabeled" / "cut short.jpg").write_bytes(whole[: len(whole) // 2])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/make_images.py FOLDER")
    try:
        main(Path(sys.argv[1]))
    except FileExistsError:
        sys.exit(f"{sys.argv[1]} is there already: choose another name, or delete it")
