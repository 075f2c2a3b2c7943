"""A hook of mkdocs: files of the repository that pages link to become files of the site."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

LINK = re.compile(r"(?<=\]\()([^)#\s:]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the files outside of the documentation that its pages, or pages added here, link to."""
    docs = Path(config.docs_dir)
    pages, added = sorted(docs.glob("*.md")), set[Path]()
    while pages:
        for path in sorted(linked(pages.pop()) - added):
            if not path.is_relative_to(docs):
                added.add(path)
                name = path.relative_to(docs.parent).as_posix()
                files.append(File.generated(config, name, abs_src_path=str(path)))
                pages += [path] * (path.suffix == ".md")
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite links between the documentation and the repository, which share a folder in the site."""
    docs = Path(config.docs_dir)
    source, root = Path(page.file.abs_src_path), docs.parent

    def rewrite(found: re.Match[str]) -> str:
        path = (source.parent / found[1]).resolve()
        if not path.is_file() or not path.is_relative_to(root):
            return found[1]
        place = source.relative_to(docs if source.is_relative_to(docs) else root)
        target = path.relative_to(docs if path.is_relative_to(docs) else root)
        return "/".join([".."] * (len(place.parts) - 1) + [target.as_posix()])

    return LINK.sub(rewrite, markdown)


def linked(page: Path) -> set[Path]:
    """Return the files that a page links to."""

    def found() -> Iterator[Path]:
        for name in LINK.findall(page.read_text(encoding="utf-8")):
            path = (page.parent / name).resolve()
            if path.is_file():
                yield path

    return set(found())
