"""A picture of a recording as BAT sees it: waveform, log-mel features, patch tokens and attention over time.

`look` computes what is in the picture, `draw` lays it out, and `show` goes from a sound file to a picture file.

Shapes: T frames of 10 ms, M mel bands, H heads; t = T/16 time patches and f = M/16 mel patches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers.audio_utils import hertz_to_mel

from bat_audio.audio_bat import load_audio
from bat_audio.configuration_bat import BatConfig
from bat_audio.load_model import load_pretrained_encoder
from bat_audio.modeling_bat import BatModel
from bat_audio.processing_bat import PATCH_FRAMES, BatFeatureExtractor, fit_frames
from bat_audio_tools.folders import check_picture, whole
from bat_audio_tools.machine import pick_device, require
from bat_audio_tools.names import check_file

DPI = 120  # This counts for PDF and SVG too, which hold some parts as pixels.
# A waveform is drawn with at most so many places, which is more than there are pixels in a row.
OUTLINE_POINTS = 4000
FREQUENCY_TICKS = (0, 500, 1000, 2000, 4000, 8000, 16000)  # Hz
# These are what the components 1, 2 and 3 add to grey (R, G, B): brightness, blue to yellow, and green to red. So the
# first two can be told apart by people who cannot tell red from green.
COMPONENT_COLOURS = np.array([[0.30, 0.30, 0.30], [0.18, 0.18, -0.36], [0.24, -0.24, 0.0]])
ROUNDING = 1e-5  # Differences of tokens that are smaller than this share of them are errors of rounding.
FULL_COLOUR = 0.98  # This share of the patches has colours that are not cut off.


@dataclass(frozen=True)
class View:
    """What BAT sees in one recording, as float tensors on the CPU.

    Args:
        waveform: (samples,), at the model's rate.
        log_mel: features (T, M) in 0..1, zero-padded to whole patches.
        components: the last block's patch tokens in their first three principal components, (t, f, 3).
        explained: the parts of the tokens' variance that these hold, (3,).
        attention: weights of a block's CLS token for the patches, (H, t, f), times the number of tokens of their chunk:
            1 where all tokens get the same. So chunks of different lengths can be compared.
    """

    waveform: torch.Tensor
    log_mel: torch.Tensor
    components: torch.Tensor
    explained: torch.Tensor
    attention: torch.Tensor


@torch.inference_mode()
def look(model: BatModel, waveform: torch.Tensor, block: int) -> View:
    """Encode a recording (samples,) as long as it is and gather what there is to see.

    Args:
        model: in eval mode, on any device.
        waveform: at the model's rate, with the requirements of `BatAudioProcessor`.
        block: whose attention to take, 1 for the one next to the input.
    """
    config = model.config
    patch_frames = config.patch_size[0]
    processor = BatFeatureExtractor.from_model_config(config).processor
    features = fit_frames(processor.log_mel(waveform), processor.num_patches(len(waveform)) * PATCH_FRAMES)
    tokens, attention = [], []
    # The recording is encoded chunk by chunk, as the model cuts a long input too, because the attention weights of all
    # chunks together would not fit in memory.
    for chunk in features.to(model.device).split(config.chunk_time_patches * patch_frames, dim=2):
        output = model(chunk, output_attentions=True)
        tokens.append(output.last_hidden_state[0, 1:].float().cpu())
        weights = output.attentions[block - 1][0, :, 0]  # (H, S)
        attention.append(weights.shape[1] * weights[:, 1:].float().cpu())
    grid = (-1, config.grid_size[1])
    tokens = torch.cat(tokens)
    if features.min() == features.max():
        tokens.zero_()  # In silence the tokens tell nothing but their places.
    components, explained = principal_components(tokens, 3)
    attention = torch.cat(attention, dim=1)
    return View(waveform, features[0, 0], components.unflatten(0, grid), explained, attention.unflatten(1, grid))


def principal_components(tokens: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Coordinates (N, count) of tokens (N, D) along their main axes, and the part of the variance that each axis holds.

    Every axis points to where its entry of the largest magnitude is positive, so that equal tokens give equal signs. An
    axis along which the tokens differ by no more than rounding errors has zeros.
    """
    centred = (tokens - tokens.mean(dim=0)).double()
    # The variances come in rising order. They are exact, unlike those of torch.pca_lowrank.
    variances, axes = torch.linalg.eigh(centred.T @ centred)
    variances, axes = variances.flip(0), axes.flip(1)[:, :count]
    variances = variances.where(variances > ROUNDING**2 * tokens.double().square().sum(), 0)
    axes = axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    components = (centred @ axes).where(variances[:count] > 0, 0)
    return components.float(), (variances / variances.sum()).nan_to_num(0)[:count].float()


def outline(waveform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Places and samples of a line that looks like one through all samples (samples,).

    It takes the lowest and the highest of every few samples in turn; a line through millions takes minutes to draw.
    """
    step = -(-len(waveform) // OUTLINE_POINTS)
    high = nn.functional.max_pool1d(waveform[None], step, ceil_mode=True)[0]
    low = -nn.functional.max_pool1d(-waveform[None], step, ceil_mode=True)[0]
    return step * torch.arange(len(high)).repeat_interleave(2), torch.stack([low, high], dim=1).flatten()


def component_colours(components: torch.Tensor) -> np.ndarray:
    """RGB colours in 0..1 of coordinates (..., 3): grey for the mean, each component at its own scale."""
    scale = components.flatten(0, -2).abs().quantile(FULL_COLOUR, dim=0)
    return _mix_colours((components / scale.clamp_min(1e-12)).clamp(-1, 1).numpy())


def _mix_colours(components: np.ndarray) -> np.ndarray:
    return (0.5 + components @ COMPONENT_COLOURS).clip(0, 1)


def draw(
    view: View, config: BatConfig, *, name: str, block: int, heads: Sequence[int] | None = None, start: float = 0.0
) -> "matplotlib.figure.Figure":  # noqa: F821
    """The panels of a view below each other over one time axis.

    Args:
        view, block: of `look`.
        config: of the model that looked.
        name: of the recording.
        heads: each in a panel of its own, from 1; None for the mean of all in one.
        start: what time the recording begins at, in seconds.
    """
    figure_module = require("matplotlib.figure")  # Without pyplot there are no windows and no global state.
    maps = {f"head {head}": view.attention[head - 1] for head in heads or ()}
    maps = maps or {f"mean of {len(view.attention)} heads": view.attention.mean(dim=0)}
    heights = [0.7, *[1.0] * (2 + len(maps))]
    figure = figure_module.Figure(figsize=(9, 0.5 + 1.75 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), 2, width_ratios=(1, 0.06), height_ratios=heights)
    panels, keys = axes[:, 0], axes[:, 1]

    # A frame is drawn around its centre. The mel bands fill the scale from end to end, which moves none of them by more
    # than half a band.
    hop = config.hop_length / config.sample_rate  # s
    low, high = hertz_to_mel(np.array([config.f_min, config.sample_rate / 2]), mel_scale="htk")
    extent = (start - hop / 2, start - hop / 2 + len(view.log_mel) * hop, low, high)
    ticks = [tick for tick in FREQUENCY_TICKS if config.f_min <= tick <= config.sample_rate / 2]

    def picture(panel, values, **options):
        """Values (time, frequency) or colours (time, frequency, 3) over the two axes."""
        panel.set_ylabel("Frequency (Hz)")
        panel.set_yticks(hertz_to_mel(np.array(ticks, dtype=float), mel_scale="htk"), labels=[f"{t:,}" for t in ticks])
        return panel.imshow(values.swapaxes(0, 1), extent=extent, origin="lower", aspect="auto", **options)

    places, samples = outline(view.waveform)
    panels[0].plot(start + places / config.sample_rate, samples, color="#0072B2", linewidth=0.6)
    panels[0].set_title(f"Waveform of {name}", parse_math=False)  # Two $ in a name are no formula.
    panels[0].set_ylabel("Amplitude")
    panels[0].grid(alpha=0.3)
    keys[0].set_axis_off()

    panels[1].set_title("Log-mel features")
    image = picture(panels[1], view.log_mel.numpy(), cmap="magma", vmin=0, vmax=1)
    figure.colorbar(image, cax=keys[1], label="Level (0 to 1)")

    explained = [f"{part:.0%}" for part in view.explained.tolist()]
    panels[2].set_title(f"Patch tokens: principal components 1, 2, 3 ({', '.join(explained)} of the variance)")
    picture(panels[2], component_colours(view.components), interpolation="nearest")
    ramp = np.linspace(-1, 1, 65)[:, None, None] * np.eye(3)  # Column k shows component k alone.
    key_extent = (0.5, 3.5, -1, 1)
    keys[2].imshow(_mix_colours(ramp), extent=key_extent, origin="lower", aspect="auto", interpolation="nearest")
    keys[2].set_xticks([1, 2, 3])
    keys[2].xaxis.tick_top()
    keys[2].set_yticks([-1, 0, 1], labels=["−", "0", "+"])  # noqa: RUF001
    keys[2].yaxis.tick_right()
    keys[2].yaxis.set_label_position("right")
    keys[2].set_ylabel("Component")

    for panel, key, (which, weights) in zip(panels[3:], keys[3:], maps.items(), strict=True):
        panel.set_title(f"Attention of the CLS token: block {block}, {which}")
        image = picture(panel, weights.numpy(), cmap="viridis", vmin=0, interpolation="nearest")
        figure.colorbar(image, cax=key, label="Weight (1 = even)")

    for panel in panels:
        panel.set_xlim(start, start + len(view.waveform) / config.sample_rate)
        panel.label_outer(remove_inner_ticks=False)
    panels[-1].set_xlabel("Time (s)")
    return figure


def show(
    source: str | Path,
    out: str | Path,
    *,
    checkpoint: str | Path | None = None,
    untrained: bool = False,
    device: str = "auto",
    block: int | None = None,
    heads: Sequence[int] | None = None,
    start: float = 0.0,
    duration: float | None = None,
    channel: str | int = "mean",
) -> View:
    """Write a picture of a sound file, or of a part of it, and return what is in it.

    From top to bottom, over one time axis: the waveform; the log-mel features as the model gets them; the last block's
    patch tokens in their first three principal components as colours; and the attention of the CLS token. The recording
    is taken as long as it is, not padded to 10.24 s, and in chunks of that length where it is longer.

    Args:
        source: sound file of any rate and format that `bat-audio embed` reads.
        out: .png, .pdf or .svg; replaced if it is there.
        checkpoint, untrained: the weights, as in `load_pretrained_encoder`.
        device: to encode on, such as cuda:1; "auto" for a GPU where there is one, and else the CPU.
        block: whose attention to show, 1 for the one next to the input; None for the last.
        heads: to show each by itself, from 1; None for the mean of all.
        start, duration: the part of the file, in seconds; a duration of None reaches to its end.
        channel: as of `load_audio`.

    Raises:
        ValueError: another kind of picture, no such block, head or device, or a sound file that cannot be read.
        OSError: no sound file, no weights, or `out` cannot be written.
        ImportError: matplotlib, soundfile or soxr is missing.
    """
    out = Path(out)
    check_picture(out)
    check_file(source)
    require("matplotlib.figure")  # If it is missing, the error comes before the work.
    model = load_pretrained_encoder(pick_device(device), checkpoint=checkpoint, untrained=untrained)
    config = model.config
    block = config.num_hidden_layers if block is None else block
    if not 1 <= block <= config.num_hidden_layers:
        raise ValueError(f"block={block}: the model has the blocks 1 to {config.num_hidden_layers}.")
    wrong = [head for head in heads or () if not 1 <= head <= config.num_attention_heads]
    if wrong:
        raise ValueError(f"heads={wrong}: each block has the heads 1 to {config.num_attention_heads}.")
    waveform = load_audio(source, start, duration, config.sample_rate, channel)
    view = look(model, waveform, block)
    figure = draw(view, config, name=Path(source).name, block=block, heads=heads, start=start)
    if untrained:
        figure.suptitle("Random weights: tokens and attention mean nothing", color="#D55E00")
    with whole(out) as partial:
        figure.savefig(partial, dpi=DPI)
    return view
