# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Model cards: what a folder is, how it is run, what it approximates, what was measured."""

from typing import Any

from nemo_ee.export.settings import ExportConfig
from nemo_ee.export.source import Source


def base_card(config: ExportConfig, source: Source, settings: Any) -> str:
    """Of the base at full depth."""
    name = config.output_path
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {source.name} as {settings.architectures[0]}

The model of `{source.name}` at full depth, without exits, written by nemo_ee. {settings.num_hidden_layers} layers, hidden size
{settings.hidden_size}, {settings.vocab_size} tokens, weights in {str(settings.torch_dtype).removeprefix("torch.")}.

It is exact: the weights are those of the checkpoint, bit for bit where the dtype is the same.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
ids = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=40)[0]))
```

```bash
vllm serve {name}
python -m sglang.launch_server --model-path {name}
python convert_hf_to_gguf.py {name} --outfile model.gguf && llama-cli -m model.gguf -p "Once upon a time"
```
"""


def remote_card(config: ExportConfig, source: Source, settings: Any) -> str:
    """Of the model with its exits and their code."""
    return "TODO"
