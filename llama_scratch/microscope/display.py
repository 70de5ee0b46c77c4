"""Results that draw themselves: as a table where rich prints them, as a page in a notebook."""

from __future__ import annotations

from html import escape
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, cast

if TYPE_CHECKING:
    from rich.console import RenderableType


class Displayable:
    """A result that is drawn by `render`, which lies above and is imported only when somebody wants to look.

    page_of: the function of `render.pages` that makes a page of it, "module.function".
    """

    page_function: ClassVar[str]

    def __rich__(self) -> RenderableType:
        return cast("RenderableType", _render("to_terminal").view(self._page()))

    def _repr_html_(self) -> str:
        # In a frame of its own: the page's style and script stay its own.
        page = escape(_render("to_html").html(self._page()))
        return (
            f'<iframe srcdoc="{page}" style="width: 100%; height: 30em; border: 0" '
            "onload=\"this.style.height = this.contentDocument.documentElement.scrollHeight + 'px'\"></iframe>"
        )

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/plain": _render("text").as_text(self.__rich__()), "text/html": self._repr_html_()}

    def _page(self) -> object:
        module, _, function = self.page_function.partition(".")
        return getattr(_render(f"pages.{module}"), function)(self)


def _render(module: str) -> Any:
    return import_module(f"llama_scratch.render.{module}")
