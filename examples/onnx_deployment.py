"""Prune, export to ONNX, and run the file under onnxruntime (pip install autoprune[onnx]).

python examples/onnx_deployment.py [--short]: the file is compared with the module before it is kept.
"""

import sys
import time

import onnxruntime
import torch
from quickstart import ResNet

import autoprune


def milliseconds(session: onnxruntime.InferenceSession, x: torch.Tensor, runs: int) -> float:
    inputs = {session.get_inputs()[0].name: x.numpy()}
    session.run(None, inputs)
    began = time.perf_counter()
    for _ in range(runs):
        session.run(None, inputs)
    return 1000 * (time.perf_counter() - began) / runs


def main() -> None:
    short = "--short" in sys.argv
    torch.manual_seed(0)
    model = ResNet((8, 8, 8), 1).eval() if short else ResNet().eval()
    x = torch.randn(2, 1, 8, 8)
    small = autoprune.search(model, "flops <= 40%", example=x, trials=4 if short else 60).build()
    for name, module in (("dense", model), ("small", small)):
        print(autoprune.export(module, f"{name}.onnx", x))
        session = onnxruntime.InferenceSession(f"{name}.onnx")
        print(f"{name}: {milliseconds(session, torch.randn(16, 1, 8, 8), 3 if short else 200):.3f} ms for 16 pictures")


if __name__ == "__main__":
    main()
