# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The settings of a calibration, read once from `conf/calibrate_early_exit.yaml` and its overrides."""

from dataclasses import dataclass
from typing import Annotated

from nemo_ee.errors import Fault
from nemo_ee.schema import Positive, Rule, Settings, choice, holds


def _between(remedy: str) -> Rule:
    return holds(lambda share: 0.0 < share < 1.0, "must lie between 0 and 1, both excluded", remedy)


LEAST = holds(lambda tokens: tokens is None or tokens >= 1, "must be positive", "use e.g. 32")
DELTA, TUNING_SHARE = 0.05, 0.25


@dataclass(frozen=True)
class CalibrationTextConfig:
    """Held-out text: neither the model nor its exits were trained on it.

    Attributes:
        prefix: of an indexed dataset with its document boundaries, without `.bin` and `.idx`.
        prompt_tokens: the model itself continues so many tokens of each document, at full depth, and what it says is
            the text, as when it generates. null: the documents' own text.
        chats_file: in place of `prefix`, chats in JSON lines; what counts is the tokens of answers.
        documents: how many are read at most, drawn at random. More of them bring the certified agreement closer
            to the measured one; longer ones do not.
        seq_length: tokens of each document, from its beginning, that are predicted at most. The guarantee is
            about these; it needs the fewer documents the more of them are as long.
        batch_size: documents at a time.
        tuning_share: share of the documents that draws the path of thresholds; the others test it.
    """

    prefix: str | None = None
    prompt_tokens: Annotated[int | None, LEAST] = None
    chats_file: str | None = None
    documents: Positive = 1000
    seq_length: Positive = 128
    batch_size: Positive = 8
    tuning_share: Annotated[float, _between("use e.g. 0.25")] = TUNING_SHARE

    @property
    def key(self) -> str:
        """Of the setting that names the text."""
        return "data.prefix" if self.chats_file is None else "data.chats_file"


@dataclass(frozen=True)
class CalibrationConfig(Settings):
    """A calibration of exit thresholds.

    Attributes:
        gpt_model_file: the base, or a model merged with its exits, a `.nemo`.
        output_file: the `.nemo` to write: a copy of `adapter_file`, or without one of `gpt_model_file`, with other
            thresholds. It may be that file itself, which is then replaced.
        data: held-out text.
        adapter_file: the exits alone; null if they are part of the model.
        target_agreement: share of tokens that shall equal the final exit's.
        guarantee: certify that; otherwise take the fastest thresholds whose agreement on this text is as high, a point
            estimate of which nothing is promised.
        delta: probability with which the choice of test documents may lead to thresholds that keep less.
        weights: of decoding whose passes are priced: `native`, or `bf16`.
        prices_file: prices of passes, a JSON file: read if it is there, else measured here and written; null: measured.
        exits: exit layers that may be used, stored with the thresholds; null means those that the checkpoint uses.
        levels: thresholds per exit that are tried; fewer where there are many exits.
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
    target_agreement: Annotated[float, _between("use e.g. 0.95")] = 0.95
    guarantee: bool = True
    delta: Annotated[float, _between("use e.g. 0.05")] = DELTA
    weights: Annotated[str, choice("native", "bf16")] = "native"
    prices_file: str | None = None
    exits: tuple[int, ...] | None = None
    levels: Positive = 100
    bins: Positive = 10
    report_dir: str = "calibration"
    overwrite: bool = False
    seed: Annotated[int, holds(lambda seed: seed >= 0, "must be 0 or more", "use e.g. 1234")] = 1234
    precision: str | int = 32

    @property
    def source(self) -> str:
        """The file that gets other thresholds."""
        return self.adapter_file or self.gpt_model_file

    def faults(self) -> list[Fault]:
        """See `Settings`."""
        faults, data, exits = [], self.data, self.exits
        if exits is not None and (not exits or list(exits) != sorted(set(exits))):
            rule = "must name exit layers in ascending order, each once"
            faults.append(Fault("exits", list(exits), rule, f"write {sorted(set(exits)) or 'null'}"))
        if (data.prefix is None) == (data.chats_file is None):
            rule = "either this or data.chats_file is the held-out text"
            faults.append(Fault("data.prefix", data.prefix, rule, "set one of them, and the other to null"))
        if data.chats_file is not None and data.prompt_tokens is not None:
            rule = "answers of data.chats_file are taken as they are"
            faults.append(
                Fault("data.prompt_tokens", data.prompt_tokens, rule, "set data.prompt_tokens=null")
            )
        means_nothing = "means nothing with guarantee=false, of which nothing is promised"
        for key, value, usual in (
            ("delta", self.delta, DELTA),
            ("data.tuning_share", data.tuning_share, TUNING_SHARE),
        ):
            if not self.guarantee and value != usual:
                faults.append(Fault(key, value, means_nothing, f"leave {key} out, or set guarantee=true"))
        return faults
