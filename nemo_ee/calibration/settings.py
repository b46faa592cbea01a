# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The settings of a calibration, read once from `conf/calibrate_early_exit.yaml` and its overrides."""

from collections.abc import Mapping
from dataclasses import dataclass

from nemo_ee.errors import Fault
from nemo_ee.schema import read_settings


@dataclass(frozen=True)
class CalibrationTextConfig:
    """Held-out text: neither the model nor its exits were trained on it.

    Attributes:
        prefix: of an indexed dataset with its document boundaries, without `.bin` and `.idx`.
        documents: how many are read at most, drawn at random. More of them bring the certified agreement closer
            to the measured one; longer ones do not.
        seq_length: tokens of each document, from its beginning, that are predicted at most. The guarantee is
            about these; it needs the fewer documents the more of them are as long.
        batch_size: documents at a time.
        tuning_share: share of the documents that draws the path of thresholds; the others test it.
    """

    prefix: str
    documents: int = 1000
    seq_length: int = 128
    batch_size: int = 8
    tuning_share: float = 0.25


@dataclass(frozen=True)
class CalibrationConfig:
    """A calibration of exit thresholds.

    Attributes:
        gpt_model_file: the base, or a model merged with its exits, a `.nemo`.
        output_file: the `.nemo` to write: a copy of `adapter_file`, or without one of `gpt_model_file`, with other
            thresholds. It may be that file itself, which is then replaced.
        data: held-out text.
        adapter_file: the exits alone; null if they are part of the model.
        target_agreement: share of tokens that shall equal the final exit's.
        delta: probability with which the choice of test documents may lead to thresholds that keep less.
        exits: exit layers in use, stored with the thresholds; null means those that the checkpoint uses.
        levels: thresholds per exit that the path may go through.
        bins: of the reliability plots.
        report_dir: where the report goes.
        overwrite: replace `output_file` if it is another file that exists.
        seed: of the choice of documents, their split and the bootstrap.
        precision: of weights and activations: 32, bf16 or 16. Use the one that generation will have.
    """

    gpt_model_file: str
    output_file: str
    data: CalibrationTextConfig
    adapter_file: str | None = None
    target_agreement: float = 0.95
    delta: float = 0.05
    exits: tuple[int, ...] | None = None
    levels: int = 100
    bins: int = 10
    report_dir: str = "calibration"
    overwrite: bool = False
    seed: int = 1234
    precision: str | int = 32

    @classmethod
    def from_dict(cls, values: Mapping) -> "CalibrationConfig":
        """Checks plain values (as from YAML) and builds the configuration.

        Raises:
            ConfigError: listing every unknown key, missing value and value that breaks its rule.
        """
        return read_settings(cls, values, _faults)

    @property
    def source(self) -> str:
        """The file that gets other thresholds."""
        return self.adapter_file or self.gpt_model_file


def _faults(config: CalibrationConfig) -> list[Fault]:
    data = config.data
    faults = [
        Fault(key, value, "must lie between 0 and 1, both excluded", remedy)
        for key, value, remedy in (
            ("target_agreement", config.target_agreement, "use e.g. 0.95"),
            ("delta", config.delta, "use e.g. 0.05"),
            ("data.tuning_share", data.tuning_share, "use e.g. 0.25"),
        )
        if not 0.0 < value < 1.0
    ]
    for key, value in (
        ("data.documents", data.documents),
        ("data.seq_length", data.seq_length),
        ("data.batch_size", data.batch_size),
        ("levels", config.levels),
        ("bins", config.bins),
    ):
        if value < 1:
            faults.append(Fault(key, value, "must be positive", "use 1 or more"))
    if config.seed < 0:
        faults.append(Fault("seed", config.seed, "must be 0 or more", "use e.g. 1234"))
    exits = config.exits
    if exits is not None and (not exits or list(exits) != sorted(set(exits))):
        rule = "must name exit layers in ascending order, each once"
        faults.append(Fault("exits", list(exits), rule, f"write {sorted(set(exits)) or 'null'}"))
    return faults
