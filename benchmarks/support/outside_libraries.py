"""Import timm and torchvision without torchvision's compiled library, whose operators are only named here."""

from __future__ import annotations

import importlib.util

import torch

BOX = "Tensor dets, Tensor scores, float iou_threshold"
POOL = "Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width"
GRAD = POOL.replace("input", "grad")
SIZES = "SymInt batch_size, SymInt channels, SymInt height, SymInt width"
SHAPE = "SymInt stride_h, SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w"
DEFORM = f"Tensor mask, Tensor bias, {SHAPE}, SymInt groups, SymInt offset_groups, bool use_mask"
OPERATORS = (
    f"nms({BOX}) -> Tensor",
    f"qnms({BOX}) -> Tensor",
    f"roi_align({POOL}, int sampling_ratio, bool aligned) -> Tensor",
    f"ps_roi_align({POOL}, int sampling_ratio) -> (Tensor, Tensor)",
    f"roi_pool({POOL}) -> (Tensor, Tensor)",
    f"ps_roi_pool({POOL}) -> (Tensor, Tensor)",
    f"deform_conv2d(Tensor input, Tensor weight, Tensor offset, {DEFORM}) -> Tensor",
    f"_roi_align_backward({GRAD}, {SIZES}, int sampling_ratio, bool aligned) -> Tensor",
    f"_ps_roi_align_backward({GRAD}, Tensor mapping, int sampling_ratio, {SIZES}) -> Tensor",
    f"_roi_pool_backward({GRAD}, Tensor argmax, {SIZES}) -> Tensor",
    f"_ps_roi_pool_backward({GRAD}, Tensor mapping, {SIZES}) -> Tensor",
    f"_deform_conv2d_backward(Tensor grad, Tensor input, Tensor weight, Tensor offset, {DEFORM})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def name_operators() -> torch.library.Library | None:
    """Define the names of torchvision's operators; keep what is returned as long as they are needed.

    Raises:
        ImportError: If timm or torchvision is not installed.
    """
    missing = [name for name in ("timm", "torchvision") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"this benchmark needs {' and '.join(missing)}; pip install --no-deps timm torchvision==0.28.0, "
            "and huggingface_hub, pyyaml and safetensors where they are missing"
        )
    if hasattr(torch.ops.torchvision, "nms"):
        return None
    library = torch.library.Library("torchvision", "DEF")
    for schema in OPERATORS:
        library.define(schema)
    return library
