"""Audio front end of BAT: waveforms to log-mel features.

`BatAudioProcessor` turns waveforms into features, and `BatFeatureExtractor` wraps the processor for
`AutoFeatureExtractor` and pipelines. `audio_bat.py` reads sound files.

Shapes: B clips, T frames, M mel bands.
"""

import functools
import math
from collections import defaultdict

import numpy as np
import torch
from torch import nn
from transformers.feature_extraction_utils import BatchFeature, FeatureExtractionMixin
from transformers.utils import logging

from .audio_bat import SAMPLE_RATE, fork_safe, load_audio, resample

logger = logging.get_logger(__name__)

N_FFT = 1024  # samples of the FFT and of the Hann window, 64 ms
HOP_LENGTH = 160  # samples between frames, 10 ms
N_MELS = 128  # HTK mel bands between F_MIN and SAMPLE_RATE / 2
F_MIN = 0.0  # Hz
TOP_DB = 80.0  # dB kept below each clip's maximum
MAX_AMPLITUDE = 1e15  # larger samples, which no audio has, would overflow the power spectrum
MEL_GROUPS = 4  # the mel bands are multiplied in so many groups, each only with the bins that it covers
POWER_FLOOR = 1e-10  # smallest mel power before the logarithm, -100 dB
NUM_FRAMES = 1024  # frames of one picture, 10.24 s
PATCH_FRAMES = 16  # frames of one patch, 160 ms
BLOCK_FRAMES_CPU = 256  # frames transformed at once, so that their spectra stay in a core's cache
BLOCK_FRAMES_GPU = 65536  # frames transformed at once on an accelerator, where large blocks are fast
EXPECTED_AUDIO = (
    "expected an array, a tensor or a non-empty list of mono clips. Read files with load_audio; from a dict, pass its "
    "array"
)


def htk_mel_filters(sample_rate: int, n_fft: int, n_mels: int, f_min: float) -> torch.Tensor:
    """Triangles of height 1 on the HTK mel scale from `f_min` to `sample_rate / 2` Hz: (n_fft/2 + 1, n_mels)."""
    precise = {"dtype": torch.float64, "device": "cpu"}
    mel_range = (2595 * math.log10(1 + f / 700) for f in (f_min, sample_rate / 2))
    edges = 700 * (10 ** (torch.linspace(*mel_range, n_mels + 2, **precise) / 2595) - 1)  # Hz
    frequencies = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1, **precise)[:, None]
    rising = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp_min(0).float()


def mel_groups(filters: torch.Tensor) -> tuple[tuple[slice, slice], ...]:
    """Neighbouring bands of filters (bins, bands), and the few bins that they cover: a quarter of the whole product."""
    groups = []
    for bands in torch.arange(filters.shape[1], device="cpu").chunk(MEL_GROUPS):
        bands = slice(int(bands[0]), int(bands[-1]) + 1)
        bins = filters[:, bands].any(dim=1).nonzero().flatten().tolist()
        groups.append((slice(bins[0], bins[-1] + 1) if bins else slice(0), bands))
    return tuple(groups)


@functools.lru_cache(typed=True)
def front_end_tables(sample_rate: int, n_fft: int, n_mels: int, f_min: float) -> tuple[np.ndarray, np.ndarray, tuple]:
    """The Hann window (n_fft,), the mel filters (n_fft/2 + 1, n_mels), both float32, and the filters' `mel_groups`.

    They are computed once for each setting, and kept as arrays, because tensors remember whether inference mode was on.
    """
    filters = htk_mel_filters(sample_rate, n_fft, n_mels, f_min)
    window = torch.hann_window(n_fft, dtype=torch.float32, device="cpu")
    return window.numpy(), filters.numpy(), mel_groups(filters)


class SoundReader:
    """`load_audio` and `resample` at the rate of the object that is asked, its `sampling_rate` in Hz."""

    def load_audio(
        self, source, start: float = 0.0, duration: float | None = None, channel: str | int = "mean"
    ) -> torch.Tensor:
        """See the function `load_audio`."""
        return load_audio(source, start, duration, self.sampling_rate, channel)

    def resample(self, waveform: torch.Tensor, orig_rate: int) -> torch.Tensor:
        """See the function `resample`."""
        return resample(waveform, orig_rate, self.sampling_rate)


class BatAudioProcessor(SoundReader, nn.Module):
    """Waveforms to log-mel features, in float32 and on the waveform's device; every clip is treated alone.

    `.to(device)` moves the tables, which spares a copy in every call. They stay float32 whatever the module's dtype.

    Mel power spectrogram -> dB -> at most `top_db` below the clip's maximum -> scaled to 0..1 by the clip's own
    extremes -> cut or zero-padded to `num_frames`. Silence gives zeros.

    Args:
        num_frames: frames of the result, a multiple of 16; None is as long as the audio, rounded up to whole patches.
        sample_rate, n_fft, hop_length, n_mels, f_min, top_db: as in `BatConfig`.

    Raises:
        ValueError: `num_frames` is not a positive multiple of 16.
    """

    @fork_safe
    def __init__(
        self,
        num_frames: int | None = NUM_FRAMES,
        sample_rate: int = SAMPLE_RATE,
        n_fft: int = N_FFT,
        hop_length: int = HOP_LENGTH,
        n_mels: int = N_MELS,
        f_min: float = F_MIN,
        top_db: float = TOP_DB,
    ):
        super().__init__()
        if num_frames is not None and (not isinstance(num_frames, int) or num_frames < 1 or num_frames % PATCH_FRAMES):
            raise ValueError(f"num_frames={num_frames!r} must be a positive multiple of {PATCH_FRAMES}, or None.")
        self.num_frames = num_frames
        self.sample_rate = sample_rate
        self.n_fft = n_fft
        self.hop_length = hop_length
        self.top_db = top_db
        # The tables are no buffers: those would be rounded with a model that holds this module, and a model that is
        # built without memory for its weights would get them filled with anything.
        window, mel_filters, self.mel_groups = front_end_tables(sample_rate, n_fft, n_mels, f_min)
        self.window, self.mel_filters = torch.tensor(window, device="cpu"), torch.tensor(mel_filters, device="cpu")

    def _apply(self, fn, recurse: bool = True) -> "BatAudioProcessor":
        """What every move and conversion of a module calls: the tables move along."""
        super()._apply(fn, recurse)
        device = fn(torch.empty(0, device=self.window.device)).device
        if device.type != "meta":  # There they would lose their values, which no checkpoint brings back.
            self.window, self.mel_filters = self.window.to(device), self.mel_filters.to(device)
        return self

    @property
    def sampling_rate(self) -> int:
        """`sample_rate` by the name that Transformers uses."""
        return self.sample_rate

    def num_patches(self, samples: int) -> int:
        """How many time patches of a clip of so many samples hold sound.

        The features may have one more: a frame is centred on the clip's end too, which after whole patches begins
        another, nearly empty one.
        """
        return -(-samples // (PATCH_FRAMES * self.hop_length))

    @fork_safe
    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        """Features (B, 1, num_frames, n_mels) in 0..1 of mono clips of one length.

        Args:
            waveform: (samples,), (B, samples) or (B, 1, samples) at `sample_rate`, floating point in -1..1 or int16.

        Raises:
            ValueError: wrong type, shape or dtype, too short for one window, NaN or infinite samples.
        """
        return fit_frames(self.log_mel(waveform), self.num_frames)

    @fork_safe
    def log_mel(self, waveform: torch.Tensor, places: list[int] | None = None) -> torch.Tensor:
        """Features before cutting and padding: (B, 1, T, n_mels), T = samples // hop_length + 1; see `forward`.

        `places` are the numbers that errors give to the clips, when they were picked from a list.
        """
        waveform = self._check_waveform(waveform, places)
        with torch.autocast(waveform.device.type, enabled=False):  # In bfloat16 features would move by 0.01.
            mel = self._mel_power(waveform)  # (B, T, M)
        decibel = 10 * mel.clamp_min(POWER_FLOOR).log10()
        decibel = torch.maximum(decibel, decibel.amax(dim=(1, 2), keepdim=True) - self.top_db)
        low, high = decibel.amin(dim=(1, 2), keepdim=True), decibel.amax(dim=(1, 2), keepdim=True)
        return ((decibel - low) / (high - low + 1e-8)).unsqueeze(1)

    def _mel_power(self, waveform: torch.Tensor) -> torch.Tensor:
        """(B, samples) -> (B, T, M); frames are centred on multiples of the hop, the ends reflected."""
        window, mel_filters = self.window.to(waveform), self.mel_filters.to(waveform)
        padded = nn.functional.pad(waveform, (self.n_fft // 2, self.n_fft // 2), mode="reflect")
        frames = padded.unfold(-1, self.n_fft, self.hop_length)  # (B, T, n_fft), a view
        block_frames = BLOCK_FRAMES_CPU if waveform.device.type == "cpu" else BLOCK_FRAMES_GPU
        blocks = []
        for block in frames.split(max(1, block_frames // len(frames)), dim=1):
            spectrum = torch.fft.rfft(block * window)  # (B, T', n_fft/2 + 1)
            power = spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)
            groups = [power[..., bins] @ mel_filters[bins, bands] for bins, bands in self.mel_groups]
            blocks.append(torch.cat(groups, dim=2))
        return torch.cat(blocks, dim=1)

    def _check_waveform(self, waveform: torch.Tensor, places: list[int] | None) -> torch.Tensor:
        """The clips as float32 (B, samples), or a ValueError that says what arrived and what to do."""
        expected = "expected mono clips as a float or int16 tensor (samples,), (batch, samples) or (batch, 1, samples)"
        if not isinstance(waveform, torch.Tensor):
            raise ValueError(f"Got a waveform of type {type(waveform).__name__}; {expected}.")
        got = f"Got a waveform of shape {tuple(waveform.shape)} and {waveform.dtype}"
        if places is not None:
            got += f" (clip {', '.join(map(str, places))} of the list)"
        if waveform.dtype == torch.int16:
            waveform = waveform.float() / 32768
        if not waveform.is_floating_point():
            raise ValueError(f"{got}; {expected}. Scale other integers to floats in -1..1; complex audio is refused.")
        if waveform.ndim == 3 and waveform.shape[1] != 1:
            raise ValueError(f"{got}: {waveform.shape[1]} channels; {expected}. Average the channels first.")
        if waveform.ndim not in (1, 2, 3):
            raise ValueError(f"{got}; {expected}.")
        if waveform.numel() == 0:
            raise ValueError(f"{got}: no samples; {expected}.")
        samples = waveform.shape[-1]
        if waveform.ndim == 2 and samples <= 8 < len(waveform):
            raise ValueError(f"{got}, which looks like (samples, channels); {expected}. Average the channels first.")
        shortest = self.n_fft // 2 + 1
        if samples < shortest:
            raise ValueError(
                f"{got}: {samples} samples are too few for one window; at least {shortest} "
                f"({shortest / self.sample_rate:.3f} s) are needed. Zero-pad a clip that is meant to be so short."
            )
        waveform = waveform.float().reshape(-1, samples)
        usable = waveform.abs().amax(dim=1) <= MAX_AMPLITUDE  # This is false for NaN too.
        if not usable.all():
            bad = [places[row] if places else row for row in (~usable).nonzero().flatten().tolist()]
            raise ValueError(
                f"{got}: NaN, infinite or huge samples (above {MAX_AMPLITUDE:g}) in clip {', '.join(map(str, bad))}; "
                f"{expected}, in -1..1."
            )
        return waveform


def fit_frames(features: torch.Tensor, num_frames: int | None) -> torch.Tensor:
    """Cut or zero-pad (B, 1, T, M) to `num_frames` frames; None pads to the next whole patch."""
    if num_frames is None:
        num_frames = -(-features.shape[2] // PATCH_FRAMES) * PATCH_FRAMES
    return nn.functional.pad(features[:, :, :num_frames], (0, 0, 0, max(0, num_frames - features.shape[2])))


class BatFeatureExtractor(SoundReader, FeatureExtractionMixin):
    """`BatAudioProcessor` for `AutoFeatureExtractor`, `AutoProcessor` and pipelines.

    Args:
        sampling_rate: of the waveforms, in Hz.
        num_frames: frames of the features with padding="max_length", a multiple of 16; None is as long as the audio.
        n_fft, hop_length, n_mels, f_min, top_db: as in `BatConfig`.
    """

    model_input_names = ["input_features"]
    padding_value = 0.0  # Transformers' pipelines fill up the shorter clips of a batch with it.

    def __init__(
        self,
        sampling_rate: int = SAMPLE_RATE,
        num_frames: int | None = NUM_FRAMES,
        n_fft: int = N_FFT,
        hop_length: int = HOP_LENGTH,
        n_mels: int = N_MELS,
        f_min: float = F_MIN,
        top_db: float = TOP_DB,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.sampling_rate = sampling_rate
        self.num_frames = num_frames
        self.n_fft = n_fft
        self.hop_length = hop_length
        self.n_mels = n_mels
        self.f_min = f_min
        self.top_db = top_db
        _ = self.processor  # Wrong settings are refused here, not at the first clip.

    @classmethod
    def from_model_config(cls, config) -> "BatFeatureExtractor":
        """The extractor of a `BatConfig`, whose features are `input_shape` frames long."""
        fields = {name: getattr(config, name) for name in ("n_fft", "hop_length", "n_mels", "f_min", "top_db")}
        return cls(sampling_rate=config.sample_rate, num_frames=config.input_shape[0], **fields)

    @property
    def processor(self) -> BatAudioProcessor:
        """A processor with the present settings, whose tables are computed once for all processors."""
        return BatAudioProcessor(
            self.num_frames, self.sampling_rate, self.n_fft, self.hop_length, self.n_mels, self.f_min, self.top_db
        )

    @fork_safe
    def __call__(
        self,
        raw_speech,
        sampling_rate: int | None = None,
        padding: str = "max_length",
        return_tensors: str | None = None,
        device: str | torch.device | None = None,
    ) -> BatchFeature:
        """Log-mel features of one or more mono clips, each treated as if it were alone.

        Args:
            raw_speech: one clip or a batch: a numpy array or tensor (samples,), (B, samples) or (B, 1, samples), or a
                list of clips (samples,) of any lengths; floating point in -1..1, or int16.
            sampling_rate: rate of the clips in Hz; anything but the extractor's rate is refused.
            padding: "max_length" cuts and zero-pads to `num_frames`; "longest" zero-pads to the longest clip, rounded
                up to a whole patch of 16 frames, and cuts nothing.
            return_tensors: "pt" for a tensor, "np" for an array, None for a list of arrays.
            device: where to compute; by default where each clip is. With "pt" the features stay there.

        Returns:
            A `BatchFeature` with `input_features` (B, 1, T, n_mels) in 0..1.

        Raises:
            ValueError: wrong sampling rate, unknown option, or audio that `BatAudioProcessor` refuses.
        """
        if sampling_rate is None:
            logger.warning(
                f"BatFeatureExtractor got no sampling_rate and takes the audio to be at {self.sampling_rate} Hz. Pass "
                "sampling_rate= so that a wrong rate is found."
            )
        elif sampling_rate != self.sampling_rate:
            raise ValueError(
                f"BatFeatureExtractor got audio at {sampling_rate} Hz, but BAT needs {self.sampling_rate} Hz. Resample "
                "it first (BatFeatureExtractor.resample, or load_audio for files)."
            )
        if padding not in ("max_length", "longest"):
            raise ValueError(f"padding={padding!r} is not known; expected 'max_length' or 'longest'.")
        if return_tensors not in ("pt", "np", None):
            raise ValueError(f"return_tensors={return_tensors!r} is not known; expected 'pt', 'np' or None.")

        groups = self._group_by_length(raw_speech, device)
        processor = self.processor
        features = [processor.log_mel(batch, places) for batch, places in groups]
        num_frames = self.num_frames if padding == "max_length" else None
        if num_frames is None:
            longest = max(features, key=lambda group: group.shape[2])
            num_frames = fit_frames(longest, None).shape[2]
        input_features = torch.cat([fit_frames(group, num_frames) for group in features])
        if len(groups) > 1:
            places = torch.tensor([place for _, places in groups for place in places], device=input_features.device)
            input_features = input_features[places.argsort()]
        if return_tensors != "pt":
            input_features = input_features.detach().cpu().numpy()
        return BatchFeature({"input_features": input_features if return_tensors else list(input_features)})

    def _group_by_length(self, raw_speech, device) -> list[tuple[torch.Tensor, list[int] | None]]:
        """Batches of equally long clips, each with the places of its clips in the list, if it was one."""
        if isinstance(raw_speech, torch.Tensor | np.ndarray):
            return [(_as_tensor(raw_speech, device), None)]
        if not isinstance(raw_speech, list | tuple):
            raise ValueError(f"Got audio as {type(raw_speech).__name__} {raw_speech!r:.40}; {EXPECTED_AUDIO}.")
        if len(raw_speech) == 0:
            raise ValueError(f"Got an empty {type(raw_speech).__name__}; {EXPECTED_AUDIO}.")
        if isinstance(raw_speech[0], int | float | np.number):
            return [(_as_tensor(raw_speech, device), None)]
        groups = defaultdict(list)
        for place, clip in enumerate(raw_speech):
            clip = _as_tensor(clip, device, f"clip {place} of the list")
            if clip.ndim != 1:
                raise ValueError(
                    f"Clip {place} of the list has shape {tuple(clip.shape)}; expected mono clips (samples,). Average "
                    "the channels first."
                )
            groups[len(clip), clip.dtype].append((place, clip))
        return [(torch.stack([clip for _, clip in group]), [place for place, _ in group]) for group in groups.values()]


def _as_tensor(clip, device: str | torch.device | None, name: str = "audio") -> torch.Tensor:
    """A tensor, array or list of numbers as a tensor; arrays, which may be read-only or reversed, are copied."""
    if not isinstance(clip, torch.Tensor):
        try:
            array = np.asarray(clip)
            clip = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Got {name} as {type(clip).__name__} {clip!r:.40}, no array of numbers ({error}); {EXPECTED_AUDIO}."
            ) from error
    return clip.to(device) if device is not None else clip


# With this, save_pretrained copies this file and fills in auto_map.
BatFeatureExtractor.register_for_auto_class("AutoFeatureExtractor")
