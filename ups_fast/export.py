"""The command line `python -m ups_fast.export RUN --out model.onnx`: a run's network as a file for other programs.

Pixels or features go in, probabilities come out. The file is read again and compared with the network before it gets
its name. Exit status as of `predict`: 0; 2 for what the user can mend (one sentence, no traceback); 130 for Ctrl-C.
"""

from __future__ import annotations

import io
import json
import math
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import OpOverload

import ups_fast
from ups_fast import command
from ups_fast.terminal import ended

try:
    from ups_fast.checkpoint import CONFIG, read_config
    from ups_fast.data import load_set
    from ups_fast.data.clips import middle
    from ups_fast.data.manifest import Manifest
    from ups_fast.display import open_console
    from ups_fast.files import check_new, home, read_bytes, write_atomic
    from ups_fast.inputs import FILES
    from ups_fast.models import Network
    from ups_fast.models.pretrained import imported
    from ups_fast.predict import Predictor, find
    from ups_fast.words import line_of, many
except (KeyboardInterrupt, ImportError) as error:  # in the first seconds: nothing has been done
    if __name__ == "__main__":
        sys.exit(command.interrupted_early(error))
    raise

KINDS = (".onnx", ".pt2")
MOST = 256  # samples by which a file is checked
# Of a probability. Another order of the same float32 sums moves it by some 1e-6; a wrong layer by far more.
TOLERANCE = 1e-4
_ROWS = 64  # of a batch that is checked
_LARGEST = 2**31 - 2**24  # bytes of weights: an .onnx file is a message of protobuf
DESCRIPTION = """\
Write the network of a run into a file for other programs.

RUN is the folder of the run. The file takes raw pixels, uint8 [batch, channels,
height, width], or rows of features, float32 [batch, columns]. It returns
probabilities, float32 [batch, classes], without dropout. Classes, thresholds
and sizes are in its metadata.

A network for clips takes [batch, channels, frames, height, width].

The file is checked on some of the run's test images. FILES are other images, or
files of rows, to check it on: use them where the run's data are gone."""
REMEDY = "end other programs"


class Answer(nn.Module):
    """A network with all that is around it: raw samples -> probabilities float32 [B, C].

    Samples are pixels, uint8 [B, channels, H, W], or features, float32 [B, d].
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        self.images = hasattr(network, "size")
        self.eval().requires_grad_(False)

    def forward(self, samples: Tensor) -> Tensor:
        x = samples / 255 if self.images else samples
        logits: Tensor = self.network((x - self.network.mean) / self.network.std)
        return self.network.probabilities(logits)


class Check(NamedTuple):
    """How the answers of a file differ from those of the network that it was made of."""

    samples: int
    largest: float  # difference of a probability; NaN where an answer is not finite
    equal: float  # share of equal labels


def export(
    run_dir: str | Path,
    out: str | Path,
    files: Sequence[str] = (),
    *,
    best: bool = False,
    tell: Callable[[str], object] = lambda sentence: None,
) -> Check:
    """Writes the network of a run as the new file `out`, after its answers were compared with the network's own.

    Args:
        run_dir: the folder of the run.
        out: a file that is not there yet. Its suffix says the kind: .onnx, or .pt2 for `torch.export.load`.
        files: files, folders or patterns of images, or of rows, to check it on. None: the run's own test data.
        best: the network of the round with the highest validation accuracy.
        tell: hears a sentence where the run is not finished.

    Returns:
        How the answers differ.

    Raises:
        FileNotFoundError, RunFolderError: as `Predictor`; or `out` cannot be written.
        ValueError: `out` is there or of no such kind, a package is missing, there is nothing to check the file on,
            the network cannot be exported, or its answers in the file differ. Nothing is written then.

    Example:
        >>> check = export("runs/digits", "digits.onnx")
        >>> check.largest < 1e-4
        True
    """
    path = home(out)
    write = _writer(path)
    predictor = Predictor(run_dir, "cpu", best=best)
    if predictor.unfinished:
        tell(f"{run_dir} is not finished: its network has {predictor.unfinished}")
    answer, samples = Answer(predictor.model), _samples(run_dir, predictor, files)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporters, to their own developers
        try:
            example = torch.zeros_like(samples[:1].expand(2, *samples.shape[1:]))  # a .pt2 file keeps it
            shapes = ({0: torch.export.Dim("batch")},)
            program = torch.export.export(answer, (example,), dynamic_shapes=shapes)
            content, read_again = write(program, _about(predictor))
        except Exception as error:  # each network and exporter has its own way to say so
            raise ValueError(f"the network cannot be exported as {path.suffix}: {line_of(error)}") from error
        check = _compare(answer, read_again, samples)
    if not check.largest <= TOLERANCE:
        raise ValueError(
            f"--out {out} is not written, as its answers differ from the network's: on {_said(check)}, and "
            f"{TOLERANCE:g} is allowed"
        )
    check_new(path)  # it may have come meanwhile
    write_atomic(path, content)
    return check


def _said(check: Check) -> str:
    return (
        f"{many(check.samples, 'sample')} the largest difference of a probability is {check.largest:.1e}, and "
        f"{check.equal:.2%} of the labels are equal"
    )


# Kinds of files ----------------------------------------------------------------------------------------------

Function = Callable[[Tensor], Tensor]  # of samples; probabilities
Writer = Callable[[torch.export.ExportedProgram, dict[str, str]], tuple[bytes, Function]]


def _writer(path: Path) -> Writer:
    """What makes a file of this kind: its content, and what that answers when it is read again."""
    if path.suffix not in KINDS:
        raise ValueError(f"--out must end in {' or '.join(KINDS)}, got {path.name!r}")
    check_new(path)
    if not path.parent.is_dir():
        raise ValueError(f"--out {path} cannot be written: there is no folder {path.parent}")
    if path.suffix == ".onnx":
        for module in ("onnx", "onnxscript", "onnxruntime"):
            imported(module, "export")
    return {".onnx": _onnx, ".pt2": _pt2}[path.suffix]


def _onnx(program: torch.export.ExportedProgram, about: dict[str, str]) -> tuple[bytes, Function]:
    import onnxruntime
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    size = sum(tensor.nbytes for tensor in program.state_dict.values())
    if size > _LARGEST:
        raise ValueError(f"its weights have {size / 2**30:.1f} GiB, and such a file holds 2: choose .pt2")
    made: Any = torch.onnx.export(
        program,
        dynamo=True,
        input_names=["samples"],
        output_names=["probabilities"],
        dynamic_shapes=({0: "batch"},),
        external_data=False,
        verbose=False,
    )
    ClearMetadataAndDocStringPass()(made.model)  # paths and code of this machine
    proto = made.model_proto
    for key, value in about.items():
        proto.metadata_props.add(key=key, value=value)
    content = proto.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors alone
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return content, lambda samples: torch.from_numpy(session.run(None, {"samples": samples.numpy()})[0])


def _pt2(program: torch.export.ExportedProgram, about: dict[str, str]) -> tuple[bytes, Function]:
    for node in program.graph.nodes:
        if isinstance(node.target, OpOverload) and node.target.namespace != "aten":
            raise ValueError(f"it has the op {node.target}, which torch alone does not know")
        node.meta.pop("stack_trace", None)  # paths and code of this machine
    file = io.BytesIO()
    torch.export.save(program, file, extra_files=dict(about))
    file.seek(0)
    return file.getvalue(), torch.export.load(file).module()


def _about(predictor: Predictor) -> dict[str, str]:
    """The metadata; lists and tables as JSON."""
    taken = "float32 [batch, columns], features as they are, not standardized"
    if not predictor.columns:
        colors = "gray" if predictor.channels == 1 else "red, green, blue"
        sizes = "channels, frames, height, width" if predictor.frames else "channels, height, width"
        taken = f"uint8 [batch, {sizes}], {colors}, 0 to 255"
    limits = {key: x if math.isfinite(x) else str(x) for key, x in predictor.thresholds.items()}
    return {
        "ups_fast": ups_fast.__version__,
        "samples": taken,
        "size": json.dumps(_size(predictor)),
        "classes": json.dumps(predictor.classes),
        "thresholds": json.dumps(limits),
    }


def _size(predictor: Predictor) -> list[int]:
    """[d], [channels, H, W] or [channels, T, H, W]."""
    if predictor.columns:
        return [predictor.columns]
    frames = [predictor.frames] if predictor.frames else []
    return [predictor.channels, *frames, predictor.height, predictor.width]


# The check ---------------------------------------------------------------------------------------------------


def _compare(answer: Function, other: Function, samples: Tensor) -> Check:
    """The first sample is a batch alone, so that batches of several sizes are tried."""
    batches = [samples[:1], *(x for x in samples[1:].split(_ROWS) if len(x))]
    pairs = [(answer(x), other(x)) for x in batches]
    ours, theirs = (torch.cat(each) for each in zip(*pairs, strict=True))
    if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
        return Check(len(samples), math.nan, 0.0)
    equal = (ours.argmax(1) == theirs.argmax(1)).double().mean()
    return Check(len(samples), float((ours - theirs).abs().max()), float(equal))


def _samples(run_dir: str | Path, predictor: Predictor, files: Sequence[str]) -> Tensor:
    """Some samples as `Answer` takes them: of the files, or of the run's test part."""
    if files:
        paths = find(files, kinds=predictor.kinds)
        predictor.count(paths)  # are they for this network?
        found = _read(predictor, paths)
    else:
        try:
            found = _own(home(run_dir), predictor)
        except Exception as error:  # whatever a stranger's bytes may cause
            raise ValueError(
                f"the test data of {run_dir}, to check the file on, cannot be read: {line_of(error)}; "
                "give images or rows after RUN"
            ) from error
    samples = torch.from_numpy(found)
    return samples if predictor.columns else samples.movedim(-1, 1).contiguous()


def _own(folder: Path, predictor: Predictor) -> np.ndarray:
    config = read_config(folder / CONFIG)
    data = config["data"]
    root = str(data["root"])
    if data["name"] == "folder":
        manifest = Manifest.read(read_bytes(folder / FILES))
        base = home(root) if home(root).is_dir() else home(root).parent
        return _read(predictor, [str(base / path) for path in manifest.paths[manifest.train :]])
    found = load_set(data["name"], root, test_share=data["test_share"], seed=config["seed"])
    rows = found.test_images[_spread(len(found.test_images))]
    if predictor.frames:
        rows = torch.stack([middle(clip, predictor.frames, predictor.stride) for clip in rows])
    there, shape = list(rows.shape[1:]), _size(predictor)
    if there != (shape if predictor.columns else [*shape[1:], shape[0]]):
        raise ValueError(f"data.root={root} has samples {there} now, and the network takes {shape}")
    return (rows.float() if predictor.columns else rows).numpy()


def _read(
    predictor: Predictor, paths: Sequence[str]
) -> np.ndarray:  # uint8 [n, .., H, W, C] or float32 [n, d]
    """The first that can be read, of images spread over all files."""
    if not predictor.columns:
        paths = [paths[i] for i in _spread(len(paths))]
    wrong: list[str] = []

    def good() -> Iterator[np.ndarray]:
        for name, sample in predictor.samples(paths, None):
            if isinstance(sample, str):
                wrong.append(f"{name}: {sample}")
            else:
                yield sample

    found = list(islice(good(), MOST))
    if not found:
        raise ValueError(f"none of {many(len(wrong), 'sample')} can be read, the first: {wrong[0]}")
    return np.stack(found)


def _spread(n: int) -> list[int]:
    """Some of n places, from the first to the last: files and rows often stand class by class."""
    return np.unique(np.linspace(0, n - 1, MOST).astype(int)).tolist()


# The command -------------------------------------------------------------------------------------------------


def _words(argv: Sequence[str] | None) -> Namespace:
    parser = command.Parser(
        "--help explains the rest", prog="python -m ups_fast.export", description=DESCRIPTION
    )
    parser.add_argument("run", metavar="RUN", help="the run's folder, such as runs/digits")
    parser.add_argument("files", metavar="FILES", nargs="*", help="files, folders or patterns to check it on")
    parser.add_argument("--out", required=True, help="the new file, .onnx, or .pt2 for torch.export.load")
    parser.add_argument(
        "--best",
        action="store_true",
        help="use the network of the round with the highest validation accuracy instead of the last one",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with the words `argv` (default: sys.argv) and returns the exit status."""

    def work() -> None:
        args = _words(argv)
        command.check_kernels(torch.device("cpu"))
        console = open_console()
        check = export(args.run, args.out, args.files, best=args.best, tell=console.print)
        console.print(f"checked: on {_said(check)}")
        console.print(f"the network is in {args.out}")

    return command.status_of(work, REMEDY)


if __name__ == "__main__":
    sys.exit(ended(main()))
