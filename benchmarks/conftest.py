"""The table of a benchmark run: every group's implementations side by side, with ratios, spread, machine and commit."""

from __future__ import annotations

import platform
import subprocess
from collections import defaultdict
from pathlib import Path

import torch

import ups_fast


def machine() -> str:
    """Processor (or GPU), threads, torch and commit: what a number must not travel without."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":")[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    commit = git.stdout.strip() or "unknown"
    return f"{cpu}{gpu}, {torch.get_num_threads()} threads, torch {torch.__version__}, commit {commit}"


def pytest_sessionfinish(session):
    benchmarks = getattr(session.config, "_benchmarksession", None)
    groups = defaultdict(dict)
    for bench in benchmarks.benchmarks if benchmarks else ():
        groups[bench.group][bench.extra_info["implementation"]] = bench
    if not groups:
        return
    print(f"\n\n{machine()}")
    for device, kernels in ups_fast.backend().items():
        print(f"{device}: {kernels}")
    print("median of n calls [middle half]; ratio of medians to ups_fast in the same run\n")
    for group, rows in groups.items():
        print(group)
        ours = rows["ups_fast"].stats.median
        for name, bench in rows.items():
            s = bench.stats
            print(
                f"  {name:22} {s.median * 1e3:9.3f} ms [{s.q1 * 1e3:.3f}, {s.q3 * 1e3:.3f}]"
                f"  n={s.rounds:<5} {s.median / ours:6.1f}x"
                + (
                    f"  {bench.extra_info['images'] / s.median:,.0f} images/s"
                    if "images" in bench.extra_info
                    else ""
                )
            )
