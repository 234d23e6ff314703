"""The check of the Hopper kernels against XLA in float32, on the GPU that they are to run on.

    python -m kernels_pallas.nsa.checking                     # what is shipped for, and write the record
    python -m kernels_pallas.nsa.checking --also 32/8,64/64,bfloat16

`cases.py` says at what sizes, `comparison.py` what is compared, `choice.py` when a choice of blocks is right,
`decoding.py` the same for one token over a cache. The record is described in `kernels_pallas/nsa/records`.
"""

from kernels_pallas.nsa.checking.cases import CASES, SMALL_CASES, CheckCase, also
from kernels_pallas.nsa.checking.comparison import Finding, Prepared, leaves_blocks_out, prepare
from kernels_pallas.nsa.checking.recording import record_of, rights

__all__ = [
    "CASES",
    "SMALL_CASES",
    "CheckCase",
    "Finding",
    "Prepared",
    "also",
    "leaves_blocks_out",
    "prepare",
    "record_of",
    "rights",
]
