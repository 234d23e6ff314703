"""The interactive figure 1: what goes into the page, escaped, and nothing from elsewhere."""

import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from jaxlab.icl import pack_maps
from jaxlab.reporting import prompt_page

TOKENS = ["\nReview", ": ", "a </script><script>alert(1)</script>", " <b>bold", ":", " bad", "\n", "x", ":"]


def results(maps):
    parts = ["format" if token.strip() in (":", "") else "text" for token in TOKENS]
    prompt = {"tokens": TOKENS, "labels": [5], "query": 8, "parts": parts, "maps": maps}
    return {"figure1": {**prompt, "answer": " <i>bad", "prediction": None}}


@pytest.fixture(scope="module")
def maps():
    return np.tril(np.random.default_rng(0).random((3, 9, 9)), k=-1).astype(np.float32)


def read(page):
    """The data in the page, and every tag with its attributes."""
    tags, data = [], []

    class Reader(html.parser.HTMLParser):
        inside = False

        def handle_starttag(self, tag, attributes):
            tags.append((tag, dict(attributes)))
            self.inside = tag == "script" and dict(attributes).get("type") == "application/json"

        def handle_data(self, text):
            if self.inside:
                data.append(text)

        def handle_endtag(self, tag):
            self.inside = False

    Reader().feed(page)
    return json.loads("".join(data)), tags


def test_texts_are_data_and_nothing_is_loaded(maps):
    page = prompt_page(results(pack_maps(maps)), "A <title>")
    data, tags = read(page)
    assert data["tokens"] == TOKENS
    assert data["kinds"] == ["text", "format", "text", "text", "format", "label", "format", "text", "last"]
    assert "<b>" not in page
    assert "<i>" not in page
    assert page.count("<script") == 3  # data, the code, its call: none of a token
    assert not any(name in attributes for _, attributes in tags for name in ("src", "href"))
    assert not re.search(r"url\(|@import|fetch\(|https?://(?!www\.w3\.org/2000/svg)", page)
    assert len(page) < 60_000


def test_maps_of_before_they_were_packed(maps):
    rows = [[row[:i].tolist() for i, row in enumerate(layer)] for layer in maps]
    assert read(prompt_page(results(rows), "t"))[0] == read(prompt_page(results(pack_maps(maps)), "t"))[0]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="there is no chromium")
def test_the_page_draws_in_a_browser(maps, tmp_path):
    (tmp_path / "page.html").write_text(prompt_page(results(pack_maps(maps)), "t"))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000"]
    done = subprocess.run(
        [*command, "--dump-dom", f"file://{tmp_path}/page.html#layer=2&token=8"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert 'data-ready="yes"' in done.stdout
    assert (
        len(re.findall(r'<path[^>]*class="(?:pq|ww|first)"', done.stdout)) == 8
    )  # what flows to the last token
    told = re.search(r"\nfrom: (.*)\nto: nothing", done.stdout).group(1)
    values = {int(at): float(value) for at, value in re.findall(r"\((\d+)\) ([\d.e+-]+)", told)}
    assert len(values) == 6
    for at, value in values.items():
        assert value == pytest.approx(maps[1, 8, at], rel=0.04)
