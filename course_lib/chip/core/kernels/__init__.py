"""Kernels as lessons: each a screenful for the emulated AI core, the naive one next to the fast one."""
