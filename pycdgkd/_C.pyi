from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

def build_info() -> dict[str, Any]: ...

class kernels:
    @staticmethod
    def class_prototypes(
        features: NDArray[Any], classes: NDArray[np.int32], num_classes: int
    ) -> tuple[NDArray[Any], NDArray[np.int64]]: ...
    @staticmethod
    def class_prototypes_backward(
        grad_prototypes: NDArray[Any], classes: NDArray[np.int32]
    ) -> NDArray[Any]: ...
    @staticmethod
    def prototype_loss(
        features: NDArray[Any],
        prototypes: NDArray[Any],
        classes: NDArray[np.int32],
        scale: float = 1.0,
    ) -> tuple[float, NDArray[Any], NDArray[Any]]: ...
    @staticmethod
    def prototype_loss_backward(
        residual: NDArray[Any], prototypes: NDArray[Any], factor: float
    ) -> NDArray[Any]: ...
    @staticmethod
    def prototype_grad(
        residual: NDArray[Any], features: NDArray[Any], prototypes: NDArray[Any], factor: float
    ) -> NDArray[Any]: ...
    @staticmethod
    def distillation_loss(
        logits: NDArray[Any],
        sources: Sequence[NDArray[Any]],
        classes: NDArray[np.int32] | None,
        weights: Sequence[float],
        kd_weight: float = 0.5,
        temperature: float = 2.0,
        reverse: bool = True,
    ) -> tuple[float, float, NDArray[Any]]: ...
    @staticmethod
    def scale_rows(unit_grad: NDArray[Any], factors: NDArray[np.float64]) -> NDArray[Any]: ...
    @staticmethod
    def exp(x: NDArray[Any]) -> NDArray[Any]: ...
