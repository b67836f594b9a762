"""BAT (Better Audio Transformer) as an installed package; importing it registers BAT with the Auto classes."""

from transformers import AutoConfig, AutoFeatureExtractor, AutoModel

from .configuration_bat import BatConfig
from .load_model import load_audio_processor, load_pretrained_encoder
from .modeling_bat import BatModel, BatModelOutput, BatPreTrainedModel
from .processing_bat import BatAudioProcessor, BatFeatureExtractor, load_audio, resample

AutoConfig.register(BatConfig.model_type, BatConfig)
AutoModel.register(BatConfig, BatModel)
AutoFeatureExtractor.register(BatConfig, BatFeatureExtractor)

__all__ = [
    "BatAudioProcessor",
    "BatConfig",
    "BatFeatureExtractor",
    "BatModel",
    "BatModelOutput",
    "BatPreTrainedModel",
    "load_audio",
    "load_audio_processor",
    "load_pretrained_encoder",
    "resample",
]
