"""The claims of this project, and how to measure them again.

python -m benchmarks                       lists the claims
python -m benchmarks NAME [NAME ...]       measures some, and writes today's result file
python -m benchmarks --all                 measures all, in about ten minutes
python -m benchmarks --quick               whether all claims work, at small sizes; no figures
python -m benchmarks --table               writes the tables of README.md and docs/benchmarks.md
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from benchmarks import results, running, table
from benchmarks.claim import find
from benchmarks.listing import CLAIMS


def main(words: list[str] | None = None) -> int:
    args = _parse(words)
    if args.table:
        table.rewrite(CLAIMS)
        return 0
    claims = list(CLAIMS)
    if args.names:
        claims = find(CLAIMS, args.names)
    elif not (args.all or args.quick):
        _list()
        return 0
    running.prepare_imports(claims)
    # Each result is written as soon as it is there, so that Ctrl-C loses only the claim at work.
    is_kept = not args.quick and args.results.name != "-"
    keep = partial(results.write, folder=args.results) if is_kept else lambda entry: None
    outcomes = running.Runner(args.quick, args.nanogpt, keep).run_all(claims)
    if is_kept and any(outcome.entry for outcome in outcomes):
        print(f"written to {args.results}; python -m benchmarks --table puts them into the README")
    failed = [outcome.claim.name for outcome in outcomes if outcome.failed]
    if failed:
        print(f"error: {', '.join(failed)} could not be measured", file=sys.stderr)
    return 1 if failed else 0


def _parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--all", action="store_true", help="measure all claims")
    parser.add_argument("--quick", action="store_true", help="small sizes, no figures")
    parser.add_argument("--table", action="store_true", help="write the tables of results")
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="a checkout of nanoGPT")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.nanogpt:
        args.nanogpt = args.nanogpt.resolve()
        if not (args.nanogpt / "model.py").is_file():
            parser.error(f"--nanogpt={args.nanogpt} must be a folder with nanoGPT's model.py")
    return args


def _list() -> None:
    width = max(len(claim.name) for claim in CLAIMS)
    for claim in CLAIMS:
        print(f"{claim.name:{width}}  {claim.sentence}; target {claim.target.words()}")


if __name__ == "__main__":
    sys.exit(main())
