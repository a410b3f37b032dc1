"""The network that sees one frame: PVT v1 or any timm model by name; weights from a file."""

from __future__ import annotations

import difflib
import math
import pickle
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pycdgkd.errors import InputError, require

from .presets import NetworkPreset
from .pvt import PyramidVisionTransformer, resize_positions

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_TIMM = "timm:"


class FrameEncoder(NamedTuple):
    """An image encoder (B, 3, H, W) -> (B, dim), and the pixel statistics (RGB, 0..1) it wants."""

    module: nn.Module
    dim: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def build_frame_encoder(backbone: str, preset: NetworkPreset, img_size: int) -> FrameEncoder:
    """Frame encoder ``"pvt"`` (sizes of the preset) or ``"timm:<name>"``, freshly initialised.

    ``InputError`` for an unknown backbone, a size it cannot take, or a timm that does not import.
    """
    if backbone.startswith(_TIMM):
        return _timm_encoder(backbone.removeprefix(_TIMM), img_size)
    if backbone != "pvt":
        raise InputError(
            f"unknown backbone '{backbone}'; expected 'pvt' or 'timm:<model name>', "
            f"for example 'timm:resnet18'"
        )
    pvt = PyramidVisionTransformer(
        img_size,
        patch_size=preset.patch_size,
        embed_dims=preset.embed_dims,
        num_heads=preset.num_heads,
        mlp_ratios=preset.mlp_ratios,
        depths=preset.depths,
        sr_ratios=preset.sr_ratios,
    )
    return FrameEncoder(pvt, pvt.num_features, IMAGENET_MEAN, IMAGENET_STD)


def _import_timm() -> ModuleType:
    try:
        return require("timm", "timm")
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"timm is installed but does not import ({reason}); expected the torchvision that "
            f"belongs to torch {torch.__version__}; remedy: install torch, torchvision and timm "
            f"together, pip install --upgrade torch torchvision timm"
        ) from error


def _timm_encoder(name: str, img_size: int) -> FrameEncoder:
    timm = _import_timm()
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "see timm.list_models()"
        raise InputError(f"timm has no model '{name}'; {hint}")
    config = timm.get_pretrained_cfg(name)
    # Models with learned positions or windows are built for one size; convolutional ones take any.
    size = {"img_size": img_size} if config is not None and config.fixed_input_size else {}
    try:
        model: Any = timm.create_model(name, pretrained=False, num_classes=0, **size)
        # One black frame tells whether the size fits and how wide the features are, which timm's
        # attributes do not say for every model.
        with torch.no_grad():
            features = model.eval()(torch.zeros(1, 3, img_size, img_size))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"timm cannot build '{name}' for {img_size}-pixel frames ({reason}); "
            f"remedy: another img_size or another model"
        ) from error
    if features.dim() != 2:
        raise InputError(
            f"timm's '{name}' gives {tuple(features.shape)} for one frame; expected one vector, "
            f"(1, width); remedy: a model that pools its features"
        )
    config = model.pretrained_cfg
    mean, std = config.get("mean", IMAGENET_MEAN), config.get("std", IMAGENET_STD)
    return FrameEncoder(model.train(), features.shape[1], tuple(mean), tuple(std))


def load_encoder_weights(encoder: nn.Module, path: str | Path) -> None:
    """Load a checkpoint's weights into a frame encoder, all of them and nothing else but its head.

    ``path``: a ``.safetensors`` file, or what ``torch.save`` wrote (read with
    ``weights_only=True``), flat or under the key "model" or "state_dict". The classifier is left
    out (``head.*``; for timm models what their configuration names). Position embeddings of a PVT
    for another image size are resized. ``InputError`` for anything else that does not fit.
    """
    path = Path(path)
    state = _read_state(path)
    heads = _classifier_names(encoder)
    state = {k: v for k, v in state.items() if not k.startswith(tuple(f"{h}." for h in heads))}
    own = encoder.state_dict()
    if isinstance(encoder, PyramidVisionTransformer):
        state = {k: _fit_positions(k, v, own) for k, v in state.items()}
    missing = sorted(own.keys() - state.keys())
    unknown = sorted(state.keys() - own.keys())
    shapes = [k for k in own if k in state and state[k].shape != own[k].shape]
    for what, names in (
        ("lacks", missing),
        ("has unknown", unknown),
        ("has other shapes of", shapes),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise InputError(
                f"'{path}' {what} {', '.join(names[:3])}{more}; expected the weights of this frame "
                f"encoder, {type(encoder).__name__}; remedy: another file, backbone or preset"
            )
    encoder.load_state_dict(state)


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(
            f"encoder weights '{path}' not found; expected a .pth or .safetensors file"
        )
    if path.suffix == ".safetensors":
        safetensors = require("safetensors", "train")
        load_file = require("safetensors.torch", "train").load_file
        errors: tuple[type[Exception], ...] = (safetensors.SafetensorError, OSError)
    else:
        load_file = _torch_load
        errors = (pickle.UnpicklingError, RuntimeError, EOFError, OSError)
    try:
        state = load_file(path)
    except errors as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"cannot read encoder weights '{path}': {reason}") from error
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"'{path}' holds no state dict; expected parameter names and tensors")
    return dict(state)


def _torch_load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _classifier_names(encoder: nn.Module) -> tuple[str, ...]:
    config = getattr(encoder, "pretrained_cfg", None)
    if config is None:
        return ("head",)
    names = config.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _fit_positions(name: str, value: Tensor, own: dict[str, Tensor]) -> Tensor:
    """A PVT's position embedding on this encoder's grid; every other tensor as it is."""
    if not name.startswith("pos_embed") or name not in own or value.dim() != 3:
        return value
    extra = int(name == "pos_embed4")  # the class token's
    side = math.isqrt(own[name].shape[1] - extra)
    return resize_positions(value, (side, side), extra=extra)
