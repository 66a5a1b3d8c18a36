"""Classes of transformers with small random configurations: nothing is downloaded.

Sizes differ from each other wherever a class allows it, so that a size is recognised by its value; GPT-2 has as many
heads as channels a head, so that one entry is ambiguous. ``eager`` and ``sdpa`` name the implementation of attention.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zoo.entries import AnyEntry, settled_parameters

SHAPES = {
    "input_ids": (10,),
    "decoder_input_ids": (6,),
    "attention_mask": (10,),
    "pixel_values": (3, 32, 32),
    "input_values": (400,),
    "input_features": (16, 40),
}
VOCABULARY = 99


def _inputs(keys: tuple[str, ...], batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: _input(key, (batch, *SHAPES[key]), generator) for key in keys}


def _input(key: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if key.endswith("_ids"):
        return torch.randint(4, VOCABULARY, shape, generator=generator)  # 0 to 3 are padding, start, end and mask
    if key == "attention_mask":
        mask = torch.ones(shape, dtype=torch.int64)
        mask[-1, -3:] = 0
        return mask
    offset = torch.randn(*shape[:2], *(1 for _ in shape[2:]), generator=generator)  # pooled noise alone hardly differs
    return offset + torch.randn(shape, generator=generator)


def _make(class_name: str, config: dict[str, Any]) -> nn.Module:
    import transformers

    model_class = getattr(transformers, class_name)
    made = model_class.config_class(**config)
    for part in (made, *(getattr(made, name) for name in made.sub_configs)):
        if hasattr(part, "use_cache"):
            part.use_cache = False
    return model_class(made)


def _entry(class_name: str, tags: str, keys: str, outputs: str = "logits", **config: Any) -> AnyEntry:
    kinds = frozenset(tags.split())
    if attention := kinds & {"eager", "sdpa"}:
        config["attn_implementation"] = next(iter(attention))
    inputs = partial(_inputs, tuple(keys.split()))
    build = partial(settled_parameters, partial(_make, class_name, config), inputs)
    return AnyEntry(class_name, build, inputs, kinds, outputs)


_TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_VOCABULARY: dict[str, Any] = {"vocab_size": VOCABULARY, **_TOKENS}
_BODY: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80}
_TEXT: dict[str, Any] = {**_VOCABULARY, **_BODY, "max_position_embeddings": 32}
_GROUPED: dict[str, Any] = {**_TEXT, "num_key_value_heads": 2}
_HALF_ROTARY = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}  # 6 of 12 channels
_IMAGE: dict[str, Any] = {**_BODY, "image_size": 32, "patch_size": 8, "num_labels": 10}
_SEQ2SEQ: dict[str, Any] = {
    **_VOCABULARY,
    "d_model": 48,
    **{f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in (("layers", 2), ("attention_heads", 4))},
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 72,
    "max_position_embeddings": 32,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
_T5: dict[str, Any] = {
    **_VOCABULARY,
    **{"d_model": 48, "d_kv": 16, "d_ff": 80, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
}
_SPEECH: dict[str, Any] = {
    **_BODY,
    **_TOKENS,
    **{"vocab_size": 20, "conv_dim": (32, 36, 40), "conv_kernel": (10, 3, 3), "conv_stride": (5, 2, 2)},
    **{"num_feat_extract_layers": 3, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4},
}
_PYRAMID: dict[str, Any] = {
    **{"num_encoder_blocks": 3, "depths": [1, 1, 1], "sr_ratios": [4, 2, 1], "mlp_ratios": [2, 2, 2]},
    **{"hidden_sizes": [16, 24, 32], "num_attention_heads": [1, 2, 4], "num_labels": 10},
}
_STAGES: dict[str, Any] = {"embedding_size": 16, "hidden_sizes": [24, 32], "depths": [2, 2], "num_labels": 10}
_TWO_TOWERS: dict[str, Any] = {"text_config": _TEXT, "vision_config": {**_IMAGE, "hidden_size": 40}}
_MASKED, _PLAIN = "input_ids attention_mask", "input_ids"
_BOTH_SIDES = "input_ids attention_mask decoder_input_ids"

_ENTRIES = (
    _entry("BertForSequenceClassification", "encoder eager", _MASKED, **_TEXT, num_labels=5),
    _entry("RobertaForMaskedLM", "encoder sdpa tied", _MASKED, **_TEXT),
    _entry(
        "DistilBertForSequenceClassification", "encoder sdpa", _MASKED, **_VOCABULARY, dim=48, n_layers=2, n_heads=4,
        hidden_dim=80, max_position_embeddings=32, num_labels=5,
    ),
    _entry("AlbertForSequenceClassification", "encoder sdpa shared", _MASKED, **_TEXT, embedding_size=24, num_labels=5),
    _entry("ElectraForPreTraining", "encoder sdpa", _MASKED, **_TEXT, embedding_size=24),
    _entry(
        "DebertaV2ForSequenceClassification", "encoder eager relative", _MASKED, **_TEXT, relative_attention=True,
        pos_att_type=["c2p", "p2c"], position_buckets=8, share_att_key=False, norm_rel_ebd="layer_norm",
        num_labels=5,
    ),
    _entry("MPNetForSequenceClassification", "encoder eager relative", _MASKED, **_TEXT, num_labels=5),
    _entry(
        "ModernBertForMaskedLM", "encoder sdpa fused glu rotary tied", _MASKED, **_TEXT, cls_token_id=1, sep_token_id=2,
        local_attention=4,
    ),
    _entry(
        "GPT2LMHeadModel", "decoder sdpa fused tied ambiguous", _PLAIN, **_VOCABULARY, n_embd=64, n_layer=2, n_head=8,
        n_inner=96, n_positions=32,
    ),
    _entry("GPTNeoXForCausalLM", "decoder eager fused rotary", _MASKED, **_TEXT, rope_parameters=_HALF_ROTARY),
    _entry("OPTForCausalLM", "decoder sdpa tied", _MASKED, **_TEXT, ffn_dim=80, word_embed_proj_dim=24),
    _entry(
        "BloomForCausalLM", "decoder eager fused tied alibi", _MASKED, **_VOCABULARY, hidden_size=48, n_layer=2,
        n_head=4,
    ),
    _entry(
        "FalconForCausalLM", "decoder sdpa fused rotary grouped tied", _PLAIN, **_TEXT, num_kv_heads=2,
        new_decoder_architecture=True, ffn_hidden_size=80,
    ),
    _entry("LlamaForCausalLM", "decoder sdpa grouped glu rotary", _PLAIN, **_GROUPED),
    _entry("MistralForCausalLM", "decoder eager grouped glu rotary", _MASKED, **_GROUPED, sliding_window=4),
    _entry("Qwen2ForCausalLM", "decoder sdpa grouped glu rotary", _MASKED, **_GROUPED),
    _entry("Qwen3ForCausalLM", "decoder eager grouped glu rotary", _PLAIN, **_GROUPED, head_dim=16),
    _entry(
        "GemmaForCausalLM", "decoder sdpa grouped glu rotary tied", _PLAIN, **{**_GROUPED, "num_key_value_heads": 1},
        head_dim=16,
    ),
    _entry(
        "Gemma2ForCausalLM", "decoder eager grouped glu rotary tied", _MASKED, **_GROUPED, head_dim=16,
        query_pre_attn_scalar=16, sliding_window=4,
    ),
    _entry("PhiForCausalLM", "decoder sdpa rotary", _PLAIN, **_TEXT),
    _entry("Phi3ForCausalLM", "decoder sdpa fused grouped glu rotary", _PLAIN, **_GROUPED),
    _entry(
        "StableLmForCausalLM", "decoder eager grouped glu rotary", _MASKED, **_GROUPED, qk_layernorm=True,
        rope_parameters=_HALF_ROTARY,
    ),
    _entry(
        "T5ForConditionalGeneration", "encoder_decoder eager relative", _BOTH_SIDES, **_T5,
        feed_forward_proj="gated-gelu",
    ),
    _entry("BartForConditionalGeneration", "encoder_decoder sdpa tied", _BOTH_SIDES, **_SEQ2SEQ),
    _entry("PegasusForConditionalGeneration", "encoder_decoder eager tied", _BOTH_SIDES, **_SEQ2SEQ),
    _entry("MarianMTModel", "encoder_decoder sdpa tied", _BOTH_SIDES, **_SEQ2SEQ),
    _entry("ViTForImageClassification", "vision sdpa", "pixel_values", **_IMAGE),
    _entry("DeiTForImageClassificationWithTeacher", "vision eager", "pixel_values", **_IMAGE),
    _entry(
        "BeitForImageClassification", "vision sdpa relative", "pixel_values", **_IMAGE, use_relative_position_bias=True,
        layer_scale_init_value=1.0,
    ),
    _entry(
        "SwinForImageClassification", "vision eager relative windows", "pixel_values", image_size=32, patch_size=2,
        embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=10,
    ),
    _entry(
        "ConvNextForImageClassification", "vision cnn", "pixel_values", num_stages=3, hidden_sizes=[16, 24, 32],
        depths=[1, 1, 1], layer_scale_init_value=1.0, num_labels=10,
    ),
    _entry(
        "MobileViTForImageClassification", "vision cnn", "pixel_values", image_size=32, output_stride=8,
        hidden_sizes=[24, 32, 40], neck_hidden_sizes=[8, 8, 12, 16, 20, 24, 64], num_attention_heads=4, num_labels=10,
    ),
    _entry("PvtV2ForImageClassification", "vision", "pixel_values", image_size=32, **_PYRAMID),
    _entry(
        "SegformerForSemanticSegmentation", "vision sdpa cnn map_output", "pixel_values", **_PYRAMID, patch_sizes=[7, 3,
        3], strides=[4, 2, 2], decoder_hidden_size=28,
    ),
    _entry("Dinov2ForImageClassification", "vision sdpa glu", "pixel_values", **_IMAGE, use_swiglu_ffn=True),
    _entry("ResNetForImageClassification", "vision cnn", "pixel_values", **_STAGES),
    _entry(
        "RegNetForImageClassification", "vision cnn grouped squeeze_excite", "pixel_values", **_STAGES, groups_width=8,
    ),
    _entry(
        "WhisperForConditionalGeneration", "speech sdpa encoder_decoder tied", "input_features decoder_input_ids",
        **_SEQ2SEQ, num_mel_bins=16, max_source_positions=20, max_target_positions=16, begin_suppress_tokens=None,
    ),
    _entry("Wav2Vec2ForCTC", "speech sdpa cnn weight_norm", "input_values", **_SPEECH),
    _entry("HubertForCTC", "speech cnn eager weight_norm", "input_values", **_SPEECH, feat_extract_norm="layer"),
    _entry(
        "CLIPModel", "multimodal sdpa", "input_ids attention_mask pixel_values", "logits_per_image", **_TWO_TOWERS,
        projection_dim=20,
    ),
    _entry(
        "SiglipModel", "multimodal eager", "input_ids pixel_values", "logits_per_image", text_config=_TEXT,
        vision_config=_IMAGE,
    ),
    _entry(
        "BlipForConditionalGeneration", "multimodal eager", "input_ids attention_mask pixel_values",
        text_config={**_TEXT, "encoder_hidden_size": 40, "sep_token_id": 2}, vision_config=_TWO_TOWERS["vision_config"],
    ),
    _entry(
        "MambaForCausalLM", "state_space tied", _PLAIN, **_VOCABULARY, hidden_size=48, num_hidden_layers=2,
        state_size=6, time_step_rank=5,
    ),
    _entry("MixtralForCausalLM", "decoder sdpa mixture grouped glu rotary", _PLAIN, **_GROUPED, num_local_experts=4),
    _entry(
        "Qwen2MoeForCausalLM", "decoder mixture eager grouped glu rotary", _PLAIN, **_GROUPED, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=40, shared_expert_intermediate_size=56,
    ),
    _entry(
        "SwitchTransformersForConditionalGeneration", "encoder_decoder mixture eager relative", _BOTH_SIDES, **_T5,
        num_decoder_layers=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=3,
        expert_capacity=32,
    ),
)  # fmt: skip
HF_ZOO: dict[str, AnyEntry] = {entry.name: entry for entry in _ENTRIES}
