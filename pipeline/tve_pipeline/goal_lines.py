"""How goals are printed: one JSON line each, as they are measured."""

import json


class Goals:
    """Prints goals as they are measured and remembers whether any fell short."""

    def __init__(self) -> None:
        self.fell_short = False

    def at_least(self, goal: str, value: float | None, bar: float, unit: str) -> None:
        """`value` None: this machine cannot measure it."""
        self._print(goal, value, bar, None if value is None else value >= bar, unit)

    def at_most(self, goal: str, value: float | None, bar: float, unit: str) -> None:
        self._print(goal, value, bar, None if value is None else value <= bar, unit)

    def _print(self, goal: str, value: float | None, bar: float, ok: bool | None, unit: str) -> None:
        shown = None if value is None else round(value, 4)
        print(
            json.dumps({"goal": goal, "value": shown, "bar": bar, "ok": ok, "unit": unit}, ensure_ascii=False),
            flush=True,
        )
        self.fell_short |= ok is False
