"""A compact Llama in plain torch, with the parameter names of Hugging Face's LlamaForCausalLM."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .recipe import Shape

__all__ = ["Llama", "Spellings"]


class RMSNorm(nn.Module):
    """Scale to unit root mean square (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention with grouped heads and rotary positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.size = shape.hidden // shape.heads
        self.q_proj = nn.Linear(shape.hidden, shape.heads * self.size, bias=False)
        self.k_proj = nn.Linear(shape.hidden, shape.kv_heads * self.size, bias=False)
        self.v_proj = nn.Linear(shape.hidden, shape.kv_heads * self.size, bias=False)
        self.o_proj = nn.Linear(shape.heads * self.size, shape.hidden, bias=False)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], cache: KVCache | None) -> Tensor:
        """Attend; x is (batch, time, hidden). With a cache, its keys and values come first and are extended."""
        batch, time, _ = x.shape
        projected = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (y.view(batch, time, -1, self.size).transpose(1, 2) for y in projected)  # (batch, heads, time, size)
        q, k = _rotate(q, angles), _rotate(k, angles)
        if cache is not None:
            k, v = cache.extend(self, k, v)
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=time > 1)
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(batch, time, -1))
        return out


class MLP(nn.Module):
    """The gated feed-forward part (SwiGLU, Shazeer 2020)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.inner, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.inner, bias=False)
        self.down_proj = nn.Linear(shape.inner, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position by itself."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """Attention and MLP, each normalised first and added to what came in."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden, shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden, shape.norm_eps)
        self.mlp = MLP(shape)

    def forward(
        self, x: Tensor, angles: tuple[Tensor, Tensor], cache: KVCache | None, wanted: Tensor | None = None
    ) -> Tensor:
        """Return x with this layer's two contributions; only where `wanted`, (batch, time), if that is given."""
        x = x + self.self_attn(self.input_layernorm(x), angles, cache)
        if wanted is not None:
            x = x[wanted]
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Decoder(nn.Module):
    """Embedding, layers, final norm: what Hugging Face calls `model`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden, shape.norm_eps)


class Spellings(nn.Module):
    """In training, a token's embedding is the sum of its own, of the plainly written word's, and of its spelling's.

    What the model learns of " volcano" so holds for "Volcano" and "VOLCANO", and to write in capitals is one direction.
    `plain`, (vocabulary,), is the plain token of each, or the token itself; `spelling`, (vocabulary,), counts from 0,
    the plain one. It is registered as the parametrization of the embedding's weight.
    """

    def __init__(self, plain: Tensor, spelling: Tensor, hidden: int) -> None:
        super().__init__()
        self.register_buffer("plain", plain, persistent=False)
        self.register_buffer("spelling", spelling, persistent=False)
        self.register_buffer("other", (spelling > 0).float().unsqueeze(1), persistent=False)
        self.directions = nn.Parameter(torch.empty(int(spelling.max()) + 1, hidden))
        nn.init.normal_(self.directions, std=0.02)

    def forward(self, own: Tensor) -> Tensor:
        """Return what the tokens mean, from what is their own; both (vocabulary, hidden)."""
        shared = own[self.get_buffer("plain")] + self.directions[self.get_buffer("spelling")]
        return own + self.get_buffer("other") * shared

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return what is the tokens' own at the start: nothing, where there is a plain one."""
        return weight * (1 - self.get_buffer("other"))


class KVCache:
    """Keys and values of the tokens that were read before, one pair per layer."""

    def __init__(self) -> None:
        self.length = 0  # tokens
        self._pairs: dict[Attention, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: Attention, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append to a layer's keys and values, both (batch, heads, time, size), and return all of them."""
        if layer in self._pairs:
            k, v = (torch.cat((old, new), 2) for old, new in zip(self._pairs[layer], (k, v), strict=True))
        self._pairs[layer] = k, v
        return k, v


class Llama(nn.Module):
    """The language model; output weights are the embedding's (tied)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Decoder(shape)
        size = shape.hidden // shape.heads
        steps = shape.rope_theta ** -(torch.arange(0, size, 2).float() / size)
        turns = torch.outer(torch.arange(shape.context).float(), steps).repeat(1, 2)  # (time, head size)
        self.register_buffer("cos", turns.cos(), persistent=False)
        self.register_buffer("sin", turns.sin(), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # what adds to the residual stream starts smaller, or deep models start noisy (GPT-2)
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * shape.layers) ** 0.5 if residual else 0.02)

    def hidden(self, ids: Tensor, cache: KVCache | None = None, wanted: Tensor | None = None) -> Tensor:
        """Return the last hidden states, (batch, time, hidden), of ids (batch, time).

        With `wanted`, (batch, time), only those states are computed and returned, (count, hidden).
        """
        start = cache.length if cache is not None else 0
        stop = start + ids.shape[1]
        cos, sin = self.get_buffer("cos")[start:stop], self.get_buffer("sin")[start:stop]
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers[:-1]:
            x = layer(x, (cos, sin), cache)
        x = self.model.layers[-1](x, (cos, sin), cache, wanted)
        if cache is not None:
            cache.length = stop
        out: Tensor = self.model.norm(x)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """Return scores over the vocabulary for hidden states."""
        return F.linear(hidden, self.model.embed_tokens.weight)

    def loss(self, ids: Tensor, learnt: Tensor, tokens: int) -> Tensor:
        """Return the cross-entropy of the learnt tokens, summed and divided by `tokens`; compute only what it needs."""
        wanted = learnt[:, 1:]
        scores = self.logits(self.hidden(ids[:, :-1], wanted=wanted))
        return F.cross_entropy(scores, ids[:, 1:][wanted], reduction="sum") / tokens

    @torch.inference_mode()
    def complete(self, prompt: list[int], end: int, limit: int = 300) -> list[int]:
        """Continue a prompt greedily until the token `end` (not returned) or `limit` tokens."""
        cache, ids = KVCache(), torch.tensor([prompt])
        out: list[int] = []
        while len(out) < limit and cache.length + ids.shape[1] <= self.shape.context:
            best = int(self.logits(self.hidden(ids, cache)[0, -1]).argmax())
            if best == end:
                break
            out.append(best)
            ids = torch.tensor([[best]])
        return out


def _rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Turn pairs of dimensions by their position's angle (Su et al. 2021), halves paired as Hugging Face does."""
    cos, sin = angles
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin
