"""A report as a picture: a panel a contest, a bar a system, a line for the roof."""

from pathlib import Path
from typing import Any

from torchtune_fused.benchmarks.contest import PEERS

_OURS, _PEER, _ROOF = "#d1495b", "#a9b4c2", "#2e4057"


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw the contests of a report.

    Args:
        report (dict[str, Any]): As the benchmark recipe writes it to JSON.
        path (Path): The PNG file to write.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    contests = [contest for contest in report["contests"] if contest["systems"]]
    heights = [1.2 + 0.4 * len(contest["systems"]) for contest in contests]
    figure = Figure(figsize=(9, sum(heights) + 0.8), layout="constrained", dpi=150)
    panels = figure.subplots(len(contests), squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, contest in zip(panels.flat, contests, strict=True):
        _draw(axes, contest)
    about = report["environment"]
    versions = ", ".join(f"{name} {v}" for name, v in about["versions"].items() if v)
    figure.suptitle(f"{report['model']}, {report['dtype']}, {about['device']}", fontsize=12)
    figure.supxlabel(f"{versions}; {about['date'][:10]}", fontsize=6, color="gray")
    figure.savefig(path)


def _draw(axes, contest: dict[str, Any]) -> None:
    names = list(contest["systems"])[::-1]  # bars are drawn from the bottom up
    rates = [contest["systems"][name]["tokens_per_second"] for name in names]
    colors = [_PEER if name in PEERS else _OURS for name in names]
    bars = axes.barh(names, rates, color=colors, height=0.7)
    axes.bar_label(
        bars, [_label(contest["systems"][name]) for name in names], padding=4, fontsize=8
    )
    roof = contest["roof"]
    if roof:
        axes.axvline(roof["tokens_per_second"], color=_ROOF, linestyle="--", linewidth=1.2)
        axes.annotate(
            f"roof {_rate(roof)}",
            (roof["tokens_per_second"], 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=_ROOF,
        )
    limit = max([*rates, roof["tokens_per_second"] if roof else 0])
    axes.set_xlim(0, limit * 1.3)  # room for the labels
    axes.set_title(contest["work"], loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel("tokens per second", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _label(figures: dict[str, Any]) -> str:
    parts = [_rate(figures)]
    if figures["of_roof"] is None:
        parts.append(f"{figures['seconds']:.3g} s")
    else:
        parts.append(f"{figures['of_roof']:.0%} of the roof")
    if figures["peak_bytes"] is not None:
        parts.append(f"{figures['peak_bytes'] / 2**30:.1f} GiB")
    return ", ".join(parts)


def _rate(of: dict[str, Any]) -> str:
    rate = of["tokens_per_second"]
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
