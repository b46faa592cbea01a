# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""SmolLM2 through lm-evaluation-harness at full depth, ours and the harness's own `hf`, example by example.

    python -m tests.support.lm_eval_smollm2 smollm2.gguf smollm2.nemo WORK --limit 100 [--tasks gsm8k_local]

Float32 on both sides. What either side found is kept in WORK, so that a stopped run goes on; it ends with a JSON line
per task.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

TASKS = ("tokens", "texts", "boolq_local", "gsm8k_local")
"""`texts` are the summaries of XSum, scored as they are; `tokens` the tokens of 20 of them, one by one."""


def hugging_face(gguf: str, nemo: str) -> Any:
    """transformers' model of the GGUF with the tokenizer of the converted one: that of a GGUF has another EOS."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    from nemo_ee.checkpoint.tokenizer import tokenizer_from_nemo

    path = Path(gguf).absolute()
    read = AutoModelForCausalLM.from_pretrained
    network = read(path.parent, gguf_file=path.name, torch_dtype=torch.float32).eval()
    tokenizer = tokenizer_from_nemo(nemo)
    network.generation_config.eos_token_id = tokenizer.eos_token_id
    network.generation_config.bos_token_id = tokenizer.bos_token_id
    return HFLM(pretrained=network, tokenizer=tokenizer, device="cpu", batch_size=1)


def ours(nemo: str) -> Any:
    """The converted model at full depth, decoding as it is prepared to."""
    from nemo_ee.evaluation.harness.language_model import EarlyExitLM
    from nemo_ee.running.restore import restore_model
    from tests.support.tiny_gpt import tiny_trainer

    model = restore_model(nemo, None, tiny_trainer(), {"precision": 32})
    model.prepare_decoding()
    return EarlyExitLM(model, False)


def compare(gguf: str, nemo: str, work: str, limit: int, tasks: tuple[str, ...] = TASKS) -> list[dict]:
    """Per task: examples, the largest difference of log-likelihoods in nats, texts that are equal, and both scores."""
    import yaml
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from nemo_ee.evaluation.harness.tasks import write_tasks

    folder = Path(work)
    write_tasks(folder / "tasks", folder / "downloads", ["boolq_local", "gsm8k_local", "xsum_local"])
    articles = yaml.safe_load((folder / "tasks/xsum_local.yaml").read_text().partition("process_results")[0])
    rolling = {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}
    wanted = {
        "task": "texts",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "metric_list": [rolling],
    }
    wanted |= {key: articles[key] for key in ("dataset_path", "dataset_kwargs", "test_split")}
    (folder / "tasks/texts.yaml").write_text(yaml.safe_dump({**wanted, "doc_to_target": "{{summary}}"}))
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    summaries = [json.loads(line)["summary"] for line in (folder / "tasks/xsum_local_test.jsonl").open()][:20]
    found, rows, tokens = {}, [], []
    others = [task for task in tasks if task != "tokens"]
    for side, build in {"ours": lambda: ours(nemo), "hf": lambda: hugging_face(gguf, nemo)}.items():
        how = {"use_cache": str(folder / side), "limit": limit, "task_manager": manager, "bootstrap_iters": 0}
        lm = build()
        if "tokens" in tasks:
            tokens.append(_token_by_token(lm, summaries))
        if others:
            found[side] = simple_evaluate(model=lm, tasks=others, **how)
    if tokens:
        gap = max(abs(mine - theirs) for mine, theirs in zip(*tokens, strict=True))
        rows.append({"task": "tokens", "texts": len(summaries), "answers": len(tokens[0]), "gap": gap})
    return rows + [_compared(task, found["ours"], found["hf"]) for task in others]


def _token_by_token(lm: Any, texts: list[str]) -> list[float]:
    """The log-probability of each token of texts, by the harness's own call of its language models."""
    requests = []
    for text in texts:
        ids = [lm.prefix_token_id, *lm.tok_encode(text)]
        requests += [(None, ids[:i], [ids[i]]) for i in range(1, len(ids))]
    return [logprob for logprob, _ in lm._loglikelihood_tokens(requests, disable_tqdm=True)]


def _compared(task: str, mine: dict, theirs: dict) -> dict:
    pairs = list(zip(mine["samples"][task], theirs["samples"][task], strict=True))
    assert all(one["arguments"] == other["arguments"] for one, other in pairs)
    answers = [
        (a, b) for one, other in pairs for (a,), (b,) in zip(one["resps"], other["resps"], strict=True)
    ]
    scores = [{k: v for k, v in side["results"][task].items() if k != "alias"} for side in (mine, theirs)]
    result = {
        "task": task,
        "examples": len({one["doc_id"] for one, _ in pairs}),
        "ours": scores[0],
        "hf": scores[1],
    }
    if isinstance(answers[0][0], str):
        return {**result, "answers": len(answers), "equal": sum(a == b for a, b in answers)}
    numbers = [(a[0], b[0]) if isinstance(a, list | tuple) else (a, b) for a, b in answers]
    same = sum(a[1] == b[1] for a, b in answers) if isinstance(answers[0][0], list | tuple) else None
    return {
        **result,
        "answers": len(answers),
        "gap": max(abs(a - b) for a, b in numbers),
        "greedy_equal": same,
    }


def main() -> None:
    """Prints what `compare` found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("gguf", "nemo", "work"):
        parser.add_argument(name)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--tasks", nargs="*", default=list(TASKS))
    arguments = parser.parse_args()
    for row in compare(
        *(getattr(arguments, n) for n in ("gguf", "nemo", "work", "limit")), tuple(arguments.tasks)
    ):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    from nemo_ee.runtime import stand_ins

    stand_ins.enable()
    main()
