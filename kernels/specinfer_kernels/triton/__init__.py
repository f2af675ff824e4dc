"""Triton kernels for CUDA, and for a CPU through Triton's interpreter (TRITON_INTERPRET=1).

`runtime` says whether they can run and imports no Triton, so that a process without it starts.
Modules named `*_device` hold the device code alone, the modules beside them launch it. Every kernel
has its definition in `specinfer_kernels.reference`. Knows no model, session or scheduler.
"""
