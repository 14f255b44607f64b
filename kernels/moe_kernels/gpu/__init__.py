"""The Triton path, for NVIDIA GPUs from Ampere on. Only ``available`` may be imported where triton is not installed."""
