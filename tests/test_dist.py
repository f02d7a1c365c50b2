"""`make dist`: the wheel and the folder for Hugging Face's Kernel Hub, from their contents to a call of each.

What the loader of `kernels` does is done here by hand, so that most of it is tested without network; one test installs
the real one from PyPI into a fresh environment.
"""

import ast
import os
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import dist

ROOT = Path(__file__).parent.parent
CALLS = """
import json, os, sys
from pathlib import Path
import torch

WHERE = Path(WHERE)

def check(package):
    "Attention and decoding, forward and backward, against the specification; the operators' namespace."
    q, (k, v) = torch.randn(1, 4, 70, 16, requires_grad=True), torch.randn(2, 1, 2, 70, 16)
    outs = [package.sliding_gqa_attention(q, k, v, 9, backend=backend) for backend in ("auto", "reference")]
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*(torch.autograd.grad(out.sum(), q)[0] for out in outs))
    lengths = torch.tensor([70])
    last = package.sliding_gqa_decode(q[:, :, -1:], k, v, lengths, 9)
    torch.testing.assert_close(last, outs[0][:, :, -1:].detach())
    if os.environ.get("TRITON_INTERPRET"):
        torch.testing.assert_close(package.sliding_gqa_attention(q, k, v, 9, backend="triton"), outs[0])
    return sys.modules[package.sliding_gqa_attention.__module__].NAMESPACE

def as_the_hub_loads(variant):
    import importlib.util

    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "sliding_gqa" / "__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def reads_as_sdpa(register_attention):
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(vocab_size=9, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                           num_attention_heads=2, num_key_value_heads=1, sliding_window=3)
    model, tokens = MistralForCausalLM(config), torch.arange(8)[None]
    logits = model(tokens).logits
    model.set_attn_implementation(register_attention("from_the_wheel"))
    torch.testing.assert_close(model(tokens).logits, logits)
"""


def run_python(code, where, path=(), python=sys.executable, **environment):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "HF_HUB_OFFLINE": "1", **environment}
    code = f"WHERE = {str(where)!r}\n{CALLS}\n{code}"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=where, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A directory with what `make dist` makes, and the wheel's files in installed/."""
    out = tmp_path_factory.mktemp("dist")
    assert dist.main(["--out", str(out)]) == 0
    with zipfile.ZipFile(wheel_of(out)) as wheel:
        wheel.extractall(out / "installed")
    return out


def wheel_of(directory):
    (wheel,) = directory.glob("sliding_gqa-*.whl")
    return wheel


def test_the_one_import_name_of_the_wheel_is_sliding_gqa(built):
    with zipfile.ZipFile(wheel_of(built)) as wheel:
        tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"sliding_gqa", wheel_of(built).name.removesuffix("-py3-none-any.whl") + ".dist-info"}


def test_the_version_is_one_number(built):
    import kernels

    assert dist.setup_arguments()["version"] == kernels.__version__ in wheel_of(built).name


@pytest.mark.parametrize(
    ("folder", "others"),
    [("installed/sliding_gqa", {"torch", "triton", "einops", "transformers"}), ("sliding-gqa", {"torch", "triton"})],
)
def test_files_import_their_own_package_relatively_and_few_others(built, folder, others):
    paths = sorted((built / folder).rglob("*.py"))
    assert len(paths) > 20
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            for module in modules:
                assert module.split(".")[0] in others | sys.stdlib_module_names, path


def test_the_same_files_give_the_same_bytes(built, tmp_path):
    dist.main(["--out", str(tmp_path)])
    assert wheel_of(tmp_path).read_bytes() == wheel_of(built).read_bytes()
    again = {path.relative_to(tmp_path): path.read_bytes() for path in (tmp_path / "sliding-gqa").rglob("*.*")}
    assert again == {path.relative_to(built): path.read_bytes() for path in (built / "sliding-gqa").rglob("*.*")}


def test_wheel_hub_copies_and_checkout_live_in_one_process(built):
    """Each with operators of its own; a second load of the same copy takes those of the first."""
    code = """
import kernels, sliding_gqa
assert sliding_gqa.__file__.startswith(str(WHERE)) and not kernels.__file__.startswith(str(WHERE))
variants = [WHERE / "sliding-gqa" / "build" / f"torch-{backend}" for backend in ("cpu", "cuda", "rocm", "cpu")]
print(*map(check, [sliding_gqa, kernels, *map(as_the_hub_loads, variants)]))
"""
    wheel, checkout, *hub = run_python(code, built, [built / "installed", ROOT], TRITON_INTERPRET="1")
    assert checkout == "sliding_gqa" and wheel.startswith("sliding_gqa_0")
    assert len({wheel, checkout, *hub}) == 5 and hub[0] == hub[3]
    assert hub[0].startswith("sliding_gqa_cpu_")


def test_register_attention_works_from_the_wheel(built):
    pytest.importorskip("transformers")
    code = """
from sliding_gqa.huggingface import register_attention
reads_as_sdpa(register_attention)
assert not {"kernels", "model", "train"} & set(sys.modules)
"""
    run_python(code, built, [built / "installed"])


@pytest.fixture(scope="module")
def fresh_python(built, tmp_path_factory):
    """Python of a new environment with the wheel and PyPI's `kernels`; torch is this environment's."""
    directory = tmp_path_factory.mktemp("fresh")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory], check=True)
    python = directory / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()
    shared = {str(Path(torch.__file__).parents[1]), *site.getsitepackages()}
    (Path(packages) / "shared.pth").write_text("\n".join(sorted(shared)) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check"]
    theirs = [*pip, "--retries", "0", "--constraint", ROOT / "constraints.txt", "kernels"]
    done = subprocess.run(theirs, capture_output=True, text=True, cwd=directory)
    if done.returncode:
        pytest.skip(f"pip cannot install `kernels`: {done.stderr.strip().splitlines()[-1]}")
    ours = [*pip, "--no-index", "--no-deps", "--ignore-installed", wheel_of(built)]
    subprocess.run(ours, check=True, cwd=directory)
    return python


def test_a_fresh_environment_with_the_kernels_of_pypi_runs_both(built, fresh_python):
    code = """
import kernels, sliding_gqa
hub = kernels.get_local_kernel(WHERE / "sliding-gqa", trust_remote_code=True)
assert "site-packages" in kernels.__file__ and "site-packages" in sliding_gqa.__file__
assert hub.__file__.startswith(str(WHERE / "sliding-gqa" / "build"))
print(*map(check, [sliding_gqa, hub]))
from sliding_gqa.huggingface import register_attention
reads_as_sdpa(register_attention)
"""
    wheel, hub = run_python(code, built, python=fresh_python)
    assert wheel != hub


def test_the_kernels_of_pypi_load_a_hub_copy_behind_a_checkout(built, fresh_python):
    code = """
import kernels, sliding_gqa
assert "site-packages" not in kernels.__file__
hub = kernels.get_local_kernel(WHERE / "sliding-gqa", trust_remote_code=True)
print(*map(check, [sliding_gqa, hub, kernels]))
"""
    assert len(set(run_python(code, built, [ROOT], fresh_python))) == 3
