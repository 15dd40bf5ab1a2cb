"""Models of other libraries for the coverage sweep, small ones, each with inputs for its forward.

A model has the name of its zoo in front: ``transformers:ViT``, ``smp:Unet-resnet18``. Each is built
with random weights and, where its library allows, a small configuration: nothing is downloaded. The
libraries are not needed but for their own zoo; a zoo whose library is not installed is left out.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator

BATCH = 2
CLASSES = 10


@dataclass(frozen=True, slots=True)
class Entry:
    """How one model is made, and the arguments of its forward, by position or by name."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...] | dict[str, Any]]


Entries = dict[str, Entry]


@dataclass(frozen=True, slots=True)
class Zoo:
    """The models of one library.

    Attributes:
        package: what is imported.
        entries: returns the models by name; it gets the imported package.
    """

    package: str
    entries: Callable[[Any], Entries]

    @property
    def is_installed(self) -> bool:
        """Whether the library is there."""
        return find_spec(self.package.partition(".")[0]) is not None

    def load(self) -> Entries:
        """Import the library and return its models."""
        return self.entries(import_module(self.package))


def names(zoo: str) -> Iterator[str]:
    """Yield the names of all models of a zoo, with the zoo in front."""
    for short in ZOOS[zoo].load():
        yield f"{zoo}:{short}"


def build(name: str) -> nn.Module:
    """Build a model with random weights."""
    return _entry(name).make()


def example_inputs(name: str) -> tuple[Any, ...] | dict[str, Any]:
    """Return random arguments for the forward of a model, of batch size two."""
    return _entry(name).inputs()


def family_of(name: str) -> str:
    """Return the zoo and the family in it: what stands before the first hyphen."""
    zoo, _, short = name.partition(":")
    return f"{zoo} {short.partition('-')[0]}"


def _entry(name: str) -> Entry:
    zoo, _, short = name.partition(":")
    return ZOOS[zoo].load()[short]


# --- inputs


def images(size: int = 64, channels: int = 3, *, dims: int = 2) -> tuple[Tensor]:
    """Return random images, or volumes for three ``dims``."""
    return (torch.randn(BATCH, channels, *[size] * dims),)


def pixels(size: int = 64, channels: int = 3) -> dict[str, Tensor]:
    """Return images under the name that they have in transformers."""
    return {"pixel_values": torch.randn(BATCH, channels, size, size)}


def tokens(length: int = 12, vocabulary: int = 50) -> dict[str, Tensor]:
    """Return random tokens, the last of the second text masked."""
    mask = torch.ones(BATCH, length, dtype=torch.long)
    mask[1, -2:] = 0
    return {"input_ids": torch.randint(2, vocabulary, (BATCH, length)), "attention_mask": mask}


# --- transformers

PLAIN = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 64,
    "patch_size": 8,
    "num_labels": CLASSES,
}
WIDTHS = [16, 32, 40, 64]
TEXT = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 50,
    "num_labels": CLASSES,
}
SPEECH = {
    **TEXT,
    "conv_dim": [16, 16, 16],
    "conv_kernel": [10, 3, 3],
    "conv_stride": [5, 2, 2],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "hidden_dropout": 0.0,
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
    "layerdrop": 0.0,
}


def _transformers(hf: Any) -> Entries:
    parts = (_plain_vision, _staged_vision, _networks, _segmenters, _detectors, _text, _audio)
    return {name: entry for part in parts for name, entry in part(hf).items()}


def _of(hf: Any, kind: str, inputs: Callable[[], Any] = pixels, **sizes: Any) -> Entry:
    """Return the entry of a class that is made from a configuration with some sizes.

    A size that is a function is called when the model is built: it makes another configuration.
    """

    def make() -> nn.Module:
        model = getattr(hf, kind)
        given = {name: value() if callable(value) else value for name, value in sizes.items()}
        return model(model.config_class(**given))

    return Entry(make, inputs)


def _plain_vision(hf: Any) -> Entries:
    """Return transformers whose layers are all of one width."""
    of = partial(_of, hf)
    four = {**PLAIN, "num_hidden_layers": 4}
    mae = {**PLAIN, "decoder_hidden_size": 32, "decoder_num_hidden_layers": 2}
    mae |= {"decoder_num_attention_heads": 4, "decoder_intermediate_size": 64, "mask_ratio": 0.5}
    gpt = {"n_embd": 48, "n_layer": 3, "n_head": 4, "vocab_size": 50, "n_positions": 64}
    return {
        "ViT": of("ViTForImageClassification", **PLAIN),
        "ViTMasked": of("ViTForMaskedImageModeling", **PLAIN, encoder_stride=8),
        "DeiT": of("DeiTForImageClassification", **PLAIN),
        "DeiTTeacher": of("DeiTForImageClassificationWithTeacher", **PLAIN),
        "BEiT": of("BeitForImageClassification", **PLAIN),
        "BEiTRelative": of("BeitForImageClassification", **PLAIN, use_relative_position_bias=True),
        "Data2VecVision": of("Data2VecVisionForImageClassification", **PLAIN),
        "DINOv2": of("Dinov2ForImageClassification", **PLAIN),
        "DINOv2SwiGLU": of("Dinov2ForImageClassification", **PLAIN, use_swiglu_ffn=True),
        "DINOv2Registers": of("Dinov2WithRegistersForImageClassification", **PLAIN),
        "DINOv3": of("DINOv3ViTModel", **PLAIN, num_register_tokens=2),
        "DINOv3Gated": of("DINOv3ViTModel", **PLAIN, use_gated_mlp=True),
        "CLIP": of("CLIPVisionModelWithProjection", **PLAIN, projection_dim=32),
        "SigLIP": of("SiglipVisionModel", **PLAIN),
        "ViTMSN": of("ViTMSNForImageClassification", **PLAIN),
        "IJepa": of("IJepaForImageClassification", **PLAIN),
        "ViTMAE": of("ViTMAEForPreTraining", _masked_pixels, **mae),
        "YOLOS": of(
            "YolosForObjectDetection", **{**PLAIN, "image_size": [64, 64]}, num_detection_tokens=6
        ),
        "DPT": of(
            "DPTForDepthEstimation", **four, backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[16, 16, 32, 32], fusion_hidden_size=16,
        ),
        "DepthAnything": of(
            "DepthAnythingForDepthEstimation", patch_size=8, reassemble_hidden_size=48,
            neck_hidden_sizes=[16, 16, 32, 32], fusion_hidden_size=16, head_hidden_size=8,
            backbone_config=lambda: hf.Dinov2Config(
                **four, out_features=["stage1", "stage2", "stage3", "stage4"],
                reshape_hidden_states=False,
            ),
        ),
        "VideoMAE": of(
            "VideoMAEForVideoClassification", _video, **PLAIN, num_frames=4, tubelet_size=2
        ),
        "TimeSformer": of("TimesformerForVideoClassification", _video, **PLAIN, num_frames=4),
        "ImageGPT": of("ImageGPTForImageClassification", _image_tokens, **gpt, num_labels=CLASSES),
    }  # fmt: skip


def _masked_pixels() -> dict[str, Tensor]:
    return {**pixels(), "noise": torch.rand(BATCH, 64)}


def _video() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(BATCH, 4, 3, 64, 64)}


def _image_tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 50, (BATCH, 16))}


def _staged_vision(hf: Any) -> Entries:
    """Return transformers of several stages."""
    of = partial(_of, hf, num_labels=CLASSES)
    four = {"depths": [1, 1, 2, 1], "hidden_sizes": WIDTHS}
    heads = {"num_attention_heads": [1, 2, 4, 8]}
    pyramid = {**four, **heads, "image_size": 64}
    windows = {"image_size": 64, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
    small = {"hidden_sizes": [24, 32, 40], "image_size": 64}
    conv = {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 3], "depth": [1, 2, 3]}
    levit = {"hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4]}
    return {
        "Swin": of("SwinForImageClassification", **windows, window_size=4),
        "Swinv2": of("Swinv2ForImageClassification", **windows, window_size=4),
        "Swin2SR": _of(
            hf, "Swin2SRForImageSuperResolution", partial(pixels, 16), image_size=16,
            embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4,
        ),
        "DonutSwin": of("DonutSwinForImageClassification", **windows, window_size=4),
        "Hiera": of(
            "HieraForImageClassification", image_size=[64, 64], embed_dim=16, depths=[1, 1, 2, 1],
            num_heads=[1, 2, 4, 8], masked_unit_size=[8, 8],
        ),
        "PVT": of("PvtForImageClassification", **pyramid),
        "PVTv2": of("PvtV2ForImageClassification", **pyramid),
        "PVTv2Linear": of("PvtV2ForImageClassification", **pyramid, linear_attention=True),
        "SegFormerClassifier": of("SegformerForImageClassification", **four, **heads),
        "CvT": of("CvtForImageClassification", **conv),
        "LeViT": of(
            "LevitForImageClassification", **levit, image_size=64, depths=[1, 1, 1],
            key_dim=[8, 8, 8],
        ),
        "MobileViT": of(
            "MobileViTForImageClassification", **small, num_attention_heads=4,
            neck_hidden_sizes=[8, 16, 24, 32, 40, 48, 64],
        ),
        "MobileViTV2": of(
            "MobileViTV2ForImageClassification", image_size=64, width_multiplier=0.25,
            base_attn_unit_dims=[64, 96, 128], n_attn_blocks=[1, 1, 1],
        ),
        "PoolFormer": of("PoolFormerForImageClassification", **four),
        "FocalNet": of(
            "FocalNetForImageClassification", image_size=64, embed_dim=16, depths=[1, 1, 2, 1]
        ),
        "SwiftFormer": of(
            "SwiftFormerForImageClassification", depths=[1, 1, 2, 1], embed_dims=[16, 24, 32, 48]
        ),
    }  # fmt: skip


def _networks(hf: Any) -> Entries:
    """Return convolutional networks."""
    of = partial(_of, hf, num_labels=CLASSES)
    four = {"depths": [2, 2, 3, 2], "hidden_sizes": [64, 96, 128, 192]}
    stem = {**four, "embedding_size": 16}
    hg = {
        "embedding_size": 16, "depths": [1, 1], "hidden_sizes": [32, 64],
        "stem_channels": [3, 8, 16], "stage_in_channels": [16, 32], "stage_mid_channels": [8, 16],
        "stage_out_channels": [32, 64], "stage_num_blocks": [1, 1],
        "stage_downsample": [False, True], "stage_downsample_strides": [2, 2],
        "stage_light_block": [False, True], "stage_kernel_size": [3, 5],
        "stage_numb_of_layers": [3, 3],
    }  # fmt: skip
    return {
        "ConvNeXt": of("ConvNextForImageClassification", **four),
        "ConvNeXtV2": of("ConvNextV2ForImageClassification", **four),
        "DINOv3ConvNeXt": of("DINOv3ConvNextModel", **four),
        "ResNet": of("ResNetForImageClassification", **stem),
        "ResNetBasic": of("ResNetForImageClassification", **stem, layer_type="basic"),
        "RegNet": of("RegNetForImageClassification", **stem, groups_width=8),
        "RegNetX": of("RegNetForImageClassification", **stem, groups_width=8, layer_type="x"),
        "BiT": of("BitForImageClassification", **stem, num_groups=4),
        "BiTBottleneck": of(
            "BitForImageClassification", **stem, num_groups=2, layer_type="bottleneck"
        ),
        "MobileNetV1": of(
            "MobileNetV1ForImageClassification", depth_multiplier=0.25, image_size=64
        ),
        "MobileNetV2": of(
            "MobileNetV2ForImageClassification", depth_multiplier=0.35, image_size=64
        ),
        "EfficientNet": of(
            "EfficientNetForImageClassification", width_coefficient=0.3, depth_coefficient=0.3,
            image_size=64, hidden_dim=384,
        ),
        "HGNetV2": of("HGNetV2ForImageClassification", **hg),
        "HGNetV2Affine": of("HGNetV2ForImageClassification", **hg, use_learnable_affine_block=True),
        "TextNet": of(
            "TextNetForImageClassification", stem_out_channels=16, hidden_sizes=[16, 16, 24, 32, 40]
        ),
        "PPLCNet": of("PPLCNetForImageClassification", scale=0.25, class_expand=96),
    }  # fmt: skip


def _segmenters(hf: Any) -> Entries:
    """Return networks for segmentation, depth and poses."""
    of = partial(_of, hf)
    four = {"depths": [1, 1, 1, 1], "hidden_sizes": WIDTHS, "num_attention_heads": [1, 2, 4, 8]}
    stages = ["stage1", "stage2", "stage3", "stage4"]
    windows = {"image_size": 64, "embed_dim": 16, "depths": [1, 1, 1, 1], "window_size": 4}
    windows |= {"num_heads": [1, 2, 2, 4], "out_features": stages}
    decoder = {"num_attention_heads": 4, "dropout": 0.0, "num_labels": CLASSES}
    mask2 = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_layers": 1}
    mask2 |= {"decoder_layers": 2, "dim_feedforward": 64, "encoder_feedforward_dim": 64}
    return {
        "SegFormer": of(
            "SegformerForSemanticSegmentation", **four, decoder_hidden_size=32, num_labels=CLASSES
        ),
        "GLPN": of("GLPNForDepthEstimation", **four, decoder_hidden_size=16),
        "UperNet": of(
            "UperNetForSemanticSegmentation", hidden_size=32, auxiliary_channels=16,
            auxiliary_in_channels=40, num_labels=CLASSES,
            backbone_config=lambda: hf.ConvNextConfig(
                hidden_sizes=WIDTHS, depths=[1, 1, 2, 1], out_features=stages
            ),
        ),
        "UperNetSwin": of(
            "UperNetForSemanticSegmentation", hidden_size=32, auxiliary_channels=16,
            auxiliary_in_channels=64, num_labels=CLASSES,
            backbone_config=lambda: hf.SwinConfig(**windows),
        ),
        "BEiTSegmenter": of(
            "BeitForSemanticSegmentation", **{**PLAIN, "num_hidden_layers": 4},
            out_indices=[1, 2, 3, 4], auxiliary_channels=16, pool_scales=[1, 2, 3, 6],
        ),
        "MobileViTSegmenter": of(
            "MobileViTForSemanticSegmentation", hidden_sizes=[24, 32, 40], image_size=64,
            neck_hidden_sizes=[8, 16, 24, 32, 40, 48, 64], aspp_out_channels=32, output_stride=16,
            num_labels=CLASSES,
        ),
        "MobileNetV2Segmenter": of(
            "MobileNetV2ForSemanticSegmentation", depth_multiplier=0.35, image_size=64,
            num_labels=CLASSES,
        ),
        "MaskFormer": of(
            "MaskFormerForInstanceSegmentation", fpn_feature_size=32, mask_feature_size=32,
            num_labels=CLASSES, backbone_config=lambda: hf.SwinConfig(**windows),
            decoder_config=lambda: hf.DetrConfig(**_detr(hf)),
        ),
        "Mask2Former": of(
            "Mask2FormerForUniversalSegmentation", **mask2, **decoder, num_queries=8,
            backbone_config=lambda: hf.SwinConfig(**windows),
        ),
        "EoMT": of(
            "EomtForUniversalSegmentation", **{**PLAIN, "num_hidden_layers": 4}, num_blocks=2,
            num_queries=6, num_upscale_blocks=1, num_register_tokens=1,
        ),
        "VitPose": of(
            "VitPoseForPoseEstimation", backbone_config=lambda: hf.VitPoseBackboneConfig(
                hidden_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=[64, 64],
                patch_size=[8, 8], out_features=["stage3"],
            ), num_labels=CLASSES,
        ),
        "SAMVision": of(
            "SamVisionModel", **PLAIN, output_channels=32, mlp_dim=128, window_size=4,
            global_attn_indexes=[2], num_pos_feats=16,
        ),
    }  # fmt: skip


def _detr(hf: Any, first: int = 4) -> dict[str, Any]:
    """Return the sizes of a DETR whose backbone gives the stages from the first on."""
    backbone = hf.ResNetConfig(
        embedding_size=16, hidden_sizes=WIDTHS, depths=[1, 1, 1, 1], layer_type="basic",
        out_features=[f"stage{number}" for number in range(first, 5)],
    )  # fmt: skip
    return {
        "use_timm_backbone": False,
        "backbone": None,
        "use_pretrained_backbone": False,
        "backbone_config": backbone,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "num_queries": 10,
        "dropout": 0.0,
    }


def _detectors(hf: Any) -> Entries:
    def detr(kind: str, **more: Any) -> Entry:
        def make() -> nn.Module:
            model = getattr(hf, kind)
            return model(model.config_class(**{**_detr(hf), **more}))

        return Entry(make, pixels)

    def real_time(kind: str) -> Entry:
        backbone = partial(
            hf.RTDetrResNetConfig, embedding_size=16, hidden_sizes=WIDTHS, depths=[1, 1, 1, 1],
            layer_type="basic", out_features=["stage2", "stage3", "stage4"],
        )  # fmt: skip
        return _of(
            hf, kind, backbone_config=backbone, encoder_hidden_dim=32, d_model=32,
            encoder_in_channels=WIDTHS[1:], encoder_ffn_dim=64, encoder_attention_heads=4,
            decoder_in_channels=[32, 32, 32], decoder_ffn_dim=64, decoder_attention_heads=4,
            decoder_layers=2, num_queries=10, num_denoising=0, num_labels=CLASSES,
        )  # fmt: skip

    return {
        "DETR": detr("DetrForObjectDetection"),
        "DETRSegmenter": detr(
            "DetrForSegmentation", **{**_detr(hf, 1), "encoder_attention_heads": 8}
        ),
        "ConditionalDETR": detr("ConditionalDetrForObjectDetection"),
        "DeformableDETR": detr(
            "DeformableDetrForObjectDetection", num_feature_levels=2, disable_custom_kernels=True
        ),
        "TableTransformer": detr("TableTransformerForObjectDetection"),
        "RTDETR": real_time("RTDetrForObjectDetection"),
        "RTDETRv2": real_time("RTDetrV2ForObjectDetection"),
    }


def _text(hf: Any) -> Entries:
    of = partial(_of, hf)
    distil = {"dim": 48, "n_layers": 3, "n_heads": 4, "hidden_dim": 128, "vocab_size": 50}
    t5 = {"d_model": 48, "num_layers": 3, "num_heads": 4, "d_kv": 12, "d_ff": 128, "vocab_size": 50}
    gpt = {"n_embd": 48, "n_layer": 3, "n_head": 4, "vocab_size": 50, "n_positions": 64}
    ids = partial(tokens, 12, 50)
    return {
        "BERT": of("BertForSequenceClassification", ids, **TEXT),
        "RoBERTa": of("RobertaForSequenceClassification", ids, **TEXT, pad_token_id=1),
        "DistilBERT": of("DistilBertForSequenceClassification", ids, **distil),
        "ELECTRA": of("ElectraForSequenceClassification", ids, **TEXT, embedding_size=32),
        "ALBERT": of("AlbertForSequenceClassification", ids, **TEXT, embedding_size=32),
        "T5Encoder": of("T5EncoderModel", ids, **t5),
        "FlanT5Encoder": of("T5EncoderModel", ids, **t5, feed_forward_proj="gated-gelu"),
        "CLIPText": of(
            "CLIPTextModelWithProjection", ids, **TEXT, projection_dim=32, eos_token_id=49
        ),
        "GPT2": of("GPT2ForSequenceClassification", ids, **gpt, pad_token_id=0),
    }


def _audio(hf: Any) -> Entries:
    of = partial(_of, hf)
    whisper = {
        "d_model": 48, "encoder_layers": 3, "encoder_attention_heads": 4, "encoder_ffn_dim": 128,
        "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "vocab_size": 50,
        "max_source_positions": 30, "num_mel_bins": 20, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, "decoder_start_token_id": 1, "num_labels": CLASSES,
    }  # fmt: skip
    spectrogram = {"num_mel_bins": 32, "max_length": 64, "patch_size": 8}
    return {
        "Whisper": of("WhisperForAudioClassification", _mel, **whisper),
        "Wav2Vec2": of("Wav2Vec2ForSequenceClassification", _wave, **SPEECH),
        "Hubert": of("HubertForSequenceClassification", _wave, **SPEECH),
        "AST": of(
            "ASTForAudioClassification",
            lambda: {"input_values": torch.randn(BATCH, 64, 32)},
            **{**PLAIN, **spectrogram},
        ),
    }


def _mel() -> dict[str, Tensor]:
    return {"input_features": torch.randn(BATCH, 20, 60)}


def _wave() -> dict[str, Tensor]:
    return {"input_values": torch.randn(BATCH, 800)}


# --- segmentation

DECODERS = {
    "Unet": "mit_b0", "UnetPlusPlus": "efficientnet-b0", "MAnet": "mit_b0",
    "Linknet": "efficientnet-b0", "FPN": "mit_b0", "PSPNet": "efficientnet-b0",
    "PAN": "efficientnet-b0", "DeepLabV3": "efficientnet-b0", "DeepLabV3Plus": "efficientnet-b0",
    "UPerNet": "mit_b0", "Segformer": "mit_b0",
}  # fmt: skip


def _smp(smp: Any) -> Entries:
    """Return every decoder with three encoders."""

    def of(decoder: str, encoder: str, size: int = 64, **more: Any) -> Entry:
        given = {"encoder_name": encoder, "encoder_weights": None, "classes": CLASSES, **more}
        return Entry(lambda: getattr(smp, decoder)(**given), partial(images, size))

    found = {
        f"{decoder}-{encoder}": of(decoder, encoder, 128 if decoder == "PAN" else 64)
        for decoder, third in DECODERS.items()
        for encoder in ("resnet18", "mobilenet_v2", third)
    }
    auxiliary = {"classes": CLASSES, "pooling": "avg"}
    return found | {
        "Unet-scse": of("Unet", "resnet18", decoder_attention_type="scse", aux_params=auxiliary),
        "DPT-vit_tiny": of("DPT", "tu-vit_tiny_patch16_224", 224, decoder_fusion_channels=32),
    }


# --- medical images


def _monai(nets: Any) -> Entries:
    slices = partial(images, 64, 1)
    volumes = partial(images, 32, 1, dims=3)
    flat = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
    steps = {"channels": (8, 16, 32, 64), "strides": (2, 2, 2)}

    def of(kind: str, inputs: Callable[[], Any] = slices, **sizes: Any) -> Entry:
        return Entry(lambda: getattr(nets, kind)(**sizes), inputs)

    unet, basic = {**flat, **steps}, {**flat, "features": (8, 8, 16, 32, 64, 8)}
    levels = {"kernel_size": [3, 3, 3, 3], "strides": [1, 2, 2, 2], "filters": [8, 16, 32, 64]}
    dyn = {**flat, **levels, "upsample_kernel_size": [2, 2, 2]}
    vit = {"img_size": 64, "hidden_size": 48, "mlp_dim": 128, "num_heads": 4, "spatial_dims": 2}
    tokens_of = {"in_channels": 1, "patch_size": 8, "num_layers": 3, **vit}
    swin = {**flat, "feature_size": 12, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 4, 4)}
    resnet = {"layers": [1, 1, 1, 1], "block_inplanes": [8, 16, 32, 64], "spatial_dims": 2}
    resnet |= {"n_input_channels": 1, "num_classes": CLASSES}
    ldm = {"num_res_blocks": (1, 1), "channels": (16, 32), "attention_levels": (False, True)}
    ldm |= {"norm_num_groups": 8}
    return {
        "UNet": of("UNet", **unet),
        "UNet-residual": of("UNet", **unet, num_res_units=2, norm="batch"),
        "UNet-3d": of("UNet", volumes, **{**unet, "spatial_dims": 3}, norm="batch"),
        "BasicUNet": of("BasicUNet", **basic),
        "BasicUNet-upsample": of("BasicUNet", **basic, upsample="nontrainable", norm="batch"),
        "BasicUNetPlusPlus": of("BasicUNetPlusPlus", **basic),
        "AttentionUnet": of("AttentionUnet", **unet),
        "SegResNet": of("SegResNet", **flat, init_filters=8),
        "SegResNet-batch": of("SegResNet", **flat, init_filters=8, norm="batch"),
        "SegResNetDS": of("SegResNetDS", **flat, init_filters=8),
        "UNETR": of("UNETR", **{**flat, **vit, "feature_size": 8, "img_size": 64}),
        "SwinUNETR": of("SwinUNETR", **swin),
        "SwinUNETR-v2": of("SwinUNETR", **swin, use_v2=True),
        "VNet": of("VNet", **flat, act="relu", dropout_prob_down=None, dropout_prob_up=(None, 0.0)),
        "DynUNet": of("DynUNet", **dyn),
        "DynUNet-residual": of("DynUNet", **dyn, res_block=True, norm_name="batch"),
        "DenseNet121": of("DenseNet121", **flat, init_features=16, growth_rate=8),
        "ViT": of("ViT", **tokens_of, classification=True),
        "ViTAutoEnc": of("ViTAutoEnc", **{**tokens_of, "patch_size": 16}),
        "ResNet": of("ResNet", **resnet, block="basic"),
        "ResNet-bottleneck": of("ResNet", **resnet, block="bottleneck", shortcut_type="A"),
        "SEResNet50": of(
            "SEResNet50", layers=(1, 1, 1, 1), spatial_dims=2, in_channels=1, num_classes=CLASSES
        ),
        "HighResNet": of("HighResNet", **flat),
        "FlexibleUNet": of(
            "FlexibleUNet", in_channels=1, out_channels=2, backbone="efficientnet-b0",
            decoder_channels=(64, 32, 32, 16, 16),
        ),
        "AutoEncoder": of("AutoEncoder", **{**unet, "strides": (2, 2, 2, 1)}, num_res_units=1),
        "MedNeXt": of("MedNeXt", **flat, init_filters=8, kernel_size=3),
        "AutoencoderKL": of("AutoencoderKL", **flat, **ldm, latent_channels=3),
        "DiffusionModelUNet": of(
            "DiffusionModelUNet", lambda: (*slices(), torch.tensor([3, 17])), **flat, **ldm
        ),
        "VQVAE": of(
            "VQVAE", **flat, channels=(16, 32), num_res_layers=1, num_res_channels=(16, 32),
            downsample_parameters=((2, 4, 1, 1),) * 2, upsample_parameters=((2, 4, 1, 1, 0),) * 2,
            embedding_dim=8,
        ),
        "Quicknat": of("Quicknat", num_classes=3, num_channels=1, num_filters=16),
        "RegUNet": of(
            "RegUNet", spatial_dims=2, in_channels=1, num_channel_initial=8, depth=2,
            out_channels=2,
        ),
    }  # fmt: skip


# --- detectors of one stage


def _ultralytics(tasks: Any) -> Entries:
    def of(kind: str, file: str) -> Entry:
        model = getattr(tasks, kind)
        return Entry(lambda: model(file, verbose=False), partial(images, 128))

    detectors = {
        "v3-tiny": "yolov3-tiny", "v5n": "yolov5n", "v6n": "yolov6n", "v8n": "yolov8n",
        "v8n-ghost": "yolov8n-ghost", "v9t": "yolov9t", "v10n": "yolov10n", "11n": "yolo11n",
        "12n": "yolo12n", "26n": "yolo26n",
    }  # fmt: skip
    found = {name: of("DetectionModel", f"{file}.yaml") for name, file in detectors.items()}
    return found | {
        "v8n-seg": of("SegmentationModel", "yolov8n-seg.yaml"),
        "v8n-cls": of("ClassificationModel", "yolov8n-cls.yaml"),
        "v8n-pose": of("PoseModel", "yolov8n-pose.yaml"),
        "v8n-obb": of("OBBModel", "yolov8n-obb.yaml"),
        "11n-cls": of("ClassificationModel", "yolo11n-cls.yaml"),
    }


# --- classifiers


def _open_clip(clip: Any) -> Entries:
    plain = {"layers": 3, "width": 48, "head_width": 12, "patch_size": 8}

    def of(*, size: int = 64, quick_gelu: bool = False, **tower: Any) -> Entry:
        tower["image_size"] = size
        return Entry(lambda: clip._build_vision_tower(32, tower, quick_gelu), partial(images, size))

    text = {"context_length": 12, "vocab_size": 50, "width": 48, "heads": 4, "layers": 3}
    return {
        "RN50": of(layers=(1, 1, 2, 1), width=16),
        "ViT": of(**plain),
        "ViT-quickgelu": of(quick_gelu=True, **plain),
        "ViT-average": of(**plain, pool_type="avg", ls_init_value=0.1, no_ln_pre=True),
        "ViT-custom": of(**plain, qk_norm=True, scale_attn_inner=True, scale_fc=True),
        "CoCa": of(**plain, attentional_pool=True, attn_pooler_queries=4, output_tokens=True),
        "ConvNeXt": of(timm_model_name="convnext_atto", timm_proj="mlp"),
        "SigLIP": of(
            timm_model_name="vit_tiny_patch16_224", timm_pool="map", timm_proj="none", size=224
        ),
        "text": Entry(
            lambda: clip._build_text_tower(32, text), lambda: (torch.randint(1, 50, (BATCH, 12)),)
        ),
        "CLIP": Entry(
            lambda: clip.CLIP(32, {**plain, "image_size": 64}, text),
            lambda: (*images(), torch.randint(1, 50, (BATCH, 12))),
        ),
    }


DRAWN = 25
NO_IMAGES = {
    "jasper", "jasperdr", "quartznet", "voca", "nvpattexp", "visemenet", "raft", "propainter",
    "propainter_ip", "propainter_rfc", "lffd",
}  # fmt: skip


def _pytorchcv(provider: Any) -> Entries:
    """Return the first models of families that are drawn, always the same ones."""
    families: dict[str, str] = {}
    for name, builder in provider._models.items():
        families.setdefault(builder.__module__.rpartition(".")[2], name)
    drawn = random.Random(0).sample(sorted(set(families) - NO_IMAGES), DRAWN)
    return {families[family]: _drawn(provider, families[family]) for family in sorted(drawn)}


def _drawn(provider: Any, name: str) -> Entry:
    size = 299 if name.startswith(("inception", "xception", "polynet", "nasnet")) else 224
    sizes: dict[str, Any] = {}
    if name.endswith(("cifar10", "cifar100", "svhn")):
        size = 32
    elif name.endswith(("cityscapes", "coco", "voc")):  # these take smaller images
        size = 128
        sizes["in_size"] = (size, size)
    if "pose" in name:  # the places of the joints are whole numbers
        sizes["return_heatmap"] = True
    return Entry(partial(provider.get_model, name, **sizes), partial(images, size))


def _vit_pytorch(_: Any) -> Entries:
    plain = {
        "image_size": 64, "patch_size": 8, "num_classes": CLASSES, "dim": 48, "depth": 3,
        "heads": 4, "mlp_dim": 128,
    }  # fmt: skip
    narrow = {**plain, "dim_head": 16}
    stages = {"dim": (32, 32, 64, 64), "depth": (1, 1, 1, 1), "num_classes": CLASSES}

    def of(module: str, kind: str, inputs: Callable[[], Any] = images, **sizes: Any) -> Entry:
        def make() -> nn.Module:
            return getattr(import_module(f"vit_pytorch.{module}"), kind)(**sizes)

        return Entry(make, inputs)

    return {
        "ViT": of("vit", "ViT", **narrow),
        "SimpleViT": of("simple_vit", "SimpleViT", **narrow),
        "SimpleViT-registers": of("simple_vit_with_register_tokens", "SimpleViT", **narrow),
        "SimpleViT-qknorm": of("simple_vit_with_qk_norm", "SimpleViT", **narrow),
        "SimpleViT-fft": of(
            "simple_vit_with_fft", "SimpleViT", **narrow, freq_patch_size=8
        ),
        "CaiT": of("cait", "CaiT", **narrow, cls_depth=1),
        "DeepViT": of("deepvit", "DeepViT", **narrow),
        "CCT": of(
            "cct", "CCT", img_size=64, embedding_dim=48, num_layers=3, num_heads=4, mlp_ratio=2.0,
            num_classes=CLASSES,
        ),
        "CrossViT": of(
            "cross_vit", "CrossViT", image_size=64, num_classes=CLASSES, sm_dim=32, lg_dim=48,
            sm_patch_size=8, lg_patch_size=16, depth=2, sm_enc_heads=4, sm_enc_mlp_dim=64,
            sm_enc_dim_head=8, lg_enc_depth=2, lg_enc_heads=4, lg_enc_mlp_dim=64,
            lg_enc_dim_head=12, cross_attn_heads=4, cross_attn_dim_head=8,
        ),
        "CrossFormer": of(
            "crossformer", "CrossFormer", partial(images, 128), **stages,
            global_window_size=(4, 2, 2, 1), local_window_size=4,
        ),
        "CvT": of(
            "cvt", "CvT", num_classes=CLASSES, s1_emb_dim=16, s2_emb_dim=32, s2_heads=2,
            s2_depth=1, s3_emb_dim=48, s3_heads=3, s3_depth=2,
        ),
        "LeViT": of(
            "levit", "LeViT", image_size=64, num_classes=CLASSES, stages=2, dim=(32, 48), depth=1,
            heads=(2, 3), mlp_mult=2, dim_key=8, dim_value=16,
        ),
        "MaxViT": of(
            "max_vit", "MaxViT", num_classes=CLASSES, dim_conv_stem=16, dim=16, dim_head=8,
            depth=(1, 1), window_size=4,
        ),
        "MobileViT": of(
            "mobile_vit", "MobileViT", image_size=(64, 64), dims=[32, 40, 48], num_classes=CLASSES,
            channels=[8, 16, 24, 24, 32, 32, 40, 40, 48, 48, 96], depths=(1, 1, 1),
        ),
        "NesT": of(
            "nest", "NesT", image_size=64, patch_size=4, num_classes=CLASSES, dim=32, heads=2,
            num_hierarchies=3, block_repeats=(1, 1, 1), dim_head=16,
        ),
        "ParallelViT": of("parallel_vit", "ViT", **narrow),
        "PiT": of("pit", "PiT", **{**narrow, "depth": (1, 1, 1)}),
        "RegionViT": of(
            "regionvit", "RegionViT", partial(images, 112), **stages
        ),
        "RvT": of("rvt", "RvT", **narrow),
        "ScalableViT": of(
            "scalable_vit", "ScalableViT", num_classes=CLASSES, dim=16, heads=(1, 2, 2, 4),
            depth=(1, 1, 1, 1), ssa_dim_key=(8, 8, 8, 8), ssa_dim_value=(8, 8, 8, 8),
            window_size=(4, 4, None, None), reduction_factor=(4, 2, 1, 1), iwsa_dim_key=8,
            iwsa_dim_value=8,
        ),
        "SepViT": of(
            "sep_vit", "SepViT", partial(images, 112), num_classes=CLASSES, dim=16, dim_head=8,
            heads=(1, 2, 2), depth=(1, 1, 1),
        ),
        "T2T": of(
            "t2t", "T2TViT", image_size=64, num_classes=CLASSES, dim=48, depth=2, heads=4,
            mlp_dim=96, dim_head=12,
        ),
        "TwinsSVT": of(
            "twins_svt", "TwinsSVT", partial(images, 128), num_classes=CLASSES,
            **{f"s{n}_emb_dim": 16 * n for n in (1, 2, 3, 4)},
            **{f"s{n}_depth": 1 for n in (1, 2, 3, 4)},
            **{f"s{n}_local_patch_size": 4 for n in (1, 2, 3)}, s4_local_patch_size=4,
            **{f"s{n}_global_k": 4 for n in (1, 2, 3, 4)},
        ),
        "SmallDatasetViT": of("vit_for_small_dataset", "ViT", **narrow),
        "XCiT": of("xcit", "XCiT", **narrow, cls_depth=1),
        "ViT3d": of(
            "vit_3d", "ViT", lambda: (torch.randn(BATCH, 3, 4, 32, 32),), image_size=32,
            image_patch_size=8, frames=4, frame_patch_size=2, num_classes=CLASSES, dim=48, depth=2,
            heads=4, mlp_dim=96, dim_head=12,
        ),
        "nViT": of("normalized_vit", "nViT", **narrow),
    }  # fmt: skip


def _facenet(facenet: Any) -> Entries:
    parts = import_module("facenet_pytorch.models.mtcnn")
    faces = partial(facenet.InceptionResnetV1, pretrained=None, num_classes=CLASSES)
    return {
        "InceptionResnetV1": Entry(faces, partial(images, 96)),
        "InceptionResnetV1-classify": Entry(partial(faces, classify=True), partial(images, 96)),
        "PNet": Entry(partial(parts.PNet, pretrained=False), partial(images, 48)),
        "RNet": Entry(partial(parts.RNet, pretrained=False), partial(images, 24)),
        "ONet": Entry(partial(parts.ONet, pretrained=False), partial(images, 48)),
    }


def _efficientnet(package: Any) -> Entries:
    made = partial(package.EfficientNet.from_name, "efficientnet-b0", num_classes=CLASSES)
    return {
        "b0": Entry(partial(made, image_size=64), images),
        "b0-dynamic": Entry(partial(made, image_size=None), images),
    }


def _xray(xray: Any) -> Entries:
    pictures = partial(images, 64, 1)
    auto = import_module("torchxrayvision.autoencoders")
    blocks = {"growth_rate": 16, "block_config": (2, 2, 2, 2), "num_init_features": 32}

    def autoencoder() -> nn.Module:
        model = auto._ResNetAE(auto.Bottleneck, auto.DeconvBottleneck, [1, 1, 1, 1], 1)
        model.weights = None  # which its __repr__ asks for
        return model

    return {
        "DenseNet": Entry(lambda: xray.models.DenseNet(weights=None, **blocks), pictures),
        "ResNetAE": Entry(autoencoder, partial(images, 224, 1)),
    }


# --- super-resolution and restoration


def _super_image(package: Any) -> Entries:
    def of(name: str, **sizes: Any) -> Entry:
        config, model = getattr(package, f"{name}Config"), getattr(package, f"{name}Model")
        return Entry(lambda: model(config(scale=2, **sizes)), partial(images, 16))

    return {
        "Edsr": of("Edsr", n_resblocks=3, n_feats=24),
        "Carn": of("Carn"),
        "Msrn": of("Msrn", n_blocks=2, n_feats=16),
        "Rcan": of("Rcan", n_resgroups=2, n_resblocks=2, n_feats=32),
        "Han": of("Han", n_resgroups=10, n_resblocks=1, n_feats=16, reduction=4),
        "A2n": of("A2n", nf=16, unf=12, nb=3),
        "Pan": of("Pan", nf=16, unf=12, nb=3),
        "Awsrn": of("Awsrn", n_resblocks=2, block_feats=32, n_feats=16),
        "Ddbpn": of("Ddbpn"),
    }


def _spandrel(_: Any) -> Entries:
    def of(folder: str, kind: str = "", size: int = 32, **sizes: Any) -> Entry:
        def make() -> nn.Module:
            module = import_module(f"spandrel.architectures.{folder}")
            return getattr(module, kind or folder)(**sizes)

        return Entry(make, partial(images, size))

    return {
        "SwinIR": of(
            "SwinIR", img_size=16, size=16, embed_dim=24, depths=[2, 2], num_heads=[2, 2],
            window_size=4, upscale=2, upsampler="pixelshuffle",
        ),
        "HAT": of(
            "HAT", img_size=16, size=16, embed_dim=24, depths=[2, 2], num_heads=[2, 2],
            window_size=4, upscale=2, upsampler="pixelshuffle", squeeze_factor=4,
        ),
        "NAFNet": of(
            "NAFNet", width=8, middle_blk_num=1, enc_blk_nums=[1, 1], dec_blk_nums=[1, 1]
        ),
        "RCAN": of("RCAN", scale=2, n_resgroups=2, n_resblocks=2, n_feats=32),
        "ESRGAN": of("ESRGAN", num_filters=16, num_blocks=2, scale=2),
        "DnCNN": of("DnCNN", in_nc=3, out_nc=3, nc=24, nb=5),
        "DRUNet": of("DRUNet", in_nc=3, out_nc=3, nc=[8, 16, 24, 32], nb=1),
        "SCUNet": of("SCUNet", config=[1, 1, 1, 1, 1, 1, 1], dim=64, size=64),
        "SPAN": of("SPAN", num_in_ch=3, num_out_ch=3, feature_channels=24, upscale=2),
        "Compact": of("Compact", num_feat=24, num_conv=4, upscale=2),
        "SAFMN": of("SAFMN", dim=24, n_blocks=3, upscaling_factor=2),
        "OmniSR": of(
            "OmniSR", num_feat=16, res_num=1, block_num=1, up_scale=2, window_size=8,
        ),
        "PLKSR": of("PLKSR", dim=24, n_blocks=3, upscaling_factor=2),
        "RealPLKSR": of("PLKSR", "RealPLKSR", dim=24, n_blocks=3, upscaling_factor=2),
        "FBCNN": of("FBCNN", nc=[8, 16, 24, 512], nb=1),
        "Uformer": of(
            "Uformer", img_size=64, size=64, embed_dim=8, depths=[1] * 9,
            num_heads=[1, 1, 2, 2, 2, 2, 2, 1, 1], win_size=4,
        ),
        "DAT": of(
            "DAT", img_size=16, size=16, embed_dim=64, depth=[2], num_heads=[4], upscale=2,
            split_size=[2, 4],
        ),
    }  # fmt: skip


# --- diffusion


def _diffusers(package: Any) -> Entries:
    def of(kind: str, inputs: Callable[[], Any], **sizes: Any) -> Entry:
        return Entry(lambda: getattr(package, kind)(**sizes), inputs)

    blocks = {"block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1}
    down = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D")}
    up = {"up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    crossed = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32, "attention_head_dim": 8, "sample_size": 16,
    }  # fmt: skip
    coder = {
        "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
        "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
    }
    transformer = {"num_attention_heads": 4, "attention_head_dim": 12, "num_layers": 2}
    return {
        "UNet2DModel": of(
            "UNet2DModel", _noisy, **blocks, **down, **up, attention_head_dim=8, sample_size=32
        ),
        "UNet2DConditionModel": of("UNet2DConditionModel", _prompted, **blocks, **crossed),
        "AutoencoderKL": of("AutoencoderKL", images, **blocks, **coder, latent_channels=4),
        "VQModel": of("VQModel", images, **blocks, **coder, latent_channels=4),
        "AutoencoderTiny": of(
            "AutoencoderTiny", images, encoder_block_out_channels=(16, 16),
            decoder_block_out_channels=(16, 16), num_encoder_blocks=(1, 2),
            num_decoder_blocks=(2, 1),
        ),
        "DiT": of(
            "DiTTransformer2DModel", _classed, **transformer, in_channels=4, sample_size=16,
            patch_size=2, num_embeds_ada_norm=1000,
        ),
        "Transformer2D": of(
            "Transformer2DModel", partial(images, 16, 16), **transformer, in_channels=16,
            norm_num_groups=8,
        ),
    }  # fmt: skip


def _noisy() -> dict[str, Any]:
    return {"sample": torch.randn(BATCH, 3, 32, 32), "timestep": torch.tensor([3, 17])}


def _prompted() -> dict[str, Any]:
    noisy = {"sample": torch.randn(BATCH, 4, 16, 16), "timestep": torch.tensor([3, 17])}
    return {**noisy, "encoder_hidden_states": torch.randn(BATCH, 7, 32)}


def _classed() -> dict[str, Any]:
    noisy = {"hidden_states": torch.randn(BATCH, 4, 16, 16), "timestep": torch.tensor([3, 17])}
    return {**noisy, "class_labels": torch.tensor([1, 5])}


ZOOS: dict[str, Zoo] = {
    "transformers": Zoo("transformers", _transformers),
    "smp": Zoo("segmentation_models_pytorch", _smp),
    "monai": Zoo("monai.networks.nets", _monai),
    "ultralytics": Zoo("ultralytics.nn.tasks", _ultralytics),
    "open_clip": Zoo("open_clip.model", _open_clip),
    "pytorchcv": Zoo("pytorchcv.model_provider", _pytorchcv),
    "vit_pytorch": Zoo("vit_pytorch", _vit_pytorch),
    "facenet": Zoo("facenet_pytorch", _facenet),
    "efficientnet": Zoo("efficientnet_pytorch", _efficientnet),
    "xray": Zoo("torchxrayvision", _xray),
    "super_image": Zoo("super_image", _super_image),
    "spandrel": Zoo("spandrel", _spandrel),
    "diffusers": Zoo("diffusers", _diffusers),
}
"""All zoos, by the word that stands before the names of their models."""
