"""Choices of algorithm by size and device, in one table.

================================  ============================================  ======================================
choice                            taken                                         known from
================================  ============================================  ======================================
Gram matrices by the Triton twin  float32 products of sides of 4,096 and more,  measured: 1.83 times cuBLAS at 4,096,
                                  where TensorFloat-32 is off                   1.79 at 8,192; 0.58 at 1,024, 0.90 at
                                                                                2,048
polar factors, sizes of steps     on NVIDIA GPUs with units for bfloat16        measured: polar factors of 4,096 x
and noise in bfloat16                                                           4,096 in float32 take 13 times as long
                                                                                as Muon's iteration in bfloat16 (43 to
                                                                                3.3 ms); ours was not timed
eigenvalues on the host           sides of 33 to 512, of matrices on a GPU      estimated: LAPACK takes 0.1 to 15 ms
                                                                                a matrix there, cuSOLVER's Jacobi
                                                                                iteration more
================================  ============================================  ======================================

Measured on 2026-11-28 on one H200 with torch 2.11 (CUDA 13.0) and Triton 3.6: ``benchmarks/results/kernels.json``. In
bfloat16 the twin is 1.53 times as fast as cuBLAS at 4,096, but nothing here uses it: an iteration in bfloat16 would
have to round its float32 results first, which takes what was gained.

The first line saves nothing for GPT-2 124M, whose sides are 768. For a model of width 4,096 a reading of weights is
nearly all Gram products, 1.1 TFLOP per square matrix: 21 ms become 12.
"""

import torch
from torch import Tensor

from dynamon.kernels.precision import product_rounding

GRAM_TWIN = {torch.float32: 4096}  # smallest side by dtype
HALF_FROM = (8, 0)  # compute capability with units for bfloat16
HOST_EIGENVALUES = range(33, 513)  # below torch takes a batched solver, above the host is slower
EIGENVALUE_BATCH = 2**15  # matrices per call: cuSOLVER refuses more than 65,535


def takes_gram_twin(matrix: Tensor) -> bool:
    """Return whether half of the tiles is faster for the Gram matrix; whether the twin supports it is not checked."""
    least = GRAM_TWIN.get(matrix.dtype)
    return least is not None and matrix.is_cuda and min(matrix.shape[-2:]) >= least and not product_rounding(matrix)


def half_pays(device: torch.device) -> bool:
    """Return whether products in bfloat16 are several times faster than in float32 there."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= HALF_FROM


def eigenvalues_on_host(matrix: Tensor) -> bool:
    """Return whether the host computes eigenvalues of these symmetric matrices faster."""
    return matrix.is_cuda and matrix.shape[-1] in HOST_EIGENVALUES
