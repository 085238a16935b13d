"""Does it help? Progress lost by fixed thresholds, percentiles and other clippers over tasks of very different scales.

Four files: `tasks` is what is learned, `clippers` what clips; `study` trains what is missing, `report` shows it.
"""

import warnings
from dataclasses import replace as changed

import torch

from bench.common import parse, parser, say
from bench.regret.clippers import FIRST, MAKERS
from bench.regret.report import make_report
from bench.regret.study import complete, passes, read
from bench.regret.tasks import TASKS


def main() -> None:
    arguments = parser(__doc__, rounds=3)
    arguments.add_argument("--report", action="store_true", help="train nothing: report what is in the file")
    options = parse(arguments)
    tasks, clippers, seeds = TASKS, tuple(MAKERS), options.rounds
    if options.quick:
        of_each_kind = (TASKS[0], TASKS[1], *(task for task in TASKS if "pixels, SGD" in task.name))
        tasks = tuple(changed(task, steps=task.steps // 50) for task in of_each_kind)
        clippers, seeds = FIRST, 1
    say("python -m bench regret")
    path = options.output / "regret.csv"
    if options.report:
        results = read(path)
    else:
        torch.set_num_threads(1)  # the matrices are small, and threads would mostly wait for each other
        torch.set_flush_denormal(True)
        warnings.filterwarnings("ignore", "The gradient norm is")  # rates that are too high are part of the grid
        results = complete(path, tasks, clippers, seeds)
    all_cells = {cell for _, _, cells in passes(tasks, clippers, seeds) for cell in cells}
    for written in make_report(results, len(all_cells), options):
        say(f"written: {written}")
