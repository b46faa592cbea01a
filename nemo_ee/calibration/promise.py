# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What a calibration promises, or that it promises nothing, in words."""

from pathlib import Path

from nemo_ee.calibration.settings import CalibrationConfig, CalibrationTextConfig
from nemo_ee.calibration.threshold_choice import Choice

POINT_ESTIMATE = "Point estimate, no guarantee"
"""What thresholds are called that were taken without one."""


def promise(config: CalibrationConfig, choice: Choice, documents: int) -> str:
    """What thresholds promise, and on which assumptions; or why there are none.

    Args:
        config: of the calibration.
        choice: what was found.
        documents: that it was found on.
    """
    target, delta = config.target_agreement, config.delta
    if choice.chosen is None:
        return _nothing(config, choice)
    if not config.guarantee:
        return (
            f"{POINT_ESTIMATE}: by the prices of passes these are the fastest thresholds whose agreement with the "
            f"final exit on these {documents:,} documents is at least {target:g}. The same documents chose and "
            "measured them, so that other text agrees less more often than not; nothing is promised. Measure on "
            "other text, or calibrate with guarantee=true."
        )
    return (
        f"With a probability of at least {percent(1 - delta)} over the choice of the {documents:,} test documents, "
        f"the agreement with the final exit is at least {target:g}: of all tokens of further documents, up to the "
        f"first {config.data.seq_length} that count of each, a share of at most {1 - target:.4g} in the long run "
        "differs from the token that the full model would emit. It holds exactly for this number of documents, "
        "however their tokens depend on each other, and whichever exits decoding asks at each token, if (1) test "
        "documents and further documents are independent draws from one source, by which neither the model nor its "
        "exits were trained or chosen; (2) choices are greedy, of the model's own logits (no repetition penalty, no "
        "least length), in the precision, on the kind of device and by the confidence of this calibration, by decoding "
        "that is prepared (prepare_decoding, the generating script, the server), with an exact KV policy; (3) each is "
        "made after the text itself (teacher-forced), not after text that was generated with early exits. It is about "
        "this one calibration: k that were planned beforehand "
        f"all keep their targets with a probability of at least 1 - k x {delta:g}; one that was planned after "
        "results on the same documents were seen promises nothing. About speed nothing is promised."
    )


def _nothing(config: CalibrationConfig, choice: Choice) -> str:
    stored = "The stored thresholds are 1.0: no token leaves early, so that every token is the final exit's."
    target, delta = config.target_agreement, config.delta
    if not choice.points or choice.kept:
        return (
            f"No thresholds make decoding faster than full depth at an agreement of {target:g}, by the prices of "
            f"passes. {stored} Tune the exits further, give them smaller heads, or ask for less."
        )
    if not config.guarantee:
        return (
            f"{POINT_ESTIMATE}: no thresholds that beat full depth agree at {target:g} on this text. {stored}"
        )
    return (
        f"No thresholds could be certified for an agreement of {target:g} at delta={delta:g}: no point of "
        f"the path passed its test. {stored} Tune the exits further, or try a lower target_agreement or more "
        "documents: others than these, as what was seen of them must not choose what is tested on them."
    )


def described(data: CalibrationTextConfig) -> str:
    """The text, in words."""
    if data.chats_file is not None:
        return f"answers in the chats of {Path(data.chats_file).name}"
    name = Path(str(data.prefix)).name
    if data.prompt_tokens is not None:
        return f"what the model says at full depth after the first {data.prompt_tokens} tokens of documents of {name}"
    return f"documents of {name}"


def percent(share: float) -> str:
    """As text has it."""
    return f"{100 * share:.4g} %"
