"""Packaging of megatron_prune: what a plain installation needs, and what is optional.

A plain `pip install .` beside a CPU build of torch must pull no CUDA package. Hence:

- torch is bounded from below only. An upper bound would make pip replace the newer torch a machine already has (a CPU
  build, a cluster's own build) by the index's build, which brings CUDA along. `make test-newest` warns instead.
- Lower ends are what the tests pass with (`make test-oldest`). The exact versions that everything is tested with are in
  constraints.txt (`make constraints`), which `make install` uses.
- megatron-core is taken without its extras (they bring transformer-engine and friends). Python below 3.12 gets 0.16.1,
  the last release for it. 0.18 and later import triton, which torch's CUDA builds bring along and its CPU builds do
  not; it is no dependency of this package either.
- NVIDIA apex is used when it is present, and never named as a dependency: the `apex` on the package index is an
  unrelated project. Build it from NVIDIA's sources.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent

REQUIRES = [
    "torch>=2.8",  # the oldest the tests were run with
    "megatron-core>=0.16.1",  # tested with each release since (`make test-engines`)
    "isal>=1.6",  # CRC-32 of checkpoint files, several times as fast as zlib's
    "numpy>=1.26",
    "psutil>=5.9",  # megatron-core's dist_checkpointing needs it and does not declare it
    "pyyaml>=6.0",
    "rich>=13.9",  # the dashboard
    "safetensors>=0.4.3",
    "sentencepiece>=0.2",
    "tensorboard>=2.16.2",  # 2.16.0 requires nightly builds of TensorFlow
    "tqdm>=4.66",
]

# Exports load with older transformers (each model card says from which on); this is for the project itself.
# Below 6, since the code in cluster exports builds on transformers' own classes.
HUGGING_FACE = ["transformers>=4.57,<6", "tokenizers>=0.22"]

EXTRAS = {
    "hf": HUGGING_FACE,  # reloading exported models, their tokenizers
    "eval": [
        *HUGGING_FACE,
        "lm-eval>=0.4.13",
        "accelerate>=0.34",
        "datasets>=2.16",
    ],  # the zero-shot tasks; pulls some 50 packages
    "gguf": ["gguf>=0.17"],  # writing GGUF files; llama-cpp-python, which reads them, is compiled by `make test-gguf`
    "plot": ["matplotlib>=3.8"],
    "report": ["plotly>=6"],  # the JavaScript that draws a run's report.html
    "gpu": ["transformer-engine[pytorch]>=2.9"],
    "dev": [
        "hypothesis>=6.100",
        "mypy>=2.4,<2.5",
        "packaging>=24.2",
        "pytest>=8.2",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "ruff>=0.17,<0.18",  # a formatter's next version formats differently
        "setuptools>=77",
        "types-PyYAML>=6.0",
    ],
}


def version() -> str:
    """The version as the package states it, read without importing the package."""
    source = (HERE / "megatron_prune" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    assert match, "megatron_prune/__init__.py states no __version__"
    return match.group(1)


setup(
    name="megatron-prune",
    version=version(),
    description="Prune Llama-architecture language models while they keep training, on megatron-core",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    classifiers=[f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12, 13)],  # those tested
    packages=find_packages(include=["megatron_prune", "megatron_prune.*"]),
    package_data={"megatron_prune.report": ["page.*"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megatron-prune = megatron_prune.commands:start"]},
)
