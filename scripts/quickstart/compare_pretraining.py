# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Compares pre-training with exits to pre-training without: validation losses over steps, in a report.

python scripts/quickstart/compare_pretraining.py --with-exits RUN --plain RUN --output DIRECTORY

Each RUN is the directory of a run of megatron_gpt_ee_pretraining.py that has ended. The plain one differs in
model.early_exit.training.loss_weights=[0,0,0] alone (as many zeros as exits): then its exits are not trained.
"""

import argparse

from nemo_ee.runtime.script import user_errors


def main() -> None:
    """Parses the command line, writes the report, and says where it lies."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--with-exits", required=True, help="directory of the run with exits")
    parser.add_argument("--plain", required=True, help="directory of the run with loss weights 0")
    parser.add_argument("--output", required=True, help="directory to write report.md and its plots to")
    arguments = parser.parse_args()
    with user_errors(nemo=False):
        from nemo_ee.evaluation.compare_pretraining import write_comparison

        for path in write_comparison(arguments.with_exits, arguments.plain, arguments.output):
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
