"""Image models of torchvision and timm, and the parts of diffusers' pipelines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .architecture import Architecture, Inputs, numbers


def picture(size: int) -> Callable[[], Inputs]:
    """Two images, for an argument ``x``."""
    return lambda: {"x": numbers(2, 3, size, size)}


# ---------------------------------------------------------------- torchvision


def torchvision(
    name: str, build: Callable[[Any], nn.Module], size: int = 32, fast: bool = False
) -> Architecture:
    """A model of torchvision; ``build`` takes ``torchvision.models``."""

    def made() -> nn.Module:
        from torchvision import models

        return build(models)

    return Architecture(name, "torchvision", "torchvision", made, picture(size), fast=fast)


TORCHVISION = [
    torchvision("tv_resnet18", lambda models: models.resnet18(num_classes=64)),
    torchvision(
        "tv_vit",
        lambda models: models.VisionTransformer(32, 8, 2, 4, 64, 128, num_classes=64),
        fast=True,
    ),
    torchvision(
        "tv_swin",
        lambda models: models.SwinTransformer(
            [4, 4], 64, [2, 2], [2, 4], [4, 4], stochastic_depth_prob=0.0, num_classes=64
        ),
        fast=True,
    ),
    torchvision("tv_mobilenet_v3", lambda models: models.mobilenet_v3_small(num_classes=64), 64),
    torchvision(
        "tv_convnext",
        lambda models: models.ConvNeXt(
            [
                models.convnext.CNBlockConfig(64, 128, 1),
                models.convnext.CNBlockConfig(128, None, 1),
            ],
            num_classes=64,
        ),
    ),
]


# ---------------------------------------------------------------- timm


def timm(
    name: str, model: str, size: int = 32, fast: bool = False, **settings: Any
) -> Architecture:
    """A model of timm, made smaller by ``settings``."""

    def build() -> nn.Module:
        import timm

        built: nn.Module = timm.create_model(
            model, pretrained=False, **{"num_classes": 64, **settings}
        )
        return built

    return Architecture(name, "timm", "timm", build, picture(size), fast=fast)


def mixer(name: str, block: str, mlp: str, ratio: Any = 4, **settings: str) -> Architecture:
    """A model that mixes positions by linear layers; the names are those of timm's classes."""

    def build() -> nn.Module:
        from timm.models import mlp_mixer

        parts = {"block_layer": block, "mlp_layer": mlp, **settings}
        built: nn.Module = mlp_mixer.MlpMixer(
            num_classes=64,
            img_size=32,
            patch_size=4,
            num_blocks=2,
            embed_dim=64,
            mlp_ratio=ratio,
            **{argument: getattr(mlp_mixer, part) for argument, part in parts.items()},
        )
        return built

    return Architecture(name, "timm", "timm", build, picture(32))


def volo() -> nn.Module:
    """VOLO with one layer in each of two stages."""
    from timm.models.volo import VOLO

    built: nn.Module = VOLO(
        layers=[1, 1],
        img_size=64,
        num_classes=64,
        embed_dims=[64, 128],
        num_heads=[2, 4],
        downsamples=[True, False],
        outlook_attention=[True, False],
        mlp_ratio=2.0,
    )
    return built


VIT: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 64,
    "depth": 2,
    "num_heads": 4,
}
CONVNEXT: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (16, 32, 48, 64)}

TIMM = [
    timm("timm_vit", "vit_tiny_patch16_224", fast=True, **VIT),
    timm("timm_deit", "deit_tiny_distilled_patch16_224", **VIT),
    mixer("timm_mixer", "MixerBlock", "Mlp", (0.5, 4.0)),
    mixer("timm_resmlp", "ResBlock", "Mlp", norm_layer="Affine"),
    mixer("timm_gmlp", "SpatialGatingBlock", "GatedMlp"),
    timm("timm_convnext", "convnext_atto", **CONVNEXT),
    timm("timm_convnext_v2", "convnextv2_atto", fast=True, **CONVNEXT),
    timm(
        "timm_swin",
        "swin_tiny_patch4_window7_224",
        img_size=32,
        window_size=4,
        embed_dim=64,
        depths=(2, 2),
        num_heads=(2, 4),
    ),
    timm("timm_efficientnet", "test_efficientnet"),
    timm("timm_eva02", "eva02_tiny_patch14_224", fast=True, **VIT),
    timm("timm_xcit", "xcit_nano_12_p16_224", img_size=64, size=64, embed_dim=64, depth=2),
    timm("timm_cait", "cait_xxs24_224", **VIT),
    timm(
        "timm_coatnet",
        "coatnet_pico_rw_224",
        size=64,
        img_size=64,
        depths=(1, 1, 1, 1),
        embed_dim=(16, 32, 64, 64),
        stem_width=(16, 16),
    ),
    timm(
        "timm_maxvit",
        "maxvit_rmlp_pico_rw_256",
        size=64,
        img_size=64,
        depths=(1, 1),
        embed_dim=(32, 64),
        stem_width=16,
    ),
    timm("timm_poolformer", "poolformer_s12", 64),
    timm("timm_beit", "beit_base_patch16_224", fast=True, **VIT),
    Architecture("timm_volo", "timm", "timm", volo, picture(64)),
    timm("timm_naflex", "naflexvit_base_patch16_gap", embed_dim=64, depth=2, num_heads=4),
    timm(
        "timm_hiera",
        "hiera_tiny_224",
        size=64,
        img_size=(64, 64),
        embed_dim=32,
        stages=(1, 1, 1, 1),
    ),
    timm("timm_vitamin", "vitamin_small_224", size=64, img_size=64),
    timm("efficientnet_lite0", "tf_efficientnet_lite0", size=64),
]


# ---------------------------------------------------------------- diffusers


def diffusers(
    name: str, model: str, inputs: Callable[[], Inputs], fast: bool = False, **settings: Any
) -> Architecture:
    """A part of one of diffusers' pipelines."""

    def build() -> nn.Module:
        import diffusers

        built: nn.Module = getattr(diffusers, model)(**settings)
        return built

    return Architecture(name, "diffusers", "diffusers", build, inputs, fast=fast)


DIFFUSERS = [
    diffusers(
        "diff_unet",
        "UNet2DConditionModel",
        lambda: {
            "sample": numbers(1, 4, 16, 16),
            "timestep": torch.tensor(10),
            "encoder_hidden_states": numbers(1, 5, 32),
        },
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    ),
    diffusers(
        "diff_dit",
        "DiTTransformer2DModel",
        lambda: {
            "hidden_states": numbers(1, 4, 8, 8),
            "timestep": torch.tensor([10]),
            "class_labels": torch.tensor([3]),
        },
        fast=True,
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=10,
    ),
    diffusers(
        "diff_sd3",
        "SD3Transformer2DModel",
        lambda: {
            "hidden_states": numbers(1, 4, 8, 8),
            "encoder_hidden_states": numbers(1, 5, 64),
            "pooled_projections": numbers(1, 64),
            "timestep": torch.tensor([10.0]),
        },
        sample_size=8,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=64,
        pooled_projection_dim=64,
        out_channels=4,
        pos_embed_max_size=8,
    ),
    diffusers(
        "diff_flux",
        "FluxTransformer2DModel",
        lambda: {
            "hidden_states": numbers(1, 16, 64),
            "encoder_hidden_states": numbers(1, 5, 64),
            "pooled_projections": numbers(1, 64),
            "timestep": torch.tensor([0.5]),
            "img_ids": torch.zeros(16, 3),
            "txt_ids": torch.zeros(5, 3),
            "guidance": torch.tensor([1.0]),
        },
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    ),
    diffusers(
        "diff_vae",
        "AutoencoderKL",
        lambda: {"sample": numbers(1, 3, 16, 16)},
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=8,
    ),
    diffusers(
        "diff_pixart",
        "PixArtTransformer2DModel",
        lambda: {
            "hidden_states": numbers(1, 4, 8, 8),
            "encoder_hidden_states": numbers(1, 5, 64),
            "timestep": torch.tensor([10]),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=2,
        sample_size=8,
        caption_channels=64,
        cross_attention_dim=64,
        use_additional_conditions=False,
    ),
]

ARCHITECTURES = [*TORCHVISION, *TIMM, *DIFFUSERS]
