"""Masked latent regression: the student sees a few patches of a clip and predicts what the teacher makes of all.

    model = MaskedRegression(BatModel(config), decoder_blocks=6)
    losses = model(input_features, block_masks(...))

Paper: https://arxiv.org/abs/2602.16305, section 3.

Shapes: B clips, V views of each, N patches of a clip of which K are kept, D width.
"""

import copy

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from bat_audio.configuration_bat import BatConfig
from bat_audio.modeling_bat import BatBlock, BatModel

# If the blocks never overlapped, they would cover the patches to keep and, beyond those, this share of all patches.
MASK_SURPLUS = 0.07
TARGET_EPS = 1e-6


def block_masks(
    count: int, grid: tuple[int, int], keep: float, block: int = 5, generator: torch.Generator | None = None
) -> torch.Tensor:
    """The patches that are kept in each of `count` masks: (count, K) int64, in their order; K = int(N * keep).

    Square blocks of `block` patches grow around random centres and end at the edges of the grid. Random patches are
    added to them, or taken away, until exactly K are left.

    Args:
        grid: patches over time and over mel.
        keep: share of the patches to keep.
        block: side of the blocks, an odd number.

    Raises:
        ValueError: no patch, or every patch, would be kept.
    """
    num_patches = grid[0] * grid[1]
    num_kept = int(num_patches * keep)
    if not 0 < num_kept < num_patches:
        raise ValueError(f"keep={keep} of {num_patches} patches are {num_kept}; some must be kept and some masked.")
    num_blocks = int(num_patches * (keep + MASK_SURPLUS) / block**2)
    centres = torch.randint(num_patches, (count, num_blocks), generator=generator)
    is_centre = torch.zeros(count, num_patches).scatter_(1, centres, 1.0).unflatten(1, (1, *grid))
    in_block = nn.functional.max_pool2d(is_centre, block, stride=1, padding=block // 2).flatten(1)
    # The patches with the largest scores are kept: those in blocks have 1 to 2, the others 0 to 1.
    scores = in_block + torch.rand(in_block.shape, generator=generator)
    return scores.topk(num_kept).indices.sort().values


def run_blocks(blocks: nn.ModuleList, hidden_states: torch.Tensor, checkpointing: bool) -> torch.Tensor:
    for block in blocks:
        if checkpointing:
            hidden_states, _ = checkpoint(block, hidden_states, use_reentrant=False)
        else:
            hidden_states, _ = block(hidden_states)
    return hidden_states


class Decoder(nn.Module):
    """Predicts a vector for every patch of the grid from the encoded ones that were kept."""

    def __init__(self, config: BatConfig, num_blocks: int, position_table: torch.Tensor):
        super().__init__()
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, config.hidden_size))
        self.pos_embed = nn.Parameter(position_table.clone())
        self.blocks = nn.ModuleList(BatBlock(config) for _ in range(num_blocks))
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, kept: torch.Tensor, ids_keep: torch.Tensor, checkpointing: bool = False) -> torch.Tensor:
        """Encoded patches (B*V, K, D) at their places (B*V, K) -> (B*V, N, D)."""
        grid = self.mask_token.expand(len(kept), self.pos_embed.shape[1], -1)
        grid = grid.scatter(1, ids_keep[:, :, None].expand_as(kept), kept)
        return self.out_proj(run_blocks(self.blocks, grid + self.pos_embed, checkpointing))


class Student(nn.Module):
    def __init__(self, encoder: BatModel, decoder_blocks: int):
        super().__init__()
        self.encoder = encoder
        self.decoder = Decoder(encoder.config, decoder_blocks, encoder.position_table())

    def forward(
        self, input_features: torch.Tensor, ids_keep: torch.Tensor, checkpointing: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (B, 1, T, M) and the patches kept of each view (B, V, K) -> CLS (B*V, D) and patches (B*V, N, D)."""
        encoder, views = self.encoder, ids_keep.shape[1]
        patches = encoder.patch_embed(input_features) + encoder.pos_embed  # (B, N, D)
        ids_keep = ids_keep.flatten(0, 1)  # (B*V, K)
        clips = torch.arange(len(patches), device=patches.device).repeat_interleave(views)
        patches = patches[clips[:, None], ids_keep]  # (B*V, K, D)
        tokens = torch.cat([encoder.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        tokens = run_blocks(encoder.blocks, encoder.pre_norm(tokens), checkpointing)
        return tokens[:, 0], self.decoder(tokens[:, 1:], ids_keep, checkpointing)


class MaskedRegression(nn.Module):
    """Student, teacher and losses; the teacher starts as a copy of the encoder and follows by `update_teacher`.

    Args:
        encoder: the student's; its `input_shape` is that of the features.
        decoder_blocks: blocks of the student's decoder, which are as the encoder's.
    """

    def __init__(self, encoder: BatModel, decoder_blocks: int):
        super().__init__()
        self.config = encoder.config
        self.student = Student(encoder, decoder_blocks)
        self.teacher = copy.deepcopy(encoder).requires_grad_(False)
        self.gradient_checkpointing = False
        self.train()

    def train(self, mode: bool = True) -> "MaskedRegression":
        super().train(mode)
        self.teacher.eval()
        return self

    @torch.no_grad()
    def target(self, input_features: torch.Tensor) -> torch.Tensor:
        """What the teacher makes of whole clips (B, 1, T, M): (B, N, D) float32.

        Every block's patch tokens, normalised over the patches of the clip for each channel, are averaged over the
        blocks and normalised over the width.
        """
        hidden_states, total = self.teacher.embed(input_features), 0.0
        for block in self.teacher.blocks:
            hidden_states, _ = block(hidden_states)
            patches = hidden_states[:, 1:].float().transpose(1, 2)  # (B, D, N)
            total = total + nn.functional.instance_norm(patches, eps=TARGET_EPS)
        average = total.transpose(1, 2) / len(self.teacher.blocks)  # (B, N, D)
        return nn.functional.layer_norm(average, average.shape[2:], eps=TARGET_EPS)

    def forward(self, input_features: torch.Tensor, ids_keep: torch.Tensor) -> dict[str, torch.Tensor]:
        """Losses of one step, in float32.

        Args:
            input_features: (B, 1, T, M) of the config's `input_shape`.
            ids_keep: (B, V, K), the patches that the student sees of each view, as of `block_masks`.

        Returns:
            `loss`, the sum of `local_loss`, the squared error of the masked patches, and `global_loss`, that between
            CLS token and mean target; and, to see a collapse, means over the channels of variances over these clips,
            NaN of one alone: `target_variance` of each patch's target, `mean_target_variance` of their mean,
            `cls_variance` of the CLS.
        """
        views = ids_keep.shape[1]
        target = self.target(input_features)  # (B, N, D)
        cls_token, patches = self.student(input_features, ids_keep, self.gradient_checkpointing)
        cls_token = cls_token.float().unflatten(0, (-1, views))  # (B, V, D)
        patches = patches.float().unflatten(0, (-1, views))  # (B, V, N, D)
        is_masked = torch.ones_like(patches[..., 0]).scatter(2, ids_keep, 0.0)  # (B, V, N)
        local_loss = ((patches - target[:, None]).square().mean(-1) * is_masked).sum() / is_masked.sum()
        global_loss = (cls_token - target.mean(1, keepdim=True)).square().mean()
        with torch.no_grad():
            variances = {
                "target_variance": target.var(0).mean(),
                "mean_target_variance": target.mean(1).var(0).mean(),
                "cls_variance": cls_token.mean(1).var(0).mean(),
            }
        return {
            "loss": local_loss + global_loss,
            "local_loss": local_loss,
            "global_loss": global_loss,
            **variances,
        }

    def update_teacher(self, decay: float):
        """teacher = decay * teacher + (1 - decay) * student's encoder, for all parameters."""
        average = get_ema_multi_avg_fn(decay)
        average(list(self.teacher.parameters()), list(self.student.encoder.parameters()), None)
