"""Are these machines fit for the run: started as train.py would be, with the same arguments."""

from dist_lm.errors import run_entry
from dist_lm.launcher import die_with_launcher


def main(argv: list[str]) -> None:
    # Before all imports that take time: a launcher may be killed during them.
    die_with_launcher()
    from dist_lm.checks.command import DOCTOR  # pydantic: a tenth of a second
    from dist_lm.cli import load
    from dist_lm.environment import refuse_bad_environment

    config, flags = load(argv, DOCTOR)
    refuse_bad_environment()
    from dist_lm.checks.examination import run  # torch: seconds

    run(config, flags)


if __name__ == "__main__":
    run_entry(main, prints_result=False)
