# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""`generate` of the early-exit model."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from nemo.collections.nlp.modules.common.text_generation_strategy import TextGenerationStrategy
from nemo.collections.nlp.modules.common.text_generation_utils import (
    get_default_length_params,
    get_default_sampling_params,
)
from nemo.utils import logging
from nemo.utils.nemo_logging import LogMode

from nemo_ee.decoding.cpu.lean_weights import WEIGHT_KINDS
from nemo_ee.decoding.cpu.output_search import OUTPUT_LAYERS
from nemo_ee.decoding.cuda.captured_decoding import captured_decoding
from nemo_ee.decoding.decoding_model import DecodingModel
from nemo_ee.decoding.measured_prices import prices_for
from nemo_ee.decoding.pipeline.channel import PipelineGroups
from nemo_ee.decoding.request import EXITS_ARE_OFF
from nemo_ee.errors import ConfigError, Fault
from nemo_ee.generation.generate import generate, stream
from nemo_ee.generation.generating import (
    USUAL_LENGTH,
    check_model_can_generate,
    generating,
    position_limit,
)
from nemo_ee.generation.inference_config import generate_arguments, in_own_keys
from nemo_ee.generation.strategy import EarlyExitTextGenerationStrategy
from nemo_ee.generation.stream import StreamedText
from nemo_ee.generation.text import TextTokenizer
from nemo_ee.runtime.upstream.microbatches import kept_microbatches
from nemo_ee.schema import one_of


class GenerationMixin:
    """Generation with early exits, through NeMo's own signature. Mix it in before `MegatronGPTModel`."""

    _looked_for_untuned_exits = _said_exits_are_off = False
    _decoding_model: DecodingModel | None = None
    _pipeline_groups: PipelineGroups | None = None
    _text_tokenizer: TextTokenizer | None = None

    @property
    def text_tokenizer(self) -> TextTokenizer:
        """The tokenizer with the model's rules for texts: how they begin, and the tokens that end them."""
        if self._text_tokenizer is None or self._text_tokenizer.nemo is not self.tokenizer:
            self._text_tokenizer = TextTokenizer(self.tokenizer, self.cfg.get("tokenizer"))
        if (rows := getattr(self, "true_vocab_size", None)) is not None:  # known once the tokenizer is
            self._text_tokenizer.vocab_size = rows
        return self._text_tokenizer

    def generate(
        self,
        inputs: Any,
        length_params: Mapping | None = None,
        sampling_params: Mapping | None = None,
        *,
        strategy: TextGenerationStrategy | None = None,
        early_exit: Mapping | bool | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Any]:
        """Generates text.

        Without a strategy, our own loop: each sequence continues right behind its own prompt, leaves its
        layers at the first exit that is sure enough, where asking it pays; with `always` its tokens do not depend
        on the other prompts of the batch. With a strategy, NeMo's loop (`megatron_gpt_generate`).

        Args:
            inputs: a list of texts, or of lists of token ids; a pair of tensors, token ids [B, S] and lengths [B]; or
                chats (see `nemo_ee.generation.prompts.tokenize_prompts`).
            length_params: `max_length` and `min_length`, counted in generated tokens.
            sampling_params: NeMo's, any subset (see `nemo_ee.decoding.request.SamplingOptions`).
            strategy: generate with NeMo's loop and this strategy, e.g.
                `EarlyExitTextGenerationStrategy(model)`, or `GPTModelTextGenerationStrategy(model)` for full
                depth on any pipeline.
            early_exit: any of the fields of `nemo_ee.decoding.request.ExitOptions`: `threshold` (a number, or
                one per exit in use), `exits` (layers in use), `max_pending`, `lossless`, `always`, `confidence`,
                `kv_policy`; False for full depth. Defaults are those of `model.early_exit.inference`. The same
                mapping may come as `sampling_params["early_exit"]`.
            generator: source of randomness for sampling on the model's device; the same seed gives the same
                tokens, as exits are then asked for every one (unless `early_exit` says `always=False`).

        Returns:
            NeMo's `OutputType` (`sentences`, `tokens`, `logprob`, `full_logprob`, `token_ids`, `offsets`), `logprobs`
            and `prompt_logprobs` if `sampling_params` ask for them (per sentence and token `token_id`, `logprob`,
            `top_token_ids`, `top_logprobs`; None for a prompt's first token),
            `finish_reason` (per sentence "stop" or "length") and `early_exit`: per sentence `{"exit_layers": [int],
            "confidences": [float]}` of its generated tokens (`num_layers` stands for the final exit), and
            `layers_run` (passes of one token through one layer), `drafts` and `accepted` (of lossless decoding).
            `pass_prices`: what passes cost, by which exits are asked, in milliseconds by number of tokens; None over
            several pipeline stages.

        Raises:
            ConfigError: parameters that break a rule.
            GenerationError: a model or prompts that cannot be served, e.g. a prompt beyond the position
                limit.
        """
        if strategy is None:
            self.start_distributed()
            if early_exit is not False:
                self.warn_of_untuned_exits()
                if early_exit is None and not (sampling_params or {}).get("early_exit"):
                    self.say_if_exits_are_off()
            return generate(self, inputs, length_params, sampling_params, early_exit, generator)
        ignored = {
            "early_exit": early_exit,
            'sampling_params["early_exit"]': (sampling_params or {}).get("early_exit"),
            "generator": generator,
            **{
                f'sampling_params["{name}"]': (sampling_params or {}).get(name)
                for name in ("logprobs", "prompt_logprobs")
            },
        }
        ignored = {name: value for name, value in ignored.items() if value is not None}
        if ignored:
            remedy = (
                "give exits to EarlyExitTextGenerationStrategy; NeMo's loop has torch's generator, and "
                "log-probabilities by all_probs and compute_logprob"
            )
            rule = "has no effect with a strategy"
            raise ConfigError(*(Fault(name, value, rule, remedy) for name, value in ignored.items()))
        lengths = {**get_default_length_params(), **(length_params or {})}
        sampling = {**get_default_sampling_params(), "add_BOS": None, **(sampling_params or {})}
        given = inputs
        if isinstance(strategy, EarlyExitTextGenerationStrategy):
            self.warn_of_untuned_exits()
            inputs = strategy.prepare(inputs, lengths, sampling)
        if sampling["add_BOS"] is None:  # NeMo's own strategy knows yes and no
            sampling["add_BOS"] = bool(self.text_tokenizer.before())
        try:
            with kept_microbatches():
                output = super().generate(inputs, lengths, sampling, strategy=strategy)  # type: ignore[misc]
            texts = isinstance(given, list | tuple) and isinstance(given[0], str)
            if output is not None and sampling["compute_logprob"] and texts:  # NeMo's loop has seen token ids
                output["sentences"] = list(given)
            return output
        finally:
            if isinstance(strategy, EarlyExitTextGenerationStrategy):
                strategy.forget()

    def stream(
        self,
        inputs: Any,
        length_params: Mapping | None = None,
        sampling_params: Mapping | None = None,
        *,
        early_exit: Mapping | bool | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[StreamedText]:
        """`generate`, as an iterator over what each step adds to each of the texts.

        Between its steps the model may be used for other things, but its weights must stay; several tensor-parallel
        processes iterate alike. An iterator that is not used up gives back what it holds when it is closed or gone.

        Args:
            inputs: as for `generate`, as are the others.
            length_params: likewise.
            sampling_params: likewise; log-probabilities but `logprobs` are refused.
            early_exit: likewise.
            generator: likewise.

        Raises:
            ConfigError, GenerationError: as `generate`; before the first step.
        """
        self.start_distributed()
        if early_exit is not False:
            self.warn_of_untuned_exits()
            if early_exit is None and not (sampling_params or {}).get("early_exit"):
                self.say_if_exits_are_off()
        return stream(self, inputs, length_params, sampling_params, early_exit, generator)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int | None = None) -> dict | None:
        """A batch of `trainer.predict`, generated by our engine with what `set_inference_config` was given.

        Args:
            batch: as `inputs` of `generate`.
            batch_idx: unused, as is `dataloader_idx`.
            dataloader_idx: of several.

        Returns:
            What `generate` returns; with `compute_logprob` of the prompts, `full_logprob` included, as NeMo's does.
            None without an inference configuration, as NeMo's.

        Raises:
            ConfigError, GenerationError: as `generate`.
        """
        section = self.get_inference_config()  # type: ignore[attr-defined]
        if section is None:
            return None
        arguments = generate_arguments(section)
        if arguments["sampling_params"].get("compute_logprob"):
            arguments["sampling_params"]["all_probs"] = True
        if isinstance(batch, list) and len(batch) == 2 and all(isinstance(x, torch.Tensor) for x in batch):
            batch = tuple(batch)  # as a DataLoader collates pairs
        try:
            return self.generate(batch, **arguments)
        except ConfigError as error:
            raise in_own_keys(error, "inference_config") from error

    def prepare_decoding(
        self,
        weights: str = "native",
        cuda_graphs: bool = True,
        rows: int = 16,
        max_length: int | None = None,
        prices_file: str | None = None,
        output_layer: str = "exact8",
    ) -> None:
        """Reads the weights for decoding once, for all calls of `generate` until `release_decoding`.

        Otherwise every call reads them: at once where they have the dtype that is computed in, as copies where
        not, and all calls decode without CUDA graphs. Weights that change in between (training, loading) need
        another call. On a CPU, exits prepared here are asked and draft with 8-bit copies of their heads' weights, so
        that confidences differ a little from those of heads that are not prepared (docs/decoding.md). What passes cost
        is measured, in under a second: by that exits are asked only where it pays (see
        `nemo_ee.decoding.policy.exit_policy`). Otherwise it is assumed, by the bytes of weights.

        Args:
            weights: `native`; `bf16`, rounded to bfloat16 and computed in float32, which changes nothing where a
                checkpoint's numbers are bfloat16's (CPU); or `int8`, 8-bit integers with a scale per output
                feature, at a small loss of quality (CPU). Decoding waits for weights to be read, so that half
                and a quarter of float32's bytes are faster.
            cuda_graphs: on a GPU, launch what is repeated as CUDA graphs (see
                `nemo_ee.decoding.cuda.segment_graphs`); no effect elsewhere.
            rows: sequences that decode together, at most. Graphs hold the addresses of their caches, so caches of
                `rows` x `max_length` positions are reserved here, where graphs are used. Larger calls get caches of
                their own and decode without graphs, after a warning. No effect without graphs.
            max_length: positions of a sequence, prompt and generated tokens, at most; None for the model's limit, or
                2048 if that is lower.
            prices_file: a JSON file with what passes cost: read if it is there, else written; null measures each time.
                With the same file a model decodes alike on any machine.
            output_layer: `exact8` finds greedy tokens of full depth with an 8-bit copy of the output layer, and lets
                the layer itself say what that does not prove: the same tokens, at a quarter of its bytes. Confidences
                of such tokens are by the copy, approximate. It is for passes of at most 8 tokens of models with RMSNorm
                or no norm before the output layer, on one tensor-parallel rank, through our CPU kernels, and not for
                `weights="int8"`; all else, and all that asks for probabilities, is computed as with `full`: by the
                whole layer.

        Raises:
            ConfigError: a file of other prices; unknown weights or output layer; `rows` below 1; `max_length` below 1
                or beyond the model's positions.
            NotImplementedError: weights that this model or device cannot have.
        """
        check_model_can_generate(self)
        limit = position_limit(self.cfg)
        _check_preparation(weights, output_layer, rows, max_length, limit)
        self.start_distributed()
        self.release_decoding()  # before memory is taken again
        with generating(self):
            decoding = self._read_weights(weights, eight_bit_heads=True, output_layer=output_layer)
            if cuda_graphs:
                decoding.captured = captured_decoding(decoding, rows, max_length or min(limit, USUAL_LENGTH))
            if decoding.is_whole and decoding.heads:
                decoding.prices = prices_for(decoding, prices_file)
            self._decoding_model = decoding

    def release_decoding(self) -> None:
        """Forgets what `prepare_decoding` has read."""
        self._decoding_model = None

    def decoding_model(self) -> DecodingModel:
        """What `prepare_decoding` has read, or the weights as they are now. Call it under `generating`."""
        return self._read_weights() if self._decoding_model is None else self._decoding_model

    def _read_weights(self, *kind: Any, **more: Any) -> DecodingModel:
        if next(self.gpt.parameters()).device.type == "cpu":
            logging.info(
                "CPU kernels for decoding: a machine's first run compiles them (half a minute); later ones do not",
                mode=LogMode.ONCE,
            )
        decoding = DecodingModel(self.gpt, *kind, **more)
        for cause in decoding.refused_attention:
            logging.warning(f"decoding uses {decoding.attention.name}: {cause}", mode=LogMode.ONCE)
        return decoding

    def pipeline_groups(self) -> PipelineGroups:
        """Groups for decoding over pipeline stages. The first call is collective over all ranks of the job."""
        if self._pipeline_groups is None:
            self._pipeline_groups = PipelineGroups.make()
        return self._pipeline_groups

    def say_if_exits_are_off(self) -> None:
        """Says once how to get thresholds, if the model has exits and no threshold for them."""
        if not self._said_exits_are_off and self.early_exit.inference.known_threshold is None:
            logging.warning(EXITS_ARE_OFF)
        self._said_exits_are_off = True

    def warn_of_untuned_exits(self) -> None:
        """Warns once of exits whose own projection is all zeros; only the first call looks."""
        if self._looked_for_untuned_exits:
            return
        self._looked_for_untuned_exits = True
        weights = {n: head.projection.weight for n, head in self.gpt.exits.items()}
        untuned = ", ".join(n for n, weight in weights.items() if weight is not None and not weight.any())
        if untuned:
            logging.warning(
                f"model.early_exit: exits {untuned} have projections of zeros and will not be used: they came "
                "neither with the checkpoint nor from tuning. Tune them (scripts/megatron_gpt_ee_tuning.py) "
                "or load tuned ones (restore_with_exits, adapter_file)"
            )


def _check_preparation(
    weights: str, output_layer: str, rows: int, max_length: int | None, limit: int
) -> None:
    faults = []
    if weights not in WEIGHT_KINDS:
        faults.append(one_of("weights", weights, WEIGHT_KINDS))
    if output_layer not in OUTPUT_LAYERS:
        faults.append(one_of("output_layer", output_layer, OUTPUT_LAYERS))
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        faults.append(Fault("rows", rows, "must be a whole number of at least 1", "set rows=16"))
    if max_length is not None and (
        isinstance(max_length, bool) or not isinstance(max_length, int) or not 1 <= max_length <= limit
    ):
        rule = f"must be a whole number from 1 to the model's {limit} positions"
        faults.append(Fault("max_length", max_length, rule, f"set max_length={limit}"))
    if faults:
        raise ConfigError(*faults)
