"""The list of claims."""

from jaxlab.reporting import CLAIMS


def test_every_claim_of_the_papers_is_there():
    wanted = [f"{letter}{n}" for letter, most in (("N", 5), ("M", 5), ("I", 8)) for n in range(1, most + 1)]
    assert list(CLAIMS) == wanted
    assert all(CLAIMS[f"M{n}"].source == "abstract" for n in range(1, 6))
