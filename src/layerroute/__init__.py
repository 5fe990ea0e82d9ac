"""LayerRoute: an agent's language model does less work on the steps that need less.

Everything public is importable from here; torch is imported on first use, so that reading reports stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerroute.config import RouterConfig
    from layerroute.model.attach import get_routed_model
    from layerroute.model.backbone import load_backbone
    from layerroute.model.routed import RoutedModel, RoutedOutput
    from layerroute.model.session import Session

__version__ = "0.1.0"

_HOMES = {
    "RoutedModel": "layerroute.model.routed",
    "RoutedOutput": "layerroute.model.routed",
    "RouterConfig": "layerroute.config",
    "Session": "layerroute.model.session",
    "get_routed_model": "layerroute.model.attach",
    "load_backbone": "layerroute.model.backbone",
}

__all__ = ["RoutedModel", "RoutedOutput", "RouterConfig", "Session", "get_routed_model", "load_backbone"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'layerroute' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
