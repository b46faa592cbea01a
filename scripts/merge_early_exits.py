# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Merges exits into the base they were tuned on: one full .nemo, without building a model.

python scripts/merge_early_exits.py gpt_model_file=model.nemo adapter_file=exits.nemo output_path=merged.nemo
"""

from omegaconf import DictConfig

from nemo_ee.files.output import claim
from nemo_ee.runtime.script import script, user_errors


@script("merge_early_exits", alone=True)
def main(cfg: DictConfig) -> None:
    """Merges and says where the result lies."""
    with user_errors(cfg):
        from nemo_ee.checkpoint.exits.adapter import merge

        with claim(str(cfg.output_path)):
            path = merge(cfg.gpt_model_file, cfg.adapter_file, cfg.output_path, overwrite=cfg.overwrite)
        print(f"wrote {path} ({path.stat().st_size / 2**20:.0f} MiB)")


if __name__ == "__main__":
    main()
