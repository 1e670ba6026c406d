"""Comparisons with PyTorch's libraries (requirements-torch.txt): make test-torch. Not called torch: without the library a
folder of that name would be imported in its place."""

import importlib.util


def define_missing_operators():
    """A CPU build of torch beside the torchvision of PyPI, whose operators are compiled for CUDA: they are not there, and
    torchvision describes them when it is imported. timm and transformers import it and use none of them."""
    import torch

    names = {"nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"}
    names["qnms"] = names["nms"]
    library = torch.library.Library("torchvision", "DEF")
    for name, signature in names.items():
        library.define(name + signature)
    return library  # it lives as long as this


if importlib.util.find_spec("torch"):
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        LIBRARY = define_missing_operators()
