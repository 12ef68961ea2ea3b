"""Architectures of transformers and other libraries, called as a user would: tiny random models and labelled batches.

``ARCHITECTURES[name](tokens)`` returns a model that computes its loss, and a batch of ``B`` sequences of about
``tokens`` tokens. Sizes don't coincide, so that the reference can recognise a token axis by its size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
import zoo
from torch import Tensor, nn

B, HIDDEN, HEADS, INNER, VOCAB, CLASSES = 7, 32, 4, 112, 97, 5
Built = tuple[nn.Module, dict[str, Any]]

ARCHITECTURES: dict[str, Callable[[int], Built]] = {}
#: Architectures for which transformers has no ``scaled_dot_product_attention``, and those of other libraries.
EAGER_ONLY = {"gemma2", "gpt_oss", "gpt_neo", "gptj", "bloom", "mpt", "mamba", "mamba2"}
OTHERS = {"hand_written", "torch_encoder", "torch_transformer"}
#: Architectures whose first forward installs hooks, which Dynamo can't trace; it runs before they are compiled.
WARMED = {"segformer", "dpt"}


def forms(name: str) -> tuple[str, ...]:
    """The attention implementations of an architecture."""
    if name in OTHERS:
        return ("torch",)
    return ("eager",) if name in EAGER_ONLY or name.startswith("deberta") else ("sdpa", "eager")


def build(name: str, attn: str, tokens: int, dtype: torch.dtype = torch.float64) -> Built:
    """The model (with attention ``attn``, large weights, no dropout) and the batch, both in ``dtype``."""
    torch.manual_seed(0)
    model, batch = ARCHITECTURES[name](tokens)
    for module in model.modules():
        if hasattr(module, "set_attn_implementation") and hasattr(module, "config"):
            module.set_attn_implementation(attn)
            break
    model = zoo.with_large_weights(model).to(dtype).train()
    batch = {k: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in batch.items()}
    if name in WARMED:
        with torch.no_grad():
            model(**batch)
    return model, batch


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _ids(tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(4, VOCAB, (B, tokens), generator=torch.Generator().manual_seed(seed))


def _text(tokens: int) -> dict[str, Any]:
    ids = _ids(tokens)
    labels = ids.clone()
    labels[:, 0] = zoo.IGNORED
    return {"input_ids": ids, "labels": labels}


# -- decoders ---------------------------------------------------------------------------------------------------------


def _sizes(tokens: int) -> dict[str, Any]:
    return {
        "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": HEADS, "vocab_size": VOCAB,
        "use_cache": False, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 1,
        "max_position_embeddings": max(64, 2 * tokens),
    }  # fmt: skip


def _decoder(
    name: str, family: str, *, config: str = "", model: str = "", grouped: bool = True, **settings: Any
) -> None:
    def make(tokens: int) -> Built:
        sizes = {**_sizes(tokens), "intermediate_size": INNER, **({"num_key_value_heads": 2} if grouped else {})}
        made = getattr(transformers, config or f"{family}Config")(**{**sizes, **settings})
        return getattr(transformers, model or f"{family}ForCausalLM")(made), _text(tokens)

    ARCHITECTURES[name] = make


def _own_names(name: str, family: str, *, model: str = "", **settings: Any) -> None:
    """Add a family with its own names for the sizes; a setting may be a function of the number of tokens."""

    def make(tokens: int) -> Built:
        given = {key: value(tokens) if callable(value) else value for key, value in settings.items()}
        sizes = {"vocab_size": VOCAB, "use_cache": False, "bos_token_id": 0, "eos_token_id": 1}
        made = getattr(transformers, f"{family}Config")(**{**sizes, **given})
        return getattr(transformers, model or f"{family}ForCausalLM")(made), _text(tokens)

    ARCHITECTURES[name] = make


def _positions(tokens: int) -> int:
    return max(64, 2 * tokens)


_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_GPT = {"n_embd": HIDDEN, "n_layer": 2, "n_head": HEADS, "n_positions": _positions, "n_inner": INNER, **_NO_DROPOUT}
_SOFT_CAPPED = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 5}

_decoder("llama", "Llama")
_decoder("qwen2", "Qwen2")
_decoder("qwen3", "Qwen3", head_dim=16)
_decoder("mistral", "Mistral", sliding_window=5)
_decoder("gemma", "Gemma", head_dim=8)
_decoder("gemma2", "Gemma2", **_SOFT_CAPPED)
_decoder("gemma3_text", "Gemma3", config="Gemma3TextConfig", **_SOFT_CAPPED)
_decoder("phi", "Phi", partial_rotary_factor=0.5)
_decoder("phi3", "Phi3", pad_token_id=0)
_own_names("gpt2", "GPT2", model="GPT2LMHeadModel", **_GPT)
_own_names(
    "gpt_neo", "GPTNeo", hidden_size=HIDDEN, num_layers=2, num_heads=HEADS, attention_types=[[["global", "local"], 1]],
    window_size=5, max_position_embeddings=_positions, intermediate_size=INNER, resid_dropout=0.0, embed_dropout=0.0,
    attention_dropout=0.0,
)  # fmt: skip
_decoder("gpt_neox", "GPTNeoX", grouped=False, hidden_dropout=0.0, attention_dropout=0.0)
_own_names("gptj", "GPTJ", rotary_dim=4, **_GPT)
_decoder("opt", "OPT", grouped=False, ffn_dim=INNER, word_embed_proj_dim=HIDDEN, dropout=0.0, attention_dropout=0.0)
_own_names(
    "bloom", "Bloom", hidden_size=HIDDEN, n_layer=2, n_head=HEADS, hidden_dropout=0.0, attention_dropout=0.0
)  # fmt: skip
_FALCON = {"new_decoder_architecture": False, "hidden_dropout": 0.0, "attention_dropout": 0.0, "ffn_hidden_size": INNER}
_decoder("falcon", "Falcon", grouped=False, multi_query=True, alibi=False, **_FALCON)
_decoder("falcon_alibi", "Falcon", grouped=False, multi_query=True, alibi=True, **_FALCON)
_own_names(
    "mpt", "Mpt", d_model=HIDDEN, n_heads=HEADS, n_layers=2, expansion_ratio=2, max_seq_len=_positions, resid_pdrop=0.0,
    emb_pdrop=0.0,
)  # fmt: skip
_decoder("stablelm", "StableLm", partial_rotary_factor=0.5)
_decoder("starcoder2", "Starcoder2", residual_dropout=0.0, embedding_dropout=0.0, attention_dropout=0.0)
_decoder("olmo2", "Olmo2")
_decoder("cohere", "Cohere")
_decoder("granite", "Granite")
_decoder("glm4", "Glm4", head_dim=8, pad_token_id=0)
_decoder("smollm3", "SmolLM3", pad_token_id=0)
_decoder(
    "deepseek_v3", "DeepseekV3", num_key_value_heads=HEADS, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
    topk_group=1, moe_intermediate_size=20, first_k_dense_replace=1, kv_lora_rank=12, q_lora_rank=14,
    qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=8, n_shared_experts=1,
)  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
_decoder("mixtral", "Mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=None)
_decoder("qwen2_moe", "Qwen2Moe", shared_expert_intermediate_size=24, **_EXPERTS)
_decoder("qwen3_moe", "Qwen3Moe", head_dim=8, **_EXPERTS)
_decoder("gpt_oss", "GptOss", num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=5)
_own_names("mamba", "Mamba", hidden_size=HIDDEN, state_size=6, num_hidden_layers=2)
_own_names(
    "mamba2", "Mamba2", hidden_size=HIDDEN, state_size=6, num_hidden_layers=2, num_heads=8, head_dim=8, n_groups=1,
    chunk_size=8, expand=2,
)  # fmt: skip
_decoder(
    "jamba", "Jamba", attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
    num_experts=4, num_experts_per_tok=2, mamba_d_state=6, mamba_d_conv=4, mamba_expand=2, mamba_dt_rank=4,
    use_mamba_kernels=False, pad_token_id=0,
)  # fmt: skip
_decoder(
    "bamba", "Bamba", mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=6, mamba_chunk_size=8,
    attn_layer_indices=[1], mamba_expand=2, pad_token_id=0,
)  # fmt: skip

# -- encoders ---------------------------------------------------------------------------------------------------------

_HEADS = {"classify": "SequenceClassification", "tag": "TokenClassification", "mlm": "MaskedLM"}


def _encoder(name: str, family: str, **settings: Any) -> None:
    for head, suffix in _HEADS.items():
        ARCHITECTURES[f"{name} {head}"] = _with_head(family, head, suffix, settings)


def _with_head(family: str, head: str, suffix: str, settings: dict[str, Any]) -> Callable[[int], Built]:
    def make(tokens: int) -> Built:
        given = {key: value(tokens) if callable(value) else value for key, value in settings.items()}
        config = getattr(transformers, f"{family}Config")(vocab_size=VOCAB, **given)
        config.num_labels, config.problem_type = CLASSES, "single_label_classification"
        ids = _ids(tokens)
        mask = torch.ones_like(ids)
        mask[1, -3:] = 0
        labels = {"classify": torch.arange(B) % CLASSES, "tag": ids % CLASSES, "mlm": ids.clone()}[head]
        model = getattr(transformers, f"{family}For{suffix}")(config)
        return model, {"input_ids": ids, "attention_mask": mask, "labels": labels}

    return make


_BERT = {
    "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 2, "num_attention_heads": HEADS,
    "max_position_embeddings": _positions, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 0,
}  # fmt: skip
_encoder("bert", "Bert", **_BERT)
_encoder("roberta", "Roberta", **{**_BERT, "max_position_embeddings": lambda tokens: _positions(tokens) + 2})
_encoder("electra", "Electra", embedding_size=24, **_BERT)
_encoder(
    "distilbert", "DistilBert", dim=HIDDEN, hidden_dim=INNER, n_layers=2, n_heads=HEADS,
    max_position_embeddings=_positions, dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0,
)  # fmt: skip
_encoder("albert", "Albert", embedding_size=24, classifier_dropout_prob=0.0, **_BERT)
_encoder(
    "deberta_v2", "DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"], pooler_dropout=0.0,
    pooler_hidden_size=HIDDEN, **_BERT,
)  # fmt: skip
_encoder(
    "modernbert", "ModernBert", hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=2,
    num_attention_heads=HEADS, max_position_embeddings=_positions, embedding_dropout=0.0, attention_dropout=0.0,
    mlp_dropout=0.0, classifier_dropout=0.0, local_attention=6, pad_token_id=0, cls_token_id=2, sep_token_id=3,
)  # fmt: skip

# -- encoder-decoders: the encoder has four tokens more ----------------------------------------------------------------


def _seq2seq(
    name: str, family: str, batch: Callable[[int], dict[str, Any]], *, model: str = "", **settings: Any
) -> None:
    def make(tokens: int) -> Built:
        given = {key: value(tokens) if callable(value) else value for key, value in settings.items()}
        config = getattr(transformers, f"{family}Config")(vocab_size=VOCAB, use_cache=False, **given)
        return getattr(transformers, model or f"{family}ForConditionalGeneration")(config), batch(tokens)

    ARCHITECTURES[name] = make


def _two_texts(tokens: int) -> dict[str, Any]:
    return {"input_ids": _ids(tokens + 4, seed=1), "labels": _ids(tokens)}


def _sound(tokens: int) -> dict[str, Any]:
    return {"input_features": _random(B, 10, 2 * (tokens + 4)), "labels": _ids(tokens)}


_BART = {
    "d_model": HIDDEN, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS, "encoder_ffn_dim": INNER, "decoder_ffn_dim": INNER, "dropout": 0.0,
    "attention_dropout": 0.0, "decoder_start_token_id": 2,
}  # fmt: skip
_seq2seq(
    "t5", "T5", _two_texts, d_model=HIDDEN, d_kv=8, d_ff=INNER, num_layers=2, num_heads=HEADS, dropout_rate=0.0,
    decoder_start_token_id=0,
)  # fmt: skip
_seq2seq("bart", "Bart", _two_texts, max_position_embeddings=_positions, **_BART)
_seq2seq(
    "marian", "Marian", _two_texts, model="MarianMTModel", max_position_embeddings=_positions, pad_token_id=0,
    eos_token_id=1, **_BART,
)  # fmt: skip
_seq2seq(
    "whisper", "Whisper", _sound, max_source_positions=lambda tokens: tokens + 4, max_target_positions=_positions,
    num_mel_bins=10, pad_token_id=0, bos_token_id=0, eos_token_id=1, **_BART,
)  # fmt: skip

# -- images, sound, two towers ----------------------------------------------------------------------------------------

_PATCH = 6
_VISION = {
    "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": INNER,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "patch_size": _PATCH,
}  # fmt: skip


def _side(tokens: int) -> int:
    """The side of an image of about ``tokens`` patches."""
    return _PATCH * max(4, round(tokens**0.5))


def _images(side: int) -> Tensor:
    return _random(B, 3, side, side)


def _image_classifier(name: str, family: str, **settings: Any) -> None:
    def make(tokens: int) -> Built:
        config = getattr(transformers, f"{family}Config")(**{**_VISION, "image_size": _side(tokens), **settings})
        config.num_labels, config.problem_type = CLASSES, "single_label_classification"
        model = getattr(transformers, f"{family}ForImageClassification")(config)
        return model, {"pixel_values": _images(_side(tokens)), "labels": torch.arange(B) % CLASSES}

    ARCHITECTURES[name] = make


_image_classifier("vit", "ViT")
_image_classifier("deit", "DeiT")
_image_classifier("dinov2", "Dinov2")
_image_classifier("beit", "Beit", drop_path_rate=0.0)


def _architecture(make: Callable[[int], Built]) -> Callable[[int], Built]:
    ARCHITECTURES[make.__name__] = make
    return make


@_architecture
def swin(tokens: int) -> Built:
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[2, 1], num_heads=[2, 4], window_size=2, drop_path_rate=0.0,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    config.num_labels, config.problem_type = CLASSES, "single_label_classification"
    batch = {"pixel_values": _images(32), "labels": torch.arange(B) % CLASSES}
    return transformers.SwinForImageClassification(config), batch


@_architecture
def segformer(tokens: int) -> Built:
    """Stages of 100 and 25 tokens for a small image; the keys of the first are reduced to 4."""
    side = 4 * max(10, round(tokens**0.5))
    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[5, 1], hidden_sizes=[16, 24], patch_sizes=[5, 3],
        strides=[4, 2], num_attention_heads=[2, 4], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=CLASSES,
        drop_path_rate=0.0,
        classifier_dropout_prob=0.0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    labels = torch.randint(CLASSES, (B, side, side), generator=torch.Generator().manual_seed(0))
    return transformers.SegformerForSemanticSegmentation(config), {"pixel_values": _images(side), "labels": labels}


@_architecture
def vit_mae(tokens: int) -> Built:
    side = _side(tokens)
    config = transformers.ViTMAEConfig(
        **_VISION, image_size=side, decoder_hidden_size=24, decoder_num_hidden_layers=1,
        decoder_num_attention_heads=HEADS, decoder_intermediate_size=40,
    )  # fmt: skip
    noise = torch.rand(B, (side // _PATCH) ** 2, generator=torch.Generator().manual_seed(0))
    return transformers.ViTMAEForPreTraining(config), {"pixel_values": _images(side), "noise": noise}


class Depth(nn.Module):
    """A depth model that computes its loss: pixel-wise regression."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.model = transformers.DPTForDepthEstimation(config)

    def forward(self, pixel_values: Tensor, depth: Tensor) -> Tensor:
        return nn.functional.l1_loss(self.model(pixel_values=pixel_values).predicted_depth, depth)


@_architecture
def dpt(tokens: int) -> Built:
    sizes = {**_VISION, "num_hidden_layers": 4, "image_size": _side(tokens)}
    config = transformers.DPTConfig(
        **sizes,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        head_in_index=-1,
        backbone_out_indices=[0, 1, 2, 3],
    )
    out = 16 * _side(tokens) // _PATCH
    return Depth(config), {"pixel_values": _images(_side(tokens)), "depth": _random(B, out, out)}


_TOWER = {
    "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 2, "num_attention_heads": HEADS,
    "attention_dropout": 0.0,
}  # fmt: skip


def _two_towers(name: str, family: str, **settings: Any) -> None:
    def make(tokens: int) -> Built:
        text = {**_TOWER, **settings, "vocab_size": VOCAB, "max_position_embeddings": _positions(tokens)}
        image = {**_TOWER, **settings, "image_size": _side(tokens), "patch_size": _PATCH}
        config = getattr(transformers, f"{family}Config")(text_config={**text, "eos_token_id": 1}, vision_config=image)
        model = getattr(transformers, f"{family}Model")(config)
        return model, {"input_ids": _ids(tokens), "pixel_values": _images(_side(tokens)), "return_loss": True}

    ARCHITECTURES[name] = make


_two_towers("clip", "CLIP", projection_dim=16)
_two_towers("siglip", "Siglip")


@_architecture
def wav2vec2(tokens: int) -> Built:
    config = transformers.Wav2Vec2Config(
        hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=HEADS, intermediate_size=INNER, vocab_size=VOCAB,
        hidden_dropout=0.0, attention_dropout=0.0, feat_proj_dropout=0.0, final_dropout=0.0, layerdrop=0.0,
        activation_dropout=0.0, conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=6,
        num_conv_pos_embedding_groups=2, apply_spec_augment=False,
    )  # fmt: skip
    config.num_labels, config.problem_type = CLASSES, "single_label_classification"
    model = transformers.Wav2Vec2ForSequenceClassification(config)
    return model, {"input_values": _random(B, 10 * tokens + 15), "labels": torch.arange(B) % CLASSES}


# -- outside transformers ---------------------------------------------------------------------------------------------


class TorchEncoder(nn.Module):
    """``torch.nn.TransformerEncoder`` with an embedding and a head."""

    def __init__(self, positions: int, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(HIDDEN, HEADS, INNER, 0.0, batch_first=True, norm_first=norm_first)
        self.embed, self.positions = nn.Embedding(VOCAB, HIDDEN), nn.Embedding(positions, HIDDEN)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(HIDDEN, VOCAB)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        tokens = input_ids.shape[1]
        x = self.embed(input_ids) + self.positions(torch.arange(tokens))
        mask = nn.Transformer.generate_square_subsequent_mask(tokens, dtype=x.dtype)
        logits = self.head(self.blocks(x, mask=mask, is_causal=True))
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class TorchTransformer(nn.Module):
    """``torch.nn.Transformer``: an encoder and a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.blocks = nn.Transformer(HIDDEN, HEADS, 2, 2, INNER, 0.0, batch_first=True)
        self.head = nn.Linear(HIDDEN, VOCAB)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        seen, target = labels[:, :-1], labels[:, 1:]
        mask = nn.Transformer.generate_square_subsequent_mask(seen.shape[1], dtype=self.head.weight.dtype)
        hidden = self.blocks(self.embed(input_ids), self.embed(seen), tgt_mask=mask, tgt_is_causal=True)
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), target.flatten())


class HandWritten(nn.Module):
    """A hand-written Llama: a fused projection of grouped heads, rotary tables as buffers, a loss on shifted labels."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.blocks = nn.ModuleList(HandWrittenBlock() for _ in range(2))
        self.norm, self.head = nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, VOCAB, bias=False)
        angles = torch.outer(torch.arange(positions), 1e4 ** -(torch.arange(0, 8, 2) / 8))
        self.register_buffer("rotary", torch.stack([angles.cos(), angles.sin()], -1))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x, rotary = self.embed(input_ids), self.rotary[: input_ids.shape[1]]
        for block in self.blocks:
            x = block(x, rotary)
        logits = self.head(self.norm(x))
        return nn.functional.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))


class HandWrittenBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)
        self.qkv, self.out = nn.Linear(HIDDEN, HIDDEN + 2 * 16, bias=False), nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.gate, self.up = nn.Linear(HIDDEN, INNER, bias=False), nn.Linear(HIDDEN, INNER, bias=False)
        self.down = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        query, key, value = self.qkv(self.norm1(x)).split([HIDDEN, 16, 16], -1)
        query, key = (self._rotated(y.view(batch, tokens, -1, 8), rotary).transpose(1, 2) for y in (query, key))
        value = value.view(batch, tokens, 2, 8).transpose(1, 2)
        key, value = (y.repeat_interleave(2, 1) for y in (key, value))
        y = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, tokens, HIDDEN))
        y = self.norm2(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))

    @staticmethod
    def _rotated(x: Tensor, rotary: Tensor) -> Tensor:
        pairs, (cos, sin) = x.unflatten(-1, (-1, 2)), rotary.unsqueeze(1).unbind(-1)
        even, odd = pairs.unbind(-1)
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)


@_architecture
def hand_written(tokens: int) -> Built:
    return HandWritten(_positions(tokens)), _text(tokens)


@_architecture
def torch_encoder(tokens: int) -> Built:
    return TorchEncoder(_positions(tokens), norm_first=True), _text(tokens)


@_architecture
def torch_transformer(tokens: int) -> Built:
    return TorchTransformer(), _two_texts(tokens)
