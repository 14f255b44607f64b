# An image for a cluster with NVIDIA GPUs. Build: docker build -t moetrain .
# CUDA as torch's wheel below has it: extensions are built with this compiler, and a driver too old for torch is refused
# at the start of the container, where torch would see no GPU and train on the CPU.
FROM nvidia/cuda:13.0.3-cudnn-devel-ubuntu24.04

# libibverbs1, ibverbs-providers: without them NCCL takes plain TCP between nodes, in silence.
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv python3-dev g++ git libibverbs1 ibverbs-providers \
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
