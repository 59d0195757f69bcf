"""What README and docs name exists: links, files, keys, commands, Python blocks, and the numbers of the records."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

import ups_fast
from ups_fast import config, label_studio, predict, study, sweep, sweep_space
from ups_fast.data import load_set
from ups_fast.methods import METHODS
from ups_fast.models import build
from ups_fast.models.saved import save_model

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RESULTS = ROOT / "benchmarks/results"
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, kind: str) -> list[str]:
    """The fenced blocks of one kind: "python", or "" for those without a word."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [text for word, text in fences if word == kind]


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def spans(page: Path) -> list[str]:
    """What stands in `code` outside of blocks."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def commands(page: Path, program: str) -> list[list[str]]:
    """The words after `program` of each line of a block that calls it."""
    lines = [line.strip() for block in blocks(page, "") for line in block.splitlines()]
    calls = [shlex.split(line.replace("$seed", "1"), comments=True) for line in lines if program in line]
    size = len(program.split())
    return [words[size:] for words in calls if words[:size] == program.split()]


def anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# Links and files ------------------------------------------------------------------------------------------


@each_page
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    for link in links:
        path, _, part = link.partition("#")
        target = page.parent / path if path else page
        assert not link.startswith("/") and target.exists(), link
        if part:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert part in map(anchor, headings), link


def test_every_page_can_be_found_from_the_readme_and_says_whom_it_is_for():
    for page in PAGES[1:]:
        assert f"(docs/{page.name})" in PAGES[0].read_text(), page.name
        assert page.read_text().splitlines()[2].startswith(("For people who ", "For people whose ")), (
            page.name
        )


@each_page
def test_files_and_folders_that_are_named_exist(page):
    places = ("ups_fast", "csrc", "configs", "examples", "benchmarks", "tests", "docs")
    for span in spans(page):
        if span.split("/")[0] in places and "/" in span and " " not in span:
            assert (ROOT / span).exists(), span


# Keys and commands ----------------------------------------------------------------------------------------


@each_page
def test_keys_exist(page):
    groups = {key.partition(".")[0] for key in config.KEYS if "." in key}
    for word in " ".join(spans(page)).split():
        name, equals, value = word.partition("=")
        python = value in ("True", "False") or "(" in word or '"' in word or name.isupper()
        dotted = name.partition(".")[0] in groups and "." in name
        dotted = dotted and not name.endswith((".safetensors", ".py", ".html", ".png", ".*"))
        if dotted or (equals and value and not python):
            assert name in config.KEYS or owners(name), f"{word} is no key"
            if re.fullmatch(r"[\w.:-]+", value) and ".." not in value:  # which is a range of a sweep
                config.load(ROOT / "configs/digits.yaml", [word, *recipe_for(word)])


def owners(name: str) -> list[str]:
    """The methods that have a key which not all have."""
    return [method for method, keys in config.METHOD_KEYS.items() if name in keys and name not in config.KEYS]


def recipe_for(word: str) -> list[str]:
    """What a key needs beside it."""
    loose = ["select.kappa_p=inf", "select.kappa_n=inf"]
    if owners(word.partition("=")[0]):
        return [f"method.name={owners(word.partition('=')[0])[0]}"]
    if word == "model.freeze=true":
        return ["model.name=lite0", "data.ops=", "data.cutout=0"]
    if word == "select.tau_p=0":
        return ["select.tau_n=0"]
    return loose if word == "select.passes=1" else ["train.round0_batch_size=0"]


@each_page
def test_commands_of_train_have_a_config_and_keys(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for path, *words in commands(page, "python -m ups_fast.train"):
        if path != "--help" and "method.name=entropy" not in words:  # which tests/test_toy_method.py runs
            config.load(path, words)


def test_commands_of_sweep_can_be_read(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = [words for page in PAGES for words in commands(page, "python -m ups_fast.sweep")]
    assert len(found) >= 3
    for words in found:
        args = sweep._words(words)
        path = args.config if args.config.startswith("configs/") else "configs/digits.yaml"
        sweep._plan(args, sweep_space.read(path, args.overrides))


def test_the_old_names_of_keys_are_all_told():
    text = (
        (ROOT / "docs/how-it-works.md").read_text().partition("## Old names of keys")[2].partition("## ")[0]
    )
    told = [[each.strip(" `") for each in cell.split(",")] for cell in re.findall(r"\| ([^|\n]+) ", text)]
    pairs = zip(told[::2], told[1::2], strict=True)
    found = {old: new for olds, news in pairs for old, new in zip(olds, news, strict=True)}
    assert {old: new for old, new in found.items() if "." in old} == config.RENAMED


def test_every_method_is_told():
    text = "".join(page.read_text() for page in PAGES)
    assert not [name for name in config.METHOD_KEYS if f"`{name}`" not in text]


def test_pages_show_the_commands():
    assert sum(len(commands(page, "python -m ups_fast.train")) for page in PAGES) >= 10
    assert sum(len(commands(page, "python -m ups_fast.predict")) for page in PAGES) >= 3


@each_page
def test_options_exist(page, capsys):
    every = set()
    for program, main, verb in [
        ("predict", predict.main, []),
        ("label_studio tasks", label_studio.main, ["tasks"]),
        ("label_studio merge", label_studio.main, ["merge"]),
        ("study", study.main, []),
        ("sweep", sweep.main, []),
    ]:
        with pytest.raises(SystemExit):
            main([*verb, "--help"])
        known = re.findall(r"--[a-z-]+", capsys.readouterr().out)
        every.update(known)
        for words in commands(page, f"python -m ups_fast.{program}"):
            assert len(words) >= (1 if program in ("study", "sweep") else 2)
            assert all(word in known for word in words if word.startswith("--"))
    for span in spans(page):
        assert not re.fullmatch(r"--[a-z-]+", span) or span in every, span


@each_page
def test_make_targets_exist(page):
    text = "\n".join([*spans(page), *blocks(page, "")])
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"(?:^|\s)make ([a-z-]+)", text):
        assert target in targets, target


# Python ---------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder in which a run on digits has been."""
    model = {"name": "wrn-10-1", "dropout": 0.1, "preact": "fixed", "activation": "mish", "bn_momentum": 0.1}
    about = {"model": {**model, "weights": ""}, "classes": list("0123456789"), "channels": 1, "size": [8, 8]}
    about |= {"mean": [0.3], "std": [0.4]}
    folder = tmp_path / "runs/digits"
    folder.mkdir(parents=True)
    save_model(folder, build(n_classes=10, channels=1, size=(8, 8), **model), about)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@each_page
def test_python_blocks_run(page, home):
    """Each on its own, so that it can be pasted."""
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec", dont_inherit=True), {"__name__": "pasted"})
    if page.name == "data.md":
        assert len(load_set("npz", "my_images.npz").classes) == 10


def test_the_pages_have_python_blocks():
    assert len(blocks(ROOT / "README.md", "python")) == 2
    assert len(blocks(ROOT / "docs/ops.md", "python")) >= 5


@each_page
def test_names_of_the_package_exist(page):
    for name in re.findall(r"\bups_fast\.([a-z_]\w*)", page.read_text()):
        assert hasattr(ups_fast, name) or importlib.import_module(f"ups_fast.{name}"), name


def test_each_rule_stands_where_it_is_said():
    text = (
        (ROOT / "docs/how-it-works.md")
        .read_text()
        .partition("## Where each rule stands")[2]
        .partition("\n## ")[0]
    )
    before: list[str] = []  # "there" is the row above
    rows = re.findall(r"^\|.*\| (.*) \|$", text, re.MULTILINE)[1:]
    for code in rows:
        places = re.findall(r"\]\(\.\./([^)]+)\)", code)
        found = [ROOT / place for place in [*places, *before]]
        files = [file for place in found for file in (place.glob("*.py") if place.is_dir() else [place])]
        there = "".join(file.read_text() for file in files)
        for name in re.findall(r"`([\w.]+)`", code):
            assert re.search(rf"(?:def|class) {name.rpartition('.')[2]}\b", there), name
        before = places or before
    assert len(rows) > 20


def test_every_public_name_is_described():
    text = "".join(page.read_text() for page in PAGES)
    missing = {name for name in ups_fast.__all__ if not re.search(rf"\b{name}\b", text)}
    assert missing <= {"AugmentPlan", "Selection"}, "types of results may be left out, others not"


# Methods --------------------------------------------------------------------------------------------------


def test_every_method_has_a_row_and_its_keys_with_their_defaults():
    parts = (ROOT / "docs/methods.md").read_text().split("\n## ")
    start, keys = (next(part for part in parts if part.startswith(head)) for head in ("Start", "Keys"))
    assert re.findall(r"^\| `(\w+)` \|", start, re.MULTILINE) == list(METHODS)
    want = []
    for method, known in config.METHOD_KEYS.items():
        own = [key for name, key in known.items() if name not in config.KEYS]
        said = ", ".join(f"`{key.name.partition('.')[2]}` {key.default}" for key in own)
        want.append(f"| `{method}` | {said or 'none'} |")
    assert [line for line in keys.splitlines() if line.startswith("| `")] == want


def test_published_error_rates_are_said_to_be_not_ours():
    (part,) = re.findall(
        r"^## Published error rates\n\n(.*?)\n", (ROOT / "docs/methods.md").read_text(), re.MULTILINE
    )
    assert part.startswith("**These numbers are not ours.**")


# Numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["README.md", "docs/results.md"])
def test_accuracy_on_digits_is_that_of_the_record(name):
    record = (RESULTS / "2026-11-22-digits.txt").read_text()
    rows = [line.split() for line in record.splitlines() if re.match(r" +\d", line)]
    seeds = [[float(row[2]) for row in rows if row[0] == str(seed)] for seed in range(5)]
    text = (ROOT / name).read_text()
    for which in (0, -1):
        values = [100 * seed[which] for seed in seeds]
        cells = " | ".join(f"{value:.1f}" for value in [*values, sum(values) / 5])
        assert f"| {cells} |" in text


@pytest.mark.parametrize(
    ("name", "on_a_gpu"), [("README.md", "\nOn one H100, "), ("docs/results.md", "\n## On a GPU\n")]
)
def test_factors_are_those_of_the_records(name, on_a_gpu):
    """Those of a CPU's record, and from there on those of the GPU's."""
    parts = re.sub('"8.5 x"', "", (ROOT / name).read_text()).partition(on_a_gpu)[::2]
    for part, files in zip(parts, ("amd-epyc-2026-11-22.json", "nvidia-h100-*.json"), strict=True):
        times = [
            each
            for path in RESULTS.glob(files)
            for each in importlib.import_module("benchmarks.record").factors(
                json.loads(path.read_text())["rows"]
            )
        ]
        found = {f"{each:.{digits}f}" for each in times if each for digits in (0, 1)}
        said = re.findall(r"\b([\d.]+) x\b", part)
        assert len(said) >= 3 and set(said) <= found, set(said) - found


# Words ----------------------------------------------------------------------------------------------------


def test_spelling_is_american():
    files = [*PAGES, *ROOT.glob("configs/**/*.yaml"), *ROOT.glob("examples/*")]
    british = r"labell|colour|\bgrey|(?:normal|optim|initial|general)is|neighbour|centre\b|behaviour|favour"
    for file in files:
        found = re.findall(rf"\w*(?:{british})\w*", file.read_text(), re.IGNORECASE)
        allowed = ("optimism", "generalist")
        assert not [word for word in found if word not in allowed], file


@each_page
def test_no_sentence_is_long(page):
    text = re.sub(r"^\s*(\||#|!).*$", "", prose(page), flags=re.MULTILINE)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    for part in re.split(r"\n\s*\n|\n\s*[-*] |\n\s*\d+\. ", text):
        for sentence in re.split(r"(?<=[.!?:])\s+(?=[A-Z\"`*])", part):
            assert len(sentence.split()) <= 35, sentence
