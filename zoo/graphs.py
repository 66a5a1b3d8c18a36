"""Networks over graphs: nodes (n, features), and edges (2, m) or an adjacency matrix."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def gathered(messages: Tensor, target: Tensor, nodes: int) -> Tensor:
    """The sum at each node of the messages (m, d) that go there."""
    return torch.zeros(nodes, messages.shape[1], dtype=messages.dtype).index_add(0, target, messages)


def shares(scores: Tensor, target: Tensor, nodes: int) -> Tensor:
    """A softmax of scores (m, heads) over the edges into each node."""
    raised = (scores - scores.max()).exp()
    total = torch.zeros(nodes, scores.shape[1], dtype=scores.dtype).index_add(0, target, raised)
    return raised / total[target].clamp(min=1e-6)


class Gcn(nn.Module):
    """Features mixed by the normalised adjacency between linear layers (Kipf and Welling, 2017), for a batch."""

    def __init__(self, features: int = 6, width: int = 24, classes: int = 4):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, width, bias=False) for i in (features, width, width))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor, links: Tensor) -> Tensor:
        links = links.sigmoid() + torch.eye(links.shape[-1])
        degree = links.sum(-1).rsqrt()
        links = 2 * degree.unsqueeze(-1) * links * degree.unsqueeze(-2)
        for layer in self.layers:
            x = F.relu(links @ layer(x))
        return self.head(x)


class Sage(nn.Module):
    """Each node joins itself and the mean of its neighbours (Hamilton et al., 2017)."""

    def __init__(self, features: int = 6, width: int = 20, classes: int = 4):
        super().__init__()
        sizes = (features, width, width)
        self.own, self.others = (nn.ModuleList(nn.Linear(i, width) for i in sizes[:2]) for _ in range(2))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges.remainder(len(x)).unbind(-1)
        count = torch.zeros(len(x), dtype=x.dtype).index_add(0, target, torch.ones(len(target), dtype=x.dtype))
        for own, others in zip(self.own, self.others, strict=True):
            mean = gathered(x[source], target, len(x)) / count.clamp(min=1).unsqueeze(1)
            x = F.normalize(F.relu(own(x) + others(mean)), dim=1)
        return self.head(x)


class GatLayer(nn.Module):
    """Heads weigh the edges into a node by what lies at both ends (Velickovic et al., 2018)."""

    def __init__(self, inputs: int, heads: int, size: int):
        super().__init__()
        self.heads, self.size = heads, size
        self.project = nn.Linear(inputs, heads * size, bias=False)
        self.left, self.right = (nn.Parameter(torch.randn(heads, size)) for _ in range(2))

    def forward(self, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
        values = self.project(x).view(len(x), self.heads, self.size)
        left, right = (values * self.left).sum(-1), (values * self.right).sum(-1)
        weights = shares(F.leaky_relu(left[source] + right[target], 0.2), target, len(x))
        return gathered((weights.unsqueeze(-1) * values[source]).flatten(1), target, len(x))


class Gat(nn.Module):
    """Two layers of attention over edges, and a head."""

    def __init__(self, features: int = 6, heads: int = 4, size: int = 6, classes: int = 4):
        super().__init__()
        self.first, self.second = GatLayer(features, heads, size), GatLayer(heads * size, heads, size)
        self.head = nn.Linear(heads * size, classes)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges.remainder(len(x)).unbind(-1)
        x = F.elu(self.first(x, source, target))
        return self.head(F.elu(self.second(x, source, target)))


class Gin(nn.Module):
    """Sums of neighbours through a perceptron with batch norm (Xu et al., 2019), all depths read by the head."""

    def __init__(self, features: int = 6, width: int = 20, classes: int = 4):
        super().__init__()
        self.eps = nn.Parameter(torch.full((3,), 0.1))
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(i, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
            for i in (features, width, width)
        )
        self.head = nn.Linear(3 * width, classes)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges.remainder(len(x)).unbind(-1)
        seen = []
        for i, layer in enumerate(self.layers):
            x = layer((1 + self.eps[i]) * x + gathered(x[source], target, len(x)))
            seen.append(x)
        return self.head(torch.cat(seen, dim=1))


class EdgeConv(nn.Module):
    """Differences to the nearest points, pooled by maximum, over neighbours found in features (Wang et al., 2019)."""

    def __init__(self, width: int = 16, near: int = 4, classes: int = 5):
        super().__init__()
        self.near = near
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(2 * i, width, 1, bias=False), nn.BatchNorm2d(width), nn.LeakyReLU(0.2))
            for i in (3, width)
        )
        self.head = nn.Sequential(nn.Linear(2 * width, 24), nn.ReLU(), nn.Linear(24, classes))

    def forward(self, x: Tensor) -> Tensor:
        seen, places = [], x
        _, nearest = torch.cdist(places.transpose(1, 2), places.transpose(1, 2)).topk(self.near, largest=False)
        for layer in self.layers:
            b, c, n = x.shape
            index = nearest.reshape(b, 1, -1).expand(-1, c, -1)
            around = x.gather(2, index).view(b, c, n, self.near)
            own = x.unsqueeze(3).expand_as(around)
            x = layer(torch.cat((own, around - own), dim=1)).amax(3)
            seen.append(x)
        return self.head(torch.cat(seen, dim=1).mean(2))


class RelationalGcn(nn.Module):
    """A matrix for each kind of edge, mixed from a few shared ones (Schlichtkrull et al., 2018), for a batch."""

    def __init__(self, features: int = 6, width: int = 40, kinds: int = 3, bases: int = 2, classes: int = 4):
        super().__init__()
        self.bases = nn.Parameter(torch.randn(bases, features, width) / features**0.5)
        self.mix = nn.Parameter(torch.randn(kinds, bases))
        self.own = nn.Linear(features, width)
        self.head = nn.Sequential(nn.Linear(width, 36), nn.ReLU(), nn.Linear(36, classes))

    def forward(self, x: Tensor, links: Tensor) -> Tensor:
        matrices = torch.einsum("kb,bio->kio", self.mix, self.bases)
        messages = torch.einsum("bknm,bmi,kio->bno", links.softmax(-1), x, matrices)
        return self.head(F.relu(self.own(x) + messages))


class MessagePassing(nn.Module):
    """Messages from both ends of an edge, read by a GRU cell at each node (Gilmer et al., 2017); a sum at the end."""

    def __init__(self, features: int = 6, width: int = 16, steps: int = 2):
        super().__init__()
        self.steps = steps
        self.enter = nn.Linear(features, width)
        self.message = nn.Sequential(nn.Linear(2 * width, 24), nn.ReLU(), nn.Linear(24, width))
        self.update = nn.GRUCell(width, width)
        self.head = nn.Sequential(nn.Linear(width, 20), nn.ReLU(), nn.Linear(20, 3))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges.remainder(len(x)).unbind(-1)
        hidden = torch.tanh(self.enter(x))
        for _ in range(self.steps):
            messages = self.message(torch.cat((hidden[source], hidden[target]), dim=1))
            hidden = self.update(gathered(messages, target, len(x)), hidden)
        return self.head(hidden)


class ContinuousFilter(nn.Module):
    """Filters made from distances between atoms (after SchNet): kinds (b, n), places (b, n, 3)."""

    def __init__(self, kinds: int = 10, width: int = 20, centres: int = 8):
        super().__init__()
        self.embed = nn.Embedding(kinds, width)
        self.register_buffer("centres", torch.linspace(0.0, 4.0, centres))
        self.filters = nn.Sequential(nn.Linear(centres, width), nn.Softplus(), nn.Linear(width, width))
        self.enter, self.leave = nn.Linear(width, width), nn.Linear(width, width)
        self.head = nn.Sequential(nn.Linear(width, 12), nn.Softplus(), nn.Linear(12, 1))

    def forward(self, kinds: Tensor, places: Tensor) -> Tensor:
        x = self.embed(kinds)
        apart = (places.unsqueeze(1) - places.unsqueeze(2)).square().sum(-1).add(1e-6).sqrt()
        filters = self.filters(torch.exp(-(apart.unsqueeze(-1) - self.centres).square()))
        x = x + self.leave((self.enter(x).unsqueeze(1) * filters).sum(2))
        return self.head(x).sum((1, 2))


class GraphTransformer(nn.Module):
    """Attention of all nodes to all with a bias per head for how they are linked (after Ying et al., 2021)."""

    def __init__(self, features: int = 6, width: int = 24, heads: int = 3, classes: int = 4):
        super().__init__()
        self.heads = heads
        self.enter = nn.Linear(features, width)
        self.bias = nn.Linear(1, heads, bias=False)
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 40), nn.GELU(), nn.Linear(40, width))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor, links: Tensor) -> Tensor:
        x = self.enter(x)
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, self.heads, -1).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, dim=-1))
        bias = self.bias(links.unsqueeze(-1)).permute(0, 3, 1, 2)
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = x + self.out(read.transpose(1, 2).reshape(b, n, -1))
        x = x + self.feed(x)
        return self.head(x)
