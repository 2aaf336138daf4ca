"""Models of the transformers library for sound and for time series."""

from __future__ import annotations

from typing import Any

import torch

from .architecture import VOCABULARY, Architecture, Inputs, ids, numbers
from .transformers_text import HEADS, HIDDEN, LAYERS, WIDTH, transformer

WAVE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN,
    "conv_dim": [32, 32, 32],
    "conv_stride": [5, 2, 2],
    "conv_kernel": [10, 3, 3],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "apply_spec_augment": False,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
}
BART: dict[str, Any] = {
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": HIDDEN,
    "decoder_ffn_dim": HIDDEN,
}
SERIES: dict[str, Any] = {
    **BART,
    "prediction_length": 4,
    "context_length": 12,
    "lags_sequence": [1, 2, 3],
    "num_time_features": 2,
}
SPEECHT5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "encoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "encoder_ffn_dim": HIDDEN,
    "decoder_layers": LAYERS,
    "decoder_attention_heads": HEADS,
    "decoder_ffn_dim": HIDDEN,
    "num_mel_bins": 16,
    "speech_decoder_prenet_units": 64,
    "speech_decoder_prenet_dropout": 0.0,
    "speaker_embedding_dim": 16,
    "speech_decoder_postnet_units": 32,
    "max_text_positions": 64,
    "max_speech_positions": 64,
}


def wave() -> Inputs:
    """Two pieces of sound."""
    return {"input_values": numbers(2, 800)}


def series() -> Inputs:
    """Two time series with what comes after them."""
    return {
        "past_values": numbers(2, 15),
        "past_time_features": numbers(2, 15, 2),
        "past_observed_mask": torch.ones(2, 15),
        "future_values": numbers(2, 4),
        "future_time_features": numbers(2, 4, 2),
    }


def signal(
    name: str, model: str, config: str, inputs: Any, fast: bool = False, **settings: Any
) -> Architecture:
    """A model that takes sound or time series."""
    build = transformer(model, config, **settings)
    return Architecture(name, "signals", "transformers", build, inputs, fast=fast)


def vits() -> Any:
    """VITS; its sound depends on random numbers, so that its settings take their spread away."""
    from transformers import VitsConfig, VitsModel

    config = VitsConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        ffn_dim=HIDDEN,
        flow_size=WIDTH,
        spectrogram_bins=33,
        prior_encoder_num_flows=2,
        prior_encoder_num_wavenet_layers=2,
        posterior_encoder_num_wavenet_layers=2,
        upsample_initial_channel=32,
        upsample_rates=[4, 4],
        upsample_kernel_sizes=[8, 8],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]],
        use_stochastic_duration_prediction=False,
        duration_predictor_filter_channels=32,
    )
    model = VitsModel(config)
    model.noise_scale = model.noise_scale_duration = 0.0
    return model


ARCHITECTURES = [
    Architecture(
        "whisper",
        "signals",
        "transformers",
        transformer(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            vocab_size=VOCABULARY,
            num_mel_bins=16,
            max_source_positions=20,
            max_target_positions=32,
            decoder_start_token_id=1,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            suppress_tokens=[],
            begin_suppress_tokens=[],
            **BART,
        ),
        lambda: {"input_features": numbers(2, 16, 40), "decoder_input_ids": ids(2, 6)},
        lambda: {"input_features": numbers(1, 16, 40)},
        fast=True,
    ),
    signal("wav2vec2", "Wav2Vec2Model", "Wav2Vec2Config", wave, fast=True, **WAVE),
    signal("hubert", "HubertModel", "HubertConfig", wave, **WAVE),
    signal(
        "speecht5",
        "SpeechT5ForTextToSpeech",
        "SpeechT5Config",
        lambda: {
            "input_ids": ids(2, 10),
            "decoder_input_values": numbers(2, 6, 16),
            "speaker_embeddings": numbers(2, 16),
        },
        fast=True,
        **SPEECHT5,
    ),
    Architecture(
        "vits", "signals", "transformers", vits, lambda: {"input_ids": ids(1, 12)}, spread=False
    ),
    signal(
        "encodec",
        "EncodecModel",
        "EncodecConfig",
        lambda: {"input_values": numbers(1, 1, 640)},
        num_filters=8,
        hidden_size=32,
        codebook_size=64,
        upsampling_ratios=[4, 2],
    ),
    signal(
        "ast",
        "ASTModel",
        "ASTConfig",
        lambda: {"input_values": numbers(2, 40, 16)},
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=HIDDEN,
        patch_size=8,
        frequency_stride=8,
        time_stride=8,
        max_length=40,
        num_mel_bins=16,
    ),
    signal(
        "timeseries_transformer",
        "TimeSeriesTransformerModel",
        "TimeSeriesTransformerConfig",
        series,
        **SERIES,
    ),
    signal(
        "patchtst",
        "PatchTSTForPrediction",
        "PatchTSTConfig",
        lambda: {"past_values": numbers(2, 32, 2)},
        num_input_channels=2,
        context_length=32,
        patch_length=8,
        patch_stride=8,
        num_hidden_layers=LAYERS,
        d_model=WIDTH,
        num_attention_heads=HEADS,
        ffn_dim=HIDDEN,
        prediction_length=8,
        loss="mse",
    ),
    signal("informer", "InformerModel", "InformerConfig", series, **SERIES),
]
