"""The Triton kernels, one a file, and what launches them. Nothing here is imported where triton is missing."""
