"""In-context learning, looked at from inside: information flows, and what blocking them does."""

from jaxlab.icl.blocking import Setting, blocked_logits, random_words
from jaxlab.icl.prompts import Prompts, Roles
from jaxlab.icl.saliency import flow_shares, flows, saliency_maps

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
