"""`TASK_ZOO`: networks of our own for other tasks than classifying images, in published shapes scaled down."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from tests.zoo.attention import CrossAttention, EinsumVit, Gpt, Mixer, TransformerClassifier
from tests.zoo.detection import Ssd, Yolo
from tests.zoo.entries import AnyEntry, settled_parameters
from tests.zoo.pixels import AttentionUNet, DeepLab, Edsr, RealEsrgan
from tests.zoo.series import ConvGru, LstmForecaster, NBeats, Tcn
from tests.zoo.sets import DeepFm, Dlrm, PointNet, TwoTower

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
    _entry("transformer_classifier", TransformerClassifier, "transformer mha", ((10,), 50)),
    _entry("cross_attention", CrossAttention, "transformer mha dict_output", (3, 32, 32)),
    _entry("einsum_vit", EinsumVit, "transformer einsum", (3, 16, 16)),
    _entry("gpt", Gpt, "transformer fused tied", ((10,), 50)),
    _entry("swiglu_mixer", Mixer, "glu", (3, 16, 16)),
)
TASK_ZOO: dict[str, AnyEntry] = {entry.name: entry for entry in _ENTRIES}
