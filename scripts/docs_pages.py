"""Pages of the documentation that do not lie in docs/, and links from pages to other files: a hook of `mkdocs.yml`.

Pages link to each other as they lie in the repository. Here these links become those of the site; a file outside docs/
that a page links to, such as a result, is copied into the site. A link to a file that does not exist fails the build.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "index.md": "README.md",
    "models/smollm2-drafter.md": "models/smollm2-drafter/README.md",
    "models/ztt-million-exits.md": "models/ztt-million-exits/README.md",
    "models/ztt-million.md": "models/ztt-million/README.md",
    "models/vanilla-million.md": "models/vanilla-million/README.md",
    "changelog.md": "CHANGELOG.md",
}
"""Pages from elsewhere: where they stand in the site, and the files of the repository that they are."""
PLACES = {source: place for place, source in PAGES.items()}
LINK = re.compile(r'(\]\(|\bsrc="|\bsrcset=")([^)"#\s]+)')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages from elsewhere."""
    for place, source in PAGES.items():
        files.append(File.generated(config, place, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns the repository's links into the site's, and copies what they need."""
    here = page.file.src_uri
    folder = posixpath.dirname(PAGES.get(here, f"docs/{here}"))

    def moved(link: re.Match[str]) -> str:
        source = posixpath.normpath(posixpath.join(folder, link[2]))
        if not (ROOT / source).is_file():
            return link[0]  # another site's, or dead, which mkdocs notices
        place = place_of(source)
        if place not in files.src_uris:
            files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
        return link[1] + posixpath.relpath(place, posixpath.dirname(here) or ".")

    return LINK.sub(moved, markdown)


def place_of(source: str) -> str:
    """Where in the site a file of the repository stands."""
    if source in PLACES:
        return PLACES[source]
    return source.removeprefix("docs/") if source.startswith("docs/") else f"files/{source}"
