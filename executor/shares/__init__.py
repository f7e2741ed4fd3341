"""How a share of a GPU is granted, resized, released and observed. Home of NVML and MPS."""
