"""Labelled clips as features and targets: a dataset for a `Trainer`, with augmentation, in an order of its own.

Shapes: T frames of 10 ms, M mel bands, C labels, S = T/16 steps of 160 ms.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from bat_audio.processing_bat import PATCH_FRAMES, BatAudioProcessor, fit_frames
from bat_audio_tools.names import some_of
from bat_audio_tools.training.examples import Example

# Steps behind a clip's end have this target, and the frame-wise loss leaves them out.
IGNORED_STEP = -100.0
TIME_TOLERANCE = 1e-6  # Seconds. Times that were stored as float32 are off by less.


@dataclass(frozen=True)
class Augmentation:
    """Random changes of training clips; none by default.

    Args:
        mixup: probability of mixing a clip with another one of the dataset, lam * clip + (1 - lam) * other.
        mixup_alpha: lam comes from Beta(mixup_alpha, mixup_alpha).
        freq_masks, freq_width: number of SpecAugment's masks of 0 to `freq_width` mel bands.
        time_masks, time_width: number of masks of 0 to `time_width` frames of 10 ms.
        roll: rotate every clip, and its events, by a random time.
        gain_db: raise or lower every clip by up to so many dB; matters in mixtures alone, as features are scaled.

    Raises:
        ValueError: a value outside its range.
    """

    mixup: float = 0.0
    mixup_alpha: float = 0.8
    freq_masks: int = 0
    freq_width: int = 16
    time_masks: int = 0
    time_width: int = 64
    roll: bool = False
    gain_db: float = 0.0

    def __post_init__(self):
        wrong = [name for name, value in vars(self).items() if not 0 <= value < math.inf]
        if wrong or self.mixup > 1 or self.mixup_alpha == 0:
            raise ValueError(f"{self}: expected finite values from 0 on, mixup up to 1 and mixup_alpha above 0.")


def frame_targets(
    events: Iterable[tuple[float, float, int]],
    num_labels: int,
    num_steps: int,
    seconds: float,
    step: float = 0.16,
    shift: float = 0.0,
) -> torch.Tensor:
    """Which events are heard at each step: (num_steps, num_labels) float32 of 0, 1 and -100.

    A step is active when an event covers at least half of it; an event too short for that marks the step that it covers
    most. An event lasts at most to the clip's end, and the steps behind that are -100.

    Args:
        events: onset and offset in seconds, and the label's number.
        num_steps: steps of the result; events behind them are cut off.
        seconds: length of the clip.
        step: seconds of a step.
        shift: seconds from 0 to `seconds` by which the clip is rotated; what leaves at the end comes in at the start.
    """
    edges = step * np.arange(max(num_steps, math.ceil(seconds / step)) + 1)
    targets = np.zeros((len(edges) - 1, num_labels), dtype=np.float32)
    for onset, offset, label in events:
        covered = np.zeros(len(targets))  # These are the seconds of each step that the event covers.
        for moved in (shift, shift - seconds):
            begin, end = max(onset + moved, 0), min(min(offset, seconds) + moved, seconds)
            covered += np.clip(np.minimum(edges[1:], end) - np.maximum(edges[:-1], begin), 0, None)
        active = covered >= step / 2 - TIME_TOLERANCE
        targets[active if active.any() else covered.argmax(), label] = 1
    targets[edges[:-1] >= seconds] = IGNORED_STEP
    return torch.from_numpy(targets[:num_steps])


class EpochOrder:
    """The places of a long row of epochs, each of which has all items once; with `shuffle` in an order of its own."""

    def __init__(self, num_items: int, seed: int, shuffle: bool):
        self.num_items = num_items
        self.seed = seed
        self.shuffle = shuffle
        self._order = (-1, np.arange(num_items))  # This holds the latest epoch and its order.

    def __getitem__(self, place: int) -> tuple[int, int]:
        """The epoch and the item at this place."""
        epoch, index = divmod(place, self.num_items)
        if self.shuffle:
            if self._order[0] != epoch:
                self._order = (epoch, np.random.default_rng([self.seed, epoch]).permutation(self.num_items))
            index = int(self._order[1][index])
        return epoch, index


class ClipDataset(torch.utils.data.Dataset):
    """Features and targets of examples, for a `Trainer` or `DataLoader`.

    Item i is a dict of `input_features` (1, T, M) in 0..1 and `labels`: the class number, () int64, or probabilities
    (C,) float32 when the augmentation has mixup; with `multi_label`, 0 or 1 for every label, (C,) float32; with
    `frames`, the same at every step, (S, C), as of `frame_targets`.

    Augmentation in this order: decode, roll, gain, mixup, log-mel features, SpecAugment. The epochs follow each other
    in one long row of items, each of which depends on nothing but the seed and its place: it is the same in any
    process, in any order and after resuming.

    Args:
        labels: the model's classes, in its order; see `label_names`.
        processor: makes the features, which are cut or zero-padded to `num_frames`, a multiple of 16.
        epochs: how often every example occurs, each time with other random changes.
        shuffle: give every epoch an order of its own.

    Raises:
        ValueError: a label that is not among `labels`, a clip with none or several where one is needed, or examples
            without events for `frames`. When an item is made: a clip that cannot be decoded, is too short, or has
            events behind its end; the message names it.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        labels: Sequence[str],
        processor: BatAudioProcessor,
        num_frames: int,
        *,
        multi_label: bool = False,
        frames: bool = False,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        epochs: int = 1,
        shuffle: bool = False,
    ):
        if num_frames < 1 or num_frames % PATCH_FRAMES:
            raise ValueError(f"num_frames={num_frames} must be a positive multiple of {PATCH_FRAMES}.")
        unknown = sorted({label for example in examples for label in example.labels} - set(labels))
        if unknown:
            raise ValueError(f"{len(unknown)} labels are not among the model's {len(labels)}: {some_of(unknown)}.")
        if frames:
            wrong = [example.source for example in examples if example.labels and not example.events]
            problem = "have labels but no events; read them with frames=True"
            seconds = num_frames * processor.hop_length / processor.sample_rate
            unheard = [e.source for e in examples if any(onset >= seconds for onset, _, _ in e.events)]
            if unheard:
                raise ValueError(
                    f"{len(unheard)} of {len(examples)} clips have events behind num_frames={num_frames} ({seconds:g} "
                    f"s), which would never be heard: {some_of(unheard)}. Raise num_frames, or divide the recordings "
                    "with the columns start and duration."
                )
        else:
            wrong = [example.source for example in examples if len(example.labels) != 1 and not multi_label]
            problem = "have not exactly one label; correct them, or train with multi_label"
        if wrong:
            raise ValueError(f"{len(wrong)} of {len(examples)} clips {problem}: {some_of(wrong)}.")
        self.examples = examples
        self.label2id = {label: number for number, label in enumerate(labels)}
        self.processor = processor
        self.num_frames = num_frames
        self.multi_label = multi_label
        self.frames = frames
        self.augmentation = augmentation or Augmentation()
        self.seed = seed
        self.epochs = epochs
        self.order = EpochOrder(len(examples), seed, shuffle)

    def __len__(self) -> int:
        return self.epochs * len(self.examples)

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        epoch, index = self.order[range(len(self))[place]]
        changes = self.augmentation
        generator = np.random.default_rng([self.seed, epoch, index])
        waveform, targets = self._clip(index, generator)
        if changes.mixup and generator.random() < changes.mixup:
            other, other_targets = self._clip(int(generator.integers(len(self.examples))), generator)
            lam = generator.beta(changes.mixup_alpha, changes.mixup_alpha)
            length = max(len(waveform), len(other))
            waveform, other = (nn.functional.pad(w, (0, length - len(w))) for w in (waveform, other))
            waveform = lam * waveform + (1 - lam) * other
            both_ended = (targets < 0) & (other_targets < 0)
            targets = lam * targets.clamp_min(0) + (1 - lam) * other_targets.clamp_min(0)
            targets[both_ended] = IGNORED_STEP
        elif not (self.frames or self.multi_label or changes.mixup):
            targets = targets.argmax()
        try:
            features = fit_frames(self.processor.log_mel(waveform), self.num_frames)[0]
        except ValueError as error:
            raise ValueError(f"{self.examples[index].source}: {error}") from error
        for axis, masks, width in (
            (2, changes.freq_masks, changes.freq_width),
            (1, changes.time_masks, changes.time_width),
        ):
            for _ in range(masks):
                size = min(int(generator.integers(width + 1)), features.shape[axis])
                features.narrow(axis, int(generator.integers(features.shape[axis] - size + 1)), size).zero_()
        return {"input_features": features, "labels": targets}

    def _clip(self, index: int, generator: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """The rolled and scaled waveform (samples,) and its targets, (C,) or (S, C)."""
        example, rate = self.examples[index], self.processor.sample_rate
        waveform = example.load(self.processor)
        samples = len(waveform)
        shift = int(generator.integers(samples)) if self.augmentation.roll else 0
        if self.augmentation.gain_db:
            waveform = waveform * 10 ** (generator.uniform(-1, 1) * self.augmentation.gain_db / 20)
        if self.frames:
            events = [(onset, offset, self.label2id[label]) for onset, offset, label in example.events]
            late = [event for event in example.events if event[0] >= samples / rate]
            if late:
                raise ValueError(
                    f"{example.source}: {samples / rate:.3f} s long, but it has events behind its end: {some_of(late)}."
                )
            step = PATCH_FRAMES * self.processor.hop_length / rate
            steps = self.num_frames // PATCH_FRAMES
            targets = frame_targets(events, len(self.label2id), steps, samples / rate, step, shift / rate)
        else:
            targets = torch.zeros(len(self.label2id))
            targets[[self.label2id[label] for label in example.labels]] = 1
        return waveform.roll(shift), targets
