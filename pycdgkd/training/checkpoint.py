"""Files of one network: described weights (safetensors) and the state to resume from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pycdgkd.errors import InputError, require
from pycdgkd.files import write_atomically

if TYPE_CHECKING:
    from pycdgkd.models.networks import MultimodalNet, Network, VisualNet

FORMAT = 1
WEIGHTS = "model.safetensors"
STATE = "checkpoint.pt"
_META_KEY = "pycdgkd"
_REQUIRED = frozenset(
    {"role", "preset", "level", "num_classes", "n_chans", "n_times", "sfreq", "img_size"}
    | {"backbone", "label", "split_hash", "cache_hash"}
)


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write the resume state (tensors, numbers, text, and dicts and lists of them)."""
    content = {"format": FORMAT, **state}
    write_atomically(folder / STATE, lambda temporary: torch.save(content, temporary))


def load_state(folder: Path) -> dict[str, Any] | None:
    """The resume state on the CPU, or None where training has not finished an epoch yet."""
    path = folder / STATE
    if not path.is_file():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes the unpickler run into
        raise InputError(
            f"{path} cannot be read ({type(error).__name__}); "
            f"remedy: delete the folder {folder} to train this network again"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(
            f"{path} is no checkpoint of format {FORMAT}; "
            f"remedy: delete the folder {folder} to train this network again"
        )
    return state


def save_network(folder: Path, net: Network, meta: Mapping[str, Any]) -> None:
    """Write the weights with ``meta`` (plain JSON values) in the file's header."""
    safetensors = require("safetensors.torch", "train")
    tensors = {name: tensor.cpu().contiguous() for name, tensor in net.state_dict().items()}
    header = {_META_KEY: json.dumps({"format": FORMAT, **meta}, sort_keys=True)}
    folder.mkdir(parents=True, exist_ok=True)
    content = safetensors.save(tensors, metadata=header)
    write_atomically(folder / WEIGHTS, lambda temporary: temporary.write_bytes(content))


def load_network(folder: Path | str) -> tuple[MultimodalNet | VisualNet, dict[str, Any]]:
    """Build the network that ``folder`` describes, with its weights, in evaluation mode on the CPU.

    Raises ``InputError`` when there is no such file, or it was not written by ``save_network``.
    """
    path = Path(folder) / WEIGHTS
    meta, tensors = _read(path)
    with torch.random.fork_rng(devices=[]):  # building draws initial weights, which are replaced
        net = build_network(meta)
    try:
        net.load_state_dict(tensors)
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise InputError(
            f"{path} does not fit the network it describes ({first}); "
            "remedy: use the pycdgkd version that wrote it"
        ) from error
    net.eval()
    return net, meta


def build_network(meta: Mapping[str, Any]) -> MultimodalNet | VisualNet:
    """A network of the kind in ``meta``, initialised from torch's global generator."""
    from pycdgkd.models.networks import build_multimodal, build_visual

    shared = {name: meta[name] for name in ("num_classes", "img_size", "backbone")}
    if meta["level"] is None:
        return build_visual(meta["preset"], **shared)
    sizes = {name: meta[name] for name in ("n_chans", "n_times", "sfreq")}
    return build_multimodal(meta["preset"], level=meta["level"], **shared, **sizes)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    safetensors = require("safetensors", "train")
    if not path.is_file():
        raise InputError(
            f"no trained network: {path} is not there; "
            "expected the folder of one network of a run, as runs/x/student"
        )
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(
            f"{path} is no readable safetensors file: {error}; remedy: train again"
        ) from error
    try:
        meta = dict(json.loads(header.get(_META_KEY, "{}")))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} has a damaged header: {error}; remedy: train again") from error
    missing = sorted(_REQUIRED - set(meta))
    if missing or meta.get("format") != FORMAT:
        raise InputError(
            f"{path} was not written by this version of pycdgkd: its header lacks "
            f"{', '.join(missing) or f'format {FORMAT}'}; remedy: train again"
        )
    return meta, tensors
