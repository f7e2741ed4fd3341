"""``make gpu-check``: what only a machine with an NVIDIA GPU can prove, proven there and written down."""
