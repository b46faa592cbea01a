# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Model cards: what a folder is, how it is run in each engine, what it approximates, what was measured."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_ee.export.measured import NOT_RUN, measured
from nemo_ee.export.settings import ExportConfig
from nemo_ee.export.source import Source
from nemo_ee.report.schema import Report

if TYPE_CHECKING:
    from nemo_ee.export.draft import Draft

_HEAD = """---
library_name: transformers
pipeline_tag: text-generation
---
"""
_RUN_BASE = """## Run it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({quoted})
model = AutoModelForCausalLM.from_pretrained({quoted}, torch_dtype="auto")
ids = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=40)[0]))
```

llama.cpp (`convert_hf_to_gguf.py` is in its repository), vLLM, SGLang:

```bash
python convert_hf_to_gguf.py {word} --outfile base.gguf --outtype {gguf}
llama-cli -m base.gguf -p "Once upon a time"
vllm serve {word}
python -m sglang.launch_server --model-path {word}
```
"""
_RUN_DRAFT = """## Run it

`BASE` is the folder of the base, exported with `kind=base`.

transformers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("BASE")
base = AutoModelForCausalLM.from_pretrained("BASE", torch_dtype="auto")
draft = AutoModelForCausalLM.from_pretrained({quoted}, torch_dtype="auto")
ids = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(base.generate(**ids, assistant_model=draft, do_sample=False, max_new_tokens=40)[0]))
```
"""
_RUN_DRAFT_IN = {
    "vllm": """
vLLM, which runs the draft in the base's dtype{not_float16}. It takes a draft whose path has `eagle-`, `eagle3`,
`dflash` or `dspark` in it for one of another method:

```bash
vllm serve BASE --dtype bfloat16 \\
    --speculative-config {vllm}
```
""",
    "llama.cpp": """
llama.cpp (`convert_hf_to_gguf.py` is in its repository){not_f16}:

```bash
python convert_hf_to_gguf.py BASE --outfile base.gguf --outtype {gguf}
python convert_hf_to_gguf.py {word} --outfile draft.gguf --outtype {gguf}
llama-server -m base.gguf -md draft.gguf --spec-type draft-simple  # which older builds do not know, and do unasked
```
""",
    "sglang": """
SGLang:

```bash
python -m sglang.launch_server --model-path BASE --speculative-algorithm STANDALONE \\
    --speculative-draft-model-path {word} --speculative-num-steps 3 --speculative-eagle-topk 1 \\
    --speculative-num-draft-tokens 4
```
""",
}
_HELD_BASE = "that a base which came from Hugging Face goes back bit for bit"
_HELD_DRAFT = "each kind of draft to the logits of its exit"
_EQUAL = "Texts are the base's own whatever the draft says: greedy ones token by token, sampled ones in distribution."


def base_card(config: ExportConfig, source: Source, settings: Any) -> str:
    """Of the base at full depth.

    Args:
        config: the settings of the export.
        source: what was exported.
        settings: the transformers configuration.
    """
    return f"""{_HEAD}# {source.name} as {settings.architectures[0]}

The model of `{source.name}` at full depth, without exits, written by nemo_ee. {_sizes(settings)}

It is exact: the weights are those of the checkpoint, bit for bit where they keep their dtype.

{_RUN_BASE.format(**written(config), gguf=_gguf(settings))}
{measured(None, _HELD_BASE, engines=NOT_RUN)}"""


def draft_card(
    config: ExportConfig, source: Source, settings: Any, draft: "Draft", report: Report | None
) -> str:
    """Of an exit as a draft model.

    Args:
        config: the settings of the export.
        source: what was exported.
        settings: the transformers configuration.
        draft: the model.
        report: of an evaluation, see `read_measured`.
    """
    names = {
        **written(config),
        "gguf": _gguf(settings),
        "not_float16": ", which must not be float16" if draft.folded else "",
        "not_f16": ", but not in f16, which has no numbers of this size" if draft.folded else "",
    }
    runs = "".join(text.format(**names) for key, text in _RUN_DRAFT_IN.items() if key in config.engines)
    title = f"{source.name}'s exit behind layer {draft.layer} as a draft model"
    return f"""{_HEAD}# {title}

The first {draft.layer} of {source.model.num_layers} layers of `{source.name}` and the exit behind them,
of `{source.exits_name}`, as a model of its own that drafts for the base. {_sizes(settings)} Written by nemo_ee.

## What it computes

{chr(10).join(f"- {line}" for line in approximations(draft, source.model.ffn_hidden_size))}

{_EQUAL} Whether drafts pay depends on the machine, the base's size and the texts: measure it.

{_RUN_DRAFT.format(**names)}{runs}
{measured(report, _HELD_DRAFT, draft.layer, NOT_RUN)}"""


def written(config: ExportConfig) -> dict[str, str]:
    """A folder's name as a text of Python, as a word of a shell, and in vLLM's option."""
    name = Path(config.output_path).name
    option = {"method": "draft_model", "model": name, "num_speculative_tokens": 3}
    quoted = json.dumps(name, ensure_ascii=False)
    return {
        "quoted": quoted,
        "word": shlex.quote(name),
        "vllm": shlex.quote(json.dumps(option, ensure_ascii=False)),
    }


def approximations(draft: "Draft", ffn: int) -> list[str]:
    """In words, how a draft's predictions are those of its exit.

    Args:
        draft: the model.
        ffn: width of the base's MLPs.
    """
    of_which = " among its shortlist's tokens" if draft.head.projection == "shortlist" else ""
    lines = []
    if draft.scaled:
        lines.append(
            f"The most probable token{of_which} is the exit's own. Logits{of_which} are the exit's but for one "
            "positive factor per token: states have one size, so that confidences are others at single tokens."
        )
    else:
        lines.append(f"Logits{of_which} are the exit's own.")
    if draft.folded:
        lines.append(
            "The exit's translator is one more layer whose MLP has biases (nemo_ee/export/fold.py), exact up to "
            "rounding in float32 and bfloat16. In float16 it is not."
        )
    if draft.units > ffn:
        more = f"{draft.units - ffn} units of zeros more in each of the other layers' MLPs"
        lines.append(
            f"That layer needs {draft.units} units, and a Llama has one width: {more}, which cost time."
        )
    if draft.head.projection == "shortlist":
        lines.append(
            f"Approximate: the exit has rows for {draft.head.shortlist_size} tokens and one for all others, which no "
            "engine knows. Its rows are written over the base's output layer, whose other rows stay: among the "
            "exit's tokens the order is the exit's, and the others compete with them by the base's rows."
        )
    return lines


def _sizes(settings: Any) -> str:
    dtype = str(settings.torch_dtype).removeprefix("torch.")
    return (
        f"{settings.num_hidden_layers} layers, hidden size {settings.hidden_size}, {settings.vocab_size} tokens, "
        f"weights in {dtype}."
    )


def _gguf(settings: Any) -> str:
    return {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[
        str(settings.torch_dtype).removeprefix("torch.")
    ]
