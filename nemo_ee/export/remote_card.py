# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The model card of a folder with exits and their code."""

from typing import Any

from nemo_ee.export.card import written
from nemo_ee.export.measured import measured
from nemo_ee.export.settings import ExportConfig
from nemo_ee.export.source import Source
from nemo_ee.report.schema import Report

RULES = ("max_probability", "entropy", "margin")
"""Of confidence, that the folder's code has."""
_TEXT = """---
library_name: transformers
pipeline_tag: text-generation
---
# {name} with its exits

The model of `{name}`, {depth} layers, and its exits behind the layers {layers}, of `{exits}`, with the code that runs
them in transformers ({module}.py). {tokens} tokens, weights in {dtype}. Written by nemo_ee, which it does not need.

## Run it

transformers 4.51 or later; `trust_remote_code=True` runs the Python files of this folder, and it does not load without:
read them.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({quoted}, trust_remote_code=True)  # transformers 5 asks for it
model = AutoModelForCausalLM.from_pretrained({quoted}, trust_remote_code=True, torch_dtype="auto")
ids = tokenizer("Once upon a time", return_tensors="pt")

{lossless}# Not lossless: each token leaves at the first exit that is sure enough.
out = model.generate(**ids, early_exit={options}, max_new_tokens=40)
print(tokenizer.decode(out[0]))
```

From transformers 4.52 on, `custom_generate={quoted}, trust_remote_code=True` in `generate` does the same.

## What it computes

- Without `assistant_early_exit` and `early_exit`: the base, bit for bit. Exits are not computed.
- `assistant_early_exit=n`, with n of {drafts}: texts are the base's own, greedy ones token by token, sampled ones in
  distribution. A draft is the exit's own most probable token. Where the exit knows a shortlist of tokens, the
  probability of all others is shared evenly among them, so that transformers' `assistant_confidence_threshold` (0.4)
  judges the exit's own confidence.
- `early_exit={{"threshold": t}}`: one number, or one per exit, within [0, 1]. A token leaves at the first exit whose
  confidence is strictly above its threshold; 1.0 never leaves. {thresholds} `exits` names those in use; `confidence` is
  `max_probability`, `entropy` or `margin`. Keys and values of layers that were left out are computed later, so nothing
  else is approximate. Exits are asked for every token, as `always` has it in nemo_ee, and by their own logits: before
  repetition penalties and other logits processors.
- One text at a time, without beams.

Whether exits save time depends on the machine, the model's size and the texts: measure it. What is saved is layers;
transformers' own time for a step stays. In float32 texts with exits are those of nemo_ee with the same thresholds; in
half precision two programs round differently.

It is for transformers alone. vLLM, SGLang and llama.cpp run no exits, and do not know this architecture: give them the
base (`kind=base`) and a draft (`kind=draft`).

{measured}"""
_HELD = "that exits say here what they say there"

_LOSSLESS = """# Lossless: an exit drafts, the whole model verifies.
out = model.generate(**ids, assistant_early_exit={draft}, do_sample=False, max_new_tokens=40)

"""


def remote_card(
    config: ExportConfig, source: Source, settings: Any, module: str, report: Report | None
) -> str:
    """Of the model with its exits and their code.

    Args:
        config: the settings of the export.
        source: what was exported.
        settings: the transformers configuration.
        module: name of the code's file.
        report: of an evaluation, see `read_measured`.
    """
    early_exit, depth = source.early_exit, settings.num_hidden_layers
    drafting = [n for n in early_exit.layers if n < depth]
    known, rule = early_exit.inference.known_threshold, early_exit.inference.confidence
    options = "True"
    if rule not in RULES:
        options = f'{{"threshold": 0.9, "confidence": "{RULES[0]}"}}'
        said = (
            f"confidence={rule} of the checkpoint is not in this folder: give `threshold` and `confidence`."
        )
    elif known is None:
        options = '{"threshold": 0.9}'
        said = (
            "Nobody has chosen thresholds for these exits; calibration does (docs/calibration.md of nemo_ee)."
        )
    else:
        said = f"`early_exit=True` takes those of the checkpoint, {known if isinstance(known, float) else list(known)}."
    return _TEXT.format(
        name=source.name,
        exits=source.exits_name,
        depth=depth,
        layers=", ".join(map(str, early_exit.layers)),
        drafts=", ".join(map(str, drafting)) or "none: no exit lies below the last layer",
        lossless=_LOSSLESS.format(draft=drafting[-1]) if drafting else "",
        options=options,
        thresholds=said,
        tokens=settings.vocab_size,
        dtype=str(settings.torch_dtype).removeprefix("torch."),
        quoted=written(config)["quoted"],
        module=module,
        measured=measured(report, _HELD),
    )
