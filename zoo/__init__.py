"""Our own small networks in published shapes: what the tests and benchmarks prune.

`resnet`, `mobilenet_v2` and the other constructors return ordinary freshly initialised modules; `ZOO` holds settled
instances of them. Tags say what a network exercises; ``core`` marks plain feed-forward use of convolutional and fully
connected layers with batch norm or none, in which every layer that is not tied to the input or output is prunable.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from zoo.concat import UNet, densenet, inception
from zoo.convnext import convnext
from zoo.mobile import mobilenet_v1, mobilenet_v2, mobilenet_v3, shufflenet_v2
from zoo.resnet import bottleneck_resnet, preactivation_resnet, resnet
from zoo.settle import Shapes, draw, settled
from zoo.vgg import DilatedNet, mlp, vgg, volume_net
from zoo.wiring import Detector, SharedNet, TiedAutoencoder, TiedNet, TwoInputs

__all__ = ["ZOO", "Entry", "draw", "mobilenet_v2", "resnet", "settled", "vgg"]


@dataclass(frozen=True)
class Entry:
    """One network of the zoo.

    Attributes:
        name: Its key in `ZOO`.
        build: Makes the same network each time, in eval mode, without touching the global random state.
        inputs: Makes the same positional arguments each time, batch size 2.
        tags: What the network exercises.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    tags: frozenset[str]


def _entry(name: str, make: Callable[[], nn.Module], tags: str, *shapes: tuple[int, ...]) -> Entry:
    sample: Shapes = shapes or ((3, 16, 16),)
    return Entry(name, partial(settled, make, sample), partial(draw, sample), frozenset(tags.split()))


_SMALL_V2 = ((1, 8, 1, 1), (4, 12, 2, 2), (4, 16, 2, 2))
_ENTRIES = (
    _entry("vgg_bn", vgg, "core flatten inplace"),
    _entry("vgg_plain", partial(vgg, batch_norm=False), "core flatten inplace"),
    _entry("resnet20", partial(resnet, 20, width=8), "core residual"),
    _entry("resnet56", partial(resnet, 56, width=4), "core residual"),
    _entry("resnet20_padded", partial(resnet, 20, width=8, pad=True), "residual padded"),
    _entry("resnet14_groupnorm", partial(resnet, 14, width=16, norm=partial(nn.GroupNorm, 4)), "residual groupnorm"),
    _entry("bottleneck_resnet", bottleneck_resnet, "core residual inplace"),
    _entry("preactivation_resnet", preactivation_resnet, "core residual"),
    _entry("resnext", partial(bottleneck_resnet, width=16, groups=4, expansion=2), "core residual inplace grouped"),
    _entry("mobilenet_v1", mobilenet_v1, "core depthwise"),
    _entry("mobilenet_v2", partial(mobilenet_v2, _SMALL_V2, stem=8, head=48), "core depthwise residual"),
    _entry("mobilenet_v3", mobilenet_v3, "core depthwise residual squeeze_excite"),
    _entry("shufflenet_v2", shufflenet_v2, "depthwise concat shuffle"),
    _entry("densenet", densenet, "core concat"),
    _entry("inception", inception, "core concat"),
    _entry("unet", UNet, "core concat transposed map_output"),
    _entry("convnext", convnext, "depthwise residual layernorm"),
    _entry("dilated_1d", DilatedNet, "core residual one_d", (4, 32)),
    _entry("volume_3d", volume_net, "core three_d", (1, 8, 8, 8)),
    _entry("mlp", mlp, "core", (64,)),
    _entry("shared", SharedNet, "residual shared"),
    _entry("tied", TiedNet, "tied"),
    _entry("tied_autoencoder", TiedAutoencoder, "tied transposed map_output"),
    _entry("two_inputs", TwoInputs, "concat multi_input", (3, 16, 16), (6,)),
    _entry("detector", Detector, "shared dict_output map_output"),
)
ZOO: dict[str, Entry] = {entry.name: entry for entry in _ENTRIES}
