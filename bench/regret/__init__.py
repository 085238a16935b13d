"""Does it help? Progress lost by fixed thresholds, percentiles and other clippers over tasks of very different scales.

Four files: `tasks` is what is learned, `clippers` what clips; `study` trains what is missing, `report` shows it.
"""

from bench.regret.study import main

__all__ = ["main"]
