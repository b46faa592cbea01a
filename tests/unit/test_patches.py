# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Other packages are changed in runtime/ alone, and what it changes is there, as it was when that was written."""

import ast
import inspect
import io
import textwrap
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
OWN = {"self", "cls", "sequence"}
"""Variables that hold objects of this package."""


def changes(source: str) -> list[str]:
    """Statements that set or delete attributes, or items of attributes, of what other packages made.

    Seen are those of imported names, private ones of whatever is not `OWN`, and calls that can set any.
    """
    tree, foreign, found = ast.parse(source), set[str](), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            foreign |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
            found += [ast.unparse(node) for alias in node.names if alias.name == "unittest.mock"]
        elif isinstance(node, ast.ImportFrom) and not f"{node.module}.".startswith("nemo_ee."):
            foreign |= {alias.asname or alias.name for alias in node.names}
            found += [ast.unparse(node)] * (node.module == "unittest.mock")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "setattr",
            "delattr",
            "object.__setattr__",
        ):
            found += [ast.unparse(node)] * (ast.unparse(node.args[0]) not in OWN)
        if not isinstance(node, ast.Attribute | ast.Subscript) or isinstance(node.ctx, ast.Load):
            continue
        target = node.value if isinstance(node, ast.Subscript) else node
        if not isinstance(target, ast.Attribute):
            continue
        root: ast.AST = target
        while isinstance(root, ast.Attribute | ast.Subscript | ast.Call):
            root = root.func if isinstance(root, ast.Call) else root.value
        name = root.id if isinstance(root, ast.Name) else ""
        private = target.attr.startswith("_") and ast.unparse(target.value) not in OWN
        if ast.unparse(target) != "os.environ" and (name in foreign or private):
            found.append(ast.unparse(node))
    return found


def test_nothing_is_changed_outside_runtime():
    for path in sorted((*(ROOT / "nemo_ee").rglob("*.py"), *(ROOT / "scripts").rglob("*.py"))):
        place = path.relative_to(ROOT).as_posix()
        if not place.startswith("nemo_ee/runtime/") and place != "nemo_ee/data/chats/template_process.py":
            assert changes(path.read_text()) == [], place


def test_the_process_that_renders_templates_changes_its_own_path_alone():
    assert changes((ROOT / "nemo_ee/data/chats/template_process.py").read_text()) == ["sys.path[:]"]


@pytest.mark.parametrize(
    "statement",
    [
        "torch.zeros = None",
        "torch.Tensor.to += 1",
        "del Adam.step",
        "torch.backends.cudnn.flags['a'] = 1",
        "block._checkpointed_forward = None",
        "self.decoder._forward, x = None, 1",
        "for self.optimizer._state in []: pass",
        "with open('') as part._pad_token_id: pass",
        "setattr(torch.Tensor, 'to', None)",
        "setattr(config, name, None)",
        "model.__dict__['forward'] = None",
        "module()._queue = None",
        "from unittest.mock import patch",
        "import unittest.mock",
    ],
)
def test_changes_are_seen(statement):
    harmless = "import torch\nfrom torch.optim import Adam\nfrom nemo_ee.config import parsed\n"
    harmless += (
        "self._x = parsed.y = config.size = model.parts[0] = 1\nx = torch.zeros\nos.environ['a'] = ''\n"
    )
    assert changes(harmless) == []
    assert len(changes(harmless + statement)) == 1


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def read_of_self(function) -> set[str]:
    """Attributes of `self` that a method names."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return {node.attr for node in attributes if ast.unparse(node.value) == "self"}


class TestUpstream:
    """What fails here with a new release of a package would fail, or silently change, for users."""

    def test_megatrons_recomputation_reads_of_a_block_what_a_piece_has(self):
        from megatron.core.transformer.transformer_block import TransformerBlock

        assert read_of_self(TransformerBlock._checkpointed_forward) == {
            "config",
            "num_layers_per_pipeline_rank",
            "_get_layer",
        }
        tree = ast.parse(textwrap.dedent(inspect.getsource(TransformerBlock.forward)))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        (call,) = (node for node in calls if ast.unparse(node.func) == "self._checkpointed_forward")
        given = [keyword.arg for keyword in call.keywords]
        assert not call.args and ["self", *given] == parameters(TransformerBlock._checkpointed_forward)
        assert given[0] == "hidden_states"

    def test_megatrons_datasets_mask_what_is_set_as_padding(self):
        from megatron.core.datasets import gpt_dataset

        assert {"_pad_token_id", "masks_and_position_ids_are_cacheable"} <= read_of_self(
            gpt_dataset.GPTDataset.__getitem__
        )
        from nemo_ee.runtime.upstream.padding import PADDING

        assert gpt_dataset._PAD_TOKEN_ID == PADDING

    def test_megatrons_calculator_is_put_back(self):
        from megatron.core import num_microbatches_calculator as megatron

        from nemo_ee.runtime.upstream.microbatches import kept_microbatches

        sizes = dict(rank=0, rampup_batch_size=None, micro_batch_size=1, data_parallel_size=1)
        with kept_microbatches():
            megatron.reconfigure_num_microbatches_calculator(global_batch_size=3, **sizes)
            with kept_microbatches():
                megatron.reconfigure_num_microbatches_calculator(global_batch_size=5, **sizes)
                assert megatron.get_num_microbatches() == 5
            assert megatron.get_num_microbatches() == 3

    def test_sequence_parallelism_has_its_switches(self):
        from megatron.core.tensor_parallel import (
            ColumnParallelLinear,
            RowParallelLinear,
            VocabParallelEmbedding,
        )
        from megatron.core.transformer.transformer_config import TransformerConfig

        from nemo_ee.runtime.upstream.sequence_parallel import SWITCHES

        assert SWITCHES == ("sequence_parallel", "reduce_scatter_embeddings")
        assert "sequence_parallel" in TransformerConfig.__dataclass_fields__
        for layer in (ColumnParallelLinear, RowParallelLinear):
            assert "sequence_parallel" in read_of_self(layer.forward)
        assert "reduce_scatter_embeddings" in read_of_self(VocabParallelEmbedding.forward)

    def test_megatrons_writers_take_the_queue_that_is_there(self):
        from megatron.core.dist_checkpointing.strategies import filesystem_async

        from nemo_ee.runtime.children import writing_checkpoint

        before = filesystem_async._results_queue
        with writing_checkpoint():
            queue = filesystem_async._get_write_results_queue()
            queue.put("a")
            assert queue is filesystem_async._results_queue is not before and queue.get_nowait() == "a"
        assert filesystem_async._results_queue is before
        source = inspect.getsource(filesystem_async)
        assert source.count("results_queue.put(") and source.count("results_queue.get_nowait()")

    def test_torchs_scaler_asks_optimizers(self):
        from nemo_ee.runtime.upstream.gradient_scaling import unscale_before_step

        fused = torch.optim.Adam([torch.nn.Parameter(torch.ones(1))], fused=True)
        assert fused._step_supports_amp_scaling is True
        unscale_before_step(fused)
        scaler, asked = torch.amp.GradScaler("cpu", init_scale=4.0), []
        scaler.scale(fused.param_groups[0]["params"][0].sum()).backward()
        fused.step = lambda *args, **kwargs: asked.append(
            (kwargs, fused.param_groups[0]["params"][0].grad.item())
        )
        scaler.step(fused)
        assert asked == [({}, 1.0)]

    def test_torchs_restricted_unpickler_has_one_list(self):
        from nemo_ee.runtime.upstream.unpickling import _get_allowed_globals, refuse_bytearrays

        refuse_bytearrays()
        assert _get_allowed_globals() is _get_allowed_globals()
        file = io.BytesIO()
        torch.save({"x": bytearray(b"x")}, file)
        file.seek(0)
        with pytest.raises(Exception, match="bytearray"):
            torch.load(file, weights_only=True)

    def test_torchs_stores_can_be_connected_to_once_more(self):
        from torch.distributed import Store, distributed_c10d

        assert parameters(distributed_c10d._get_default_store) == []
        assert hasattr(Store, "clone") or hasattr(Store, "_underlying_non_prefix_store")

    def test_torchs_graphs_are_replayed_by_one_method(self):
        from nemo_ee.runtime.upstream.cuda_graphs import counted_replays

        assert parameters(torch.cuda.CUDAGraph.replay) == ["self"]
        replay = torch.cuda.CUDAGraph.replay
        with counted_replays():
            assert torch.cuda.CUDAGraph.replay is not replay
        assert torch.cuda.CUDAGraph.replay is replay

    def test_numba_compares_stamps_of_sources(self):
        from numba.core.caching import IndexDataCacheFile

        from nemo_ee.decoding.cpu.kernels.compiled import SOURCES, compiled

        assert "_source_stamp" in read_of_self(IndexDataCacheFile._load_index)
        assert "_source_stamp" in read_of_self(IndexDataCacheFile._save_index)
        assert compiled(twice)._cache._cache_file._source_stamp == SOURCES

    def test_nemo_builds_and_writes_tokenizers_in_methods_of_its_base_model(self):
        from nemo.utils.app_state import AppState

        from nemo_ee.runtime.upstream import archived_tokenizer

        named = {patch.target.rpartition(".")[2] for patch in archived_tokenizer.PATCHES}
        module = __import__(archived_tokenizer._MODULE, fromlist=["MegatronBaseModel"])
        found = {name: parameters(getattr(module.MegatronBaseModel, name)) for name in named}
        assert found == {"_build_tokenizer": ["self"], "to_config_file": ["self", "path2yaml_file"]}
        state = {"model_restore_path", "is_model_being_restored", "nemo_file_folder"}
        assert state <= set(dir(AppState))

    def test_nemos_legacy_mode_names_special_pieces_by_attributes(self):
        from nemo.collections.common.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

        made = read_of_self(SentencePieceTokenizer.__init__)
        assert {"legacy", "id_to_special_token", "tokenizer"} <= made
        for name in ("bos", "eos", "pad"):
            assert f"{name}_token" in read_of_self(getattr(SentencePieceTokenizer, f"{name}_id").fget)

    def test_nemos_log_has_filters(self):
        from nemo.utils import logging

        assert parameters(logging._logger.addFilter) == ["filter"]

    def test_lightnings_loops_say_whether_they_restart(self):
        from lightning.pytorch.loops.loop import _Loop

        assert _Loop.restarting.fset is not None


def twice(x):
    return x + x
