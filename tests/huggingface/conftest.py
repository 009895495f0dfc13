"""Code that comes with exported models is cached in a folder of the session's own."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _code_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """transformers copies such code into a cache, imports it from there as one package, and puts it on the path."""
    from transformers import dynamic_module_utils

    cache = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", cache)
        yield
    if cache in sys.path:
        sys.path.remove(cache)
