"""Results that display themselves: as a table in rich, as a page in a notebook."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType


class Displayable:
    """A result with a page, which `render.display` registers for its class.

    This is the only module here that imports `render`. The import is deferred until a result is displayed.
    """

    def __rich__(self) -> RenderableType:
        view: RenderableType = _renderer().view(self)
        return view

    def _repr_html_(self) -> str:
        frame: str = _renderer().frame(self)
        return frame

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/plain": _renderer().text(self), "text/html": self._repr_html_()}


def _renderer() -> Any:
    """Import `render.display`.

    The return type is Any, because that module imports the modules of the results.
    """
    from llama_scratch.render import display

    return display
