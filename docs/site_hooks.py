"""Hooks of mkdocs: pages of the reference from the source tree, and links to files that are not part of the site."""

from __future__ import annotations

import ast
import posixpath
import re
from collections import Counter
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src"
ROOTS = ("maskft_common", "maskft", "maskft_lab")  # packages whose own files have a page
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#:\s]+)(?:#[^)]*)?\)")


def on_files(files, config):
    """Add a page per room of the packages in ``src``, and one for the files of each root."""
    rooms = sorted(path.parent for path in SOURCE.glob("*/*/__init__.py"))
    for room in (*(SOURCE / name for name in ROOTS), *rooms):
        name = f"reference/{room.name}.md"
        files.append(File.generated(config, name, content=_reference(room)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links that lead out of ``docs/`` name the file in the repository instead."""
    here = posixpath.dirname(page.file.src_uri)

    def out(match: re.Match) -> str:
        text, target = match.groups()
        path = posixpath.normpath(posixpath.join(here, target))
        file = files.get_file_from_path(path)
        if not path.startswith("../") and (file is None or file.inclusion.is_included()):
            return match.group()
        path = posixpath.normpath(posixpath.join("docs", path))
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"{page.file.src_uri} links to {target}, which is not in the repository")
        return f"`{path}`" if text.strip("`") == path else f"{text} (`{path}`)"

    return _LINK.sub(out, markdown)


def on_page_content(html, page, config, files):
    """Roles of Sphinx in docstrings are plain code here."""
    return re.sub(r":(?:class|func|mod|meth|data):(?=<code>)", "", html)


def on_post_page(output, page, config):
    """Names for screen readers: the dialog of search has none, and parts of the contents share theirs."""
    output = output.replace(
        'data-md-component="search" role="dialog"', 'data-md-component="search" role="dialog" aria-label="Search"'
    )
    # The theme's own landmarks, such as "Header", and the sections of the navigation come first.
    landmarks = re.findall(r'<nav class="(?!md-nav")[^"]*" aria-label="([^"]*)"', output)
    sections = re.findall(r'<label class="md-nav__title".*?</span>\s*([^<]*?)\s*</label>', output, re.DOTALL)
    seen = Counter(name.lower() for name in (*landmarks, *sections))

    def numbered(match: re.Match) -> str:
        name = match[1].lower()  # a module "journal" and its class "Journal" sound alike
        seen[name] += 1
        return match[0] if seen[name] == 1 else f'<nav class="md-nav" aria-label="{match[1]} {seen[name]}"'

    return re.sub(r'<nav class="md-nav" aria-label="([^"]*)"', numbered, output)


def _reference(room: Path) -> str:
    prefix = ".".join(room.relative_to(SOURCE).parts)
    paths = [path for path in sorted(room.glob("*.py")) if not path.name.startswith("_") and _is_public(path)]
    doc = ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8"))) or ""
    shown = "::: {}\n    options: {{show_root_full_path: true}}\n\n{}"
    modules = [shown.format(f"{prefix}.{path.stem}", _options(path)) for path in paths]
    return "\n".join([f"# Reference: {prefix}\n", doc, "", *modules])


def _options(path: Path) -> str:
    """Tables of the fields that ``option`` or ``_option`` makes: of a configuration, of a command."""
    tables = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        rows = [_option(field) for field in node.body] if isinstance(node, ast.ClassDef) else []
        rows = [row for row in rows if row]
        if rows:
            head = f"### Fields of {node.name}\n\n| field | type | default | meaning |\n|---|---|---|---|\n"
            tables.append(head + "\n".join(rows) + "\n")
    return "\n".join(tables)


def _option(node: ast.stmt) -> str | None:
    if not (isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call)):
        return None
    words = [part for part in node.value.args if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    if not ast.unparse(node.value.func).endswith("option") or not words:
        return None
    text = max(words, key=lambda word: len(word.value))  # the other argument is the default
    default = next((ast.unparse(part) for part in node.value.args if part is not text), "see the text")
    cells = (f"`{ast.unparse(node.target)}`", f"`{ast.unparse(node.annotation)}`", f"`{default}`", text.value)
    return "| " + " | ".join(cell.replace("%%", "%").replace("|", "\\|") for cell in cells) + " |"


def _is_public(path: Path) -> bool:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    named = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Assign)]
    return bool(named)
