"""Triton kernels, installed as ``polygrad_fast.kernels``.

Each module holds one operation; its plain PyTorch twin has the same name in
``polygrad_fast.reference``. Importing this package does not import triton: that happens when a
kernel's module is imported.
"""
