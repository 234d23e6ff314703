"""In-context learning, looked at from inside: information flows, and what blocking them does."""

from jaxlab.icl.blocking import Setting, blocked_logits, random_words
from jaxlab.icl.flows import flow_shares, flows, saliency_maps
from jaxlab.icl.prompts import Prompts, Roles

__all__ = [
    "Prompts",
    "Roles",
    "Setting",
    "blocked_logits",
    "flow_shares",
    "flows",
    "random_words",
    "saliency_maps",
]
