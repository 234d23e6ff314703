"""Attention whose backward pass gives information flows, summed over pairs of token classes. README.md beside
this file is the map."""

from kernels_pallas.flow.api import flow_attention, nsa_flow_attention, read_weights, slot_factors
from kernels_pallas.flow.base import FLOW_RESIDUALS
from kernels_pallas.flow.probe import Blocking, Implementation, NsaEdges, Probe, Reduction, check_word

__all__ = [
    "FLOW_RESIDUALS",
    "Blocking",
    "Implementation",
    "NsaEdges",
    "Probe",
    "Reduction",
    "check_word",
    "flow_attention",
    "nsa_flow_attention",
    "read_weights",
    "slot_factors",
]
