"""What mkdocs does beyond its configuration: it shows pages of the repository's root, and formulas without scripts."""

import html
import re
from pathlib import Path

from latex2mathml.converter import convert

_FUNCTION = re.compile(r"<mi>(?:log|exp|tanh|max|min)</mi>(?!<mo stretchy|<mrow><mo stretchy)")
_ROOT = re.compile(r"\]\((?:\.\./)?(CONTRIBUTING|CHANGELOG)\.md")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_markdown(markdown, page, config, **_):
    """A page whose front matter names a ``source`` shows that file of the repository, with its links made to fit."""
    if "source" in page.meta:
        text = Path(config.config_file_path).with_name(page.meta["source"]).read_text(encoding="utf-8")
        markdown = text.replace("](docs/", "](")
    return _ROOT.sub(lambda found: f"]({found[1].lower()}.md", markdown)


def on_page_content(content, **_):
    """Formulas become MathML."""
    return _FORMULA.sub(_mathml, content)


def _mathml(found):
    latex, display = html.unescape(found[2]), "inline"
    if found[1] == "div":
        latex, display = re.sub(r"\\(sum|prod|max|min)_", r"\\\1\\limits_", latex), "block"
    return _FUNCTION.sub(r'\g<0><mspace width="0.17em"/>', convert(latex, display=display))
