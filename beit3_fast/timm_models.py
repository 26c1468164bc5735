"""Importing this module makes timm know the released names.

The public fine-tuning script builds its model with ``timm.create_model(name, ...)`` after ``import modeling_finetune``;
with ``import beit3_fast.timm_models`` in that place it gets ours. Needs timm.
"""

from __future__ import annotations

from timm.models import register_model

from .models.registry import factory, list_models

__all__ = list_models()

for _name in __all__:
    _factory = factory(_name)
    _factory.__module__ = __name__  # timm files a model under its function's module
    globals()[_name] = register_model(_factory)
