"""Models of the transformers library for images, and for images with text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .architecture import VOCABULARY, Architecture, Inputs, ids, numbers
from .transformers_text import HEADS, HIDDEN, LAYERS, WIDTH, transformer


def images(size: int, channels: int = 3) -> Callable[[], Inputs]:
    """A function that makes two images."""
    return lambda: {"pixel_values": numbers(2, channels, size, size)}


def vision(
    name: str,
    model: str,
    config: str,
    size: int = 32,
    fast: bool = False,
    inputs: Callable[[], Inputs] | None = None,
    **settings: Any,
) -> Architecture:
    """A model that takes images."""
    build = transformer(model, config, **settings)
    return Architecture(name, "vision", "transformers", build, inputs or images(size), fast=fast)


VIT: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN,
}
SWIN: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 32,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN,
    "max_position_embeddings": 32,
}
SPECIAL: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
CONV_STAGES: dict[str, Any] = {
    "hidden_sizes": [32, 64, 128, 256],
    "depths": [1, 1, 1, 1],
    "num_stages": 4,
}


def text_and_image() -> Inputs:
    """Two images and two texts."""
    return {"input_ids": ids(2, 10), "pixel_values": numbers(2, 3, 32, 32)}


def two_towers(name: str, family: str, fast: bool = False, **more: Any) -> Architecture:
    """A model with one encoder for text and one for images."""
    settings = {"text_config": {**TEXT, **SPECIAL, **more}, "vision_config": {**VIT}, **more}
    build = transformer(f"{family}Model", f"{family}Config", **settings)
    return Architecture(name, "vision", "transformers", build, text_and_image, fast=fast)


def detr() -> Any:
    """DETR on a small ResNet."""
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32],
        depths=[1, 1],
        layer_type="basic",
        out_features=["stage2"],
    )
    config = DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=WIDTH,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=HIDDEN,
        decoder_ffn_dim=HIDDEN,
        num_queries=6,
    )
    return DetrForObjectDetection(config)


def donut() -> Any:
    """Donut: a Swin encoder and an mBART decoder."""
    from transformers import (
        DonutSwinConfig,
        DonutSwinModel,
        MBartConfig,
        MBartForCausalLM,
        VisionEncoderDecoderModel,
    )

    encoder = DonutSwinModel(DonutSwinConfig(**SWIN))
    decoder = MBartForCausalLM(
        MBartConfig(
            vocab_size=VOCABULARY,
            d_model=WIDTH,
            decoder_layers=LAYERS,
            decoder_attention_heads=HEADS,
            decoder_ffn_dim=HIDDEN,
            max_position_embeddings=64,
            is_decoder=True,
            add_cross_attention=True,
            is_encoder_decoder=False,
            eos_token_id=None,
            forced_eos_token_id=None,
        )
    )
    model = VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = 0
    model.config.pad_token_id = model.generation_config.pad_token_id = 1
    return model


def sam() -> Any:
    """SAM with one point as its prompt."""
    from transformers import SamConfig, SamModel

    return SamModel(
        SamConfig(
            vision_config={
                "hidden_size": WIDTH,
                "output_channels": 32,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": HEADS,
                "image_size": 64,
                "patch_size": 16,
                "mlp_dim": HIDDEN,
                "window_size": 2,
                "global_attn_indexes": [1],
                "num_pos_feats": 16,
            },
            prompt_encoder_config={
                "hidden_size": 32,
                "image_size": 64,
                "patch_size": 16,
                "image_embedding_size": 4,
                "mask_input_channels": 4,
            },
            mask_decoder_config={
                "hidden_size": 32,
                "mlp_dim": HIDDEN,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": 2,
                "iou_head_hidden_dim": 32,
            },
        )
    )


def image_and_point() -> Inputs:
    """One image and one point on it."""
    return {
        "pixel_values": numbers(1, 3, 64, 64),
        "input_points": torch.tensor([[[[20.0, 30.0]]]]),
        "input_labels": torch.tensor([[[1]]]),
    }


ARCHITECTURES = [
    vision("vit", "ViTModel", "ViTConfig", fast=True, **VIT),
    vision("deit", "DeiTModel", "DeiTConfig", **VIT),
    vision("swin", "SwinModel", "SwinConfig", fast=True, **SWIN),
    vision("swinv2", "Swinv2Model", "Swinv2Config", **SWIN),
    vision("beit", "BeitModel", "BeitConfig", use_relative_position_bias=True, **VIT),
    vision("dinov2", "Dinov2Model", "Dinov2Config", **VIT),
    two_towers("clip", "CLIP", fast=True, projection_dim=WIDTH),
    two_towers("siglip", "Siglip", fast=True),
    vision(
        "segformer",
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[32, 64],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[4, 4],
        decoder_hidden_size=64,
        num_labels=8,
    ),
    Architecture("detr", "vision", "transformers", detr, images(64), fast=True),
    Architecture(
        "donut",
        "vision",
        "transformers",
        donut,
        lambda: {"pixel_values": numbers(1, 3, 32, 32), "decoder_input_ids": ids(1, 6)},
        lambda: {"pixel_values": numbers(1, 3, 32, 32)},
    ),
    vision("convnext", "ConvNextModel", "ConvNextConfig", fast=True, **CONV_STAGES),
    vision(
        "dpt",
        "DPTForDepthEstimation",
        "DPTConfig",
        **{**VIT, "num_hidden_layers": 4},
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[16, 32, 64, 64],
        fusion_hidden_size=32,
        is_hybrid=False,
    ),
    Architecture("sam", "vision", "transformers", sam, image_and_point),
    vision(
        "levit",
        "LevitModel",
        "LevitConfig",
        size=64,
        image_size=64,
        hidden_sizes=[64, 96, 128],
        num_attention_heads=[2, 3, 4],
        depths=[1, 1, 1],
        key_dim=[16, 16, 16],
        drop_path_rate=0,
        attention_ratio=[2, 2, 2],
        mlp_ratio=[2, 2, 2],
    ),
    vision(
        "mobilevit",
        "MobileViTModel",
        "MobileViTConfig",
        size=64,
        image_size=64,
        hidden_sizes=[64, 80, 96],
        neck_hidden_sizes=[8, 16, 32, 48, 64, 80, 160],
    ),
    Architecture(
        "blip",
        "vision",
        "transformers",
        transformer(
            "BlipForConditionalGeneration",
            "BlipConfig",
            text_config={**TEXT, **SPECIAL, "encoder_hidden_size": WIDTH},
            vision_config=VIT,
            projection_dim=WIDTH,
            image_text_hidden_size=WIDTH,
        ),
        text_and_image,
    ),
]
