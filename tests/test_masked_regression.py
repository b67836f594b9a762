"""Masks, targets and losses of pre-training against the published step and against plain loops in float64."""

import copy
import math

import pytest
import torch
from conftest import load_golden, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from bat_audio import BatConfig, BatModel
from bat_audio_tools.training.masked_regression import MaskedRegression, block_masks

TOLERANCE = {"rtol": 0, "atol": 2e-5}


def small_model(**changes) -> MaskedRegression:
    """On 4 x 8 patches, with weights far from their initial values; the teacher has others than the student."""
    torch.manual_seed(0)
    config = tiny_config(input_shape=[64, 128], hidden_size=16, **changes)
    model = MaskedRegression(BatModel(config), decoder_blocks=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def small_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Two clips, three views of each."""
    generator = torch.Generator().manual_seed(1)
    masks = [block_masks(3, (4, 8), keep=0.3, block=3, generator=generator) for _ in range(2)]
    return torch.rand(2, 1, 64, 128, generator=generator), torch.stack(masks)


def test_published_step():
    golden, metadata = load_golden("pretraining")
    sizes = {"hidden_size": metadata["dim"], "num_attention_heads": metadata["heads"]}
    config = BatConfig(**sizes, num_hidden_layers=metadata["depth"], attn_implementation="eager")
    model = MaskedRegression(BatModel(config), metadata["decoder_depth"])
    weights = {name: value for name, value in golden.items() if name.startswith(("student.", "teacher."))}
    for name in ("student.encoder.pos_embed", "student.decoder.pos_embed", "teacher.pos_embed"):
        torch.testing.assert_close(model.state_dict()[name], weights[name], **TOLERANCE)
    model.load_state_dict(weights)
    features, views = golden["input_features"], metadata["views"]
    ids_keep = golden["ids_keep"].long().unflatten(0, (-1, views))
    with torch.no_grad():
        losses = model(features, ids_keep)
        cls_tokens, patches = model.student(features, ids_keep)
        target = model.target(features)
    torch.testing.assert_close(cls_tokens, golden["student_cls"], **TOLERANCE)
    torch.testing.assert_close(patches[:1], golden["student_patches"], **TOLERANCE)
    torch.testing.assert_close(target[:1], golden["target"], **TOLERANCE)
    torch.testing.assert_close(losses["local_loss"], golden["local_loss"][0], **TOLERANCE)
    torch.testing.assert_close(losses["global_loss"], golden["global_loss"][0], **TOLERANCE)
    assert losses["loss"] == losses["local_loss"] + losses["global_loss"]


# Plain loops in float64


Vector = list[float]


class Loops:
    """The step of the specification on Python numbers, one token, channel and patch at a time."""

    def __init__(self, model: MaskedRegression):
        self.weights = {name: value.detach().double().tolist() for name, value in model.state_dict().items()}
        self.config = model.config
        self.width = self.config.hidden_size

    def linear(self, name: str, x: Vector) -> Vector:
        bias = self.weights.get(f"{name}.bias", [0.0] * len(self.weights[f"{name}.weight"]))
        rows = zip(self.weights[f"{name}.weight"], bias, strict=True)
        return [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in rows]

    def norm(self, name: str, x: Vector) -> Vector:
        scale, shift = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return [v * s + b for v, s, b in zip(standardise(x), scale, shift, strict=True)]

    def attention(self, name: str, tokens: list[Vector]) -> list[Vector]:
        heads, size = self.config.num_attention_heads, self.width // self.config.num_attention_heads
        qkv = [self.linear(f"{name}.qkv", x) for x in tokens]
        result = []
        for place, x in enumerate(tokens):
            merged = []
            for head in range(heads):
                first = head * size
                query = qkv[place][first : first + size]
                keys = [row[self.width + first : self.width + first + size] for row in qkv]
                values = [row[2 * self.width + first : 2 * self.width + first + size] for row in qkv]
                scores = [math.exp(sum(map(float.__mul__, query, key)) / math.sqrt(size)) for key in keys]
                for channel in range(size):
                    weighted = sum(s * value[channel] for s, value in zip(scores, values, strict=True))
                    merged.append(weighted / sum(scores))
            gate = [1 / (1 + math.exp(-v)) for v in self.linear(f"{name}.gate", x)]
            result.append(self.linear(f"{name}.proj", list(map(float.__mul__, merged, gate))))
        return result

    def block(self, name: str, tokens: list[Vector]) -> list[Vector]:
        attended = self.attention(f"{name}.attn", tokens)
        tokens = [self.norm(f"{name}.norm1", add(x, y)) for x, y in zip(tokens, attended, strict=True)]
        result = []
        for x in tokens:
            hidden = [0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in self.linear(f"{name}.mlp.fc1", x)]
            result.append(self.norm(f"{name}.norm2", add(x, self.linear(f"{name}.mlp.fc2", hidden))))
        return result

    def embed(self, name: str, clip: list[Vector], places: range | Vector) -> list[Vector]:
        """CLS and the patches at these places, in front of the first block."""
        kernels = self.weights[f"{name}.patch_embed.proj.weight"]
        tokens = [self.weights[f"{name}.cls_token"][0][0]]
        for place in places:
            time, mel = place // 8, place % 8
            pixels = [clip[16 * time + i][16 * mel + j] for i in range(16) for j in range(16)]
            flat = [[v for row in kernel[0] for v in row] for kernel in kernels]
            patch = [sum(map(float.__mul__, kernel, pixels)) for kernel in flat]
            patch = add(patch, self.weights[f"{name}.patch_embed.proj.bias"])
            tokens.append(add(patch, self.weights[f"{name}.pos_embed"][0][place]))
        return [self.norm(f"{name}.pre_norm", x) for x in tokens]

    def target(self, clip: list[Vector]) -> list[Vector]:
        tokens, blocks = self.embed("teacher", clip, range(32)), self.config.num_hidden_layers
        total = [[0.0] * self.width for _ in range(32)]
        for number in range(blocks):
            tokens = self.block(f"teacher.blocks.{number}", tokens)
            for channel in range(self.width):
                column = standardise([token[channel] for token in tokens[1:]])
                for place in range(32):
                    total[place][channel] += column[place] / blocks
        return [standardise(row) for row in total]

    def view(self, clip: list[Vector], kept: list[int]) -> tuple[Vector, list[Vector]]:
        """The CLS token, and the decoder's vector for every patch."""
        tokens = self.embed("student.encoder", clip, kept)
        for number in range(self.config.num_hidden_layers):
            tokens = self.block(f"student.encoder.blocks.{number}", tokens)
        grid = [self.weights["student.decoder.mask_token"][0][0] for _ in range(32)]
        for place, token in zip(kept, tokens[1:], strict=True):
            grid[place] = token
        grid = [add(x, y) for x, y in zip(grid, self.weights["student.decoder.pos_embed"][0], strict=True)]
        for number in range(2):
            grid = self.block(f"student.decoder.blocks.{number}", grid)
        return tokens[0], [self.linear("student.decoder.out_proj", x) for x in grid]

    def losses(self, features: torch.Tensor, ids_keep: torch.Tensor) -> tuple[float, float]:
        local_losses, global_losses = [], []
        for clip, views in zip(features[:, 0].double().tolist(), ids_keep.tolist(), strict=True):
            target = self.target(clip)
            mean_target = [sum(row[channel] for row in target) / 32 for channel in range(self.width)]
            for kept in views:
                cls_token, patches = self.view(clip, kept)
                dropped = [place for place in range(32) if place not in kept]
                local_losses += [squared_error(patches[place], target[place]) for place in dropped]
                global_losses.append(squared_error(cls_token, mean_target))
        return sum(local_losses) / len(local_losses), sum(global_losses) / len(global_losses)


def add(x: Vector, y: Vector) -> Vector:
    return list(map(float.__add__, x, y))


def standardise(x: Vector) -> Vector:
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / len(x)
    return [(v - mean) / math.sqrt(variance + 1e-6) for v in x]


def squared_error(x: Vector, y: Vector) -> float:
    return sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / len(x)


def test_losses_and_targets_equal_plain_loops():
    model = small_model()
    features, ids_keep = small_batch()
    loops = Loops(model)
    with torch.no_grad():
        losses, target = model(features, ids_keep), model.target(features)
    for clip, expected in zip(features[:, 0].double().tolist(), target, strict=True):
        torch.testing.assert_close(torch.tensor(loops.target(clip)), expected, **TOLERANCE)
    local_loss, global_loss = loops.losses(features, ids_keep)
    assert losses["local_loss"].item() == pytest.approx(local_loss, abs=2e-5)
    assert losses["global_loss"].item() == pytest.approx(global_loss, abs=2e-5)


def plain_mask(grid: tuple[int, int], keep: float, block: int, generator: torch.Generator) -> tuple[list[int], set]:
    """One mask by loops, from the same random numbers; also the patches in blocks."""
    patches = grid[0] * grid[1]
    centres = torch.randint(patches, (1, int(patches * (keep + 0.07) / block**2)), generator=generator)[0].tolist()
    in_block = set()
    for centre in centres:
        for i in range(-(block // 2), block // 2 + 1):
            for j in range(-(block // 2), block // 2 + 1):
                row, column = centre // grid[1] + i, centre % grid[1] + j
                if 0 <= row < grid[0] and 0 <= column < grid[1]:
                    in_block.add(row * grid[1] + column)
    lottery = torch.rand(1, patches, generator=generator)[0].tolist()
    first = sorted(range(patches), key=lambda patch: (patch not in in_block, -lottery[patch]))
    return sorted(first[: int(patches * keep)]), in_block


@given(
    st.integers(2, 70), st.integers(1, 12), st.floats(0.05, 0.95), st.sampled_from([1, 3, 5, 7]), st.integers(0, 2**32)
)
@settings(deadline=None)
def test_masks_equal_plain_loops(rows, columns, keep, block, seed):
    if not 0 < int(rows * columns * keep) < rows * columns:
        with pytest.raises(ValueError, match="some must be kept and some masked"):
            block_masks(1, (rows, columns), keep, block)
        return
    found = block_masks(1, (rows, columns), keep, block, torch.Generator().manual_seed(seed))[0].tolist()
    expected, in_block = plain_mask((rows, columns), keep, block, torch.Generator().manual_seed(seed))
    assert found == expected
    assert len(set(found)) == int(rows * columns * keep)
    assert set(found) <= in_block or in_block <= set(found)  # random ones only where blocks do not suffice


def test_published_masks_keep_102_patches_in_blocks():
    masks = block_masks(2000, (64, 8), 0.2, generator=torch.Generator().manual_seed(0))
    assert masks.shape == (2000, 102)
    kept = torch.zeros(2000, 512).scatter_(1, masks, 1.0)
    assert (kept.sum(1) == 102).all()
    neighbours = (kept.unflatten(1, (64, 8))[:, :, :-1] * kept.unflatten(1, (64, 8))[:, :, 1:]).sum() / kept.sum()
    assert neighbours > 0.4  # of patches strewn at random 0.17 would have a kept one above
    share = kept.mean(0).unflatten(0, (64, 8))
    assert share.min() > 0.08  # blocks end at the edges, so that patches there are kept less often
    assert share[5:-5, 3:5].mean() > share[:, 0].mean()


# Student and teacher


def test_student_sees_kept_patches_alone():
    model = small_model()
    features, ids_keep = small_batch()
    kept = set(ids_keep[0, 0].tolist())
    changed = features.clone()
    for place in set(range(32)) - kept:
        changed[0, 0, place // 8 * 16 :, :][:16, place % 8 * 16 :][:, :16] = 0.5
    with torch.no_grad():
        one, other = (model.student(x, ids_keep) for x in (features, changed))
    for before, after in zip(one, other, strict=True):
        assert torch.equal(before[0], after[0])
        assert not torch.equal(before[1], after[1])  # another view, which keeps some of those


def test_gradients_reach_the_whole_student_and_nothing_of_the_teacher():
    model = small_model()
    model(*small_batch())["loss"].backward()
    for name, parameter in model.named_parameters():
        if name.startswith("teacher."):
            assert parameter.grad is None, name
            assert not parameter.requires_grad
        else:
            assert parameter.grad.abs().max() > 0, name


def test_teacher_starts_as_a_copy_and_needs_no_dropout():
    encoder = BatModel(tiny_config(input_shape=[64, 128], drop_path_rate=0.5, hidden_dropout_prob=0.5))
    model = MaskedRegression(encoder, decoder_blocks=1)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(model.teacher.state_dict()[name], tensor)
    model.train()
    features, _ = small_batch()
    assert model.student.encoder.training
    assert torch.equal(model.target(features), model.target(features))


@pytest.mark.parametrize("decay", [0.9998, 0.99999, 0.5])
def test_teacher_follows_exactly(decay):
    model = small_model(pos_trainable=True)
    expected = {name: value.double() for name, value in model.teacher.named_parameters()}
    for _ in range(3):
        student = dict(model.student.encoder.named_parameters())
        with torch.no_grad():
            for parameter in student.values():
                parameter.add_(torch.randn_like(parameter))
        model.update_teacher(decay)
        for name, value in expected.items():
            expected[name] = decay * value + (1 - decay) * student[name].detach().double()
    assert expected.keys() == dict(model.teacher.named_parameters()).keys()
    for name, value in model.teacher.named_parameters():
        torch.testing.assert_close(value.double(), expected[name], rtol=3e-7, atol=3e-7)


@pytest.mark.parametrize("collapse", ["to one vector", "to the positions"])
def test_variances_show_a_collapse(collapse):
    model = small_model()
    features, ids_keep = small_batch()
    ids_keep = ids_keep[:1].expand_as(ids_keep)  # so that clips differ in their sound alone
    with torch.no_grad():
        healthy = model(features, ids_keep)
        target, cls_tokens = model.target(features).double(), model.student(features, ids_keep)[0].double()
        for encoder in (model.teacher, model.student.encoder):
            if collapse == "to the positions":
                encoder.patch_embed.proj.weight.zero_()
            for block in encoder.blocks if collapse == "to one vector" else ():
                block.norm2.weight.zero_()  # every token becomes the norm's bias
        collapsed = model(features, ids_keep)
    expected = {
        "target_variance": target.var(0).mean(),
        "mean_target_variance": target.mean(1).var(0).mean(),
        "cls_variance": cls_tokens.reshape(2, 3, 16).mean(1).var(0).mean(),
    }
    for name, value in expected.items():
        assert healthy[name].item() == pytest.approx(value.item(), rel=1e-4)
        assert healthy[name] > 1e-4, name
        assert collapsed[name] < 1e-10, name
        assert model(features[:1], ids_keep[:1])[name].isnan()  # one clip cannot tell


def test_losses_and_targets_are_float32_under_autocast():
    model, batch = small_model(), small_batch()
    plain = model(*batch)
    with torch.autocast("cpu", torch.bfloat16):
        target, losses = model.target(batch[0]), model(*batch)
    assert target.dtype == torch.float32
    for name, value in losses.items():
        assert value.dtype == torch.float32, name
        assert value.item() == pytest.approx(plain[name].item(), rel=0.1), name


def test_decoder_starts_as_specified():
    """With the encoder's sin-cos positions, trainable; Xavier's uniform weights, no bias, small mask tokens."""
    model = MaskedRegression(BatModel(tiny_config(hidden_size=64)), decoder_blocks=2)
    encoder, decoder = model.student.encoder, model.student.decoder
    assert torch.equal(decoder.pos_embed, encoder.position_table())
    assert decoder.pos_embed.requires_grad
    assert decoder.mask_token.std().item() == pytest.approx(0.02, rel=0.3)
    assert decoder.out_proj.bias is None
    linear = [module for module in decoder.modules() if isinstance(module, torch.nn.Linear)]
    assert len(linear) > 2 * len(decoder.blocks)
    for module in linear:
        bound = math.sqrt(6 / sum(module.weight.shape))
        assert 0.95 * bound < module.weight.abs().max() <= bound
        assert module.bias is None or not module.bias.any()


def test_checkpointed_and_compiled_steps_equal_the_plain_one():
    model = small_model()
    batch = small_batch()

    def step(model: MaskedRegression) -> tuple[torch.Tensor, dict]:
        loss = model(*batch)["loss"]
        loss.backward()
        return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    checkpointed, compiled = copy.deepcopy(model), copy.deepcopy(model)
    checkpointed.gradient_checkpointing = True
    for block in (*compiled.student.encoder.blocks, *compiled.student.decoder.blocks, *compiled.teacher.blocks):
        block.compile()
    loss, gradients = step(model)
    for other in (checkpointed, compiled):
        other_loss, other_gradients = step(other)
        torch.testing.assert_close(other_loss, loss)
        torch.testing.assert_close(other_gradients, gradients, rtol=1e-4, atol=1e-6)
