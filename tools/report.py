"""One page about a run, and the CLAIM checklist: report.html and claim.md.

    python -m tools.report models                                   # after `make demo`
    python -m tools.report models/reproduce --metadata scanners.csv --pages report
    python -m tools.report models/acl-results.json --out acl.html

The page is one file without scripts that needs no network: what was trained on what, AUC with
intervals beside the published figures, ROC, calibration, learning curves, the exams that the stack
gets wrong with heat maps, subgroups, and what not to conclude. reproduce.py ends with it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it finds its own folder only

from mrnet.reports.report import read_all, write_report
from mrnet.runtime import cli


def parse_arguments():
    parser = cli.make_parser(__doc__)
    results = "folders of models, or <task>-results.json files; each needs its stack"
    parser.add_argument("models", nargs="+", type=Path, help=results)
    out = "file, or folder for report.html; default: the first folder. claim.md goes beside it"
    parser.add_argument("--out", type=Path, help=out)
    data = "where the validation exams are; default: where the stack was fitted"
    parser.add_argument("--data-dir", type=Path, help=data)
    metadata = "CSV of the validation exams for subgroups: `id,site,sex`, any columns after it; "
    metadata += "valid-groups.csv of the data folder is one by itself"
    parser.add_argument("--metadata", type=Path, help=metadata)
    pages = "folder that explain.py wrote to: its pages are linked to"
    parser.add_argument("--pages", type=Path, help=pages)
    return parser.parse_args()


def run(args):
    """Read the results and write the page."""
    found = read_all(args.models)
    out = args.out or found[0].folder
    if out.is_dir():
        out /= "report.html"
    for line in write_report(found, out, args.data_dir, args.metadata, args.pages):
        print(f"left out  {line}")
    size = out.stat().st_size / 1e6
    print(f"checklist  {out.with_name('claim.md')}\nreport     {out}  {size:.2f} MB")


if __name__ == "__main__":
    cli.exit_with_status(lambda: run(parse_arguments()))
