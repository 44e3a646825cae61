"""The Surya encoder: solar images in, one token a patch out.

Patch embedding, spectral gating blocks, then long-short attention blocks (Surya, arXiv:2508.14112; long-short
attention, arXiv:2107.02192; spectral gating, arXiv:2304.06446). The state dict has the names of the released
checkpoint.

Symbols of the shape comments: B batch, C channels, T frames, H = W image side, p patch side, G = H / p grid side,
L = G * G tokens, D width, h heads, d = D / h, r = dp_rank, and for the attention window: b side of a block of queries,
n = (G / b) ** 2 blocks, K keys that a block looks at.
"""

from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from helpers.config import encoder_problems

BLOCK_SIDES = (8, 4, 2)  # of a block of queries; the first that divides the grid is taken


def to_working_dtype(x: Tensor, layer: nn.Module) -> Tensor:
    """Cast activations to what `layer` computes in: autocast's dtype where it is on, else the dtype of the weights.

    The residual stream stays in float32, every branch off it starts so; frozen weights may then be bfloat16.
    """
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else layer.weight.dtype)


def recompute(function: Callable[..., Tensor], *inputs: Tensor | nn.Module) -> Tensor:
    """Activation checkpointing: function(*inputs) keeps its inputs alone; the backward pass computes the rest again,
    as far as it reads it: a frozen product at the end is not computed a second time.
    """
    return checkpoint(function, *inputs, use_reentrant=False) if torch.is_grad_enabled() else function(*inputs)


class LayerNorm(nn.LayerNorm):
    """LayerNorm in the dtype of its input, with an optional constant added to the output through the bias."""

    def forward(self, x: Tensor, shift: float = 0.0) -> Tensor:
        weight, bias = self.weight.to(x.dtype), (self.bias + shift).to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class Mlp(nn.Module):
    """Two linear layers around an exact GELU. Shape: (B, L, D) to (B, L, D)."""

    def __init__(self, dim: int, hidden: int, dropout: float):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(to_working_dtype(x, self.fc1))  # (B, L, 4D)
        # Keeps the output of fc1 and computes the GELU again, which costs little and saves as much memory again.
        return recompute(self.gelu_fc2, x)

    def gelu_fc2(self, x: Tensor) -> Tensor:
        """Shape: (B, L, 4D) to (B, L, D)."""
        return self.dropout(self.fc2(self.dropout(F.gelu(x))))


class PatchProjection(nn.Conv2d):
    """A convolution with kernel = stride, computed as "cut into patches, then a linear map", which is the same.

    nn.Conv2d itself gave wrong numbers in bfloat16 on CPUs with AMX (torch 2.13 and 2.15: off by 3.6 at a std of 0.58).
    """

    def __init__(self, in_chans: int, time_dim: int, dim: int, patch_size: int):
        super().__init__(in_chans * time_dim, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, ts: Tensor) -> Tensor:
        p = self.kernel_size[0]
        patches = rearrange(ts, "b c t (gy py) (gx px) -> b (gy gx) (c t py px)", py=p, px=p)  # (B, L, C*T*p*p)
        return F.linear(to_working_dtype(patches, self), self.weight.flatten(1), self.bias)  # (B, L, D)


def fourier_positions(grid: int, dim: int) -> Tensor:
    """Fixed positions (1, L, D): for each of D/4 frequencies cos and sin along x, then cos and sin along y."""
    frequencies = torch.linspace(1, grid / 2, dim // 4, dtype=torch.float64)
    phase = 2 * torch.pi * torch.linspace(0, 1, grid, dtype=torch.float64)[:, None] * frequencies  # (G, D/4)
    wave = torch.stack([phase.cos(), phase.sin()], dim=-1).float()  # (G, D/4, 2), along x or y alike
    along_x, along_y = wave[None].expand(grid, -1, -1, -1), wave[:, None].expand(-1, grid, -1, -1)
    return rearrange(torch.cat([along_x, along_y], dim=-1), "gy gx f four -> 1 (gy gx) (f four)")


class Embedding(nn.Module):
    """Pixels to tokens, with their positions added."""

    def __init__(self, in_chans: int, time_dim: int, dim: int, patch_size: int, grid: int):
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = PatchProjection(in_chans, time_dim, dim, patch_size)
        self.register_buffer("pos_embed", fourier_positions(grid, dim), persistent=False)

    def forward(self, ts: Tensor) -> Tensor:
        return self.patch_embed.proj(ts).float() + self.pos_embed.float()  # (B, L, D)


class SpectralFilter(nn.Module):
    """A learned complex gain for each spatial frequency and feature, always in float32."""

    def __init__(self, grid: int, dim: int):
        super().__init__()
        self.complex_weight = nn.Parameter(torch.randn(grid, grid // 2 + 1, dim, 2) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        grid = self.complex_weight.shape[0]
        x = rearrange(x.float(), "b (gy gx) d -> b gy gx d", gx=grid)
        modes = torch.fft.rfft2(x, dim=(1, 2), norm="ortho")  # (B, G, G/2+1, D)
        modes = modes * torch.view_as_complex(self.complex_weight.float())
        x = torch.fft.irfft2(modes, s=(grid, grid), dim=(1, 2), norm="ortho")
        return rearrange(x, "b gy gx d -> b (gy gx) d")


class SpectralBlock(nn.Module):
    """x + mlp(norm2(filter(norm1(x)))), with one residual. Shape: (B, L, D) to (B, L, D)."""

    def __init__(self, dim: int, hidden: int, grid: int, dropout: float):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.filter = SpectralFilter(grid, dim)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, hidden, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm2(self.filter(self.norm1(x))))  # (B, L, D)


class Neighbourhood(nn.Module):
    """Who looks at whom: for each b x b block of queries, the keys to gather and an additive mask over them.

    A query in a window of w x w tokens sees the (w + 2) x (w + 2) tokens around that window, the r long-range keys and
    the global ones. A window of 2 x 2 is too small for matrix units, so a block of queries shares the keys of the block
    and its rim, and the mask takes out, for each query, those beyond its window or the image. A block with b = 8:

        . . . . . . . . . .
        . o o o o o o o o .        Q  the four queries of one window (they see each other, too)
        . o o # # # # o o .        #  what they see around it
        . o o # Q Q # o o .        o  the other queries of the block, masked for Q
        . o o # Q Q # o o .        .  the rim: keys of other blocks, masked for Q
        . o o # # # # o o .
        . o o o o o o o o .
        . o o o o o o o o .
        . o o o o o o o o .
        . . . . . . . . . .

    Tokens come in block-major order (`to_blocks`), the `nglo` global keys before and the `rank` long-range ones after
    them. With `rpe`, `pair` says which entry of the window's bias table belongs to each query and key.
    """

    def __init__(self, grid: int, window: int, rank: int, nglo: int, rpe: bool = False):
        super().__init__()
        self.grid = grid
        self.block = b = next(side for side in BLOCK_SIDES if grid % side == 0)
        self.blocks = (grid // b) ** 2

        # Where on the grid the queries of each block are, and the tokens of the block with its rim.
        order = self.to_blocks(torch.arange(grid * grid).view(1, -1, 1)).view(self.blocks, b * b)  # row-major indices
        query_y, query_x = order // grid, order % grid  # (n, b*b)
        around = torch.arange(-1, b + 1)
        key_y = (query_y[:, :1] + around).repeat_interleave(b + 2, dim=1)  # (n, (b+2)**2)
        key_x = (query_x[:, :1] + around).repeat(1, b + 2)

        # What each query sees of them.
        down = key_y[:, None] - (query_y // window * window)[:, :, None]  # (n, b*b, (b+2)**2), from the window's corner
        right = key_x[:, None] - (query_x // window * window)[:, :, None]
        in_window = (down >= -1) & (down <= window) & (right >= -1) & (right <= window)
        on_image = (key_y >= 0) & (key_y < grid) & (key_x >= 0) & (key_x < grid)
        visible = in_window & on_image[:, None]

        # The keys: tokens in block-major order, then long-range and global ones, which everybody sees, then padding to
        # a multiple of 8, which nobody sees and which keeps the fast attention kernels.
        position = order.flatten().argsort().view(grid, grid)  # of token (y, x) in block-major order
        tokens = position[key_y.clamp(0, grid - 1), key_x.clamp(0, grid - 1)] + nglo
        everybodys = torch.cat([torch.arange(rank) + nglo + grid * grid, torch.arange(nglo)])
        keys = torch.cat([tokens, everybodys.expand(self.blocks, -1)], dim=1)
        padding = -keys.shape[1] % 8
        visible = F.pad(F.pad(visible, (0, len(everybodys)), value=True), (0, padding), value=False)  # (n, b*b, K)
        self.register_buffer("gather", F.pad(keys, (0, padding)).flatten(), persistent=False)  # (n*K,)
        self.register_buffer("mask", torch.zeros(visible.shape).masked_fill(~visible, -torch.inf), persistent=False)
        if rpe:
            tile = window + 2
            query = query_y % window * window + query_x % window  # (n, b*b): 0 ... w*w-1
            key = (down + 1) * tile + right + 1  # 0 ... tile*tile-1 in the window, the same for all blocks
            pair = (query[:, :, None] * tile * tile + key).masked_fill(~in_window, -1)[0]
            pair = F.pad(pair, (0, visible.shape[2] - pair.shape[1]), value=-1)
            self.register_buffer("pair", pair, persistent=False)  # (b*b, K), -1 for keys without a bias

    def to_blocks(self, x: Tensor) -> Tensor:
        """Row-major tokens (B, L, D) into block-major order: all tokens of block 0 first."""
        b = self.block
        return rearrange(x, "n (ny by nx bx) d -> n (ny nx by bx) d", ny=self.grid // b, by=b, bx=b)

    def from_blocks(self, x: Tensor) -> Tensor:
        """Back from `to_blocks`."""
        b = self.block
        return rearrange(x, "n (ny nx by bx) d -> n (ny by nx bx) d", ny=self.grid // b, by=b, bx=b)


class LongShortAttention(nn.Module):
    """Each query attends to its window, to r long-range summaries of the whole image, and to the global tokens."""

    def __init__(self, dim: int, heads: int, rank: int, window: int, nglo: int, rpe: bool, dropout: float):
        super().__init__()
        self.heads, self.rank, self.nglo, self.rpe = heads, rank, nglo, rpe
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.to_dynamic_projection = nn.Linear(dim, heads * rank)
        self.dual_ln_dp = LayerNorm(dim)
        self.dual_ln_full = LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        if rpe:
            inner, outer = torch.arange(window), torch.arange(-1, window + 1)
            step = inner[:, None] - outer[None, :] + window  # (w, w+2): 0 ... 2w
            # (qy, qx, ky, kx), with a row stride of 2w, as in the release
            index = step[:, None, :, None] * 2 * window + step[None, :, None, :]
            self.register_buffer("relative_position_index", index.flatten(2).flatten(0, 1))
            table = torch.zeros(2 * window * (2 * window + 1) + 1, heads)
            self.local_relative_position_bias_table = nn.Parameter(table)

    def forward(self, y: Tensor, near: Neighbourhood) -> Tensor:
        """(B, nglo + L, D), tokens in block-major order, to the same shape."""
        y = to_working_dtype(y, self.qkv)
        return self.dropout(self.proj(recompute(self.mix, y, self.qkv(y), near)))

    def mix(self, y: Tensor, qkv: Tensor, near: Neighbourhood) -> Tensor:
        """What the tokens take from each other: (B, nglo + L, D) and their (B, nglo + L, 3D) to (B, nglo + L, D)."""
        dim = y.shape[-1]
        q, kv = qkv.split([dim, 2 * dim], dim=-1)
        kv = self.dual_ln_full(kv.unflatten(-1, (2, dim)))  # (B, nglo + L, 2, D)
        kv = torch.cat([kv, self.long_range(y[:, self.nglo :], kv[:, self.nglo :])], dim=1)  # (B, nglo + L + r, 2, D)
        out = self.local(q[:, self.nglo :], kv, near)  # (B, L, D)
        if self.nglo:
            out = torch.cat([self.from_global(q[:, : self.nglo], kv[:, : -self.rank]), out], dim=1)
        return out

    def long_range(self, y: Tensor, kv: Tensor) -> Tensor:
        """r weighted means of all keys and values for each head, the weights read off the tokens: (B, r, 2, D)."""
        weights = self.to_dynamic_projection(y).softmax(dim=1, dtype=torch.float32).to(kv.dtype)  # (B, L, h*r)
        weights, kv = weights.unflatten(-1, (self.heads, self.rank)), kv.unflatten(-1, (self.heads, -1))
        means = torch.einsum("blhr,blthd->brthd", weights, kv).flatten(3)  # (B, r, 2, D)
        return self.dual_ln_dp(means)

    def local(self, q: Tensor, kv: Tensor, near: Neighbourhood) -> Tensor:
        """One attention call for all blocks of queries: (B, L, D) queries against the gathered keys."""
        size, n = q.shape[0], near.blocks
        q = rearrange(q, "b (n q) (h d) -> (b n) h q d", n=n, h=self.heads)
        kv = kv.flatten(2).index_select(1, near.gather)  # (B, n*K, 2*D)
        k, v = rearrange(kv, "b (n k) (two h d) -> two (b n) h k d", n=n, two=2, h=self.heads)
        mask = near.mask[:, None]  # (n, 1, b*b, K)
        if self.rpe:
            table = self.local_relative_position_bias_table[self.relative_position_index.flatten()]  # (w*w*(w+2)**2, h)
            table = F.pad(table, (0, 0, 0, 1))  # the last row is the zero of keys without a bias
            mask = mask + rearrange(table[near.pair], "q k h -> 1 h q k")
        mask = mask.to(q.dtype).expand(size, *(-1,) * 4).flatten(0, 1)  # (B*n, 1 or h, b*b, K)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return rearrange(out, "(b n) h q d -> b (n q) (h d)", n=n)

    def from_global(self, q: Tensor, kv: Tensor) -> Tensor:
        """The global tokens' own queries attend to every token: (B, nglo, D)."""
        q = rearrange(q, "b q (h d) -> b h q d", h=self.heads)
        k, v = rearrange(kv, "b k two (h d) -> two b h k d", h=self.heads)
        return rearrange(F.scaled_dot_product_attention(q, k, v), "b h q d -> b q (h d)")


class AttentionBlock(nn.Module):
    """x + attn(norm1(x) + 1), then x + mlp(norm2(x) + 1): the released weights were trained with this shift."""

    def __init__(self, dim: int, hidden: int, heads: int, rank: int, window: int, nglo: int, rpe: bool, dropout: float):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, hidden, dropout)
        self.attn = LongShortAttention(dim, heads, rank, window, nglo, rpe, dropout)

    def forward(self, x: Tensor, near: Neighbourhood) -> Tensor:
        x = x + self.attn(self.norm1(x, shift=1.0), near)
        return x + self.mlp(self.norm2(x, shift=1.0))


class Backbone(nn.Module):
    """The stack of blocks, spectral first, and the order of the tokens between them."""

    def __init__(self, spectral: list[SpectralBlock], attention: list[AttentionBlock], near: Neighbourhood):
        super().__init__()
        self.blocks_spectral_gating = nn.ModuleList(spectral)
        self.blocks_attention = nn.ModuleList(attention)
        self.near = near
        self.recompute_blocks: frozenset[int] = frozenset()

    def forward(self, x: Tensor, global_tokens: Tensor | None) -> Tensor:
        n = len(self.blocks_spectral_gating)
        for i, block in enumerate(self.blocks_spectral_gating):
            x = self._run(i, block, x)
        x = self.near.to_blocks(x)
        nglo = 0 if global_tokens is None else global_tokens.shape[1]
        if nglo:
            x = torch.cat([global_tokens.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)  # (B, nglo + L, D)
        for i, block in enumerate(self.blocks_attention, start=n):
            x = self._run(i, block, x, self.near)
        return torch.cat([x[:, :nglo], self.near.from_blocks(x[:, nglo:])], dim=1) if nglo else self.near.from_blocks(x)

    def _run(self, index: int, block: nn.Module, *inputs: Tensor | nn.Module) -> Tensor:
        return recompute(block, *inputs) if index in self.recompute_blocks else block(*inputs)


class SuryaEncoder(nn.Module):
    """Surya's encoder: normalised images (B, C, T, H, W) to tokens (B, nglo + L, D), global tokens first.

    The parameters are named as in the released checkpoint; positions follow from the grid and are not saved. A fresh
    encoder has linear weights from a normal cut at two deviations of 0.02 (the usual one of vision transformers), zero
    biases, and spectral gains of 0.02 times a normal. A ValueError names every setting that does not fit.
    """

    def __init__(
        self,
        img_size: int,  # H = W in pixels, a multiple of patch_size
        patch_size: int,  # p in pixels; the grid G = img_size / patch_size must be even
        in_chans: int,  # C, channels
        time_dim: int,  # T, input frames
        embed_dim: int,  # D, a multiple of num_heads and of 4
        depth: int,  # blocks of both kinds
        n_spectral_blocks: int,  # how many of them, the first ones, are spectral gating blocks
        num_heads: int,  # h, attention heads
        mlp_ratio: float = 4.0,  # hidden width of the MLPs in units of D
        window_size: int = 2,  # w of the local attention; 2 is the only one in the release
        dp_rank: int = 4,  # r, long-range summaries a head
        rpe: bool = False,  # add a learned bias by relative position to the window's scores
        nglo: int = 0,  # global tokens, handed to `forward`; not together with rpe, for which there is no reference
        drop_rate: float = 0.0,  # dropout in the MLPs and after the attention's projection
        recompute_blocks: Collection[int] = (),  # that keep no activations: all take 0.5 the memory, 1.4 the time
    ):
        super().__init__()
        sizes = img_size, patch_size, embed_dim, depth, n_spectral_blocks, num_heads
        if problems := encoder_problems(*sizes, window_size, rpe, nglo, recompute_blocks):
            raise ValueError(f"The encoder cannot be built: {'; '.join(problems)}.")
        self.img_size, self.patch_size, self.in_chans, self.time_dim = img_size, patch_size, in_chans, time_dim
        self.embed_dim, self.num_heads, self.nglo = embed_dim, num_heads, nglo
        self.grid = img_size // patch_size
        self.loaded_from: str | None = None  # fingerprint of the checkpoint it was filled from; "none": left random
        self.embedding = Embedding(in_chans, time_dim, embed_dim, patch_size, self.grid)
        hidden, attention = int(embed_dim * mlp_ratio), (num_heads, dp_rank, window_size, nglo, rpe, drop_rate)
        self.backbone = Backbone(
            [SpectralBlock(embed_dim, hidden, self.grid, drop_rate) for _ in range(n_spectral_blocks)],
            [AttentionBlock(embed_dim, hidden, *attention) for _ in range(depth - n_spectral_blocks)],
            Neighbourhood(self.grid, window_size, dp_rank, nglo, rpe),
        )
        self.backbone.recompute_blocks = frozenset(recompute_blocks)
        self.apply(_initialise)

    def forward(self, ts: Tensor, global_tokens: Tensor | None = None) -> Tensor:
        """Normalised ts (B, C, T, H, W), and (1 or B, nglo, D) where nglo > 0, to (B, nglo + L, D) in float32."""
        expected = (self.in_chans, self.time_dim, self.img_size, self.img_size)
        if tuple(ts.shape[1:]) != expected:
            raise ValueError(
                f"The encoder takes ts of shape (B, C, T, H, W) = (B, {', '.join(map(str, expected))}) and got "
                f"{tuple(ts.shape)}: C, T and the side follow from data.channels, data.offsets_minutes, data.reduce."
            )
        got = None if global_tokens is None else tuple(global_tokens.shape)
        wanted = [(count, self.nglo, self.embed_dim) for count in (1, len(ts))] if self.nglo else [None]
        if got not in wanted:
            raise ValueError(f"global_tokens must be of shape {wanted[0]} where nglo={self.nglo}, not {got}.")
        return self.backbone(self.embedding(ts), global_tokens)


def encoder_of(model: nn.Module) -> SuryaEncoder:
    """The encoder of a model, or the encoder itself; a ValueError for a model without one."""
    encoder = getattr(model, "encoder", model)
    if not isinstance(encoder, SuryaEncoder):
        raise ValueError(f"{type(model).__name__} has no Surya encoder; a Specformer1D or Specformer2D has one.")
    return encoder


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, PatchProjection)):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
