"""Times and kernels on a GPU."""
