"""The front end beside the plain torchaudio chain and transformers' extractor for AST, and beside the encoder."""

from collections.abc import Callable

import torch
from torch import nn

from bat_audio import BatConfig, load_audio_processor, load_pretrained_encoder
from bat_audio.processing_bat import F_MIN, HOP_LENGTH, N_FFT, N_MELS, NUM_FRAMES, SAMPLE_RATE, TOP_DB
from benchmarks.encoder import random_features
from benchmarks.harness import Case, Section, Settings, Table, interleave, progress, ratio, timing_rows

SECONDS = 10  # of a clip


def torchaudio_chain(device: str = "cpu") -> Callable[[torch.Tensor], torch.Tensor]:
    """The features as BAT's training made them, (B, samples) to (B, 1, NUM_FRAMES, M)."""
    from torchaudio.transforms import AmplitudeToDB, MelSpectrogram

    mel = MelSpectrogram(SAMPLE_RATE, N_FFT, hop_length=HOP_LENGTH, f_min=F_MIN, n_mels=N_MELS, power=2).to(device)
    to_decibel = AmplitudeToDB("power", top_db=TOP_DB)

    def compute(waveform: torch.Tensor) -> torch.Tensor:
        decibel = to_decibel(mel(waveform[:, None]))  # (B, 1, M, T), or the maximum would be that of the batch
        low, high = decibel.amin(dim=(2, 3), keepdim=True), decibel.amax(dim=(2, 3), keepdim=True)
        scaled = (decibel - low) / (high - low + 1e-8)
        return nn.functional.pad(scaled, (0, NUM_FRAMES - scaled.shape[3])).transpose(2, 3)

    return compute


def ast_extractor() -> Callable[[torch.Tensor], torch.Tensor]:
    from transformers import ASTFeatureExtractor

    extractor = ASTFeatureExtractor()
    return lambda waveform: extractor(list(waveform.numpy()), sampling_rate=SAMPLE_RATE, return_tensors="pt")


def noise(batch: int, device: str = "cpu") -> torch.Tensor:
    """Clips (B, samples) of noise, each of another loudness."""
    loudness = torch.logspace(0, -3, batch, device=device)[:, None]
    return loudness * (2 * torch.rand(batch, SECONDS * SAMPLE_RATE, device=device) - 1)


def front_ends(batch: int, device: str = "cpu") -> dict[str, Callable[[], Case]]:
    """What makes the cases of the two ways to BAT's features."""

    def case(call: Callable) -> Case:
        return Case(call, lambda: noise(batch, device), batch)

    return {
        "BatAudioProcessor": lambda: case(load_audio_processor(device)),
        "torchaudio": lambda: case(torchaudio_chain(device)),
    }


def run(settings: Settings) -> Section:
    section = Section("Front end")
    batch = 2 if settings.quick else 16
    config = BatConfig.from_pretrained(settings.folder)

    def make_encoder() -> Case:
        model = load_pretrained_encoder(checkpoint=settings.folder)
        return Case(model, lambda: random_features(config, settings.batch), settings.batch)

    cases = {
        **front_ends(batch),
        "ASTFeatureExtractor": lambda: Case(ast_extractor(), lambda: noise(batch), batch),
        "encoder, eager sdpa": make_encoder,
    }
    with progress("front end"):
        seconds, left_out = interleave(cases, settings.rounds)
    section.leave_out(left_out)
    ours, encoder = seconds["BatAudioProcessor"], seconds.pop("encoder, eager sdpa")
    title = f"{batch} clips of {SECONDS} s on a CPU"
    section.tables.append(Table(title, timing_rows(seconds, "BatAudioProcessor"), "time / BatAudioProcessor", 1))
    if "torchaudio" in seconds:
        speed_up = ratio(seconds["torchaudio"], ours).median
        section.judge(f"torchaudio / front end, batch {batch} x {SECONDS} s", speed_up, at_least=2.5)
        waveform = noise(batch)
        difference = (load_audio_processor()(waveform) - torchaudio_chain()(waveform)).abs().max().item()
        section.judge("front end, largest difference from torchaudio", difference, at_most=2e-5)
    section.judge("front end / encoder (eager sdpa), CPU", ratio(ours, encoder).median, at_most=0.01)
    return section
