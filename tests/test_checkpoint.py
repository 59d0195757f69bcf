"""A crafted or rotten checkpoint: some hundred mutations, all refused with one sentence."""

from __future__ import annotations

import copy
import io
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from test_rounds import tiny_config, tiny_set
from torch import Tensor

from ups_fast import checkpoint, rounds
from ups_fast.build import Run, prepare
from ups_fast.checkpoint import RunFolderError, load_checkpoint
from ups_fast.display import Watch

Content = dict[str, Any]
NAN, INF = math.nan, math.inf


def looped() -> list[Any]:
    inside: list[Any] = []
    inside.append(inside)
    return inside


# What no part of a checkpoint may be, but for the few that LEGAL names.
WRONG: list[Any] = [
    None, "text", "\x1b[2J", "x" * 10_000, b"bytes", True, -1, 10**13, 10**400, 0.5, -0.5, NAN, INF, [], {}, (),
    looped(), [[[1]]], {"a": 1}, {1: 2}, {"a": torch.zeros(3)}, torch.zeros(()), torch.zeros(0),
    torch.zeros(3, dtype=torch.int64), torch.tensor(NAN), torch.zeros(1).expand(10**12),
    torch.zeros(2, requires_grad=True), torch.zeros(2).to_sparse(), torch.empty(2, device="meta"),
    torch.nn.Parameter(torch.zeros(2)), torch.zeros(2, dtype=torch.complex64),
]  # fmt: skip
LEGAL: dict[str, tuple[str, ...]] = {
    "seconds": ("0.5",),
    "outside": ("0.5",),
    "train_loss": ("None", "0.5", "-0.5"),
    "loss": ("tensor(0.)",),
}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that was stopped in round 1, in the middle of an epoch."""
    cfg = tiny_config(
        tmp_path_factory.mktemp("runs") / "run",
        checkpoint_seconds=0.0,
        train__epochs=2,
        data__n_labels=12,
        data__val_share=0.5,
    )
    console = Console(file=io.StringIO())
    with pytest.MonkeyPatch.context() as patched:
        real = Watch.show

        def stop_in_round_1(self: Watch, *args: Any) -> None:
            if self.state.round == 1 and self.state.epoch == 1:
                self.stop.set()
            real(self, *args)

        patched.setattr(Watch, "show", stop_in_round_1)
        with pytest.raises(rounds.Interrupted):
            rounds.run(cfg, tiny_set(), console=console)
    return prepare(cfg, tiny_set())


@pytest.fixture(scope="module")
def content(job: Run) -> Content:
    found = torch.load(job.folder / checkpoint.CHECKPOINT, weights_only=True)
    assert found["round"] == 1 and found["epoch"] == 1 and found["step"] > 0 and found["momentum"]
    return found


@pytest.fixture(scope="module")
def between(content: Content) -> Content:
    """The same run at the start of round 1: a small file."""
    return {**content, "method": None, "momentum": None, "epoch": 0, "step": 0}


def believed(job: Run, folder: Path, content: Content) -> str:
    """The sentence that refuses this content, "" if none does. Whatever else is raised fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(content, folder / checkpoint.CHECKPOINT)
    try:
        found = load_checkpoint(folder)
        assert found is not None
        rounds._check(job, found)
    except RunFolderError as error:
        said = str(error)
        assert "\n" not in said and said.isprintable() and len(said) < 1000
        return said
    return ""


def test_what_the_run_wrote_is_believed(job: Run, content: Content, between: Content, tmp_path: Path) -> None:
    assert believed(job, tmp_path, content) == "" and believed(job, tmp_path, between) == ""
    harmless = {
        "seconds": 5,
        "outside": 0.0,
        "train_loss": None,
        "loss": torch.tensor(2.5),
        "torch_version": "2.11.0",
    }
    for key, value in harmless.items():
        assert believed(job, tmp_path, {**content, key: value}) == "", key


def parts(content: Content) -> Iterator[tuple[str, Content]]:
    """Each part gone, doubled under another name, or of another kind."""
    yield "another part", {**content, "more": 1}
    for key in content:
        yield f"without {key}", {name: value for name, value in content.items() if name != key}
        for i, value in enumerate(WRONG):
            same = value is None and content[key] is None
            if not same and repr(value) not in LEGAL.get(key, ()):
                yield f"{key} = WRONG[{i}]", {**content, key: value}


def tensors(content: Content) -> Iterator[tuple[str, Content]]:
    """Each tensor of another type, shape or order, and with values that it cannot have."""
    places = [
        ("labeled",),
        ("unlabeled",),
        ("val",),
        *(("pseudo_labels", name) for name in content["pseudo_labels"]),
    ]
    parts = ("conv1.weight", "bn1.running_var", "bn1.running_mean", "bn1.num_batches_tracked")
    weights = [f"network.{name}" for name in parts]
    names = {name.rpartition(".")[2]: name for name in content["method"]}
    chosen = [name for name in weights if name in content["method"]] or list(names.values())
    places += [("method", name) for name in sorted({*chosen, *names.values()})]
    places += [("momentum", name) for name in list(content["momentum"])[:1]]
    for place in places:
        *path, last = place

        def put(value: Any, path: list[str] = path, last: str = last) -> Content:
            changed = copy.copy(content)
            inside = changed
            for name in path:
                inside[name] = copy.copy(inside[name])
                inside = inside[name]
            inside[last] = value
            return changed

        old: Tensor = (content[path[0]] if path else content)[last]
        what = ".".join(place)
        flat = old.reshape(-1)
        shapes = [
            old[None],
            torch.cat([flat, flat]),
            flat[:0].reshape(0, *old.shape[1:]),
            flat.repeat(2)[::2][:-1],
        ]
        for i, value in enumerate(shapes):
            if value.shape != old.shape:
                yield f"{what} of another shape {i}", put(value)
        yield (
            f"{what} of another type",
            put(old.to(torch.float64 if old.dtype != torch.float64 else torch.int8)),
        )
        yield f"{what} huge", put(flat[:1].expand(10**11))
        yield f"{what} a list", put(old.tolist())
        if old.is_floating_point():
            for value in (NAN, INF, -INF):
                yield f"{what} with {value}", put(torch.full_like(old, value))
        if place[0] in ("labeled", "unlabeled", "val") or last == "index":
            for name, value in {
                "reversed": old.flip(0),
                "doubled": old[:1].expand_as(old).clone(),
                "out of range": old + 60,
                "negative": old - 60,
                "swapped": torch.cat([old[1:2], old[:1], old[2:]]),
            }.items():
                yield f"{what} {name}", put(value)
        odd = {
            "label": (-2, 3, 2**40),
            "confidence": (-0.1, 1.5),
            "std": (-0.1, 1.5),
            "negative": (-1, 8),
            "running_var": (-1.0,),
            "num_batches_tracked": (-1,),
        }
        for value in odd.get(last.rpartition(".")[2], ()):
            yield f"{what} = {value}", put(torch.full_like(old, value))
    pseudo_labels = content["pseudo_labels"]
    for name in ("candidate", "positive"):
        flipped = {**pseudo_labels, name: ~pseudo_labels[name]}
        yield f"{name} flipped", {**content, "pseudo_labels": flipped}
    unknown = torch.full_like(pseudo_labels["label"], -1)
    yield "no labels", {**content, "pseudo_labels": {**pseudo_labels, "label": unknown}}
    yield "one more column", {**content, "pseudo_labels": {**pseudo_labels, "more": unknown}}
    for name in ("method", "momentum"):
        for key in list(content[name])[:3]:
            yield (
                f"{name} without {key}",
                {**content, name: {k: v for k, v in content[name].items() if k != key}},
            )
        yield f"{name} with more", {**content, name: {**content[name], "\x1b[2J": torch.zeros(3)}}


def numbers(content: Content) -> Iterator[tuple[str, Content]]:
    """Places where this run cannot stand, and exchanged parts of the split."""
    for change in (
        {"round": 2}, {"round": 0}, {"round": 3}, {"epoch": 3}, {"step": 1000}, {"epoch": 2, "step": 1},
        {"epoch": 0, "step": 0}, {"method": None}, {"momentum": None}, {"method": None, "momentum": None},
        {"method": None, "momentum": None, "epoch": 0}, {"momentum": None, "epoch": 0, "step": 0},
        {"pseudo_labels": None}, {"rows": []}, {"rows": content["rows"] * 2}, {"version": 3}, {"version": "4"},
        {"version": None}, {"format": "another"}, {"data": "another"}, {"torch_version": "2\n"},
        {"labeled": content["unlabeled"], "unlabeled": content["labeled"]},
        {"val": content["labeled"], "labeled": content["val"]}, {"val": content["val"][:0]},
        {"val": content["labeled"]}, {"labeled": torch.cat([content["labeled"], content["val"]]).sort().values},
        {
            "labeled": torch.cat([content["labeled"][1:], content["unlabeled"][:1]]),
            "unlabeled": torch.cat([content["labeled"][:1], content["unlabeled"][1:]]),
        },
    ):  # fmt: skip
        yield str(list(change.items()))[:80], {**content, **change}


def rows(content: Content) -> Iterator[tuple[str, Content]]:
    """Each number of a row gone or impossible; they are printed, drawn and written to metrics.jsonl."""
    (row,) = content["rows"]
    legal = {"seconds": (0.5,), "outside": (0.5,), "train_loss": (None, 0.5, -0.5)}
    for key in row:
        if key != "unlabeled_acc":  # which rows of earlier versions lack
            yield f"row without {key}", {**content, "rows": [{k: v for k, v in row.items() if k != key}]}
        may = (None, 0.5) if "acc" in key or "ece" in key else legal.get(key, ())
        for i, value in enumerate(WRONG if key == "test_acc" else WRONG[:-10]):
            plain = isinstance(value, (float, type(None))) and value in may
            if not plain and not (key == "test_mistakes" and value == []):
                yield f"row {key} = WRONG[{i}]", {**content, "rows": [{**row, key: value}]}
    for more in (
        {"more": 1}, {"\x1b[2J": 1}, {"test_mistakes": [[0, 1]]}, {"test_mistakes": [[0, 9, 1]]},
        {"test_mistakes": [[0, 1, 1]] * 11}, {"per_class_positives": [0, 0, 10**9]}, {"test_positives": 1},
        {"per_class_positives": row["per_class_positives"][1:]}, {"test_acc": 2}, {"ece": -0.1},
    ):  # fmt: skip
        yield f"row with {more}", {**content, "rows": [{**row, **more}]}


@pytest.mark.slow
@pytest.mark.parametrize("mutations", [parts, tensors, numbers, rows])
def test_no_mutation_is_believed(
    mutations: Callable[[Content], Iterator[tuple[str, Content]]],
    job: Run,
    content: Content,
    between: Content,
    tmp_path: Path,
) -> None:
    count = 0
    for what, changed in mutations(between if mutations in (parts, rows) else content):
        count += 1
        assert believed(job, tmp_path, changed), f"{what} is believed"
    assert count >= 20


def test_sentences_name_the_part(job: Run, content: Content, tmp_path: Path) -> None:
    name = next(iter(content["method"]))
    broken = {**content["method"], name: torch.full_like(content["method"][name], NAN)}
    assert f"method ({name} has NaN or infinite values)" in believed(
        job, tmp_path, {**content, "method": broken}
    )
    assert "labeled, which is not the split that config and data give," in believed(
        job, tmp_path, {**content, "labeled": content["labeled"].flip(0)}
    )
    assert "has version 3, but this ups_fast reads version 5" in believed(
        job, tmp_path, {**content, "version": 3}
    )


def test_another_torch_is_told(job: Run, content: Content) -> None:
    """The run goes on: its bits may differ, and it says so."""
    file = job.folder / checkpoint.CHECKPOINT
    before = file.read_bytes()
    torch.save({**content, "torch_version": "2.0.1"}, file)
    console = Console(file=io.StringIO(), width=1000)
    rounds.resume(prepare(job.cfg, tiny_set()), console)
    said = console.file.getvalue()
    assert f"saved by torch 2.0.1 and goes on with torch {torch.__version__}: the results may differ" in said
    file.write_bytes(before)
    console = Console(file=io.StringIO(), width=1000)
    rounds.resume(prepare(job.cfg, tiny_set()), console)
    assert "saved by torch" not in console.file.getvalue()


@pytest.mark.parametrize(
    ("name", "buffer", "value"),
    [
        ("label_propagation", "label", 3),
        ("em", "label", -2),
        ("flexmatch", "status", 99),
        ("comatch", "steps", -1),
    ],
)
def test_an_index_out_of_range_is_not_believed(name: str, buffer: str, value: int, tmp_path: Path) -> None:
    small = {"train__batch_size": 3, "data__cutout": 2}
    job = prepare(tiny_config(tmp_path / "run", method__name=name, **small), tiny_set())
    method = {key: tensor.clone() for key, tensor in job.method.state_dict().items()}
    state = replace(job.state, epoch=1, method=method, momentum=job.step.momentum)
    rounds._check(job, state)
    method[buffer].fill_(value)
    with pytest.raises(RunFolderError, match=rf"method \({buffer} is not in \["):
        rounds._check(job, state)
