"""What is about one paper, by paper: its claims with the rules that judge them, its sections of the page, its
plots."""

from jaxlab.reporting.papers.label_words import rules as label_words
from jaxlab.reporting.papers.nsa import rules as nsa
from jaxlab.reporting.papers.skill_injection import rules as skill_injection

CLAIMS = {claim.id: claim for claim in (*nsa.CLAIMS, *skill_injection.CLAIMS, *label_words.CLAIMS)}
"""All claims of the papers by id."""
