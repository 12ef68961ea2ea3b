"""Write real pairs and a small model without weights, to try `tokenseek finetune` without a network:

    python examples/pairs.py out/pairs
    tokenseek finetune out/pairs/model out/pairs/pairs.jsonl --random-weights

The pairs are signature -> docstring from Python's standard library. The tokenizer is trained on them; the model is a
Llama with about 4 million parameters. Pass your own model and data instead.
"""

import argparse
import ast
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from data import library_files
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

END, PAD = "<|end|>", "<|pad|>"
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def pairs_of(source: str) -> Iterator[dict[str, str]]:
    """The signature and docstring of each documented function of a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
            signature = f"def {node.name}({ast.unparse(node.args)}):"
            yield {"prompt": f"{signature}\n", "completion": f'    """{text}"""\n'}


def pairs(count: int) -> list[dict[str, str]]:
    """`count` different pairs, shuffled."""
    files, _ = library_files(held_out=0)
    found = {pair["prompt"] + pair["completion"]: pair for source in files for pair in pairs_of(source)}
    chosen = list(found.values())
    random.Random(0).shuffle(chosen)
    return chosen[:count]


def tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with `size` tokens and a chat template."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [END, PAD, "<|system|>", "<|user|>", "<|assistant|>"]
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    out = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END, pad_token=PAD)
    out.chat_template = CHAT
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the directory to write to")
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=6)
    options = parser.parse_args()
    found = pairs(options.pairs)
    tokens = tokenizer([pair["prompt"] + pair["completion"] for pair in found], options.vocabulary)
    sizes = {"hidden_size": options.width, "intermediate_size": 3 * options.width, "num_hidden_layers": options.layers}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    options.out.mkdir(parents=True, exist_ok=True)
    LlamaConfig(vocab_size=len(tokens), **sizes, **heads, tie_word_embeddings=True).save_pretrained(
        options.out / "model"
    )
    tokens.save_pretrained(options.out / "model")
    (options.out / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in found), encoding="utf-8")
    print(f"{len(found)} pairs in {options.out}/pairs.jsonl, a model without weights in {options.out}/model")
    return 0


if __name__ == "__main__":
    sys.exit(main())
