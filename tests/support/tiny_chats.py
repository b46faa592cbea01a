# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Tiny random chat models as others publish them, as Hugging Face directories, and SentencePiece model files."""

import json
from pathlib import Path
from typing import Any

from tests.support import tiny_llama

CORPUS = [
    "the cat sat on the mat and the dog ran after the cat",
    "what does an early exit do? it saves layers for easy tokens.",
    "user and assistant talk; the model answers, and then it ends.",
] * 4
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>"]
QWEN_ADDED = ["<tool_call>", "</tool_call>"]
"""Added, but not special: they have text."""


def qwen_tokenizer(tools: bool = True) -> Any:
    """Byte-level, without BOS; EOS is `<|im_end|>`, and more tokens are special by their flag alone."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    core.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in QWEN_SPECIAL])
    core.add_tokens([AddedToken(name, special=False, normalized=False) for name in QWEN_ADDED * tools])
    names = dict(eos_token="<|im_end|>", pad_token="<|endoftext|>")
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=CHATML, **names)


def save_qwen(directory: Path, ends: list[int] | None = None, rows: int = 320, seed: int = 0) -> Path:
    """A Qwen2 whose `generation_config.json` ends texts at several ids, and which has rows to spare.

    Args:
        directory: created if missing.
        ends: ids; by default those of `<|im_end|>` and `<|endoftext|>`.
        rows: of the embedding.
        seed: of the weights.
    """
    from transformers import Qwen2Config

    tokenizer = qwen_tokenizer()
    tokenizer.save_pretrained(directory)
    _save_model(directory, Qwen2Config, seed, vocab_size=rows, eos_token_id=tokenizer.eos_token_id)
    ends = ends or tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    Path(directory, "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return Path(directory)


def llama_tokenizer(directory: Path) -> Any:
    """Llama's kind: a SentencePiece model's pieces in a tokenizer.json, and BOS before every text."""
    import sentencepiece
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import LlamaTokenizerFast
    from transformers.convert_slow_tokenizer import generate_merges

    file = str(train_sentencepiece(directory, "bpe"))
    pieces = sentencepiece.SentencePieceProcessor(model_file=file)
    names = [pieces.id_to_piece(i) for i in range(pieces.get_piece_size())]
    vocabulary = {name: i for i, name in enumerate(names)}
    merges = generate_merges(vocabulary, {name: pieces.get_score(i) for i, name in enumerate(names)})
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    words = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(words)
    tokenizer = LlamaTokenizerFast(tokenizer_object=core, add_bos_token=True, add_eos_token=False)
    tokenizer.chat_template = MISTRAL
    return tokenizer


def save_mistral(directory: Path, seed: int = 0) -> Path:
    """A Mistral with `llama_tokenizer`, which hardly says bytes: in broken characters a stream is no whole."""
    from transformers import MistralConfig

    tokenizer = llama_tokenizer(directory)
    Path(directory, "sp.model").unlink()
    tokenizer.save_pretrained(directory)
    quiet = slice(*tokenizer.convert_tokens_to_ids(["<0x00>", "<0xFF>"]))
    _save_model(directory, MistralConfig, seed, quiet, vocab_size=len(tokenizer))
    return Path(directory)


def _save_model(directory: Path, kind: type, seed: int, quiet: slice = slice(0), **changes: Any) -> None:
    settings = tiny_llama.config(max_position_embeddings=128).to_dict()
    for key in ("model_type", "architectures", "attention_bias", "mlp_bias"):
        settings.pop(key, None)
    window = {"use_sliding_window": False} if "Qwen" in kind.__name__ else {"sliding_window": None}
    network = tiny_llama.model(kind(**{**settings, **window, **changes}), seed)
    network.get_input_embeddings().weight.data[quiet] *= 0.01
    network.save_pretrained(directory)


def train_sentencepiece(directory: Path, kind: str, name: str = "sp.model", **settings: Any) -> Path:
    """A SentencePiece model file of about 300 pieces with all bytes.

    Args:
        directory: created if missing.
        kind: `bpe` or `unigram`.
        name: of the file.
        **settings: of sentencepiece's trainer.
    """
    import io

    import sentencepiece

    buffer = io.BytesIO()
    defaults = dict(
        vocab_size=330,
        byte_fallback=True,
        character_coverage=1.0,
        hard_vocab_limit=False,
        minloglevel=2,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=buffer, model_type=kind, **{**defaults, **settings}
    )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_bytes(buffer.getvalue())
    return directory / name


LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
LLAMA3_SPECIAL = ["begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eom_id", "eot_id"]
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def llama31_tokenizer() -> Any:
    """Byte-level with Llama 3's rule of words, BOS before every text, and three tokens that end one."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(ignore_merges=True))
    words = pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    names = [f"<|{name}|>" for name in LLAMA3_SPECIAL]
    core.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    bos = names[0]
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=bos,
        eos_token="<|eot_id|>",
        chat_template=LLAMA3,
        clean_up_tokenization_spaces=False,
    )


def save_llama31(directory: Path, seed: int = 0, quantization: str = "F32") -> Path:
    """A Llama with Llama 3.1's tokenizer and scaled positions; beside it the same model as `directory.gguf`."""
    from tests.support import tiny_gguf

    tokenizer = llama31_tokenizer()
    tokenizer.save_pretrained(directory)
    ends = tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"])
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    settings = tiny_llama.config(
        vocab_size=len(tokenizer),
        max_position_embeddings=128,
        rope_scaling=scaling,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends,
        pad_token_id=None,
    )
    network = tiny_llama.model(settings, seed)
    network.save_pretrained(directory)
    names = [tokenizer.convert_ids_to_tokens(token) for token in range(len(tokenizer))]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    prefix = tiny_gguf.PREFIX
    vocabulary = {
        f"{prefix}model": "gpt2",
        f"{prefix}pre": "llama-bpe",
        f"{prefix}tokens": names,
        f"{prefix}token_type": [3 if token >= ends[0] - 1 else 1 for token in range(len(names))],
        f"{prefix}merges": [" ".join(pair) for pair in merges],
        f"{prefix}bos_token_id": tokenizer.bos_token_id,
        f"{prefix}eos_token_id": tokenizer.eos_token_id,
        "tokenizer.chat_template": LLAMA3,
    }
    tiny_gguf.write(Path(f"{directory}.gguf"), network, vocabulary, quantization=quantization)
    return Path(directory)
