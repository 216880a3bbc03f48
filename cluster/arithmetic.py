"""Reproducible matrix products on CPUs: MKL's setting for them, made before a process's first product.

MKL chooses, for a product of few rows, among kernels that add up in different orders, and chooses by how its operands
lie in memory. Seen over 16 alignments (30 shapes, float32, AMD Zen 4): matrix-vector products differed in all shapes,
`linear` of few rows in 6 to 10, attention in 5 to 7; with MKL_CBWR in none, at the same speed. Without it a row of a
microbatch would depend on the row's address. The number of threads may still decide the last bits: of 30 shapes, on one
thread and on two, 5 of `linear` and one of attention.
"""

import os

import torch

VARIABLE = "MKL_CBWR"
CUBLAS_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
# As torch calls what the processor can do -> as MKL calls the code that is to be used there, whatever the alignment.
BRANCHES = {"AVX512": "AVX512,STRICT", "AVX2": "AVX2,STRICT"}


def steady_products() -> str:
    """Ask MKL for bits that alignment does not decide, unless the environment says something else; what is asked.

    MKL reads it at its first product, so this comes before any. On CUDA: cuBLAS gets a workspace of fixed size, without
    which its sums may differ from run to run, and float32 is multiplied as float32, not as TF32.
    """
    os.environ.setdefault(CUBLAS_VARIABLE, ":4096:8")
    # Set one operator at a time by torch 2.9's names, cuDNN's could no longer be read by the old one: others read it.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    capability = torch.backends.cpu.get_cpu_capability()
    return os.environ.setdefault(VARIABLE, BRANCHES.get(capability, "COMPATIBLE"))
