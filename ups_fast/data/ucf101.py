"""UCF-101, 13,320 clips of 101 actions (Soomro et al., 2012), where its files and its official lists are."""

from __future__ import annotations

from pathlib import Path

import torch

from ups_fast.data.folder import Folder, Listing
from ups_fast.files import home
from ups_fast.words import line_of

VIDEOS, LISTS = "UCF-101", "ucfTrainTestlist"
_WHERE = "https://www.crcv.ucf.edu/data/UCF101.php"


def ucf101(root: str | Path) -> Folder:
    """The files of the first of the three official splits: 9,537 clips to train, all of them labeled, 3,783 to test.

    root  the folder of UCF-101/<class>/*.avi and ucfTrainTestlist/ with classInd.txt, trainlist01.txt and
          testlist01.txt, which torchvision.datasets.UCF101 reads, too

    Raises ValueError with one sentence that says what is missing or wrong.
    """
    base = home(root)
    for name in (VIDEOS, LISTS):
        if not (base / name).is_dir():
            raise ValueError(
                f"ucf101 is not in {str(base)!r} (data.root), which lacks the folder {name}: unpack UCF101.rar and "
                f"UCF101TrainTestSplits-RecognitionTask.zip there, from {_WHERE}"
            )
    classes = [line.split()[1] for line in _lines(base, "classInd.txt", 2)]
    number = {name: c for c, name in enumerate(classes)}
    train, test = (
        [line.split()[0] for line in _lines(base, f"{part}list01.txt", 1)] for part in ("train", "test")
    )
    paths = sorted({*train, *test})
    if strange := [path for path in paths if path.partition("/")[0] not in number]:
        raise ValueError(f"{strange[0]!r} of {LISTS} is of no class of classInd.txt")
    if both := set(train) & set(test):
        raise ValueError(f"{min(both)!r} stands in both lists of {LISTS}")
    label = torch.tensor([number[path.partition("/")[0]] for path in paths])
    tested = set(test)
    is_test = torch.tensor([path in tested for path in paths])
    files = [f"{VIDEOS}/{path}" for path in paths]
    listing = Listing(base, {}, classes, [], [], noun="clip")
    none = torch.zeros(0, dtype=torch.int64)
    labeled, tests = (~is_test).nonzero()[:, 0], is_test.nonzero()[:, 0]
    return Folder(base, files, label, labeled, none, tests, classes, [], listing)


def _lines(base: Path, name: str, words: int) -> list[str]:
    path = base / LISTS / name
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{str(path)!r} cannot be read ({line_of(error)})") from error
    if not lines or any(len(line.split()) < words for line in lines):
        raise ValueError(f"{str(path)!r} is damaged: it must have {words} words or more in each line")
    return lines
