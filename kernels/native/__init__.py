"""The CPU kernels, in C++ without torch's headers, and what builds and calls them. Nothing is built at import."""
