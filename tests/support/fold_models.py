"""Small models in which channels of one layer reach others in many ways."""

import torch
from torch import nn
from torch.nn import functional as F


def filled(model: nn.Module) -> nn.Module:
    """A model in evaluation mode whose parameters are random and away from 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            numbers = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                parameter.copy_(numbers * 0.3)
            elif parameter.dim() < 2:
                parameter.add_(numbers * 0.3)
            else:
                parameter.copy_(numbers / parameter.shape[-1] ** 0.5)
    return model.eval()


def rows(*shape: int, seed: int = 1) -> torch.Tensor:
    """Normally distributed numbers, always the same."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class GainNorm(nn.Module):
    """RMSNorm whose gain is its weight plus a constant, as Gemma's is."""

    def __init__(self, width: int, offset: float = 0.0) -> None:
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.zeros(width) + 1 - offset), offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        gain = self.weight.float() + self.offset if self.offset else self.weight
        return (normed * gain).type_as(x)


class Attention(nn.Module):
    """Attention with fewer heads of keys and values than of queries.

    Args:
        how: "repeat" repeats the heads, "gqa" lets torch do it, "manual" writes the products out,
            "einsum" writes them as einsum.
    """

    def __init__(self, width: int = 16, heads: int = 4, groups: int = 2, how: str = "repeat"):
        super().__init__()
        self.heads, self.groups, self.how = heads, groups, how
        size = width // heads
        self.q, self.o = nn.Linear(width, width), nn.Linear(width, width)
        self.k, self.v = nn.Linear(width, groups * size), nn.Linear(width, groups * size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k = self.k(x).unflatten(-1, (self.groups, -1)).transpose(1, 2)
        v = self.v(x).unflatten(-1, (self.groups, -1)).transpose(1, 2)
        times = self.heads // self.groups
        if self.how == "gqa":
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            if self.how == "repeat":
                k, v = (
                    t[:, :, None].expand(-1, -1, times, -1, -1).reshape(q.shape) for t in (k, v)
                )
                out = F.scaled_dot_product_attention(q, k, v)
            else:
                k, v = (t.repeat_interleave(times, 1) for t in (k, v))
                p = (q @ k.transpose(-1, -2) / 2).softmax(-1)
                out = torch.einsum("bhqk,bhkd->bhqd", p, v) if self.how == "einsum" else p @ v
        return self.o(out.transpose(1, 2).reshape(x.shape))


class GatedMLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``; with ``fused`` gate and up are one layer."""

    def __init__(self, width: int = 16, hidden: int = 24, fused: bool = False) -> None:
        super().__init__()
        self.fused = fused
        if fused:
            self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        else:
            self.gate, self.up = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fused:
            gate, up = self.gate_up(x).chunk(2, -1)
        else:
            gate, up = self.gate(x), self.up(x)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """A block of a decoder."""

    def __init__(self, norm: type[nn.Module] = GainNorm, how: str = "repeat", fused: bool = False):
        super().__init__()
        self.norm1, self.norm2 = norm(16), norm(16)
        self.attention, self.mlp = Attention(how=how), GatedMLP(fused=fused)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Experts(nn.Module):
    """A router and experts, whose weights are in one parameter, or in a module each.

    Args:
        modules: the experts are modules.
        every: experts that no token chose are called, too, without rows.
        count: the number of experts.
    """

    def __init__(self, modules: bool, every: bool = False, count: int = 3) -> None:
        super().__init__()
        self.every = every
        self.norm, self.router = GainNorm(16), nn.Linear(16, count, bias=False)
        if modules:
            self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(count))
        else:
            self.weight = nn.Parameter(torch.randn(count, 16, 16) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        chosen = self.router(normed).argmax(-1)
        out = torch.zeros_like(x)
        for index in range(self.router.out_features) if self.every else chosen.unique():
            place = (chosen == index).nonzero()[:, 0]
            if hasattr(self, "weight"):
                out.index_add_(0, place, F.linear(normed[place], self.weight[index]))
            else:
                out.index_add_(0, place, self.experts[index](normed[place]))
        return x + out


class Decoder(nn.Module):
    """A language model: an embedding, blocks, a norm and a head.

    Args:
        norm: makes the norms.
        tied: the head shares the weight of the embedding.
        positions: a second embedding is added.
    """

    def __init__(
        self, norm: type[nn.Module] = GainNorm, tied: bool = False, positions: bool = False
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 16)
        self.positions = nn.Parameter(torch.randn(1, 12, 16)) if positions else None
        self.blocks = nn.ModuleList(Block(norm) for _ in range(2))
        self.norm, self.head = norm(16), nn.Linear(16, 30, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions[:, : tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    """Numbers of tokens, always the same."""
    return torch.randint(0, 30, shape, generator=torch.Generator().manual_seed(seed))
