from __future__ import annotations

import dataclasses
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from pycdgkd.errors import InputError
from pycdgkd.models import (
    PRESETS,
    VisualNet,
    backbones,
    build_multimodal,
    build_visual,
    load_frame_encoder_weights,
)

Golden = Callable[[str], tuple[dict[str, Tensor], dict[str, Any]]]
GOLDEN_SIZES = dataclasses.replace(
    PRESETS["nano"], img_size=64, patch_size=4, mlp_ratios=(8, 8, 4, 4), depths=(1, 2, 1, 1)
)


def checkpoint() -> dict[str, Tensor]:
    """A state dict as the official release has them: the encoder's names and a classifier."""
    torch.manual_seed(3)
    state = build_visual("nano").visual.frame_encoder.state_dict()
    return {**state, "head.weight": torch.zeros(1000, 64), "head.bias": torch.zeros(1000)}


def encoder_state(net: VisualNet) -> dict[str, Tensor]:
    return net.visual.frame_encoder.state_dict()


# Weights from files


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_official_weights_give_the_original_features(
    golden: Golden, tmp_path: Path, suffix: str
) -> None:
    weights, values = golden("pvt_v1_small_config.npz")
    weights |= {"head.weight": torch.zeros(1000, 64), "head.bias": torch.zeros(1000)}
    path = tmp_path / f"pvt{suffix}"
    if suffix == ".pth":
        torch.save(weights, path)
    else:
        pytest.importorskip("safetensors.torch").save_file(weights, path)
    net = build_multimodal(GOLDEN_SIZES).eval()
    load_frame_encoder_weights(net, path)
    features = net.visual.frame_encoder(values["input_square"]).detach()
    torch.testing.assert_close(features.double(), values["features_square"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_nested_checkpoints(tmp_path: Path, key: str) -> None:
    state = checkpoint()
    torch.save({key: state, "epoch": 300}, tmp_path / "nested.pth")
    net = build_visual("nano")
    load_frame_encoder_weights(net, tmp_path / "nested.pth")
    loaded = encoder_state(net)
    assert all(torch.equal(loaded[name], state[name]) for name in loaded)


def test_positions_are_resized_for_another_image_size(tmp_path: Path) -> None:
    torch.save(checkpoint(), tmp_path / "pvt.pth")
    native, larger = build_visual("nano").eval(), build_visual("nano", img_size=72).eval()
    for net in (native, larger):
        load_frame_encoder_weights(net, tmp_path / "pvt.pth")
    images = torch.randn(2, 3, 72, 72)
    torch.testing.assert_close(
        native.visual.frame_encoder(images),
        larger.visual.frame_encoder(images),
        rtol=1e-5,
        atol=1e-5,
    )


def test_only_the_frame_encoder_changes(tmp_path: Path) -> None:
    torch.save(checkpoint(), tmp_path / "pvt.pth")
    net = build_visual("nano")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    load_frame_encoder_weights(net, tmp_path / "pvt.pth")
    changed = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert "visual.frame_encoder.patch_embed1.proj.weight" in changed
    assert all(name.startswith("visual.frame_encoder.") for name in changed)


def _without(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda state: {k: v for k, v in state.items() if k != name}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without("cls_token"), "lacks cls_token; expected the weights of this frame encoder"),
        (lambda s: {**s, "extra.weight": torch.zeros(1)}, r"has unknown extra\.weight;"),
        (
            lambda s: {**s, "norm.weight": torch.zeros(7)},
            r"has other shapes of norm\.weight; expected .*PyramidVisionTransformer",
        ),
        (lambda _: {"fc.weight": torch.zeros(1)}, r"lacks .*, .*, .* and \d+ more"),
        (lambda s: {**s, "norm.bias": "text"}, "holds no state dict"),
        (lambda _: torch.zeros(3), "holds no state dict"),
    ],
)
def test_misfits_are_named_and_change_nothing(
    tmp_path: Path, spoil: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    torch.save(spoil(checkpoint()), tmp_path / "bad.pth")
    net = build_visual("nano")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(InputError, match=message):
        load_frame_encoder_weights(net, tmp_path / "bad.pth")
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'.*nowhere\.pth' not found"):
        load_frame_encoder_weights(build_visual("nano"), tmp_path / "nowhere.pth")


@pytest.mark.parametrize("name", ["bad.pth", "bad.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04 broken archive"])
def test_unreadable_files_are_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"cannot read encoder weights '.*bad\.") as caught:
        load_frame_encoder_weights(build_visual("nano"), path)
    assert "\n" not in str(caught.value)


class Malicious:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    torch.save({"model": Malicious(trace)}, tmp_path / "evil.pth")
    (tmp_path / "evil_plain.pth").write_bytes(pickle.dumps({"model": Malicious(trace)}, 2))
    for name in ("evil.pth", "evil_plain.pth"):
        with pytest.raises(InputError, match="cannot read encoder weights"):
            load_frame_encoder_weights(build_visual("nano"), tmp_path / name)
    assert not trace.exists()


# timm


@pytest.fixture
def timm() -> ModuleType:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision for another torch
        pytest.skip(f"timm cannot be imported: {error}")
    return timm


VIDEO = torch.randint(
    0, 256, (2, 2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
)


def test_timm_backbone_runs_and_trains(timm: ModuleType) -> None:
    net = build_visual("nano", img_size=64, backbone="timm:resnet18")
    assert type(net.visual.frame_encoder) is timm.models.ResNet
    out = net(VIDEO, torch.tensor([[True, True], [True, False]]))
    assert out.logits.shape == (2, 2)
    assert out.video.shape == (2, PRESETS["nano"].feature_dim)
    out.logits.logsumexp(1).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.usefixtures("timm")
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "mobilenetv3_small_050"])
def test_timm_backbones_of_other_kinds(name: str) -> None:
    # A ViT must be told the image size; MobileNetV3's features are wider than num_features says.
    net = build_visual("nano", img_size=64, backbone=f"timm:{name}").eval()
    assert net(VIDEO).logits.isfinite().all()


def test_timm_pixel_statistics_are_the_models_own(timm: ModuleType) -> None:
    net = build_visual("nano", img_size=64, backbone="timm:vit_tiny_patch16_224")
    expected = timm.get_pretrained_cfg("vit_tiny_patch16_224").mean
    assert net.visual.pixel_mean.flatten().tolist() == pytest.approx(list(expected))
    assert net.visual.pixel_mean.flatten().tolist() == pytest.approx([0.5, 0.5, 0.5])


def test_timm_weights_load_without_their_classifier(timm: ModuleType, tmp_path: Path) -> None:
    source = timm.create_model("resnet18", pretrained=False, num_classes=10)
    assert "fc.weight" in source.state_dict()
    torch.save(source.state_dict(), tmp_path / "resnet.pth")
    net = build_visual("nano", img_size=64, backbone="timm:resnet18")
    load_frame_encoder_weights(net, tmp_path / "resnet.pth")
    loaded = encoder_state(net)
    assert all(torch.equal(loaded[k], source.state_dict()[k]) for k in loaded)


@pytest.mark.usefixtures("timm")
def test_unknown_timm_model_names_near_ones() -> None:
    with pytest.raises(InputError, match=r"timm has no model 'resnet81'; did you mean .*resnet"):
        build_visual("nano", backbone="timm:resnet81")


@pytest.mark.usefixtures("timm")
def test_timm_size_that_does_not_fit() -> None:
    with pytest.raises(InputError, match=r"timm cannot build 'levit_128s' for 50-pixel frames"):
        build_visual("nano", img_size=50, backbone="timm:levit_128s")


@pytest.mark.usefixtures("timm")
def test_building_a_timm_network_leaves_it_untouched_and_in_training() -> None:
    net = build_visual("nano", img_size=64, backbone="timm:resnet18")
    assert all(module.training for module in net.modules())
    assert net.visual.frame_encoder.bn1.running_mean.abs().max() == 0


def test_missing_timm_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=r'not installed; remedy: pip install "pycdgkd\[timm\]"'):
        build_visual("nano", backbone="timm:resnet18")


def test_torchvision_of_another_torch_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: str) -> ModuleType:
        raise RuntimeError("operator torchvision::nms does not exist\nmore")

    monkeypatch.setattr(backbones, "require", broken)
    with pytest.raises(InputError, match=r"nms does not exist\).*remedy: install torch, torchvis"):
        build_visual("nano", backbone="timm:resnet18")
