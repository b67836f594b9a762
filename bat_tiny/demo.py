"""`make demo`: which of the sounds in examples/ sound alike, by BAT-tiny where the published weights cannot be had."""

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    # The demo has no use for torchao, which Transformers would import, for a second and with two warnings.
    sys.modules.setdefault("torchao", None)

import torch
from torch import nn
from transformers.utils.logging import disable_progress_bar

from bat_audio.load_model import find_weights, load_audio_processor, load_pretrained_encoder
from bat_audio.modeling_bat import BatModel
from bat_audio.processing_bat import BatAudioProcessor

EXAMPLES = Path(__file__).parent.parent / "examples"
BAT_TINY = EXAMPLES / "bat-tiny"


def demo():
    disable_progress_bar()  # Loading the weights takes a second.
    sounds = sorted(file for file in EXAMPLES.iterdir() if file.suffix in (".flac", ".mp3", ".ogg", ".wav"))
    try:
        model = load_pretrained_encoder(checkpoint=find_weights())
    except OSError as error:
        model = load_pretrained_encoder(checkpoint=BAT_TINY)
        print(
            f"{error}\n\n*** NO PRETRAINED WEIGHTS: the demo goes on with BAT-tiny, a small demonstration model of "
            f"{model.num_parameters() / 1e6:.1f} million parameters. ***\n"
        )
    names = [file.name for file in sounds]
    width = max(map(len, names))
    cosines = similarities(model, sounds)
    print("Similarity (cosine of the embeddings, less their mean over these sounds) and nearest neighbour:\n")
    print(" " * (width + 4), *(f"{number:5}" for number in range(1, len(names) + 1)))
    for number, (name, row) in enumerate(zip(names, cosines, strict=True)):
        others = row.clone()
        others[number] = -torch.inf
        figures = " ".join(f"{cosine:5.2f}" for cosine in row.tolist())
        print(f"{number + 1:2}  {name:{width}} {figures}   {names[others.argmax()]}")


@torch.inference_mode()
def similarities(model: BatModel, sounds: Sequence[Path]) -> torch.Tensor:
    """Cosines of the sounds' `time_statistics`, less their mean over the sounds: (N, N)."""
    processor = load_audio_processor(num_frames=None)
    embeddings = torch.stack(
        [time_statistics(tokens_over_time(model, processor, processor.load_audio(sound))) for sound in sounds]
    )
    embeddings = nn.functional.normalize(embeddings - embeddings.mean(dim=0), dim=1)
    return embeddings @ embeddings.T


def tokens_over_time(model: BatModel, processor: BatAudioProcessor, waveform: torch.Tensor) -> torch.Tensor:
    """The patch tokens of a waveform (samples,), those of all mel bands side by side, every 160 ms: (t, D*f).

    They are means over the blocks, of which the targets of the pre-training are made too.
    """
    tokens = model.extract_features(processor(waveform))["patch_tokens"].mean(dim=0)[0]  # (D, t, f)
    return tokens.transpose(0, 1).flatten(1)


def time_statistics(frames: torch.Tensor) -> torch.Tensor:
    """Mean and standard deviation over time of every channel: (t, C) -> (2*C,)."""
    return torch.cat([frames.mean(dim=0), frames.std(dim=0, correction=0)])


if __name__ == "__main__":
    demo()
