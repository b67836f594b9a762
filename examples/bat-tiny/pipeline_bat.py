"""Pipelines of BAT: sound files and waveforms in one call to embeddings or to the scores of classes.

config.json names them under `custom_pipelines`, so that `pipeline(task, model=..., trust_remote_code=True)` finds them.
"""

import os
from collections.abc import Callable, Sequence

import numpy as np
import torch
from huggingface_hub.utils import get_session
from transformers import AudioClassificationPipeline, Pipeline
from transformers.utils import ModelOutput

from .audio_bat import load_audio
from .processing_bat import PATCH_FRAMES, _as_tensor, fit_frames

SCORE_FUNCTIONS = {"multi_label_classification": "sigmoid", "regression": "none"}
EXPECTED_CLIP = (
    "expected one mono clip as a path, URL, sound file or its bytes, array or tensor (samples,), or a dict with "
    "sampling_rate and array, or a list of such clips"
)


class BatAudioPipeline(Pipeline):
    """What BAT's pipelines share: reading one clip, and running clips of different lengths in one batch.

    A clip is a path, an http(s) URL, an open sound file or its bytes; an array or tensor (samples,) at the extractor's
    rate, floating point in -1..1 or int16; a dict with `array` (or `raw`) and its `sampling_rate`, or with `bytes` or
    `path`; or an audio column's decoder. Sound files may have any format, see `load_audio`. Clips of another rate are
    resampled as in BAT's training.

    Clips up to the extractor's `num_frames` (10.24 s) are zero-padded to it, as in training. Longer ones run whole, in
    chunks. No clip's result depends on what it is batched with.
    """

    _load_feature_extractor = True
    _load_tokenizer = _load_image_processor = _load_video_processor = _load_processor = False

    def __call__(self, inputs, **kwargs):
        """The result of one clip; a list of them for a list, tuple or datasets column; an iterator for a generator.

        Args:
            inputs: as above.
            **kwargs: `batch_size` and `num_workers`, and the pipeline's own options.

        Raises:
            FileNotFoundError: no file at a path.
            ValueError: audio that cannot be read, or an unknown option.
        """
        if isinstance(inputs, Sequence) and not isinstance(inputs, str | bytes | bytearray | list):
            return list(super().__call__((clip for clip in inputs), **kwargs))
        if isinstance(inputs, list) and not inputs:  # Transformers would look at the first clip.
            return []
        return super().__call__(inputs, **kwargs)

    def load_clip(self, clip) -> torch.Tensor:
        """A clip, see the class, as mono samples (samples,) at the extractor's rate, on the CPU."""
        rate = self.feature_extractor.sampling_rate
        if hasattr(clip, "get_all_samples"):  # Audio columns of datasets hold decoders of torchcodec.
            samples = clip.get_all_samples()
            clip = {"array": samples.data.mean(dim=0), "sampling_rate": samples.sample_rate}
        if isinstance(clip, dict) and clip.keys() & {"array", "raw"}:
            if "sampling_rate" not in clip:
                raise ValueError(f"Got a dict with {', '.join(clip)} but no sampling_rate; {EXPECTED_CLIP}.")
            rate, clip = clip["sampling_rate"], _as_tensor(clip["raw"] if "raw" in clip else clip["array"], "cpu")
        elif isinstance(clip, dict):
            clip = clip.get("bytes") or clip.get("path") or clip
        if isinstance(clip, str) and clip.startswith(("http://", "https://")):
            response = get_session().get(clip, timeout=60)
            response.raise_for_status()
            clip = response.content
        if isinstance(clip, str | os.PathLike | bytes | bytearray) or hasattr(clip, "read"):
            return load_audio(clip, sampling_rate=rate)
        if not isinstance(clip, torch.Tensor | np.ndarray):
            raise ValueError(f"Got {type(clip).__name__} {clip!r:.60}; {EXPECTED_CLIP}.")
        waveform = _as_tensor(clip, "cpu")
        if waveform.ndim != 1:
            raise ValueError(
                f"Got audio of shape {tuple(waveform.shape)}; {EXPECTED_CLIP}. Average the channels first."
            )
        if waveform.dtype == torch.int16:
            waveform = waveform / 32768
        return self.feature_extractor.resample(waveform, rate)

    def preprocess(self, clip) -> dict[str, torch.Tensor]:
        """Features (1, T, n_mels), which a batch pads to the longest along T, and the clip's own `num_frames` (1,)."""
        extractor = self.feature_extractor
        waveform = self.load_clip(clip)
        features = extractor(waveform, extractor.sampling_rate, padding="longest", return_tensors="pt").input_features
        num_frames = extractor.processor.num_patches(len(waveform)) * PATCH_FRAMES
        features = fit_frames(features, max(num_frames, extractor.num_frames or 0))[0]
        return {"input_features": features, "num_frames": torch.tensor([features.shape[1]])}

    def run_by_length(
        self, model_inputs: dict[str, torch.Tensor], run: Callable[[torch.Tensor], torch.Tensor]
    ) -> list[torch.Tensor]:
        """The result of `run` (B, ...) for each clip, cut back to its own length; equal lengths run together."""
        lengths = model_inputs["num_frames"].tolist()
        results = [None] * len(lengths)
        for length in set(lengths):
            places = [place for place, other in enumerate(lengths) if other == length]
            for place, result in zip(places, run(model_inputs["input_features"][places, :length]), strict=True):
                results[place] = result
        return results


class BatFeatureExtractionPipeline(BatAudioPipeline):
    """Sound to embeddings.

        extractor = pipeline("feature-extraction", model=repository, trust_remote_code=True)
        embedding = extractor("clip.wav")  # list of 768 floats

    Options, here and in each call:
        pool: "cls" (default) for the CLS token (D,), averaged over the chunks of a long clip; "mean" for the mean of
            the patch tokens (D,), padding included; None for all tokens (1 + N, D), CLS first, then time-major patches.
        return_tensors: True for tensors instead of nested lists of floats.
    """

    def _sanitize_parameters(self, **options) -> tuple[dict, dict, dict]:
        unknown = ", ".join(options.keys() - {"pool", "return_tensors"})
        if unknown:
            raise ValueError(f"Got unknown options {unknown}; expected pool, return_tensors, batch_size, num_workers.")
        if options.get("pool") not in ("cls", "mean", None):
            raise ValueError(f"pool={options['pool']!r} is not known; expected 'cls', 'mean' or None for all tokens.")
        forward = {"pool": options["pool"]} if "pool" in options else {}
        postprocess = {"return_tensors": options["return_tensors"]} if "return_tensors" in options else {}
        return {}, forward, postprocess

    def _forward(self, model_inputs: dict[str, torch.Tensor], pool: str | None = "cls") -> dict[str, list]:
        encoder = self.model.base_model  # The model itself, or the encoder of a model with a head.

        def embed(features: torch.Tensor) -> torch.Tensor:
            tokens = encoder(features).last_hidden_state  # (B, 1 + N, D)
            return tokens if pool is None else tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(dim=1)

        return {"embeddings": self.run_by_length(model_inputs, embed)}

    def postprocess(self, model_outputs: dict, return_tensors: bool = False) -> torch.Tensor | list:
        embedding = model_outputs["embeddings"][0]
        return embedding if return_tensors else embedding.tolist()


class BatAudioClassificationPipeline(BatAudioPipeline, AudioClassificationPipeline):
    """Sound to the scores of classes, the highest first: a list of dicts with `score` and `label`.

        classifier = pipeline("audio-classification", model=folder, trust_remote_code=True)
        scores = classifier("clip.wav", top_k=5)

    As Transformers' pipeline, except for the clips that it takes, see `BatAudioPipeline`, and for the default of
    `function_to_apply`: "sigmoid" for multi-label models on every version of Transformers.
    Without `top_k`, all classes.
    """

    def __init__(self, *args, top_k: int | None = None, **kwargs):
        super().__init__(*args, top_k=top_k, **kwargs)

    def check_model_type(self, supported_models):
        """Refuse a frame-wise model, whose logits have one axis more; the list knows no remote models."""
        if self.model.head.per_frame:
            raise ValueError(
                f"{type(self.model).__name__} classifies frames, not clips. Use the model itself, whose "
                "decode_events gives the events of a clip."
            )

    def _sanitize_parameters(self, **options) -> tuple[dict, dict, dict]:
        preprocess, forward, postprocess = super()._sanitize_parameters(**options)
        # Transformers puts defaults here, which would replace what was chosen when the pipeline was made.
        for name in postprocess.keys() - options.keys():
            del postprocess[name]
        if options.get("function_to_apply") is None:
            postprocess.pop("function_to_apply", None)
        return preprocess, forward, postprocess

    def _forward(self, model_inputs: dict[str, torch.Tensor]) -> ModelOutput:
        logits = self.run_by_length(model_inputs, lambda features: self.model(features).logits)
        return ModelOutput(logits=torch.stack(logits))

    def postprocess(
        self, model_outputs: ModelOutput, top_k: int | None = None, function_to_apply: str | None = None
    ) -> list[dict[str, float | str]]:
        if function_to_apply is None:
            function_to_apply = SCORE_FUNCTIONS.get(self.model.config.problem_type, "softmax")
        if top_k is None:
            top_k = self.model.config.num_labels
        return super().postprocess(model_outputs, top_k=top_k, function_to_apply=function_to_apply)
