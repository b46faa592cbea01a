# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""When a training run writes its checkpoints: by validation, by step, at its end, and before it is stopped."""

import signal
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import _TunerExitException
from nemo.utils import logging
from nemo.utils.callbacks.nemo_model_checkpoint import NeMoModelCheckpoint

from nemo_ee.runtime.children import STOPPING, children_outlive_signals


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
        """NeMo's; what megatron-core starts to write it is not ended by signals to all processes of a job."""
        with children_outlive_signals():
            super()._save_checkpoint(trainer, filepath)

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict) -> None:
        """Lightning's, once a step: writing over a complete checkpoint would put it at risk for nothing."""
        if self._step_of_last != trainer.global_step:
            super()._save_last_checkpoint(trainer, monitor_candidates)
            self._step_of_last = trainer.global_step


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
