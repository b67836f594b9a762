"""BAT, the Better Audio Transformer: a self-supervised ViT-B/16 with gated attention on log-mel pictures.

Paper: https://arxiv.org/abs/2602.16305 (ICML 2026). The encoder comes first, then how long inputs are cut into chunks,
then the heads that turn its blocks' outputs into classes, for a clip or for every 160 ms.

Shapes: B clips, T frames, M mel bands, D width, H heads, L blocks, C chunks; t = T/16 time patches and f = M/16 mel
patches, so that N = t*f patch tokens; S = 1 + N tokens of one chunk, CLS first; K prototypes.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput

from .configuration_bat import BatConfig


@dataclass
class BatModelOutput(ModelOutput):
    """Output of `BatModel`.

    Args:
        last_hidden_state: (B, 1 + N, D), CLS first, then the patch tokens in time-major order.
        pooler_output: (B, D), the CLS token, averaged over the chunks of a long input.
        patch_tokens: (B, D, t, f), the patch tokens as a picture over time and mel; a view of `last_hidden_state`.
        hidden_states: L + 1 tensors (B, 1 + N, D), the embedded tokens and the output of each block.
        attentions: L tensors (B, H, S, S), or (B*C, H, S, S) with the chunks of each clip in a row when the input is
            longer than one chunk; a shorter last chunk is zero-padded to the others' size.
    """

    last_hidden_state: torch.FloatTensor | None = None
    pooler_output: torch.FloatTensor | None = None
    patch_tokens: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class BatPatchEmbed(nn.Module):
    def __init__(self, config: BatConfig):
        super().__init__()
        patch = tuple(config.patch_size)
        self.proj = nn.Conv2d(1, config.hidden_size, kernel_size=patch, stride=patch)

    def forward(self, input_features: torch.Tensor) -> torch.Tensor:
        return self.proj(input_features).flatten(2).transpose(1, 2)  # (B, 1, T, M) -> (B, D, t, f) -> (B, N, D)


def eager_attention_forward(
    module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, dropout: float, **kwargs
) -> tuple[torch.Tensor, torch.Tensor]:
    weights = (query @ key.transpose(2, 3) * scaling).softmax(dim=-1)  # (B, H, S, S)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights  # (B, S, H, D/H)


class BatAttention(nn.Module):
    """Multi-head self-attention whose merged heads are gated by the block's input."""

    def __init__(self, config: BatConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.scaling = (config.hidden_size // config.num_attention_heads) ** -0.5
        self.is_causal = False
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.gate = nn.Linear(config.hidden_size, config.hidden_size) if config.use_gate else None
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        qkv = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1))  # (B, S, 3, H, D/H)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, S, D/H)

        # Only the eager function returns the weights, so it serves every call that asks for them. Item access works on
        # Transformers 4 and 5; 5 looks for the words ALL_ATTENTION_FUNCTIONS.get_interface( in this file.
        attention_function = eager_attention_forward
        if self.config._attn_implementation != "eager" and not output_attentions:
            attention_function = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        context, weights = attention_function(
            self, query, key, value, attention_mask=None, scaling=self.scaling, dropout=dropout, is_causal=False
        )
        context = context.flatten(2)  # (B, S, D)
        if self.gate is not None:
            context = context * self.gate(hidden_states).sigmoid()
        return self.proj(context), weights if output_attentions else None


class BatMLP(nn.Module):
    def __init__(self, config: BatConfig):
        super().__init__()
        hidden_features = int(config.hidden_size * config.mlp_ratio)
        self.fc1 = nn.Linear(config.hidden_size, hidden_features)
        self.fc2 = nn.Linear(hidden_features, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(hidden_states)))


class BatLayerScale(nn.Module):
    def __init__(self, config: BatConfig):
        super().__init__()
        self.init_value = config.init_scale_values
        self.s = nn.Parameter(torch.full((config.hidden_size,), float(self.init_value)))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.s


class BatDropPath(nn.Module):
    """Stochastic depth: in training, drops the whole branch of a sample and scales the kept ones up."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.training or self.rate == 0.0:
            return hidden_states
        scale = hidden_states.new_ones(hidden_states.shape[0], 1, 1)
        return hidden_states * nn.functional.dropout(scale, self.rate)


class BatBlock(nn.Module):
    def __init__(self, config: BatConfig, drop_path_rate: float = 0.0):
        super().__init__()
        use_layer_scale = config.init_scale_values is not None
        self.layer_norm_first = config.layer_norm_first
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = BatAttention(config)
        self.ls1 = BatLayerScale(config) if use_layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = BatMLP(config)
        self.ls2 = BatLayerScale(config) if use_layer_scale else nn.Identity()
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = BatDropPath(drop_path_rate)

    def forward(
        self, hidden_states: torch.Tensor, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, S, D) -> (B, S, D) and the attention weights (B, H, S, S) when asked for."""
        x = hidden_states
        if self.layer_norm_first:
            context, weights = self.attn(self.norm1(x), output_attentions)
            x = x + self.drop_path(self.ls1(self.dropout(context)))
            x = x + self.drop_path(self.ls2(self.dropout(self.mlp(self.norm2(x)))))
        else:
            context, weights = self.attn(x, output_attentions)
            x = self.norm1(x + self.drop_path(self.ls1(self.dropout(context))))
            x = self.norm2(x + self.drop_path(self.ls2(self.dropout(self.mlp(x)))))
        return x, weights


class BatPreTrainedModel(PreTrainedModel):
    config_class = BatConfig
    base_model_prefix = "bat"
    main_input_name = "input_features"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BatBlock"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        def initialize(tensor: torch.Tensor | None, fill, *args):
            if tensor is not None and not getattr(tensor, "_is_hf_initialized", False):  # Loaded weights have it.
                fill(tensor, *args)

        if isinstance(module, nn.Linear | nn.Conv2d):
            initialize(module.weight, nn.init.xavier_uniform_)
            initialize(module.bias, nn.init.zeros_)
        elif isinstance(module, nn.LayerNorm):
            initialize(module.weight, nn.init.ones_)
            initialize(module.bias, nn.init.zeros_)
        elif isinstance(module, BatLayerScale):
            initialize(module.s, nn.init.constant_, module.init_value)
        elif isinstance(module, BatHead):
            initialize(module.block_attention, nn.init.constant_, module.block_attention_start)
            initialize(module.prototype_vectors, nn.init.normal_, 0.0, 0.02)
        elif isinstance(module, BatModel):
            initialize(module.cls_token, nn.init.normal_, 0.0, 0.02)
            initialize(module.pos_embed, torch.Tensor.copy_, module.position_table())

    if not hasattr(PreTrainedModel, "activation_checkpointing_enable"):  # Only Transformers 5 has it.

        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs):
            """As in Transformers 5: non-reentrant by default, so that blocks behind frozen embeddings get gradients."""
            super().gradient_checkpointing_enable(gradient_checkpointing_kwargs or {"use_reentrant": False}, **kwargs)

    def save_pretrained(self, save_directory: str | Path, is_main_process: bool = True, **kwargs):
        """As in Transformers, but complete: weights, config, all code files, and the feature extractor's settings.

        An existing preprocessor_config.json is left as it is.
        """
        from .processing_bat import BatFeatureExtractor

        self.config.auto_map = dict(AUTO_MAP)
        self.config.custom_pipelines = dict(CUSTOM_PIPELINES)
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process and not (Path(save_directory) / "preprocessor_config.json").exists():
            BatFeatureExtractor.from_model_config(self.config).save_pretrained(save_directory)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, strict: bool = True, **kwargs):
        """As in Transformers, but a checkpoint that does not hold exactly the model's weights is an error.

        A model with a head loads from an encoder checkpoint (the head is new, and reported), and the encoder loads from
        the checkpoint of a model whose head is named `head`. A head that the checkpoint holds only in part is an error.

        Args:
            strict: False loads what fits, leaves the rest at its initial values, and only warns.

        Raises:
            ValueError: weights are missing, unexpected, misshapen or of another kind of head; the message lists them.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        takes_any_shape = kwargs.pop("ignore_mismatched_sizes", False)
        # Mismatched sizes are let through here so that one error can list every kind of problem.
        kwargs.update(output_loading_info=True, ignore_mismatched_sizes=True)
        model, info = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        if strict:
            refuse_other_weights(model, info, takes_any_shape, pretrained_model_name_or_path or "given as state_dict")
        return (model, info) if wants_info else model

    def find_head_problems(self, loading_info: dict) -> list[str]:
        """Why the head of a checkpoint is not one for this model, beyond the names and shapes of its weights."""
        return []


class Pass(NamedTuple):
    """What the blocks give of R rows, each a chunk of a clip; and, joined over all chunks, of an input of B clips."""

    layers: list[torch.Tensor]  # (R, S, D) or (B, 1 + N, D) of the last block, or of the embedding and every block
    attentions: list[torch.Tensor]  # (R or B*C, H, S, S) of every block; empty unless they are asked for
    cls_tokens: torch.Tensor | None  # (R or B, L, D) of every block; None without a head
    patch_mix: torch.Tensor | None  # (R or B, D, t, f or 1), as the head mixes them; None where it mixes none


class BatModel(BatPreTrainedModel):
    """The BAT encoder: log-mel features in, one CLS token and a picture of patch tokens out."""

    def __init__(self, config: BatConfig):
        config.check_fields()  # Keywords of from_pretrained have changed it since it was checked.
        super().__init__(config)
        width, (time_patches, mel_patches) = config.hidden_size, config.grid_size
        # Transformers' GradientCheckpointingLayer would do this per block, but cannot be imported beside a broken
        # torchaudio, which Transformers 5 loads with it.
        self.gradient_checkpointing = False
        self.patch_embed = BatPatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        pos_embed = torch.zeros(1, time_patches * mel_patches, width)
        if config.pos_trainable:
            self.pos_embed = nn.Parameter(pos_embed)
        else:  # Transformers 5 unfreezes every parameter that it loads, but no buffer.
            self.register_buffer("pos_embed", pos_embed)
        self.pre_norm = nn.LayerNorm(width, eps=config.layer_norm_eps) if config.pre_norm else nn.Identity()
        last = max(config.num_hidden_layers - 1, 1)
        self.blocks = nn.ModuleList(
            BatBlock(config, drop_path_rate=config.drop_path_rate * i / last) for i in range(config.num_hidden_layers)
        )
        self.post_init()

    def position_table(self) -> torch.Tensor:
        """The published table (1, t*f, D) of 2-D sin-cos positions: half of the width for the time, half for the mel.

        Quirk of the published weights: the table's grid is mel-major while the tokens are time-major, so row p holds
        the position of mel patch p // t and time patch p % t. The weights were trained with it.
        """
        time_patches, mel_patches = self.config.grid_size
        quarter = self.config.hidden_size // 4
        omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
        mel, time = torch.meshgrid(torch.arange(mel_patches), torch.arange(time_patches), indexing="ij")
        angles = [axis.reshape(-1, 1) * omega for axis in (time, mel)]
        return torch.cat([half for angle in angles for half in (angle.sin(), angle.cos())], dim=1).float()[None]

    def embed(self, input_features: torch.Tensor) -> torch.Tensor:
        """Tokens that enter the first block: (B, 1, T, M) of at most one chunk -> (B, S, D)."""
        tokens = self.patch_embed(input_features)
        tokens = tokens + self.pos_embed[:, : tokens.shape[1]]
        return self.pre_norm(torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1))

    def encode_chunks(
        self,
        chunks: torch.Tensor,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        mix_patches: Callable[[torch.Tensor | None, int, torch.Tensor], torch.Tensor | None] | None = None,
    ) -> Pass:
        """Run rows (R, 1, T, M) of at most one chunk through the blocks, all at once.

        `mix_patches` gets the patch tokens block by block, see `BlockReader`. No more than one block's tokens live at a
        time, unless they are asked for or in the graph of a training step.
        """
        hidden_states = self.embed(chunks)  # (R, S, D)
        all_hidden_states, attentions, cls_tokens, patch_mix = [], [], [], None
        for layer, block in enumerate(self.blocks):
            if output_hidden_states:
                all_hidden_states.append(hidden_states)
            if self.gradient_checkpointing and self.training:
                hidden_states, weights = self._gradient_checkpointing_func(block, hidden_states, output_attentions)
            else:
                hidden_states, weights = block(hidden_states, output_attentions)
            if output_attentions:
                attentions.append(weights)
            if mix_patches is not None:
                cls_tokens.append(hidden_states[:, 0].clone())  # A view would keep all tokens of the block.
                patch_mix = mix_patches(patch_mix, layer, self._patch_picture(hidden_states))
        # They are stacked because small tensors all over the freed memory would keep it from being used again.
        cls_tokens = torch.stack(cls_tokens, dim=1) if cls_tokens else None
        return Pass([*all_hidden_states, hidden_states], attentions, cls_tokens, patch_mix)

    def forward(
        self,
        input_features: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BatModelOutput | tuple:
        """Encode log-mel features in 0..1, as `BatFeatureExtractor` makes them.

        Args:
            input_features: (B, 1, T, 128), (B, T, 128) or mel-first (B, 1, 128, T), floating point, any T >= 16.
                Frames beyond the last whole patch of 16 are dropped. Inputs longer than `chunk_time_patches`
                patches run as independent chunks, whose CLS tokens are averaged.
            input_values: another name for `input_features`.
            output_attentions: also return the attention weights; the call then computes attention eagerly.
            output_hidden_states: also return the embedded tokens and every block's output.
            return_dict: False returns a tuple instead of a `BatModelOutput`.

        Raises:
            ValueError: neither or both inputs, or a tensor of the wrong type or shape.
        """
        output, _ = self.encode(input_features, input_values, output_attentions, output_hidden_states)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    # From here on: chunks of long inputs, and heads.

    def encode(
        self,
        input_features: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        head: "BlockReader | None" = None,
    ) -> tuple[BatModelOutput, torch.Tensor | None]:
        """`forward` with a head that is fed block by block: also what its `classify` gives, or None without a head."""
        if (input_features is None) == (input_values is None):
            both = "neither input_features nor" if input_features is None else "both input_features and"
            raise ValueError(f"BatModel got {both} input_values (two names for one input); give exactly one of them.")
        features = self._check_features(input_features if input_features is not None else input_values)
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        whole = self._encode_passes(features, output_hidden_states, output_attentions, head)
        tokens = whole.layers[-1]
        output = BatModelOutput(
            last_hidden_state=tokens,
            pooler_output=tokens[:, 0],
            patch_tokens=self._patch_picture(tokens),
            hidden_states=tuple(whole.layers) if output_hidden_states else None,
            attentions=tuple(whole.attentions) if output_attentions else None,
        )
        if head is None:
            return output, None
        return output, head.classify(head.mix_cls(whole.cls_tokens.transpose(0, 1)), whole.patch_mix)

    def _check_features(self, input_features: torch.Tensor) -> torch.Tensor:
        """The features as (B, 1, T, M) in the model's dtype, or a ValueError that says what arrived."""
        time_patch, mels = self.config.patch_size[0], self.config.input_shape[1]
        got = f"type {type(input_features).__name__}"
        if isinstance(input_features, torch.Tensor):
            got = f"shape {tuple(input_features.shape)} and {input_features.dtype}"
            features = input_features.unsqueeze(1) if input_features.ndim == 3 else input_features
            if features.ndim == 4 and features.shape[3] != mels:
                features = features.transpose(2, 3)
            is_usable = features.is_floating_point() and features.ndim == 4 and features.shape[0] > 0
            if is_usable and features.shape[2] >= time_patch and features.shape[1::2] == (1, mels):
                return features.to(self.cls_token.dtype)
        raise ValueError(
            f"BatModel got input_features of {got}; expected log-mel features as a floating-point tensor (batch, 1, "
            f"frames, {mels}), (batch, frames, {mels}) or mel-first (batch, 1, {mels}, frames), with at least one clip "
            f"and {time_patch} frames."
        )

    def _patch_picture(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """View tokens (B, 1 + N, D) without CLS as (B, D, t, f)."""
        return hidden_states[:, 1:].unflatten(1, (-1, self.config.grid_size[1])).permute(0, 3, 1, 2)

    def _passes(self, features: torch.Tensor) -> list[tuple[slice, slice]]:
        """Which clips and which of their chunks run at once: passes of whole chunks, then of the shorter last ones.

        Inference on a CPU takes at most a chunk per core, whose working set stays in cache, which is faster than a
        whole batch and takes less memory. Elsewhere a pass has a chunk of every clip, and more if the limit allows.
        """
        most, batch, chunk = self.config.max_chunks_per_pass, features.shape[0], self.config.chunk_time_patches
        splits_batch = features.device.type == "cpu" and not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        most = min(most, torch.get_num_threads()) if splits_batch else max(most, batch)
        time_patches = features.shape[2] // self.config.patch_size[0]
        whole_chunks, step = time_patches // chunk, max(1, most // batch)
        passes = [(start, min(start + step, whole_chunks), most) for start in range(0, whole_chunks, step)]
        rest = time_patches - whole_chunks * chunk
        if rest:
            passes.append((whole_chunks, whole_chunks + 1, most * chunk // rest))
        return [
            (clips, slice(start, stop))
            for start, stop, rows in passes
            for clips in ([slice(i, i + rows) for i in range(0, batch, rows)] if splits_batch else [slice(None)])
        ]

    def _encode_passes(
        self, features: torch.Tensor, output_hidden_states: bool, output_attentions: bool, head: "BlockReader | None"
    ) -> Pass:
        """Send features (B, 1, T, M) of any length through the blocks pass by pass, and join what these give.

        Each result is written to its place in the whole as it comes, so that the tokens of a long input are never held
        twice. Nothing else is allocated to stay between two passes: small tensors among the freed ones would keep their
        memory from being used again.
        """
        batch, _, frames, mels = features.shape
        (patch_frames, _), (_, mel_patches) = self.config.patch_size, self.config.grid_size
        time_patches, chunk = frames // patch_frames, self.config.chunk_time_patches
        passes = self._passes(features)
        num_chunks, num_tokens = passes[-1][1].stop, 1 + time_patches * mel_patches
        layers = [None] * (1 + len(self.blocks) if output_hidden_states else 1)
        cls_of_chunks, attentions = [None] * len(layers), [None] * (len(self.blocks) if output_attentions else 0)
        cls_tokens = patch_mix = None
        for clips, chunks in passes:
            # As a condition and not as min(), which torch.compile would carry along as an expression of the length.
            end = time_patches if chunks.stop * chunk > time_patches else chunks.stop * chunk
            times = slice(chunks.start * chunk, end)
            by_clip = (-1, chunks.stop - chunks.start)  # (B, C), into which `unflatten` takes the rows apart
            rows = features[clips, :, times.start * patch_frames : times.stop * patch_frames]
            rows = rows.reshape(-1, 1, rows.shape[2] // by_clip[1], mels)  # (B*C, 1, T, M)
            part = self._encode_rows(rows, output_hidden_states, output_attentions, head)
            put = functools.partial(write_part, batch, clips)
            for i, tokens in enumerate(part.layers):
                if num_chunks == 1:
                    layers[i] = put(layers[i], tokens, num_tokens, slice(num_tokens))
                    continue
                tokens = tokens.unflatten(0, by_clip)  # (B, C, S, D)
                places = slice(1 + times.start * mel_patches, 1 + times.stop * mel_patches)
                layers[i] = put(layers[i], tokens[:, :, 1:].flatten(1, 2), num_tokens, places)
                cls_of_chunks[i] = put(cls_of_chunks[i], tokens[:, :, 0], num_chunks, chunks)
            for i, weights in enumerate(part.attentions):  # Those of a shorter chunk are filled up with zeros.
                filling = 1 + (chunk if num_chunks > 1 else time_patches) * mel_patches - weights.shape[3]
                weights = nn.functional.pad(weights, (0, filling) * 2).unflatten(0, by_clip)  # (B, C, H, S, S)
                attentions[i] = put(attentions[i], weights, num_chunks, chunks)
            if part.cls_tokens is not None:
                cls_tokens = put(cls_tokens, part.cls_tokens.unflatten(0, by_clip), num_chunks, chunks)  # (B, C, L, D)
            if part.patch_mix is not None:
                mix = part.patch_mix.transpose(1, 2).unflatten(0, by_clip).flatten(1, 2)  # (B, t, D, f or 1)
                patch_mix = put(patch_mix, mix, time_patches, times)
            part = tokens = weights = mix = None  # Otherwise they would live through the next pass.
        if num_chunks > 1:
            for tokens, cls in zip(layers, cls_of_chunks, strict=True):
                tokens[:, 0] = cls.mean(dim=1)
        return Pass(
            layers,
            [weights.flatten(0, 1) for weights in attentions],
            None if cls_tokens is None else cls_tokens.mean(dim=1),
            None if patch_mix is None else patch_mix.transpose(1, 2),
        )

    def _encode_rows(
        self, rows: torch.Tensor, output_hidden_states: bool, output_attentions: bool, head: "BlockReader | None"
    ) -> Pass:
        """`encode_chunks` with a head, whose mix may get its gradient from `MixingAgain`."""
        if head is None:
            return self.encode_chunks(rows, output_hidden_states, output_attentions)
        mixes_again = self.gradient_checkpointing and torch.is_grad_enabled() and self.is_frozen
        mixes_again = mixes_again and not rows.requires_grad
        with torch.set_grad_enabled(torch.is_grad_enabled() and not mixes_again):
            part = self.encode_chunks(rows, output_hidden_states, output_attentions, head.mix_patches)
        if not mixes_again or part.patch_mix is None or head.block_attention is None:
            return part
        encode_again = functools.partial(self.encode_chunks, rows)
        return part._replace(patch_mix=MixingAgain.apply(part.patch_mix, head.block_attention, head, encode_again))

    @property
    def is_frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.parameters())

    def get_input_embeddings(self) -> nn.Module:
        return self.patch_embed.proj

    def set_input_embeddings(self, value: nn.Module):
        self.patch_embed.proj = value

    def forward_encoder(self, input_features: torch.Tensor) -> torch.Tensor:
        """Tokens of the last block (B, 1 + N, D), CLS first; see `forward` for the input."""
        return self(input_features, return_dict=True).last_hidden_state

    def extract_features(self, input_features: torch.Tensor) -> dict[str, torch.Tensor]:
        """Outputs of every block: `cls_tokens` (L, B, D) and `patch_tokens` (L, B, D, t, f); input as in `forward`."""
        blocks = self(input_features, output_hidden_states=True, return_dict=True).hidden_states[1:]
        return {
            "cls_tokens": torch.stack([hidden_states[:, 0] for hidden_states in blocks]),
            "patch_tokens": torch.stack([self._patch_picture(hidden_states) for hidden_states in blocks]),
        }


def write_part(
    batch: int, clips: slice, whole: torch.Tensor | None, part: torch.Tensor, length: int, place: slice
) -> torch.Tensor:
    """Write a part to its place, [clips, place], in a whole (batch, length, ...), and give the whole.

    The whole is None at first; a part that is all of it is not copied.
    """
    shape = (batch, length, *part.shape[2:])
    if part.shape == shape:
        return part
    whole = part.new_empty(shape) if whole is None else whole
    whole[clips, place] = part
    return whole


def refuse_other_weights(model: BatPreTrainedModel, loading_info: dict, takes_any_shape: bool, source: str | Path):
    """Raise a ValueError with a list of all that is wrong with the weights that a model was loaded from.

    A head of which no weight was there is a new one, and the encoder has no use for the weights of a `head`.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing, unexpected = set(loading_info["missing_keys"]), set(loading_info["unexpected_keys"])
    if model.base_model is model:
        unexpected = {name for name in unexpected if not name.startswith("head.")}
    else:
        head = {name for name in shapes if not name.startswith(f"{model.base_model_prefix}.")}
        missing -= head if head <= missing else set()
    # Transformers 4 lists the names of misshapen weights, 5 adds their shapes; both log the shapes they found.
    names = [entry if isinstance(entry, str) else entry[0] for entry in loading_info["mismatched_keys"]]
    misshapen = [] if takes_any_shape else [f"{name} (expected {shapes[name]})" for name in names]
    kinds = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    problems = [f"{len(names)} {kind}: {', '.join(sorted(names))}" for kind, names in kinds.items() if names]
    problems += model.find_head_problems(loading_info)
    if problems:
        raise ValueError(
            f"The checkpoint {source} does not hold the weights of this {type(model).__name__}:\n  "
            + "\n  ".join(problems)
            + "\nIs it a BAT checkpoint, and does its config.json belong to it? "
            "from_pretrained(..., strict=False) loads what fits and leaves the rest untrained."
        )


class BlockReader(Protocol):
    """What `BatModel.encode` feeds with the output of one block after another; `BatHead` is one."""

    # The one trained tensor that `mix_patches` may use, None for none. With gradient checkpointing and a frozen encoder
    # the mix is made without a graph, and no other tensor would get its gradient.
    block_attention: nn.Parameter | None

    def mix_patches(self, mix: torch.Tensor | None, layer: int, patch_tokens: torch.Tensor) -> torch.Tensor | None:
        """Add block `layer`'s patch tokens (B, D, t, f) to the mix (B, D, t, f or 1) of the blocks before, first None.

        None, always, where the patch tokens are not needed.
        """

    def mix_cls(self, cls_tokens: torch.Tensor) -> torch.Tensor | None:
        """What `classify` gets of all blocks' CLS tokens (L, B, D), which are averaged over the chunks."""

    def classify(self, cls_mix: torch.Tensor | None, patch_mix: torch.Tensor | None) -> torch.Tensor:
        """What `encode` returns, of the results of `mix_cls` and of the last `mix_patches` over all chunks."""


class MixingAgain(torch.autograd.Function):
    """Gradient of the blocks' weights in a mix of a frozen encoder's tokens, which was made without a graph.

    That gradient needs every block's tokens. The backward pass encodes again for it, to have one block's at a time.
    """

    @staticmethod
    def forward(ctx, mix: torch.Tensor, block_attention: torch.Tensor, head: BlockReader, encode: Callable):
        kind = mix.device.type
        ctx.autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        ctx.head, ctx.encode = head, encode
        return mix.clone()

    @staticmethod
    def backward(ctx, mix_gradient: torch.Tensor):
        weights = ctx.head.block_attention

        def add_gradient(sum_before: torch.Tensor | None, layer: int, tokens: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                part = ctx.head.mix_patches(None, layer, tokens)
            (gradient,) = torch.autograd.grad(part, weights, mix_gradient)
            return gradient if sum_before is None else sum_before + gradient

        with ctx.autocast:
            gradient = ctx.encode(mix_patches=add_gradient).patch_mix
        return None, gradient, None, None


IGNORED_LABEL = -100  # Where a frame or class has this label, as in torch's cross-entropy, there is no loss.
PROTOTYPES_AT_ONCE = 1024  # So many are compared with all patches at a time; it bounds the cosines' memory.


class BatHead(nn.Module):
    """Every block's output to logits, for the clip or for each time patch (paper, section 4).

    linear      last block -> LayerNorm -> dropout -> Linear
    linear_cgp  mix of all blocks, weighted by softmax(block_attention) -> LayerNorm -> dropout -> Linear
    cgp         the same mix of L2-normalised tokens -> cosine with each prototype: minimum over the patches, CLS,
                maximum -> dropout -> Linear
    protobin    last block -> cosine with prototypes of +-1: maximum over the patches -> dropout -> Linear

    The linear heads see the CLS token or, with `head_pooling="mean"`, the mean of the patch tokens; in cgp that mean
    takes the place of the CLS value. Frame by frame there is no CLS: means, minima and maxima are over the mel patches
    of each time patch.

    The head works on the dict of `BatModel.extract_features`, or on one block at a time through `mix_patches`.
    """

    def __init__(self, config: BatConfig, per_frame: bool = False):
        super().__init__()
        self.per_frame = per_frame
        self.mixes_blocks = config.head_type in ("linear_cgp", "cgp")
        self.has_prototypes = config.head_type in ("cgp", "protobin")
        self.is_binary = config.head_type == "protobin"
        self.uses_cls = config.head_pooling == "cls" and not per_frame and not self.is_binary
        self.last_layer = config.num_hidden_layers - 1
        self.block_attention_start = 1.0 if config.head_type == "cgp" else 0.0
        width, prototypes = config.hidden_size, config.num_prototypes
        dropout = config.head_dropout
        if dropout is None:
            dropout = 0.2 if config.head_type == "cgp" else 0.0

        self.block_attention = self.prototype_vectors = None
        if self.mixes_blocks:
            self.block_attention = nn.Parameter(torch.full((config.num_hidden_layers,), self.block_attention_start))
        if self.has_prototypes:
            self.prototype_vectors = nn.Parameter(0.02 * torch.randn(prototypes, width, 1, 1))
        self.ln = nn.Identity()
        if config.head_norm and not self.has_prototypes:
            self.ln = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(dropout)
        in_features = {"cgp": 3 * prototypes, "protobin": prototypes}.get(config.head_type, width)
        self.fc = nn.Linear(in_features, config.num_labels)

    def forward(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        """Logits (B, classes), or (B, t, classes) frame by frame.

        Args:
            features: `cls_tokens` (L, B, D) and `patch_tokens` (L, B, D, t, f) of `BatModel.extract_features`.
        """
        patch_mix = None
        for layer, patch_tokens in enumerate(features["patch_tokens"]):
            patch_mix = self.mix_patches(patch_mix, layer, patch_tokens)
        return self.classify(self.mix_cls(features["cls_tokens"]), patch_mix)

    def mix_patches(self, mix: torch.Tensor | None, layer: int, patch_tokens: torch.Tensor) -> torch.Tensor | None:
        """Add block `layer`'s patch tokens (B, D, t, f) to the mix of the blocks before it, None at first.

        The mix is (B, D, t, f) for prototypes and (B, D, t, 1), averaged over mel, for the linear heads; None where the
        head sees the CLS token alone.
        """
        if self.uses_cls and not self.has_prototypes:
            return None
        return self._mix(mix, layer, patch_tokens if self.has_prototypes else patch_tokens.mean(dim=3, keepdim=True))

    def mix_cls(self, cls_tokens: torch.Tensor) -> torch.Tensor | None:
        """The mix (B, D) of the blocks' CLS tokens (L, B, D); None where the head has no use for them."""
        mix = None
        for layer, tokens in enumerate(cls_tokens if self.uses_cls else ()):
            mix = self._mix(mix, layer, tokens)
        return mix

    def _mix(self, mix: torch.Tensor | None, layer: int, tokens: torch.Tensor) -> torch.Tensor | None:
        if not self.mixes_blocks and layer != self.last_layer:
            return None
        scale = self.block_attention.softmax(dim=0)[layer] if self.mixes_blocks else tokens.new_ones(())
        if self.has_prototypes:  # Scaling by 1 / norm in the same product needs no normalised copy of the tokens.
            scale = scale / torch.linalg.vector_norm(tokens, dim=1, keepdim=True).clamp_min(1e-12)
        return tokens * scale if mix is None else torch.addcmul(mix, tokens, scale)

    def classify(self, cls_mix: torch.Tensor | None, patch_mix: torch.Tensor | None) -> torch.Tensor:
        """Logits of the mixed CLS tokens (B, D) and patch tokens (B, D, t, f or 1)."""
        if self.has_prototypes:
            pooled = self._compare_with_prototypes(cls_mix, patch_mix)
        elif self.uses_cls:
            pooled = cls_mix  # (B, D)
        else:
            pooled = patch_mix.squeeze(3).transpose(1, 2)  # (B, t, D)
            pooled = pooled if self.per_frame else pooled.mean(dim=1)
        return self.fc(self.dropout(self.ln(pooled)))

    def _compare_with_prototypes(self, cls_mix: torch.Tensor | None, patch_mix: torch.Tensor) -> torch.Tensor:
        """(B, 3*K) or, for binary prototypes, (B, K); with a time axis in the middle frame by frame."""
        prototypes = self.prototype_vectors.flatten(1)  # (K, D)
        if self.is_binary:  # The forward pass sees +-1, the backward pass the gradient of the identity.
            signs = torch.where(prototypes >= 0, 1.0, -1.0).to(prototypes.dtype)
            prototypes = signs + (prototypes - prototypes.detach())
        parts = nn.functional.normalize(prototypes, dim=1).split(PROTOTYPES_AT_ONCE)
        if torch.is_grad_enabled():  # The backward pass computes the cosines again, so that none are kept.
            pooled = [checkpoint(self._pool_cosines, part, cls_mix, patch_mix, use_reentrant=False) for part in parts]
        else:
            pooled = [self._pool_cosines(part, cls_mix, patch_mix) for part in parts]
        return torch.cat(pooled, dim=-1)

    def _pool_cosines(self, prototypes: torch.Tensor, cls_mix: torch.Tensor | None, patch_mix: torch.Tensor):
        cosines = patch_mix.permute(0, 2, 3, 1) @ prototypes.T  # (B, t, f, K)
        axes = 2 if self.per_frame else (1, 2)
        highest = cosines.amax(axes)
        if self.is_binary:
            return highest
        middle = cls_mix @ prototypes.T if self.uses_cls else cosines.mean(axes)
        return torch.stack([cosines.amin(axes), middle, highest], dim=-1).flatten(-2)  # minimum, CLS, maximum in turn


def asymmetric_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy in which negatives count by their predicted probability, elementwise.

    The asymmetric loss with gamma_neg 1, gamma_pos 0 and no clipping; no gradient flows through the weight.
    """
    probabilities = logits.detach().sigmoid()
    error = 1 - (probabilities * labels + (1 - probabilities) * (1 - labels))
    weight = error ** (1 - labels)
    return weight * nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")


class BatForClassification(BatPreTrainedModel):
    """The encoder under `bat` and a `BatHead` under `head`, fed block by block; see the two subclasses."""

    per_frame: bool
    output_class: type[ModelOutput]
    # The loss is a mean, so Trainer is to divide it by the accumulation steps, whatever wraps the model.
    accepts_loss_kwargs = False

    def __init__(self, config: BatConfig):
        super().__init__(config)
        self.bat = BatModel(config)
        self.head = BatHead(config, per_frame=self.per_frame)
        self.post_init()

    def find_head_problems(self, loading_info: dict) -> list[str]:
        """Heads for clips and for frames have weights of the same names and shapes; the config tells them apart."""
        other = "BatForAudioClassification" if self.per_frame else "BatForAudioFrameClassification"
        is_new_head = "head.fc.weight" in loading_info["missing_keys"]
        if is_new_head or other not in (self.config.architectures or ()):
            return []
        advice = "" if self.per_frame else " Its decode_events gives the events of a clip."
        return [
            f"its head was trained in a {other}, not in a {type(self).__name__}; load it with "
            f"{other.replace('Bat', 'AutoModel', 1)}.{advice}"
        ]

    def freeze_base_model(self):
        """Freeze the encoder for probing: no gradients, and eval mode whenever the model is set to training."""
        self.bat.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True):
        super().train(mode)
        if self.bat.is_frozen:
            self.bat.eval()
        return self

    def forward(
        self,
        input_features: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ModelOutput | tuple:
        """Logits (B, classes), or (B, t, classes) frame by frame, and the loss where there are labels.

        Args:
            input_features: log-mel features as in `BatModel.forward`, as the remaining arguments are.
            labels: class indices (B,) or (B, t), or a value in 0..1 per class in the shape of the logits; -100 where a
                frame has no label. `config.problem_type` chooses cross-entropy or, for several labels at once, the loss
                of `config.multi_label_loss`; if it is None, it is set from the labels: indices mean a single label.

        Raises:
            ValueError: labels or features of the wrong shape or type.
        """
        output, logits = self.bat.encode(
            input_features, input_values, output_attentions, output_hidden_states, self.head
        )
        loss = None if labels is None else self.compute_loss(logits, labels)
        output = self.output_class(loss, logits, output.hidden_states, output.attentions)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def compute_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean loss over the clips of logits (B, classes) or (B, t, classes), in float32; a clip's is its steps' mean.

        Labels and errors as in `forward`; 0 where nothing has a label.
        """
        if self.config.problem_type is None:
            multi_label = labels.is_floating_point() or labels.ndim == logits.ndim
            self.config.problem_type = f"{'multi' if multi_label else 'single'}_label_classification"
        is_single_label = self.config.problem_type == "single_label_classification"
        if self.config.problem_type == "regression":
            raise ValueError('problem_type="regression" is not supported; expected single_label_... or multi_label_...')
        logits = logits.float()
        if labels.shape == logits.shape:  # a probability per class
            is_kept = (labels != IGNORED_LABEL).all(dim=-1)
            labels = labels.float().masked_fill(labels == IGNORED_LABEL, 0)
            if is_single_label:
                loss = -(labels * logits.log_softmax(dim=-1)).sum(dim=-1)
            elif self.config.multi_label_loss == "asymmetric":
                loss = asymmetric_loss(logits, labels).mean(dim=-1)
            else:
                loss = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(dim=-1)
        elif is_single_label and labels.shape == logits.shape[:-1] and not labels.is_floating_point():
            is_kept = labels != IGNORED_LABEL
            loss = nn.functional.cross_entropy(logits.movedim(-1, 1), labels, reduction="none")
        else:
            raise ValueError(
                f"{type(self).__name__} got labels of shape {tuple(labels.shape)} and {labels.dtype}; expected "
                f"{tuple(logits.shape)} with a value per class"
                + (f", or class indices {tuple(logits.shape[:-1])}." if is_single_label else ".")
            )
        # The mean is over the steps of each clip, then over the clips, so that equal parts of a batch weigh the same.
        loss, is_kept = loss.reshape(len(loss), -1), is_kept.reshape(len(loss), -1)
        loss = (loss * is_kept).sum(dim=1) / is_kept.sum(dim=1).clamp_min(1)  # (B,)
        return loss.sum() / is_kept.any(dim=1).sum().clamp_min(1)


class BatForAudioClassification(BatForClassification):
    """BAT with a head for the classes of a whole clip: logits (B, classes)."""

    per_frame = False
    output_class = SequenceClassifierOutput


class BatForAudioFrameClassification(BatForClassification):
    """BAT with a head for the classes at each time patch of 160 ms: logits (B, t, classes)."""

    per_frame = True
    output_class = TokenClassifierOutput

    def decode_events(
        self,
        logits: torch.Tensor,
        threshold: float | Sequence[float] = 0.5,
        median_frames: int = 1,
        durations: Sequence[float] | None = None,
    ) -> list[list[dict[str, float | str]]]:
        """Events of each clip, in order of onset: `onset` and `offset` in s, `label`, and `score` in 0..1.

        A class is active where its probability, after the median filter, is at least the threshold; the score is the
        mean probability over the event.

        Args:
            logits: (B, t, classes), as `forward` gives them.
            threshold: in 0..1, one for all classes or one for each.
            median_frames: width of the median filter over time, in steps of 160 ms; odd, 1 for no filter.
            durations: of each clip, in s. Events end there at the latest; without it also the padding counts, on which
                the model was not trained.

        Raises:
            ValueError: logits of another shape, an even `median_frames`, or thresholds or durations of another number.
        """
        if logits.ndim != 3 or logits.shape[2] != self.config.num_labels:
            raise ValueError(
                f"Got logits of shape {tuple(logits.shape)}; expected (batch, time, {self.config.num_labels})."
            )
        if not isinstance(median_frames, int) or median_frames < 1 or median_frames % 2 == 0:
            raise ValueError(f"median_frames={median_frames} must be an odd number of steps of 160 ms.")
        thresholds = torch.as_tensor(threshold, dtype=torch.float32).reshape(-1, 1)
        if len(thresholds) not in (1, logits.shape[2]) or not ((thresholds >= 0) & (thresholds <= 1)).all():
            raise ValueError(f"threshold={threshold} must be one number in 0..1, or one for each of the classes.")
        step = self.config.patch_size[0] * self.config.hop_length / self.config.sample_rate  # s
        if durations is None:
            durations = [logits.shape[1] * step] * len(logits)
        if len(durations) != len(logits) or min(durations, default=1) <= 0:
            raise ValueError(f"durations={durations} must be {len(logits)} times in s above 0, one for each clip.")
        logits = logits.detach().float().cpu().transpose(1, 2)  # (B, classes, t)
        is_single_label = self.config.problem_type == "single_label_classification"
        margin = median_frames // 2

        events = []
        for scores, duration in zip(
            logits.softmax(dim=1) if is_single_label else logits.sigmoid(), durations, strict=True
        ):
            scores = scores[:, : math.ceil(duration / step - 1e-6)]  # (classes, t); an end on a step's edge is rounded
            padded = nn.functional.pad(scores, (margin, margin), mode="replicate")
            is_active = padded.unfold(1, median_frames, 1).median(dim=2).values >= thresholds
            edges = nn.functional.pad(is_active.int(), (1, 1)).diff(dim=1)  # (classes, t + 1), +1 and -1
            onsets, offsets = (edges == 1).nonzero().tolist(), (edges == -1).nonzero().tolist()
            found = [
                {
                    "onset": first * step,
                    "offset": min(end * step, float(duration)),
                    "label": self.config.id2label[label],
                    "score": scores[label, first:end].mean().item(),
                }
                for (label, first), (_, end) in zip(onsets, offsets, strict=True)
            ]
            events.append(sorted(found, key=lambda event: event["onset"]))
        return events


# These stand in the config.json of every folder that `save_pretrained` writes.
AUTO_MAP = {
    "AutoConfig": "configuration_bat.BatConfig",
    "AutoModel": "modeling_bat.BatModel",
    "AutoModelForAudioClassification": "modeling_bat.BatForAudioClassification",
    "AutoModelForAudioFrameClassification": "modeling_bat.BatForAudioFrameClassification",
}
CUSTOM_PIPELINES = {
    "feature-extraction": {
        "impl": "pipeline_bat.BatFeatureExtractionPipeline",
        "pt": ["AutoModel"],
        "type": "audio",
    },
    "audio-classification": {
        "impl": "pipeline_bat.BatAudioClassificationPipeline",
        "pt": ["AutoModelForAudioClassification"],
        "type": "audio",
    },
}
if TYPE_CHECKING:  # This never runs; it names the files, so that Transformers copies them wherever it copies this one.
    from .audio_bat import Sound  # noqa: F401
    from .pipeline_bat import BatFeatureExtractionPipeline  # noqa: F401

# With this, save_pretrained copies this file and fills in auto_map.
BatModel.register_for_auto_class("AutoModel")
BatForAudioClassification.register_for_auto_class("AutoModelForAudioClassification")
BatForAudioFrameClassification.register_for_auto_class("AutoModelForAudioFrameClassification")
