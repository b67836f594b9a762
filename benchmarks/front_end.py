"""The front end beside the plain torchaudio chain and transformers' extractor for AST, and beside the encoder."""

from collections.abc import Callable

import torch
from torch import nn

from bat_audio import BatConfig, load_audio_processor, load_pretrained_encoder
from bat_audio.processing_bat import F_MIN, HOP_LENGTH, N_FFT, N_MELS, NUM_FRAMES, SAMPLE_RATE, TOP_DB
from benchmarks.encoder import random_features
from benchmarks.harness import (
    Case,
    Section,
    Settings,
    Table,
    in_fresh_process,
    interleave,
    median_ratio,
    progress,
    timing_rows,
)

SECONDS = 10  # The length of a clip.


def torchaudio_chain(device: str = "cpu") -> Callable[[torch.Tensor], torch.Tensor]:
    """The features as BAT's training made them, (B, samples) to (B, 1, NUM_FRAMES, M)."""
    from torchaudio.transforms import AmplitudeToDB, MelSpectrogram

    mel = MelSpectrogram(SAMPLE_RATE, N_FFT, hop_length=HOP_LENGTH, f_min=F_MIN, n_mels=N_MELS, power=2).to(device)
    to_decibel = AmplitudeToDB("power", top_db=TOP_DB)

    def compute(waveform: torch.Tensor) -> torch.Tensor:
        # (B, 1, M, T): without the channel, torchaudio would take the maximum of the whole batch.
        decibel = to_decibel(mel(waveform[:, None]))
        low, high = decibel.amin(dim=(2, 3), keepdim=True), decibel.amax(dim=(2, 3), keepdim=True)
        scaled = (decibel - low) / (high - low + 1e-8)
        return nn.functional.pad(scaled, (0, NUM_FRAMES - scaled.shape[3])).transpose(2, 3)

    return compute


def ast_extractor(device: str = "cpu") -> Callable[[torch.Tensor], torch.Tensor]:
    """transformers' extractor, which computes on the CPU; clips come from the device, and features go there."""
    from transformers import ASTFeatureExtractor

    extractor = ASTFeatureExtractor()

    def compute(waveform: torch.Tensor) -> torch.Tensor:
        clips = list(waveform.cpu().numpy())
        return extractor(clips, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_values.to(device)

    return compute


def noise(batch: int, device: str = "cpu") -> torch.Tensor:
    """Clips (B, samples) of noise, each of another loudness."""
    loudness = torch.logspace(0, -3, batch, device=device)[:, None]
    return loudness * (2 * torch.rand(batch, SECONDS * SAMPLE_RATE, device=device) - 1)


def front_ends(batch: int, device: str = "cpu") -> dict[str, Callable[[], Case]]:
    """What makes the cases of the two ways to BAT's features and, with features of its own, of AST's extractor."""

    def case(call: Callable) -> Case:
        return Case(call, lambda: noise(batch, device), batch)

    return {
        "BatAudioProcessor": lambda: case(load_audio_processor(device)),
        "torchaudio": lambda: case(torchaudio_chain(device)),
        "ASTFeatureExtractor": lambda: case(ast_extractor(device)),
    }


def time_cases(folder: str, batch: int, encoder_batch: int, rounds: int) -> tuple[dict, dict]:
    """As of `interleave`, with the encoder beside the front ends."""
    config = BatConfig.from_pretrained(folder)

    def make_encoder() -> Case:
        model = load_pretrained_encoder(checkpoint=folder)
        return Case(model, lambda: random_features(config, encoder_batch), encoder_batch)

    return interleave({**front_ends(batch), "encoder": make_encoder}, rounds)


def run(settings: Settings) -> Section:
    section = Section("Front end")
    batch = 2 if settings.quick else 16
    with progress("front end"):
        # This runs in a fresh process, like those that load data. A process that has handled much larger tensors keeps
        # their memory, so torchaudio's chain would not have to get new memory for its spectra in every call.
        seconds, left_out = in_fresh_process(time_cases, settings.folder, batch, settings.batch, settings.rounds)
    section.leave_out(left_out)
    ours = "BatAudioProcessor"
    share = median_ratio(seconds, ours, "encoder")
    seconds.pop("encoder", None)
    title = f"{batch} clips of {SECONDS} s on a CPU"
    section.tables.append(Table(title, timing_rows(seconds, ours), f"time / {ours}", 1))
    speed_up, difference = median_ratio(seconds, "torchaudio", ours), None
    if speed_up is not None:
        waveform = noise(batch)
        difference = (load_audio_processor()(waveform) - torchaudio_chain()(waveform)).abs().max().item()
    section.judge(f"torchaudio / front end, batch {batch} x {SECONDS} s", speed_up, at_least=2.5)
    section.judge("front end, largest difference from torchaudio", difference, at_most=2e-5)
    section.judge("front end / encoder (eager sdpa), CPU", share, at_most=0.01)
    return section
