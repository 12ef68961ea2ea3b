"""A model and real text for the examples of integrations, small enough to train for seconds on a CPU."""

import data
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LENGTH = 160
PAD, END = "<pad>", "<end>"


def llama() -> LlamaForCausalLM:
    """A Llama with random weights and one token per byte."""
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
    """(first line of the docstring, code) of functions in Python's standard library."""
    sources, _ = data.library_files()
    return data.library_pairs(sources[:40], data.byte_tokens(), LENGTH)[:count]


def encoded(count: int = 24) -> list[data.Batch]:
    """The pairs as int64 tensors [LENGTH]; prompts have no labels."""
    batch = data.encode(pairs(count), data.byte_tokens(), LENGTH)
    return [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]


def prompts(count: int = 24) -> Dataset:
    """The pairs as columns ``prompt`` and ``completion``."""
    return Dataset.from_list([{"prompt": prompt, "completion": code} for prompt, code in pairs(count)])


def preferences(count: int = 24) -> Dataset:
    """The pairs, with the code of the next function as the rejected answer."""
    every = pairs(count)
    worse = [code for _, code in every[1:] + every[:1]]
    return Dataset.from_list(
        [{"prompt": p, "chosen": code, "rejected": other} for (p, code), other in zip(every, worse, strict=True)]
    )
