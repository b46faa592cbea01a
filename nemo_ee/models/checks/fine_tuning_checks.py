# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Checks of fine-tuning data: of what `model.data.train_ds` and `validation_ds` say, and of the files' lines."""

import re
from collections.abc import Iterator, Mapping

from omegaconf import DictConfig, ListConfig

from nemo_ee.data.chats.chat_template import messages_of
from nemo_ee.data.chats.json_lines import JsonLines
from nemo_ee.data.data_config import PREFIX_KEY
from nemo_ee.errors import ConfigError, DataError, Fault
from nemo_ee.models.checks.key_rules import KeyRule

SECTIONS = ("train_ds", "validation_ds")
FILES_KEY = "model.data.train_ds.file_names"
READ = frozenset(
    "file_names concat_sampling_probabilities global_batch_size micro_batch_size shuffle seed num_workers pin_memory "
    "max_seq_length drop_last label_key truncation_field truncation_method prompt_template add_bos add_eos add_sep "
    "pad_to_max_length".split()
)
"""Keys of the sections that are used; the rules below are of others that NeMo knows."""

_PACKED = (
    "NeMo keeps the samples of a packed sequence apart by Transformer Engine's attention alone; without it they would "
    "read one another"
)
_NO_INDEX = "lines are found without index files"
_NO_TEXT = "NeMo writes answers with it while it validates; here losses and agreement are measured"
SECTION_RULES = (
    KeyRule("packed_sequence", False, _PACKED),
    KeyRule("packed_sequence_return_cu_seqlen", None, _PACKED),
    KeyRule("pack_metadata_file_path", None, _PACKED),
    KeyRule("hf_dataset", False, "files are read line by line"),
    KeyRule("memmap_workers", None, _NO_INDEX),
    KeyRule("index_mapping_dir", None, _NO_INDEX),
    KeyRule("global_sample_mapping", False, "each file is shuffled anew in every epoch"),
    KeyRule("min_seq_length", 1, "NeMo's datasets never read it: no line would be dropped"),
    KeyRule("ceil_to_power_2", False, "is for recurrent models"),
    KeyRule("tokens_to_generate", 0, _NO_TEXT),
    KeyRule("write_predictions_to_file", False, _NO_TEXT),
    KeyRule("output_file_path_prefix", None, _NO_TEXT),
    KeyRule(
        "metric",
        None,
        _NO_TEXT,
        also=({"name": "loss"}, {"name": "loss", "average": None, "num_classes": None}),
    ),
    KeyRule("names", None, "all files are validated together"),
)

NO_CHOICE_OF_CHATS = {
    "add_bos": False,
    "add_sep": False,
    "add_eos": True,
    "prompt_template": "{input} {output}",
    "label_key": "output",
    "truncation_field": "input",
    "truncation_method": "right",
}
"""Keys that are read of prompts with answers alone, and the values that they have with chats, or null."""


def _as_override(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f'"{value}"'


def file_names(data: Mapping | None, section: str) -> list[str]:
    """The files of `train_ds` or `validation_ds`; none without that section."""
    names = ((data or {}).get(section) or {}).get("file_names")
    return [names] if isinstance(names, str) else list(names or ())


def is_fine_tuning(data: Mapping | None) -> bool:
    """Whether a `model.data` section names files for fine-tuning to train on."""
    return bool(file_names(data, "train_ds"))


def fine_tuning_faults(cfg: DictConfig) -> Iterator[Fault]:
    """What is wrong with the choice between text and fine-tuning data, and with the sections of the latter.

    Args:
        cfg: model configuration.
    """
    data = cfg.get("data")
    if data is None:
        return
    text = data.get("data_prefix") is not None
    if not is_fine_tuning(data):
        if not text and "data_prefix" in data and data.get("data_impl") != "mock":
            remedy = f"set {PREFIX_KEY}=… (indexed text), or {FILES_KEY}=[chats.jsonl]"
            yield Fault(PREFIX_KEY, data.get("data_prefix"), "there is nothing to train on", remedy)
        if file_names(data, "validation_ds"):
            rule = "is read beside training files alone"
            yield Fault(
                "model.data.validation_ds.file_names",
                file_names(data, "validation_ds"),
                rule,
                f"set {FILES_KEY}, or the validation part of {PREFIX_KEY}",
            )
        return
    if text:
        rule = f"text and fine-tuning data ({PREFIX_KEY}={data.data_prefix}) exclude one another"
        yield Fault(
            FILES_KEY,
            file_names(data, "train_ds"),
            rule,
            f"leave one of the two out, or set {PREFIX_KEY}=null",
        )
    if file_names(data, "test_ds"):
        names = file_names(data, "test_ds")
        remedy = "validate on them, or set ++model.data.test_ds=null"
        yield Fault("model.data.test_ds.file_names", names, "no script of ours tests", remedy)
    chat = data.get("chat", False)
    if not chat and data.get("chat_prompt_tokens") is not None:
        yield Fault(
            "model.data.chat_prompt_tokens",
            "…",
            "marks turns of chats",
            "set model.data.chat=true, or model.data.chat_prompt_tokens=null",
        )
    for section in SECTIONS:
        if file_names(data, section):
            yield from _section_faults(cfg, section, bool(chat))


def _section_faults(cfg: DictConfig, section: str, chat: bool) -> Iterator[Fault]:
    values, key = cfg.data[section], f"model.data.{section}"
    for rule in SECTION_RULES:
        yield from rule.faults(values, key)
    for name in values.keys() - READ - {rule.key for rule in SECTION_RULES}:
        yield Fault(f"{key}.{name}", values[name], "is not read", "leave it out; conf/ lists all keys")
    for name in ("global_batch_size", "micro_batch_size"):
        if (size := values.get(name)) is not None and size != cfg.get(name):
            rule = f"differs from model.{name}={cfg.get(name)}: batches have one size"
            yield Fault(f"{key}.{name}", size, rule, f"set model.{name}={size} instead")
    yield from _length_faults(cfg, values, key)
    names, weights = values.file_names, values.get("concat_sampling_probabilities")
    if isinstance(names, str):
        yield Fault(f"{key}.file_names", names, "must be a list", f"write [{names}]")
    if weights is not None and (section != "train_ds" or not _are_weights(weights, len(names))):
        rule = "must have one number above 0 for each file to train on"
        yield Fault(
            f"{key}.concat_sampling_probabilities",
            weights,
            rule,
            f"set {key}.concat_sampling_probabilities=null: by numbers of lines",
        )
    if section == "train_ds" and not values.get("drop_last", True):
        yield Fault(
            f"{key}.drop_last",
            False,
            "files repeat until the last step: no batch is short",
            f"set {key}.drop_last=true",
        )
    if section != "train_ds" and values.get("shuffle", False):
        yield Fault(
            f"{key}.shuffle", True, "all samples are read, in whatever order", f"set {key}.shuffle=false"
        )
    if chat:
        for name, use in NO_CHOICE_OF_CHATS.items():
            value = values.get(name)
            if value is not None and value != use:
                rule = "chats have what their template gives them, and lose their end where they are too long"
                yield Fault(f"{key}.{name}", value, rule, f"set '++{key}.{name}={_as_override(use)}'")
        return
    if values.get("truncation_method", "right") not in ("left", "right"):
        yield Fault(
            f"{key}.truncation_method", values.truncation_method, "must be a side", "use left or right"
        )
    yield from _template_faults(values, key)


def _length_faults(cfg: DictConfig, values: DictConfig, key: str) -> Iterator[Fault]:
    length, limit = values.get("max_seq_length"), cfg.encoder_seq_length
    if not isinstance(length, int) or length < 1:
        yield Fault(f"{key}.max_seq_length", length, "must be a number of tokens", f"use 1 to {limit}")
        return
    if length > limit:
        rule = f"exceeds the backbone's model.encoder_seq_length={limit}"
        yield Fault(f"{key}.max_seq_length", length, rule, f"use at most {limit}")
    tp = cfg.get("tensor_model_parallel_size", 1)
    if cfg.get("sequence_parallel", False) and length % tp:
        rule = f"sequence parallelism splits it over tensor_model_parallel_size={tp}"
        yield Fault(f"{key}.max_seq_length", length, rule, f"use a multiple of {tp}")


def _template_faults(values: DictConfig, key: str) -> Iterator[Fault]:
    template, label = values.get("prompt_template"), values.get("label_key")
    names = re.findall(r"{(.*?)}", template or "")
    if not names or not template.endswith(f"{{{label}}}"):
        rule = f"must end with the answer, {{{label}}} (label_key)"
        yield Fault(f"{key}.prompt_template", template, rule, f"write e.g. '{{input}} {{{label}}}'")
        return
    fields = (values.get("truncation_field") or "").split(",")
    if fields != [""] and set(fields) - set(names):
        rule = f"must be of the prompt template's {names}"
        yield Fault(f"{key}.truncation_field", values.truncation_field, rule, f"use e.g. {names[0]}, or null")


def _are_weights(weights: object, count: int) -> bool:
    numbers = isinstance(weights, ListConfig | list) and len(weights) == count
    return numbers and all(isinstance(weight, int | float) and weight > 0 for weight in weights)


def check_lines(data: DictConfig) -> None:
    """Checks the form of every line of all files, without a tokenizer. Reads files only; call it on one rank.

    Raises:
        DataError: a file is missing or empty, or a line is no JSON or has not the keys that it must have; the first
            fault of every file.
    """
    faults = []
    for section in SECTIONS:
        for name in file_names(data, section):
            try:
                _check_file(data, data[section], name)
            except DataError as error:
                faults.append(f"model.data.{section}.file_names={name}: {error}")
    if faults:
        raise DataError("\n".join(faults))


def _check_file(data: DictConfig, section: DictConfig, name: str) -> None:
    lines = JsonLines(name)
    wanted = re.findall(r"{(.*?)}", section.get("prompt_template") or "")
    for index in range(len(lines)):
        line = lines[index]
        try:
            if data.get("chat", False) and data.get("chat_prompt_tokens") is None:
                messages_of(line)
            elif data.get("chat", False):
                if not isinstance(line.get("conversations"), list) or not line["conversations"]:
                    raise ValueError("has no list of turns in 'conversations'")
            else:
                _check_texts(line, wanted)
        except ValueError as error:
            raise DataError(f"{lines.where(index)} {error}") from error


def _check_texts(line: dict, wanted: list[str]) -> None:
    for key in wanted:
        if not isinstance(line.get(key), str):
            chat = {"messages", "conversations"} & line.keys()
            hint = "it is a chat: set model.data.chat=true" if chat else "change model.data.….prompt_template"
            raise ValueError(f"has no text {key!r}, which the prompt template names; {hint}")


def require(condition: object, key: str, value: object, rule: str, remedy: str) -> None:
    """Raises ConfigError of one fault unless `condition` holds."""
    if not condition:
        raise ConfigError(Fault(key, value, rule, remedy))
