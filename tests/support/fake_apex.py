# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""An Apex for the import system: the names that NeMo and megatron-core import of it, and nothing behind them."""

import textwrap
from pathlib import Path

FAKE_APEX = {
    "amp_C": """
        multi_tensor_scale = None
        def multi_tensor_l2norm(*arguments): return arguments
    """,
    "apex": "",
    "apex.contrib": "",
    "apex.contrib.nccl_allocator": "",
    "apex.contrib.optimizers": "",
    "apex.contrib.optimizers.distributed_fused_adam": """
        _disable_pre_forward_hook = _multi_tensor_copy = None
        class DistributedFusedAdam: ParameterFragment = ParameterBucket = None
    """,
    "apex.multi_tensor_apply": "def multi_tensor_applier(operation, *rest): return operation('chunk', *rest)",
    "apex.normalization": "class MixedFusedRMSNorm: pass",
    "apex.normalization.fused_layer_norm": "class FusedLayerNorm: pass\nclass MixedFusedLayerNorm: pass",
    "apex.optimizers": "class FusedAdam: pass\nclass FusedLAMB: pass\nclass FusedSGD: pass",
    "apex.transformer": "",
    "apex.transformer.enums": "class AttnMaskType: padding, causal = 1, 2",
    "apex.transformer.layers": "",
    "apex.transformer.layers.layer_norm": "class FastLayerNorm: pass\nclass MixedFusedLayerNorm: pass",
    "apex.transformer.pipeline_parallel": "",
    "apex.transformer.pipeline_parallel.schedules": "",
    "apex.transformer.pipeline_parallel.schedules.common": "def listify_model(model): return model",
    "apex.transformer.tensor_parallel": "",
    "apex.transformer.tensor_parallel.layers": (
        "def set_defaults_if_not_set_tensor_model_parallel_attributes(tensor): pass"
    ),
}
"""What is imported of Apex on the way of a GPT, by module."""


def write_apex(directory: Path, transformer_engine: bool = False, **changes: str) -> str:
    """Writes `FAKE_APEX`, some modules changed, to a directory; returns the code that makes it importable.

    NeMo's wrapper of Apex's distributed optimizer asks which release of Transformer Engine is installed; of that
    there is the name on request, and nothing to import.
    """
    for name, source in {**FAKE_APEX, **changes}.items():
        package = any(other.startswith(f"{name}.") for other in FAKE_APEX)
        path = directory / (name.replace(".", "/") + ("/__init__.py" if package else ".py"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))
    if transformer_engine:
        (directory / "transformer_engine-0.9.dist-info").mkdir()
        metadata = "Metadata-Version: 2.1\nName: transformer-engine\nVersion: 0.9\n"
        (directory / "transformer_engine-0.9.dist-info" / "METADATA").write_text(metadata)
    return f"import sys; sys.path.insert(0, {str(directory)!r})\n"
