"""The rules of the house that a machine can check: imports run one way, one name everywhere, ops on torch alone."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import re
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import ups_fast
from ups_fast import ops, reference

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ups_fast"
OPS = [path.stem for path in sorted((ROOT / "csrc/cuda").glob("*.cu"))]

# A module imports only from rooms to its left; the rooms of the second row import nothing above themselves but the ops.
ORDER = [
    "policy",
    "reference_augment",
    "reference_shared",
    "reference_multilabel",
    "reference",
    "autograd",
    "ops",
    "modules",
    "pseudo_labels",
    "calibration",
    "precision",
    "tasks",
    "selection",
    "methods",
    "batches",
    "step",
    "config",
    "inputs",
    "folder",
    "frozen",
    "build",
    "rounds",
    "estimator",
    "command",
    "info",
    "train",
    "predict",
    "export",
    "label_studio",
    "trials",
    "workers",
    "study_file",
    "study",
    "sweep_space",
    "sweep_optuna",
    "sweep_storage",
    "sweep_claims",
    "sweep_worker",
    "sweep_results",
    "sweep_drive",
    "sweep",
]
BASE = {
    "seeds",
    "machine",
    "messages",
    "world",
    "terminal",
    "schema",
    "config_file",
    "words",
    "files",
    "fullgraph",
    "review",
    "models",
    "data",
}
EITHER = {"state", "checkpoint", "display", "report"}  # below build, rounds and train; above the base


def imports_of(path: Path) -> set[str]:
    """Top-level modules of ups_fast that a file imports, anywhere in it."""
    package = ["ups_fast", *path.relative_to(PACKAGE).with_suffix("").parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names = [stem, *(f"{stem}.{alias.name}" for alias in node.names)]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("ups_fast.")}
    return found & {p.stem for p in PACKAGE.iterdir()}


@cache
def rooms() -> dict[str, set[str]]:
    """Imports of each top-level module or subpackage of ups_fast, itself left out."""
    result: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        result.setdefault(room, set()).update(imports_of(path) - {room})
    return result


def test_imports_run_one_way():
    got = rooms()
    assert set(got) == {"__init__", *ORDER, *BASE, *EITHER}, "a new room needs a place in the order"
    for room in BASE:
        allowed = BASE | {"policy", "reference", "ops", "modules"}
        assert got[room] <= allowed, f"{room} imports {got[room] - allowed}"
    for i, room in enumerate(ORDER):
        allowed = set(ORDER[:i]) | BASE | (EITHER if i >= ORDER.index("inputs") else set())
        assert got[room] <= allowed, f"{room} imports {got[room] - allowed}"
    for room in EITHER:
        assert not got[room] & {"step", "build", "rounds", "train"}, f"{room} imports upwards"


PROGRAMS = {
    "need only torch": """
import sys
for name in ("rich", "tensorboard", "matplotlib", "sklearn", "torchvision", "safetensors", "yaml", "PIL"):
    sys.modules[name] = None
import torch, ups_fast
assert ups_fast.mc_select(torch.zeros(2, 3, 4)).label.tolist() == [0, 0, 0]
image = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
ups_fast.augment(image, torch.tensor([0]), policy="none", seed=0, draw=0, mean=[0] * 3, std=[1] * 3)
""",
    "an older module": """
import sys, types
sys.modules["ups_fast._C"] = types.ModuleType("ups_fast._C")  # of a time when there was no number
import torch, ups_fast
print(ups_fast.backend()["cpu"])
ups_fast.mish(torch.ones(2))
""",
    "no module": """
import sys; sys.modules["ups_fast._C"] = None
import warnings, torch, ups_fast
z = torch.randn(4, 5, requires_grad=True)
rows = torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=bool), torch.zeros(4, 5, dtype=bool)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("default")
    for _ in range(3):
        ups_fast.ups_loss(z, *rows).backward()
    ups_fast.mc_select(torch.zeros(2, 3, 4)), ups_fast.nce_loss(z, torch.ones(4, 5, dtype=bool))
print([str(w.message) for w in said])
print(ups_fast.backend()["cpu"])
""",
    "strict": """
import os, sys; os.environ["UPS_FAST_STRICT"] = "1"; sys.modules["ups_fast._C"] = None
import torch, ups_fast
ups_fast.mc_select(torch.zeros(2, 3, 4))
""",
}
# Each in a fork of one process that has imported torch, which takes longer than all of them.
FORKS = """
import json, os, sys, tempfile, torch, traceback
os.environ.pop("UPS_FAST_STRICT", None)
ends = {}
for name, code in json.load(sys.stdin).items():
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        if (child := os.fork()) == 0:
            os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
            status = 1
            try:
                exec(code, {})
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        ends[name] = status, *(file.seek(0) or file.read() for file in (out, err))
print(json.dumps(ends))
"""


class End(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture(scope="module")
def ended() -> dict[str, End]:
    """How each of PROGRAMS ended."""
    command = [sys.executable, "-c", FORKS]
    done = subprocess.run(command, input=json.dumps(PROGRAMS), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return {name: End(*end) for name, end in json.loads(done.stdout).items()}


def test_reference_and_ops_need_only_torch(ended):
    """Where everything else a trainer needs is missing, the package imports and its ops run."""
    assert rooms()["ops"] == {"policy", "reference", "autograd"}
    parts = {"reference_augment", "reference_shared", "reference_multilabel"}
    assert rooms()["reference"] == parts and rooms()["reference_augment"] == {"policy"}
    assert rooms()["reference_multilabel"] == {"reference_shared"} and rooms()["reference_shared"] == set()
    assert rooms()["policy"] == {"words"} and rooms()["words"] == rooms()["autograd"] == set()
    assert ended["need only torch"].status == 0, ended["need only torch"].err


@pytest.mark.parametrize("op", OPS)
def test_one_name_everywhere(op):
    assert (ROOT / f"csrc/cpu/{op}.cpp").is_file() and (ROOT / f"csrc/cuda/{op}.cu").is_file()
    assert f"def test_{op}(" in (ROOT / "benchmarks/test_ops.py").read_text()
    fused, spec = getattr(ups_fast, op), getattr(reference, op)
    assert inspect.signature(fused) == inspect.signature(spec) and fused.__doc__ == spec.__doc__
    assert hasattr(getattr(torch.ops.ups_fast, op), "default")


def test_every_package_is_in_a_wheel():
    listed = re.search(r"^packages = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    packages = {path.parent for path in PACKAGE.rglob("__init__.py")}
    there = {".".join(path.relative_to(ROOT).parts) for path in packages}
    assert listed and set(ast.literal_eval(listed[1])) == there


def test_only_ops_imports_the_kernels():
    for path in PACKAGE.rglob("*.py"):
        assert path.name == "ops.py" or "_C" not in re.findall(r"(?<!torch\.)\b_C\b", path.read_text()), path


def test_the_kernels_use_no_streams():
    """A compiler that links a libstdc++ of its own makes them crash: see `append` in tensors.h."""
    for path in (ROOT / "csrc").rglob("*.*"):
        assert not re.search(r"#include <(\w*stream|iomanip|locale)>", path.read_text()), path


def test_only_files_opens_a_file_for_writing():
    """Its writes follow no link. predict's table is a new file ("x"), which no link can stand for."""
    opens = re.compile(
        r"""write_text|write_bytes|np\.savez?\(["']|open\([^)\n]*["'][wa]b?\+?["']|mkstemp|mkdtemp"""
    )
    for path in PACKAGE.rglob("*.py"):
        assert path.name == "files.py" or not opens.search(path.read_text()), path


def test_the_interface_is_raised_with_every_change_of_a_schema():
    """A module that was compiled before must not get arguments that its kernels do not know."""
    tree = ast.parse((PACKAGE / "ops.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    schemas = [ast.literal_eval(call.args[0]) for call in calls if ast.unparse(call.func) == "_op"]
    assert len(schemas) == 15
    digest = hashlib.sha256("\n".join(schemas).encode()).hexdigest()[:16]
    assert (ops.INTERFACE, digest) == (4, "491ea45bf0eeacbb"), (
        "raise INTERFACE and kInterface, and renew this digest"
    )
    assert ops._C is None or ops._C.interface == ops.INTERFACE


def test_a_module_compiled_for_other_schemas_is_not_used(ended):
    done = ended["an older module"]
    assert done.status == 0, done.err
    assert done.out.startswith(
        "reference ops: the compiled module is of another version of ups_fast; build it"
    )


def test_backend_says_what_runs():
    said = ups_fast.backend()
    assert set(said) == {"cpu", "cuda"}
    assert said["cpu"].startswith("fused kernels") == (ops._C is not None)


def test_without_kernels_the_reference_runs_and_says_so(ended):
    done = ended["no module"]
    assert done.status == 0, done.err
    warned, backend = done.out.splitlines()
    assert "ups_fast runs its reference ops on cpu: the compiled module is missing" in warned
    assert backend.startswith("reference ops: the compiled module is missing")


def test_strict_makes_a_fallback_an_error(ended):
    done = ended["strict"]
    assert done.status == 1 and "RuntimeError: ups_fast runs its reference ops on cpu" in done.err


def test_the_version_is_everywhere_the_same():
    version = ups_fast.__version__
    assert re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE) == [version]
    assert re.findall(r"^## \[(.+?)\] - \d", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == version
    wheels = re.findall(r"ups_fast-([\d.]+)-cp", (ROOT / "docs/how-it-works.md").read_text())
    assert wheels == [version] and 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.slow
def test_a_wheel_works_away_from_the_repository(tmp_path):
    pip = [sys.executable, "-m", "pip"]
    # Setup has compiled the same files, with nvcc and with -O3, which takes minutes.
    compiler = tmp_path / "quick"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O1\n')
    compiler.chmod(0o755)
    quick = {**os.environ, "UPS_FAST_CUDA": "0", "CXX": str(compiler)}
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT]
    subprocess.run([*pip, *build], check=True, env=quick)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"ups_fast"}
    assert f"ups_fast-{ups_fast.__version__}.dist-info/licenses/LICENSE" in names
    files = [path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".yaml", ".typed")]
    assert {str(path.relative_to(ROOT)) for path in files} <= set(names)
    assert len([name for name in names if name.endswith(".so")]) == 1
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--target", site, wheel], check=True)
    code = "import torch, ups_fast; print(ups_fast.__file__); print(ups_fast.backend()['cpu']);"
    code += (
        "ups_fast.mc_select(torch.randn(3, 4, 5)); import ups_fast.train, ups_fast.rounds, ups_fast.report"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(site), "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    where, backend = done.stdout.splitlines()
    assert where.startswith(str(site)) and backend.startswith("fused kernels")
