"""A contest's outcome as a table."""

from typing import Any

_COLUMNS = ("tokens/s", "ms", "ratio", "of roof", "MFU", "peak GiB")


def table(outcome: dict[str, Any]) -> str:
    """The outcome, as :meth:`Outcome.as_dict` gives it, in lines to print."""
    order = "in turns" if outcome["in_turns"] else "one after another"
    lines = [f"{outcome['work']} (systems ran {order})"]
    if outcome["roof"]:
        roof = outcome["roof"]
        lines.append(f"roof: {roof['tokens_per_second']:,.1f} tokens/s, {roof['explanation']}")
    wide = max(map(len, [*outcome["systems"], *outcome["skipped"]]))
    lines.append(f"  {'':{wide}}" + "".join(f"{column:>11}" for column in _COLUMNS))
    for name, figures in outcome["systems"].items():
        lines.append(f"  {name:{wide}}" + "".join(f"{cell:>11}" for cell in _cells(figures)))
    lines += [f"  {name:{wide}}  skipped: {why}" for name, why in outcome["skipped"].items()]
    return "\n".join(lines)


def _cells(figures: dict[str, Any]) -> list[str]:
    def cell(key: str, form: str, scale: float = 1) -> str:
        return "-" if figures[key] is None else format(figures[key] * scale, form)

    return [
        cell("tokens_per_second", ",.1f"),
        cell("seconds", ",.2f", 1e3),
        cell("ratio", ".2f") + "x",
        cell("of_roof", ".1%"),
        cell("mfu", ".1%"),
        cell("peak_bytes", ".2f", 2**-30),
    ]
