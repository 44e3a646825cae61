"""What stands on the encoder, and the linear baselines it must beat.

Every model takes the batch dict, reads batch["ts"] (B, C, T, H, W) in normalised values, and returns float32:
`Specformer1D` and `LinearBaseline1D` numbers (B, num_outputs), `Specformer2D` and `LinearBaseline2D` images
(B, out_chans, H, W). Targets are expected standardised, so a fresh model starts near zero.
"""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Self

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from einops.layers.torch import Reduce
from torch import Tensor, nn

from helpers.channels import CHANNELS
from helpers.config import Config, pooling_problems
from helpers.data.labels import num_outputs
from helpers.model.encoder import SuryaEncoder, to_working_dtype

Batch = Mapping[str, Tensor]


def _images(batch: Batch, model: nn.Module, expected: tuple[int, int] | None = None) -> Tensor:
    """batch["ts"] (B, C, T, H, W) moved to where the model is: a batch of a loader is on the CPU."""
    ts = batch["ts"].to(next(model.parameters()).device)
    if expected and (ts.ndim != 5 or tuple(ts.shape[1:3]) != expected):
        raise ValueError(f"The baseline takes ts (B, C, T, H, W) with C, T = {expected} and got {tuple(ts.shape)}.")
    return ts


class AttentionPooling(nn.Module):
    """A learned query weighs the patches (softmax); it starts as the mean."""

    def __init__(self, dim: int):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(dim))

    def forward(self, tokens: Tensor) -> Tensor:
        keys = F.layer_norm(tokens.float(), tokens.shape[-1:])
        weights = (keys @ self.query * tokens.shape[-1] ** -0.5).softmax(dim=1)  # (B, L)
        return (weights[:, :, None] * tokens).sum(dim=1)  # (B, D)


class TransformerPooling(nn.Module):
    """One small transformer layer over a readout token and the patches: these are compared before they are summed up.

    It works at a width of at most 128, because its cost grows with the square of the number of tokens.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.width = min(dim, 128)
        self.norm = nn.LayerNorm(dim)
        self.reduce = nn.Linear(dim, self.width)
        self.readout = nn.Parameter(torch.randn(1, 1, self.width) * 0.02)
        self.layer = nn.TransformerEncoderLayer(
            self.width, 4, 2 * self.width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.reduce(self.norm(tokens))  # (B, L, width)
        x = torch.cat([self.readout.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
        return self.layer(x)[:, 0]  # (B, width)


class ClassTokenPooling(nn.Module):
    """The class token (arXiv:2010.11929) went through the attention blocks with the patches and stands first."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0]  # (B, D)


class ForecastPooling(nn.Module):
    """Reads numbers off Surya's own forecast: right for labels that lie about as far ahead as it was pretrained for.

    It takes the images that the decoder of the pretraining draws of the tokens, and keeps of each channel the mean, the
    largest mean of a patch and the largest pixel.
    """

    width = 3 * len(CHANNELS)

    def __init__(self, patch_size: int):
        super().__init__()
        self.patches = Reduce("b c (gy py) (gx px) -> b c gy gx", "mean", py=patch_size, px=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images)
        return torch.cat([patches.mean((2, 3)), patches.amax((2, 3)), images.amax((2, 3))], dim=1)  # (B, 3 C)


# From the tokens (B, L, D) of a sample to one vector: (B, D), or (B, width) from the transformer.
POOLS = {
    "mean": lambda dim: Reduce("b l d -> b d", "mean"),  # right for sums over the disc
    "max": lambda dim: Reduce("b l d -> b d", "max"),  # each feature where it is strongest: one active region decides
    "attention": AttentionPooling,
    "transformer": TransformerPooling,
    "class_token": lambda dim: ClassTokenPooling(),
}


class FeatureModel(nn.Module):
    """A vector of features for each sample, standardised by fixed numbers, then a head.

    Features of the Sun share a large mean and differ little between samples, which makes gradient descent slow.
    `fit_features` takes their mean and deviation from the training data, once; they are saved with the model. A model
    has `features(batch)`, (B, num_features) in float32, and `head`.
    """

    def __init__(self, num_features: int):
        super().__init__()
        self.register_buffer("feature_mean", torch.zeros(num_features))
        self.register_buffer("feature_std", torch.ones(num_features))

    @torch.no_grad()
    def fit_features(self, batches: Iterable[Batch], limit: int | None = None) -> Self:
        """Set the standardisation from (at most `limit`) batches of the training loader; returns the model.

        No deviation counts as less than a thousandth of the largest, so that a constant feature is not blown up.
        """
        training = self.training
        self.eval()
        rows = [self.features(batch).cpu().double() for batch in islice(batches, limit)]
        self.train(training)
        rows = torch.cat(rows) if rows else torch.empty(0, 1)  # (N, num_features)
        if len(rows) < 2:
            raise ValueError(f"fit_features needs at least two training samples and got {len(rows)}; check the loader.")
        std = rows.std(dim=0)
        self.feature_mean.copy_(rows.mean(dim=0))
        self.feature_std.copy_(std.clamp_min(max(1e-3 * std.max().item(), 1e-6)))
        return self

    def forward(self, batch: Batch) -> Tensor:
        features = self.features(batch)
        with torch.autocast(features.device.type, enabled=False):  # a few numbers: keep them exact
            return self.head((features - self.feature_mean) / self.feature_std)


class Specformer1D(FeatureModel):
    """Encoder, pooling, linear layer: numbers for a Sun, such as flare flux or solar-wind speed."""

    def __init__(
        self,
        encoder: SuryaEncoder,  # with nglo=1 for the pooling "class_token", with nglo=0 for the others
        num_outputs: int = 1,
        pooling: str = "mean",  # mean, max, attention, transformer, class_token (learned, zero at the start), forecast
        penultimate: int | None = None,  # width of an extra hidden layer
        dropout: float = 0.0,  # on the features before the last layer
    ):
        if problems := pooling_problems(pooling, encoder.nglo):
            raise ValueError(f"The model cannot be built: {problems[0]}.")
        dim, patch, forecasts = encoder.embed_dim, encoder.patch_size, pooling == "forecast"
        pool = ForecastPooling(patch) if forecasts else POOLS[pooling](dim)
        width = getattr(pool, "width", dim)
        super().__init__(width)
        self.encoder, self.pooling, self.pool = encoder, pooling, pool
        # read, not taught (`adapt` lets it train where there is no checkpoint)
        self.unembed = pretraining_decoder(dim, len(CHANNELS), patch).requires_grad_(False) if forecasts else None
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim)) if pooling == "class_token" else None
        self.norm = nn.Identity() if forecasts else nn.LayerNorm(width)
        last = nn.Linear(penultimate or width, num_outputs)
        # Outputs of about 0.1 for standardised features.
        nn.init.normal_(last.weight, std=0.1 * last.in_features**-0.5)
        nn.init.zeros_(last.bias)
        hidden = [nn.Linear(width, penultimate), nn.GELU()] if penultimate else []
        self.head = nn.Sequential(*hidden, nn.Dropout(dropout), last)

    def features(self, batch: Batch) -> Tensor:
        tokens = self.encoder(_images(batch, self), self.class_token)  # (B, nglo + L, D)
        if self.unembed is not None:
            tokens = self.unembed.unembed[0](tokens).float()  # images (B, C, H, W)
        return self.norm(self.pool(tokens).float()).float()  # (B, width)


def specformer(encoder: SuryaEncoder, cfg: Config, outputs: int | None = None) -> "Specformer1D | Specformer2D":
    """The model of a configuration on this encoder: Specformer1D for numbers, Specformer2D for masks and images.

    `outputs` is how many numbers there are; None counts them in the configuration, or in the label file.
    """
    if cfg.labels.numbers:
        count = outputs or num_outputs(cfg)
        return Specformer1D(encoder, count, cfg.head.pooling, cfg.head.penultimate, cfg.head.dropout)
    return Specformer2D(encoder, num_outputs(cfg), encoder.patch_size // cfg.labels.reduce)


def linear_baseline(cfg: Config, outputs: int | None = None) -> "LinearBaseline1D | LinearBaseline2D":
    """The linear baseline of a configuration: of channel means for numbers, pixel by pixel for masks and images."""
    in_chans, frames = len(cfg.data.channels), cfg.model.time_dim
    if not cfg.labels.numbers:
        return LinearBaseline2D(in_chans, num_outputs(cfg), frames, cfg.labels.reduce)
    return LinearBaseline1D(in_chans, outputs or num_outputs(cfg), frames)


class PixelDecoder(nn.Conv2d):
    """Tokens (B, L, D) to images (B, out_chans, G*upscale, G*upscale): a 1x1 convolution, then a pixel shuffle.

    The convolution is computed as the linear map of the tokens that it is; see PatchProjection for why.
    """

    def __init__(self, dim: int, out_chans: int, upscale: int):
        super().__init__(dim, out_chans * upscale**2, kernel_size=1)
        self.upscale = upscale

    def forward(self, tokens: Tensor) -> Tensor:
        pixels = F.linear(to_working_dtype(tokens, self), self.weight.flatten(1), self.bias)  # (B, L, out_chans*u*u)
        grid, u = round(tokens.shape[1] ** 0.5), self.upscale
        return rearrange(pixels, "b (gy gx) (c uy ux) -> b c (gy uy) (gx ux)", gy=grid, uy=u, ux=u)


def pretraining_decoder(dim: int, out_chans: int, upscale: int) -> nn.Module:
    """A fresh decoder under the names that it has in the checkpoint."""
    decoder = PixelDecoder(dim, out_chans, upscale)
    nn.init.normal_(decoder.weight, std=0.1 * dim**-0.5)
    nn.init.zeros_(decoder.bias)
    unembed = nn.Module()
    unembed.unembed = nn.ModuleList([decoder])
    return unembed


class Specformer2D(nn.Module):
    """Encoder, linear decoder, pixel shuffle: an image for a Sun, such as a mask or another channel.

    The decoder has the keys of the checkpoint's, so with out_chans=13 the released weights give Surya's own one-hour
    forecast. A token becomes `upscale` x `upscale` pixels: None for the patch size (the input's side).
    """

    def __init__(self, encoder: SuryaEncoder, out_chans: int = 1, upscale: int | None = None):
        super().__init__()
        upscale = encoder.patch_size if upscale is None else upscale
        if encoder.nglo:
            raise ValueError(f"Specformer2D needs an encoder with nglo=0, and this one has nglo={encoder.nglo}.")
        self.encoder = encoder
        self.unembed = pretraining_decoder(encoder.embed_dim, out_chans, upscale)

    def forward(self, batch: Batch) -> Tensor:
        return self.unembed.unembed[0](self.encoder(_images(batch, self))).float()  # (B, out_chans, H, W)


class LinearBaseline1D(FeatureModel):
    """A linear map of the mean of each channel over the image, in normalised values, for all T frames: C*T features.

    Signed-log values, of which normalised ones are a linear map, would make the same model. The means differ in scale:
    call `fit_features(train_loader)` before training.
    """

    def __init__(self, in_chans: int, num_outputs: int = 1, time_dim: int = 1):
        super().__init__(in_chans * time_dim)
        self.shape = (in_chans, time_dim)
        self.head = nn.Linear(in_chans * time_dim, num_outputs)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def features(self, batch: Batch) -> Tensor:
        ts = _images(batch, self, self.shape)
        return reduce(ts.float(), "b c t h w -> b (c t)", "mean")


class LinearBaseline2D(nn.Module):
    """The same linear map of the C*T values of each pixel, for all pixels: what can be read off without looking around.

    A target smaller than the input by a whole `factor` is mapped from pixels that are averaged before.
    """

    def __init__(self, in_chans: int, out_chans: int = 1, time_dim: int = 1, factor: int = 1):
        super().__init__()
        self.shape, self.factor = (in_chans, time_dim), factor
        self.head = nn.Linear(in_chans * time_dim, out_chans)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: Batch) -> Tensor:
        ts = _images(batch, self, self.shape)
        pixels = reduce(ts.float(), "b c t (h fy) (w fx) -> b h w (c t)", "mean", fy=self.factor, fx=self.factor)
        return rearrange(self.head(pixels), "b h w o -> b o h w").float()
