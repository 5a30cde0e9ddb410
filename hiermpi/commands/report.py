"""``hiermpi report``: where the time of a run went, and how it learned."""

import argparse
from pathlib import Path

from hiermpi.commands import Command

SUMMARY = "tables and plots of one run, or of several side by side"
EXAMPLE = """\
example:
    hiermpi report runs/first
    hiermpi report runs/first runs/second --out comparison/

The plots go into RUN/plots (into DIR with --out). Compared runs share one picture of their losses."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the plots (default: RUN/plots)")
    parser.add_argument("--no-plots", action="store_true", help="tables only")
    parser.add_argument("--json", action="store_true", help="print one JSON object per run, one a line")


def run(arguments: argparse.Namespace) -> int:
    """Print the tables; make the plots."""
    import json

    from hiermpi.reporting.reading import read_run
    from hiermpi.reporting.tables import comparison_table, report_text

    runs = [read_run(path) for path in arguments.runs]
    if arguments.json:
        for found in runs:
            print(json.dumps(found.summary()))
    else:
        print("\n\n".join(report_text(found) for found in runs))
        if len(runs) > 1:
            print("\n" + comparison_table(runs))
    if not arguments.no_plots:
        from hiermpi.reporting.plots import make_plots

        made = make_plots(runs, arguments.out or arguments.runs[0] / "plots")
        if not arguments.json:
            print("\n" + "\n".join(f"{'plot':14}{path}" for path in made))
    return 0


REPORT = Command(SUMMARY, EXAMPLE, configure, run)
