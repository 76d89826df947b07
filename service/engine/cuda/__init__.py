"""What a step runs on an NVIDIA GPU in the place of torch's operations: Triton kernels, and graphs of decode steps.

Triton's interpreter runs the kernels on a CPU as well, which is how they are tested without a GPU.
"""
