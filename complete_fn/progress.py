"""A progress bar for long work: rows, tokens a second, cost so far, time left. Quiet when nobody is looking."""

from __future__ import annotations

import sys
import time
from decimal import Decimal
from typing import Any, Protocol

from complete_fn.logs import printable
from complete_fn.types import Usage


class Progress(Protocol):
    """Told how many rows there are, then of each committed slice. A further start() adds rows."""

    def start(self, rows: int) -> None: ...
    def advance(self, rows: int, usage: Usage, cost: Decimal, currency: str) -> None: ...
    def stop(self) -> None: ...


class Quiet:
    def start(self, rows: int) -> None:
        pass

    def advance(self, rows: int, usage: Usage, cost: Decimal, currency: str) -> None:
        pass

    def stop(self) -> None:
        pass


class Bar:
    """A tqdm bar on stderr, shown from the second second on; the notebook's own bar where there is one."""

    def __init__(self, label: str) -> None:
        self.label = printable(label)
        self.bar: Any = None

    def start(self, rows: int) -> None:
        if self.bar is not None:
            self.bar.total += rows
            return
        self.tokens, self.cost, self.began = 0, Decimal(0), time.monotonic()
        self.bar = bar_type()(total=rows, desc=self.label, unit=" rows", delay=1, smoothing=0.1, dynamic_ncols=True)

    def advance(self, rows: int, usage: Usage, cost: Decimal, currency: str) -> None:
        self.tokens += usage.prompt_tokens + usage.completion_tokens
        self.cost += cost
        rate = self.tokens / max(time.monotonic() - self.began, 1e-9)
        self.bar.set_postfix_str(f"{rate:,.0f} tokens/s, {currency} {self.cost:.4f}", refresh=False)
        self.bar.update(rows)

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.close()


def bar_type() -> Any:
    if in_notebook():
        from tqdm.notebook import tqdm as notebook_bar

        return notebook_bar
    from tqdm import tqdm

    return tqdm


def in_notebook() -> bool:
    """A Jupyter kernel with the widgets that tqdm's notebook bar needs."""
    from importlib.util import find_spec

    return "ipykernel" in sys.modules and find_spec("ipywidgets") is not None


def progress_for(label: str, show: bool | None = None) -> Progress:
    """A bar if asked for, or if not said and a person is looking (a terminal or a notebook)."""
    watched = sys.stderr.isatty() or in_notebook()
    return Bar(label) if show or (show is None and watched) else Quiet()
