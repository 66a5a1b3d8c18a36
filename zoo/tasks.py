"""`TASK_ZOO`: networks of our own for other tasks than classifying images, in published shapes scaled down."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from zoo.attention import CrossAttention, EinsumVit, Gpt, Mixer, TransformerClassifier
from zoo.audio import (
    Conformer,
    ConvTasNet,
    KeywordSpotter,
    PitchTracker,
    SpeakerTdnn,
    SpectrogramCrnn,
    Vocoder,
    WaveNet,
    WaveUNet,
)
from zoo.detection import Ssd, Yolo
from zoo.entries import AnyEntry, settled_parameters
from zoo.graphs import ContinuousFilter, EdgeConv, Gat, Gcn, Gin, GraphTransformer, MessagePassing, RelationalGcn, Sage
from zoo.maps import (
    CentrePoints,
    Correlation,
    Disparity,
    Fcn,
    HighResolution,
    MaskQueries,
    NestedUNet,
    PspNet,
    SegNet,
    SharedHead,
    TokenMaps,
)
from zoo.pixels import AttentionUNet, DeepLab, Edsr, RealEsrgan
from zoo.series import ConvGru, FourierOperator, LstmForecaster, NBeats, Tcn
from zoo.sets import DeepFm, Dlrm, PointNet, TwoTower
from zoo.text import (
    AlignedDecoder,
    CharHighway,
    Decomposable,
    FewKeys,
    LinearAttention,
    RelativeBias,
    Rotary,
    SharedLayers,
    SpatialGate,
    Tagger,
    TextCnn,
)

Argument = tuple[int, ...] | tuple[tuple[int, ...], int]  # the shape of a sample; with a bound if it holds indices


def _inputs(arguments: tuple[Argument, ...], batch: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(_input(argument, batch, generator) for argument in arguments)


def _input(argument: Argument, batch: int, generator: torch.Generator) -> Tensor:
    match argument:
        case (tuple(shape), int(bound)):
            return torch.randint(bound, (batch, *shape), generator=generator)
        case shape:
            return torch.randn(batch, *shape, generator=generator)


def _entry(name: str, make: Callable[[], nn.Module], tags: str, *arguments: Argument) -> AnyEntry:
    inputs = partial(_inputs, arguments)
    return AnyEntry(name, partial(settled_parameters, make, inputs), inputs, frozenset(tags.split()))


_ENTRIES = (
    _entry("yolo", Yolo, "detection cnn concat split map_output", (3, 32, 32)),
    _entry("ssd", Ssd, "detection cnn map_output", (3, 32, 32)),
    _entry("deeplab", DeepLab, "segmentation cnn concat map_output", (3, 32, 32)),
    _entry("attention_unet", AttentionUNet, "segmentation cnn concat transposed map_output", (3, 16, 16)),
    _entry("edsr", Edsr, "super_resolution cnn residual pixel_shuffle map_output", (3, 12, 12)),
    _entry("real_esrgan", RealEsrgan, "super_resolution cnn concat pixel_shuffle map_output", (3, 12, 12)),
    _entry("dlrm", Dlrm, "recommendation multi_input embedding_bag", (13,), ((4, 3), 30)),
    _entry("deepfm", DeepFm, "recommendation", ((6,), 40)),
    _entry("two_tower", TwoTower, "recommendation multi_input", ((), 40), (6,), ((), 30)),
    _entry("pointnet", PointNet, "points one_d", (3, 40)),
    _entry("tcn", Tcn, "time_series one_d residual weight_norm", (4, 24)),
    _entry("lstm_forecaster", LstmForecaster, "time_series recurrent", (12, 5)),
    _entry("nbeats", NBeats, "time_series residual", (24,)),
    _entry("conv_gru", ConvGru, "time_series recurrent one_d", (16, 20)),
    _entry("fourier_operator", FourierOperator, "time_series one_d complex map_output", (1, 32)),
    _entry("transformer_classifier", TransformerClassifier, "transformer mha", ((10,), 50)),
    _entry("cross_attention", CrossAttention, "transformer mha dict_output", (3, 32, 32)),
    _entry("einsum_vit", EinsumVit, "transformer einsum", (3, 16, 16)),
    _entry("gpt", Gpt, "transformer fused tied", ((10,), 50)),
    _entry("swiglu_mixer", Mixer, "glu", (3, 16, 16)),
    _entry("gcn", Gcn, "graph", (7, 6), (7, 7)),
    _entry("graph_sage", Sage, "graph flat", (6,), ((2,), 1000)),
    _entry("gat", Gat, "graph flat", (6,), ((2,), 1000)),
    _entry("gin", Gin, "graph flat concat", (6,), ((2,), 1000)),
    _entry("edge_conv", EdgeConv, "graph points concat", (3, 12)),
    _entry("relational_gcn", RelationalGcn, "graph einsum", (7, 6), (3, 7, 7)),
    _entry("message_passing", MessagePassing, "graph recurrent flat", (6,), ((2,), 1000)),
    _entry("continuous_filter", ContinuousFilter, "graph", ((6,), 10), (6, 3)),
    _entry("graph_transformer", GraphTransformer, "graph transformer", (7, 6), (7, 7)),
    _entry("wavenet", WaveNet, "audio one_d residual", (1, 40)),
    _entry("wave_unet", WaveUNet, "audio one_d recurrent glu transposed", (1, 64)),
    _entry("conv_tasnet", ConvTasNet, "audio one_d transposed", (1, 64)),
    _entry("pitch_tracker", PitchTracker, "audio flatten", (1, 64)),
    _entry("conformer", Conformer, "audio transformer mha glu", (14, 12)),
    _entry("spectrogram_crnn", SpectrogramCrnn, "audio recurrent", (1, 96)),
    _entry("speaker_tdnn", SpeakerTdnn, "audio one_d concat split", (12, 20)),
    _entry("vocoder", Vocoder, "audio one_d transposed weight_norm residual", (10, 8)),
    _entry("keyword_spotter", KeywordSpotter, "audio cnn residual", (1, 16, 20)),
    _entry("text_cnn", TextCnn, "text concat", ((10,), 50)),
    _entry("char_highway", CharHighway, "text recurrent concat glu", ((4, 6), 40)),
    _entry("tagger", Tagger, "text recurrent packed", ((9,), 50)),
    _entry("decomposable", Decomposable, "text multi_input", ((7,), 50), ((9,), 50)),
    _entry("shared_layers", SharedLayers, "text transformer mha shared", ((10,), 50)),
    _entry("rotary", Rotary, "text transformer tied", ((10,), 50)),
    _entry("relative_bias", RelativeBias, "text transformer multi_input", ((9,), 50), ((7,), 50)),
    _entry("linear_attention", LinearAttention, "text transformer einsum", ((10,), 50)),
    _entry("spatial_gate", SpatialGate, "text glu", ((10,), 50)),
    _entry("few_keys", FewKeys, "text transformer", ((10,), 50)),
    _entry("aligned_decoder", AlignedDecoder, "text recurrent", ((8,), 40)),
    _entry("fcn", Fcn, "segmentation cnn transposed map_output", (3, 32, 32)),
    _entry("segnet", SegNet, "segmentation cnn map_output", (3, 16, 16)),
    _entry("pspnet", PspNet, "segmentation cnn concat map_output", (3, 16, 16)),
    _entry("nested_unet", NestedUNet, "segmentation cnn concat map_output", (3, 16, 16)),
    _entry("high_resolution", HighResolution, "pose cnn residual map_output", (3, 32, 32)),
    _entry("shared_head", SharedHead, "detection cnn shared map_output", (3, 32, 32)),
    _entry("centre_points", CentrePoints, "detection cnn transposed dict_output", (3, 32, 32)),
    _entry("disparity", Disparity, "depth cnn concat map_output", (3, 16, 16)),
    _entry("correlation", Correlation, "flow cnn multi_input shared map_output", (3, 16, 16), (3, 16, 16)),
    _entry("token_maps", TokenMaps, "depth transformer mha map_output", (3, 32, 32)),
    _entry("mask_queries", MaskQueries, "segmentation transformer mha einsum map_output", (3, 16, 16)),
)
TASK_ZOO: dict[str, AnyEntry] = {entry.name: entry for entry in _ENTRIES}
