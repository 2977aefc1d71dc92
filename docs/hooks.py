"""What MkDocs does with our pages: a link that leaves docs/ leads to a page that shows the file of the repository."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from griffe import Extension, Object
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
SOURCE = "source/"
"""Where the site has files of the repository, as far as pages link to them."""
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)[^)#\s]+")
PEFT_TYPE = re.compile(r"^( +[\w*]+ )\((`.*?)(?:, \*optional\*.*?)?\):", re.MULTILINE)


class PeftDocstrings(Extension):
    """Reads an argument's type as PEFT writes it; its default is in the signature."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        """Called by Griffe for each object that it has read."""
        if obj.docstring:
            obj.docstring.value = PEFT_TYPE.sub(
                lambda found: f"{found[1]}({found[2].replace('`', '')}):", obj.docstring.value
            )


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add a page for each file of the repository that a page links to, and for those that these link to."""
    pages = list(files.documentation_pages())
    for page in pages:  # which grows
        for target in LINK.findall(page.content_string):
            place = _in_repository(page.src_uri, target)
            if (
                not place.startswith("docs/")
                and (ROOT / place).exists()
                and files.get_file_from_path(_uri(place)) is None
            ):
                shown = _shown(place, config)
                files.append(shown)
                if place.endswith(".md"):
                    pages.append(shown)


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Point links at the pages of the site, but for code that looks like a link."""
    if page.file.abs_src_path is None:
        return markdown

    def target(link: re.Match[str]) -> str:
        place = _in_repository(page.file.src_uri, link[0])
        return posixpath.relpath(_uri(place), posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(target, markdown)


def _in_repository(page: str, target: str) -> str:
    """Where a link of a page leads to, from the root of the repository."""
    original = page.removeprefix(SOURCE) if page.startswith(SOURCE) else f"docs/{page}"
    return posixpath.normpath(posixpath.join(posixpath.dirname(original), target))


def _uri(place: str) -> str:
    """The site's name of a file of the repository."""
    if place.startswith("docs/"):
        return place.removeprefix("docs/")
    return SOURCE + place + ("" if place.endswith((".md", ".png", ".svg")) else ".md")


def _shown(place: str, config: MkDocsConfig) -> File:
    path = ROOT / place
    if place.endswith((".md", ".png", ".svg")):
        return File.generated(config, _uri(place), abs_src_path=str(path))
    if path.is_dir():
        content = "\n".join(f"- `{file.name}`" for file in sorted(path.iterdir()) if file.name[0] not in "._")
    else:
        content = f"````{path.suffix[1:]}\n{path.read_text(encoding='utf-8')}````"
    return File.generated(config, _uri(place), content=f"# `{place}`\n\n{content}\n")
