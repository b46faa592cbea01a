# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Adds, removes and moves exits of a full `.nemo`; exits that stay keep their weights.

python scripts/edit_early_exits.py gpt_model_file=model.nemo output_path=edited.nemo 'layers=[3,6,9]' '+moves.8=9'
"""

from omegaconf import DictConfig, OmegaConf

from nemo_ee.files.output import claim
from nemo_ee.runtime.script import script, user_errors


@script("edit_early_exits", alone=True)
def main(cfg: DictConfig) -> None:
    """Edits and says what became of every exit."""
    with user_errors(cfg):
        from lightning.pytorch import Trainer

        from nemo_ee.models.exit_editor import edit_exits
        from nemo_ee.models.strategy import EarlyExitDDPStrategy

        strategy = EarlyExitDDPStrategy(no_ddp_communication_hook=True, process_group_backend="gloo")
        trainer = Trainer(
            accelerator="cpu", devices=1, strategy=strategy, logger=False, enable_checkpointing=False
        )
        given = OmegaConf.to_container(cfg, resolve=True)
        moves = {int(old): new for old, new in (given["moves"] or {}).items()}
        with claim(str(cfg.output_path)):
            model = edit_exits(
                cfg.gpt_model_file,
                cfg.output_path,
                given["layers"],
                moves,
                trainer,
                given["early_exit"],
                cfg.overwrite,
            )
        for n in model.early_exit.layers:
            print(f"exit {n}: {f'weights of exit {model.sources[n]}' if n in model.sources else 'new'}")
        if not model.early_exit.layers:
            print("no exits")
        print(f"wrote {cfg.output_path}")


if __name__ == "__main__":
    main()
