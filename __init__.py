"""BAT (Better Audio Transformer) as an installed package; importing it registers BAT with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForAudioFrameClassification,
)

from .audio_bat import Sound, load_audio, resample
from .configuration_bat import BatConfig
from .load_model import load_audio_processor, load_pretrained_encoder
from .modeling_bat import (
    BatForAudioClassification,
    BatForAudioFrameClassification,
    BatHead,
    BatModel,
    BatModelOutput,
    BatPreTrainedModel,
)
from .processing_bat import BatAudioProcessor, BatFeatureExtractor

AutoConfig.register(BatConfig.model_type, BatConfig)
AutoModel.register(BatConfig, BatModel)
AutoModelForAudioClassification.register(BatConfig, BatForAudioClassification)
AutoModelForAudioFrameClassification.register(BatConfig, BatForAudioFrameClassification)
AutoFeatureExtractor.register(BatConfig, BatFeatureExtractor)

__all__ = [
    "BatAudioProcessor",
    "BatConfig",
    "BatFeatureExtractor",
    "BatForAudioClassification",
    "BatForAudioFrameClassification",
    "BatHead",
    "BatModel",
    "BatModelOutput",
    "BatPreTrainedModel",
    "Sound",
    "load_audio",
    "load_audio_processor",
    "load_pretrained_encoder",
    "resample",
]
