# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""`model.early_exit.head`: the modules of exits, one mapping for all of them or a list with one for each."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from nemo_ee.errors import Fault
from nemo_ee.schema import choice


@dataclass(frozen=True)
class HeadConfig:
    """What stands between an exit layer's hidden state and its logits, in the order in which it is applied.

    Attributes:
        block: a full transformer layer (attention and MLP) of the backbone's kind, with its own KV cache.
        mlp: an MLP of the backbone's kind with a norm of its own. `residual`: a step before `norm`, x + MLP(x), of
            heads without a translator; `beside`: added to the translator's output; or `none`. Before there were
            these words, true meant that of the two which the head can have, false none; both are still read.
        norm: a norm of the backbone's kind, with its own gain.
        linear: a linear translator [H] -> [H] with bias. The closed-form (`ridge`) initialisation fits it.
        projection: to the vocabulary: `tied` shares the backbone's output weight, `untied` has its own,
            `shortlist` has rows for the `shortlist_size` most frequent tokens of the tuning text and one
            bucket for all others.
        shortlist_size: tokens kept by a `shortlist` projection.
        train_projection: tune the projection's weight. A tied projection belongs to the backbone: never.
    """

    block: bool = False
    mlp: Annotated[str, choice("none", "residual", "beside")] = "beside"
    norm: bool = True
    linear: bool = True
    projection: Annotated[str, choice("tied", "untied", "shortlist")] = "shortlist"
    shortlist_size: int = 8192
    train_projection: bool = False

    def has_weights_of(self, other: "HeadConfig") -> bool:
        """Whether both heads have the same weights, in the same shapes, and do the same with them."""
        mine, theirs = (dataclasses.replace(head, train_projection=False) for head in (self, other))
        if self.projection == other.projection != "shortlist":
            mine, theirs = (dataclasses.replace(head, shortlist_size=0) for head in (mine, theirs))
        return mine == theirs


def heads_in_words(head: Any) -> Any:
    """`early_exit.head` with `mlp` in the words of today, where it is left out or a truth value: how files of before
    say it."""
    if isinstance(head, list | tuple):
        return [heads_in_words(each) for each in head]
    head = {} if head is None else head
    if not isinstance(head, Mapping) or not isinstance(mlp := head.get("mlp", True), bool):
        return head
    kind = "beside" if head.get("linear", True) else "residual"
    return {**head, "mlp": kind if mlp else "none"}


def head_faults(
    head: HeadConfig | tuple[HeadConfig, ...],
    layers: Sequence[int],
    init: str,
    vocab_size: int | None,
    key: str,
) -> list[Fault]:
    """What is wrong with heads whose values have their types.

    Args:
        head: of all exits, or of each.
        layers: of the exits.
        init: where their first weights come from.
        vocab_size: see `parse_early_exit`.
        key: dotted name of the section.
    """
    if not isinstance(head, tuple):
        return _one_heads_faults(head, init, vocab_size, key, "head")
    if len(head) != len(layers):
        rule = f"{len(head)} heads for {len(layers)} exit layers"
        remedy = "give one per exit layer, or one mapping for all"
        return [Fault(f"{key}.head", [vars(each) for each in head], rule, remedy)]
    every = (_one_heads_faults(each, init, vocab_size, key, f"head[{i}]") for i, each in enumerate(head))
    return [fault for faults in every for fault in faults]


def _one_heads_faults(
    head: HeadConfig, init: str, vocab_size: int | None, key: str, entry: str
) -> list[Fault]:
    name, option = f"{key}.{entry}", entry.replace("[", ".").replace("]", "")  # as a command line has it
    faults = []
    if head.mlp == "beside" and not head.linear:
        rule = "it would stand beside the linear translator, which this head lacks"
        remedy = f"set ++{key}.{option}.mlp=residual, or ++{key}.{option}.linear=true"
        faults.append(Fault(f"{name}.mlp", head.mlp, rule, remedy))
    elif head.mlp == "residual" and head.linear:
        rule = "with a linear translator an MLP stands beside that"
        remedy = f"set ++{key}.{option}.mlp=beside, or ++{key}.{option}.linear=false"
        faults.append(Fault(f"{name}.mlp", head.mlp, rule, remedy))
    if head.projection == "tied" and head.train_projection:
        rule = "a tied projection is the backbone's, which stays frozen"
        faults.append(Fault(f"{name}.train_projection", True, rule, "use projection=untied, or false"))
    if head.shortlist_size < 1 or (
        vocab_size and head.projection == "shortlist" and head.shortlist_size > vocab_size
    ):
        rule = f"must lie within 1..{vocab_size or 'the vocabulary size'}"
        remedy = f"use e.g. {min(8192, vocab_size or 8192)}, or set {key}.{option}.projection=tied"
        faults.append(Fault(f"{name}.shortlist_size", head.shortlist_size, rule, remedy))
    if init == "ridge" and not head.linear:
        rule = "ridge fits the linear translator, which this head lacks"
        faults.append(Fault(f"{key}.init", "ridge", rule, f"set {option}.linear=true, or init=copy"))
    return faults
