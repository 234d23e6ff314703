"""Notebooks as pages of the site: their text, their code, and the outputs that are stored in them. And links
that lead out of docs/, which only a checkout has."""

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Puts a page of Markdown in the place of every notebook."""
    for file in [f for f in files if f.src_uri.endswith(".ipynb")]:
        files.remove(file)
        text = markdown(Path(config.docs_dir, file.src_uri))
        page = File.generated(config, file.src_uri.removesuffix("ipynb") + "md", content=text)
        page.edit_uri = file.src_uri
        files.append(page)
    return files


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The menu names notebooks by their files."""
    config.nav = json.loads(json.dumps(config.nav).replace('.ipynb"', '.md"'))
    return config


def on_page_markdown(text: str, *, page: Page, **kwargs: Any) -> str:
    """Pages link to notebooks by their files; of links to other files of the checkout the path is left."""
    if "/" not in page.file.src_uri:
        text = re.sub(r"\[([^\]]+)\]\(\.\./([^)]+)\)", r"\1 (`\2`)", text)
    return text.replace(".ipynb)", ".md)")


def markdown(path: Path) -> str:
    """The notebook in `path` as Markdown."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join(part for cell in cells for part in _cell(cell))


def _cell(cell: dict[str, Any]) -> list[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return [source]
    return [f"```python\n{source}\n```", *map(_output, cell["outputs"])]


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        image = "".join(data["image/png"]).replace("\n", "")
        return f"![the plot of the cell above](data:image/png;base64,{image})"
    text = "".join(output.get("text") or data.get("text/plain", ""))
    return f"```text\n{text.rstrip()}\n```"
