# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What Apex would provide, wherever it is absent, with a GPU or without.

NeMo's GPT path needs Apex in name only. Every module tries its own ``import apex`` and goes on without; here the
names that it then lacks, and uses all the same, are supplied. Whether Apex is there is thus never guessed: a name
that the module has after its import stays as it is, and one of an Apex that is installed but broken is as missing
to NeMo, and so here, as one that is not installed.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

from nemo_ee.runtime.patching import MEGATRON, NEMO, Patch

CHUNK_ELEMENTS = 2048 * 32
"""Elements that one block of a multi-tensor kernel of Apex works on; passed on, and ignored by torch's."""


def _from(module: str, name: str) -> Callable[[Any], Any]:
    """The original, or else a stand-in found in another module, imported when the patch is applied."""
    return lambda original: original or getattr(importlib.import_module(module), name)


def _no_class(original):
    return original or type("Never", (), {})  # NeMo only asks whether an optimizer is one


def _listify_model(original):
    return original or (lambda model: model if isinstance(model, list) else [model])


def _apply_multi_tensor(original):
    return original or (lambda operation, *arguments: operation(CHUNK_ELEMENTS, *arguments))


def multi_tensor_l2norm(chunk_size: int, overflow_buffer, tensor_lists: list, per_tensor: bool):
    """The 2-norm of all tensors of the one list, shape [1], and those of each, or None.

    Computed in float32 at least, whatever the tensors are in, on any device, and nothing on the host waits for
    it. In float32 as Apex's, since ranks without gradients send a norm of that type. `chunk_size` and
    `overflow_buffer` are those of ``amp_C.multi_tensor_l2norm``, which does not write the latter either.
    """
    import torch

    (tensors,) = tensor_lists
    dtype = functools.reduce(torch.promote_types, {tensor.dtype for tensor in tensors}, torch.float32)
    norms = torch.stack(torch._foreach_norm(tensors, 2, dtype=dtype))
    return torch.linalg.vector_norm(norms).float().reshape(1), (norms.float() if per_tensor else None)


class MultiTensor:
    """The part of Apex's ``amp_C`` that NeMo's gradient clipping uses."""

    multi_tensor_l2norm = staticmethod(multi_tensor_l2norm)


def _norm_without_waits(original):
    return multi_tensor_l2norm if original.__module__ == "megatron.core.utils" else original


_COMMON = "nemo.collections.nlp.modules.common.megatron"
_OVERRIDES = "nemo.collections.nlp.parts.nlp_overrides"
_APEX_IMPORT = "imported from Apex, used without asking whether the import worked"

PATCHES: tuple[Patch, ...] = (
    # The flags guard ordinary torch code in NLPDDPStrategy and in the O2 optimizer.
    Patch(_OVERRIDES, "HAVE_APEX", NEMO, "strategies refuse to start", lambda _: True),
    Patch(
        "nemo.core.optim.optimizer_with_main_params", "HAVE_APEX", NEMO, "O2 refuses to start", lambda _: True
    ),
    Patch(
        f"{_COMMON}.build_model",
        "set_defaults_if_not_set_tensor_model_parallel_attributes",
        NEMO,
        _APEX_IMPORT,
        _from(
            "megatron.core.tensor_parallel.layers",
            "set_defaults_if_not_set_tensor_model_parallel_attributes",
        ),
        missing=True,
    ),
    Patch(
        _OVERRIDES,
        "McoreDistributedOptimizer",
        NEMO,
        _APEX_IMPORT,
        _from("nemo.core.optim.mcore_optim", "McoreDistributedOptimizer"),
        missing=True,
    ),
    Patch(_OVERRIDES, "MegatronDistributedFusedAdam", NEMO, _APEX_IMPORT, _no_class, missing=True),
    Patch(f"{_COMMON}.utils", "listify_model", NEMO, _APEX_IMPORT, _listify_model, missing=True),
    *(
        Patch(f"{_COMMON}.utils", name, NEMO, _APEX_IMPORT, _from("torch.nn", norm), missing=True)
        for name, norm in (
            ("FusedLayerNorm", "LayerNorm"),
            ("FastLayerNorm", "LayerNorm"),
            ("MixedFusedRMSNorm", "RMSNorm"),
        )
    ),
    Patch(
        f"{_COMMON}.clip_grads", "multi_tensor_applier", NEMO, _APEX_IMPORT, _apply_multi_tensor, missing=True
    ),
    Patch(
        f"{_COMMON}.clip_grads",
        "amp_C",
        NEMO,
        _APEX_IMPORT,
        lambda original: original or MultiTensor,
        missing=True,
    ),
    # Nothing is missing here: megatron-core has functions of its own for where Apex and Transformer Engine are not.
    Patch(
        "megatron.core.optimizer.clip_grads",
        "l2_norm_impl",
        MEGATRON,
        "megatron-core's own waits for the device once for every tensor",
        _norm_without_waits,
    ),
)
"""Nine names and two flags of NeMo's, and a function of megatron-core's."""
