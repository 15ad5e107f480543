"""Tables of the study as Markdown, written below the marker of the page that people write."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from gogineni2024_analysis import MARGIN, at_equal_forgetting, chosen, file_label, own_forgets_more, values
from gogineni2024_runs import OBJECTIVES
from gogineni2024_settings import PLACEMENTS, PRUNES, SETS
from studies import Row, spread, table

__all__ = ["sections"]

_PERCENT = ("test_accuracy", "retain_accuracy", "forget_accuracy", "class_accuracy")
_HEADS = {
    "test_accuracy": "test %", "retain_accuracy": "retain %", "forget_accuracy": "forget %",
    "class_accuracy": "class, held out %", "forget_loss": "forget loss", "membership_auroc": "AUROC",
    "membership_attack": "attack", "verification_error": "v",
}  # fmt: skip


def _cells(rows: Sequence[Row], names: Iterable[str]) -> list[str]:
    return [spread((row.get(name) for row in rows), scale=100 if name in _PERCENT else 1) for name in names]


def _settings(rows: Sequence[Row]) -> list[tuple[str, float]]:
    """Ways and fractions in the order of the tables: by way, and the largest fraction first."""
    found = dict.fromkeys((row["way"], row["keep"]) for row in rows if row.get("role") == "own" and row["keep"])
    order = ["amnesiac", *PRUNES]
    return sorted(found, key=lambda one: (order.index(one[0]), -one[1]))


def amnesiac_table(rows: Sequence[Row]) -> list[str]:
    """One forget set in one placement: every subtraction, with and without repair, and the placebo's."""
    plain = list(_HEADS)
    short = ["test_accuracy", "retain_accuracy", "forget_accuracy", "membership_auroc", "membership_attack"]
    control = ["test_accuracy", "forget_accuracy", "forget_loss", "membership_auroc"]
    cells = []
    for way in ("untouched", "retrained", "repair alone"):
        of_way = chosen(rows, way=way)
        bare = ["-"] * len(plain) if way == "repair alone" else _cells(of_way, plain)
        mended = _cells(of_way, short) if way == "repair alone" else ["-"] * len(short)
        cells.append([way, "", *bare, *mended, *["-"] * 2 * (len(control) + 1)])
    for way, keep in _settings(rows):
        of_way = chosen(rows, way=way, keep=keep)
        own, mended = (chosen(of_way, role="own", repaired=repaired) for repaired in (False, True))
        row = [way, f"{keep:g}", *_cells(own, plain), *_cells(mended, short)]
        for repaired in (False, True):
            both = chosen(of_way, repaired=repaired)
            placebo = chosen(both, role="placebo")
            row += [*_cells(placebo, control), own_forgets_more(both) if placebo else "-"]
        cells.append(row)
    columns = ["subtracted", "keep", *_HEADS.values(), *(f"repaired: {_HEADS[name]}" for name in short)]
    for kind in ("placebo", "placebo repaired"):
        columns += [*(f"{kind}: {_HEADS[name]}" for name in control), "own forgets more"]
    return table(columns, cells)


def overview_table(rows: Sequence[Row]) -> list[str]:
    """Test and forget accuracy of few rows of all tables, without repair."""
    keeps = sorted({row["keep"] for row in rows if row.get("way") == "step, magnitude"}, reverse=True)
    shown = [("amnesiac", 1.0, "own"), ("amnesiac", 1.0, "placebo")]
    shown += [("step, magnitude", keep, role) for keep in keeps for role in ("own", "placebo")]
    cells = []
    for placement, name in _cases(rows):
        of_set = chosen(rows, kind="amnesiac", placement=placement, set=name)
        for label, part in (("test %", "test_accuracy"), ("forget %", "forget_accuracy")):
            row = [placement, name, label]
            row += [spread(values(of_set, part, way=way), scale=100) for way in ("untouched", "retrained")]
            for way, keep, role in shown:
                row.append(spread(values(of_set, part, way=way, keep=keep, role=role, repaired=False), scale=100))
            cells.append(row)
    heads = [f"{'amnesiac' if way == 'amnesiac' else f'keep {keep:g}'}, {role}" for way, keep, role in shown]
    return table(["placement", "set", "", "untouched", "retrained", *heads], cells)


def plan_table(rows: Sequence[Row]) -> list[str]:
    """What the plans said beforehand, and the probe behind; the own subtraction."""
    cells = []
    for placement, name in _cases(rows):
        of_set = chosen(rows, kind="amnesiac", placement=placement, set=name)
        for way, keep in _settings(of_set):
            of_way = chosen(of_set, way=way, keep=keep, role="own")
            own, mended = (chosen(of_way, repaired=repaired) for repaired in (False, True))
            cells.append(
                [
                    placement, name, way, f"{keep:g}", *(spread(values(own, part), scale=100) for part in
                    ("touched", "share", "changed")), spread(values(own, "relative_norm")), _counted(own, "damage"),
                    _counted(own, "specificity"), f"{sum(row['refuses'] for row in own)} of {len(own)}",
                    _counted(own, "probe"), _counted(mended, "probe") if mended else "-",
                ]
            )  # fmt: skip
    columns = ["placement", "set", "subtracted", "keep", "steps %", "share of batch %", "weights changed %"]
    columns += ["relative norm", "damage", "specificity", "plan refuses", "probe", "probe, repaired"]
    return table(columns, cells)


def _counted(rows: Sequence[Row], name: str) -> str:
    return ", ".join(f"{word} {count}" for word, count in Counter(row[name] for row in rows).most_common())


def pruning_control_table(rows: Sequence[Row]) -> list[str]:
    """Pruning by magnitude against as many drawn entries, at equal forgetting, without repair."""
    cells = []
    for placement, name in _cases(rows):
        of_set = chosen(rows, kind="amnesiac", placement=placement, set=name)
        bare = [row for row in of_set if row["way"] in ("untouched", "retrained") or not row["repaired"]]
        bare = [row for row in bare if row.get("role") != "placebo"]
        row = [placement, name]
        for way in ("step, magnitude", "sum, magnitude"):
            part = [one for one in bare if one["way"] in (way, "untouched", "amnesiac", "step, random")]
            found = at_equal_forgetting(part, lambda one: one["way"] in ("amnesiac", "step, random"))
            row.append(_differences(found))
        cells.append(row)
    return table(["placement", "set", "step, magnitude", "sum, magnitude"], cells)


def rate_control_table(rows: Sequence[Row]) -> list[str]:
    """Partial updates against a smaller rate, at equal forgetting."""
    masks = [form for form in dict.fromkeys(row.get("form") for row in rows) if form not in (None, *_REFERENCE)]
    cells = []
    for name in SETS:
        of_set = chosen(rows, kind="updates", set=name)
        for objective in OBJECTIVES:
            row = [name, objective]
            for mask in masks:
                part = [{**one, "way": one.get("way", "pass")} for one in of_set]
                part = [
                    one
                    for one in part
                    if one["way"] == "untouched"
                    or (one.get("objective") == objective and one["form"] in (mask, *_REFERENCE))
                ]
                row.append(_differences(at_equal_forgetting(part, lambda one: one.get("form") in _REFERENCE)))
            cells.append(row)
    return table(["set", "objective", *masks], cells)


_REFERENCE = ("naive", "smaller rate")


def _differences(found: Sequence[float]) -> str:
    if not found:
        return "-"
    better = sum(one > 0 for one in found)
    return f"{spread(found, scale=100)} ({better} of {len(found)} above)"


def update_table(rows: Sequence[Row], objective: str) -> list[str]:
    """One objective on one forget set, in every form."""
    cells = [[way, "", *_cells(chosen(rows, way=way), _HEADS), "-"] for way in ("untouched", "retrained")]
    of_objective = chosen(rows, objective=objective)
    for form, fraction in dict.fromkeys((row["form"], row["fraction"]) for row in of_objective):
        part = chosen(of_objective, form=form, fraction=fraction)
        cells.append([form, f"{fraction:g}", *_cells(part, _HEADS), _counted(part, "probe")])
    return table(["form", "fraction", *_HEADS.values(), "probe"], cells)


def storage_table(rows: Sequence[Row]) -> list[str]:
    """Bytes of the stores."""
    found, cells = chosen(rows, kind="storage"), []
    dense = {(row["task"], row["seed"]): row["bytes_on_disk"] for row in found if row["keep"] == 1}
    for task, keep in sorted({(row["task"], row["keep"]) for row in found}, key=lambda one: (one[0], -one[1])):
        part = chosen(found, task=task, keep=keep)
        cells.append(
            [
                task, f"{keep:g}", f"{statistics.fmean(row['steps'] for row in part):,.0f}",
                spread(row["bytes_on_disk"] / 2**20 for row in part),
                spread((row["bytes_on_disk"] / dense[row["task"], row["seed"]] for row in part), scale=100),
                spread(row["bytes_on_disk"] / row["model_bytes"] for row in part),
                spread(row["bytes_per_kept"] for row in part), spread(row["pruning_error"] for row in part),
            ]
        )  # fmt: skip
    columns = ["task", "keep", "steps", "MiB", "% of keep 1", "models", "bytes per kept weight", "error of pruning"]
    return table(columns, cells)


def _cases(rows: Sequence[Row]) -> list[tuple[str, str]]:
    return [(placement, name) for placement in PLACEMENTS for name in SETS if chosen(rows, placement=placement)]


def sections(rows: Sequence[Row], tasks: Sequence[str], figures: Sequence[Path]) -> Iterator[str]:
    """The part of the page that the script writes."""
    yield "## Storage"
    yield from _pictures(figures, "storage")
    yield "\n".join(storage_table(rows))
    for task in tasks:
        of_task, label = chosen(rows, task=task), file_label(task)
        yield f"## {task}: algorithm 1"
        yield from _pictures(figures, f"{label}-keep")
        yield "Without repair, own steps and the placebo's:"
        yield "\n".join(overview_table(of_task))
        yield "What plans and probes said of the own subtraction:"
        yield "\n".join(plan_table(of_task))
        yield (
            "Test accuracy (points) of pruning by magnitude minus that of drawn entries that forget as much (a line "
            "through untouched, drawn fractions and amnesiac, the best of those that forget the same, seed by seed):"
        )
        yield "\n".join(pruning_control_table(of_task))
        for placement, name in _cases(of_task):
            yield f"### {task}, {placement}, {name}"
            if placement == PLACEMENTS[0] and name == SETS[0]:
                yield (
                    f'"Own forgets more": seeds in which own steps left at least {100 * MARGIN:g} points less forget '
                    "accuracy than the placebo's. Where both leave next to none, compare the losses."
                )
            yield "\n".join(amnesiac_table(chosen(of_task, kind="amnesiac", placement=placement, set=name)))
        yield f"## {task}: algorithms 2 and 3"
        yield from (line for name in SETS for line in _pictures(figures, f"{label}-fraction-{name}"))
        yield from _pictures(figures, f"{label}-price")
        yield (
            "Test accuracy (points) of partial updates minus that of a smaller rate that forgets as much (a line "
            "through untouched, smaller rates and naive, the best of those that forget the same, seed by seed):"
        )
        yield "\n".join(rate_control_table(of_task))
        for name in SETS:
            for objective in OBJECTIVES:
                yield f"### {task}, {name}, {objective}"
                yield "\n".join(update_table(chosen(of_task, kind="updates", set=name), objective))


def _pictures(figures: Sequence[Path], ending: str) -> list[str]:
    return [f"![{figure.stem}]({figure.name})" for figure in figures if figure.stem.endswith(f"-{ending}")]
