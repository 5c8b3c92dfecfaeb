"""Triton kernels for the evaluation of coalitions, each beside the plain PyTorch that defines it.

One folder an op: `reference.py` is the definition, `kernel.py` the Triton program, `op.py` what is called. Importing
this package imports neither Triton nor a GPU's libraries; only running a kernel does.
"""
