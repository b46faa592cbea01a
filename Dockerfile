# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
# nemo_ee in NVIDIA's container of NeMo 2.4:
#
#   docker build -t nemo_ee .
#   docker run --rm --gpus all --ipc=host -v "$PWD:/work" nemo_ee python scripts/megatron_gpt_ee_generate.py …
#
# docs/containers.md says what was seen to run, and what not.
ARG BASE_IMAGE=nvcr.io/nvidia/nemo:25.07
FROM ${BASE_IMAGE}

# NVIDIA's images name a file here that pins packages, at versions which can rule out ours.
ENV PIP_CONSTRAINT=

WORKDIR /opt/nemo_ee
COPY scripts/requirements/requirements-container.txt scripts/requirements/

# What is installed keeps its version: pip adds what is missing, or fails.
RUN python -m pip list --format freeze --disable-pip-version-check >container_packages.txt && \
    python -m pip install --no-cache-dir -c container_packages.txt -r scripts/requirements/requirements-container.txt

COPY . .
RUN python -m pip install --no-cache-dir --no-deps --no-build-isolation -e .

# A build has no GPU and no driver: libcuda.so, which extensions are linked to, is the one that the image brings.
RUN LD_LIBRARY_PATH="/usr/local/cuda/compat/lib.real:${LD_LIBRARY_PATH:-}" python scripts/requirements/check_imports.py
