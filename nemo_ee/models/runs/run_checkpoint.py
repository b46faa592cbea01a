# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""When a training run writes its checkpoints: by validation, by step, at its end, and before it is stopped."""

import shutil
import signal
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import _TunerExitException
from nemo.utils import logging
from nemo.utils.callbacks.nemo_model_checkpoint import NeMoModelCheckpoint
from nemo.utils.model_utils import ckpt_to_dir

from nemo_ee.errors import OutputError, TrainingError
from nemo_ee.files.write_errors import write_errors
from nemo_ee.modeling.finite import not_finite
from nemo_ee.runtime import collective
from nemo_ee.runtime.children import STOPPING


class RunCheckpoint(NeMoModelCheckpoint):
    """NeMo's checkpoints of the best validations; and a last one to resume from, whatever validation does.

    Lightning 2.4 writes by step or by validation, not both, and NeMo 2.4 leaves out the last checkpoint of a
    run without validations whose steps are a multiple of `val_check_interval`.

    Args:
        every_n_train_steps: steps between two last checkpoints; None: after validations alone.
        **settings: NeMo's.
    """

    def __init__(self, every_n_train_steps: int | None = None, **settings: Any):
        super().__init__(**settings)
        self.every_n_steps = every_n_train_steps or 0
        self._step_of_last = -1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes by step. Where a validation follows it comes first, and its end writes."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        due = self.every_n_steps and trainer.global_step % self.every_n_steps == 0
        loop = trainer.fit_loop
        if due and not loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
            self.save_last_of(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Writes the last step's; then NeMo's `.nemo`."""
        self.save_last_of(trainer)
        super().on_train_end(trainer, pl_module)

    def save_last_of(self, trainer: Trainer) -> None:
        """Writes the last checkpoint, unless that of the current step is written. Collective over the world."""
        if not trainer.fast_dev_run:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """NeMo's; not of weights that are no numbers, and nothing is left of one that cannot be written.

        Raises:
            TrainingError: on every rank, naming a weight that is NaN or infinite. What was written before stays.
            OutputError: the disk is full, say. So does it then.
        """
        module = trainer.lightning_module
        if hasattr(module, "gather_parameters"):
            module.gather_parameters()
        collective.on_all_ranks(lambda: _check_weights(module, trainer.global_step))
        directory = ckpt_to_dir(filepath)
        try:
            with write_errors(directory):
                super()._save_checkpoint(trainer, filepath)
        except OutputError as error:
            shutil.rmtree(directory, ignore_errors=True)
            if not directory.exists():
                self.format_checkpoint_unfinished_marker_path(filepath).unlink(missing_ok=True)
            raise OutputError(f"{error}; then the same command goes on from the checkpoint before") from error

    def _should_remove_checkpoint(self, trainer: Trainer, previous: str, current: str) -> bool:
        """NeMo's; of this run's own folder alone. The state of a checkpoint that a run goes on from names paths, and
        for NeMo one that leads out of the folder by ``..`` lies within."""
        within = Path(self.dirpath).resolve() in Path(previous).resolve().parents
        return within and super()._should_remove_checkpoint(trainer, previous, current)

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict) -> None:
        """Lightning's, once a step: writing over a complete checkpoint would put it at risk for nothing."""
        if self._step_of_last != trainer.global_step:
            super()._save_last_checkpoint(trainer, monitor_candidates)
            self._step_of_last = trainer.global_step


def _check_weights(module: torch.nn.Module, step: int) -> None:
    """Raises TrainingError if the last step has made this rank's trained weights NaN or infinite."""
    named = module.named_parameters()
    if found := not_finite((name, parameter) for name, parameter in named if parameter.requires_grad):
        raise TrainingError(
            f"step {step}: {len(found)} weights have become NaN or infinite, first {found[0]}; the last "
            "checkpoint is from before: start from it with a lower model.optim.lr, or look at the data behind it"
        )


class StopOnSignal(Callback):
    """Ends training after the current step, with a checkpoint, where a scheduler announces the job's end.

    NeMo's PreemptionCallback hears one signal, on rank 0 alone, and exp_manager leaves it out on a CPU.

    Args:
        checkpoint: writes the checkpoint.
    """

    def __init__(self, checkpoint: RunCheckpoint):
        self.checkpoint, self.received = checkpoint, 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Takes the signals until Lightning, which notes all handlers first, gives them back."""
        for number in STOPPING:
            signal.signal(number, self._note)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Stops all ranks once one was asked to. Collective: an all-reduce over the world."""
        received = torch.tensor(self.received, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
        if number := int(received):
            name, step = signal.Signals(number).name, trainer.global_step
            logging.warning(f"{name} was received: the run ends after step {step}, with a checkpoint.")
            self.checkpoint.save_last_of(trainer)
            raise _TunerExitException  # as NeMo's StatelessTimer: fit returns, without the .nemo

    def _note(self, number: int, _frame: Any) -> None:
        self.received = number


class ValidateAfterResuming(Callback):
    """Lets the first step of a resumed run be validated.

    NeMo's exp_manager has a run that goes on behind a validation skip it; what it skips is whatever validation
    is due until the first step has ended, that step's own included.
    """

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """The checkpoint's own validation has been passed over by now."""
        trainer.fit_loop.epoch_loop.restarting = False
