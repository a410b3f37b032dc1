"""A study whose truth is known: the paper's claims tested on true labels, gains and losses alike.

Small networks on drawn features, trained with the library's losses under many seeds; and the real
networks on drawn recordings, through the whole chain, under fewer.
"""

from __future__ import annotations

from .run import run_controlled

__all__ = ["run_controlled"]
