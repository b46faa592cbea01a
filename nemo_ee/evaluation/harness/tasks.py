# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Tasks for the harness that need no hub, made of files in PyPI packages.

`boolq_local` and `gsm8k_local` ask, filter and score as the installed harness's own tasks of BoolQ and GSM8K do. What
they read is another choice of examples, so compare their scores with each other and not with published ones.
"""

import gzip
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
import yaml

from nemo_ee.data.text_file import parsed, read_text_lines
from nemo_ee.errors import DataError
from nemo_ee.evaluation.harness import task_functions
from nemo_ee.files.output import write_text
from nemo_ee.preprocessing.fetch import KNOWN_FILES, fetch_package_file

Records = list[dict[str, Any]]
FEW_SHOT = 100
"""Of GSM8K's questions the last ones, which are only shown with their answers: its training set is in no package."""


@dataclass(frozen=True)
class LocalTask:
    """A task and what it is made of.

    Attributes:
        source: name in `KNOWN_FILES`.
        suffix: of that file.
        splits: records -> split -> examples.
        question: key of an example by which `exclude_file` leaves it out; None where nothing is left out.
        harness: file below `tasks/` of the harness's own task that it takes all else from; None where there is none.
        keys: of the task file, beside those.
        score: name of the function in `task_functions` that scores; None for the metrics of `keys`.
    """

    source: str
    suffix: str
    splits: Callable[[Records], Mapping[str, Records]]
    question: str | None = None
    harness: str | None = None
    keys: Mapping[str, Any] | None = None
    score: str | None = None


def _boolq(records: Records) -> dict[str, Records]:
    labels = {"False": 0, "True": 1}
    names = ("passage", "question")
    found = [{**{k: record[k] for k in names}, "label": labels[record["answer"]]} for record in records]
    return {"validation": found}


def _gsm8k(records: Records) -> dict[str, Records]:
    return {"test": records[:-FEW_SHOT], "train": records[-FEW_SHOT:]}


def _test(records: Records) -> dict[str, Records]:
    return {"test": records}


def _means(*names: str) -> list[dict[str, Any]]:
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]


LOCAL_TASKS = {
    "boolq_local": LocalTask(
        "boolq-questions", "jsonl", _boolq, question="question", harness="super_glue/boolq/default.yaml"
    ),
    "gsm8k_local": LocalTask(
        "gsm8k-questions", "jsonl", _gsm8k, question="question", harness="gsm8k/gsm8k.yaml"
    ),
    "xsum_local": LocalTask(
        "xsum-articles",
        "jsonl",
        _test,
        keys={
            "output_type": "generate_until",
            "test_split": "test",
            "doc_to_text": "Article: {{document}}\n\nSummarize the above article in 1 sentence.\nSummary:",
            "doc_to_target": "{{summary}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 64, "do_sample": False},
            "num_fewshot": 0,
            "metric_list": _means(*task_functions.ROUGE),
            "metadata": {"version": 1.0},
        },
        score="rouge",
    ),
    "humaneval_local": LocalTask(
        "humaneval-problems",
        "jsonl.gz",
        _test,
        keys={
            "output_type": "generate_until",
            "test_split": "test",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{canonical_solution}}",
            "generation_kwargs": {
                "until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"],
                "max_gen_toks": 128,
                "do_sample": False,
            },
            "num_fewshot": 0,
            "metric_list": _means("characters"),
            "metadata": {"version": 1.0},
        },
        score="no_score",
    ),
}
"""Task -> what it is made of."""
_OTHER_EXAMPLES = ("dataset_path", "dataset_name", "tag", "task")
"""Keys of the harness's own tasks that do not hold for others."""


def write_tasks(
    directory: str | Path,
    downloads: str | Path,
    names: Collection[str] = tuple(LOCAL_TASKS),
    exclude_file: str | None = None,
) -> list[Path]:
    """Writes task files and their examples, where they are not there already.

    Args:
        directory: created if missing. Task files name their examples by absolute paths.
        downloads: where files of packages are kept.
        names: of `LOCAL_TASKS`.
        exclude_file: JSONL of chats; questions that one of their messages has are left out.

    Returns:
        The task files.

    Raises:
        DataError: a package's file could not be downloaded, or a file is damaged.
        OutputError: nothing can be written there.
    """
    directory, said = Path(directory).absolute(), "" if exclude_file is None else _said(exclude_file)
    return [_write_task(name, LOCAL_TASKS[name], directory, Path(downloads), said) for name in names]


def _write_task(name: str, task: LocalTask, directory: Path, downloads: Path, said: str) -> Path:
    source = downloads / f"{task.source}.{task.suffix}"
    fetch_package_file(KNOWN_FILES[task.source], source)
    files = {}
    try:
        splits = task.splits(_records(source))
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DataError(
            f"{source}: is not what it should be ({error!r}); delete it to fetch it again"
        ) from error
    for split, records in splits.items():
        if task.question is not None and said and split != "train":
            records = [record for record in records if _plain(record[task.question]) not in said]
        if not records:
            raise DataError(f"exclude_file: leaves no example of {name}; give another, or null")
        files[split] = directory / f"{name}_{split}.jsonl"
        _write(files[split], "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    keys = dict(task.keys or {})
    if task.harness is not None:
        own = Path(lm_eval.__file__).parent / "tasks" / task.harness
        keys |= yaml.safe_load(own.read_text(encoding="utf-8"))
        keys = {key: value for key, value in keys.items() if key not in _OTHER_EXAMPLES}
        if keys.get("training_split") not in (None, *files):
            del keys["training_split"]
    keys = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {split: str(path) for split, path in files.items()}},
        **keys,
    }
    text = yaml.safe_dump(keys, sort_keys=False, allow_unicode=True)
    if task.score is not None:
        text += f"process_results: !function {task_functions.__name__}.{task.score}\n"
    return _write(directory / f"{name}.yaml", text)


def _write(path: Path, text: str) -> Path:
    """Unless that is there already."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)
    return path


def _records(path: Path) -> Records:
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _said(path: str) -> str:
    """All that is said in chats.

    Raises:
        DataError: it cannot be read, or a line of it is no chat.
    """
    found = []
    for number, line in read_text_lines(path):
        if line.strip():
            found += _contents(parsed(line, f"{path}:{number}"), f"{path}:{number}")
    return "\n".join(map(_plain, found))


def _contents(record: Any, where: str) -> list[str]:
    """In NeMo's form of chats, or OpenAI's."""
    for name, said in (("conversations", "value"), ("messages", "content")):
        turns = record.get(name) if isinstance(record, dict) else None
        if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns):
            return [str(turn.get(said, "")) for turn in turns]
    raise DataError(f"{where}: has no conversations; give a file of chats as exclude_file, or null")


def _plain(text: str) -> str:
    """Without regard to case and blanks, and to a question mark, which BoolQ's own questions lack."""
    return " ".join(text.casefold().split()).rstrip("?").rstrip()
