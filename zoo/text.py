"""Networks over text: tokens (b, t) to classes, tags and next tokens."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TextCnn(nn.Module):
    """Convolutions of several lengths over words, each pooled by maximum (Kim, 2014)."""

    def __init__(self, words: int = 50, width: int = 16, maps: int = 20, classes: int = 4):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.convs = nn.ModuleList(nn.Conv2d(1, maps, (length, width)) for length in (2, 3, 4))
        self.head = nn.Linear(3 * maps, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens).unsqueeze(1)
        pooled = [F.relu(conv(x)).squeeze(3).max(dim=2).values for conv in self.convs]
        return self.head(F.dropout(torch.cat(pooled, dim=1), 0.1, self.training))


class CharHighway(nn.Module):
    """Character convolutions of unequal widths and two highway layers (Kim et al., 2016), then an LSTM."""

    def __init__(self, characters: int = 40, width: int = 8, classes: int = 5):
        super().__init__()
        self.embed = nn.Embedding(characters, width)
        self.convs = nn.ModuleList(nn.Conv1d(width, 6 * length, length) for length in (1, 2, 3))
        self.carry, self.change = (nn.ModuleList(nn.Linear(36, 36) for _ in range(2)) for _ in range(2))
        self.lstm = nn.LSTM(36, 20, batch_first=True)
        self.head = nn.Linear(20, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        b, words, length = tokens.shape
        x = self.embed(tokens.reshape(b * words, length)).transpose(1, 2)
        x = torch.cat([torch.tanh(conv(x)).amax(2) for conv in self.convs], dim=1)
        for carry, change in zip(self.carry, self.change, strict=True):
            gate = torch.sigmoid(carry(x))
            x = gate * F.relu(change(x)) + (1 - gate) * x
        hidden, _ = self.lstm(x.view(b, words, -1))
        return self.head(hidden)


class Tagger(nn.Module):
    """Packed sequences of unequal lengths through a bidirectional LSTM, tags of every word."""

    def __init__(self, words: int = 50, width: int = 16, tags: int = 5):
        super().__init__()
        self.embed = nn.Embedding(words, width, padding_idx=0)
        self.lstm = nn.LSTM(width, 14, bidirectional=True, batch_first=True)
        self.head = nn.Linear(28, tags)

    def forward(self, tokens: Tensor) -> Tensor:
        lengths = torch.full((len(tokens),), tokens.shape[1])
        packed = nn.utils.rnn.pack_padded_sequence(self.embed(tokens), lengths, batch_first=True)
        hidden, _ = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return self.head(hidden)


class Decomposable(nn.Module):
    """Two sentences attend to each other, are compared and summed (Parikh et al., 2016)."""

    def __init__(self, words: int = 50, width: int = 16, classes: int = 3):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.attend = nn.Sequential(nn.Linear(width, 20), nn.ReLU(), nn.Linear(20, 20))
        self.compare = nn.Sequential(nn.Linear(2 * width, 24), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(48, 20), nn.ReLU(), nn.Linear(20, classes))

    def forward(self, premise: Tensor, claim: Tensor) -> Tensor:
        a, b = self.embed(premise), self.embed(claim)
        scores = self.attend(a) @ self.attend(b).transpose(1, 2)
        with_b, with_a = scores.softmax(2) @ b, scores.softmax(1).transpose(1, 2) @ a
        left, right = self.compare(torch.cat((a, with_b), -1)).sum(1), self.compare(torch.cat((b, with_a), -1)).sum(1)
        return self.head(torch.cat((left, right), dim=1))


class SharedLayers(nn.Module):
    """One transformer layer applied several times, and embeddings in two factors (after ALBERT)."""

    def __init__(self, words: int = 50, factor: int = 10, width: int = 24, heads: int = 4, depth: int = 3):
        super().__init__()
        self.depth = depth
        self.embed, self.widen = nn.Embedding(words, factor), nn.Linear(factor, width)
        self.layer = nn.TransformerEncoderLayer(width, heads, 36, activation="gelu", batch_first=True)
        self.pool, self.head = nn.Linear(width, 18), nn.Linear(18, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.widen(self.embed(tokens))
        for _ in range(self.depth):
            x = self.layer(x)
        return self.head(torch.tanh(self.pool(x[:, 0])))


class Rms(nn.Module):
    """Divides by the root of the mean square, in PyTorch's own operation."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, 1e-5)


class RotaryBlock(nn.Module):
    """Rotary positions, fewer heads for keys and values, and a gated feed-forward layer, as in LLaMA."""

    def __init__(self, width: int, heads: int, shared: int, inner: int):
        super().__init__()
        self.size = width // heads
        self.before, self.between = Rms(width), Rms(width)
        self.query, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.key, self.value = (nn.Linear(width, shared * self.size, bias=False) for _ in range(2))
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, _ = x.shape
        hidden = self.before(x)
        q, k, v = (p(hidden).view(b, t, -1, self.size).transpose(1, 2) for p in (self.query, self.key, self.value))
        q, k = (y * cos + torch.cat((-y[..., self.size // 2 :], y[..., : self.size // 2]), -1) * sin for y in (q, k))
        read = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(read.transpose(1, 2).reshape(b, t, -1))
        hidden = self.between(x)
        return x + self.down(F.silu(self.gate(hidden)) * self.up(hidden))


class Rotary(nn.Module):
    """A decoder whose head shares the embedding's weights."""

    def __init__(self, words: int = 50, width: int = 32, heads: int = 4, shared: int = 2):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.blocks = nn.ModuleList(RotaryBlock(width, heads, shared, 44) for _ in range(2))
        self.norm, self.head = Rms(width), nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight
        size = width // heads
        angles = torch.outer(torch.arange(32.0), 100.0 ** (-torch.arange(0, size, 2) / size))
        self.register_buffer("cos", torch.cat((angles, angles), -1).cos(), persistent=False)
        self.register_buffer("sin", torch.cat((angles, angles), -1).sin(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x, t = self.embed(tokens), tokens.shape[1]
        for block in self.blocks:
            x = block(x, self.cos[:t], self.sin[:t])
        return self.head(self.norm(x))


class RelativeBias(nn.Module):
    """An encoder and a decoder with a learned bias for how far words lie apart, scores unscaled (after T5)."""

    def __init__(self, words: int = 50, width: int = 24, heads: int = 3, size: int = 8, far: int = 16):
        super().__init__()
        self.heads, self.far = heads, far
        self.embed, self.near = nn.Embedding(words, width), nn.Embedding(2 * far + 1, heads)
        self.norms = nn.ModuleList(Rms(width) for _ in range(4))
        self.read = nn.ModuleList(nn.Linear(width, 3 * heads * size, bias=False) for _ in range(2))
        self.cross_q = nn.Linear(width, heads * size, bias=False)
        self.cross_kv = nn.Linear(width, 2 * heads * size, bias=False)
        self.out = nn.ModuleList(nn.Linear(heads * size, width, bias=False) for _ in range(3))
        self.feed = nn.Sequential(nn.Linear(width, 40, bias=False), nn.ReLU(), nn.Linear(40, width, bias=False))
        self.head = nn.Linear(width, words)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float) -> Tensor:
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        weights = (q @ k.transpose(-1, -2) + bias).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    def apart(self, t: int) -> Tensor:
        steps = torch.arange(t)
        distance = (steps[None] - steps[:, None]).clamp(-self.far, self.far) + self.far
        return self.near(distance).permute(2, 0, 1)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        x = self.embed(source)
        x = x + self.out[0](self.attend(*self.read[0](self.norms[0](x)).chunk(3, -1), self.apart(source.shape[1])))
        y = self.embed(target)
        t = target.shape[1]
        late = torch.full((t, t), -math.inf).triu(1)
        y = y + self.out[1](self.attend(*self.read[1](self.norms[1](y)).chunk(3, -1), self.apart(t) + late))
        y = y + self.out[2](self.attend(self.cross_q(self.norms[2](y)), *self.cross_kv(x).chunk(2, -1), 0.0))
        return self.head(y + self.feed(self.norms[3](y)))


class LinearAttention(nn.Module):
    """Keys and values are summed before queries read them, with no softmax (Katharopoulos et al., 2020), rectified."""

    def __init__(self, words: int = 50, width: int = 24, heads: int = 4, classes: int = 4):
        super().__init__()
        self.heads = heads
        self.embed, self.norm = nn.Embedding(words, width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out, self.head = nn.Linear(width, width), nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        hidden = self.norm(x)
        q, k, v = (p(hidden).unflatten(-1, (self.heads, -1)) for p in (self.query, self.key, self.value))
        q, k = F.relu(q), F.relu(k)
        memory = torch.einsum("bthd,bthe->bhde", k, v)
        weight = 1 / torch.einsum("bthd,bhd->bth", q, k.sum(1)).clamp(min=1e-3)
        read = torch.einsum("bthd,bhde,bth->bthe", q, memory, weight)
        return self.head((x + self.out(read.flatten(2))).mean(1))


class SpatialGate(nn.Module):
    """A gate that mixes positions in place of attention (gMLP, Liu et al., 2021)."""

    def __init__(self, words: int = 50, length: int = 10, width: int = 20, inner: int = 32, classes: int = 4):
        super().__init__()
        self.embed, self.norm = nn.Embedding(words, width), nn.LayerNorm(width)
        self.enter, self.gate_norm = nn.Linear(width, 2 * inner), nn.LayerNorm(inner)
        self.mix, self.leave = nn.Conv1d(length, length, 1), nn.Linear(inner, width)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        kept, gate = F.gelu(self.enter(self.norm(x))).chunk(2, dim=-1)
        x = x + self.leave(kept * self.mix(self.gate_norm(gate)))
        return self.head(x.mean(1))


class FewKeys(nn.Module):
    """Keys and values projected to fewer positions (Linformer, Wang et al., 2020)."""

    def __init__(self, words: int = 50, length: int = 10, width: int = 24, heads: int = 4, few: int = 4):
        super().__init__()
        self.heads = heads
        self.embed, self.norm = nn.Embedding(words, width), nn.LayerNorm(width)
        self.qkv, self.few = nn.Linear(width, 3 * width), nn.Linear(length, few, bias=False)
        self.out, self.head = nn.Linear(width, width), nn.Linear(width, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        k, v = (self.few(y.transpose(-1, -2)).transpose(-1, -2) for y in (k, v))
        weights = (q @ k.transpose(-1, -2) * (c // self.heads) ** -0.5).softmax(-1)
        return self.head(x + self.out((weights @ v).transpose(1, 2).reshape(b, t, c)))


class AlignedDecoder(nn.Module):
    """A GRU cell steps through an answer and reads the source by additive attention (Bahdanau et al., 2015)."""

    def __init__(self, words: int = 40, width: int = 16, steps: int = 3):
        super().__init__()
        self.steps = steps
        self.embed = nn.Embedding(words, width)
        self.encode = nn.GRU(width, width, batch_first=True)
        self.left, self.right = nn.Linear(width, 12), nn.Linear(width, 12)
        self.score = nn.Linear(12, 1, bias=False)
        self.cell = nn.GRUCell(width, width)
        self.head = nn.Linear(2 * width, words)

    def forward(self, tokens: Tensor) -> Tensor:
        memory, last = self.encode(self.embed(tokens))
        state, outputs = last[-1], []
        for _ in range(self.steps):
            weights = self.score(torch.tanh(self.left(memory) + self.right(state).unsqueeze(1))).softmax(1)
            read = (weights * memory).sum(1)
            state = self.cell(read, state)
            outputs.append(self.head(torch.cat((state, read), dim=1)))
        return torch.stack(outputs, dim=1)
