"""Importing transformers' decoders without what they do not use: for the processes of our own commands.

With everything that is installed, ``transformers.models.llama`` imports torchvision, scikit-learn, pandas and
torch's compiler: more than half of the time until a model is ready. transformers remembers what it found: a
process that others share (a trainer, a notebook) imports it as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType

_UNUSED = {
    **dict.fromkeys(("PIL", "scipy", "sklearn", "torchvision"), ()),
    "torch.nn.attention.flex_attention": ("flex_attention",),
    "torch.distributed.tensor": ("Replicate",),
    "torch.distributed.tensor.parallel": ("ColwiseParallel", "RowwiseParallel"),
}


def import_decoders() -> None:
    """Imports transformers' Llama, from which `polar_ft.model` takes its parts; nothing if that was done."""
    with without(_UNUSED):
        import transformers.models.llama.modeling_llama  # noqa: F401


@contextmanager
def without(modules: Mapping[str, Sequence[str]]) -> Iterator[None]:
    """Imports within the block do not load these modules; one that is imported already stays.

    Args:
        modules: Module to names that empty classes stand for; without names it is not found.
    """
    replaced = [module for module in modules if module not in sys.modules]
    for module in replaced:
        stub = ModuleType(module)
        vars(stub).update({name: type(name, (), {}) for name in modules[module]})
        sys.modules[module] = stub if modules[module] else None  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in replaced:
            del sys.modules[module]
