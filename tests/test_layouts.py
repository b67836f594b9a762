"""The uses promised by the release, as written, from every layout in which the same files are used."""

import pytest
import torch
from conftest import TESTS, load_golden, run_python
from hub_server import HubServer
from programs import run_code
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

AUTO_MODEL = """
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained(repo, trust_remote_code=True).eval()
output = model(input_features=torch.randn(2, 1, 1024, 128))
assert output.last_hidden_state.shape == (2, 513, 768)
assert output.pooler_output.shape == (2, 768)
assert output.patch_tokens.shape == (2, 768, 64, 8)
"""
SCRIPTS = """
import sys, torch
sys.path.insert(0, snapshot_dir)
from load_model import load_pretrained_encoder, load_audio_processor
device = "cuda" if torch.cuda.is_available() else "cpu"
model = load_pretrained_encoder(device=device)
assert not model.training
processor = load_audio_processor(device=device)
waveform = torch.randn(2, 160000, device=device)
fbank = processor(waveform)
assert type(fbank) is torch.Tensor and fbank.shape == (2, 1, 1024, 128) and fbank.device == waveform.device
with torch.no_grad():
    assert model.forward_encoder(fbank).shape == (2, 513, 768)
"""
WEIGHTS = """
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
weights = load_file(hf_hub_download(repo, "model.safetensors"))
assert sum(tensor.numel() for tensor in weights.values()) == 92_734_464
assert weights["blocks.11.attn.gate.weight"].shape == (768, 768)
"""
OUTPUT = """
import sys
from safetensors.torch import load_file, save_file
with torch.no_grad():
    output = model.cpu()(load_file(golden)["clip.input_features"])
save_file({"tokens": output.last_hidden_state[:, ::19, ::7].contiguous()}, result)
"""


GOLDEN = TESTS / "golden" / "encoder_full.safetensors"


def run_snippets(code: str, repo, tmp_path, **environment):
    """Run the code, then encode the golden clip with its `model` and compare."""
    result = tmp_path / "result.safetensors"
    names = {"repo": repo, "snapshot_dir": repo, "golden": GOLDEN, "result": result}
    header = "".join(f"{name} = {str(value)!r}\n" for name, value in names.items())
    run_code(header + code + OUTPUT, cwd=tmp_path, **{"HF_MODULES_CACHE": tmp_path / "modules", **environment})
    expected = load_golden("encoder_full")[0]["clip.last_hidden_state_sampled"]
    torch.testing.assert_close(load_file(result)["tokens"], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("layout", ["plain_folder", "snapshot_folder"])
def test_folder(request, tmp_path, layout):
    run_snippets(AUTO_MODEL + SCRIPTS, request.getfixturevalue(layout), tmp_path)


def test_installed_package(tmp_path, plain_folder, installed_folder):
    """`bat_audio` from site-packages; its own folder has no weights, so a checkpoint is named."""
    scripts = SCRIPTS.replace("sys.path.insert(0, snapshot_dir)\n", "").replace("load_model import", "bat_audio import")
    scripts = scripts.replace("(device=device)", "(device=device, checkpoint=snapshot_dir)", 1)
    check = f"""
import bat_audio
import bat_audio_tools
assert bat_audio.__file__.startswith({str(installed_folder)!r}), bat_audio.__file__
assert isinstance(model, bat_audio.BatModel) and isinstance(processor, bat_audio.BatAudioProcessor)
"""
    code = "import bat_audio" + AUTO_MODEL + scripts + check
    run_snippets(code, plain_folder, tmp_path, PYTHONPATH=installed_folder)


def test_hub_repository(tmp_path, plain_folder):
    """AutoModel by name runs the repository's code, and the weights alone come from the same cache."""
    with HubServer({file.name: file.read_bytes() for file in plain_folder.iterdir()}) as hub:
        environment = {**hub.env(tmp_path / "home"), "HF_HUB_OFFLINE": None}
        run_snippets(AUTO_MODEL + WEIGHTS, hub.repo_id, tmp_path, **environment)
        assert hub.fetched.count("model.safetensors") == 1
        assert "load_model.py" not in hub.fetched


def test_program_without_its_extra_says_what_to_install(installed_folder):
    code = "import sys; sys.modules['typer'] = None; from bat_audio_tools import main; main()"
    result = run_python(code, PYTHONPATH=installed_folder, check=False)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: bat-audio needs more packages")
    assert "pip install 'bat-audio[train]'" in result.stderr
