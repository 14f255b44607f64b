# An image for a cluster with NVIDIA GPUs. Build: docker build -t moetrain .
FROM nvidia/cuda:12.8.1-cudnn-devel-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv python3-dev g++ git \
    && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/moetrain
ENV PATH=/opt/moetrain/bin:$PATH

# torch first and alone: this layer is large and seldom changes. On Linux it comes with its own CUDA libraries.
RUN pip install --no-cache-dir torch==2.13.0

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY kernels kernels
COPY launch launch
COPY moetrain moetrain
RUN pip install --no-cache-dir '.[gpu,wandb]'

# Runs, prepared data and caches belong on a mounted volume.
WORKDIR /workspace
ENTRYPOINT ["moetrain"]
CMD ["--help"]
