"""Small modules for the tests of the middle floor, and the dense Hessian of any of them."""

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unsqueeze(1) for part in self.qkv(self.ln1(x)).chunk(3, -1))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1))
        return x + self.mlp(self.ln2(x))


class GPT(nn.Module):
    """Tokens ``[n, t]`` to logits ``[n, t, vocab]``."""

    def __init__(self, vocab: int = 11, width: int = 8, context: int = 6, depth: int = 2, tied: bool = False) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocab, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def gpt(seed: int = 0, **arguments: int | bool) -> GPT:
    """A small GPT from a seed."""
    torch.manual_seed(seed)
    return GPT(**arguments)


def mlp(*widths: int, seed: int = 0) -> nn.Sequential:
    """Linear layers with tanh between them."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inner, outer in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(inner, outer), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def cnn(seed: int = 0) -> nn.Sequential:
    """Convolutions with BatchNorm, on ``[n, 2, 6, 6]``."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 6, 3, stride=2), nn.Tanh(),
        nn.Flatten(), nn.Linear(24, 3),
    )  # fmt: skip


def samples(*shape: int, classes: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Inputs ``[n, ...]`` and labels ``[n]``."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return [inputs, torch.randint(classes, (shape[0],), generator=generator)]


def dense_hessian(model: nn.Module, loss_of) -> torch.Tensor:
    """The Hessian of ``loss_of(model)`` in all parameters, flat in the order of ``model.parameters()``.

    ``loss_of`` takes whatever is called like the model and returns the scalar loss.
    """
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    sizes = [p.numel() for p in parameters.values()]

    def loss(flat: torch.Tensor) -> torch.Tensor:
        pieces = zip(parameters.items(), flat.split(sizes), strict=True)
        given = {name: piece.view_as(p) for (name, p), piece in pieces}
        return loss_of(lambda *args: functional_call(model, given, args))

    with sdpa_kernel(SDPBackend.MATH):
        return torch.autograd.functional.hessian(loss, torch.cat([p.flatten() for p in parameters.values()]))
