"""A small language model in ordinary PyTorch: the same code on cpu, cuda and npu. It knows nothing of the emulator."""
