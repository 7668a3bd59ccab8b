"""A wind tunnel for language-model training: an emulated NPU and the course taught on it."""
