# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Run by a Python without this package: loads exported folders and prints, as JSON, the texts that they give.

python other_transformers.py FOLDER, which holds `asked.json` and what `tests.support.remote_folder` exports.
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: Path) -> dict:
    """What `asked.json` asks for, by name."""
    assert importlib.util.find_spec("nemo_ee") is None
    asked = json.loads((folder / "asked.json").read_text())
    ids = torch.tensor([asked["prompt"]])
    shared = dict(do_sample=False, max_new_tokens=asked["steps"], attention_mask=torch.ones_like(ids))

    def text(model, **options) -> list:
        return model.generate(ids, **shared, **options)[0, ids.shape[1] :].tolist()

    base = AutoModelForCausalLM.from_pretrained(folder / "llama_base", torch_dtype="auto").eval()
    remote = AutoModelForCausalLM.from_pretrained(folder / "llama_remote", trust_remote_code=True).eval()
    drafts = {
        n: AutoModelForCausalLM.from_pretrained(folder / f"llama_draft{n}").eval() for n in asked["drafts"]
    }
    left = remote.generate(ids, early_exit=asked["early_exit"], return_dict_in_generate=True, **shared)
    tokenizer = AutoTokenizer.from_pretrained(folder / "llama_remote", trust_remote_code=True)
    found = {
        "version": transformers.__version__,
        "ids": tokenizer(asked["words"]).input_ids,
        "base": text(base),
        "remote": text(remote),
        "drafts": {n: text(base, assistant_model=draft) for n, draft in drafts.items()},
        "exits": {n: text(remote, assistant_early_exit=n) for n in asked["exits"]},
        "left": [left.sequences[0, ids.shape[1] :].tolist(), left.exit_layers],
    }
    if tuple(map(int, transformers.__version__.split(".")[:2])) >= (4, 52):
        options = dict(custom_generate=str(folder / "llama_remote"), trust_remote_code=True)
        found["custom"] = text(remote, early_exit=asked["early_exit"], **options)
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
