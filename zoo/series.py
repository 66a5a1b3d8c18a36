"""Networks over time: forecasting by convolution, recurrence and basis expansion, and sound by a mix of two."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm


class CausalBlock(nn.Module):
    """Two dilated causal convolutions under weight norm, around a shortcut."""

    def __init__(self, inputs: int, outputs: int, dilation: int, kernel: int = 3):
        super().__init__()
        self.past = dilation * (kernel - 1)
        self.first = weight_norm(nn.Conv1d(inputs, outputs, kernel, padding=self.past, dilation=dilation))
        self.second = weight_norm(nn.Conv1d(outputs, outputs, kernel, padding=self.past, dilation=dilation))
        self.shortcut = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.first(x)[..., : -self.past])
        hidden = F.relu(self.second(hidden)[..., : -self.past])
        return F.relu(hidden + self.shortcut(x))


class Tcn(nn.Module):
    """A temporal convolutional network (Bai et al., 2018); channels (b, 4, t) to a forecast (b, 3)."""

    def __init__(self, width: int = 16, depth: int = 3):
        super().__init__()
        self.blocks = nn.Sequential(*(CausalBlock(width if i else 4, width, 2**i) for i in range(depth)))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x)[..., -1])


class LstmForecaster(nn.Module):
    """Two stacked LSTM layers read (b, t, 5), the last state forecasts three steps."""

    def __init__(self, width: int = 20):
        super().__init__()
        self.lstm = nn.LSTM(5, width, num_layers=2, batch_first=True, dropout=0.1)
        self.head = nn.Sequential(nn.Linear(width, 24), nn.ReLU(), nn.Linear(24, 3))

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.lstm(x)
        return self.head(hidden[:, -1])


class NBeatsBlock(nn.Module):
    """Four layers, then what the block explains of the past and what it foresees, each in a basis of its own."""

    def __init__(self, past: int, future: int, width: int, basis: int = 8):
        super().__init__()
        sizes = (past, width, width, width)
        self.layers = nn.ModuleList(nn.Linear(i, width) for i in sizes)
        self.past = nn.Sequential(nn.Linear(width, basis, bias=False), nn.Linear(basis, past))
        self.future = nn.Sequential(nn.Linear(width, basis, bias=False), nn.Linear(basis, future))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.past(x), self.future(x)


class NBeats(nn.Module):
    """Doubly residual blocks of the generic architecture (Oreshkin et al., 2020); (b, past) to (b, future)."""

    def __init__(self, past: int = 24, future: int = 6, width: int = 32, depth: int = 3):
        super().__init__()
        self.blocks = nn.ModuleList(NBeatsBlock(past, future, width) for _ in range(depth))
        self.future = future

    def forward(self, x: Tensor) -> Tensor:
        forecast = x.new_zeros(len(x), self.future)
        for block in self.blocks:
            explained, foreseen = block(x)
            x, forecast = x - explained, forecast + foreseen
        return forecast


class ConvGru(nn.Module):
    """Convolutions shorten a spectrogram (b, 16, t), a bidirectional GRU reads the rest (after DeepSpeech 2)."""

    def __init__(self, width: int = 24, hidden: int = 12, classes: int = 6):
        super().__init__()
        self.convs = nn.Sequential(
            *(nn.Conv1d(16, width, 5, stride=2, padding=2), nn.BatchNorm1d(width), nn.ReLU()),
            *(nn.Conv1d(width, width, 3, padding=1), nn.BatchNorm1d(width), nn.ReLU()),
        )
        self.gru = nn.GRU(width, hidden, batch_first=True, bidirectional=True)
        self.norm, self.head = nn.LayerNorm(2 * hidden), nn.Linear(2 * hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        hidden, last = self.gru(self.convs(x).transpose(1, 2))
        both = torch.cat((last[0], last[1]), dim=1)
        return self.head(self.norm(hidden.mean(1) + both))


class SpectralConv(nn.Module):
    """Mix the channels of the lowest frequencies, each by a complex matrix of its own; (b, c, t) to (b, c, t)."""

    def __init__(self, width: int, modes: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width, modes, dtype=torch.cfloat) / width)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x)
        _, outputs, modes = self.weight.shape
        mixed = spectrum.new_zeros(len(x), outputs, spectrum.shape[-1])
        mixed[..., :modes] = torch.einsum("bim,iom->bom", spectrum[..., :modes], self.weight)
        return torch.fft.irfft(mixed, n=x.shape[-1])


class FourierOperator(nn.Module):
    """Neural operator on a line (Li et al., 2021): spectral and pointwise convolutions; (b, 1, t) to (b, 1, t)."""

    def __init__(self, width: int = 16, modes: int = 6, depth: int = 2):
        super().__init__()
        self.lift = nn.Conv1d(1, width, 1)
        self.spectral = nn.ModuleList(SpectralConv(width, modes) for _ in range(depth))
        self.pointwise = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(depth))
        self.project = nn.Sequential(nn.Conv1d(width, 24, 1), nn.GELU(), nn.Conv1d(24, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x)
        for spectral, pointwise in zip(self.spectral, self.pointwise, strict=True):
            x = F.gelu(spectral(x) + pointwise(x))
        return self.project(x)
