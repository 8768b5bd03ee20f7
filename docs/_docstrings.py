"""How docstrings become Markdown: examples as code, the card of a phenomenon as a list."""

import re
from typing import Any

import griffe

CARD = re.compile(r"^(Paper|Question|Measure|Cause|Source|Method) {2,}", re.M)
SOURCE = re.compile(r"^(\s*)Source: ", re.M)


def markdown(text: str, module: bool = False) -> str:
    """The docstring with sections that the documentation's parser knows."""
    text = re.sub(r"^(\s*)Example:$", r"\1Examples:", text, flags=re.M)
    text = SOURCE.sub(r"\1**Source** ", text)
    return CARD.sub(lambda found: f"\n**{found[1]}** ", text) if module else text


class Docstrings(griffe.Extension):
    """Applies `markdown` to everything that is documented."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value, obj.is_module)
