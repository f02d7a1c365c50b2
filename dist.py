"""Build what others install, into dist/: a wheel, and a folder for Hugging Face's Kernel Hub. Nothing is downloaded.

    python dist.py                # or make dist

    dist/sliding_gqa-*.whl        pip install it; from sliding_gqa import sliding_gqa_attention
    dist/sliding-gqa              get_local_kernel(Path("dist/sliding-gqa"), trust_remote_code=True) of `kernels` there

Both hold our package `kernels` under the name sliding_gqa, so that they live beside Hugging Face's package `kernels`
and beside a checkout. The wheel also has model/huggingface/attention.py, as sliding_gqa.huggingface. The same files
give the same bytes.
"""

import argparse
import ast
import base64
import hashlib
import json
import re
import shutil
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent
PACKAGE = "sliding_gqa"
CHECKOUT_ONLY = ("compiled", "namesake.py")  # of kernels: tools without a GPU, and living with another `kernels`
NEEDED = ("torch", "triton", "einops")  # of setup.py's requirements
HUB_BACKENDS = ("cpu", "cuda", "rocm")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", metavar="DIR", help="where to (default: dist)")
    out = parser.parse_args(arguments).out
    about, files = setup_arguments(), package_files()
    out.mkdir(parents=True, exist_ok=True)
    print(write_wheel(out, about, files | {"huggingface.py": renamed("model/huggingface/attention.py")}))
    print(write_hub_folder(out / about["name"], about, files))
    return 0


def setup_arguments():
    """What setup.py gives to setup(), where it is written out: name, version, install_requires ..."""
    calls = (node for node in ast.walk(ast.parse(read("setup.py"))) if isinstance(node, ast.Call))
    (call,) = (call for call in calls if getattr(call.func, "id", None) == "setup")
    written_out = {}
    for argument in call.keywords:
        try:
            written_out[argument.arg] = ast.literal_eval(argument.value)
        except ValueError:
            continue
    return written_out


def package_files():
    """{path in the package: text} of `kernels`."""
    names = sorted(path.relative_to(ROOT / "kernels") for path in (ROOT / "kernels").rglob("*.py"))
    return {name.as_posix(): renamed("kernels" / name) for name in names if name.parts[0] not in CHECKOUT_ONLY}


def renamed(path):
    """The text of a file, with relative imports in the place of those from `kernels`, and the new name in examples."""
    text = re.sub(r"^from kernels(?=[. ])\.?", "from .", read(path), flags=re.MULTILINE)
    return re.sub(r"\bfrom (kernels|model)(?=[.\w]* import )", f"from {PACKAGE}", text)


def read(path):
    return (ROOT / path).read_text(encoding="utf-8")


def description(files):
    """The docstring of the package."""
    return ast.get_docstring(ast.parse(files["__init__.py"]))


def write_wheel(out, about, files):
    """The wheel's path. PEP 427: a zip with the package, its metadata and the digest of every file."""
    stem = f"{PACKAGE}-{about['version']}"
    requirements = [line for line in about["install_requires"] if re.match(r"\w+", line)[0] in NEEDED]
    metadata = [
        "Metadata-Version: 2.1",
        f"Name: {about['name']}",
        f"Version: {about['version']}",
        f"Summary: {about['description']}",
        f"License: {about['license']}",
        f"Requires-Python: {about['python_requires']}",
        *(f"Requires-Dist: {line}" for line in requirements),
        "Description-Content-Type: text/plain",
        "",
        description(files),
    ]
    members = {f"{PACKAGE}/{name}": text for name, text in files.items()}
    members[f"{stem}.dist-info/METADATA"] = "\n".join(metadata) + "\n"
    members[f"{stem}.dist-info/WHEEL"] = (
        "Wheel-Version: 1.0\nGenerator: dist.py\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    members[f"{stem}.dist-info/LICENSE"] = read("LICENSE")
    record = f"{stem}.dist-info/RECORD"
    lines = [f"{name},{sha256(text)},{len(text.encode())}" for name, text in members.items()]
    members[record] = "\n".join([*lines, f"{record},,"]) + "\n"
    for other in out.glob(f"{PACKAGE}-*.whl"):  # of another version
        other.unlink()
    path = out / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, text in members.items():
            member = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))  # no date: the same files give the same bytes
            member.external_attr = 0o644 << 16
            wheel.writestr(member, text, zipfile.ZIP_DEFLATED)
    return path


def sha256(text):
    digest = hashlib.sha256(text.encode()).digest()
    return "sha256=" + base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def write_hub_folder(folder, about, files):
    """The folder: build/torch-BACKEND/sliding_gqa for each backend, the same files, and who they are."""
    if (folder / "build").exists():
        shutil.rmtree(folder / "build")
    contents = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:8]
    for backend in HUB_BACKENDS:
        variant = folder / "build" / f"torch-{backend}"
        for name, text in files.items():
            write(variant / PACKAGE / name, text)
        metadata = {
            # the name under which the loader imports it: other files have another, and operators of their own
            "id": f"{PACKAGE}_{backend}_{contents}",
            "name": about["name"],
            "version": 1,
            "license": about["license"],
            "python-depends": [],
            "backend": {"type": backend},
        }
        write(variant / "metadata.json", json.dumps(metadata, indent=2) + "\n")
    card = f"---\nlicense: {about['license'].lower()}\ntags: [kernels]\n---\n\n# {about['name']}\n\n"
    write(folder / "README.md", f"{card}```\n{description(files)}\n```\n")
    write(folder / "LICENSE", read("LICENSE"))
    return folder


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    sys.exit(main())
