"""Entry points of torch.hub: every model by name, without installing this package.

    torch.hub.load("PATH/TO/CLONE", "nat_tiny", source="local", pretrained=True)
    torch.hub.load("PATH/TO/CLONE", "create_model", "swin_base.ms_in22k_ft_in1k", source="local", pretrained=True)

The arguments are those of ``nearfield.create_model``.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

# what torch.hub looks for before it calls an entry point
dependencies = ["torch", "timm", "numpy", "safetensors", "huggingface_hub", "yaml"]


def _package() -> Any:
    """The package ``nearfield``: the one that is imported already, else the clone that this file lies in."""
    if "nearfield" in sys.modules:
        return sys.modules["nearfield"]
    root = Path(__file__).resolve().parent
    spec = importlib.util.spec_from_file_location(
        "nearfield", root / "__init__.py", submodule_search_locations=[str(root)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["nearfield"] = package
    try:
        spec.loader.exec_module(package)
    except BaseException:
        del sys.modules["nearfield"]
        raise
    return package


_nearfield = _package()


def _entry(name: str) -> Any:
    def create(*args: Any, **kwargs: Any) -> Any:
        return _nearfield.create_model(name, *args, **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"The model {name}; arguments as in nearfield.create_model, pretrained=False first."
    return create


create_model = _nearfield.create_model
list_models = _nearfield.list_models
globals().update({name: _entry(name) for name in _nearfield.list_models()})
