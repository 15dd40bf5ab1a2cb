"""Predicted against measured latency: the times of single layers, added up.

    python examples/benchmarks/layer_times.py --threads 2

Every network's layers are timed at several widths; then networks of other widths, uniform and
random ones, are built and timed whole, each in turns with the full one. The sum for the full
network is made to fit (its rest is measured), and so are those at a quarter of the channels and at
odd widths; the rows of the table are not.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

import torch
import torchvision
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1]))  # the examples are scripts, not a package
import torchcap
from benchmarks.measure import keep_freed_memory, latencies
from benchmarks.table import format_table
from experiments.protocol import Bars


def main() -> None:
    options = parse_options()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    rows = []
    for name in options.models:
        model = torchvision.models.get_model(name).eval()
        example = torch.randn(options.batch, 3, options.size, options.size)
        graph = torchcap.analyze(model, example)
        table = torchcap.measure_latency(model, example, on_progress=Bars())
        plans = plans_of(graph, options)
        smalls = {
            label: torchcap.compress(model, plan=plan, example_inputs=example)
            for label, plan in plans.items()
        }
        for label, plan in plans.items():
            predicted = torchcap.predict_latency(graph, plan, table)
            # In turns with the full network alone: more of them would empty each other's caches.
            pair = {key: smalls[key] for key in dict.fromkeys(("all", label))}
            timings = latencies(pair, example, repeats=options.repeats, progress=tqdm)
            measured = timings[label].median
            times = [f"{milliseconds:.1f} ms" for milliseconds in (measured, predicted)]
            rows.append([name, label, *times, f"{predicted / measured - 1:+.1%}"])
    print(format_table(["network", "channels kept", "measured", "predicted", "error"], rows))


def plans_of(graph: torchcap.SpaceGraph, options: argparse.Namespace) -> dict[str, torchcap.Plan]:
    plans = {"all": torchcap.Plan.uniform(graph, 1.0)}
    plans |= {f"{ratio:.0%}": torchcap.Plan.uniform(graph, ratio) for ratio in options.ratios}
    draw = random.Random(options.seed)
    for number in range(2):
        ranks = {
            space.name: max(1, round(draw.uniform(0.2, 1) * space.channels / space.blocks))
            * space.blocks
            for space in graph.free
        }
        plans[f"random {number + 1}"] = torchcap.Plan.of(graph, ranks)
    return plans


def parse_options() -> argparse.Namespace:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = ["resnet18", "resnet50", "mobilenet_v2"]
    options.add_argument("--models", nargs="+", default=models, help="builders of torchvision")
    options.add_argument("--ratios", type=float, nargs="+", default=[0.75, 0.5])
    options.add_argument("--size", type=int, default=224)
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--repeats", type=int, default=30)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--seed", type=int, default=0)
    return options.parse_args()


if __name__ == "__main__":
    main()
