"""The README's commands do what they say, from a wheel that pip installed; command lines in docs and recipes are right.

What is put in their place: `make install` by an environment that holds the wheel and sees this one's other packages;
the model, the corpus and the held-out text by tiny ones under the names that the README uses; the numbers in the recipe
(sizes, lengths, batches) by small ones, while the names and folders in it stay.
"""

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_prune.commands import COMMANDS, main
from megatron_prune.config import Config, configured, dump, read_file
from megatron_prune.config.command_line import PRETRAIN
from megatron_prune.errors import UserError
from megatron_prune.launch.jobs.request import Request
from megatron_prune.runtime import failures
from megatron_prune.testing.helpers.tiny_runs import prepare
from tests.commands import ROOT

INSTALL = "make install && "
RECIPE = Path("examples/configs/smollm_360m_to_134m.yaml")


def blocks(text):
    """Blocks of commands: a list of command lines each, continued lines joined, comments left out."""
    for block in re.findall(r"^```\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        lines = re.sub(r"\\\n\s*", "", block).splitlines()
        yield [re.sub(r"\s+#.*", "", line) for line in lines if line.strip()]


# README, step by step -------------------------------------------------------------------------------------------------


def install_wheel(folder):
    """An environment, clone/.venv, that holds the wheel and this interpreter's other packages, but not its own copy."""
    source, wheels = folder / "source", folder / "wheels"
    shutil.copytree(ROOT / "megatron_prune", source / "megatron_prune", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def call(*words):
        subprocess.run([str(word) for word in words], env=environment, check=True, timeout=100)

    call(*pip, "wheel", *offline, "--no-build-isolation", "-w", wheels, source)
    call(sys.executable, "-m", "venv", "--without-pip", folder / "clone" / ".venv")
    python = folder / "clone" / ".venv" / "bin" / "python"
    (site,) = (folder / "clone" / ".venv" / "lib").glob("python*/site-packages")
    (site / "others.pth").write_text("".join(f"{path}\n" for path in sys.path if path.endswith("-packages")))
    call(*pip, "--python", python, "install", *offline, *wheels.glob("*.whl"))


def small_recipe(path):
    """The recipe with small numbers."""
    config = read_file(path)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, seq_length=32, split="80,20,0"),
        training=dataclasses.replace(
            config.training, micro_batch_size=1, global_batch_size=2, train_iters=60, bf16=False, eval_iters=1
        ),
        optimizer=dataclasses.replace(config.optimizer, lr_warmup_iters=2),
        pruning=dataclasses.replace(config.pruning, target_params=11_400, first_prune_iter=3, ratio="4:1"),
        continued=dataclasses.replace(config.continued, continue_tokens=256),
    )


@pytest.mark.timeout(240)
def test_the_readmes_commands_lead_from_text_to_an_evaluated_model(tmp_path):
    (steps,) = [block for block in blocks((ROOT / "README.md").read_text()) if block[0].startswith(INSTALL)]
    clone = tmp_path / "clone"
    shutil.copytree(ROOT / "examples", clone / "examples")
    (clone / RECIPE).write_text(dump(small_recipe(clone / RECIPE)))
    files = prepare(tmp_path / "files")
    shutil.copytree(files.source, clone / "SmolLM-360M")
    shutil.copy(files.folder / "tokenizer.model", clone / "SmolLM-360M")
    (clone / "corpus").mkdir()
    texts = [(files.folder / f"text_{number}.txt").read_text().split("\n\n") for number in range(2)]
    for name, documents in zip(("one", "two"), texts, strict=True):
        lines = (json.dumps({"text": document}) + "\n" for document in documents)
        (clone / "corpus" / f"{name}.jsonl").write_text("".join(lines))
    (clone / "held_out.txt").write_text("\n\n".join(texts[0][:40]))
    install_wheel(tmp_path)

    where = "python -c 'import megatron_prune; print(megatron_prune.__file__)'"
    script = "\n".join(["set -e", steps[0].removeprefix(INSTALL), where, *steps[1:]])
    kept = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
    environment = kept | {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        ["bash", "-c", script], cwd=clone, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{clone}/.venv/lib/" in done.stdout.splitlines()[0]
    summary = json.loads((clone / "runs" / "smollm_360m_to_134m" / "summary.json").read_text())
    assert summary["stages"]["final"]["parameters"] <= 11_400
    assert "every weight is bit for bit as in the checkpoint" in done.stdout
    assert re.search(r"^\| data +\| measure +\| +SmolLM-360M \| +smollm_134m_hf \|", done.stdout, re.MULTILINE), (
        done.stdout
    )
    found = re.search(r"^\| held_out.txt \| perplexity per token +\| +(\S+) \| +(\S+) \|", done.stdout, re.MULTILINE)
    assert found and float(found[2]) < float(found[1]), "a source of random weights has learnt something"


# Command lines everywhere ---------------------------------------------------------------------------------------------


def command_lines():
    """(where, line) of what README, docs and the comments in examples show."""
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        yield from ((path.name, line) for block in blocks(path.read_text()) for line in block)
    for path in sorted((ROOT / "examples").rglob("*.*")):
        if path.suffix in (".sh", ".sbatch", ".yaml"):
            text = re.sub(r"\\\n#\s*", "", path.read_text())
            yield from ((path.name, line) for line in re.findall(r"^#   (\S.*)$", text, re.MULTILINE))


def own_words(line):
    """(command, its words) where the line calls one of this project's; else None."""
    if not re.search(r"megatron.prune|pretrain_efficientllm", line) or re.search(r" \[|^\s*\S+/ {3,}", line):
        return None  # the second: a grammar, the drawing of the folders
    line = re.sub(r"^\w+=\$\((.*)\)$", r"\1", line)
    words = [word for word in shlex.split(line, comments=True) if word != "..."]
    for number, word in enumerate(words):
        if word == "megatron-prune" or (word == "megatron_prune" and words[number - 1] == "-m"):
            return words[number + 1], words[number + 2 :]
        if word == "megatron_prune.pretrain":
            return "pretrain", words[number + 1 :]
        if word.endswith(("pretrain_efficientllm.sh", "pretrain_efficientllm.sbatch")):
            return "launch", words[number + 1 :]
    return None


def parse(name, words, monkeypatch):
    """Read the words as the command does, and do nothing."""
    if name == "launch":
        request = Request.parse(words)
        name, words = "pretrain", request.flags
    if name == "pretrain":
        given = PRETRAIN.read(words)
        given.own()
        return configured(given, None)
    monkeypatch.setattr(failures, "exit_status", lambda job: 0)
    return main([name, *words])


def test_every_command_line_shown_is_one_that_its_command_takes(monkeypatch, capsys):
    seen = []
    for where, line in command_lines():
        found = own_words(line)
        if found is None:
            continue
        try:
            status = parse(*found, monkeypatch)
        except UserError as error:
            status = str(error)
        assert status in (0, None) or isinstance(status, Config), f"{where}: {line}\n{status} {capsys.readouterr().err}"
        seen.append(found[0])
    assert {"pretrain", "launch", "preprocess", "convert-from-hf", "convert-to-hf", "evaluate", "score"} <= set(seen)
    assert len(seen) > 30


def test_every_command_named_in_the_text_exists():
    text = "\n".join(path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    named = set(re.findall(r"megatron-prune ([a-z][a-z-]*)", text)) | set(re.findall(r"-m megatron_prune (\S+)", text))
    assert named <= set(COMMANDS) and len(named) > 10
