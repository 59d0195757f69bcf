"""The command line for labeling by hand in Label Studio: a run's tasks go out, and annotations go into a table.

`python -m ups_fast.label_studio tasks RUN --out tasks.json`, then
`python -m ups_fast.label_studio merge EXPORT --table labels.csv --out merged.csv`. Exit status: 0 where the new files
are written, conflicts or not; 2 for what the user can mend (one sentence, and nothing is written); 130 for Ctrl-C.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence

from ups_fast import command
from ups_fast.terminal import complain, ended

try:
    from ups_fast.data.annotations import CONTROL, read_annotations
    from ups_fast.data.merging import Finding, default_prefix, merge, open_table
    from ups_fast.display import open_console
    from ups_fast.files import check_new, home, write_new
    from ups_fast.models.saved import load_model
    from ups_fast.report.tasks import tasks_of, write_tasks
    from ups_fast.words import many, shown
except (KeyboardInterrupt, ImportError) as error:  # in the first seconds: nothing has been done
    if __name__ == "__main__":
        sys.exit(command.interrupted_early(error))
    raise

DESCRIPTION = """\
Label what a run could not, in Label Studio, and train on the labels.

tasks writes a run's unlabeled images as tasks that show what the network says,
and a labeling configuration beside them. merge puts the annotations into a copy
of the table of labels. What it cannot merge is listed."""
TASKS = """\
Write the unlabeled images of a run as tasks for Label Studio.

RUN is the folder of the run. The tasks of its next_to_label.csv come first, then
the others by rising confidence. Beside NAME.json, NAME.xml is written: paste it
into the project as its labeling configuration, then import NAME.json."""
MERGE = """\
Merge the annotations of Label Studio into a copy of a table of labels.

EXPORT is what Label Studio exports as JSON or JSON-MIN. An image without a label
gets the one that its annotations agree on. A label that the table has stays.
Conflicts, skipped tasks, unknown classes and unknown paths are listed."""
PREFIX = """what stands before an image's path in its URL, such as https://host/images/ or s3://bucket/images/.
Default: /data/local-files/?d=FOLDER/, with the name of the images' folder"""


def tasks(args: Namespace) -> str:
    """Writes the tasks and their configuration, and returns a sentence on them."""
    out, run = home(args.out), home(args.run)
    config = out.with_suffix(".xml")
    if out.suffix.lower() != ".json":
        raise ValueError(f"--out must be a file of the suffix .json, got {args.out}")
    for path in (out, config):
        check_new(path)
    model = load_model(run)
    if hasattr(model, "frames"):
        raise ValueError(
            f"{args.run} is a run on clips, of which no tasks are made: RUN must be on images or features"
        )
    if model.task != "single":
        raise ValueError(
            f"{args.run} is a run with several labels for each sample, of which no tasks are made: RUN must have one"
        )
    found, view = tasks_of(run, model.classes, args.prefix, args.next)
    write_new(config, view.encode())
    try:
        write_new(out, write_tasks(found))
    except BaseException:
        config.unlink()
        raise
    return f"{many(len(found), 'task')} in {args.out}, the labeling configuration in {config}"


def merging(args: Namespace) -> str:
    """Writes the merged table, lists what is not in it, and returns a sentence on both."""
    out, place = home(args.out), home(args.table)
    check_new(out)
    table = open_table(place)
    folder = place if place.is_dir() else place.parent
    if table.of_files and out.parent.resolve() != folder.resolve():
        raise ValueError(
            f"--out {args.out} must lie in {str(folder)!r}: the paths of the table are relative to its folder"
        )
    given = read_annotations(home(args.export), args.control)
    prefix = default_prefix(table.folder) if args.prefix is None else args.prefix
    merged = merge(table, given.annotations, prefix)
    write_new(out, merged.table.write())
    if merged.findings:
        _list(merged.findings)
    kinds = Counter(each.what for each in merged.findings)
    said = f"{many(merged.new, 'new label')}, {merged.same:,} that the table had"
    said += "; not merged: " + ", ".join(f"{what} {n:,}" for what, n in kinds.items()) if kinds else ""
    said += f"; {many(given.without, 'task')} without annotation" if given.without else ""
    return f"{args.out}: {said}"


def _list(findings: Sequence[Finding]) -> None:
    """A table of findings on standard output."""
    lines = [
        ("path", "table", "annotation", "what"),
        *((*each[:3], each.what + each.remark) for each in findings),
    ]
    cells = [[shown(cell) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    console = open_console()
    for line in cells:
        console.print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _words(argv: Sequence[str] | None) -> Namespace:
    program, hint = "python -m ups_fast.label_studio", "--help explains the rest"
    parser = command.Parser(hint, prog=program, description=DESCRIPTION)
    verbs = parser.add_subparsers(dest="verb", metavar="tasks | merge", required=True)
    one = verbs.add_parser("tasks", hint=hint, description=TASKS, help="write a run's tasks")
    one.add_argument("run", metavar="RUN", help="the run's folder, such as runs/folder")
    one.add_argument("--out", required=True, help="the tasks to write, a new file of the suffix .json")
    one.add_argument(
        "--next", type=command.count, default=0, metavar="N", help="only the first N tasks. Default: all"
    )
    one.set_defaults(act=tasks)
    two = verbs.add_parser("merge", hint=hint, description=MERGE, help="merge annotations into a table")
    two.add_argument("export", metavar="EXPORT", help="the annotations, such as annotations.json")
    two.add_argument(
        "--table", required=True, help="the table of labels, or the folder of images, of data.root"
    )
    two.add_argument(
        "--out", required=True, help="the table to write, a new file in the folder of the other one"
    )
    two.add_argument(
        "--control", default=CONTROL, help="the name of <Choices> in the project. Default: %(default)s"
    )
    two.set_defaults(act=merging)
    for each in (one, two):
        each.add_argument("--prefix", help=PREFIX)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with the words `argv` (default: sys.argv) and returns the exit status."""

    def work() -> None:
        args = _words(argv)
        complain(args.act(args))

    return command.status_of(work, "end other programs")


if __name__ == "__main__":
    sys.exit(ended(main()))
