"""A model and real text that are small enough for seconds on a CPU: what the examples of integrations train."""

import data
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LENGTH = 160
PAD, END = "<pad>", "<end>"


def llama() -> LlamaForCausalLM:
    """Random weights, one token per byte."""
    torch.manual_seed(0)
    sizes = {"vocab_size": data.BYTE_VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=256))


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: a byte-level BPE without merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: number for number, letter in enumerate([*letters, PAD, END])}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token=PAD, eos_token=END)


def pairs(count: int = 24) -> list[data.Pair]:
    """(first line of a docstring, the code) of functions in Python's own library."""
    sources, _ = data.library_files()
    return data.library_pairs(sources[:40], data.byte_tokens(), LENGTH)[:count]


def encoded(count: int = 24) -> list[data.Batch]:
    """Those pairs as token ids [LENGTH], prompts without labels."""
    batch = data.encode(pairs(count), data.byte_tokens(), LENGTH)
    return [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]


def prompts(count: int = 24) -> Dataset:
    """Those pairs as columns ``prompt`` and ``completion``."""
    return Dataset.from_list([{"prompt": prompt, "completion": code} for prompt, code in pairs(count)])


def preferences(count: int = 24) -> Dataset:
    """Those pairs with the next function's code as the worse answer."""
    every = pairs(count)
    worse = [code for _, code in every[1:] + every[:1]]
    return Dataset.from_list(
        [{"prompt": p, "chosen": code, "rejected": other} for (p, code), other in zip(every, worse, strict=True)]
    )
