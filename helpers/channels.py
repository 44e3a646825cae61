"""The 13 channels of Surya: order, units, colour maps, and the three spaces that their pixels live in.

* physical:   DN for AIA, gauss for the magnetic field, m/s for the Doppler velocity (what the NetCDF files hold)
* signed-log: y = sign(x s) log(1 + |x s|), s the scale factor of the channel (what the Zarr store holds, in steps)
* normalised: z = (y - mean) / (std + epsilon) (what the model reads)

The store keeps y as 16-bit whole numbers: y = code * step + offset, with a step so small that rounding cannot matter.

Constants: `scalers.yaml` of the release nasa-ibm-ai4science/Surya-1.0, copied to helpers/data/ (arXiv:2508.14112).
"""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

# The order the checkpoint was trained with. The order of the keys in scalers.yaml is another one: never use that.
CHANNELS = (
    *("aia94", "aia131", "aia171", "aia193", "aia211", "aia304", "aia335", "aia1600"),
    *("hmi_m", "hmi_bx", "hmi_by", "hmi_bz", "hmi_v"),
)

UNITS = {name: "DN" if name.startswith("aia") else "m/s" if name == "hmi_v" else "G" for name in CHANNELS}

GOES_CLASSES = {"A": 1e-8, "B": 1e-7, "C": 1e-6, "M": 1e-5, "X": 1e-4}  # W/m^2 (1 to 8 Angstrom)

# The store's fixed point. The largest rounding error is half a step, so that 0.8 % of the spread of a channel means
# 0.004 in normalised units for every pixel (float16 would be finer for the quiet Sun, and four times coarser in a
# flare). The second limit is in signed-log units.
STEP_OF_SPREAD, LARGEST_STEP = 0.008, 2.0**-10
LARGEST_CODE, FILL_CODE = 32767, -32768  # codes go from -32767 to 32767; -32768 stands for no value
# Intensities have the long side of the range for bright pixels, and a short one for the few below zero: the finest step
# (aia94) reaches from -64 to 104,900 DN. y = 0 has a code of its own, so that the dark sky stays exactly 0.
INTENSITY_SHIFT = 28400
ERROR_BOUND = 0.0042  # normalised, in every pixel: half of STEP_OF_SPREAD, and what float32 rounds on the way

SCALERS_FILE = Path(__file__).parent / "data" / "scalers.yaml"


@dataclass(frozen=True)
class Scaler:
    """Constants of the transform: numbers for one channel, arrays (C, 1, 1) from `stack_scalers` for a channel axis."""

    mean: Any
    std: Any
    scale: Any
    epsilon: Any


@dataclass(frozen=True)
class Coding:
    """Fixed point of one channel: y = code * step + offset, both float32 numbers, or arrays (C, 1, 1) of them."""

    step: Any
    offset: Any

    def encode(self, signed_log: np.ndarray) -> np.ndarray:
        """Signed-log values -> the nearest codes, int16 of the same shape; ValueError for one that has no code."""
        codes = np.rint((np.asarray(signed_log, np.float32) - self.offset) / self.step)
        if not (codes.min() >= -LARGEST_CODE and codes.max() <= LARGEST_CODE):
            raise ValueError(f"Signed-log values from {signed_log.min()} to {signed_log.max()} do not fit {self}.")
        return codes.astype(np.int16)


def coding_of(name: str, scaler: Scaler) -> Coding:
    """The coding of a channel whose rounding error is at most ERROR_BOUND in the normalised units of `scaler`."""
    step = np.float32(min(STEP_OF_SPREAD * (scaler.std + scaler.epsilon), LARGEST_STEP))
    # a sign must be able to change exactly (flips of the magnetic field), hence no offset where there are signs
    return Coding(step, np.float32(INTENSITY_SHIFT) * step if name.startswith("aia") else np.float32(0))


def check_channels(names: Sequence[str]) -> tuple[str, ...]:
    """`names` as a tuple; ValueError where they are not a list of channels, each once."""
    if isinstance(names, str) or not names or len(set(names)) < len(names) or not set(names) <= set(CHANNELS):
        raise ValueError(f"Not a list of channels, each once: {names!r}. There are {', '.join(CHANNELS)}.")
    return tuple(names)


def colormap(name: str):
    """Matplotlib colour map that solar physicists expect for the channel `name` (sunpy's; blue-red for hmi_v)."""
    check_channels([name])
    import matplotlib
    import sunpy.visualization.colormaps  # noqa: F401  (importing it registers the maps)

    if name == "hmi_v":
        return matplotlib.colormaps["RdBu_r"]  # blue comes towards us (negative), red goes away
    return matplotlib.colormaps[name.replace("aia", "sdoaia") if name.startswith("aia") else "hmimag"]


def load_scalers(path: str | Path | None = None) -> dict[str, Scaler]:
    """Read the constants of each channel from a YAML file like the release's (None: the copy in helpers/data).

    ValueError: names the channel whose constants are missing, no numbers, or make no scale.
    """
    path = Path(path or SCALERS_FILE)
    scalers, name = {}, "each channel"
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
        for name in CHANNELS:
            scaler = Scaler(*(float(entries[name][key]) for key in ("mean", "std", "sl_scale_factor", "epsilon")))
            if not (np.isfinite(astuple(scaler)).all() and scaler.scale > 0 and scaler.std > 0 and scaler.epsilon >= 0):
                raise ValueError("scale factor and std must be above 0")
            scalers[name] = scaler
    except (KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        needed = f"the numbers mean, std, epsilon and sl_scale_factor, as in {SCALERS_FILE}"
        raise ValueError(f"{path}: {name} needs {needed} ({type(error).__name__}: {error}).") from error
    return scalers


def stack_scalers(scalers: Mapping[str, Scaler], channels: Sequence[str], trailing: int = 2) -> Scaler:
    """One Scaler for an array with a channel axis followed by `trailing` axes: its fields are float64 (C, 1, ..., 1).

    They are in the order of `channels`; trailing=3 suits (C, T, H, W).
    """
    constants = np.array([astuple(scalers[name]) for name in channels], np.float64).T  # (4, C)
    return Scaler(*constants.reshape(4, len(channels), *[1] * trailing))


def to_signed_log(physical, scaler: Scaler):
    """Physical values -> signed-log values, y = sign(x s) log(1 + |x s|), for numpy arrays and torch tensors."""
    xp, x, (scale,) = _prepare(physical, scaler.scale)
    scaled = x * scale
    return xp.sign(scaled) * xp.log1p(xp.abs(scaled))


def from_signed_log(signed_log, scaler: Scaler):
    """Signed-log values -> physical values, x = sign(y) (exp|y| - 1) / s: the inverse of `to_signed_log`."""
    xp, y, (scale,) = _prepare(signed_log, scaler.scale)
    return xp.sign(y) * xp.expm1(xp.abs(y)) / scale


def normalise(physical, scaler: Scaler):
    """Physical values -> normalised values (what the model reads); same shape, float32 or float64."""
    _, y, (mean, std, epsilon) = _prepare(to_signed_log(physical, scaler), scaler.mean, scaler.std, scaler.epsilon)
    return (y - mean) / (std + epsilon)


def denormalise(normalised, scaler: Scaler):
    """Normalised values -> physical values: the inverse of `normalise`, 1e-5 relative from 1 unit upwards."""
    _, z, (mean, std, epsilon) = _prepare(normalised, scaler.mean, scaler.std, scaler.epsilon)
    return from_signed_log(z * (std + epsilon) + mean, scaler)


def _prepare(values, *constants):
    """The library of `values` (numpy or torch), the values in float32 or better, the constants in their type."""
    if hasattr(values, "requires_grad"):
        import torch  # here, so that commands that read the configuration alone need not wait for it

        x = values if values.dtype in (torch.float32, torch.float64) else values.float()
        return torch, x, [torch.as_tensor(c, dtype=x.dtype, device=x.device) for c in constants]
    x = np.asarray(values)
    x = x if x.dtype in (np.float32, np.float64) else x.astype(np.float32)
    return np, x, [np.asarray(c, dtype=x.dtype) for c in constants]
