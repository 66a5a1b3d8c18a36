"""Networks over sound: waves (b, 1, t) and spectrograms, to classes, waves and frames."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm


class WaveNet(nn.Module):
    """Gated dilated convolutions; every layer gives to a sum that the head reads (van den Oord et al., 2016)."""

    def __init__(self, width: int = 12, skip: int = 16, depth: int = 3, levels: int = 10):
        super().__init__()
        self.enter = nn.Conv1d(1, width, 1)
        self.filters, self.gates = (
            nn.ModuleList(nn.Conv1d(width, width, 2, dilation=2**i, padding=2**i) for i in range(depth))
            for _ in range(2)
        )
        self.residual = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(depth - 1))
        self.skip = nn.ModuleList(nn.Conv1d(width, skip, 1) for _ in range(depth))
        self.head = nn.Sequential(nn.ReLU(), nn.Conv1d(skip, 20, 1), nn.ReLU(), nn.Conv1d(20, levels, 1))

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.enter(x), 0
        for i, (filters, gates, skip) in enumerate(zip(self.filters, self.gates, self.skip, strict=True)):
            length = x.shape[-1]
            hidden = torch.tanh(filters(x)[..., :length]) * torch.sigmoid(gates(x)[..., :length])
            total = total + skip(hidden)
            x = x + self.residual[i](hidden) if i < len(self.residual) else x
        return self.head(total)


class WaveUNet(nn.Module):
    """Convolutions down with gated linear units, an LSTM at the bottom, transposed ones up (after Demucs)."""

    def __init__(self, width: int = 8, depth: int = 2):
        super().__init__()
        sizes = [width * 2**i for i in range(depth)]
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv1d(i, o, 4, 2, 1), nn.ReLU(), nn.Conv1d(o, 2 * o, 1), nn.GLU(1))
            for i, o in zip([1, *sizes], sizes, strict=False)
        )
        self.lstm = nn.LSTM(sizes[-1], sizes[-1], bidirectional=True, batch_first=True)
        self.join = nn.Linear(2 * sizes[-1], sizes[-1])
        self.up = nn.ModuleList(
            nn.Sequential(nn.Conv1d(o, 2 * o, 1), nn.GLU(1), nn.ConvTranspose1d(o, i, 4, 2, 1))
            for i, o in zip([1, *sizes], sizes, strict=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for layer in self.down:
            x = layer(x)
            skips.append(x)
        hidden, _ = self.lstm(x.transpose(1, 2))
        x = self.join(hidden).transpose(1, 2)
        for i, layer in reversed(list(enumerate(self.up))):
            x = layer(x + skips.pop())
            x = F.relu(x) if i else x
        return x


class ConvTasNet(nn.Module):
    """A learned basis, masks for two speakers from depthwise blocks, and the basis back (Luo and Mesgarani, 2019)."""

    def __init__(self, basis: int = 20, width: int = 16, speakers: int = 2):
        super().__init__()
        self.speakers = speakers
        self.encode = nn.Conv1d(1, basis, 8, 4, bias=False)
        self.narrow = nn.Sequential(nn.GroupNorm(1, basis), nn.Conv1d(basis, width, 1))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *(nn.Conv1d(width, 28, 1), nn.PReLU(), nn.GroupNorm(1, 28)),
                *(nn.Conv1d(28, 28, 3, padding=2**i, dilation=2**i, groups=28), nn.PReLU(), nn.Conv1d(28, width, 1)),
            )
            for i in range(2)
        )
        self.masks = nn.Sequential(nn.PReLU(), nn.Conv1d(width, speakers * basis, 1))
        self.decode = nn.ConvTranspose1d(basis, 1, 8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mixed = F.relu(self.encode(x))
        hidden = self.narrow(mixed)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        masks = self.masks(hidden).view(len(x), self.speakers, -1, mixed.shape[-1]).sigmoid()
        alone = (masks * mixed.unsqueeze(1)).flatten(0, 1)
        return self.decode(alone).view(len(x), self.speakers, -1)


class PitchTracker(nn.Module):
    """Wide convolutions over a frame, flattened into one layer that reads all of it (after CREPE, Kim et al., 2018)."""

    def __init__(self, width: int = 16, pitches: int = 12):
        super().__init__()
        sizes = (1, width, 2 * width, width)
        self.layers = nn.ModuleList(nn.Conv2d(i, o, (9, 1), padding=(4, 0)) for i, o in pairwise(sizes))
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for o in sizes[1:])
        self.head = nn.Linear(8 * width, pitches)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(-1)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.max_pool2d(norm(F.relu(layer(x))), (2, 1))
        return torch.sigmoid(self.head(x.permute(0, 2, 1, 3).reshape(len(x), -1)))


class Conformer(nn.Module):
    """Half a feed-forward layer, attention, a gated depthwise convolution, and the other half (Gulati et al., 2020)."""

    def __init__(self, mels: int = 12, width: int = 24, heads: int = 4, classes: int = 6):
        super().__init__()
        self.enter = nn.Linear(mels, width)
        self.early, self.late = (
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 40), nn.SiLU(), nn.Linear(40, width)) for _ in range(2)
        )
        self.norm, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, heads, batch_first=True)
        self.before = nn.LayerNorm(width)
        self.convolve = nn.Sequential(
            *(nn.Conv1d(width, 2 * width, 1), nn.GLU(1), nn.Conv1d(width, width, 5, padding=2, groups=width)),
            *(nn.BatchNorm1d(width), nn.SiLU(), nn.Conv1d(width, width, 1)),
        )
        self.final, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        x = x + 0.5 * self.early(x)
        hidden = self.norm(x)
        x = x + self.attention(hidden, hidden, hidden, need_weights=False)[0]
        x = x + self.convolve(self.before(x).transpose(1, 2)).transpose(1, 2)
        x = x + 0.5 * self.late(x)
        return self.head(self.final(x))


class SpectrogramCrnn(nn.Module):
    """The magnitudes of a short-time Fourier transform through convolutions and a GRU to classes of each frame."""

    def __init__(self, window: int = 16, width: int = 8, classes: int = 5):
        super().__init__()
        self.window = window
        self.register_buffer("shape", torch.hann_window(window))
        self.convs = nn.Sequential(
            *(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d((2, 1))),
            *(nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.MaxPool2d((2, 1))),
        )
        self.gru = nn.GRU(2 * width * ((window // 2 + 1) // 4), 12, bidirectional=True, batch_first=True)
        self.head = nn.Linear(24, classes)

    def forward(self, x: Tensor) -> Tensor:
        wave = x.squeeze(1)
        parts = torch.stft(wave, self.window, self.window // 2, window=self.shape, return_complex=True)
        x = self.convs(torch.log1p(parts.abs()).unsqueeze(1))
        hidden, _ = self.gru(x.flatten(1, 2).transpose(1, 2))
        return self.head(hidden)


class SpeakerTdnn(nn.Module):
    """Res2 convolutions with squeeze and excitation, and attentive mean and deviation (after ECAPA-TDNN)."""

    def __init__(self, mels: int = 12, width: int = 24, parts: int = 3, size: int = 10):
        super().__init__()
        self.parts = parts
        self.enter = nn.Sequential(nn.Conv1d(mels, width, 3, padding=1), nn.ReLU(), nn.BatchNorm1d(width))
        part = width // parts
        self.convs = nn.ModuleList(nn.Conv1d(part, part, 3, padding=2, dilation=2) for _ in range(parts - 1))
        self.norms = nn.ModuleList(nn.BatchNorm1d(part) for _ in range(parts - 1))
        self.squeeze = nn.Sequential(nn.Conv1d(width, 8, 1), nn.ReLU(), nn.Conv1d(8, width, 1), nn.Sigmoid())
        self.attend = nn.Sequential(nn.Conv1d(width, 10, 1), nn.Tanh(), nn.Conv1d(10, width, 1, bias=False))
        self.head = nn.Linear(2 * width, size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        first, *rest = x.chunk(self.parts, dim=1)
        out, last = [first], torch.zeros_like(first)
        for part, conv, norm in zip(rest, self.convs, self.norms, strict=True):
            last = norm(F.relu(conv(part + last)))
            out.append(last)
        hidden = torch.cat(out, dim=1)
        x = x + hidden * self.squeeze(hidden.mean(2, keepdim=True))
        weights = self.attend(x).softmax(2)
        mean = (weights * x).sum(2)
        deviation = ((weights * x.square()).sum(2) - mean.square()).clamp(min=1e-4).sqrt()
        return self.head(torch.cat((mean, deviation), dim=1))


class Vocoder(nn.Module):
    """Transposed convolutions under weight norm, with dilated residual blocks (after HiFi-GAN); mels to a wave."""

    def __init__(self, mels: int = 10, width: int = 24):
        super().__init__()
        self.enter = weight_norm(nn.Conv1d(mels, width, 5, padding=2))
        sizes = (width, width // 2, width // 4)
        self.up = nn.ModuleList(weight_norm(nn.ConvTranspose1d(i, o, 4, 2, 1)) for i, o in pairwise(sizes))
        self.blocks = nn.ModuleList(
            nn.ModuleList(weight_norm(nn.Conv1d(o, o, 3, padding=d, dilation=d)) for d in (1, 3)) for o in sizes[1:]
        )
        self.leave = weight_norm(nn.Conv1d(sizes[-1], 1, 5, padding=2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for up, block in zip(self.up, self.blocks, strict=True):
            x = up(F.leaky_relu(x, 0.1))
            for conv in block:
                x = x + conv(F.leaky_relu(x, 0.1))
        return torch.tanh(3 * self.leave(F.leaky_relu(x)))


class KeywordSpotter(nn.Module):
    """Broadcast residuals: a block on frequencies, its mean over them through time, added back (Kim et al., 2021)."""

    def __init__(self, width: int = 16, classes: int = 6):
        super().__init__()
        self.enter = nn.Conv2d(1, width, 3, stride=(2, 1), padding=1)
        self.first = nn.Sequential(
            nn.Conv2d(width, width, (3, 1), padding=(1, 0), groups=width), nn.BatchNorm2d(width), nn.SiLU()
        )
        self.second = nn.Sequential(
            *(nn.Conv2d(width, width, (1, 3), padding=(0, 1), groups=width), nn.BatchNorm2d(width), nn.SiLU()),
            *(nn.Conv2d(width, width, 1), nn.Dropout2d(0.1)),
        )
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.enter(x))
        bands = self.first(x)
        x = F.relu(x + bands + self.second(bands.mean(2, keepdim=True)))
        return self.head(x.mean((2, 3), keepdim=True)).flatten(1)
