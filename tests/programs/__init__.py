"""Training scripts in common styles. They know nothing of the emulation; test_programs.py runs each on cpu and on npu."""
