"""transformers looks for Hugging Face's package `kernels`, and finds ours first: it imports, loads and runs its models.

The other package is a stand-in here, with the names that transformers imports; docs/huggingface.md says which pairs of
the real ones were tried.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RUN_A_MODEL = """
import kernels
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM
from transformers.utils.import_utils import is_kernels_available
import torch
config = MistralConfig(vocab_size=9, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                       num_key_value_heads=1, sliding_window=3)
MistralForCausalLM(config).save_pretrained(DIRECTORY)
from model.huggingface import register_attention
model = AutoModelForCausalLM.from_pretrained(DIRECTORY, attn_implementation=register_attention())
assert model(torch.tensor([[1, 2, 3, 4, 5]])).logits.shape == (1, 5, 9)
assert kernels.__version__ == "0.1.0" and kernels.sliding_gqa_attention
print(is_kernels_available())
"""
# what transformers imports of it: classes, decorators and functions
STAND_IN = """
from .layer.mode import Mode
__version__ = {version!r}
def use_kernel_forward_from_hub(name): return lambda layer: layer
def use_kernelized_func(*functions): return lambda layer: layer
def get_kernel(*args): raise RuntimeError("the stand-in has no kernels")
register_kernel_mapping = use_kernel_mapping = replace_kernel_forward_from_hub = kernelize = get_kernel
use_kernel_func_from_hub = use_kernel_forward_from_hub
def __getattr__(name):
    if not name[0].isupper():
        raise AttributeError(name)
    return type(name, (), dict(is_the_stand_in=True))
"""


def run_python(code, directory, path):
    environment = {**os.environ, "PYTHONPATH": str(path), "HF_HUB_OFFLINE": "1"}
    code = f"DIRECTORY = {str(directory)!r}\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture
def installed(tmp_path):
    """A directory with a package and a distribution `kernels`, of the version that this transformers asks for."""
    import_utils = pytest.importorskip("transformers").utils.import_utils
    version = getattr(import_utils, "KERNELS_MIN_VERSION", "0.12.0")
    (tmp_path / "site" / "kernels" / "layer").mkdir(parents=True)
    (tmp_path / "site" / "kernels" / "layer" / "__init__.py").touch()
    (tmp_path / "site" / "kernels" / "layer" / "mode.py").write_text("class Mode: pass\n")
    (tmp_path / "site" / "kernels" / "__init__.py").write_text(STAND_IN.format(version=version))
    distribution = tmp_path / "site" / f"kernels-{version}.dist-info"
    distribution.mkdir()
    (distribution / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    (distribution / "RECORD").write_text("kernels/__init__.py,,\n")
    return tmp_path / "site"


def test_transformers_works_with_ours_alone(tmp_path):
    pytest.importorskip("transformers")
    assert run_python(RUN_A_MODEL, tmp_path / "model", "") == ["False"]


def test_transformers_works_with_both_and_gets_its_names_from_the_other(tmp_path, installed):
    code = (
        RUN_A_MODEL + "from transformers.integrations import hub_kernels\nprint(hub_kernels.Device.is_the_stand_in)\n"
    )
    assert run_python(code, tmp_path / "model", installed) == ["True", "True"]
