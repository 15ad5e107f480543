"""Does every metric see what there is to see, and nothing where there is nothing? A sanity table of all of them.

    uv run python examples/metric_sanity.py --data-root DATA --output docs/metric-sanity.json --page docs/metrics.md

Three forgetting scenarios on two data sets: rows with wrong labels, a whole class, and the same rows with the right
labels. Every metric is read for models that saw everything (originals), for models that methods made of them, and for
independently retrained ones, each beside another retrained model, the reference. The rule is in `sanity_rule.py`.

`DATA/FashionMNIST/raw` holds the four original idx files, plain or gzipped; without `--data-root` only digits are run.
Models are kept in `--runs`, so an interrupted run goes on where it stopped. `--quick` is a small run on digits.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.reporting import machine
from sanity_measures import GROUP_READINGS, NO_READING, READINGS, Case, Seen, look, make_scene
from sanity_models import METHODS, SCENARIOS, SHADOW, Size, Trained, make_setting, members_for, train_all
from sanity_page import write_page
from sanity_rule import EXPECTED, distance, judge

from lightning_unlearn.procedures.worker_pool import worker_pool

ROLES = ("reference", "second", "third")
FULL = Size(replicates=3, group=4, epochs={"digits": 20, "fashion-mnist": 12})
QUICK = Size(replicates=1, group=4, epochs={"digits": 4})
Groups = dict[str, list[Seen]]


def groups_of(trained: Trained, dataset: str, scenario: str, size: Size, root: str | None) -> tuple[Any, ...]:
    """The scene, for every replicate the models by role, a shadow model and an untrained one."""
    scene = make_scene(make_setting(dataset, scenario, size.epochs[dataset], root), scenario)
    originals, retrained = trained.of(scenario)
    replicates: list[Groups] = []
    for replicate in range(size.replicates):
        found: Groups = {
            name: [look(scene, retrained.load(member)) for member in members_for(size, replicate, role)]
            for role, name in enumerate(ROLES)
        }
        mine = [originals.load(replicate * size.group + place) for place in range(size.group)]
        found["original"] = [look(scene, weights["original"]) for weights in mine]
        for method in METHODS:
            found[method] = [look(scene, weights[f"{scenario}/{method}"]) for weights in mine]
        replicates.append(found)
    return scene, replicates, look(scene, trained.rows.load(SHADOW)), look(scene, None)


def deviations(trained: Trained, dataset: str, scenario: str, size: Size, root: str | None) -> dict[str, Any]:
    """Metric -> the reference's own values, and role -> m(model) - m(reference), one a seed or a replicate."""
    scene, replicates, shadow, blank = groups_of(trained, dataset, scenario, size, root)
    roles = ("original", "second", "third", *METHODS)
    found: dict[str, Any] = {}

    def single(name: str, groups: Groups, role: str, place: int) -> float:
        reference, before = groups["reference"][place], groups["original"][place - 1]
        return READINGS[name](Case(scene, groups[role][place], reference, before, shadow, blank))

    def whole(name: str, groups: Groups, role: str, place: int) -> float:
        return GROUP_READINGS[name](scene, groups[role], groups["reference"])

    for readings, read, places in ((READINGS, single, range(size.group)), (GROUP_READINGS, whole, range(1))):
        for name in readings:
            if (name, scenario) in NO_READING:
                continue
            at = [(groups, place) for groups in replicates for place in places]
            right = [read(name, groups, "reference", place) for groups, place in at]
            found[name] = {"reference": right}
            for role in roles:
                values = [read(name, groups, role, place) for groups, place in at]
                found[name][role] = [value - own for value, own in zip(values, right, strict=True)]
    return found


def rows_of(found: dict[str, Any], dataset: str, scenario: str) -> list[dict[str, Any]]:
    """One row a metric: what the rule says, and how far the methods' models are, in spreads."""
    rows = []
    for name in sorted([*READINGS, *GROUP_READINGS, "UnlearningError"], key=str.lower):
        row: dict[str, Any] = {"dataset": dataset, "scenario": scenario, "metric": name}
        if (name, scenario) in NO_READING:
            rows.append({**row, "why": NO_READING[name, scenario]})
            continue
        values: dict[str, Sequence[float]] = found[name]
        verdict = judge(values["original"], values["second"], values["third"])
        rows.append(
            row
            | {
                "reference": sum(values["reference"]) / len(values["reference"]),
                "spread": verdict.spread,
                "original": verdict.separation,
                "second": verdict.closeness,
                **{method: distance(values[method], verdict.spread) for method in METHODS},
                "finding": verdict.finding,
                "expected": EXPECTED[scenario],
                "sane": verdict.finding == EXPECTED[scenario],
                "deviations": {role: values[role] for role in ("original", "second", "third", *METHODS)},
            }
        )
    return rows


def short(value: Any) -> Any:
    """The same with numbers of four significant digits."""
    if isinstance(value, dict):
        return {key: short(one) for key, one in value.items()}
    if isinstance(value, list):
        return [short(one) for one in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    """Train what is missing, measure, write, and print what the rule says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", help="folder that holds FashionMNIST/raw")
    parser.add_argument("--output", type=Path, default=Path("metric-sanity.json"), help="figures, as JSON")
    parser.add_argument("--page", type=Path, help="page whose tables are written anew; by default beside the JSON")
    parser.add_argument("--runs", help="folder of the models; by default beside the JSON")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="digits alone, and few short trainings")
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = QUICK if options.quick else FULL
    datasets = [name for name in size.epochs if name == "digits" or options.data_root]
    folder = options.runs or str(options.output.with_suffix("")) + "-runs"
    rows, training, started = [], 0.0, time.perf_counter()
    with worker_pool(None, options.workers) as pool:  # one for all trainings: a worker takes seconds to begin
        models = {name: train_all(name, size, options.data_root, folder, pool) for name in datasets}
    for dataset, trained in models.items():
        training += trained.seconds
        for scenario in SCENARIOS:
            rows += rows_of(deviations(trained, dataset, scenario, size, options.data_root), dataset, scenario)
    setting = {
        "replicates": size.replicates, "group": size.group, "epochs": {name: size.epochs[name] for name in datasets},
        "training_seconds": training, "seconds": time.perf_counter() - started,
    }  # fmt: skip
    content = short({"setting": setting, "machine": machine(), "rows": rows})
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(content, separators=(",", ":"), allow_nan=False) + "\n")
    page = options.page or options.output.with_suffix(".md")
    write_page(page, content)
    for row in rows:
        if "finding" in row:
            verdict = "as it should" if row["sane"] else f"not {row['expected']}"
            print(f"{row['dataset']}, {row['scenario']}, {row['metric']}: {row['finding']} ({verdict})")
    print(f"Wrote {options.output} and {page}.")


if __name__ == "__main__":
    main()
