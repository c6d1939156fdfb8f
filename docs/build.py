"""What MkDocs does for the site beyond its plugins.

- Pages that have their home elsewhere: README.md, the notebooks and the configs. Links are followed to where things lie in
  the repository, so that a page reads as well on a code host as on the site.
- Formulas become MathML while the site is built, which browsers show without a script.
- No page fetches anything from elsewhere.
- The tables of flags are made from the classes' docstrings, read as text: nothing of the package is imported.

Notebooks are kept without outputs. Where LMLIGHT_NOTEBOOKS_EXECUTED names a folder, the executed copies there are shown in
their place; `pytest -m notebooks` puts them there, and trains at full length with LMLIGHT_NOTEBOOKS_FULL=1.
"""

from __future__ import annotations

import ast
import base64
import html
import json
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
import latex2mathml.converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.structure.toc import AnchorLink

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s]+)(?=\))")
FORMULA = re.compile(r'<(?:span|div) class="arithmatex">(.*?)</(?:span|div)>', re.DOTALL)
HEADING_FORMULA = re.compile(r"(\\\(.*?\\\))")
FLAGS = re.compile(r"<!-- flags (\S+) (\S+) -->")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made from other files."""

    def add(uri: str, content: str | bytes) -> None:
        files.append(File.generated(config, uri, content=content))

    readme = with_links((ROOT / "README.md").read_text("utf-8"), "README.md", "index.md")
    add("index.md", f"---\nhide: [navigation]\n---\n{readme}")
    add("configs.md", configs_page())
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        uri = f"notebooks/{path.stem}.md"
        page, pictures = notebook_page(path)
        add(uri, page)
        add(f"notebooks/{path.name}", path.read_bytes())
        for name, picture in pictures.items():
            add(f"notebooks/{name}", picture)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Follows links out of docs/, and fills in the tables of flags."""
    if page.file.generated_by is None:
        markdown = with_links(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)
    return FLAGS.sub(lambda match: flags_table(match[1], match[2]), markdown)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas as MathML."""

    for heading in headings(page.toc.items):
        heading.title = HEADING_FORMULA.sub(mathml, heading.title)
    return FORMULA.sub(mathml, content)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Holds that a page needs nothing from elsewhere to be shown."""
    if foreign := re.search(r"<(?:script|img|link|iframe)\b[^>]*\b(?:src|href)=.?(?:https?:)?//[^>]*>", output):
        raise PluginError(f"{page.file.src_uri} fetches from elsewhere: {foreign[0]}")
    return output


def headings(items: list[AnchorLink]) -> Iterator[AnchorLink]:
    """Those of a page and, below each, its own."""
    for item in items:
        yield item
        yield from headings(item.children)


def mathml(match: re.Match[str]) -> str:
    r"""A formula between `\(` and `\)`, or `\[` and `\]`."""
    formula = html.unescape(match[1])
    result = latex2mathml.converter.convert(formula[2:-2], display="block" if formula.startswith("\\[") else "inline")
    return re.sub(r"<mi>ln</mi>(?!<mo)", '<mi>ln</mi><mspace width="0.17em"/>', result)  # as LaTeX does


def with_links(markdown: str, source: str, uri: str) -> str:
    """The text of `source`, a path in the repository, with the links that its page at `uri` must have."""

    def link(match: re.Match[str]) -> str:
        target, _, anchor = match[1].partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        there = page_of(path)
        if there is None:
            raise PluginError(f"{source} links to {path}, which the site does not have")
        there, _, own_anchor = there.partition("#")
        anchor = anchor or own_anchor
        return posixpath.relpath(there, posixpath.dirname(uri) or ".") + (f"#{anchor}" if anchor else "")

    outside_code = re.split(r"(^```.*?^```)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else LINK.sub(link, part) for part in outside_code)


def page_of(path: str) -> str | None:
    """Where the site has a file of the repository; None if nowhere."""
    folder, name = posixpath.split(path)
    if not (ROOT / path).exists():
        return None
    if path == "README.md":
        return "index.md"
    if path == "notebooks":
        return "notebooks/01-text-to-tokens.md"
    if folder == "notebooks":
        return f"notebooks/{Path(name).stem}.md"
    if folder == "configs":
        return f"configs.md#{name.replace('.', '')}"
    return path.removeprefix("docs/") if path.startswith("docs/") else None


def configs_page() -> str:
    """All of configs/, to be read in one place."""
    paths = sorted((ROOT / "configs").glob("*.yaml"))
    listings = [f"## {path.name}\n\n```yaml\n{path.read_text('utf-8').rstrip()}\n```\n" for path in paths]
    about = "Each config holds only what differs from the defaults. Configs can be combined: later ones and flags win."
    example = "lmlight fit --config configs/gpt2-124m.yaml --config configs/ddp.yaml --trainer.max_steps 1000"
    return "\n".join(["# Configs", "", about, "", f"```sh\n{example}\n```", "", *listings])


def notebook_page(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook in Markdown, and its pictures by their names."""
    notebook = json.loads(path.read_text("utf-8"))
    about = f"[Download this notebook]({path.name}){{ download }}"
    if folder := os.environ.get("LMLIGHT_NOTEBOOKS_EXECUTED"):
        executed = json.loads((ROOT / folder / path.name).read_text("utf-8"))
        if [cell["source"] for cell in executed["cells"]] != [cell["source"] for cell in notebook["cells"]]:
            raise PluginError(f"{folder}/{path.name} is not of this {path.name}: execute it again")
        notebook = executed
        if notebook["metadata"]["shortened"]:
            about += ". The outputs below are from a run with shorter training than yours."
    else:
        about += " and run it to see the outputs."
    pictures: dict[str, bytes] = {}
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(with_links(source, f"notebooks/{path.name}", f"notebooks/{path.stem}.md"))
            continue
        parts.append(f"```python\n{source}\n```")
        for output in joined(cell["outputs"]):
            if picture := output.get("data", {}).get("image/png"):
                name = f"{path.stem}-{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode(picture)
                parts.append(f"![]({name}){{ .output }}")
            elif text := output_text(output).strip("\n"):
                parts.append(f"```{{.text .output}}\n{text}\n```")
    title, _, rest = "\n\n".join(parts).partition("\n")
    return f"{title}\n\n{about}\n{rest}\n", pictures


def joined(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A cell's outputs, with what it printed in one go where nothing else came between; without warnings."""
    result: list[dict[str, Any]] = []
    for output in outputs:
        if output.get("name") == "stderr":
            continue
        if result and output["output_type"] == result[-1]["output_type"] == "stream":
            result[-1]["text"] = [*result[-1]["text"], *output["text"]]
        else:
            result.append(output)
    return result


def output_text(output: dict[str, Any]) -> str:
    """What a cell printed, or its value."""
    return "".join(output["text"] if output["output_type"] == "stream" else output["data"]["text/plain"])


def flags_table(prefix: str, name: str) -> str:
    """A class's arguments as flags: what they mean is in its docstring, their defaults are in its signature.

    Without those that are no flags: what is given to the class by others, and the seeds, which `--seed_everything` sets.
    """
    found = griffe.load(name, search_paths=[ROOT], docstring_parser="google")
    assert isinstance(found, griffe.Class | griffe.Alias) and found.docstring is not None
    sections = found.docstring.parse("google", warnings=False)
    arguments = next(section.value for section in sections if section.kind is griffe.DocstringSectionKind.parameters)
    rows = ["| flag | default | |", "|---|---|---|"]
    for argument in arguments:
        default = found.parameters[argument.name].default
        if default is None or argument.name == "seed":
            continue
        meaning = " ".join(argument.description.split()).replace("|", "\\|")
        rows.append(f"| `{prefix}{argument.name}` | {as_yaml(str(default))} | {meaning} |")
    return "\n".join(rows)


def as_yaml(default: str) -> str:
    """A default as it would be written in a config; nothing where it is made by a call."""
    if default == "field(default_factory=list)":
        return "`[]`"
    try:
        return f"`{json.dumps(ast.literal_eval(default)).strip(chr(34))}`"
    except ValueError:
        return ""
