"""Why a merge would be gibberish: what models have against each other, found from disk, in plain words."""

from jaxlab.merging.diagnosis.diagnose import FORMAT, Diagnosis, diagnose, table
from jaxlab.merging.diagnosis.facts import Finding

__all__ = ["FORMAT", "Diagnosis", "Finding", "diagnose", "table"]
