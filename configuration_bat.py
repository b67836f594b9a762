"""Configuration of BAT (Better Audio Transformer): the encoder, its log-mel front end, and a head for classes.

Paper: https://arxiv.org/abs/2602.16305
"""

import math

from transformers import PretrainedConfig

HEAD_CHOICES = {
    "head_type": ("linear", "linear_cgp", "cgp", "protobin"),
    "head_pooling": ("cls", "mean"),
    "multi_label_loss": ("bce", "asymmetric"),
}


class BatConfig(PretrainedConfig):
    """Everything that defines a BAT model. The defaults are the published ViT-B/16; unknown keys are kept.

    Args:
        input_shape: frames and mel bands of one chunk, the picture that the position table covers.
        patch_size: frames and mel bands of one patch.
        hidden_size: width of the tokens; a multiple of 4 and of `num_attention_heads`.
        num_hidden_layers: number of blocks.
        num_attention_heads: heads per block.
        mlp_ratio: hidden width of the MLP over `hidden_size`.
        qkv_bias: whether the query, key and value projection has a bias.
        hidden_dropout_prob: dropout on the output of each attention and MLP branch, 0..1.
        attention_probs_dropout_prob: dropout on the attention weights, 0..1.
        drop_path_rate: stochastic depth of the last block, 0..1; rises linearly from 0 over the blocks.
        layer_norm_eps: epsilon of every LayerNorm.
        pre_norm: LayerNorm over the embedded tokens, before the first block.
        layer_norm_first: pre-norm blocks instead of the published post-norm blocks.
        init_scale_values: start value of LayerScale; None for no LayerScale.
        use_gate: multiply the attention output by a sigmoid gate computed from the block's input.
        pos_trainable: make the position table a trained parameter; otherwise it is a frozen buffer.
        chunk_time_patches: time patches encoded together; longer inputs run as several chunks.
        max_chunks_per_pass: most chunks, over batch and time, that run at once, which bounds the memory. Inference on a
            CPU takes no more than its cores; in training and on other devices each clip of a batch has at least one.
        sample_rate: of the waveform, in Hz.
        n_fft: FFT length and length of the Hann window, in samples.
        hop_length: step between frames, in samples.
        n_mels: mel bands; equals the second entry of `input_shape`.
        f_min: lower edge of the lowest mel band, in Hz; the upper edge is half of `sample_rate`.
        top_db: dynamic range kept below each clip's maximum, in dB.
        feature_normalization: only "per_sample_minmax_after_db", each clip scaled to 0..1 by its own extremes.
        head_type: "linear", "linear_cgp", "cgp" or "protobin", see `BatHead`. The head's fields are read by the models
            that have one; their classes are `num_labels`, `id2label` and `problem_type`, as in Transformers.
        head_pooling: "cls" or "mean": what stands for a whole clip, the CLS token or the mean of the patch tokens.
        head_norm: LayerNorm in the linear heads.
        head_dropout: dropout before the head's Linear, 0..1; None for the head's own, 0.2 in cgp and otherwise 0.
        num_prototypes: prototypes of the cgp and protobin heads.
        multi_label_loss: "bce" or "asymmetric", see `asymmetric_loss`.

    Raises:
        ValueError: a value is out of its range; the message names the field and the value.
    """

    model_type = "bat"

    def __init__(
        self,
        input_shape: tuple[int, int] | list[int] = (1024, 128),
        patch_size: tuple[int, int] | list[int] = (16, 16),
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        mlp_ratio: float = 4,
        qkv_bias: bool = True,
        hidden_dropout_prob: float = 0.0,
        attention_probs_dropout_prob: float = 0.0,
        drop_path_rate: float = 0.0,
        layer_norm_eps: float = 1e-6,
        pre_norm: bool = True,
        layer_norm_first: bool = False,
        init_scale_values: float | None = None,
        use_gate: bool = True,
        pos_trainable: bool = False,
        chunk_time_patches: int = 64,
        max_chunks_per_pass: int = 16,
        sample_rate: int = 16000,
        n_fft: int = 1024,
        hop_length: int = 160,
        n_mels: int = 128,
        f_min: float = 0,
        top_db: float = 80,
        feature_normalization: str = "per_sample_minmax_after_db",
        head_type: str = "linear",
        head_pooling: str = "cls",
        head_norm: bool = True,
        head_dropout: float | None = None,
        num_prototypes: int = 10000,
        multi_label_loss: str = "bce",
        **kwargs,
    ):
        self.input_shape = _pair("input_shape", input_shape)
        self.patch_size = _pair("patch_size", patch_size)
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.mlp_ratio = mlp_ratio
        self.qkv_bias = qkv_bias
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.drop_path_rate = drop_path_rate
        self.layer_norm_eps = layer_norm_eps
        self.pre_norm = pre_norm
        self.layer_norm_first = layer_norm_first
        self.init_scale_values = init_scale_values
        self.use_gate = use_gate
        self.pos_trainable = pos_trainable
        self.chunk_time_patches = chunk_time_patches
        self.max_chunks_per_pass = max_chunks_per_pass
        self.sample_rate = sample_rate
        self.n_fft = n_fft
        self.hop_length = hop_length
        self.n_mels = n_mels
        self.f_min = f_min
        self.top_db = top_db
        self.feature_normalization = feature_normalization
        self.head_type = head_type
        self.head_pooling = head_pooling
        self.head_norm = head_norm
        self.head_dropout = head_dropout
        self.num_prototypes = num_prototypes
        self.multi_label_loss = multi_label_loss
        self.check_fields()
        super().__init__(**kwargs)

    def __eq__(self, other) -> bool:
        """Equal when all keys of the JSON are, whichever version of Transformers wrote it."""
        if not isinstance(other, PretrainedConfig):
            return NotImplemented
        return {**self.to_dict(), "transformers_version": None} == {**other.to_dict(), "transformers_version": None}

    @property
    def grid_size(self) -> tuple[int, int]:
        """Time patches and mel patches of one whole chunk of `input_shape`."""
        return self.input_shape[0] // self.patch_size[0], self.input_shape[1] // self.patch_size[1]

    def check_fields(self):
        """Raise a ValueError that names the field and its value for the first one out of range."""

        def require(field: str, is_valid: bool, expected: str):
            if not is_valid:
                raise ValueError(f"BatConfig: {field}={getattr(self, field)!r} is not valid, expected {expected}.")

        for field in ("pre_norm", "layer_norm_first", "qkv_bias", "use_gate", "pos_trainable", "head_norm"):
            require(field, isinstance(getattr(self, field), bool), "True or False")
        for field in ("hidden_size", "num_hidden_layers", "num_attention_heads", "chunk_time_patches",
                      "max_chunks_per_pass", "sample_rate", "n_fft", "hop_length", "n_mels",
                      "num_prototypes"):  # fmt: skip
            require(field, _is_integer(getattr(self, field)) and getattr(self, field) >= 1, "an integer of at least 1")
        for field in ("mlp_ratio", "layer_norm_eps", "top_db"):
            require(field, _is_number(getattr(self, field)) and getattr(self, field) > 0, "a number above 0")
        for field in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"):
            value = getattr(self, field)
            require(field, _is_number(value) and 0 <= value <= 1, "a probability between 0 and 1")

        require("head_dropout", self.head_dropout is None or (_is_number(self.head_dropout) and
                0 <= self.head_dropout <= 1), "a probability between 0 and 1, or None for the head's own")  # fmt: skip
        for field, choices in HEAD_CHOICES.items():
            require(field, getattr(self, field) in choices, " or ".join(map(repr, choices)))

        for axis in (0, 1):
            require("input_shape", self.input_shape[axis] % self.patch_size[axis] == 0,
                    f"multiples of patch_size={self.patch_size}")  # fmt: skip
        require("hidden_size", self.hidden_size % self.num_attention_heads == 0,
                f"a multiple of num_attention_heads={self.num_attention_heads}")  # fmt: skip
        require("hidden_size", self.hidden_size % 4 == 0, "a multiple of 4, which the 2-D sin-cos positions need")
        require("init_scale_values", self.init_scale_values is None or _is_number(self.init_scale_values),
                "a number, or None for no LayerScale")  # fmt: skip
        require("chunk_time_patches", self.chunk_time_patches <= self.grid_size[0],
                f"at most the {self.grid_size[0]} time patches of input_shape={self.input_shape}")  # fmt: skip
        require("n_mels", self.n_mels == self.input_shape[1], f"the mel bands of input_shape={self.input_shape}")
        require("f_min", _is_number(self.f_min) and 0 <= self.f_min < self.sample_rate / 2,
                f"a frequency from 0 to below {self.sample_rate / 2} Hz")  # fmt: skip
        require("feature_normalization", self.feature_normalization == "per_sample_minmax_after_db",
                "'per_sample_minmax_after_db'")  # fmt: skip


def _is_integer(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return _is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def _pair(field: str, value) -> list[int]:
    """The value as a list of two positive integers, which is what JSON gives back."""
    if not (isinstance(value, list | tuple) and len(value) == 2 and all(_is_integer(v) and v >= 1 for v in value)):
        raise ValueError(f"BatConfig: {field}={value!r} is not valid, expected two integers of at least 1.")
    return list(value)


# With this, save_pretrained copies this file and fills in auto_map.
BatConfig.register_for_auto_class()
