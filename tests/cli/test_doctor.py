"""The doctor tells what works, and works when little does."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from pycdgkd import __version__, doctor
from pycdgkd.cli import main

INFO = {"cuda": True, "cuda_archs": "80,90"}


def test_a_working_installation(capsys: pytest.CaptureFixture[str]):
    import torch

    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"pycdgkd   {__version__}" in text
    assert f"torch     {torch.__version__}" in text
    assert text.count("forward and backward: largest error") == 2
    assert text.count(", ok\n") == 2
    assert text.endswith("result    the core works\n")


def run_without(module: str) -> subprocess.CompletedProcess[str]:
    code = (
        f"import sys; sys.modules[{module!r}] = None; "
        "from pycdgkd.cli import main; sys.exit(main(['doctor']))"
    )
    return subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("module", "line", "remedy"),
    [
        ("torch", "torch     broken: ModuleNotFoundError", '"torch>=2.10"'),
        ("pycdgkd._C", "kernels   broken: ", "--force-reinstall --no-deps pycdgkd"),
    ],
)
def test_a_broken_core(module: str, line: str, remedy: str):
    done = run_without(module)
    assert done.returncode == 1
    assert done.stderr == ""
    assert line in done.stdout
    assert remedy in done.stdout
    assert "result    the core does not work" in done.stdout


def test_wrong_numbers_are_told(monkeypatch: pytest.MonkeyPatch):
    from pycdgkd import losses

    right = losses.distillation_loss

    def slightly_wrong(*arguments, **settings):
        result = right(*arguments, **settings)
        return result._replace(kl=result.kl * 1.001)

    monkeypatch.setattr(losses, "distillation_loss", slightly_wrong)
    lines, healthy = doctor.examine()
    assert not healthy
    told = next(line for line in lines if "self-test distillation_loss" in line)
    assert "WRONG" in told
    assert "ok" in next(line for line in lines if "self-test prototype_loss" in line)


def test_nan_is_wrong():
    import torch

    nan, one = torch.tensor([float("nan")]), torch.ones(1, dtype=torch.float64)
    assert doctor._error([(one, one), (nan, one)]) == float("inf")


def test_a_failing_kernel_is_told(monkeypatch: pytest.MonkeyPatch):
    from pycdgkd import losses

    def broken(*_, **__):
        raise RuntimeError("no kernel\nfor this device")

    monkeypatch.setattr(losses, "prototype_loss", broken)
    lines, healthy = doctor.examine()
    assert not healthy
    assert any("prototype_loss failed: RuntimeError: no kernel for this device" in s for s in lines)


def fake_torch(cuda: str | None, devices: list[str]) -> SimpleNamespace:
    return SimpleNamespace(
        version=SimpleNamespace(cuda=cuda),
        cuda=SimpleNamespace(
            is_available=lambda: bool(devices),
            device_count=lambda: len(devices),
            get_device_name=lambda index: devices[index],
        ),
    )


@pytest.mark.parametrize(
    ("torch", "info", "expected"),
    [
        (fake_torch(None, []), INFO, "not used: this torch is a CPU build"),
        (fake_torch("13.0", ["H100"]), {**INFO, "cuda": False}, "library not compiled"),
        (fake_torch("13.0", []), INFO, "finds no GPU or no driver"),
        (fake_torch("13.0", ["H100", "H200"]), INFO, "sees H100, H200"),
    ],
)
def test_cuda_in_plain_words(torch: SimpleNamespace, info: dict[str, object], expected: str):
    assert expected in doctor._cuda_state(torch, info)


def test_missing_extras_are_named_with_their_remedy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("av", "timm") else "1.0")
    lines = doctor._extras()
    assert "mne 1.0" in lines[0]
    assert lines[1].strip() == 'missing: av (reading videos); mend: pip install "pycdgkd[train]"'
    assert 'pip install "pycdgkd[timm]"' in lines[2]
