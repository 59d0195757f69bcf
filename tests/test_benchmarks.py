"""What a benchmark run leaves, without a benchmark run; and that gpu-check needs no more than it says."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("record", ROOT / "benchmarks/record.py")
assert spec and spec.loader
record = importlib.util.module_from_spec(spec)
spec.loader.exec_module(record)

STEP = "training step cuda wrn-28-2 B=128"


def bench(group, implementation, median, **info):
    stats = SimpleNamespace(median=median, q1=median * 0.9, q3=median * 1.2, rounds=20)
    info["implementation"] = implementation
    return SimpleNamespace(group=group, stats=stats, extra_info=info, fullname=f"benchmarks/test_{group}")


def made(hardware, day, median):
    about = {"hardware": hardware, "host": "a host, 4 threads", "torch": "2.15", "commit": "abc", "date": day}
    benchmarks = [
        bench("copy cuda", "torch", 0.001, bytes=2_000_000_000, bounded=True),  # 2,000 GB/s
        bench(STEP, "published", 0.128, images=128),
        bench(STEP, "ups_fast", median, images=128, bytes=1_000_000_000, bounded=True),
        bench("op cuda", "ups_fast", 0.016, calls=16, bytes=10_000_000, bounded=False),
    ]
    return record.make(
        {**about, "kernels": {"cuda": "fused"}}, benchmarks, {"test_x[kornia]": "not installed"}
    )


def test_a_record_has_times_of_one_call_rates_and_shares():
    got = made("NVIDIA H100", "2030-01-01", 0.001)
    copy, published, ours, op = got["rows"]
    assert got["copy_gb_s"] == pytest.approx(2000) and "share" not in copy
    assert published["rate"] == pytest.approx(1000) and "share" not in published
    assert (ours["n"], ours["unit"], ours["share"]) == (20, "images/s", pytest.approx(0.5))
    assert ours["predicted"] == [70e3, 110e3, "images/s"] and ours["note"] == ""
    assert (op["median"], op["q1"], op["q3"]) == pytest.approx((1e-3, 0.9e-3, 1.2e-3))
    assert op["rate"] == pytest.approx(10) and "share" not in op, "what fits into a cache has no bound"


def test_a_second_run_of_a_day_adds_to_its_record(tmp_path):
    """Of the same code alone. A group that both have is the second's."""
    first = made("A CPU", "2030-01-01", 0.004)
    first["missing"]["test_another op"] = "failed"
    second = made("A CPU", "2030-01-01", 0.001)
    second["rows"] = [
        second["rows"][2],
        {**second["rows"][3], "group": "another op", "test": "test_another op"},
    ]
    second |= {"copy_gb_s": None, "missing": {"test_y": "failed"}}
    record.write(first, tmp_path)
    path = record.write(second, tmp_path)
    got = json.loads(path.read_text())
    assert [row["group"] for row in got["rows"]] == ["copy cuda", "op cuda", STEP, "another op"]
    assert got["copy_gb_s"] == first["copy_gb_s"] and got["rows"][2]["median"] == 0.001
    assert list(got["missing"]) == ["test_x[kornia]", "test_y"]
    for commit in ("of other code", "abc-dirty", "unknown"):
        for _ in range(2):
            record.write({**second, "commit": commit}, tmp_path)
        record.write({**second, "rows": second["rows"][:1], "commit": commit}, tmp_path)
        kept = len(json.loads(path.read_text())["rows"])
        assert kept == (2 if commit == "of other code" else 1), "edited code is other code"


def cells(table):
    return [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in table.splitlines()
        if line.startswith("|")
    ]


def test_the_table_is_made_of_all_records(tmp_path):
    record.tabulate(tmp_path)
    before = cells((tmp_path / "README.md").read_text())
    assert len(before) == 2 + len(record.PREDICTED) and all(row[3] == "not measured" for row in before[2:])

    record.write(made("A CPU", "2030-01-03", 0.001), tmp_path)
    record.write(made("NVIDIA H100 80GB", "2030-01-01", 0.004), tmp_path)
    path = record.write(made("NVIDIA H100 80GB", "2030-01-02", 0.0015), tmp_path)
    assert path.name == "nvidia-h100-80gb-2030-01-02.json"
    text = json.loads(path.read_text())
    text["rows"][2]["note"] = "it was a fast day"
    path.write_text(json.dumps(text))
    record.tabulate(tmp_path)

    table = (tmp_path / "README.md").read_text()
    after = cells(table)
    assert [
        STEP,
        "ups_fast",
        "70,000 to 110,000 images/s",
        "85,333 images/s",
        "yes",
        "it was a fast day",
    ] in after
    assert sum(row[3] == "not measured" for row in after) == len(record.PREDICTED) - 1
    assert ["", "ups_fast", "1.5 ms [1.35, 1.8]", "20", "85,333 images/s", "33%", "1.0 x"] in after
    assert [STEP, "published", "128 ms [115, 154]", "20", "1,000 images/s", "", "85.3 x"] in after
    heads = [line for line in table.splitlines() if line.startswith("## ")]
    assert heads[1:] == ["## A CPU, 2030-01-03", *(f"## NVIDIA H100 80GB, 2030-01-0{day}" for day in (2, 1))]
    assert table.count("- test_x[kornia]: not installed") == 3


def test_the_table_in_the_repository_is_of_its_records(tmp_path):
    for path in record.RESULTS.glob("*.json"):
        shutil.copy(path, tmp_path)
    record.tabulate(tmp_path)
    assert (record.RESULTS / "README.md").read_text() == (tmp_path / "README.md").read_text()


WITHOUT = """
import sys
for name in ("yaml", "safetensors", "sklearn", "tensorboard", "torchmetrics", "kornia"):
    sys.modules[name] = None
import pytest
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:timeout", *sys.argv[1:]]))
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("what", ["tests/", "benchmarks"])
def test_gpu_check_collects_without_the_trainers_packages(what):
    told = subprocess.run(
        ["make", "--dry-run", "gpu-check"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    lines = [line.partition(" -m pytest ")[2] for line in told.stdout.splitlines()]
    (words,) = [shlex.split(line) for line in lines if what in line]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *words], capture_output=True, text=True, cwd=ROOT, env=alone
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("test_cuda_device.py" if what == "tests/" else "test_ops.py") in done.stdout
