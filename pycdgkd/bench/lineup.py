"""Who competes in a case: our layers and the peers that apply."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from . import layers, peers
from .contestants import Contestant, differentiable
from .inputs import KD_WEIGHT, TEMPERATURE, Inputs

# The peer that is timed with more threads too: the strongest form in eager torch.
RIVALS = {
    "teacher_loss": "T4",
    "prototype_loss": "addmm",
    "distillation_loss": "D1",
    "multi_source_kl": "D1",
    "class_prototypes": "one-hot",
    "convergence_rates": "addmm",
}

Call = Callable[[], Tensor]
# (function of the tensors below, those tensors): torch.compile gets tensors as arguments, because
# what a closure holds would be baked into the graph.
Form = tuple[Callable[..., Tensor], tuple[Any, ...]]


def _teacher_forms(i: Inputs) -> dict[str, Form]:
    tensors = (i.logits, i.features, i.labels)
    return {
        "T1": (peers.t1, tensors),
        "T2": (peers.t2, tensors),
        "T3": (peers.t3, tensors),
        "T4": (peers.t4, tensors),
    }


def _prototype_forms(i: Inputs) -> dict[str, Form]:
    tensors = (i.features[0], i.prototypes[0], i.labels)
    forms: dict[str, Form] = {
        "literal": (peers.literal, tensors),
        "cdist": (peers.cdist, tensors),
        "addmm": (peers.addmm, tensors),
    }
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        forms["lce"] = (peers.lce, tensors)
        forms["lce auto"] = (lambda z, c, y: peers.lce(z, c, y, options), tensors)
    if i.case.classes < 10_000 and find_spec("pytorch_metric_learning"):
        forms["ProxyNCA"] = (_proxy_nca(i), tensors)
    return forms


def _proxy_nca(i: Inputs) -> Callable[..., Tensor]:
    with warnings.catch_warnings():  # of packages that it imports
        warnings.simplefilter("ignore")
        from pytorch_metric_learning.distances import LpDistance
        from pytorch_metric_learning.losses import ProxyNCALoss
    distance = LpDistance(normalize_embeddings=False, p=2, power=2)
    loss = ProxyNCALoss(i.case.classes, i.case.width, softmax_scale=1, distance=distance)
    loss.proxies.requires_grad_(False).copy_(i.prototypes[0])

    def value(z: Tensor, _: Tensor, labels: Tensor) -> Tensor:
        result: Tensor = loss(z, labels)
        return result

    return value


def _class_prototypes_forms(i: Inputs) -> dict[str, Form]:
    tensors = (i.features[0], i.labels, i.case.classes)
    return {
        "one-hot": (peers.class_means_one_hot, tensors),
        "index_add": (peers.class_means_index_add, tensors),
    }


def _rates_forms(i: Inputs) -> dict[str, Form]:
    return {"addmm": (peers.rates_addmm, (i.features, i.prototypes, i.labels))}


def _kl_forms(i: Inputs) -> dict[str, Form]:
    active = [(w, t) for w, t in zip(i.weights, i.sources, strict=True) if w]
    weights, sources = [w for w, _ in active], [t for _, t in active]
    fwd, factor = i.case.direction == "forward", TEMPERATURE**i.temperature_power
    distilled = i.case.op == "distillation_loss"

    def form(divergence: Callable[..., Tensor], given: Any, given_weights: Any) -> Form:
        def value(logits: Tensor, given: Any, labels: Tensor) -> Tensor:
            kl = divergence(logits, given, given_weights, fwd)
            if not distilled:
                return kl
            return peers.with_cross_entropy(kl, logits, labels, factor)

        return value, (i.logits, given, i.labels)

    wide = [t.float() for t in i.sources]
    forms = {
        "D1": form(peers.d1, sources, weights),
        "D3": form(peers.d3, torch.stack(wide), torch.tensor(i.weights, device=i.logits.device)),
        "D4": form(peers.d4, sources, weights),
    }
    if fwd:
        forms["D2"] = form(peers.d2, sources, weights)
        if distilled and find_spec("torchdistill"):
            forms["torchdistill"] = (_torchdistill(weights), (i.logits, sources, i.labels))
    return forms


def _torchdistill(weights: Sequence[float]) -> Callable[..., Tensor]:
    from torchdistill.losses.mid_level import KDLoss

    alpha = 1 - KD_WEIGHT
    losses = [
        KDLoss("s", "o", "t", "o", TEMPERATURE, alpha=alpha * w, beta=KD_WEIGHT * w)
        for w in weights
    ]

    def value(logits: Tensor, sources: Sequence[Tensor], labels: Tensor) -> Tensor:
        student = {"s": {"o": logits}}
        terms = [
            loss(student, {"t": {"o": source}}, labels)
            for loss, source in zip(losses, sources, strict=True)
        ]
        return torch.stack(terms).sum()

    return value


_FORMS: dict[str, Callable[[Inputs], dict[str, Form]]] = {
    "teacher_loss": _teacher_forms,
    "prototype_loss": _prototype_forms,
    "class_prototypes": _class_prototypes_forms,
    "convergence_rates": _rates_forms,
    "multi_source_kl": _kl_forms,
    "distillation_loss": _kl_forms,
}


def _call(form: Form) -> Call:
    """The form on its tensors; 16-bit tensors are widened within the call."""
    function, arguments = form
    first = arguments[0][0] if isinstance(arguments[0], list) else arguments[0]
    if first.dtype not in (torch.bfloat16, torch.float16):
        return lambda: function(*arguments)

    def wide(value: Any) -> Any:
        if isinstance(value, list):
            return [wide(item) for item in value]
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    return lambda: function(*(wide(value) for value in arguments))


def _gemm(i: Inputs) -> Contestant:
    """The matrix products that no implementation for many classes can do without."""
    z, c = i.features[0].detach(), i.prototypes[0]
    logits, grad = z.new_empty(len(z), len(c)), torch.empty_like(z)
    return Contestant(
        "gemm",
        lambda: torch.mm(z, c.T, out=logits),
        lambda _: [torch.mm(logits, c, out=grad)],
        layer="bound",
    )


def peers_of(i: Inputs) -> list[Contestant]:
    """Every peer that is installed and applies to the case, T3 with its own right answer."""
    forms = {
        name: form for name, form in _FORMS[i.case.op](i).items() if name not in i.case.skipped
    }
    through = {"T3": {"value_of": "teacher_loss through means"}}
    found = [
        differentiable(name, _call(form), i, **through.get(name, {}))
        for name, form in forms.items()
    ]
    if i.case.bound == "flops":
        found.append(_gemm(i))
    return found


def compiled_peers(i: Inputs, mode: str = "default") -> list[Contestant]:
    """The case's peers under torch.compile of that mode; the first call compiles."""
    if not i.case.compiled:
        return []
    torch._dynamo.reset()
    forms = _FORMS[i.case.op](i)
    found = []
    for name in i.case.compiled:
        function, arguments = forms[name]
        form = (torch.compile(function, fullgraph=True, dynamic=False, mode=mode), arguments)
        found.append(differentiable(f"{name} compile", _call(form), i))
    return found


def lineup(i: Inputs, *, threads: int = 1, compiled: bool = True) -> list[Contestant]:
    """All contestants of a case; ours come first."""
    found = [*layers.ours(i), *peers_of(i), *(compiled_peers(i) if compiled else [])]
    return [dataclasses.replace(one, threads=threads) for one in found]


def installed_peers() -> dict[str, bool]:
    """The optional packages and whether they take part."""
    packages = ("pytorch_metric_learning", "torchdistill")
    return {name: find_spec(name) is not None for name in packages}
