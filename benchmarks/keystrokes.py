"""Measure keystroke latency during loading and with live prediction.

    python -m benchmarks.keystrokes [--model NAME] [--sessions 5] [--record]

Types one key every 60 ms on a pseudo-terminal with 200 columns, and measures the time from sending a key until the
cursor moves. The default model is smollm2. --record writes benchmarks/keystrokes.json and renders
benchmarks/results.md.
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import quantiles

from benchmarks.machine import machine
from benchmarks.report import FOLDER, versions, write_report
from benchmarks.startup import LOADED, until
from tests.helpers.terminal import Terminal

INTERVAL_S = 0.06
TEXTS = (
    "The capital of France is Paris, and the capital of Germany is Berlin; the two are 880 km apart.",
    "def fibonacci(n): return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)  # slow, but short",
    "Once upon a time there was a little girl who lived in a village near the forest with her mother.",
)


def type_text(terminal: Terminal, text: str, stop: str | None = None) -> list[float]:
    """Type a text and measure the latency of each key.

    Args:
        terminal: The terminal.
        text: The text.
        stop: Stop typing when this text is on the screen.

    Returns:
        Seconds until the cursor moved, for each key.
    """
    lags = []
    for key in text:
        column = terminal.screen.cursor.x
        start = time.perf_counter()
        terminal.type(key)
        until(terminal, lambda _, column=column: terminal.screen.cursor.x > column)  # type: ignore[misc]
        lags.append(time.perf_counter() - start)
        while (left := start + INTERVAL_S - time.perf_counter()) > 0 and terminal.read(min(left, 0.005)):
            pass
        if stop and stop in terminal.text:
            break
    return lags


def session(model: str) -> dict[str, list[float]]:
    """Measure key latencies of one session, during loading and with live prediction."""
    with Terminal("--model", model, columns=200) as terminal:
        until(terminal, lambda text: "> " in text)
        loading = type_text(terminal, 4 * TEXTS[0], stop=LOADED)
        terminal.wait_for(LOADED)
        terminal.type("ctrl-c")
        terminal.settle(3)  # wait for the end of background work
        live = []
        for text in TEXTS:
            live += type_text(terminal, text)
            if "entropy" not in terminal.text:
                raise SystemExit(f"Live prediction did not appear. The screen shows: {terminal.text}")
            terminal.type("ctrl-c")
            terminal.settle()
    return {"loading": loading, "live": live}


def measure(model: str, sessions: int) -> dict[str, dict[str, float]]:
    """Measure the key latencies of several sessions.

    Args:
        model: Name of the model.
        sessions: Number of sessions.

    Returns:
        Phase → number of keys, and median, 95th percentile and maximum latency in seconds.
    """
    lags: dict[str, list[float]] = {"loading": [], "live": []}
    for _ in range(sessions):
        for phase, found in session(model).items():
            lags[phase] += found
    return {phase: _summary(found) for phase, found in lags.items()}


def _summary(lags: list[float]) -> dict[str, float]:
    twentieths = quantiles(lags, n=20)
    return {"keys": len(lags), "median_s": twentieths[9], "p95_s": twentieths[18], "longest_s": max(lags)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--sessions", type=int, default=5)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    found = measure(arguments.model, max(1, arguments.sessions))
    if arguments.record:
        kept = {
            "model": arguments.model,
            "interval_s": INTERVAL_S,
            "phases": found,
            "versions": versions(),
            "machine": machine(),
        }
        (FOLDER / "keystrokes.json").write_text(json.dumps(kept, indent=1) + "\n")
        write_report(FOLDER)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
