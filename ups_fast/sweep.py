"""The command line `python -m ups_fast.sweep CONFIG key=a,b key=low..high ...`: many trials, judged by validation.

Exit status: 0 where all trials have ended, 2 for what the user can mend (one sentence; what is done stays), 130 for
Ctrl-C, after which the same command goes on.
"""

from __future__ import annotations

import errno
import os
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from ups_fast import command, machine
from ups_fast.terminal import complain, ended

try:
    from rich.console import Console

    from ups_fast.display import Interrupted, open_console, say
    from ups_fast.files import RunFolderError, check_plain, writing
    from ups_fast.inputs import validates
    from ups_fast.study import RECORDS as STUDY_RECORDS
    from ups_fast.sweep_space import MOST_TRIALS, Space, read
    from ups_fast.words import many

    if find_spec("optuna") is not None:
        from ups_fast.sweep_drive import Drive
        from ups_fast.sweep_optuna import PRUNERS, SAMPLERS, file_url
        from ups_fast.sweep_results import BEST, PAGE, RECORDS, keys_of
        from ups_fast.sweep_storage import Board, Plan, StorageGone, look
        from ups_fast.sweep_worker import Slot
except (KeyboardInterrupt, ImportError) as error:  # in the first seconds: nothing has been done
    if __name__ == "__main__":
        if str(getattr(error, "name", "")).partition(".")[0] in ("optuna", "sqlalchemy", "alembic"):
            complain(
                f"error: optuna cannot be used ({error}): pip install --force-reinstall 'ups_fast[sweep]'"
            )
            sys.exit(2)
        sys.exit(command.interrupted_early(error))
    raise

DESCRIPTION = """\
Train a config with many values of its keys, and find the best by its validation
samples.

CONFIG is a YAML file, such as configs/digits.yaml. key=a,b,c lists values,
key=low..high is a range, and key=low..high:log one on a logarithmic scale.
Lists alone make a grid. With a range, points are drawn and --trials says how
many. seed=0,1,2 trains each point with each seed. key=value changes a key of
all trials, and run_dir=FOLDER says where all is kept.
The same command goes on with a stopped sweep."""
DEFAULT_TRIALS = 20
STORAGE = "sweep.db"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with the words `argv` (default: sys.argv) and returns the exit status."""
    return command.status_of(lambda: _sweep(_words(argv)), "give fewer --workers", command.may_go_on)


def _sweep(args: Namespace) -> None:
    if find_spec("optuna") is None:
        raise ValueError("optuna is not installed: pip install 'ups_fast[sweep]'")
    with command.told_warnings():
        space = read(args.config, args.overrides)
    plan = _plan(args, space)
    cfg = space.first
    device = machine.pick_device(cfg.device)
    command.check_packages()
    command.check_kernels(device)
    _check_folder(space.folder)
    console = open_console()
    if not validates(cfg, device, Console(quiet=True)):
        raise ValueError(
            "a sweep is judged by validation samples, and never by test samples: set data.val_share=0.2, or give the "
            "data a validation part"
        )
    if args.dry_run:
        _list(console, plan)
        return
    slots = _slots(args, plan, cfg.device, device)
    with writing(space.folder):
        (space.folder / "trials").mkdir(parents=True, exist_ok=True)
        if not os.access(space.folder, os.W_OK):  # of which SQLite would say that it cannot open a file
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    board = Board(plan)
    board.begin()
    drive = Drive(console, board, slots)
    try:
        drive.run()
    except KeyboardInterrupt:
        drive.finish_early()
        raise Interrupted(f"stopped: {drive.counted()}; everything is saved in {space.folder}") from None
    except StorageGone as error:
        drive.trouble = str(error)
    finally:
        drive.close()
    if drive.trouble:
        drive.finish_early()
        raise ValueError(f"{drive.trouble}; {drive.counted()}, and the same command goes on")
    drive.finish()


def _plan(args: Namespace, space: Space) -> Plan:
    size = len(space.seeds) if space.is_search else len(space.grid) * len(space.seeds)
    if args.trials and not space.is_search:
        raise ValueError(
            f"--trials is for ranges, and these lists make a grid of {many(size, 'trial')}, all of which are run: "
            "leave it out, or give a range such as train.lr=0.01..0.3:log"
        )
    trials = (args.trials or DEFAULT_TRIALS) if space.is_search else size
    pruner = args.pruner or ("median" if space.is_search else "none")
    url = args.storage or file_url(space.folder / STORAGE)
    return Plan(space, url, trials, args.sampler, pruner)


def _slots(args: Namespace, plan: Plan, asked: str, device: torch.device) -> list[Slot]:
    """One for each core, or so many on each GPU."""
    if device.type == "cpu":
        places = ["cpu"] * (args.workers or machine.cores())
    else:
        all_of_them = asked in ("auto", "cuda")
        gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if all_of_them else [asked]
        places = gpus * args.slots_per_gpu
        places = (places * -(-args.workers // len(places)))[: args.workers] if args.workers else places
    return [Slot(i, place, plan) for i, place in enumerate(places)]


def _check_folder(folder: Path) -> None:
    with writing(folder):
        there = list(folder.iterdir()) if folder.exists() else []
    names = {each.name for each in there}
    if there and (not names & {"trials", STORAGE} or STUDY_RECORDS in names):
        raise RunFolderError(f"run_dir={folder} holds files but no sweep: choose another folder")
    for name in (RECORDS, BEST, PAGE):
        check_plain(folder / name)
    check_plain(folder / "trials", folder=True)


def _list(console: Console, plan: Plan) -> None:
    """What would run, and what has. Writes nothing."""
    space, there = plan.space, {entry.index: entry for entry in look(plan)}
    grid = [] if space.is_search else space.grid
    for index in range(plan.trials):
        point, seed = plan.point_of(index)
        values = there[index].values if index in there else {}
        said = keys_of(values or (grid[point] if grid else {}))
        if not said:
            said = ", ".join(f"{axis.key}=?" for axis in space.axes)
        state = there[index].state.name.lower() if index in there else "to do"
        say(console, f"{index:04d}  {state}  [{', '.join(filter(None, (said, f'seed={seed}')))}]")
    how = f"points drawn by {plan.sampler}" if space.is_search else "a grid"
    say(console, f"{many(plan.trials, 'trial')}: {how}; pruner: {plan.pruner}")


def _words(argv: Sequence[str] | None) -> Namespace:
    parser = command.Parser(
        "keys are written as key=value, and --help explains the rest",
        prog="python -m ups_fast.sweep",
        usage="%(prog)s CONFIG [key=value ...] [key=a,b ...] [key=low..high[:log] ...] [options]",
        description=DESCRIPTION,
    )
    parser.add_argument("config", metavar="CONFIG", help="the YAML file that describes a run")
    parser.add_argument("overrides", metavar="key=...", nargs="*", help="what varies, and what all share")
    parser.add_argument(
        "--trials", type=_trials, default=0, metavar="N",
        help=f"of a search, the number of runs in all, those of each seed counted. Default: {DEFAULT_TRIALS}",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=command.count, default=0, metavar="N",
        help="so many trials at once. Default: as many as there are cores, or slots on the GPUs",
    )  # fmt: skip
    parser.add_argument(
        "--slots-per-gpu", type=command.count, default=1, metavar="N",
        help="so many trials at once on each GPU. Small networks leave room for several. Default: 1",
    )  # fmt: skip
    parser.add_argument(
        "--storage", default="", metavar="URL",
        help="where trials are recorded, such as postgresql://user@host/name. Default: sweep.db in run_dir",
    )  # fmt: skip
    names = find_spec("optuna") is not None
    parser.add_argument(
        "--sampler", default="tpe", choices=SAMPLERS if names else None,
        help="how points of ranges are drawn. Default: tpe",
    )  # fmt: skip
    parser.add_argument(
        "--pruner", default="", choices=PRUNERS if names else None,
        help="which trials end early, judged after each round. Default: median with ranges, none for a grid",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="list the trials, and do nothing")
    return parser.parse_intermixed_args(argv)


def _trials(text: str) -> int:
    count = command.count(text)
    if count > MOST_TRIALS:
        raise ArgumentTypeError(f"must be at most {MOST_TRIALS:,}, got {text}")
    return count


if __name__ == "__main__":
    sys.exit(ended(main()))
