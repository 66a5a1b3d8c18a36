"""Search on a Ray cluster, and go on where it stopped when started again.

    python examples/ray_cluster.py                                  # the cores of this machine
    ray job submit --working-dir . -- python examples/ray_cluster.py --run-dir /shared/runs/a
    python examples/ray_cluster.py --gpus-per-worker 0.5            # two workers on each GPU

docs/ray.md says what is sent where, and what happens when a node is lost.
"""

import argparse
import logging

import torch
from torch import nn

import autoprune
from autoprune.execution import RayExecutor


def make_model() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--address", help="such as auto or ray://host:10001; by default this machine, or the job's cluster"
    )
    parser.add_argument("--workers", type=int, help="by default as many as fit")
    parser.add_argument("--gpus-per-worker", type=float, default=0.0)
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--run-dir", default="runs/ray")
    parser.add_argument("--short", action="store_true", help="two workers and eight trials")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")

    workers = 2 if options.short else options.workers
    result = autoprune.search(
        make_model(),
        "flops <= 50%",
        example=torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
        trials=8 if options.short else options.trials,
        execution=autoprune.Execution(
            executor=RayExecutor(options.address, workers, gpus_per_worker=options.gpus_per_worker),
            run_dir=options.run_dir,
            resume=True,
        ),
    )
    print(result)


if __name__ == "__main__":
    main()
