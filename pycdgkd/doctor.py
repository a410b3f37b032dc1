"""What is installed, whether the kernels compute what the equations say, and what mends the rest.

Works when torch or the compiled module is broken: then it says so, and what to do.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from typing import Any

from . import __version__

# The packages of the extra [train] and what each is for.
TRAIN_PACKAGES = {
    "mne": "reading EEG",
    "edfio": "writing made-up EEG",
    "av": "reading videos",
    "mtcnn": "face detection",
    "matplotlib": "pictures",
    "jinja2": "reports",
    "rich": "live progress",
    "safetensors": "saved networks",
}
TOLERANCE = 1e-4  # largest error accepted of float32 kernels, relative to the largest value
REINSTALL = "reinstall it: pip install --force-reinstall --no-deps pycdgkd"


def examine() -> tuple[list[str], bool]:
    """Lines to print, and whether the core (torch, kernels, right numbers) works."""
    lines = [f"pycdgkd   {__version__}, python {platform.python_version()}, {platform.platform()}"]
    torch = _examine_torch(lines)
    info = _examine_kernels(lines, torch is not None)
    healthy = torch is not None and info is not None
    if torch is not None and info is not None:
        lines.append(f"cuda      {_cuda_state(torch, info)}")
        healthy = _examine_numbers(lines)
    lines.extend(_extras())
    verdict = "the core works" if healthy else "the core does not work, see above"
    lines.append(f"result    {verdict}")
    return lines, healthy


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def _examine_torch(lines: list[str]) -> Any:
    try:
        numpy = importlib.import_module("numpy")
        lines.append(f"numpy     {numpy.__version__}")
    except Exception as error:  # a broken installation raises anything
        mend = "pip install --force-reinstall numpy"
        lines.append(f"numpy     broken: {_reason(error)}; mend: {mend}")
    try:
        torch = importlib.import_module("torch")
        lines.append(f"torch     {torch.__version__}, {torch.get_num_threads()} CPU threads")
    except Exception as error:
        lines.append(
            f'torch     broken: {_reason(error)}; mend: pip install --force-reinstall "torch>=2.10"'
        )
        return None
    return torch


def _examine_kernels(lines: list[str], has_torch: bool) -> dict[str, Any] | None:
    if not has_torch:
        lines.append("kernels   not tried: they need torch")
        return None
    try:
        info: dict[str, Any] = importlib.import_module("pycdgkd.ops").build_info()
    except Exception as error:
        lines.append(f"kernels   broken: {_reason(error)}; mend: {REINSTALL}")
        return None
    sanitize = f", sanitizers {info['sanitize']}" if info["sanitize"] else ""
    lines.append(
        f"kernels   CPU: {info['isa_active']} in use (compiled: {info['isa_levels']}), "
        f"{info['compiler']}, for torch {info['abi_target']} or newer{sanitize}"
    )
    return info


def _cuda_state(torch: Any, info: dict[str, Any]) -> str:
    """Whether the GPU is used, and if not, which part is missing."""
    if torch.version.cuda is None:
        return "not used: this torch is a CPU build"
    if not info["cuda"]:
        return (
            "library not compiled: this build of pycdgkd is for the CPU; build with "
            "PYCDGKD_CUDA=ON and nvcc to change that"
        )
    from pycdgkd import ops

    if ops.CUDA_ERROR is not None:
        return f"broken: the CUDA library does not load: {ops.CUDA_ERROR}; mend: {REINSTALL}"
    archs = f"kernels compiled for {info['cuda_archs']} and loaded"
    if not torch.cuda.is_available():
        return f"{archs}; not used: torch (CUDA {torch.version.cuda}) finds no GPU or no driver"
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return f"{archs}; torch (CUDA {torch.version.cuda}) sees {names}"


def _examine_numbers(lines: list[str]) -> bool:
    """Losses and gradients of the kernels against the equations in plain torch (float64)."""
    import torch

    from pycdgkd import ops

    healthy, devices = True, ["cpu"]
    if ops.has_kernels("cuda") and torch.cuda.is_available():
        devices.append("cuda")
    checks = (("prototype_loss", _prototype_error), ("distillation_loss", _distillation_error))
    for name, check, device in ((n, c, d) for d in devices for n, c in checks):
        name = name if device == "cpu" else f"{name} on {device}"
        try:
            error = check(device)
        except Exception as problem:
            lines.append(f"self-test {name} failed: {_reason(problem)}; mend: {REINSTALL}")
            healthy = False
            continue
        right = error <= TOLERANCE
        verdict = "ok" if right else f"WRONG (at most {TOLERANCE:.0e} expected); mend: {REINSTALL}"
        lines.append(f"self-test {name} forward and backward: largest error {error:.1e}, {verdict}")
        healthy = healthy and right
    return healthy


def _error(pairs: list[tuple[Any, Any]]) -> float:
    """Largest difference of each pair relative to its reference's largest value; inf for NaN."""
    errors = [
        float((got.cpu().double() - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
        for got, expected in pairs
    ]
    return max(error if error == error else float("inf") for error in errors)


def _prototype_error(device: str) -> float:
    import torch

    from . import losses, reference

    generator = torch.Generator().manual_seed(0)
    features = torch.randn(64, 48, generator=generator)
    prototypes = torch.randn(3, 48, generator=generator)
    labels = torch.randint(0, 3, (64,), generator=generator)
    z, c = (x.to(device, copy=True).requires_grad_() for x in (features, prototypes))
    exact = [features.double().requires_grad_(), prototypes.double().requires_grad_()]
    loss, true_prob = losses.prototype_loss(z, c, labels.to(device), scale=0.05)
    expected, expected_prob = reference.prototype_loss(exact[0], exact[1], labels, scale=0.05)
    got = torch.autograd.grad(loss, [z, c])
    gradients = torch.autograd.grad(expected, exact)
    pairs = [(loss.detach(), expected.detach()), (true_prob, expected_prob)]
    return _error([*pairs, *zip(got, gradients, strict=True)])


def _distillation_error(device: str) -> float:
    import torch

    from . import losses, reference

    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(64, 5, generator=generator)
    sources = 3 * torch.randn(3, 64, 5, generator=generator)
    labels = torch.randint(0, 5, (64,), generator=generator)
    ours, exact = logits.to(device, copy=True).requires_grad_(), logits.double().requires_grad_()
    result = losses.distillation_loss(ours, sources.to(device), labels.to(device))
    expected = reference.distillation_loss(exact, sources.double(), labels)
    got = torch.autograd.grad(result.loss, ours)
    gradient = torch.autograd.grad(expected[0], exact)
    values = [(a.detach(), b.detach()) for a, b in zip(result, expected, strict=True)]
    return _error([*values, (got[0], gradient[0])])


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extras() -> list[str]:
    versions = {name: _version(name) for name in TRAIN_PACKAGES}
    present = [f"{name} {version}" for name, version in versions.items() if version]
    missing = [f"{name} ({use})" for name, use in TRAIN_PACKAGES.items() if not versions[name]]
    lines = [f"[train]   {', '.join(present) or 'none'}"]
    if missing:
        lines.append(f'          missing: {", ".join(missing)}; mend: pip install "pycdgkd[train]"')
    timm = _version("timm")
    lines.append(
        f"[timm]    timm {timm}"
        if timm
        else '[timm]    timm is not installed (only for backbone = "timm:NAME"); '
        'mend: pip install "pycdgkd[timm]"'
    )
    return lines
